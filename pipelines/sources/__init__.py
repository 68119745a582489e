"""Sources: one file per layout, each giving the same three functions.

`list_shards(source) -> list[Shard]`, `fingerprint(shard) -> str`, `read_shard(source, shard) -> Iterator[RawChunk]`. A
chunk's votes point at its images by `image_key`, so that bytes stand once however many raters saw them. Belongs here:
what a layout says. Does not belong here: identities, statuses of images, writing (`pipelines.ingest`).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl


class SourceError(ValueError):
    """A file of a source cannot be read as its layout says; the message names file, column, found and expected."""


@dataclass(frozen=True)
class Shard:
    """A piece of a source that is ingested at once. `key` is unique over all sources and names files and partitions.

    `fingerprint` is of the file that lists the rows; a layout's `fingerprint` function adds what else they name.
    """

    key: str
    source: str
    file: str
    fingerprint: str
    start: int = 0
    stop: int | None = None


IMAGE_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "image_key": pl.String,
    "bytes": pl.Binary,
    "uid": pl.String,
    "problem": pl.String,
}
VOTE_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "source_row": pl.String,
    "rater": pl.Int32,
    "prompt": pl.String,
    "first_key": pl.String,  # image displayed first; label_first is the preference for it
    "second_key": pl.String,
    "is_display_order": pl.Boolean,  # false: the source's order says nothing about what was shown where
    "label_first": pl.Float64,
    "label_second": pl.Float64,
    "is_labelled": pl.Boolean,
    "annotator": pl.String,
    "group": pl.String,
    "model_first": pl.String,
    "model_second": pl.String,
    "created_at": pl.Datetime("us"),
    "split": pl.String,
}


@dataclass(frozen=True)
class RawChunk:
    """Some rows of a shard: images (IMAGE_SCHEMA) and the votes on them (VOTE_SCHEMA)."""

    images: pl.DataFrame
    votes: pl.DataFrame
