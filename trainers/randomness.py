"""Counter-based randomness: every draw is keyed by what it is for, never by step or rank.

So a resumed run and another recipe on the same pair see the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def generator(*key: str | int) -> torch.Generator:
    """Return a CPU generator seeded from the key.

    torch takes 32 bits of a seed: of a million keys about a hundred share their draws with another, which does no harm.
    """
    digest = hashlib.blake2b("\x1f".join(str(k) for k in key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def normal(shape: tuple[int, ...], keys: Sequence[tuple[str | int, ...]]) -> torch.Tensor:
    """Return standard normal noise [N, *shape], one independent draw per key."""
    return torch.stack([torch.randn(shape, generator=generator(*k)) for k in keys])


def integers(high: int, keys: Sequence[tuple[str | int, ...]]) -> torch.Tensor:
    """Return uniform integers in [0, high), [N]."""
    return torch.cat([torch.randint(0, high, (1,), generator=generator(*k)) for k in keys])


def uniform(keys: Sequence[tuple[str | int, ...]]) -> torch.Tensor:
    """Return uniform numbers in [0, 1), [N]."""
    return torch.cat([torch.rand(1, generator=generator(*k)) for k in keys])
