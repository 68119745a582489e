"""Scores that somebody has already: a file with a score per (image, prompt) becomes a scorer; no model, no torch.

    prompt | prompt_id                          the text, or our id of it
    image_id | sha256 | image_uid | uid         our id, the digest of the bytes, or the source's own name within `family`
    <score_column>                              a number

Of several such columns the first counts. Images without bytes take these scores too. Rows that match nothing in the store
are counted by `coverage`. Belongs here: from such a file to rows of `scores`. Does not belong here: scorers that judge.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import operator
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import identity as ids
from pipelines import schemas
from pipelines.config import ScorerConfig
from pipelines.files import Folder, normal_name, open_uri, services_as_oserror
from pipelines.sources import SourceError, columns, shown
from pipelines.tables import Store

SUFFIXES = (".parquet", ".csv", ".jsonl")
PROMPTS = ("prompt", "prompt_id")
IMAGES = ("image_id", "sha256", "image_uid", "uid")
_UIDS = ("image_uid", "uid")
_DIGITS = {"prompt_id": ids.ID_CHARACTERS, "image_id": ids.ID_CHARACTERS, "sha256": 64}
_INSTEAD = {
    "prompt_id": "to give the text itself, call the column 'prompt'",
    "image_id": "a source's own names go into a column 'image_uid'",
    "sha256": "a source's own names go into a column 'image_uid'",
}
_KEYS = ["image_id", "prompt_id"]
_ROWS = 250_000
"""Rows that are brought to ids at once."""
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6
"""What two scores of one pair may differ by: an image with two names was judged twice, in different batches."""
_EXAMPLES = 3


class ImportedScoresError(ValueError):
    """A file of imported scores is not what it must be; the message names file, column or row, found and expected."""


# --- the file's identity ---------------------------------------------------------------------------------------------


def identity(scorer: ScorerConfig) -> dict[str, object]:
    """Return what makes the scores these: the file's content, how it is read, the revision that its makers give it.

    Raises:
        ImportedScoresError: the file is not there or cannot be read.
    """
    return {
        "file": _digest(scorer),
        "revision": scorer.revision,
        "family": scorer.family,
        "score_column": scorer.score_column,
    }


def facts(scorer: ScorerConfig) -> dict[str, Any]:
    """Return what a reader of the scores must know; it goes into every manifest.

    Raises:
        ImportedScoresError: the file cannot be read.
    """
    from pipelines.scoring import checkpoints

    digest = _digest(scorer)
    if digest not in _totals:
        _totals[digest] = sum(len(piece) for piece in _pieces(scorer))
    return {
        "kind": scorer.kind,
        "revision": checkpoints.revision(scorer),
        "revision_name": scorer.revision,
        "file": scorer.checkpoint,
        "rows": _totals[digest],
    }


_totals: dict[str, int] = {}
"""Rows of every file that this process has read, by its sha256."""


def _digest(scorer: ScorerConfig) -> str:
    if not scorer.checkpoint.endswith(SUFFIXES):
        raise _error(scorer, f"expected one file that ends in {', '.join(SUFFIXES)}; write the scores into one")
    with _reading(scorer):
        if "://" not in scorer.checkpoint:
            return ids.file_digest(Path(scorer.checkpoint))
        stat = Folder(scorer.checkpoint).stat("")
        if stat is None:
            raise FileNotFoundError(2, "no such file", scorer.checkpoint)
        # Without a mark, another file of the same size would pass for this one.
        read = _digest_of_url if stat.mark else _digest_of_url.__wrapped__
        return read(scorer.checkpoint, stat.size, stat.mark)


@functools.lru_cache(maxsize=256)
def _digest_of_url(url: str, size: int, mark: str) -> str:
    digest = hashlib.sha256()
    with open_uri(url) as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _error(scorer: ScorerConfig, what: str) -> ImportedScoresError:
    return ImportedScoresError(f"scorer {scorer.name!r}: {scorer.checkpoint}: {what}")


@contextlib.contextmanager
def _reading(scorer: ScorerConfig) -> Iterator[None]:
    try:
        with services_as_oserror(scorer.checkpoint):
            yield
    except ImportedScoresError:
        raise
    except SourceError as error:
        # It names the file and the column itself.
        raise ImportedScoresError(f"scorer {scorer.name!r}: {error}") from error
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _error(
            scorer, f"cannot be read: {why}; expected one {' or '.join(SUFFIXES)} file, a path or an fsspec URL"
        ) from error


# --- its rows --------------------------------------------------------------------------------------------------------


def _pieces(scorer: ScorerConfig) -> Generator[pa.Table]:
    """Yield the file's rows in order: the columns of prompt, image and score, as the file has them."""
    with _reading(scorer), open_uri(scorer.checkpoint) as handle:
        if scorer.checkpoint.endswith(".parquet"):
            yield from _parquet(scorer, handle)
        elif scorer.checkpoint.endswith(".csv"):
            yield from _csv(scorer, handle)
        else:
            yield from _jsonl(scorer, handle)


