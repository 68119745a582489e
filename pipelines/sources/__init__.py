"""Sources: one file per layout, each giving the same functions, and the shapes in which they hand over what they read.

    EXPECTED: str                                     the files and columns of the layout, for messages
    recognises(sample) -> bool                        whether a file's columns, fields or members are this layout's
    list_shards(source) -> list[Shard]
    fingerprint(source, shard) -> str                 changes when a row, or an image that a row names, changes
    read_shard(source, shard, limits) -> Iterator[RawChunk]

A chunk's votes point at images by `image_key`, of their own or an earlier chunk, so that bytes stand once however many
raters saw them. Belongs here: what a layout says. Does not belong here: identities, statuses, writing (`pipelines.ingest`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from pipelines import identity
from pipelines.files import Folder, Stat

COMPRESSED = (".tar.gz", ".tgz")


class SourceError(ValueError):
    """A file of a source cannot be read as its layout says; the message names file, column, found and expected."""


@dataclass(frozen=True)
class Shard:
    """A piece of a source that is ingested at once. `key` is unique over all sources and names files and partitions.

    file: relative to the source's location. `fingerprint` is of the file that lists the rows; a layout's `fingerprint`
    function adds what else they name. start, stop: its records, where a file is cut. bytes: how much it holds, images
    included. is_seekable: single images can be read again later (false within a compressed archive).
    """

    key: str
    source: str
    file: str
    fingerprint: str
    start: int = 0
    stop: int | None = None
    bytes: int = 0
    is_seekable: bool = True


@dataclass(frozen=True)
class Sample:
    """What was seen of one file when the layout was looked for: its columns, fields or member names."""

    file: str
    kind: str
    names: tuple[str, ...]


IMAGE_SCHEMA = pa.schema(
    [
        ("image_key", pa.string()),
        ("bytes", pa.large_binary()),
        ("uid", pa.string()),  # the source's own name of the image
        ("status", pa.string()),  # what the layout already knows is wrong (missing, refused, too_large), else null
        ("reason", pa.string()),
        # Where the bytes can be read again: a file, or a cell of a parquet file, or a range of an archive.
        ("uri", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int64()),  # within the row group
        ("image_column", pa.string()),
        ("byte_offset", pa.int64()),
        ("byte_length", pa.int64()),
    ]
)
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
    "count": pl.Int64,  # people whom the row counts for; null: unknown
    "source_label_first": pl.Float64,  # the source's own verdict on the pair, where it is more than its votes
    "source_confidence": pl.Float64,
    "annotator": pl.String,
    "group": pl.String,
    "model_first": pl.String,
    "model_second": pl.String,
    "created_at": pl.Datetime("us"),
    "split": pl.String,
    "problem": pl.String,  # why the source's row cannot be read
}


@dataclass(frozen=True)
class RawChunk:
    """Some rows of a shard: images (IMAGE_SCHEMA), the votes on them (VOTE_SCHEMA), how many source rows these are."""

    images: pa.Table
    votes: pl.DataFrame
    rows: int


def vote(source_row: str, **values: Any) -> dict[str, Any]:
    """Return one row of VOTE_SCHEMA: a vote by an unknown person, unless `values` say more."""
    return {
        **dict.fromkeys(VOTE_SCHEMA),
        "source_row": source_row,
        "rater": 0,
        "is_display_order": False,
        "is_labelled": True,
        "count": 1,
        **values,
    }


def problem_vote(source_row: str, problem: str, **values: Any) -> dict[str, Any]:
    """Return the row of VOTE_SCHEMA that stands for a source row that cannot be read."""
    return vote(source_row, problem=problem, is_labelled=False, **values)


def image(image_key: str, **values: Any) -> dict[str, Any]:
    """Return one row of IMAGE_SCHEMA."""
    return {**dict.fromkeys(IMAGE_SCHEMA.names), "image_key": image_key, **values}


def chunk(images: Iterable[Mapping[str, Any]], votes: list[dict[str, Any]], rows: int) -> RawChunk:
    """Return a chunk of rows made by `image` and `vote`."""
    listed = list(images)
    columns = [pa.array([i[f.name] for i in listed], f.type) for f in IMAGE_SCHEMA]
    return RawChunk(pa.Table.from_arrays(columns, schema=IMAGE_SCHEMA), pl.DataFrame(votes, schema=VOTE_SCHEMA), rows)


def images_only(images: pa.Table) -> RawChunk:
    """Return a chunk of images whose votes come in others."""
    return RawChunk(images, pl.DataFrame(schema=VOTE_SCHEMA), 0)


_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}


def split_of(name: str, default: str | None) -> str | None:
    """Return the split that a file's name or folders tell (`data/train-00000-of-00645.parquet`), else the default."""
    for part in reversed(name.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in _SPLITS:
                return _SPLITS[word]
    return default


def shard_key(source: str, name: str) -> str:
    """Return a shard's key from its source and file: characters that are safe in paths.

    `data/<stem>.parquet` and `<stem>.tar` are known by their stems; other names get a digest, so that no two files of a
    source have one key.

    Raises:
        SourceError: the file's name is not valid UTF-8, so that no row could say where it stands.
    """
    if problem := text_problem("file name", name):
        raise SourceError(f"source {source!r}: {problem}; rename the file")
    stem = name.removeprefix("data/")
    for suffix in (".parquet", ".tar.gz", ".tgz", ".tar"):
        stem = stem.removesuffix(suffix)
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.")
    if name not in (f"data/{clean}.parquet", f"{clean}.tar") or len(clean) > 120:
        clean = f"{clean[:100]}-{identity.fingerprint(name=name)[:8]}"
    return f"{source}.{clean}"


def list_files(source: str, folder: Folder, suffixes: tuple[str, ...], expected: str) -> list[Shard]:
    """Return one shard per file with one of the suffixes, anywhere below the folder of a source.

    Raises:
        SourceError: the folder cannot be listed or holds no such file.
    """
    try:
        files = folder.files(suffixes)
    except OSError as error:
        raise SourceError(f"source {source!r}: {folder.location}: {error.strerror or error}") from error
    if not files:
        kind = suffixes[0].removeprefix(".")
        raise SourceError(f"source {source!r}: no {kind} file below {folder.location}; expected {expected}")
    return [
        Shard(
            shard_key(source, name),
            source,
            name,
            file_mark(name, stat),
            bytes=stat.size,
            is_seekable=not name.endswith(COMPRESSED),
        )
        for name, stat in files.items()
    ]


def file_mark(name: str, stat: Stat, **more: Any) -> str:
    """Return the fingerprint of a file of a source."""
    return identity.fingerprint(file=name, size=stat.size, mark=stat.mark, **more)


def text_problem(field: str, value: Any) -> str | None:
    """Return why a value is no text that can be stored, or None if it is (null is)."""
    if value is None:
        return None
    if not isinstance(value, str):
        return f"{field}: expected text, found {shown(value)}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{field}: not valid UTF-8: {shown(value)}"
    return None


def shown(value: Any, length: int = 80) -> str:
    """Return a value as a message shows it: short, and in characters that every terminal and table has."""
    text = ascii(value)
    return text if len(text) <= length else text[: length - 3] + "..."
