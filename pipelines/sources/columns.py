"""Parquet files of rows: read in bounded pieces, columns brought to the types that a layout wants, images taken out.

A value that cannot be read as its column's type costs its row (a problem), a column of a hopeless type costs the file.
Belongs here: from arrow columns to typed ones. Does not belong here: which columns (the layouts).
"""

from __future__ import annotations

import binascii
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import identity
from pipelines.config import LimitsConfig
from pipelines.files import Folder, normal_name, unsafe_because
from pipelines.sources import IMAGE_SCHEMA, VOTE_SCHEMA, RawChunk, Shard, SourceError, shown
from pipelines.sources.pictures import Pictures

PIECE_BYTES = 16_000_000
_BUFFER = 1 << 20
_LARGE_BYTES = 64_000_000
_NULLS = ("", "none", "null", "nan", "nat", "<na>")
_TRUE, _FALSE = ("true", "1", "1.0", "t", "yes"), ("false", "0", "0.0", "f", "no")
Types = Mapping[str, pl.DataType | type[pl.DataType]]


@dataclass(frozen=True)
class Piece:
    """Some rows of one row group. start: number of the first row in the file; row: in the row group.

    image: the column of images that the piece holds (with that of their uids), where images are read by themselves.
    """

    table: pa.Table
    row_group: int
    row: int
    start: int
    image: str | None = None


