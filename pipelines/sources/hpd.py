"""HPD v2: `train.json` (pairs), `test.json` (groups of 9 or 10 images ranked by ten raters), image files beside them.

The images of a split lie in `<split>/`, `<split>.tar` or `<split>.tar.gz`. A shard is a range of records of one of the two
files; a compressed archive can only be read as a whole, so that its split is one shard. A test group gives one vote per
rater and pair. Four images of a train prompt were ranked by one person: its pairs share a `group`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations, islice
from typing import Any

from pipelines import identity
from pipelines.config import LimitsConfig, SourceConfig
from pipelines.files import Folder
from pipelines.sources import (
    RawChunk,
    Sample,
    Shard,
    SourceError,
    chunk,
    file_mark,
    problem_vote,
    records,
    shown,
    text_problem,
    vote,
)
from pipelines.sources.pictures import Pictures

FIELDS = {
    "train": ("human_preference", "prompt", "file_path"),
    "test": ("prompt", "image_path", "raw_annotations"),
}
EXPECTED = (
    f"hpd: train.json, records with fields {list(FIELDS['train'])}, or test.json, records with fields "
    f"{list(FIELDS['test'])}; images in train/ and test/ or train.tar.gz and test.tar.gz"
)
CHUNK_RECORDS = 256
LARGEST_GROUP = 100
"""Images of a ranking: their pairs grow with the square."""
Converted = tuple[list[dict[str, Any]], list[str]]
"""Votes of a record, and the images that it names."""


class BadRecord(ValueError):
    """A record is not as its layout says; its row is kept with this message."""


def recognises(sample: Sample) -> bool:
    """Return whether a JSON file's records have the layout's fields."""
    return sample.kind == "json" and any(set(fields) <= set(sample.names) for fields in FIELDS.values())


def list_shards(source: SourceConfig) -> list[Shard]:
    """Return shards of `source.records_per_shard` train records and of a tenth as many test groups (36 or 45 pairs each).

    Raises:
        SourceError: neither train.json nor test.json is there, or one is not as HPDv2 writes it.
    """
    sizes = {"train": source.records_per_shard, "test": max(1, source.records_per_shard // 10)}
    return list_json(source, {split: (f"{split}.json", split, size) for split, size in sizes.items()}, EXPECTED)


def list_json(source: SourceConfig, parts: dict[str, tuple[str, str, int]], expected: str) -> list[Shard]:
    """Return the shards of JSON files: {part: (file, folder of its images, records per shard)}."""
    folder = Folder(source.location)
    folder.fs.invalidate_cache()
    if not folder.fs.isdir(folder.root):
        raise SourceError(f"source {source.name!r}: {source.location}: no such folder")
    shards = []
    for part, (name, base, per_shard) in parts.items():
        stat = folder.stat(name)
        if stat is None:
            continue
        try:
            count = records.count_records(folder, name)
        except SourceError:
            # A damaged file is one shard, which says so when it is read, and costs no other.
            shards.append(Shard(f"{source.name}.{part}-{0:07d}", source.name, name, file_mark(name, stat)))
            continue
        pictures = Pictures.find(folder, base, LimitsConfig())
        size = pictures.size() if count else 0
        if not pictures.is_seekable:
            per_shard = max(1, count)
        # An empty file is a shard without rows: it is accounted for too.
        for start in range(0, max(1, count), per_shard):
            stop = min(start + per_shard, count)
            shards.append(
                Shard(
                    f"{source.name}.{part}-{start:07d}",
                    source.name,
                    name,
                    file_mark(name, stat, start=start, stop=stop),
                    start,
                    stop,
                    bytes=size * (stop - start) // max(1, count),
                    is_seekable=pictures.is_seekable,
                )
            )
    if not shards:
        found = sorted(n for n, _ in folder.files((".json", ".jsonl", ".parquet", ".tar", ".gz")).items())
        raise SourceError(
            f"source {source.name!r}: nothing to read in {source.location}: expected {expected}; found {found}"
        )
    return shards


def split_name(shard: Shard) -> str:
    """Return the split of a shard: the name of its JSON file."""
    return shard.file.removesuffix(".json")


def fingerprint(source: SourceConfig, shard: Shard) -> str:
    """Return what changes when the shard's records change, or an image file that they name comes, goes or changes."""
    split = split_name(shard)
    return json_fingerprint(source, shard, split, _train if split == "train" else _test)


