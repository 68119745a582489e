"""Rapidata-style parquet: prompt, image1, image2, votes_image1, votes_image2, model1, model2, detailed_results.

`detailed_results` is a JSON list with one object per voter; where each names the image voted for and their sums are the
columns' counts, every voter is one vote (its `userId` the annotator where given). Otherwise each side that has votes is
one vote row with its `count`. Counts that are not whole (weighted votes) become the source's verdict, not votes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow as pa

from pipelines import identity
from pipelines.config import LimitsConfig, SourceConfig
from pipelines.files import Folder
from pipelines.sources import (
    RawChunk,
    Sample,
    Shard,
    chunk,
    columns,
    images_only,
    list_files,
    problem_vote,
    shown,
    split_of,
    vote,
)
from pipelines.sources.pictures import Pictures

TYPES: dict[str, pl.DataType | type[pl.DataType]] = {
    "prompt": pl.String,
    "votes_image1": pl.Float64,
    "votes_image2": pl.Float64,
    "model1": pl.String,
    "model2": pl.String,
    "detailed_results": pl.String,
    "image1_path": pl.String,
    "image2_path": pl.String,
}
IMAGES = {"image1": "image1_path", "image2": "image2_path"}
REQUIRED = ("prompt", *IMAGES, "votes_image1", "votes_image2")
EXPECTED = f"rapidata: parquet with columns {list(REQUIRED)} and, where known, model1, model2, detailed_results"
_CHOSEN = ("votedFor", "voted_for", "selectedImage", "vote")
_PERSON = ("userId", "user_id", "annotatorId", "voterId")


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
    for piece in columns.read_pieces(folder, shard.file, (*TYPES, *IMAGES), REQUIRED):
        frame, problem = columns.typed(piece.table, TYPES, file)
        names = [_names(piece, column, file) for column in IMAGES]
        yield from map(images_only, columns.images_of(piece, IMAGES, file, pictures, limits))
        votes: list[dict[str, Any]] = []
        for i, (record, why) in enumerate(zip(frame.iter_rows(named=True), problem, strict=True), piece.start):
            row, keys = f"{shard.file}:{i}", [f"{i}:{column}" for column in IMAGES]
            called = [record[path] or names[k][i - piece.start] for k, path in enumerate(IMAGES.values())]
            made = [problem_vote(row, why)] if why is not None else _votes(row, record, called)
            votes += [{**v, "first_key": keys[0], "second_key": keys[1], "split": split} for v in made]
        yield chunk([], votes, len(frame))


def _names(piece: columns.Piece, column: str, file: str) -> list[str | None]:
    """Return what detailed_results may call the images of a column: the structs' own paths, or the text."""
    found = piece.table[column].combine_chunks()
    if pa.types.is_struct(found.type):
        return columns.struct_paths(found, column, file).to_pylist()
    is_text = pa.types.is_string(found.type) or pa.types.is_large_string(found.type)
    return found.to_pylist() if is_text else [None] * len(found)


def _votes(row: str, record: dict[str, Any], names: list[str | None]) -> list[dict[str, Any]]:
    counts = [record["votes_image1"], record["votes_image2"]]
    fields = {
        "prompt": record["prompt"],
        "model_first": record["model1"],
        "model_second": record["model2"],
        "group": identity.fingerprint(record=record, images=names),
    }
    if any(c is not None and (c < 0 or not math.isfinite(c) or c >= 2**62) for c in counts):
        return [problem_vote(row, f"votes_image1, votes_image2: expected counts, found {shown(counts)}", **fields)]
    total = sum(c or 0 for c in counts)
    if None in counts or total == 0:
        return [vote(row, is_labelled=False, **fields)]
    if any(c % 1 for c in counts):
        share = counts[0] / total
        return [vote(row, is_labelled=False, source_label_first=share, **fields)]
    detailed = _voters(record["detailed_results"], names)
    if detailed is not None and [sum(s == side for s, _ in detailed) for side in (0, 1)] == counts:
        return [
            vote(row, rater=r, label_first=1.0 - side, label_second=float(side), annotator=person, **fields)
            for r, (side, person) in enumerate(detailed)
        ]
    return [
        vote(row, rater=side, label_first=1.0 - side, label_second=float(side), **{**fields, "count": int(n)})
        for side, n in enumerate(counts)
        if n > 0
    ]


def _voters(text: str | None, names: list[str | None]) -> list[tuple[int, str | None]] | None:
    """Return (side, person) per voter, or None if the JSON does not say it."""
    try:
        listed = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    if not isinstance(listed, list):
        return None
    called = [
        {f"image{k + 1}", *(n for n in (name, (name or "").rsplit("/", 1)[-1]) if n)} for k, name in enumerate(names)
    ]
    voters = []
    for entry in listed:
        if not isinstance(entry, dict):
            return None
        chosen = next((entry[k] for k in _CHOSEN if k in entry), None)
        sides = [k for k in (0, 1) if isinstance(chosen, str) and chosen in called[k]]
        if len(sides) != 1:
            return None
        person = next((entry[k] for k in _PERSON if entry.get(k) is not None), None)
        voters.append((sides[0], None if person is None else ascii(person).strip("'")))
    return voters
