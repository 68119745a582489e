"""Pick-a-Pic v1/v2 as parquet shards: `data/<split>-00000-of-00645-<hash>.parquet`, raw JPEG bytes in jpg_0, jpg_1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import identity
from pipelines.config import SourceConfig
from pipelines.sources import IMAGE_SCHEMA, VOTE_SCHEMA, RawChunk, Shard, SourceError

TYPES = {
    "caption": pl.String(),
    "created_at": pl.Datetime("us"),
    "has_label": pl.Boolean(),
    "image_0_uid": pl.String(),
    "image_1_uid": pl.String(),
    "jpg_0": pl.Binary(),
    "jpg_1": pl.Binary(),
    "label_0": pl.Float64(),
    "label_1": pl.Float64(),
    "model_0": pl.String(),
    "model_1": pl.String(),
    "ranking_id": pl.String(),
    "user_id": pl.String(),
}
"""Columns that are read, and the types they are read as: mirrors store some of them otherwise (numbers as strings)."""
REQUIRED = tuple(TYPES)
_FILE = re.compile(r"(?P<split>train|validation|test)(?:_unique)?-\d{5}-of-\d{5}.*\.parquet")


def list_shards(source: SourceConfig) -> list[Shard]:
    """Return one shard per parquet file of the source.

    Raises:
        SourceError: the folder holds no file of the layout.
    """
    folder = Path(source.location)
    files = sorted(f for f in folder.glob("data/*.parquet") if _FILE.fullmatch(f.name))
    if not files:
        raise SourceError(
            f"source {source.name!r}: no file data/{{train,validation,test}}-00000-of-*.parquet below {folder}; "
            f"set its location to the folder that holds data/"
        )
    shards = []
    for file in files:
        stat = file.stat()
        mark = identity.fingerprint(file=file.name, size=stat.st_size, modified=stat.st_mtime_ns)
        shards.append(Shard(f"{source.name}.{file.stem}", source.name, str(file), mark))
    return shards


def fingerprint(shard: Shard) -> str:
    """Return what changes when the shard's file changes; it names no other file."""
    return shard.fingerprint


def read_shard(source: SourceConfig, shard: Shard) -> Iterator[RawChunk]:
    """Yield the shard's rows, one row group at a time.

    Raises:
        SourceError: the file is not readable parquet, or lacks a column of the layout or has it in an unusable type.
    """
    match = _FILE.fullmatch(Path(shard.file).name)
    if match is None:
        raise SourceError(f"{shard.file}: expected a name like train-00000-of-00645-<hash>.parquet")
    try:
        with pq.ParquetFile(shard.file) as file:
            names = file.schema_arrow.names
            if missing := [c for c in REQUIRED if c not in names]:
                raise SourceError(
                    f"{shard.file}: column {missing[0]!r} is missing (all missing: {missing}); expected {list(REQUIRED)}, "
                    f"found {names}; is this Pick-a-Pic's layout with images?"
                )
            row = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=list(REQUIRED))
                yield _chunk(_typed(table, shard.file), Path(shard.file).stem, row, match["split"])
                row += table.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{shard.file}: not a readable parquet file ({error}); fetch it again") from error


def _typed(table: pa.Table, file: str) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    columns = []
    for name, dtype in TYPES.items():
        found = frame[name].dtype
        wrong = f"{file}: column {name!r}: expected {dtype}, found {found}, which cannot be read as such"
        # Polars casts the fields of a struct, not the struct.
        if found.is_nested():
            raise SourceError(wrong)
        try:
            columns.append(frame[name].cast(dtype))
        except pl.exceptions.PolarsError as error:
            raise SourceError(f"{wrong} ({error})") from error
    return pl.DataFrame(columns)


def _chunk(frame: pl.DataFrame, stem: str, start: int, split: str) -> RawChunk:
    frame = frame.with_row_index("row", offset=start).with_columns(pl.col("row").cast(pl.String))
    images = pl.concat(
        frame.select(
            image_key=pl.col("row") + f":{i}",
            bytes=pl.col(f"jpg_{i}"),
            uid=pl.col(f"image_{i}_uid"),
            problem=pl.lit(None, pl.String),
        )
        for i in (0, 1)
    )
    votes = frame.select(
        source_row=pl.lit(f"{stem}:") + pl.col("row"),
        rater=pl.lit(0, pl.Int32),
        prompt="caption",
        first_key=pl.col("row") + ":0",
        second_key=pl.col("row") + ":1",
        is_display_order=pl.lit(True),
        label_first="label_0",
        label_second="label_1",
        is_labelled=pl.col("has_label").fill_null(False),
        annotator="user_id",
        group="ranking_id",
        model_first="model_0",
        model_second="model_1",
        created_at="created_at",
        split=pl.lit(split),
    )
    return RawChunk(images.cast(pl.Schema(IMAGE_SCHEMA)), votes.cast(pl.Schema(VOTE_SCHEMA)))