def _chosen(scorer: ScorerConfig, found: Collection[str]) -> tuple[str, str, str]:
    """Return the columns of prompt, image and score of a file with these columns."""
    score = scorer.score_column
    if score in (*PROMPTS, *IMAGES):
        raise _error(
            scorer, f"score_column = {score!r} names a prompt or an image; name the column that holds the score"
        )
    if score not in found:
        raise _error(
            scorer, f"column {score!r} is missing, found {sorted(found)}; set the scorer's score_column to one of them"
        )
    chosen = []
    for what, names in (("the prompt", PROMPTS), ("the image", IMAGES)):
        column = next((n for n in names if n in found), None)
        if column is None:
            raise _error(scorer, f"no column of {what}: expected one of {list(names)}, found {sorted(found)}")
        chosen.append(column)
    if chosen[1] in _UIDS and not scorer.family:
        raise _error(
            scorer,
            f"column {chosen[1]!r} holds a source's own names; set the scorer's family to the family of that source",
        )
    return chosen[0], chosen[1], score


def _parquet(scorer: ScorerConfig, handle: IO[bytes]) -> Iterator[pa.Table]:
    with pq.ParquetFile(handle) as file:
        chosen = _once(scorer, file.schema_arrow.names)
        _require_kinds(scorer, file.schema_arrow, chosen)
        for batch in file.iter_batches(_ROWS, columns=list(chosen), use_threads=False):
            yield pa.Table.from_batches([batch]).select(list(chosen))


def _csv(scorer: ScorerConfig, handle: IO[bytes]) -> Iterator[pa.Table]:
    rows: list[tuple[str, ...]] = []
    with io.TextIOWrapper(handle, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, None)
            if not header:
                raise _error(scorer, "holds no header; expected the names of the columns in the first line")
            chosen = _once(scorer, header)
            take = operator.itemgetter(*(header.index(c) for c in chosen))
            for row in reader:
                # A blank line is no row.
                if row and len(row) != len(header):
                    what = f"expected {len(header)} fields, found {len(row)}: {shown(row)}"
                    raise _error(scorer, f"line {reader.line_num}: {what}")
                if row:
                    rows.append(take(row))
                if len(rows) == _ROWS:
                    yield _table_of(rows, chosen)
                    rows = []
        except csv.Error as error:
            raise _error(scorer, f"line {reader.line_num}: not CSV with ',' and '\"': {error}") from error
    yield _table_of(rows, chosen)


