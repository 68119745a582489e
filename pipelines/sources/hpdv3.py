"""HPD v3: `train.json`, `test.json` with vote counts per pair, images in `images/` (or `images.tar`, `images.tar.gz`).

`path1` is always the image that the source prefers. `choice_dist` = [votes for path1, votes for path2] gives one vote row
per side that has votes, with its `count`; null gives one row for path1 with an unknown count. The counts can contradict
the preference, which is weighted by ability: votes say what people chose, `source_label_0` what the source prefers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines import identity
from pipelines.config import LimitsConfig, SourceConfig
from pipelines.files import Folder
from pipelines.sources import RawChunk, Sample, Shard, SourceError, text_problem, vote
from pipelines.sources.hpd import (
    Converted,
    check,
    check_fields,
    is_number,
    json_fingerprint,
    list_json,
    read_json,
    split_name,
)

FIELDS = ("prompt", "path1", "path2")
OPTIONAL = ("choice_dist", "confidence", "model1", "model2")
EXPECTED = (
    f"hpdv3: train.json and test.json, records with fields {list(FIELDS)} and, where known, {list(OPTIONAL)}; images where "
    f"the paths say, or in images.tar or images.tar.gz"
)
ARCHIVE = "images"


def recognises(sample: Sample) -> bool:
    """Return whether a JSON file's records have the layout's fields."""
    return sample.kind == "json" and set(FIELDS) <= set(sample.names)


def _base(folder: Folder) -> str:
    """Return '' where the paths lead to files, else the name of the archive that holds them."""
    has_archive = any(folder.stat(f"{ARCHIVE}{suffix}") is not None for suffix in (".tar", ".tar.gz", ".tgz"))
    return ARCHIVE if has_archive and not folder.fs.isdir(folder.path(ARCHIVE)) else ""


def list_shards(source: SourceConfig) -> list[Shard]:
    """Return shards of `source.records_per_shard` records.

    Raises:
        SourceError: neither file is there, one is no list of records, or the images lie in the parts of a split archive.
    """
    folder = Folder(source.location)
    base = _base(folder)
    if not base and folder.stat(f"{ARCHIVE}.tar.gz.00") is not None and not folder.fs.isdir(folder.path(ARCHIVE)):
        raise SourceError(
            f"source {source.name!r}: {folder.uri(ARCHIVE)}.tar.gz.00, ... are parts of one archive; join and unpack them "
            f"there: cat {ARCHIVE}.tar.gz.* | tar xz"
        )
    # Without an archive only the folder of images, not the JSON files beside it, says how much there is.
    parts = {split: (f"{split}.json", ARCHIVE, source.records_per_shard) for split in ("train", "test")}
    return list_json(source, parts, EXPECTED)


def fingerprint(source: SourceConfig, shard: Shard) -> str:
    """Return what changes when the shard's records change, or an image that they name comes, goes or changes."""
    return json_fingerprint(source, shard, _base(Folder(source.location)), _convert)


def read_shard(source: SourceConfig, shard: Shard, limits: LimitsConfig) -> Iterator[RawChunk]:
    """Yield the shard's records as votes, with the bytes of the images they name.

    Raises:
        SourceError: the JSON file or the archive is not readable.
    """
    yield from read_json(source, shard, _base(Folder(source.location)), split_name(shard), _convert, limits)


def _convert(record: Any) -> Converted:
    check_fields(record, FIELDS)
    paths = [record["path1"], record["path2"]]
    for field, path in zip(("path1", "path2"), paths, strict=True):
        check(field, isinstance(path, str), "a file name", path)
        if problem := text_problem(field, path):
            check(field, False, "a file name", problem)
    models = [record.get("model1"), record.get("model2")]
    for field, model in zip(("model1", "model2"), models, strict=True):
        check(field, text_problem(field, model) is None, "text", model)
    counts, confidence = record.get("choice_dist"), record.get("confidence")
    check("confidence", confidence is None or is_number(confidence), "a number or null", confidence)
    is_counts = (
        isinstance(counts, list)
        and len(counts) == 2
        and all(is_number(c) and c >= 0 and c == int(c) and c < 2**62 for c in counts)
    )
    check("choice_dist", counts is None or is_counts, "two counts or null", counts)
    fields = {
        "prompt": record["prompt"],
        "first_key": paths[0],
        "second_key": paths[1],
        "source_label_first": 1.0,
        "source_confidence": None if confidence is None else float(confidence),
        "model_first": models[0],
        "model_second": models[1],
        # Of the content: the rows of one record are one group, and a repeated record repeats it.
        "group": identity.fingerprint(record=record),
    }
    if counts is None:
        return [vote("", label_first=1.0, label_second=0.0, **{**fields, "count": None})], paths
    votes = [
        vote("", rater=side, label_first=1.0 - side, label_second=float(side), **{**fields, "count": int(n)})
        for side, n in enumerate(counts)
        if n > 0
    ]
    return votes or [vote("", is_labelled=False, **fields)], paths
