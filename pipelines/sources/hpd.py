"""HPD v2: `train.json` (pairs), `test.json` (groups of 9 or 10 images ranked by ten raters), image files beside them.

A shard is a range of records of one of the two files. A test group gives one vote per rater and pair.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import polars as pl

from pipelines import identity
from pipelines.config import SourceConfig
from pipelines.sources import IMAGE_SCHEMA, VOTE_SCHEMA, RawChunk, Shard, SourceError

FIELDS = {
    "train": ("human_preference", "prompt", "file_path"),
    "test": ("prompt", "image_path", "raw_annotations"),
}
CHUNK_RECORDS = 256


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{path}: not a readable JSON file ({error}); fetch it again") from error
    if not isinstance(records, list) or any(not isinstance(r, dict) for r in records):
        raise SourceError(f"{path}: expected a list of objects, as HPDv2's {path.name}, found {type(records).__name__}")
    return records


def _shard_records(shard: Shard) -> list[dict[str, Any]]:
    """Return the shard's records; a record of another shard that lacks a field costs this one nothing."""
    path = Path(shard.file)
    records, needed = _records(path)[shard.start : shard.stop], FIELDS[path.stem]
    for i, record in enumerate(records, shard.start):
        if missing := [f for f in needed if f not in record]:
            raise SourceError(
                f"{path}: record {i}: field {missing[0]!r} is missing; expected {needed}, found {sorted(record)}"
            )
    return records


def list_shards(source: SourceConfig) -> list[Shard]:
    """Return shards of `source.records_per_shard` train records and of a tenth as many test groups (36 or 45 pairs each).

    Raises:
        SourceError: neither train.json nor test.json is there, or one is not as HPDv2 writes it.
    """
    folder = Path(source.location)
    shards = []
    for split, per_shard in (("train", source.records_per_shard), ("test", max(1, source.records_per_shard // 10))):
        path = folder / f"{split}.json"
        if not path.exists():
            continue
        stat = path.stat()
        count = len(_records(path))
        for start in range(0, count, per_shard):
            stop = min(start + per_shard, count)
            key = f"{source.name}.{split}-{start:07d}"
            mark = identity.fingerprint(
                file=path.name, size=stat.st_size, modified=stat.st_mtime_ns, start=start, stop=stop
            )
            shards.append(Shard(key, source.name, str(path), mark, start, stop))
    if not shards:
        raise SourceError(f"source {source.name!r}: neither train.json nor test.json with records lies in {folder}")
    return shards


def fingerprint(shard: Shard) -> str:
    """Return what changes when the shard's records change, or an image file that they name comes, goes or changes."""
    path = Path(shard.file)
    names = {n for r in _shard_records(shard) for n in r["file_path" if path.stem == "train" else "image_path"] or []}
    stats: dict[str, tuple[int, int] | None] = {}
    for name in sorted(str(n) for n in names):
        try:
            stat = (path.parent / path.stem / name).stat()
            stats[name] = (stat.st_size, stat.st_mtime_ns)
        except OSError:
            stats[name] = None
    return identity.fingerprint(shard=shard.fingerprint, images=stats)


def read_shard(source: SourceConfig, shard: Shard) -> Iterator[RawChunk]:
    """Yield the shard's records as votes, with the bytes of the image files they name."""
    path = Path(shard.file)
    records = _shard_records(shard)
    convert = _train_votes if path.stem == "train" else _test_votes
    for offset in range(0, len(records), CHUNK_RECORDS):
        votes: list[dict[str, Any]] = []
        names: list[str] = []
        for i, record in enumerate(records[offset : offset + CHUNK_RECORDS], shard.start + offset):
            rows, files = convert(path, i, record)
            votes += rows
            names += files
        images = [_read_image(path.parent / path.stem, name) for name in dict.fromkeys(names)]
        yield RawChunk(pl.DataFrame(images, schema=IMAGE_SCHEMA), pl.DataFrame(votes, schema=VOTE_SCHEMA))


def _read_image(folder: Path, name: str) -> dict[str, Any]:
    try:
        data, problem = (folder / name).read_bytes(), None
    except OSError as error:
        data, problem = None, f"{folder / name}: {error.strerror or error}"
    return {"image_key": name, "bytes": data, "uid": f"{folder.name}/{name}", "problem": problem}


def _vote(
    split: str, index: int, rater: int, prompt: Any, first: str, second: str, label: Any, **more: Any
) -> dict[str, Any]:
    labels = label if label is not None else (None, None)
    return {
        "source_row": f"{split}:{index}",
        "rater": rater,
        "prompt": prompt,
        "first_key": first,
        "second_key": second,
        "is_display_order": False,
        "label_first": labels[0],
        "label_second": labels[1],
        "is_labelled": label is not None,
        "annotator": None,
        "group": None,
        "model_first": None,
        "model_second": None,
        "created_at": None,
        "split": split,
        **more,
    }


def _check(path: Path, index: int, field: str, is_right: bool, expected: str, found: Any) -> None:
    if not is_right:
        raise SourceError(f"{path}: record {index}: {field}: expected {expected}, found {found!r}")


def _is_list(value: Any, kind: type | tuple[type, ...], length: int | None = None) -> bool:
    return (
        isinstance(value, list) and all(isinstance(v, kind) for v in value) and (length is None or len(value) == length)
    )


def _train_votes(path: Path, index: int, record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    files, label = record["file_path"], record["human_preference"]
    _check(path, index, "file_path", _is_list(files, str, 2), "two file names", files)
    _check(path, index, "prompt", isinstance(record["prompt"], str | None), "text", record["prompt"])
    is_label = label is None or _is_list(label, (int, float), 2)
    _check(path, index, "human_preference", is_label, "[1, 0] or [0, 1]", label)
    numbers = None if label is None else [float(x) for x in label]
    return [_vote("train", index, 0, record["prompt"], files[0], files[1], numbers)], files


def _test_votes(path: Path, index: int, record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    files, raters = record["image_path"], record["raw_annotations"]
    _check(path, index, "image_path", _is_list(files, str), "a list of file names", files)
    _check(path, index, "prompt", isinstance(record["prompt"], str | None), "text", record["prompt"])
    _check(path, index, "raw_annotations", _is_list(raters, dict), "a list of objects with a rank", raters)
    pairs = list(combinations(range(len(files)), 2))
    votes = []
    for r, annotation in enumerate(raters):
        ranks = annotation.get("rank")
        is_ranking = _is_list(ranks, (int, float)) and all(math.isfinite(x) and not isinstance(x, bool) for x in ranks)
        _check(path, index, f"rank of rater {r}", is_ranking, "a list of finite numbers", ranks)
        if len(ranks) != len(files):
            raise SourceError(
                f"{path}: record {index}: rater {r} ranks {len(ranks)} images, the group has {len(files)}; both must agree"
            )
        for k, (i, j) in enumerate(pairs):
            # Lower rank is better.
            label = 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
            votes.append(
                _vote(
                    "test",
                    index,
                    r * len(pairs) + k,
                    record["prompt"],
                    files[i],
                    files[j],
                    (label, 1 - label),
                    annotator=annotation.get("user_hash"),
                    group=f"test:{index}:{r}",
                )
            )
    return votes, files
