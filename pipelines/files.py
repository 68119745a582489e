"""Folders of raw files: a local path or any fsspec URL (`s3://`, `hf://`, ...), listed and read in one way.

Belongs here: finding, naming and reading files. Does not belong here: what stands in them (`sources`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec

_MARKS = (
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "sha256",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)
"""What filesystems say about a file's content or the time of its change, the surest first."""


@dataclass(frozen=True)
class Stat:
    """A file's size in bytes and a mark that changes when the file does."""

    size: int
    mark: str


class Folder:
    """A folder of raw files; names are relative, with '/' whatever the filesystem."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.fs, root = fsspec.core.url_to_fs(location)
        self.root = root.rstrip("/")
        self.is_local = is_local(self.fs)
        # What was listed earlier in this process may have changed since: sizes and marks of then would cut or refuse reads.
        self.fs.invalidate_cache()

    def __repr__(self) -> str:
        return f"Folder({self.location!r})"

    def path(self, name: str) -> str:
        """Return the path of a file as the filesystem knows it."""
        return f"{self.root}/{name}" if name else self.root

    def uri(self, name: str) -> str:
        """Return the address of a file as `open_uri` and people read it."""
        return self.path(name) if self.is_local else self.fs.unstrip_protocol(self.path(name))

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading bytes.

        Raises:
            OSError: it is not there, is no plain file (a pipe would wait for ever), or cannot be had.
        """
        return _open_local(self.path(name)) if self.is_local else self.fs.open(self.path(name), "rb")

    def files(self, suffixes: tuple[str, ...]) -> dict[str, Stat]:
        """Return the files with one of the suffixes in this folder and all below it, sorted by name.

        Hidden files and folders are passed over.

        Raises:
            OSError: the folder is not there or may not be read.
        """
        self.fs.invalidate_cache()
        if not self.fs.isdir(self.root):
            raise FileNotFoundError(2, "no such folder", self.location)
        found: dict[str, Stat] = {}
        if self.is_local:
            # Links are followed: a hub's cache is made of them, and data folders often are one.
            seen: set[str] = set()
            for base, folders, names in os.walk(self.root, followlinks=True):
                here = os.path.relpath(base, self.root)
                # A link can lead back to a folder above it.
                seen.add(os.path.realpath(base))
                folders[:] = [
                    f for f in folders if not f.startswith(".") and os.path.realpath(os.path.join(base, f)) not in seen
                ]
                for name in (n for n in names if n.endswith(suffixes) and not n.startswith(".")):
                    path = name if here == "." else f"{here}/{name}"
                    # A link that leads nowhere is listed, so that reading it says so.
                    found[path] = self.stat(path) or Stat(0, "")
        else:
            for path, info in self.fs.find(self.root, detail=True).items():
                name = path[len(self.root) + 1 :]
                if name.endswith(suffixes) and not any(part.startswith(".") for part in name.split("/")):
                    found[name] = _stat(info)
        return dict(sorted(found.items()))

    def stat(self, name: str) -> Stat | None:
        """Return a file's size and mark, or None if there is no such file.

        Raises:
            OSError: elsewhere than on a local disk, the question was refused or failed: that is no answer.
        """
        if self.is_local:
            try:
                found = os.stat(self.path(name))
            except (OSError, ValueError):
                return None
            return Stat(found.st_size, str(found.st_mtime_ns))
        try:
            info = self.fs.info(self.path(name))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return _stat(info) if info.get("type") == "file" else None

    def stats(self, names: Iterable[str]) -> dict[str, Stat | None]:
        """Return the stats of many files; elsewhere than on a local disk by one listing per folder."""
        if self.is_local:
            return {name: self.stat(name) for name in names}
        names = list(names)
        listed: dict[str, Any] = {}
        for folder in sorted({posixpath.dirname(self.path(n)) for n in names}):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                listed |= {info["name"].rstrip("/"): info for info in self.fs.ls(folder, detail=True)}
        found = {n: listed.get(self.path(n)) for n in names}
        return {n: _stat(i) if i is not None and i.get("type") == "file" else None for n, i in found.items()}


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether a filesystem is this machine's disk."""
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _stat(info: dict[str, Any]) -> Stat:
    mark = next((str(info[m]) for m in _MARKS if info.get(m) is not None), "")
    return Stat(int(info.get("size") or 0), mark)


@contextlib.contextmanager
def open_uri(uri: str) -> Iterator[IO[bytes]]:
    """Open the file at an address that `Folder.uri` gave."""
    if "://" not in uri:
        with _open_local(uri) as handle:
            yield handle
    else:
        # The size of an earlier listing would cut what is read of a file that grew.
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        with fs.open(path, "rb") as handle:
            yield handle


def _open_local(path: str) -> IO[bytes]:
    if os.path.exists(path) and not os.path.isfile(path):
        kind = (errno.EISDIR, "is a folder") if os.path.isdir(path) else (errno.EINVAL, "is no plain file")
        raise OSError(*kind, path)
    return open(path, "rb")


def is_gone(error: Exception) -> bool:
    """Return whether an error says that a place is gone or holds something else, not that it cannot be read now."""
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return True
    # Arrow tells damaged parquet by a plain OSError without a number.
    return type(error) is OSError and error.errno in (None, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)


_SERVICES = ("botocore", "aiobotocore", "boto3", "aiohttp", "huggingface_hub", "httpx", "requests", "gcsfs", "adlfs")


@contextlib.contextmanager
def services_as_oserror(location: str) -> Iterator[None]:
    """Turn what a storage service's own library raises (it is no OSError) into a ConnectionError that names the place."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] not in _SERVICES:
            raise
        raise ConnectionError(errno.EIO, f"{type(error).__name__}: {error}", location) from error


def unsafe_because(name: str) -> str | None:
    """Return why a relative name from a file's content must not be followed, or None if it may be."""
    if not name or "\0" in name:
        return "an empty name" if not name else "a name with a NUL character"
    if "://" in name:
        return "an address, not a name in the folder"
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return "an absolute path"
    return "a path with '..'" if ".." in parts else None


def normal_name(name: str) -> str:
    """Return a safe relative name without './' and doubled slashes."""
    return posixpath.normpath(name)