def json_fingerprint(source: SourceConfig, shard: Shard, base: str, convert: Callable[[Any], Converted]) -> str:
    """Return the fingerprint of a shard of records and of the images below `base` that they name."""
    folder = Folder(source.location)
    names: set[str] = set()
    for _, record in records.read_records(folder, shard.file, shard.start, shard.stop):
        try:
            names.update(convert(record)[1])
        except (BadRecord, RecursionError):
            continue
    stats = Pictures.find(folder, base, LimitsConfig()).stats(names)
    return identity.fingerprint(shard=shard.fingerprint, images=stats)


def read_shard(source: SourceConfig, shard: Shard, limits: LimitsConfig) -> Iterator[RawChunk]:
    """Yield the shard's records as votes, with the bytes of the image files they name.

    Raises:
        SourceError: the JSON file or an archive is not readable.
    """
    split = split_name(shard)
    yield from read_json(source, shard, split, split, _train if split == "train" else _test, limits)


def read_json(
    source: SourceConfig,
    shard: Shard,
    base: str,
    split: str | None,
    convert: Callable[[Any], Converted],
    limits: LimitsConfig,
) -> Iterator[RawChunk]:
    """Yield a shard of records that `convert` turns into votes, with the images below `base` that they name."""
    folder = Folder(source.location)
    pictures = Pictures.find(folder, base, limits)
    seen: set[str] = set()

    def converted(numbered: Iterator[tuple[int, Any]]) -> tuple[list[dict[str, Any]], list[str], int]:
        votes, names, rows = [], [], 0
        for number, record in numbered:
            row, rows = f"{shard.file}:{number}", rows + 1
            try:
                made, named = convert(record)
            except BadRecord as error:
                votes.append(problem_vote(row, str(error), split=split))
                continue
            except RecursionError:
                votes.append(problem_vote(row, "record: nested too deeply", split=split))
                continue
            votes += [{**v, "source_row": row, "split": split} for v in made]
            names += named
        return votes, names, rows

    if pictures.is_seekable:
        for part in _parts(_listed(folder, shard)):
            votes, names, rows = converted(iter(part))
            # Images first and in pieces, so that a group of large ones stays small in memory.
            # Records of one prompt share images; each is read once.
            yield from _image_chunks(pictures.read(n for n in names if n not in seen))
            seen.update(names)
            yield chunk([], votes, rows)
    else:
        # The archive gives its images in its own order: first all names, then the images, then the votes on them.
        named = dict.fromkeys(n for part in _parts(_listed(folder, shard)) for n in converted(iter(part))[1])
        yield from _image_chunks(pictures.read(named))
        for part in _parts(_listed(folder, shard)):
            votes, _, rows = converted(iter(part))
            yield chunk([], votes, rows)


def _listed(folder: Folder, shard: Shard) -> Iterator[tuple[int, Any]]:
    """Yield the shard's records, all that were counted when it was listed."""
    found = 0
    for numbered in records.read_records(folder, shard.file, shard.start, shard.stop):
        yield numbered
        found += 1
    if shard.stop is not None and found != shard.stop - shard.start:
        raise SourceError(
            f"{folder.uri(shard.file)}: expected records {shard.start} to {shard.stop - 1}, found {found} of them: the file "
            f"changed since it was listed; ingest again"
        )


