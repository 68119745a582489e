"""Image files that a JSON or parquet row names: in a folder, in a tar, or in a compressed tar.

A folder and a tar give any image at once; a compressed tar only all of them in its own order. Nothing is unpacked: a
member is read by its place, so that a name with '..', an absolute one or a link can do nothing but be refused.

Belongs here: from names to bytes. Does not belong here: which names (the layouts), what the bytes are (`images`).
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import posixpath
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Self

import fsspec

from pipelines.config import LimitsConfig
from pipelines.files import Folder, Stat, is_gone, normal_name, unsafe_because
from pipelines.sources import COMPRESSED, SourceError, image

TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, LookupError, RecursionError, struct.error)
"""What reading a damaged archive raises; OSError also covers a bad gzip header or checksum."""
_MAX_NAME_BYTES = 65_536
_REQUESTS = 16
_NAME_TYPES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
"""Members that hold names and other fields of the next one: tarfile reads them whole."""


@dataclass(frozen=True)
class Member:
    """A tar's member: where its bytes lie, or why it must not be read."""

    offset: int
    size: int
    problem: str | None


@functools.lru_cache(maxsize=64)
def _size_below(uri: str, changed: int) -> int:
    if "://" not in uri:
        total = 0
        for base, _, files in os.walk(uri):
            for name in files:
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(base, name)).st_size
        return total
    fs, path = fsspec.core.url_to_fs(uri)
    return int(fs.du(path))


def member_problem(info: tarfile.TarInfo) -> str | None:
    """Return why a member must not be read: its name leaves the archive, or it is no plain file."""
    if why := unsafe_because(info.name):
        return f"its name is {why}"
    if info.isreg() and not info.issparse():
        return None
    return "it is a link" if info.islnk() or info.issym() else "it is no plain file"