def _jsonl(scorer: ScorerConfig, handle: IO[bytes]) -> Iterator[pa.Table]:
    wanted = (*PROMPTS, *IMAGES, scorer.score_column)
    chosen: tuple[str, str, str] | None = None
    fields: set[str] = set()
    rows: list[dict[str, str | None]] = []
    for number, line in enumerate(handle, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _error(scorer, f"line {number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise _error(scorer, f"line {number}: expected an object, found {shown(value)}")
        fields.update(value)
        rows.append({c: _text(scorer, number, c, value[c]) for c in chosen or wanted if c in value})
        if len(rows) == _ROWS:
            chosen = chosen or _chosen(scorer, fields)
            yield _table_of([tuple(map(r.get, chosen)) for r in rows], chosen)
            rows = []
    if not fields:
        raise _error(scorer, "holds no row")
    chosen = chosen or _chosen(scorer, fields)
    yield _table_of([tuple(map(r.get, chosen)) for r in rows], chosen)


def _text(scorer: ScorerConfig, number: int, column: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if column == "prompt" or not isinstance(value, bool | int | float):
        expected = "text" if column == "prompt" else "a number" if column == scorer.score_column else "text or a number"
        raise _error(scorer, f"line {number}: column {column!r}: expected {expected}, found {shown(value)}")
    return str(value)


def _table_of(rows: Sequence[tuple[str | None, ...]], chosen: tuple[str, str, str]) -> pa.Table:
    return pa.table({c: pa.array([r[i] for r in rows], pa.large_string()) for i, c in enumerate(chosen)})


def _once(scorer: ScorerConfig, names: list[str]) -> tuple[str, str, str]:
    chosen = _chosen(scorer, names)
    if repeated := [c for c in chosen if names.count(c) > 1]:
        raise _error(scorer, f"column {repeated[0]!r} stands several times; found {names}")
    return chosen


def _require_kinds(scorer: ScorerConfig, schema: pa.Schema, chosen: tuple[str, str, str]) -> None:
    """Refuse a prompt that is no text (numbers would pass for one) and a score that is a truth value or a time."""
    prompt, _, score = (schema.field(c).type for c in chosen)
    if pa.types.is_dictionary(prompt):
        prompt = prompt.value_type
    if not any(t(prompt) for t in _TEXTS):
        raise _error(scorer, f"column {chosen[0]!r}: expected text, found {prompt}")
    if pa.types.is_boolean(score):
        raise _error(scorer, f"column {chosen[2]!r}: expected a number, found {score}; write it as 1 and 0")


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)


# --- as ids of a store -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """A file as ids of a store: one row per (image, prompt), and what became of its other rows.

    rows: image_id, prompt_id, score (null, NaN and infinite as the file has it), row (number in the file, from 1); sorted.
    starts: the first digits of image_id as a number. without_key, repeated: rows of the file.
    """

    rows: pl.DataFrame
    starts: np.ndarray
    total: int
    without_key: list[int]
    repeated: int

    def of_images(self, image_ids: pl.Series) -> pl.DataFrame:
        """Return the rows of some images, and perhaps of a few others: found without a walk over all rows."""
        wanted = np.unique(_start(image_ids))
        low, high = (np.searchsorted(self.starts, wanted, side) for side in ("left", "right"))
        counts = high - low
        # low_0, low_0 + 1, ..., high_0 - 1, low_1, ...
        return self.rows[np.repeat(low - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())]


def _start(image_ids: pl.Series) -> np.ndarray:
    return image_ids.str.slice(0, 8).str.to_integer(base=16, dtype=pl.Int64).to_numpy()


_tables: dict[tuple[str, str], tuple[tuple[str, ...], _Table]] = {}
"""(store, scorer) -> what its table was made from, and the table: shards of a store ask one after the other."""


def _table(store: Store, scorer: ScorerConfig) -> _Table:
    names, known = store.require("catalogue_names"), store.require("catalogue_images")
    digest = _digest(scorer)
    made_from = (digest, scorer.checkpoint, scorer.family, scorer.score_column, names.content, known.content)
    key = (store.location, scorer.name)
    if key not in _tables or _tables[key][0] != made_from:
        # The old one first: two of them may not fit.
        _tables.pop(key, None)
        table = _read(store, scorer)
        if _digest(scorer) != digest:
            raise _error(scorer, "changed while it was read; score again when it is written")
        _totals[digest] = table.total
        _tables[key] = (made_from, table)
    return _tables[key][1]


def _read(store: Store, scorer: ScorerConfig) -> _Table:
    names = store.scan(schemas.CATALOGUE_NAMES).select("named_id", now="image_id").collect()
    images = store.scan(schemas.CATALOGUE_IMAGES).select("image_id").collect()
    known = pl.concat([images["image_id"], names["named_id"]])
    frames, total = [], 0
    with contextlib.closing(_pieces(scorer)) as pieces:
        for piece in pieces:
            with _reading(scorer):
                frames.append(_as_ids(scorer, piece, total, known))
            total += len(piece)
    rows = pl.concat(frames) if frames else pl.DataFrame(schema=_ID_SCHEMA)
    if len(names):
        rows = rows.join(names, left_on="image_id", right_on="named_id", how="left")
        rows = rows.with_columns(image_id=pl.coalesce("now", "image_id")).drop("now")
    has_key = pl.col("image_id").is_not_null() & pl.col("prompt_id").is_not_null()
    without_key = sorted(rows.filter(~has_key)["row"])
    # Rows without a usable score say nothing, so they stand behind those of the same pair that have one.
    rows = rows.filter(has_key).sort(*_KEYS, _is_unusable(), "row")
    is_first = pl.any_horizontal((pl.col(k) != pl.col(k).shift()).fill_null(True) for k in _KEYS)
    rows = rows.with_columns(is_first=is_first)
    _refuse_contradictions(scorer, rows)
    kept = rows.filter("is_first").drop("is_first")
    return _Table(kept, _start(kept["image_id"]), total, without_key, len(rows) - len(kept))


_ID_SCHEMA = {"image_id": pl.String, "prompt_id": pl.String, "score": pl.Float32, "row": pl.UInt32}


def _is_unusable() -> pl.Expr:
    return ~pl.col("score").is_finite().fill_null(False)


def _as_ids(scorer: ScorerConfig, piece: pa.Table, start: int, known: pl.Series) -> pl.DataFrame:
    """Return a piece of the file as ids. known: ids of images, and of names of images, that the store has."""
    prompt, image, score = piece.column_names
    frame, problem = columns.typed(
        piece,
        {prompt: pl.String, image: pl.String, score: pl.Float64},
        scorer.checkpoint,
        ids=[c for c in (prompt, image) if c != "prompt"],
    )
    if problem.null_count() < len(problem):
        at = problem.is_not_null().arg_true()[0]
        raise _error(
            scorer, f"row {start + at + 1}: {problem[at]}; correct it, or leave it empty where nothing is known"
        )
    return pl.DataFrame(
        {
            "image_id": _of_names(scorer, frame[image], known)
            if image in _UIDS
            else _hexadecimal(scorer, frame[image], start),
            "prompt_id": _mapped(frame[prompt], ids.prompt_id)
            if prompt == "prompt"
            else _hexadecimal(scorer, frame[prompt], start),
            "score": frame[score].cast(pl.Float32),
            "row": pl.Series(np.arange(start + 1, start + len(frame) + 1, dtype=np.uint32)),
        }
    )


def _mapped(values: pl.Series, how: Callable[[str], str]) -> pl.Series:
    distinct = values.drop_nulls().unique()
    new = pl.Series([how(v) for v in distinct], dtype=pl.String)
    return values.replace_strict(distinct, new, default=None, return_dtype=pl.String)


def _of_names(scorer: ScorerConfig, names: pl.Series, known: pl.Series) -> pl.Series:
    """Return the ids that names have; a source of one's own that names image files has them under 'file:<path>'."""
    made = _mapped(names, lambda name: ids.image_id_of_uid(scorer.family, name))
    paths = names.set(_are_in(made, known), None)
    of_files = _mapped(paths, lambda name: ids.image_id_of_uid(scorer.family, f"file:{normal_name(name)}"))
    return of_files.set(~_are_in(of_files, known), None).fill_null(made)


def _are_in(few: pl.Series, many: pl.Series) -> pl.Series:
    # The other way round a table of all of them would be made for every piece.
    return few.is_in(many.filter(many.is_in(few.unique().implode())).implode()).fill_null(True)


def _hexadecimal(scorer: ScorerConfig, values: pl.Series, start: int) -> pl.Series:
    text = values.str.to_lowercase()
    digits = _DIGITS[values.name]
    is_odd = ~text.str.contains(f"^[0-9a-f]{{{digits}}}$")
    if is_odd.any():
        at = is_odd.fill_null(False).arg_true()[0]
        raise _error(
            scorer,
            f"row {start + at + 1}: column {values.name!r}: expected {digits} hexadecimal digits, found "
            f"{shown(values[at])}; {_INSTEAD[values.name]}",
        )
    return text.str.slice(0, ids.ID_CHARACTERS)


def _refuse_contradictions(scorer: ScorerConfig, rows: pl.DataFrame) -> None:
    """Refuse two different scores of one (image, prompt); rows: sorted, with is_first."""
    repeated = rows.filter(~pl.col("is_first")).select(_KEYS).unique()
    if repeated.is_empty():
        return
    low, high = pl.col("low").cast(pl.Float64), pl.col("high").cast(pl.Float64)
    differing = (
        rows.filter(~_is_unusable())
        .join(repeated, on=_KEYS, how="semi")
        .group_by(_KEYS)
        .agg(low=pl.col("score").min(), high=pl.col("score").max(), row=pl.col("row"))
        .filter(high - low > pl.max_horizontal(_RELATIVE * low.abs(), _RELATIVE * high.abs(), pl.lit(_ABSOLUTE)))
        .sort(pl.col("row").list.min())
    )
    if len(differing):
        numbers = sorted(differing["row"][0])[:_EXAMPLES]
        raise _error(
            scorer,
            f"{len(differing)} (image, prompt) with different scores, e.g. {'; '.join(_lines(scorer, numbers))}; "
            f"keep one row of each",
        )


def _lines(scorer: ScorerConfig, numbers: Collection[int]) -> list[str]:
    """Return rows of the file, by their numbers, as a person would read them."""
    lines, start = [], 0
    with contextlib.closing(_pieces(scorer)) as pieces:
        for piece in pieces:
            for number in sorted(n for n in numbers if start < n <= start + len(piece)):
                row = piece.slice(number - start - 1, 1).to_pylist()[0]
                lines.append(f"row {number}: " + ", ".join(f"{c} {shown(v)}" for c, v in row.items()))
            start += len(piece)
            if start >= max(numbers, default=0):
                break
    return lines


# --- what the pipeline asks ------------------------------------------------------------------------------------------


def score_owned(store: Store, scorer: ScorerConfig, owned: pl.DataFrame) -> pl.DataFrame:
    """Return rows of `scores` for exactly these pairs: ok with the file's score, else not_imported with the reason.

    owned: image_id, prompt_id (and more), each pair once. The file is read once per process, store and content.

    Raises:
        ImportedScoresError: the file is not what it must be; see the module's head.
        tables.StoreError: there is no catalogue.
    """
    table = _table(store, scorer)
    found = owned.select(_KEYS).join(table.of_images(owned["image_id"]), on=_KEYS, how="left", maintain_order="left")
    file = scorer.checkpoint.rsplit("/", 1)[-1]
    score, is_ok = pl.col("score"), ~_is_unusable()
    # Infinite is also a number that is none in 32 bits.
    is_what = pl.when(score.is_null()).then(pl.lit("null")).when(score.is_nan()).then(pl.lit("NaN"))
    what = is_what.otherwise(pl.lit("infinite"))
    unusable = pl.concat_str(pl.lit(f"{file}, row "), pl.col("row"), pl.lit(f": {scorer.score_column} is "), what)
    absent = pl.lit(f"no row of {file} has this image and prompt")
    why = pl.when(pl.col("row").is_null()).then(absent).otherwise(unusable)
    return found.select(
        *_KEYS,
        score=pl.when(is_ok).then(score),
        status=pl.when(is_ok).then(pl.lit("ok")).otherwise(pl.lit("not_imported")),
        reason=pl.when(~is_ok).then(why),
    )


def coverage(store: Store, scorer: ScorerConfig) -> dict[str, Any]:
    """Return how the file and the store fit, for logs.

    rows = matched + repeated + without_key + unmatched_prompts + unmatched_images + unpaired, all of them rows of the file:
    those that give or would give a score, that say again what another row says, that lack prompt or image, whose prompt
    the store does not have, whose image it does not have (the prompt is there), whose image and prompt no vote joins.
    without_score: matched rows whose score is null, NaN or infinite. wanted: pairs of the store; examples: rows that match
    nothing, as text.

    Raises:
        ImportedScoresError: the file is not what it must be.
        tables.StoreError: there is no catalogue.
    """
    table = _table(store, scorer)

    def ids_of(of: schemas.Table, keys: list[str]) -> pl.DataFrame:
        store.require(of.name)
        return store.scan(of).select(keys).collect()

    wanted = ids_of(schemas.CATALOGUE_SCORABLES, _KEYS)
    matched = table.rows.join(wanted, on=_KEYS, how="semi")
    others = table.rows.join(wanted, on=_KEYS, how="anti")
    has_prompt = others.join(ids_of(schemas.CATALOGUE_PROMPTS, ["prompt_id"]), on="prompt_id", how="semi")
    no_prompt = others.join(has_prompt, on="row", how="anti")
    unpaired = has_prompt.join(ids_of(schemas.CATALOGUE_IMAGES, ["image_id"]), on="image_id", how="semi")
    no_image = has_prompt.join(unpaired, on="row", how="anti")
    rows_of = {
        "without_key": table.without_key,
        "unmatched_prompts": no_prompt["row"].to_list(),
        "unmatched_images": no_image["row"].to_list(),
        "unpaired": unpaired["row"].to_list(),
    }
    shown_rows = sorted(n for rows in rows_of.values() for n in sorted(rows)[:_EXAMPLES])
    return {
        "rows": table.total,
        "wanted": len(wanted),
        "matched": len(matched),
        "without_score": len(matched.filter(_is_unusable())),
        "repeated": table.repeated,
        **{what: len(rows) for what, rows in rows_of.items()},
        "examples": _lines(scorer, shown_rows),
    }


def coverage_text(found: dict[str, Any]) -> str:
    """Return `coverage` as one line, with examples where rows match nothing."""
    others = ("repeated", "without_key", "unmatched_prompts", "unmatched_images", "unpaired")
    lost = ", ".join(f"{found[what]} {what.replace('_', ' ')}" for what in others if found[what])
    examples = f", e.g. {'; '.join(found['examples'])}" if found["examples"] else ""
    without = f" ({found['without_score']} of them without a usable score)" if found["without_score"] else ""
    return (
        f"{found['matched']} of {found['wanted']} pairs of the store have a row in the file{without}; of its "
        f"{found['rows']} rows " + (f"{lost} count not{examples}" if lost else "all count")
    )
