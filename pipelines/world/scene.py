"""Prompts, pictures and the exact attribute reader of the small world.

A prompt fixes 2 to 4 attributes of a coloured shape ("a small red circle, left"); what it leaves out, and always the
background's brightness and warmth and the object's saturation, stays open, so that taste has something to move.

Belongs here: the grammar, the renderer, its inverse. Does not belong here: who likes what (`people`), files (`raw`).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, fields

import numpy as np

PIXELS = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "center")
NONE = -1
"""Index of an attribute that a prompt leaves open, or that the reader could not find."""

HUES_DEGREES = np.array([0.0, 55.0, 120.0, 220.0, 285.0])
RADII_PIXELS = np.array([5.3, 8.5])
RADIUS_JITTER_PIXELS = 0.5
CENTRES_PIXELS = np.array(
    [[9.5, 16.0], [22.5, 16.0], [16.0, 9.5], [16.0, 22.5], [16.0, 16.0]]
)  # x to the right, y down
CENTRE_JITTER_PIXELS = 1.0
OBJECT_VALUE = 0.65
BRIGHTNESS_RANGE = (0.35, 0.95)
SATURATION_RANGE = (0.45, 1.0)
WARMTH_TINT = 0.1
"""Warmth w in [-1, 1] adds (+WARMTH_TINT*w, 0, -WARMTH_TINT*w) to the background's grey."""
PREFIXES = ("", "a picture of ", "a drawing of ", "an icon of ")
MIN_CORRELATION = 0.6
"""Below this correlation with every template the reader says that there is no object."""


@dataclass(frozen=True)
class Wanted:
    """What a prompt fixes: an index into SHAPES, COLOURS, SIZES, PLACES, or NONE where it says nothing."""

    shape: int
    colour: int = NONE
    size: int = NONE
    place: int = NONE

    def fixed(self) -> dict[str, int]:
        """Return the attributes that the prompt fixes, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != NONE}

    def text(self, prefix: str = "") -> str:
        """Return the prompt, e.g. 'a drawing of a small red circle, left'."""
        words = ["a"]
        words += [SIZES[self.size]] if self.size != NONE else []
        words += [COLOURS[self.colour]] if self.colour != NONE else []
        words += [SHAPES[self.shape]]
        return prefix + " ".join(words) + (f", {PLACES[self.place]}" if self.place != NONE else "")


def all_prompts() -> list[str]:
    """Return every prompt of the grammar that fixes 2 to 4 attributes, in a fixed order."""
    choices = itertools.product(
        range(len(SHAPES)), range(NONE, len(COLOURS)), range(NONE, len(SIZES)), range(NONE, len(PLACES))
    )
    wanted = [Wanted(*c) for c in choices]
    return [w.text(prefix) for prefix in PREFIXES for w in wanted if len(w.fixed()) >= 2]


@functools.cache
def parse_prompt(prompt: str) -> Wanted:
    """Return what `prompt` fixes.

    Raises:
        ValueError: the prompt is not of the world's grammar (it names no shape, or two of a kind).
    """
    words = prompt.replace(",", " ").split()
    found = {}
    for name, vocabulary in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
        hits = [vocabulary.index(w) for w in words if w in vocabulary]
        if len(hits) > 1 or (name == "shape" and not hits):
            raise ValueError(
                f"prompt {prompt!r}: expected one of {vocabulary} at most once (a shape exactly once), "
                f"found {len(hits)}; the small world reads only prompts of its own grammar"
            )
        found[name] = hits[0] if hits else NONE
    return Wanted(**found)


@dataclass(frozen=True)
class Scenes:
    """N pictures' parameters; all arrays have shape [N].

    shape, colour, size, place: indices (NONE: not found). brightness in [0, 1], saturation in [0, 1], warmth in [-1, 1].
    x, y, radius: pixels.
    """

    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    place: np.ndarray
    brightness: np.ndarray
    saturation: np.ndarray
    warmth: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray

    def __len__(self) -> int:
        return len(self.shape)

    def take(self, index: np.ndarray) -> Scenes:
        """Return the scenes at `index`."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def sample_scenes(
    wanted: list[Wanted],
    rng: np.random.Generator,
    *,
    error_rate: float | np.ndarray = 0.0,
    brightness: np.ndarray | None = None,
    saturation: np.ndarray | None = None,
    warmth: np.ndarray | None = None,
) -> Scenes:
    """Draw one scene per prompt: fixed attributes as wanted (each wrong with `error_rate`), the rest uniform.

    `brightness`, `saturation` (in [0, 1], mapped to their ranges) and `warmth` (in [-1, 1]) may be given per scene, [N].
    """
    n = len(wanted)
    index = {}
    for name, vocabulary in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
        k = len(vocabulary)
        want = np.array([getattr(w, name) for w in wanted])
        free = rng.integers(0, k, n)
        value = np.where(want == NONE, free, want)
        wrong = (rng.random(n) < error_rate) & (want != NONE)
        index[name] = np.where(wrong, (value + rng.integers(1, k, n)) % k, value)

    def spread(unit: np.ndarray | None, low: float, high: float) -> np.ndarray:
        return low + (high - low) * (rng.random(n) if unit is None else unit)

    centre = CENTRES_PIXELS[index["place"]] + rng.uniform(-CENTRE_JITTER_PIXELS, CENTRE_JITTER_PIXELS, (n, 2))
    radius = RADII_PIXELS[index["size"]] + rng.uniform(-RADIUS_JITTER_PIXELS, RADIUS_JITTER_PIXELS, n)
    return Scenes(
        **index,
        brightness=spread(brightness, *BRIGHTNESS_RANGE),
        saturation=spread(saturation, *SATURATION_RANGE),
        warmth=rng.uniform(-1, 1, n) if warmth is None else warmth,
        x=centre[:, 0],
        y=centre[:, 1],
        radius=radius,
    )


