"""JSON files of records (a list of objects, or one object per line), read without holding the file.

Belongs here: from bytes to values, one at a time. Does not belong here: what a record means (the layouts).
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Iterator
from typing import Any

from pipelines.files import Folder
from pipelines.sources import SourceError, shown

_BLOCK = 1 << 20
_LARGEST_RECORD = 64 << 20
_SPACE = " \t\r\n"


def read_records(folder: Folder, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of the records start to stop; bytes that are no UTF-8 become lone surrogates in texts.

    Raises:
        SourceError: the file is missing, no JSON list of records, or ends in the middle.
    """
    try:
        with folder.open(name) as handle:
            for number, value in enumerate(_values(handle, folder.uri(name))):
                if stop is not None and number >= stop:
                    return
                if number >= start:
                    yield number, value
    except (OSError, EOFError) as error:
        raise SourceError(f"{folder.uri(name)}: not a readable JSON file ({error}); fetch it again") from error


def _values(handle: Any, file: str) -> Iterator[Any]:
    text = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    scan = json.JSONDecoder(strict=False).raw_decode
    buffer, at, is_end, number, block = "", 0, False, 0, _BLOCK
    closing: str | None = None
    while True:
        while at < len(buffer) and buffer[at] in _SPACE:
            at += 1
        if closing is None and at < len(buffer):
            if buffer[at] not in "[{":
                raise SourceError(f"{file}: not a JSON list of records: starts with {shown(buffer[at : at + 20])}")
            closing = "]" if buffer[at] == "[" else ""
            at += closing == "]"
            continue
        if at < len(buffer) and number and buffer[at] == ",":
            at += 1
            continue
        if at < len(buffer) and buffer[at] == closing:
            _require_space(handle, buffer[at + 1 :], text, file)
            return
        if at < len(buffer):
            try:
                value, end = scan(buffer, at)
            except json.JSONDecodeError as error:
                if is_end or len(buffer) - at > _LARGEST_RECORD:
                    raise SourceError(
                        f"{file}: record {number} is not readable JSON ({error.msg}); fetch it again"
                    ) from None
            except (RecursionError, ValueError) as error:
                raise SourceError(f"{file}: record {number} is not readable JSON ({error})") from None
            else:
                # A number could go on in the next block.
                if end < len(buffer) or is_end:
                    yield value
                    number, at, block = number + 1, end, _BLOCK
                    continue
        elif is_end:
            if closing == "":
                return
            what = "is empty" if closing is None else f"ends after {number} records without the closing bracket"
            raise SourceError(f"{file}: {what}; expected a JSON list of records; fetch it again")
        data = handle.read(block)
        is_end = not data
        buffer, at, block = buffer[at:] + text.decode(data, final=is_end), 0, block * 2


def _require_space(handle: Any, rest: str, text: codecs.IncrementalDecoder, file: str) -> None:
    """Raise unless nothing but white space is left: a second list, say, would be passed over."""
    is_end = False
    while not is_end:
        if found := rest.strip(_SPACE):
            raise SourceError(
                f"{file}: found {shown(found[:20])} behind the closing bracket of the list; expected one JSON list of records"
            )
        data = handle.read(_BLOCK)
        is_end = not data
        rest = text.decode(data, final=is_end)


@functools.lru_cache(maxsize=64)
def _count(location: str, name: str, mark: str) -> int:
    return sum(1 for _ in read_records(Folder(location), name))


def count_records(folder: Folder, name: str) -> int:
    """Return how many records a file has; read again only when the file changes.

    Raises:
        SourceError: see read_records.
    """
    stat = folder.stat(name)
    if stat is None:
        raise SourceError(f"{folder.uri(name)}: no such file")
    return _count(folder.location, name, f"{stat.size}/{stat.mark}")


def first_fields(folder: Folder, name: str) -> tuple[str, ...]:
    """Return the field names of the first record (none if there is no record or it is no object)."""
    for _, record in read_records(folder, name, 0, 1):
        return tuple(record) if isinstance(record, dict) else ()
    return ()
