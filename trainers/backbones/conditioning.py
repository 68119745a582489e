"""What a backbone's UNet is told of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of N prompts: hidden states [N, tokens, width], and for SDXL the pooled embedding [N, pooled width]."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Sequence[int] | slice | torch.Tensor) -> Conditioning:
        return Conditioning(self.hidden[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, device: torch.device) -> Conditioning:
        """Return the embeddings on another device."""
        return Conditioning(self.hidden.to(device), None if self.pooled is None else self.pooled.to(device))

    def twice(self) -> Conditioning:
        """Return the embeddings for winners and then losers, [2N, ...]."""
        return Conditioning(
            torch.cat([self.hidden, self.hidden]), None if self.pooled is None else torch.cat([self.pooled] * 2)
        )
