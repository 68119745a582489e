"""The pictures of a page: small JPEGs as data URIs, or why there is none.

Belongs here: from images of the store to what a page embeds. Does not belong here: how many bytes a page may have.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl
from PIL import Image, ImageFilter

from pipelines import images, schemas
from pipelines.sources import SourceError
from pipelines.stored import StoredImage, read_images
from pipelines.tables import Store

QUALITIES = (
    *((512, 82), (448, 80), (384, 80), (320, 78), (288, 76), (256, 75), (224, 72), (192, 68), (176, 64), (160, 60)),
    *((144, 55), (128, 50), (112, 45), (96, 40), (80, 35), (64, 30)),
)
"""(longest side in pixels, JPEG quality), best first: a page takes the first with which it fits."""
PIXEL_ART = 64
"""Pictures up to this side are kept whole, in full colour, and enlarged as squares."""
_BATCH = 32


@dataclass(frozen=True)
class Picture:
    """An image as a page may show it: a JPEG of at most the first of QUALITIES, or None with status and reason."""

    jpeg: bytes | None
    width: int = 0
    height: int = 0
    status: str = "ok"
    reason: str | None = None

    @property
    def is_pixel_art(self) -> bool:
        """Return whether the picture is so small that its pixels are to be seen."""
        return max(self.width, self.height) <= PIXEL_ART


def read(store: Store, shard_keys: Sequence[str], wanted: Iterable[str], blur: float) -> dict[str, Picture]:
    """Return image_id -> picture for every wanted image."""
    ids = sorted(set(wanted))
    found: dict[str, Picture] = {}
    owners = store.scan(schemas.CATALOGUE_IMAGES).filter(pl.col("image_id").is_in(ids)).collect()
    for (owner,), part in owners.sort("owner").group_by("owner", maintain_order=True):
        if owner not in shard_keys:
            continue
        try:
            for batch in read_images(store, str(owner), part["image_id"].to_list(), _BATCH):
                found.update((i.image_id, _picture(i, blur)) for i in batch)
        except SourceError as error:
            # A page without the pictures of a shard says more than no page.
            problem = Picture(None, status="unreadable", reason=str(error))
            found.update((i, problem) for i in part["image_id"] if i not in found)
    absent = Picture(None, status="missing", reason="no shard of the catalogue holds the image")
    return {i: found.get(i, absent) for i in ids}


def _picture(image: StoredImage, blur: float) -> Picture:
    if image.data is None:
        return Picture(None, status=image.status, reason=image.reason)
    try:
        picture = images.decode_rgb(image.data)
    except images.UndecodableImage as error:
        return Picture(None, status="undecodable", reason=str(error))
    width, height = picture.size
    picture.thumbnail(QUALITIES[0][:1] * 2)
    if blur:
        # Here, before anything is kept: nothing behind this line has the sharp picture.
        picture = picture.filter(ImageFilter.GaussianBlur(blur / 100 * max(picture.size)))
    return Picture(_jpeg(picture, 95, full_colour=True), width, height)


def _jpeg(picture: Image.Image, quality: int, full_colour: bool) -> bytes:
    # A source's comment would come along: of any length, and blurred by nothing.
    picture.info.clear()
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=True, subsampling=0 if full_colour else 2)
    return out.getvalue()


def uri(picture: Picture, side: int, quality: int) -> str:
    """Return a picture as data URI: a JPEG of this quality, its longer side at most `side` (pixel art as it is)."""
    assert picture.jpeg is not None
    data = picture.jpeg
    if not picture.is_pixel_art:
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        image.thumbnail((side, side))
        data = _jpeg(image, quality, full_colour=False)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