def column_names(folder: Folder, name: str) -> tuple[str, ...]:
    """Return the columns of a parquet file.

    Raises:
        SourceError: it is not readable parquet.
    """
    try:
        with folder.open(name) as handle, pq.ParquetFile(handle) as file:
            return tuple(file.schema_arrow.names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(folder, name, error) from error


def _unreadable(folder: Folder, name: str, error: Exception) -> SourceError:
    return SourceError(f"{folder.uri(name)}: not a readable parquet file ({error}); fetch it again")


def read_pieces(
    folder: Folder,
    name: str,
    wanted: tuple[str, ...],
    required: tuple[str, ...],
    images: Mapping[str, str | None] | None = None,
) -> Iterator[Piece]:
    """Yield a parquet file's rows in pieces of about 16 MB: the wanted columns that it has.

    images: {column: column of uids}; after the wanted columns of a row group, each of these is read by itself, so that the
    dictionary page of one column of images, which can be as large as a row group, is in memory at a time.

    Raises:
        SourceError: it is not readable parquet, lacks a required column, or holds other rows than its footer says.
    """
    try:
        with folder.open(name) as handle, pq.ParquetFile(handle, buffer_size=_BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if missing := [c for c in required if c not in names]:
                raise SourceError(
                    f"{folder.uri(name)}: column {missing[0]!r} is missing (all missing: {missing}); expected "
                    f"{list(required)}, found {names}"
                )
            asked = {*wanted, *(images or {}), *(c for c in (images or {}).values() if c is not None)}
            if repeated := sorted(c for c in asked if names.count(c) > 1):
                raise SourceError(f"{folder.uri(name)}: column {repeated[0]!r} stands several times; found {names}")
            parts: list[tuple[str | None, list[str]]] = [(None, [c for c in wanted if c in names])]
            for column, uids in (images or {}).items():
                parts.append((column, [c for c in (column, uids) if c in names and c is not None]))
            start = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                for image, columns in parts:
                    row = 0
                    size = piece_rows(file.metadata.row_group(group), columns)
                    for batch in file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                        yield Piece(pa.Table.from_batches([batch]), group, row, start + row, image)
                        row += batch.num_rows
                    if row != rows:
                        raise SourceError(
                            f"{folder.uri(name)}: row group {group} holds {row} rows, its footer says {rows}"
                        )
                    if column_bytes(file.metadata.row_group(group), columns) > _LARGE_BYTES:
                        # Else the allocator keeps one column's dictionary page beside the next one's.
                        pa.default_memory_pool().release_unused()
                start += rows
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise _unreadable(folder, name, error) from error


def piece_rows(group: pq.RowGroupMetaData, columns: Collection[str]) -> int:
    """Return how many rows of these columns of a row group are about 16 MB."""
    return max(1, min(1024, PIECE_BYTES * group.num_rows // max(1, column_bytes(group, columns))))


def column_bytes(group: pq.RowGroupMetaData, columns: Collection[str]) -> int:
    """Return how large these columns of a row group are in memory."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)


def typed(piece: pa.Table, types: Types, file: str, ids: Collection[str] = ()) -> tuple[pl.DataFrame, pl.Series]:
    """Return the columns in these types (absent ones as nulls), and per row why a value could not be read, else null.

    Numbers, booleans and times may be stored as text ("1.0", "True", "None"). ids: text columns that name something, where
    "None" and the like are nulls and "12.0" is 12, as it is in a column of numbers.

    Raises:
        SourceError: a column is of a type from which its own cannot be had; names file, column, expected, found.
    """
    columns, problems = {}, []
    for name, dtype in types.items():
        if name not in piece.column_names:
            columns[name] = pl.Series(name, [None] * len(piece), dtype)
            continue
        array = piece[name].combine_chunks()
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        column, problem = _cast(name, array, dtype, file)
        columns[name] = _plain_ids(column) if name in ids else column
        if problem is not None:
            problems.append(problem)
    none = pl.Series("problem", [None] * len(piece), pl.String)
    merged = pl.select(pl.coalesce(*problems, none)).to_series() if problems else none
    return pl.DataFrame(columns), merged.alias("problem")


def _plain_ids(series: pl.Series) -> pl.Series:
    text = series.str.strip_chars()
    text = text.set(text.str.to_lowercase().is_in(_NULLS), None)
    return text.str.replace(r"^(-?\d+)\.0$", "$1")


def _cast(
    name: str, array: pa.Array, dtype: pl.DataType | type[pl.DataType], file: str
) -> tuple[pl.Series, pl.Series | None]:
    wrong = f"{file}: column {name!r}: expected {dtype}, found {array.type}, which cannot be read as such"
    if not any(is_kind(array.type) for is_kind in _SCALARS):
        raise SourceError(wrong)
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    invalid = None
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array, invalid = _valid_text(array, name)
    try:
        series = pl.Series(name, pl.from_arrow(array))
        if dtype == pl.String:
            # An id that was stored as 12.0 is 12, and NaN is no id.
            if series.dtype.is_float():
                series = series.fill_nan(None)
                known = series.drop_nulls()
                if ((known % 1 == 0) & (known.abs() < 2**53)).all():
                    series = series.cast(pl.Int64)
            return series.cast(pl.String), invalid
        if series.dtype == pl.String:
            text = series.str.strip_chars()
            text = text.set(text.str.to_lowercase().is_in(_NULLS), None)
            return _told(name, text, _parse(text, dtype), dtype, invalid)
        if series.dtype.is_temporal() != _is_time(dtype) and not series.dtype == pl.Null:
            raise SourceError(wrong)
        if isinstance(series.dtype, pl.Datetime) and series.dtype.time_zone is not None:
            series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        if dtype.is_integer():
            return _told(name, series, _whole(series, dtype), dtype, invalid)
        return series.cast(dtype), invalid
    except pl.exceptions.PolarsError as error:
        raise SourceError(f"{wrong} ({error})") from error


_SCALARS = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null, pa.types.is_boolean),
    *(pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal128, pa.types.is_temporal),
)
"""Types from which a value can be had; of others polars takes some for what they are not, and panics on some."""


def _told(
    name: str,
    found: pl.Series,
    read: pl.Series,
    dtype: pl.DataType | type[pl.DataType],
    invalid: pl.Series | None,
) -> tuple[pl.Series, pl.Series | None]:
    """Return the values read and, where one was found but could not be read, why; `invalid` says what was wrong before."""
    failed = read.is_null() & found.is_not_null()
    if found.dtype.is_float():
        failed &= found.is_not_nan()
    if failed.any():
        values = [shown(v) if f else None for v, f in zip(found, failed, strict=True)]
        why = pl.lit(f"column {name!r}: expected {_words(dtype)}, found ") + pl.Series(values, dtype=pl.String)
        before = pl.lit(None, pl.String) if invalid is None else invalid
        invalid = pl.select(pl.coalesce(before, why)).to_series()
    return read.alias(name), invalid


def _whole(series: pl.Series, dtype: pl.DataType | type[pl.DataType]) -> pl.Series:
    """Return whole numbers as integers, null for any other number."""
    if series.dtype.is_float():
        series = series.set((series % 1 != 0).fill_null(False), None)
    return series.cast(dtype, strict=False)


def _is_time(dtype: pl.DataType | type[pl.DataType]) -> bool:
    return dtype == pl.Datetime or isinstance(dtype, pl.Datetime)


def _words(dtype: pl.DataType | type[pl.DataType]) -> str:
    if dtype == pl.Boolean:
        return "true or false"
    return "a time" if _is_time(dtype) else "a whole number" if dtype.is_integer() else "a number"


def _parse(text: pl.Series, dtype: pl.DataType | type[pl.DataType]) -> pl.Series:
    if dtype == pl.Boolean:
        low = text.str.to_lowercase()
        return pl.select(pl.when(low.is_in(_TRUE)).then(True).when(low.is_in(_FALSE)).then(False)).to_series()
    if _is_time(dtype):
        values = [text.str.to_datetime(f, time_unit="us", strict=False) for f in _TIME_FORMATS]
        zoned = [text.str.to_datetime(f, time_unit="us", strict=False) for f in _ZONED_FORMATS]
        return pl.select(pl.coalesce(*values, *(z.dt.replace_time_zone(None) for z in zoned))).to_series()
    number = text.cast(pl.Float64, strict=False)
    return _whole(number, dtype) if dtype.is_integer() else number.cast(dtype, strict=False)


_TIME_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d")
_ZONED_FORMATS = ("%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M:%S%.f%#z")


def _valid_text(array: pa.Array, name: str) -> tuple[pa.Array, pl.Series | None]:
    """Return a text column with every value valid UTF-8, and which rows were not (parquet does not check)."""
    try:
        array.validate(full=True)
        return array, None
    except pa.ArrowInvalid:
        values: list[str | None] = []
        problems: list[str | None] = []
        for raw in array.cast(pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()).to_pylist():
            try:
                values.append(None if raw is None else raw.decode())
                problems.append(None)
            except UnicodeDecodeError:
                # So that different bytes stay different names.
                values.append(raw.decode(errors="backslashreplace"))
                problems.append(f"column {name!r}: not valid UTF-8: {shown(raw)}")
        return pa.array(values, pa.large_string()), pl.Series(problems, dtype=pl.String)


def images_of(
    piece: Piece, columns: Mapping[str, str | None], file: str, pictures: Pictures | None, limits: LimitsConfig
) -> Iterator[pa.Table]:
    """Yield the images (IMAGE_SCHEMA) of the columns {column: column of uids}, keys '<row of the file>:<column>'.

    A column holds bytes, datasets' image structs {bytes, path}, or text: base64 where `pictures` is None, else a path
    in `pictures`, or an id where there is no such file. What lies in files comes in tables of about 16 MB.

    Raises:
        SourceError: a column is of another type.
    """
    for column, uids in columns.items():
        yield from _image_column(piece, column, uids, file, pictures, limits)


def _image_column(
    piece: Piece, column: str, uids: str | None, file: str, pictures: Pictures | None, limits: LimitsConfig
) -> Iterator[pa.Table]:
    table, rows = piece.table, len(piece.table)
    keys = [f"{piece.start + i}:{column}" for i in range(rows)]
    none = pa.nulls(rows, pa.string())
    uid = none
    if uids is not None and uids in table.column_names:
        uid = typed(table.select([uids]), {uids: pl.String}, file, [uids])[0][uids].to_arrow().cast(pa.string())
    found = table[column].combine_chunks() if column in table.column_names else pa.nulls(rows, pa.binary())
    if pa.types.is_dictionary(found.type):
        found = found.dictionary_decode()
    status, reason = none, none
    if pa.types.is_struct(found.type) and found.type.get_field_index("bytes") >= 0:
        paths, found = struct_paths(found, column, file), pc.struct_field(found, "bytes")
        if pictures is not None and found.null_count == rows and paths.null_count < rows:
            yield from _named(paths, keys, pictures, uid)
            return
        # The path of bytes is no name: many writers call every file the same.
        uid = pc.coalesce(uid, pc.if_else(pc.is_null(found), paths, none))
    if pa.types.is_null(found.type):
        found = found.cast(pa.binary())
    if pa.types.is_integer(found.type):
        found = found.cast(pa.string())
    if pa.types.is_binary_view(found.type) or pa.types.is_string_view(found.type):
        found = found.cast(pa.large_binary() if pa.types.is_binary_view(found.type) else pa.large_string())
    if pa.types.is_string(found.type) or pa.types.is_large_string(found.type):
        if pictures is not None:
            yield from _named(found, keys, pictures, uid)
            return
        decoded = [_from_base64(v) for v in _valid_text(found, column)[0].to_pylist()]
        found = pa.array([d for d, _ in decoded], pa.large_binary())
        reason = pa.array([w if w is None else f"column {column!r}: {w}" for _, w in decoded], pa.string())
        status = pc.if_else(pc.is_valid(reason), pa.scalar("unreadable"), pa.scalar(None, pa.string()))
    if not (pa.types.is_binary(found.type) or pa.types.is_large_binary(found.type)):
        expected = "bytes, an image struct {bytes, path} or text"
        raise SourceError(f"{file}: column {column!r}: expected {expected}, found {found.type}")
    size = pc.binary_length(found)
    too_large = pc.fill_null(pc.greater(size, limits.max_image_bytes), False)
    if pc.any(too_large).as_py():
        limit = f" bytes, limit limits.max_image_bytes = {limits.max_image_bytes}"
        why = pc.binary_join_element_wise(size.cast(pa.string()), limit, "")
        status, reason = pc.if_else(too_large, "too_large", status), pc.if_else(too_large, why, reason)
        found = pc.if_else(too_large, pa.scalar(None, found.type), found)
    values = {
        "image_key": pa.array(keys, pa.string()),
        "bytes": found.cast(pa.large_binary()),
        "uid": uid,
        "status": status,
        "reason": reason,
        "uri": pa.array([file] * rows, pa.string()),
        "row_group": pa.array([piece.row_group] * rows, pa.int32()),
        "row": pa.array(range(piece.row, piece.row + rows), pa.int64()),
        "image_column": pa.array([column] * rows, pa.string()),
        "byte_offset": pa.nulls(rows, pa.int64()),
        "byte_length": pa.nulls(rows, pa.int64()),
    }
    yield pa.Table.from_pydict(values, schema=IMAGE_SCHEMA)


def struct_paths(found: pa.Array, column: str, file: str) -> pa.Array:
    """Return the paths of datasets' image structs, nulls where they have none.

    Raises:
        SourceError: the paths are no text.
    """
    if found.type.get_field_index("path") < 0:
        return pa.nulls(len(found), pa.string())
    paths = pc.struct_field(found, "path")
    if not (pa.types.is_string(paths.type) or pa.types.is_large_string(paths.type) or pa.types.is_null(paths.type)):
        raise SourceError(f"{file}: column {column!r}: expected the path as text, found {paths.type}")
    return _valid_text(paths, column)[0].cast(pa.string())


def _named(found: pa.Array, keys: list[str], pictures: Pictures, uids: pa.Array) -> Iterator[pa.Table]:
    rows, size = [], 0
    for key, name, own in zip(keys, _valid_text(found, "image")[0].to_pylist(), uids.to_pylist(), strict=True):
        # An empty name is none.
        row = next(pictures.read([name])) if name else dict.fromkeys(IMAGE_SCHEMA.names)
        place = row["uid"]
        is_file = row["bytes"] is not None or row["status"] == "too_large"
        # A file is known by where it lies; a name without a file is an id, which must not meet some other folder's file.
        uid = own or (f"file:{normal_name(place)}" if is_file and place else name or None)
        rows.append({**row, "image_key": key, "uid": uid})
        size += len(row["bytes"] or b"")
        if size >= PIECE_BYTES:
            yield _table_of(rows)
            rows, size = [], 0
    yield _table_of(rows)


def _table_of(rows: list[dict[str, Any]]) -> pa.Table:
    columns = [pa.array([r[f.name] for r in rows], f.type) for f in IMAGE_SCHEMA]
    return pa.Table.from_arrays(columns, schema=IMAGE_SCHEMA)


def _from_base64(value: str | None) -> tuple[bytes | None, str | None]:
    if value is None or value.strip().lower() in _NULLS:
        return None, None
    try:
        # Without the line breaks that some writers put in (RFC 2045).
        return binascii.a2b_base64("".join(value.split()), strict_mode=True), None
    except (binascii.Error, ValueError) as error:
        return None, f"expected bytes or base64, found text {shown(value)} ({error})"


def votes(
    frame: pl.DataFrame, name: str, piece: Piece, images: Sequence[str], **values: str | pl.Expr | pl.Series
) -> RawChunk:
    """Return the rows of a piece as one vote each, on the images of two columns as displayed; `values`: VOTE_SCHEMA."""
    row = pl.int_range(piece.start, piece.start + pl.len()).cast(pl.String)
    defaults: dict[str, pl.Expr] = {
        **{c: pl.lit(None) for c in VOTE_SCHEMA},
        "source_row": pl.lit(f"{name}:") + row,
        "first_key": row + f":{images[0]}",
        "second_key": row + f":{images[1]}",
        "rater": pl.lit(0),
        "is_display_order": pl.lit(True),
        "count": pl.lit(1),
    }
    rows = frame.select(**{**defaults, **values}).cast(pl.Schema(VOTE_SCHEMA))
    return RawChunk(IMAGE_SCHEMA.empty_table(), rows, len(frame))


def watched_fingerprint(folder: Folder, shard: Shard, images: tuple[str, ...]) -> str:
    """Return the fingerprint of a parquet file and of the image files that its columns name.

    Raises:
        SourceError: the file is not readable parquet.
    """
    column_names(folder, shard.file)
    named = _named_files(folder, shard.file, images)
    return shard.fingerprint if named is None else identity.fingerprint(shard=shard.fingerprint, images=named)


def _named_files(folder: Folder, name: str, columns: Collection[str]) -> dict[str, Any] | None:
    """Return what changes when an image file that the columns name does; None where they hold bytes."""
    with folder.open(name) as handle, pq.ParquetFile(handle) as file:
        schema = file.schema_arrow
        types = {c: schema.field(c).type for c in columns if schema.names.count(c) == 1}
    types = {c: t.value_type if pa.types.is_dictionary(t) else t for c, t in types.items()}
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    texts = tuple(c for c, t in types.items() if any(is_kind(t) for is_kind in is_text))
    if not texts:
        return None
    names: set[str] = set()
    for piece in read_pieces(folder, name, texts, ()):
        frame = typed(piece.table, dict.fromkeys(texts, pl.String), folder.uri(name))[0]
        names |= {n for c in texts for n in frame[c].unique() if n is not None and not unsafe_because(n)}
    return Pictures(folder, file_folder(name), None, LimitsConfig()).stats(names)


def file_folder(name: str) -> str:
    """Return the folder of a file of the source, '' for the source's own."""
    return posixpath.dirname(name)
