"""Encoded images: headers at ingest, pixels once at scoring or caching, a status instead of an exception.

Belongs here: what is known from bytes alone. Does not belong here: preprocessing of a scorer or a backbone.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@dataclass(frozen=True)
class Header:
    """What an image's header says; `status` is one of schemas.IMAGE_STATUSES."""

    width: int | None
    height: int | None
    format: str | None
    status: str
    reason: str | None


def read_header(data: bytes | None) -> Header:
    """Read format and size without decoding, and look for the format's end marker."""
    if data is None:
        return Header(None, None, None, "no_bytes", "the source has no bytes for it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        return Header(None, None, None, "too_large", f"limit {MAX_PIXELS} pixels: {error}")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        return Header(None, None, None, "unreadable", f"no image format recognised in {len(data)} bytes: {error}")
    width, height = image.size
    if width * height > MAX_PIXELS:
        return Header(width, height, image.format, "too_large", f"{width}x{height} pixels, limit {MAX_PIXELS}")
    marker = _END_MARKERS.get(image.format or "")
    # Encoders may pad behind the end marker, so it is searched in the tail, not expected as the very last bytes.
    if marker is not None and marker not in data[-1024:]:
        return Header(
            width, height, image.format, "truncated", f"{image.format} without end marker in {len(data)} bytes"
        )
    return Header(width, height, image.format, "ok", None)


class UndecodableImage(ValueError):
    """The pixels cannot be decoded; the message says why."""


def decode_rgb(data: bytes) -> Image.Image:
    """Decode to a plain RGB picture (alpha dropped, EXIF rotation not applied: as the reward models' packages do).

    Raises:
        UndecodableImage: the bytes are not a whole image.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error)) from error
