"""Encoded images: headers at ingest, pixels once at scoring or caching, a status instead of an exception.

Belongs here: what is known from bytes alone. Does not belong here: preprocessing of a scorer or a backbone.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from pipelines.config import LimitsConfig

# Our own limits say what is too large, before pixels are decoded; Pillow's global one would overrule larger ones.
Image.MAX_IMAGE_PIXELS = None
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "JPEG2000", "TIFF", "BMP", "PPM")
"""What may be an image: of Pillow's other formats some run programs (EPS) or decode whole pictures for a header (ICO)."""
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b"\0;"}
_TAIL = 1024
_LARGEST_SIDE = 2**31 - 1
_PILLOW_ERRORS = (
    *(UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError),
    *(MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
    *(RuntimeError, AssertionError, AttributeError),
)
"""What Pillow raises on damaged files: its plugins parse with struct and indices, and AVIF's says RuntimeError."""


@dataclass(frozen=True)
class Header:
    """What an image's header says; `status` is one of schemas.IMAGE_STATUSES."""

    width: int | None
    height: int | None
    format: str | None
    status: str
    reason: str | None


def read_header(data: bytes | pa.Buffer | None, limits: LimitsConfig | None = None) -> Header:
    """Read format and size without decoding, look for the format's end marker, and apply the limits."""
    limits = limits or LimitsConfig()
    if data is None:
        return Header(None, None, None, "no_bytes", "the source has no bytes for it")
    size = data.size if isinstance(data, pa.Buffer) else len(data)
    if size == 0:
        return Header(None, None, None, "unreadable", "zero bytes")
    if size > limits.max_image_bytes:
        why = f"{size} bytes, limit limits.max_image_bytes = {limits.max_image_bytes}"
        return Header(None, None, None, "too_large", why)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            kind: str | None = image.format
    except _PILLOW_ERRORS as error:
        return Header(None, None, None, "unreadable", f"no image format recognised in {size} bytes: {_said(error)}")
    if (limit := _too_large(width, height, limits)) is not None:
        # A header may claim more than the table's integers hold; the reason has the claim.
        told = [side if side <= _LARGEST_SIDE else None for side in (width, height)]
        return Header(told[0], told[1], kind, "too_large", limit)
    marker = _END_MARKERS.get(kind or "")
    # Encoders may pad behind the end marker, so it is searched in the tail, not expected as the very last bytes.
    if marker is not None and marker not in _tail(data, size):
        return Header(width, height, kind, "truncated", f"{kind} without end marker in {size} bytes")
    return Header(width, height, kind, "ok", None)


def _said(error: Exception) -> str:
    # Pillow names the object it read from, with its address in memory: the same file must give the same reason.
    return type(error).__name__ if not str(error) or "object at 0x" in str(error) else str(error)


def _tail(data: bytes | pa.Buffer, size: int) -> bytes:
    start = max(0, size - _TAIL)
    return data.slice(start).to_pybytes() if isinstance(data, pa.Buffer) else data[start:]


def _too_large(width: int, height: int, limits: LimitsConfig) -> str | None:
    if width * height > limits.max_image_pixels:
        return f"{width}x{height} pixels, limit limits.max_image_pixels = {limits.max_image_pixels}"
    if max(width, height) > limits.max_image_side:
        return f"{width}x{height} pixels, limit limits.max_image_side = {limits.max_image_side}"
    return None


class UndecodableImage(ValueError):
    """The pixels cannot be decoded; the message says why."""


def decode(data: bytes) -> Image.Image:
    """Decode to a picture in its own mode, its pixels loaded; EXIF rotation is not applied (no reward model does).

    Only for images whose header was found ok: their size is within the limits. Of an animation the first frame.

    Raises:
        UndecodableImage: the bytes are not a whole image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except _PILLOW_ERRORS as error:
        raise UndecodableImage(_said(error)) from error
    return image


def decode_rgb(data: bytes) -> Image.Image:
    """Decode to a plain RGB picture, alpha dropped; see decode.

    Raises:
        UndecodableImage: the bytes are not a whole image.
    """
    image = decode(data)
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except _PILLOW_ERRORS as error:
        raise UndecodableImage(_said(error)) from error
