"""Your own pairs: parquet with the columns below, any file names, any folders.

    prompt      text
    image_0     displayed first: bytes, an image struct {bytes, path}, a path below the file's folder, or your id of it
    image_1     displayed second
    label_0     preference for image_0: 1, 0.5 (tie) or 0; null: no label
    annotator, created_at, split (train, validation, test), group, count, model_0, model_1, image_0_uid, image_1_uid: optional

An id is a path without a file: the image has no bytes, takes votes and imported scores, and is never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from pipelines.config import LimitsConfig, SourceConfig
from pipelines.files import Folder
from pipelines.sources import RawChunk, Sample, Shard, columns, images_only, list_files, split_of
from pipelines.sources.pictures import Pictures

TYPES: dict[str, pl.DataType | type[pl.DataType]] = {
    "prompt": pl.String,
    "label_0": pl.Float64,
    "annotator": pl.String,
    "created_at": pl.Datetime("us"),
    "split": pl.String,
    "group": pl.String,
    "count": pl.Int64,
    "model_0": pl.String,
    "model_1": pl.String,
}
IDS = ("annotator", "group", "model_0", "model_1", "split")
IMAGES = {"image_0": "image_0_uid", "image_1": "image_1_uid"}
REQUIRED = ("prompt", *IMAGES, "label_0")
EXPECTED = f"pairs: parquet with columns {list(REQUIRED)} and, where known, {[c for c in TYPES if c not in REQUIRED]}"
_SPLITS = ("train", "validation", "test")


def recognises(sample: Sample) -> bool:
    """Return whether a parquet file has the layout's columns."""
    return sample.kind == "parquet" and set(REQUIRED) <= set(sample.names)


def list_shards(source: SourceConfig) -> list[Shard]:
    """Return one shard per parquet file.

    Raises:
        SourceError: there is none.
    """
    return list_files(source.name, Folder(source.location), (".parquet",), EXPECTED)


def fingerprint(source: SourceConfig, shard: Shard) -> str:
    """Return what changes when the file changes, or an image file that it names comes, goes or changes."""
    return columns.watched_fingerprint(Folder(source.location), shard, tuple(IMAGES))


def read_shard(source: SourceConfig, shard: Shard, limits: LimitsConfig) -> Iterator[RawChunk]:
    """Yield the file's rows in pieces.

    Raises:
        SourceError: the file is not readable parquet, or lacks a column or has it in an unusable type.
    """
    folder = Folder(source.location)
    file, split = folder.uri(shard.file), split_of(shard.file, source.split)
    pictures = Pictures(folder, columns.file_folder(shard.file), None, limits)
    for piece in columns.read_pieces(folder, shard.file, tuple(TYPES), REQUIRED, IMAGES):
        if piece.image is not None:
            yield from map(
                images_only, columns.images_of(piece, {piece.image: IMAGES[piece.image]}, file, pictures, limits)
            )
            continue
        frame, problem = columns.typed(piece.table, TYPES, file, IDS)
        is_odd = pl.col("split").is_not_null() & ~pl.col("split").is_in(_SPLITS)
        why = pl.concat_str(pl.lit(f"column 'split': expected one of {list(_SPLITS)}, found "), "split")
        yield columns.votes(
            frame,
            shard.file,
            piece,
            tuple(IMAGES),
            prompt="prompt",
            label_first="label_0",
            label_second=1 - pl.col("label_0"),
            is_labelled=pl.col("label_0").is_not_null(),
            count="count" if "count" in piece.table.column_names else pl.lit(1),
            annotator="annotator",
            group="group",
            model_first="model_0",
            model_second="model_1",
            created_at="created_at",
            split=pl.when(~is_odd).then("split").fill_null(pl.lit(split, pl.String)),
            problem=pl.coalesce(problem, pl.when(is_odd).then(why)),
        )