class _Header(tarfile.TarInfo):
    """A member's header: a damaged one, or none before the end marker, is an error; tarfile takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            why = "the archive ends without its end marker, so members may be missing" if len(buf) < 512 else "damaged"
            raise tarfile.ReadError(f"{why}: {error}") from None
        if info.size < 0 or (info.type in _NAME_TYPES and info.size > _MAX_NAME_BYTES):
            raise tarfile.ReadError(f"a member of type {info.type!r} claims {info.size} bytes")
        return info

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        info = super().fromtarfile(tar)
        # An extended header may override the size: tarfile would go back and read for ever.
        if info.size < 0:
            raise tarfile.ReadError(f"a member claims {info.size} bytes")
        return info


@contextlib.contextmanager
def open_tar(handle: IO[bytes], is_compressed: bool) -> Iterator[tarfile.TarFile]:
    """Open an archive for reading from its first to its last member; the end of a compressed one is checked too."""
    if not is_compressed:
        with tarfile.open(fileobj=handle, mode="r:", tarinfo=_Header) as tar:
            yield tar
        return
    # Not as tarfile's own stream, which takes the end of a cut file for the end of the archive.
    with gzip.GzipFile(fileobj=handle, mode="rb") as stream:
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as tar:
            yield tar
        while stream.read(1 << 20):
            pass


def forget(tar: tarfile.TarFile) -> None:
    """Forget the headers that were seen: tarfile keeps every one."""
    tar.members = []  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=8)
def _index(location: str, name: str, mark: str) -> dict[str, Member]:
    folder = Folder(location)
    try:
        with folder.open(name) as handle, open_tar(handle, is_compressed=False) as tar:
            found = {}
            for info in tar:
                if not info.isdir():
                    found[_stored(info.name)] = Member(info.offset_data, info.size, member_problem(info))
                forget(tar)
            last = max((m.offset + m.size for m in found.values() if m.problem is None), default=0)
            if last > handle.seek(0, 2):
                raise SourceError(f"{folder.uri(name)}: the archive ends in the middle of a member; fetch it again")
            return found
    except TAR_ERRORS as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{folder.uri(name)}: not a readable tar archive ({error}); fetch it again") from error


def _stored(name: str) -> str:
    return name if unsafe_because(name) else normal_name(name)


class Pictures:
    """The images that rows name, relative to `base` (a folder of the source or the folder within its archive)."""

    def __init__(self, folder: Folder, base: str, archive: str | None, limits: LimitsConfig) -> None:
        self.folder, self.base, self.archive, self.limits = folder, base, archive, limits

    @classmethod
    def find(cls, folder: Folder, base: str, limits: LimitsConfig) -> Pictures:
        """Return the images of `<base>/`, else of `<base>.tar`, `<base>.tar.gz` or `<base>.tgz`."""
        if base and not folder.fs.isdir(folder.path(base)):
            for suffix in (".tar", *COMPRESSED):
                if folder.stat(base + suffix) is not None:
                    return cls(folder, base, base + suffix, limits)
        return cls(folder, base, None, limits)

    @property
    def is_seekable(self) -> bool:
        """Return whether single images can be read."""
        return self.archive is None or not self.archive.endswith(COMPRESSED)

    def size(self) -> int:
        """Return the bytes that the archive or the folder holds."""
        if self.archive is not None:
            stat = self.folder.stat(self.archive)
            return 0 if stat is None else stat.size
        where = self.folder.path(self.base)
        if not self.folder.fs.isdir(where):
            return 0
        # Adding a file changes the folder's time; elsewhere one listing a process is enough to tell small from large.
        changed = os.stat(where).st_mtime_ns if self.folder.is_local else 0
        return _size_below(self.folder.uri(self.base), changed)

    def stats(self, names: Iterable[str]) -> dict[str, Any]:
        """Return what changes when one of the images comes, goes or changes."""
        if self.archive is not None:
            stat = self.folder.stat(self.archive)
            return {self.archive: None if stat is None else (stat.size, stat.mark)}
        wanted = {name: posixpath.join(self.base, name) for name in sorted(set(names)) if not unsafe_because(name)}
        stats = self.folder.stats(wanted.values())
        return {n: None if (s := stats[path]) is None else (s.size, s.mark) for n, path in wanted.items()}

    def read(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Yield one row of IMAGE_SCHEMA per distinct name (its key); a compressed archive in its own order."""
        wanted = list(dict.fromkeys(names))
        if self.archive is None and self.folder.is_local:
            yield from (self._file(name) for name in wanted)
        elif self.archive is None:
            # Each is a request; a window of them is asked for at once, so that memory stays bounded.
            with ThreadPoolExecutor(_REQUESTS) as pool:
                for start in range(0, len(wanted), _REQUESTS):
                    yield from pool.map(self._file, wanted[start : start + _REQUESTS])
        elif self.is_seekable:
            yield from self._members(self.archive, wanted)
        else:
            yield from self._stream(self.archive, wanted)

    def _row(self, name: str, **values: Any) -> dict[str, Any]:
        # A name that leads into the archive's folder by itself (HPDv3) is whole, as it is where that folder is unpacked.
        is_whole = self.archive is not None and normal_name(name).startswith(f"{self.base}/")
        return image(name, uid=name if is_whole else posixpath.join(self.base, name), **values)

    def _file(self, name: str) -> dict[str, Any]:
        if why := unsafe_because(name):
            return self._row(name, status="refused", reason=f"{why}; only names within the image folder are read")
        path = posixpath.join(self.base, normal_name(name))
        uri = self.folder.uri(path)
        try:
            # One byte beyond the limit tells that there is more, whatever the folder says of the size.
            with self.folder.open(path) as handle:
                data = handle.read(self.limits.max_image_bytes + 1)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            if not is_gone(error):
                # Refused, or interrupted for a moment: kept as a status it would never heal.
                raise SourceError(f"{uri}: cannot be read ({why}); ingest again when it can") from error
            return self._row(name, status="missing", reason=f"{uri}: {why}", uri=uri)
        if len(data) > self.limits.max_image_bytes:
            return self._too_large(name, uri, "more")
        return self._row(name, bytes=data, uri=uri)

    def _too_large(self, name: str, uri: str, size: int | str) -> dict[str, Any]:
        why = f"{size} bytes, limit limits.max_image_bytes = {self.limits.max_image_bytes}"
        return self._row(name, status="too_large", reason=why, uri=uri)

    def _member_names(self, name: str) -> tuple[str, ...]:
        """Return the member names under which an image may stand: with and without the folder."""
        plain = normal_name(name)
        return (posixpath.join(self.base, plain), plain)

    def _missing(self, name: str) -> dict[str, Any]:
        if why := unsafe_because(name):
            return self._row(name, status="refused", reason=f"{why}; only names within the archive are read")
        return self._row(name, status="missing", reason=f"{self.archive} has no member {self._member_names(name)[0]!r}")

    def _members(self, archive: str, names: list[str]) -> Iterator[dict[str, Any]]:
        stat = self.folder.stat(archive) or Stat(0, "")
        index = _index(self.folder.location, archive, f"{stat.size}/{stat.mark}")
        uri = self.folder.uri(archive)
        try:
            yield from self._members_in(archive, uri, index, names)
        except TAR_ERRORS as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"{uri}: cannot be read ({error}); ingest again when it can") from error

    def _members_in(
        self, archive: str, uri: str, index: dict[str, Member], names: list[str]
    ) -> Iterator[dict[str, Any]]:
        with self.folder.open(archive) as handle:
            for name in names:
                stored = (
                    None if unsafe_because(name) else next((m for m in self._member_names(name) if m in index), None)
                )
                if stored is None:
                    yield self._missing(name)
                elif index[stored].problem is not None:
                    yield self._row(name, status="refused", reason=f"{uri}, member {stored!r}: {index[stored].problem}")
                elif index[stored].size > self.limits.max_image_bytes:
                    yield self._too_large(name, uri, index[stored].size)
                else:
                    member = index[stored]
                    handle.seek(member.offset)
                    data = handle.read(member.size)
                    if len(data) < member.size:
                        raise SourceError(f"{uri}: the archive ends within member {stored!r}; fetch it again")
                    yield self._row(name, bytes=data, uri=uri, byte_offset=member.offset, byte_length=member.size)

    def _stream(self, archive: str, names: list[str]) -> Iterator[dict[str, Any]]:
        by_member: dict[str, list[str]] = {}
        waiting = dict.fromkeys(names)
        for name in names:
            if not unsafe_because(name):
                for member in self._member_names(name):
                    by_member.setdefault(member, []).append(name)
        uri = self.folder.uri(archive)
        try:
            with self.folder.open(archive) as handle, open_tar(handle, is_compressed=True) as tar:
                for info in tar:
                    forget(tar)
                    # Several spellings may name one member.
                    called = [n for n in by_member.get(_stored(info.name), ()) if n in waiting]
                    if not called or info.isdir():
                        continue
                    for name in called:
                        del waiting[name]
                    problem = member_problem(info)
                    if problem is not None:
                        why = f"{uri}, member {info.name!r}: {problem}"
                        yield from (self._row(n, status="refused", reason=why) for n in called)
                    elif info.size > self.limits.max_image_bytes:
                        yield from (self._too_large(n, uri, info.size) for n in called)
                    else:
                        handle_of = tar.extractfile(info)
                        assert handle_of is not None
                        data = handle_of.read()
                        if len(data) < info.size:
                            raise SourceError(f"{uri}: the archive ends within member {info.name!r}; fetch it again")
                        yield from (self._row(n, bytes=data, uri=uri) for n in called)
        except TAR_ERRORS as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"{uri}: not a readable tar.gz archive ({error}); fetch it again") from error
        yield from (self._missing(name) for name in waiting)