def _coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return how much of each pixel the shape covers, [N, 32, 32] in [0, 1], from its signed distance."""
    grid = np.arange(PIXELS) + 0.5
    dx = grid[None, None, :] - x[:, None, None]
    dy = grid[None, :, None] - y[:, None, None]
    r = radius[:, None, None]
    ax, ay = np.abs(dx), np.abs(dy)
    circle = np.hypot(dx, dy) - r
    square = np.maximum(ax, ay) - 0.88 * r
    # Three half-planes of an upright equilateral triangle, moved down so that its box is centred.
    sy = dy - 0.25 * r
    triangle = np.maximum(sy - 0.6 * r, ax * np.sqrt(3) / 2 - sy / 2 - 0.65 * r)
    arm = 0.36 * r
    cross = np.minimum(np.maximum(ax - r, ay - arm), np.maximum(ax - arm, ay - r))
    distance = np.choose(shape[:, None, None], [circle, square, triangle, cross])
    return np.clip(0.5 - distance, 0.0, 1.0)


def _hsv_to_rgb(hue_degrees: np.ndarray, saturation: np.ndarray, value: float) -> np.ndarray:
    """Return RGB in [0, 1], [N, 3]."""
    k = (np.array([5.0, 3.0, 1.0])[None, :] + hue_degrees[:, None] / 60.0) % 6.0
    return value - value * saturation[:, None] * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)


def render(scenes: Scenes, *, grain: float | np.ndarray = 0.0, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draw the scenes: uint8 RGB, [N, 32, 32, 3]; `grain` is the standard deviation of pixel noise (in [0, 1])."""
    mask = _coverage(scenes.shape, scenes.x, scenes.y, scenes.radius)[..., None]
    colour = _hsv_to_rgb(HUES_DEGREES[scenes.colour], scenes.saturation, OBJECT_VALUE)
    tint = WARMTH_TINT * scenes.warmth[:, None] * np.array([1.0, 0.0, -1.0])
    background = scenes.brightness[:, None] + tint
    picture = mask * colour[:, None, None, :] + (1 - mask) * background[:, None, None, :]
    if rng is not None:
        picture = picture + rng.normal(size=picture.shape) * np.broadcast_to(grain, (len(scenes),))[:, None, None, None]
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


