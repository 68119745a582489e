"""Pick-a-Pic v1/v2 as parquet shards: `data/<split>-00000-of-00645-<hash>.parquet`, raw JPEG bytes in jpg_0, jpg_1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import SourceConfig
from pipelines.identity import fingerprint
from pipelines.sources import IMAGE_SCHEMA, VOTE_SCHEMA, RawChunk, Shard, SourceError

REQUIRED = (
    "caption",
    "created_at",
    "has_label",
    "image_0_uid",
    "image_1_uid",
    "jpg_0",
    "jpg_1",
    "label_0",
    "label_1",
    "model_0",
    "model_1",
    "ranking_id",
    "user_id",
)
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
        mark = fingerprint(file=file.name, size=stat.st_size, modified=stat.st_mtime_ns)
        shards.append(Shard(f"{source.name}.{file.stem}", source.name, str(file), mark))
    return shards


def read_shard(source: SourceConfig, shard: Shard) -> Iterator[RawChunk]:
    """Yield the shard's rows, one row group at a time.

    Raises:
        SourceError: the file is not readable parquet, or lacks a column of the layout.
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
                yield _chunk(table, Path(shard.file).stem, row, match["split"])
                row += table.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{shard.file}: not a readable parquet file ({error}); fetch it again") from error


def _chunk(table: pa.Table, stem: str, start: int, split: str) -> RawChunk:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
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
        label_first=pl.col("label_0").cast(pl.Float64),
        label_second=pl.col("label_1").cast(pl.Float64),
        is_labelled=pl.col("has_label").fill_null(False),
        annotator=pl.col("user_id").cast(pl.String),
        group=pl.col("ranking_id").cast(pl.String),
        model_first="model_0",
        model_second="model_1",
        created_at=pl.col("created_at").cast(pl.Datetime("us")),
        split=pl.lit(split),
    )
    return RawChunk(images.cast(IMAGE_SCHEMA), votes.cast(VOTE_SCHEMA))