def _parts(listed: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    while part := list(islice(listed, CHUNK_RECORDS)):
        yield part


def _image_chunks(images: Iterator[dict[str, Any]]) -> Iterator[RawChunk]:
    part: list[dict[str, Any]] = []
    size = 0
    for row in images:
        part.append(row)
        size += len(row["bytes"] or b"")
        if size >= 16_000_000 or len(part) >= 4096:
            yield chunk(part, [], 0)
            part, size = [], 0
    if part:
        yield chunk(part, [], 0)


def check(field: str, is_right: bool, expected: str, found: Any) -> None:
    """Raise BadRecord unless the field of a record is right."""
    if not is_right:
        raise BadRecord(f"{field}: expected {expected}, found {shown(found)}")


def check_fields(record: Any, fields: tuple[str, ...]) -> None:
    """Raise BadRecord unless the record is an object with the fields and its prompt is text or null."""
    check("record", isinstance(record, dict), "an object", record)
    for field in fields:
        check(field, field in record, f"a field of {list(fields)}", sorted(record))
    if problem := text_problem("prompt", record["prompt"]):
        raise BadRecord(problem)


def check_texts(field: str, values: Any, length: int | None = None) -> None:
    """Raise BadRecord unless the field is a list of texts, of that length."""
    is_list = isinstance(values, list) and (length is None or len(values) == length)
    check(field, is_list, f"{'a list of' if length is None else length} file names", values)
    for value in values:
        check(field, isinstance(value, str), "file names", values)
        if problem := text_problem(field, value):
            raise BadRecord(problem)


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number (true and false are none)."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _train(record: Any) -> Converted:
    check_fields(record, FIELDS["train"])
    files, label, prompt = record["file_path"], record["human_preference"], record["prompt"]
    check_texts("file_path", files, 2)
    is_label = label is None or (isinstance(label, list) and len(label) == 2 and all(is_number(x) for x in label))
    check("human_preference", is_label, "[1, 0] or [0, 1]", label)
    first, second = (None, None) if label is None else (float(label[0]), float(label[1]))
    row = vote(
        "",
        prompt=prompt,
        first_key=files[0],
        second_key=files[1],
        label_first=first,
        label_second=second,
        is_labelled=label is not None,
        group=None if prompt is None else f"train:{identity.prompt_id(prompt)}",
    )
    return [row], files


def _test(record: Any) -> Converted:
    check_fields(record, FIELDS["test"])
    files, raters, prompt = record["image_path"], record["raw_annotations"], record["prompt"]
    check_texts("image_path", files)
    check("image_path", len(files) > 1, "at least two images", files)
    check("image_path", len(files) <= LARGEST_GROUP, f"at most {LARGEST_GROUP} images", files)
    is_raters = isinstance(raters, list) and len(raters) > 0 and all(isinstance(r, dict) for r in raters)
    check("raw_annotations", is_raters, "a list of objects with a rank", raters)
    # Of the content, not of the record's number: a repeated record is then seen to repeat the first.
    group = identity.fingerprint(prompt=prompt, files=files, raters=raters)
    pairs = list(combinations(range(len(files)), 2))
    votes = []
    for r, annotation in enumerate(raters):
        ranks, person = annotation.get("rank"), annotation.get("user_hash")
        is_ranking = isinstance(ranks, list) and all(is_number(x) for x in ranks)
        check(f"rank of rater {r}", is_ranking, "a list of finite numbers", ranks)
        check(f"rank of rater {r}", len(ranks) == len(files), f"{len(files)} numbers, one per image", ranks)
        if problem := text_problem(f"user_hash of rater {r}", person if isinstance(person, str) else None):
            raise BadRecord(problem)
        for k, (i, j) in enumerate(pairs):
            # Lower rank is better.
            label = 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
            votes.append(
                vote(
                    "",
                    rater=r * len(pairs) + k,
                    prompt=prompt,
                    first_key=files[i],
                    second_key=files[j],
                    label_first=label,
                    label_second=1 - label,
                    annotator=None if person is None else str(person),
                    group=f"test:{group}:{r}",
                )
            )
    return votes, files
