"""Pick-a-Pic v1/v2 as parquet: `data/<split>-00000-of-00645-<hash>.parquet`, raw JPEG bytes in jpg_0, jpg_1.

Also the `*_no_images` releases (images known by their uids), `validation_unique` and `test_unique` (splits validation and
test), mirrors under other file names, and conversions in which every column is text (images then as base64).
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from pipelines.config import LimitsConfig, SourceConfig
from pipelines.files import Folder
from pipelines.sources import RawChunk, Sample, Shard, columns, images_only, list_files, split_of

TYPES: dict[str, pl.DataType | type[pl.DataType]] = {
    "caption": pl.String,
    "created_at": pl.Datetime("us"),
    "has_label": pl.Boolean,
    "label_0": pl.Float64,
    "label_1": pl.Float64,
    "model_0": pl.String,
    "model_1": pl.String,
    "ranking_id": pl.String,
    "user_id": pl.String,
}
"""Columns beside the images, and the types they are read as."""
IDS = ("model_0", "model_1", "ranking_id", "user_id")
IMAGES = {"jpg_0": "image_0_uid", "jpg_1": "image_1_uid"}
REQUIRED = ("caption", "image_0_uid", "image_1_uid", "label_0")
EXPECTED = f"pickapic: parquet with columns {list(REQUIRED)} and, with images, {list(IMAGES)}"


def recognises(sample: Sample) -> bool:
    """Return whether a parquet file has the layout's columns."""
    return sample.kind == "parquet" and set(REQUIRED) <= set(sample.names)


def list_shards(source: SourceConfig) -> list[Shard]:
    """Return one shard per parquet file of the source.

    Raises:
        SourceError: the folder holds no parquet file.
    """
    return list_files(source.name, Folder(source.location), (".parquet",), EXPECTED)


def fingerprint(source: SourceConfig, shard: Shard) -> str:
    """Return what changes when the shard's file changes; it names no other file."""
    return shard.fingerprint


def read_shard(source: SourceConfig, shard: Shard, limits: LimitsConfig) -> Iterator[RawChunk]:
    """Yield the shard's rows in pieces.

    Raises:
        SourceError: the file is not readable parquet, or lacks a column of the layout or has it in an unusable type.
    """
    folder = Folder(source.location)
    file, split = folder.uri(shard.file), split_of(shard.file, source.split)
    for piece in columns.read_pieces(folder, shard.file, tuple(TYPES), REQUIRED, IMAGES):
        if piece.image is not None:
            yield from map(
                images_only, columns.images_of(piece, {piece.image: IMAGES[piece.image]}, file, None, limits)
            )
            continue
        frame, problem = columns.typed(piece.table, TYPES, file, IDS)
        found = piece.table.column_names
        yield columns.votes(
            frame,
            shard.file,
            piece,
            tuple(IMAGES),
            prompt="caption",
            label_first="label_0",
            label_second="label_1" if "label_1" in found else 1 - pl.col("label_0"),
            is_labelled=pl.col("has_label").fill_null(False)
            if "has_label" in found
            else pl.col("label_0").is_not_null(),
            annotator="user_id",
            group="ranking_id",
            model_first="model_0",
            model_second="model_1",
            created_at="created_at",
            split=pl.lit(split),
            problem=problem,
        )
