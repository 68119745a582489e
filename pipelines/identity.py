"""Keys: the first 128 bits of a sha256 as 32 hex characters, the same for the same content from any source.

Belongs here: how an identity is computed. Does not belong here: who owns what (`catalogue`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

ID_CHARACTERS = 32


def _key(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:ID_CHARACTERS]


def image_id_of_bytes(data: bytes | memoryview) -> tuple[str, str]:
    """Return (image_id, full sha256 hex digest) of an image's encoded bytes."""
    digest = hashlib.sha256(data).hexdigest()
    return digest[:ID_CHARACTERS], digest


def image_id_of_uid(family: str, uid: str) -> str:
    """Return the id of an image of which a source names only a uid."""
    return _key("uid", family, uid)


def normalise_prompt(prompt: str) -> str:
    """Return the prompt in Unicode NFC without surrounding white space: prompts equal under this are one prompt."""
    return unicodedata.normalize("NFC", prompt).strip()


def prompt_id(prompt: str) -> str:
    """Return the id of a prompt (of its normalised form)."""
    return _key("prompt", normalise_prompt(prompt))


def pair_id(prompt: str, image_0: str, image_1: str) -> str:
    """Return the id of a pair from the prompt's id and the images' ids with image_0 < image_1.

    Raises:
        ValueError: the images are not in order, or are one image.
    """
    if not image_0 < image_1:
        raise ValueError(f"pair_id: expected image_0_id < image_1_id, found {image_0} and {image_1}")
    return _key("pair", prompt, image_0, image_1)


def vote_id(source: str, source_row: str, k: int) -> str:
    """Return the id of the k-th vote of a source's row (k counts raters and pairs of a ranking)."""
    return _key("vote", source, source_row, str(k))


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return a file's sha256; read again only if its size or time of change is another than before in this process."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


def fingerprint(**parts: Any) -> str:
    """Return 16 hex characters that change when any of the JSON-serialisable `parts` changes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