@functools.lru_cache(maxsize=1)
def _templates() -> tuple[Scenes, np.ndarray, np.ndarray]:
    """Return candidate objects, their coverage [K, 1024] float32, and the same centred and of unit norm."""
    near, wide = np.arange(13.0, 20.0), np.arange(7.0, 26.0)
    centres = sorted({(x, y) for x in wide for y in near} | {(x, y) for x in near for y in wide})
    radii = np.linspace(RADII_PIXELS[0] - 1.0, RADII_PIXELS[1] + 1.0, 10)
    grid = np.array([(s, x, y, r) for s in range(len(SHAPES)) for x, y in centres for r in radii])
    shape, x, y, radius = grid[:, 0].astype(int), grid[:, 1], grid[:, 2], grid[:, 3]
    size = (radius > RADII_PIXELS.mean()).astype(int)
    dx, dy = x - PIXELS / 2, y - PIXELS / 2
    sideways, down = np.where(dx < 0, 0, 1), np.where(dy < 0, 2, 3)
    place = np.where(np.abs(dx) > np.abs(dy), sideways, down)
    place = np.where(np.maximum(np.abs(dx), np.abs(dy)) < 3.25, 4, place)
    zero = np.zeros(len(grid))
    scenes = Scenes(shape, np.zeros(len(grid), int), size, place, zero, zero, zero, x, y, radius)
    cover = _coverage(shape, x, y, radius).reshape(len(grid), -1).astype(np.float32)
    centred = cover - cover.mean(1, keepdims=True)
    return scenes, cover, centred / np.linalg.norm(centred, axis=1, keepdims=True)


def read_attributes(pictures: np.ndarray) -> Scenes:
    """Read the attributes of uint8 RGB pictures [N, 32, 32, 3]: the inverse of `render`.

    The background is the median of the border; every pixel is projected on the line from the background to the most
    different pixels; the best of all rendered templates by normalised cross-correlation gives shape, size and place;
    the colour under it gives hue and saturation. No template above MIN_CORRELATION: the four attributes are NONE.
    """
    if pictures.ndim != 4 or pictures.shape[1:] != (PIXELS, PIXELS, 3) or pictures.dtype != np.uint8:
        raise ValueError(
            f"pictures: expected uint8 [N, {PIXELS}, {PIXELS}, 3], found {pictures.dtype} {pictures.shape}"
        )
    templates, cover, unit = _templates()
    parts = []
    for start in range(0, len(pictures), 256):
        image = pictures[start : start + 256].astype(np.float32).reshape(-1, PIXELS * PIXELS, 3) / 255
        n = len(image)
        border = np.ones((PIXELS, PIXELS), bool)
        border[1:-1, 1:-1] = False
        background = np.median(image[:, border.ravel()], axis=1)
        offset = image - background[:, None]
        far = np.argsort(-np.linalg.norm(offset, axis=2), axis=1)[:, :24]
        direction = np.take_along_axis(offset, far[..., None], axis=1).mean(1)
        direction /= np.maximum((direction**2).sum(1, keepdims=True), 1e-6)
        projected = np.clip(np.einsum("npc,nc->np", offset, direction), 0, 1)
        centred = projected - projected.mean(1, keepdims=True)
        centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
        correlation = centred @ unit.T
        best = correlation.argmax(1)
        found = correlation[np.arange(n), best] >= MIN_CORRELATION
        inside = cover[best] >= 0.999
        colour = (image * inside[..., None]).sum(1) / np.maximum(inside.sum(1, keepdims=True), 1)
        outside = cover[best] <= 0
        behind = (image * outside[..., None]).sum(1) / np.maximum(outside.sum(1, keepdims=True), 1)
        high, low = colour.max(1), colour.min(1)
        chroma = np.maximum(high - low, 1e-6)
        r, g, b = colour.T
        hue = np.select([high == r, high == g], [(g - b) / chroma % 6, (b - r) / chroma + 2], (r - g) / chroma + 4) * 60
        apart = np.abs((hue[:, None] - HUES_DEGREES[None] + 180) % 360 - 180)
        scene = templates.take(best)
        parts.append(
            Scenes(
                shape=np.where(found, scene.shape, NONE),
                colour=np.where(found, apart.argmin(1), NONE),
                size=np.where(found, scene.size, NONE),
                place=np.where(found, scene.place, NONE),
                brightness=behind.mean(1),
                saturation=np.where(found, (high - low) / np.maximum(high, 1e-6), 0.0),
                warmth=np.clip((behind[:, 0] - behind[:, 2]) / (2 * WARMTH_TINT), -1, 1),
                x=scene.x,
                y=scene.y,
                radius=scene.radius,
            )
        )
    return Scenes(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Scenes)})


def fidelity(scenes: Scenes, wanted: list[Wanted]) -> np.ndarray:
    """Return the share of each prompt's fixed attributes that the scene has, [N] in [0, 1]."""
    right, fixed = np.zeros(len(scenes)), np.zeros(len(scenes))
    for name in ("shape", "colour", "size", "place"):
        want = np.array([getattr(w, name) for w in wanted])
        fixed += want != NONE
        right += (want != NONE) & (want == getattr(scenes, name))
    return right / fixed
