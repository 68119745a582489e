"""Decoded pictures and the resizes that reward models share: each distinct one is made once per picture.

Belongs here: from a decoded image to a model's pixels, before normalisation. Does not belong here: models.
Every recipe equals the code of the package it comes from; what moved a score when done otherwise is said at each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_LARGEST_SCRATCH = 3 * 2048 * 2048
"""Floats that a thread keeps between pictures, 50 MB."""
_LARGEST_RESIZED = 64_000_000
"""Pixels of a resized picture; beyond, the square that is looked at is resized alone."""


@dataclass
class Picture:
    """A decoded image in its own mode, with what was made of it so far; one thread prepares it at a time.

    data: its encoded bytes, for judges that read files.
    """

    image: Image.Image
    data: bytes | None = None
    _rgb: Image.Image | None = None
    _shortest: dict[tuple[str, int], Image.Image] = field(default_factory=dict)

    @property
    def rgb(self) -> Image.Image:
        """Return it as plain RGB: alpha dropped, not composited."""
        if self._rgb is None:
            self._rgb = self.image if self.image.mode == "RGB" else self.image.convert("RGB")
        return self._rgb

    def shortest_shape(self, size: int) -> tuple[int, int]:
        """Return width and height with the shorter side `size`, the longer one truncated, as torchvision does."""
        short = min(self.image.size)
        width, height = (max(1, int(size * side / short)) for side in self.image.size)
        return width, height

    def shortest(self, size: int, *, own_mode: bool = False) -> Image.Image:
        """Return it with its shorter side `size`, bicubic (Pillow); the longer one truncated, as torchvision does.

        own_mode: resized in the image's own mode (a palette's indices by the nearest), RGB afterwards.
        """
        source = self.image if own_mode else self.rgb
        key = (source.mode, size)
        if key not in self._shortest:
            shape = self.shortest_shape(size)
            resized = source if source.size == shape else source.resize(shape, Image.Resampling.BICUBIC)
            self._shortest[key] = resized if resized.mode == "RGB" else resized.convert("RGB")
        return self._shortest[key]


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return an RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def _crop(picture: Picture, size: int, offset: Callable[[int], int], own_mode: bool) -> torch.Tensor:
    """Return the middle square of the picture resized to its shorter side, uint8 [3, size, size]; black outside of it."""
    width, height = picture.shortest_shape(size)
    left, top = offset(width - size), offset(height - size)
    if width * height <= _LARGEST_RESIZED:
        image = picture.shortest(size, own_mode=own_mode)
        return to_pixels(image.crop((left, top, left + size, top + size)))
    # A thread of 1x4000 pixels would become a gigabyte, of which one square is looked at: only that is made.
    source = picture.image if own_mode else picture.rgb
    x, y = source.width / width, source.height / height
    box = (max(0.0, left * x), max(0.0, top * y), (left + size) * x, (top + size) * y)
    box = (*box[:2], min(box[2], source.width), min(box[3], source.height))
    return to_pixels(source.resize((size, size), Image.Resampling.BICUBIC, box).convert("RGB"))


def crop_floor(picture: Picture, size: int) -> torch.Tensor:
    """Return transformers' CLIP preprocessing before normalisation: shorter side, centre crop with floor offsets."""
    return _crop(picture, size, lambda excess: excess // 2, own_mode=False)


def crop_round(picture: Picture, size: int) -> torch.Tensor:
    """Return OpenAI CLIP's and ImageReward's preprocessing before normalisation.

    Resized in the image's own mode (RGB first: 4.5 ImageReward points), offsets rounded half to even (floor: 0.94).
    """
    return _crop(picture, size, lambda excess: round(excess / 2.0), own_mode=True)


def longest_padded(picture: Picture, size: int) -> torch.Tensor:
    """Return HPSv2's preprocessing before normalisation: float32 [3, size, size] in about [0, 1].

    The float tensor is resized (bicubic with antialias, not clamped) until its longer side is `size`, and padded with
    zeros to a square. (Without antialias: 0.13; Pillow's resize: 1.2e-2; padding after normalising: 0.50.)
    """
    image = picture.rgb
    # Bytes to floats in one pass over memory that is used again and again, and 255 divided out of the small picture: half
    # the time, 4e-7 apart.
    pixels = _scratch(image.height, image.width)
    pixels.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    scale = size / max(image.size)
    if scale != 1.0:
        shape = [max(1, round(side * scale)) for side in (image.height, image.width)]
        pixels = F.interpolate(pixels[None], shape, mode="bicubic", antialias=True, align_corners=False)[0]
    pixels = pixels / 255
    height, width = size - pixels.shape[1], size - pixels.shape[2]
    if height or width:
        pixels = F.pad(pixels, (width // 2, width - width // 2, height // 2, height - height // 2))
    return pixels


_kept = threading.local()


def _scratch(height: int, width: int) -> torch.Tensor:
    """Return float32 [3, height, width] that this thread alone uses, until it asks again: fresh memory costs as much time."""
    wanted = 3 * height * width
    if wanted > _LARGEST_SCRATCH:
        return torch.empty((3, height, width))
    kept = getattr(_kept, "floats", None)
    if kept is None or kept.numel() < wanted:
        kept = _kept.floats = torch.empty(wanted)
    return kept[:wanted].view(3, height, width)


def normalise(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Return a batch [N, 3, H, W] of uint8 or of floats in [0, 1] normalised, float32; mean and std are [3, 1, 1]."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    return (pixels - mean) / std
