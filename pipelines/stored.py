"""The images of an ingested shard, with their bytes: from the store, or from where the source holds them.

Bytes that are referred to are compared with the sha256 of ingestion, so that a source which changed gives a status, never
another picture under an old id. Belongs here: from rows of `images` to bytes. Does not belong here: decoding (`images`).
"""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import schemas
from pipelines.files import is_gone, open_uri
from pipelines.sources import SourceError
from pipelines.sources.columns import piece_rows
from pipelines.tables import Store

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, pa.ArrowException)
"""What reading a place raises where the file holds something else now: another type, fewer row groups, no parquet."""
_PLACE = ["uri", "row_group", "row", "image_column", "byte_offset", "byte_length"]


@dataclass(frozen=True)
class StoredImage:
    """One image: `data` is None unless status is ok (schemas.SCORE_STATUSES).

    is_lost: ingestion had its bytes, and where it refers to they are no more, or others.
    """

    image_id: str
    data: bytes | None
    status: str
    reason: str | None
    is_lost: bool = False


def read_images(store: Store, shard_key: str, wanted: Collection[str], batch: int) -> Iterator[list[StoredImage]]:
    """Yield the wanted images of a shard in lists of at most `batch`.

    Raises:
        tables.StoreError: the shard is not ingested.
        sources.SourceError: a file of the source is there but cannot be read now (refused, interrupted).
    """
    part: list[StoredImage] = []
    for image in _images(store, shard_key, wanted, batch):
        part.append(image)
        if len(part) == batch:
            yield part
            part = []
    if part:
        yield part


def _images(store: Store, shard_key: str, wanted: Collection[str], batch: int) -> Iterator[StoredImage]:
    columns = ["image_id", "sha256", "bytes", "status", "reason", *_PLACE]
    referred: list[pl.DataFrame] = []
    chosen = frozenset(wanted)
    with store.open_parquet(schemas.IMAGES, shard_key) as file:
        for piece in file.iter_batches(batch, columns=columns):
            frame = pl.DataFrame(pl.from_arrow(piece))
            frame = frame.filter(pl.Series([i in chosen for i in frame["image_id"]], dtype=pl.Boolean))
            is_elsewhere = (pl.col("status") == "ok") & pl.col("bytes").is_null()
            for image_id, data, status, reason in (
                frame.filter(~is_elsewhere).select(columns[0], *columns[2:5]).iter_rows()
            ):
                yield StoredImage(image_id, data if status == "ok" else None, status, reason)
            referred.append(frame.filter(is_elsewhere).drop("bytes"))
    for (uri,), rows in pl.concat(referred).group_by("uri", maintain_order=True) if referred else ():
        digests = dict(rows.select("image_id", "sha256").iter_rows())
        for image_id, data, problem in _read(str(uri), rows):
            if data is None:
                yield StoredImage(image_id, None, "missing", f"{uri}: {problem}", is_lost=True)
            elif hashlib.sha256(data).hexdigest() != digests[image_id]:
                why = f"{uri}: the bytes are not those that were ingested; ingest shard {shard_key} again"
                yield StoredImage(image_id, None, "changed", why, is_lost=True)
            else:
                yield StoredImage(image_id, data, "ok", None)


def _read(uri: str, rows: pl.DataFrame) -> Iterator[tuple[str, bytes | None, str | None]]:
    left = rows["image_id"].to_list()
    done: set[str] = set()
    try:
        for image_id, data in _cells(uri, rows) if rows["image_column"].null_count() == 0 else _ranges(uri, rows):
            done.add(image_id)
            yield image_id, data, None
        problem = "the row is not there any more"
    except _UNREADABLE as error:
        if not is_gone(error):
            # Refused or interrupted, perhaps for a moment only: that must not be kept as the image's status.
            raise SourceError(f"{uri}: cannot be read ({error}); run the step again when it can") from error
        problem = str(getattr(error, "strerror", None) or error)
    yield from ((image_id, None, problem) for image_id in left if image_id not in done)


def _ranges(uri: str, rows: pl.DataFrame) -> Iterator[tuple[str, bytes]]:
    with open_uri(uri) as handle:
        for image_id, offset, length in rows.select("image_id", "byte_offset", "byte_length").iter_rows():
            handle.seek(offset or 0)
            yield image_id, handle.read() if length is None else handle.read(length)


def _cells(uri: str, rows: pl.DataFrame) -> Iterator[tuple[str, bytes]]:
    with open_uri(uri) as handle, pq.ParquetFile(handle, buffer_size=1 << 20, pre_buffer=False) as file:
        # One column at a time: see sources.columns.read_pieces.
        for (group, column), part in rows.group_by("row_group", "image_column", maintain_order=True):
            if group >= file.num_row_groups or column not in file.schema_arrow.names:
                raise LookupError(f"it has no row group {group} with a column {column!r} any more")
            places = dict(part.select("row", "image_id").iter_rows())
            size, start = piece_rows(file.metadata.row_group(group), [str(column)]), 0
            for piece in file.iter_batches(size, row_groups=[group], columns=[column], use_threads=False):
                for i, value in enumerate(piece.column(0), start):
                    if i in places and value.is_valid:
                        yield places[i], _bytes_of(value.as_py())
                start += len(piece)


def _bytes_of(value: object) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, str):
        return binascii.a2b_base64(value)
    if not isinstance(value, bytes):
        raise TypeError(f"expected bytes, found {type(value).__name__}")
    return value
