"""Pick-a-Pic as WebDataset tars: members `<key>.original_prompt.txt, .jpg_0.jpg, .jpg_1.jpg, .label_0.txt, .label_1.txt`.

A sample's members stand together. There is no uid, no user and no time. Split from the tar's name or folder, else the
source's `split`. Nothing is unpacked; a member with '..', an absolute name or a link is refused and its row says so.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, Any

from pipelines.config import LimitsConfig, SourceConfig
from pipelines.files import Folder
from pipelines.sources import (
    COMPRESSED,
    RawChunk,
    Sample,
    Shard,
    SourceError,
    chunk,
    image,
    list_files,
    problem_vote,
    shown,
    split_of,
    vote,
)
from pipelines.sources.pictures import TAR_ERRORS, forget, member_problem, open_tar

IMAGES = ("jpg_0.jpg", "jpg_1.jpg")
TEXTS = ("original_prompt.txt", "label_0.txt", "label_1.txt")
EXPECTED = f"pickapic_webdataset: tar files with members <key>.{{{', '.join((*TEXTS, *IMAGES))}}}"
_CHUNK_BYTES = 16_000_000
_MAX_TEXT_BYTES = 1_000_000


def recognises(sample: Sample) -> bool:
    """Return whether a tar's first members are a sample of the layout."""
    return sample.kind == "tar" and {TEXTS[0], *IMAGES} <= {_split(name)[1] for name in sample.names}


def list_shards(source: SourceConfig) -> list[Shard]:
    """Return one shard per tar file.

    Raises:
        SourceError: there is none.
    """
    return list_files(source.name, Folder(source.location), (".tar", *COMPRESSED), EXPECTED)


def fingerprint(source: SourceConfig, shard: Shard) -> str:
    """Return what changes when the tar changes; it names no other file."""
    return shard.fingerprint


def _split(name: str) -> tuple[str, str]:
    """Return a member's key and extension: WebDataset cuts at the first dot after the last slash."""
    at = name.find(".", name.rfind("/") + 1)
    return (name, "") if at < 0 else (name[:at], name[at + 1 :])


def read_shard(source: SourceConfig, shard: Shard, limits: LimitsConfig) -> Iterator[RawChunk]:
    """Yield the tar's samples.

    Raises:
        SourceError: the tar is damaged or ends in the middle.
    """
    folder = Folder(source.location)
    uri, split = folder.uri(shard.file), split_of(shard.file, source.split)
    try:
        with folder.open(shard.file) as handle:
            yield from _chunks(handle, uri, shard, split, limits)
    except TAR_ERRORS as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{uri}: not a readable tar archive ({error}); fetch it again") from error


def _chunks(handle: IO[bytes], uri: str, shard: Shard, split: str | None, limits: LimitsConfig) -> Iterator[RawChunk]:
    images: list[dict[str, Any]] = []
    votes: list[dict[str, Any]] = []
    rows = size = 0
    with open_tar(handle, is_compressed=not shard.is_seekable) as tar:
        for key, members in _samples(tar, uri, shard.is_seekable, limits):
            row = f"{shard.file}:{rows}"
            rows += 1
            size += sum(len(m["bytes"] or b"") for m in members.values())
            images += [{**members[n], "image_key": f"{row}:{n}"} for n in IMAGES if n in members]
            votes.append({**_vote(row, key, members), "split": split})
            if size >= _CHUNK_BYTES:
                yield chunk(images, votes, len(votes))
                images, votes, size = [], [], 0
    yield chunk(images, votes, len(votes))


def _samples(
    tar: tarfile.TarFile, uri: str, is_seekable: bool, limits: LimitsConfig
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Yield (key, {extension: row of IMAGE_SCHEMA}) per sample; what is no member of the layout makes a sample too."""
    current: str | None = None
    members: dict[str, dict[str, Any]] = {}
    for info in tar:
        forget(tar)
        if info.isdir():
            continue
        key, extension = _split(info.name)
        if current is not None and (key != current or extension in members):
            yield current, members
            members = {}
        current = key
        members[extension] = _member(tar, info, uri, is_seekable, limits)
    if current is not None:
        yield current, members


def _member(
    tar: tarfile.TarFile, info: tarfile.TarInfo, uri: str, is_seekable: bool, limits: LimitsConfig
) -> dict[str, Any]:
    extension = _split(info.name)[1]
    if why := member_problem(info):
        return image("", status="refused", reason=f"{uri}, member {shown(info.name)}: {why}", uri=uri)
    limit = limits.max_image_bytes if extension in IMAGES else _MAX_TEXT_BYTES
    if info.size > limit:
        option = "limits.max_image_bytes = " if extension in IMAGES else "of texts "
        why = f"member {shown(info.name)}: {info.size} bytes, limit {option}{limit}"
        return image("", status="too_large", reason=why, uri=uri)
    handle = tar.extractfile(info)
    assert handle is not None
    data = handle.read()
    if len(data) < info.size:
        raise SourceError(f"{uri}: the archive ends within member {shown(info.name)}; fetch it again")
    place = {"byte_offset": info.offset_data, "byte_length": info.size} if is_seekable else {}
    return image("", bytes=data, uri=uri, **place)


def _vote(row: str, key: str, members: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if missing := [n for n in (TEXTS[0], TEXTS[1], *IMAGES) if n not in members]:
        return problem_vote(row, f"sample {shown(key)}: no member {missing[0]!r}; found {sorted(members)}")
    texts: dict[str, str] = {}
    for name in TEXTS:
        if name not in members:
            continue
        member = members[name]
        if member["bytes"] is None:
            return problem_vote(row, f"sample {shown(key)}: {name}: {member['reason']}")
        try:
            texts[name] = member["bytes"].decode()
        except UnicodeDecodeError:
            return problem_vote(row, f"sample {shown(key)}: {name}: not valid UTF-8: {shown(member['bytes'])}")
    labels: list[float] = []
    for name in TEXTS[1:]:
        try:
            labels.append(float(texts[name]) if name in texts else 1 - labels[0])
        except ValueError:
            return problem_vote(row, f"sample {shown(key)}: {name}: expected a number, found {shown(texts[name])}")
    # An image that could not be read has no name of its own: the row's reason is then the member's.
    if bad := next((members[n] for n in IMAGES if members[n]["bytes"] is None), None):
        return problem_vote(row, f"sample {shown(key)}: {bad['status']}: {bad['reason']}")
    return vote(
        row,
        prompt=texts[TEXTS[0]],
        first_key=f"{row}:{IMAGES[0]}",
        second_key=f"{row}:{IMAGES[1]}",
        is_display_order=True,
        label_first=labels[0],
        label_second=labels[1],
    )
