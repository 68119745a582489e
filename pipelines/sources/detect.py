"""Which layout a source has: the one its configuration names, or the one that its files' columns, fields or members fit."""

from __future__ import annotations

import functools
import tarfile
from types import ModuleType

from pipelines.config import SourceConfig
from pipelines.files import Folder
from pipelines.sources import (
    Sample,
    SourceError,
    columns,
    hpd,
    hpdv3,
    pairs,
    pickapic,
    pickapic_webdataset,
    pictures,
    rapidata,
    records,
)

LAYOUTS: dict[str, ModuleType] = {
    "pickapic": pickapic,
    "pickapic_webdataset": pickapic_webdataset,
    "hpd": hpd,
    "hpdv3": hpdv3,
    "rapidata": rapidata,
    "pairs": pairs,
}
_FAMILIES = {"pickapic": "pickapic", "pickapic_webdataset": "pickapic", "hpd": "hpd", "hpdv3": "hpdv3"}
_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".tar": "tar", ".tar.gz": "tar", ".tgz": "tar"}
_MEMBERS_SEEN = 16
_SAMPLES_PER_KIND = 4


def resolved(source: SourceConfig) -> SourceConfig:
    """Return the source with its layout and the family of its annotators filled in.

    Raises:
        SourceError: layout is auto and no layout fits, or several do; names what was found and what each expects.
    """
    layout = source.layout if source.layout != "auto" else _detected(source.name, source.location)
    family = source.family or _FAMILIES.get(layout, source.name)
    return source.model_copy(update={"layout": layout, "family": family})


@functools.lru_cache(maxsize=256)
def _detected(name: str, location: str) -> str:
    try:
        samples = _samples(Folder(location))
    except OSError as error:
        raise SourceError(f"source {name!r}: {location}: {error.strerror or error}") from error
    fitting = [layout for layout, module in LAYOUTS.items() if any(module.recognises(s) for s in samples)]
    if len(fitting) == 1:
        return fitting[0]
    seen = "; ".join(f"{s.file}: {s.kind} with {list(s.names)}" for s in samples) or "no parquet, JSON or tar file"
    if fitting:
        raise SourceError(f"source {name!r}: {location} fits several layouts, {fitting}: set its layout. Found {seen}")
    expected = "; ".join(module.EXPECTED for module in LAYOUTS.values())
    raise SourceError(f"source {name!r}: {location} fits no layout. Found {seen}. Expected one of: {expected}")


def forget() -> None:
    """Forget which layouts were found, so that they are looked for again."""
    _detected.cache_clear()


def _samples(folder: Folder) -> list[Sample]:
    by_kind: dict[str, list[Sample]] = {}
    # Those highest up first: what lies in folders may be many files of another kind (HPDv2's benchmark/*.json).
    for name in sorted(folder.files(tuple(_KINDS)), key=lambda n: (n.count("/"), n)):
        kind = next(kind for suffix, kind in _KINDS.items() if name.endswith(suffix))
        if len(by_kind.setdefault(kind, [])) < _SAMPLES_PER_KIND:
            by_kind[kind].append(Sample(name, kind, _names(folder, name, kind)))
    return [s for samples in by_kind.values() for s in samples]


def _names(folder: Folder, name: str, kind: str) -> tuple[str, ...]:
    """Return a file's columns, fields or first members; none if it cannot be read (its shard will say why)."""
    try:
        if kind == "parquet":
            return columns.column_names(folder, name)
        if kind == "json":
            return records.first_fields(folder, name)
        with folder.open(name) as handle, tarfile.open(fileobj=handle, mode="r|*") as tar:
            return tuple(info.name for info, _ in zip(tar, range(_MEMBERS_SEEN), strict=False))
    except (SourceError, *pictures.TAR_ERRORS):
        return ()
