"""Checks of tables: what lies on the disk, read again, whoever wrote it. MEANING says what each looks at.

Binary columns (encoded images, tensors) are not read: their files are compared by size and rows, all others by sha256 too.
Belongs here: which checks a table has, and what each finds. Does not belong here: Dagster, and how tables are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl
import pyarrow as pa

from pipelines import catalogue, orientation, schemas
from pipelines.config import Config
from pipelines.labels import calibration as cal
from pipelines.labels import drift
from pipelines.labels.margins import FOLDS
from pipelines.orientation import Outcome
from pipelines.tables import WHOLE, Manifest, Store, StoreError

_UNREADABLE = (OSError, pa.ArrowException, pl.exceptions.PolarsError)
"""What reading raises where a file is damaged."""
_TOLD = 5
"""Problems that a description names; it says how many more there are."""
MEANING = {
    "schema": "The file is the committed one; columns, order, types, nulls, values and ranges are as declared.",
    "no_nan": "No number is NaN.",
    "unique_key": "No key repeats within a partition.",
    "rows_accounted": "There is exactly one row for everything that needs one, and statuses add up.",
    "orientation_symmetry": "The two images of a pair can change places; scorers agree with people however these were shown.",
    "calibration_error": "Warns where a scorer's expected calibration error is above checks.calibration_error.",
    "excluded_pairs": "Warns where the share of excluded pairs is above checks.excluded_share.",
    "drift_accuracy": "Warns where a scorer's accuracy on the frozen sample moved by more than checks.accuracy_points.",
    "drift_consensus": "Warns where more of the sample's consensus labels changed than checks.consensus_share.",
}
"""What every check says of a table, in a sentence."""
_WARNINGS = ("calibration_error", "excluded_pairs", "drift_accuracy", "drift_consensus")


@dataclass(frozen=True)
class Finding:
    """What a check found: whether it passed, whether what follows must not be made if it did not, and the numbers."""

    name: str
    passed: bool
    blocking: bool
    description: str
    numbers: dict[str, float | int]


def names(table: str) -> list[tuple[str, bool]]:
    """Return (name, whether it is blocking) of every check of a table, in the order of `of_table`; reads nothing.

    Raises:
        KeyError: there is no such table.
    """
    return [(name, name not in _WARNINGS) for name in _checks(schemas.TABLES[table])]


def of_table(store: Store, config: Config, table: str, partitions: Sequence[str] | None = None) -> list[Finding]:
    """Return what every check of a table finds in these partitions (None: those that readers read, there or not).

    What cannot be checked, as it is damaged or lacks or is older than what it is compared with, has not passed.

    Raises:
        KeyError: there is no such table.
    """
    declared = schemas.TABLES[table]
    chosen = _read_by_readers(store, declared) if partitions is None else list(partitions)
    seen = _Seen(store, config, declared.of(s.name for s in config.scorers), chosen)
    findings = []
    for name, check in _checks(declared).items():
        if seen.shape_problems and check is not _schema:
            found = Outcome([f"{table} was not looked at, as its columns cannot be read: see check schema"])
        else:
            try:
                found = check(seen)
            # A table that does not go with another one (rows, NaN) is refused by the functions that are called.
            except (*_UNREADABLE, StoreError, ValueError) as error:
                found = Outcome([f"{table} cannot be checked: {error}"])
        described = _listed(found.problems) if found.problems else found.said
        findings.append(Finding(name, not found.problems, name not in _WARNINGS, described, dict(found.numbers)))
    return findings


class _Seen:
    """The partitions that are looked at; what several checks read is read once."""

    def __init__(self, store: Store, config: Config, table: schemas.Table, partitions: list[str]) -> None:
        self.store, self.config, self.table, self.partitions = store, config, table, partitions

    def scan(self, partition: str) -> pl.LazyFrame:
        return self.store.scan(self.table, partitions=[partition])

    def read(self, *columns: str) -> pl.DataFrame:
        """Return columns of all partitions."""
        return self.store.scan(self.table, partitions=self.partitions).select(columns).collect()

    @cached_property
    def manifests(self) -> dict[str, Manifest | None]:
        return {p: self.store.manifest(self.table.name, p) for p in self.partitions}

    @cached_property
    def committed(self) -> list[Manifest]:
        return [m for m in self.manifests.values() if m is not None]

    @cached_property
    def shard_keys(self) -> list[str]:
        return catalogue.shard_keys(self.store)

    @cached_property
    def shape_problems(self) -> list[str]:
        """What keeps the columns from being read as what they are declared to be."""
        declared, problems = self.table.polars_schema, []
        for partition, manifest in self.manifests.items():
            if manifest is None:
                problems.append(f"{partition}: there is no commit, or no file")
                continue
            try:
                found = self.scan(partition).collect_schema()
            except _UNREADABLE as error:
                problems.append(f"{partition}: not readable as parquet: {error}")
                continue
            if found.names() != list(declared):
                problems.append(f"{partition}: expected the columns {list(declared)}, found {found.names()}")
            problems += [
                f"{partition}: column {c}: expected {t}, found {found[c]}"
                for c, t in declared.items()
                if c in found and found[c] != t
            ]
        return problems

    @cached_property
    def broken_rules(self) -> dict[str, dict[tuple[str, str], int]]:
        """Partition -> (column, rule) -> rows that break it, of the rules that some row breaks."""
        rules = {(c.name, rule): count for c in self.table.columns for rule, count in _rules(c).items()}
        counts = [count.alias(str(i)) for i, count in enumerate(rules.values())]
        found = {}
        for partition in self.partitions:
            numbers = self.scan(partition).select(pl.len().alias("rows"), *counts).collect(engine="streaming").row(0)
            found[partition] = {rule: n for rule, n in zip(rules, numbers[1:], strict=True) if n}
        return found


# --- every table -----------------------------------------------------------------------------------------------------


def _rules(column: schemas.Column) -> dict[str, pl.Expr]:
    """Return rule -> how many rows break it; a binary column has none, as it is not read."""
    if column.dtype == pl.Binary:
        return {}
    value, rules = pl.col(column.name), {}
    if not column.nullable:
        rules["null, and none may be"] = value.null_count()
    if column.dtype in (pl.Float32, pl.Float64):
        rules[_NAN] = value.is_nan().sum()
        value = value.fill_nan(None)
    if column.values:
        rules[f"none of {list(column.values)}"] = (~value.is_in(list(column.values))).sum()
    if column.low is not None:
        rules[f"below {column.low}"] = (value < column.low).sum()
    if column.high is not None:
        rules[f"above {column.high}"] = (value > column.high).sum()
    return rules


_NAN = "NaN"


def _schema(seen: _Seen) -> Outcome:
    problems = [p for m in seen.committed for p in _other_file(seen, m)] + seen.shape_problems
    if not seen.shape_problems:
        problems += [
            f"{partition}: column {column}: {n} values are {rule}"
            for partition, broken in seen.broken_rules.items()
            for (column, rule), n in broken.items()
            if rule != _NAN
        ]
    rows, size = sum(m.rows for m in seen.committed), sum(m.bytes for m in seen.committed)
    said = f"{rows} rows in {len(seen.committed)} files have the declared columns, types and values"
    if skipped := [c.name for c in seen.table.columns if c.dtype == pl.Binary]:
        said += f"; not read: {', '.join(skipped)}"
    return Outcome(problems, said, {"rows": rows, "bytes": size, "partitions": len(seen.partitions)})


def _other_file(seen: _Seen, manifest: Manifest) -> list[str]:
    """Return in what a partition's file is another than the one that its manifest commits."""
    path, problems = seen.store.data_path(manifest.table, manifest.partition), []
    size = seen.store.filesystem.info(path)["size"]
    if size != manifest.bytes:
        problems.append(f"{manifest.partition}: the file has {size} bytes, its manifest says {manifest.bytes}")
    elif pl.Binary not in seen.table.polars_schema.values() and _sha256(seen.store, path) != manifest.content:
        problems.append(f"{manifest.partition}: the file's sha256 is another than its manifest says")
    try:
        with seen.store.open_parquet(seen.table, manifest.partition) as file:
            rows = file.metadata.num_rows
    except _UNREADABLE:
        # The columns could not be read either, which is a problem of its own.
        return problems
    if rows != manifest.rows:
        problems.append(f"{manifest.partition}: the file has {rows} rows, its manifest says {manifest.rows}")
    return problems


def _sha256(store: Store, path: str) -> str:
    with store.filesystem.open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _no_nan(seen: _Seen) -> Outcome:
    found = [
        (f"{partition}: column {column}: {n} values are NaN; an unknown number is null", n)
        for partition, broken in seen.broken_rules.items()
        for (column, rule), n in broken.items()
        if rule == _NAN
    ]
    return Outcome([text for text, _ in found], "no number is NaN", {"nan": sum(n for _, n in found)})


def _unique_key(seen: _Seen) -> Outcome:
    problems, rows, key = [], 0, list(seen.table.key)
    for partition in seen.partitions:
        keys = seen.scan(partition).select(key).collect()
        rows += len(keys)
        if repeated := len(keys) - keys.n_unique():
            problems.append(f"{partition}: {repeated} of {len(keys)} rows repeat the key {key} of another")
    return Outcome(problems, f"no two rows of a partition have the same {', '.join(key)}", {"rows": rows})


# --- rows accounted for ----------------------------------------------------------------------------------------------


def _rows_accounted(seen: _Seen) -> Outcome:
    found = Outcome([], "", {"rows": sum(m.rows for m in seen.committed)})
    if "status" in seen.table.polars_schema:
        found += _statuses(seen)
    return found + _ACCOUNTS[seen.table.name](seen) if seen.table.name in _ACCOUNTS else found


def _statuses(seen: _Seen) -> Outcome:
    problems, not_ok = [], 0
    for manifest in seen.committed:
        counts = seen.scan(manifest.partition).group_by("status").len().collect(engine="streaming")
        found = dict(counts.sort("status").iter_rows())
        not_ok += sum(n for status, n in found.items() if status != "ok")
        if found != manifest.rows_by_status or sum(manifest.rows_by_status.values()) != manifest.rows:
            said = f"its manifest says {manifest.rows_by_status} of {manifest.rows}"
            problems.append(f"{manifest.partition}: the rows' statuses are {found}, {said}")
    return Outcome(problems, "the manifests' statuses are those of the rows and add up", {"rows_not_ok": not_ok})


def _votes(seen: _Seen) -> Outcome:
    problems, rows_in = [], 0
    for manifest in seen.committed:
        out = seen.scan(manifest.partition).select(pl.col("source_row").n_unique()).collect().item()
        rows_in += manifest.extra["rows_in"]
        if out != manifest.extra["rows_in"]:
            problems.append(f"{manifest.partition}: the source has {manifest.extra['rows_in']} rows, {out} are here")
    return Outcome(problems, "every row of the sources has its votes", {"rows_in": rows_in})


def _scores(seen: _Seen) -> Outcome:
    columns = ["image_id", "prompt_id"]
    owners = {p: p.split("/")[-1] for p in seen.partitions}
    seen.store.require(schemas.CATALOGUE_SCORABLES.name)
    owned = seen.store.scan(schemas.CATALOGUE_SCORABLES).filter(pl.col("owner").is_in(list(set(owners.values()))))
    by_owner = owned.select(*columns, "owner").collect().partition_by("owner", as_dict=True, include_key=False)
    nothing = pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
    problems, wanted = [], 0
    for partition, owner in owners.items():
        expected = by_owner.get((owner,), nothing)
        wanted += len(expected)
        found = seen.scan(partition).select(columns).collect()
        problems += _other_rows(found, expected, partition, "(image, prompt) pairs that the shard owns")
    return Outcome(problems, "every (image, prompt) that a shard owns has one row", {"rows_expected": wanted})


def _pairs_of_votes(seen: _Seen) -> Outcome:
    votes = catalogue.resolved_votes(seen.store, seen.shard_keys).filter(pl.col("pair_id").is_not_null())
    people = pl.when(pl.col("status") == "ok").then(catalogue.PEOPLE).otherwise(0)
    expected = votes.group_by("pair_id").agg(people=people.sum()).collect()
    found = seen.read("pair_id", "n_votes")
    problems = _other_rows(found, expected, "all", "pairs that votes name")
    if (there := expected["people"].sum()) != (here := found["n_votes"].sum()):
        problems.append(f"all: n_votes adds up to {here}, the votes that count to {there}")
    return Outcome(problems, "every pair that a vote names has one row", {"rows_expected": len(expected)})


def _scorables(seen: _Seen) -> Outcome:
    store = seen.store
    pairs = store.scan(schemas.CATALOGUE_PAIRS)
    named = pl.concat(pairs.select("prompt_id", image_id=f"image_{i}_id") for i in (0, 1))
    held = store.scan(schemas.CATALOGUE_IMAGES).select("image_id")
    expected = named.unique().join(held, on="image_id", how="semi").select("image_id", "prompt_id").collect()
    problems = _other_rows(seen.read("image_id", "prompt_id"), expected, "all", "(image, prompt) pairs of the pairs")
    return Outcome(problems, "every image of a pair has one owner under its prompt", {"rows_expected": len(expected)})


def _pair_rows(seen: _Seen) -> Outcome:
    keys = [c for c in ("pair_id", "prompt_id", "image_0_id", "image_1_id") if c in seen.table.polars_schema]
    expected = catalogue.all_pairs(seen.store).select(keys).collect()
    problems = _other_rows(seen.read(*keys), expected, "all", "pairs of catalogue_pairs")
    return Outcome(problems, "every pair of the catalogue has one row", {"rows_expected": len(expected)})


def _vote_rows(seen: _Seen) -> Outcome:
    votes = catalogue.counted_votes(seen.store, seen.shard_keys).filter(pl.col("label_0") != 0.5)
    expected = votes.select("vote_id", "pair_id", "label_0", people=catalogue.PEOPLE).collect()
    problems = _other_rows(seen.read(*expected.columns), expected, "all", "decided votes that count")
    return Outcome(problems, "every decided vote that counts has one row", {"rows_expected": len(expected)})


def _people(seen: _Seen) -> Outcome:
    votes = catalogue.counted_votes(seen.store, seen.shard_keys)
    expected = votes.select(catalogue.PEOPLE.sum()).collect().item()
    found = seen.read("votes", "ties").sum().sum_horizontal().item()
    problems = [] if found == expected else [f"all: {found} people, {expected} are behind the votes that count"]
    return Outcome(problems, "everybody whose vote counts is in one row", {"people": expected})


def _folds(seen: _Seen) -> Outcome:
    found = seen.read("scorer", "fold")
    named = [s.name for s in seen.config.scorers] + [cal.ENSEMBLE]
    named += found["scorer"].filter(found["scorer"].str.starts_with(cal.GENERATOR)).unique().to_list()
    expected = pl.DataFrame({"scorer": named}).join(
        pl.DataFrame({"fold": pl.Series([cal.ALL, *range(FOLDS)], dtype=pl.Int8)}), how="cross"
    )
    problems = _other_rows(found, expected, "all", "scorers and folds")
    return Outcome(problems, "every scorer has one row per fold", {"rows_expected": len(expected)})


def _sums_of_statuses(seen: _Seen) -> Outcome:
    parts = ("votes_ok", "unlabelled", "unreadable", "duplicates", "other_rejected")
    rows = seen.read("source", "votes", *parts).with_columns(total=pl.sum_horizontal(parts))
    odd = rows.filter(pl.col("total") != pl.col("votes"))
    problems = [
        f"all: of {votes} votes of {source}, {total} have a status"
        for source, votes, total in odd.select("source", "votes", "total").iter_rows()
    ]
    return Outcome(problems, "the statuses of every source's votes add up")


def _subjects(seen: _Seen) -> Outcome:
    sample = seen.store.read(schemas.FROZEN_SAMPLE).select("pair_id")
    problems = []
    for manifest in seen.committed:
        subjects = pl.DataFrame({"subject": list(manifest.extra["revisions"])})
        expected = subjects.join(sample, how="cross") if len(sample) else sample.with_columns(subject=pl.lit(""))
        found = seen.scan(manifest.partition).select("subject", "pair_id").collect()
        problems += _other_rows(found, expected, manifest.partition, "subjects and pairs of the sample")
    return Outcome(problems, "every subject has one row per pair of the sample", {"pairs": len(sample)})


_ACCOUNTS: dict[str, Callable[[_Seen], Outcome]] = {
    "votes": _votes,
    "scores": _scores,
    "accounting": _sums_of_statuses,
    "catalogue_pairs": _pairs_of_votes,
    "catalogue_scorables": _scorables,
    **dict.fromkeys(("margins", "consensus", "smoothed", "preferences", "pair_groups"), _pair_rows),
    "minority": _vote_rows,
    "annotators": _people,
    "calibration": _folds,
    "frozen_labels": _subjects,
}
"""What the rows of a table are compared with, beside their statuses."""


def _other_rows(found: pl.DataFrame, expected: pl.DataFrame, partition: str, what: str) -> list[str]:
    """Return how two tables differ in their rows, whatever their order, by the columns that both have."""
    columns = [c for c in expected.columns if c in found.columns]
    found, expected = found.select(columns), expected.select(columns)
    if found.equals(expected):
        return []
    absent, more = (len(a.join(b, on=columns, how="anti")) for a, b in ((expected, found), (found, expected)))
    if not (absent or more or len(found) != len(expected)):
        return []
    return [
        f"{partition}: of {len(expected)} {what}, {absent} have no row; of {len(found)} rows, {more} are of none of them"
        + ("" if absent or more else ", and some are there more than once")
    ]


# --- orientation, and what only warns --------------------------------------------------------------------------------


def _orientation(seen: _Seen) -> Outcome:
    return orientation.check(seen.store, seen.config, seen.table.name)


def _calibration_error(seen: _Seen) -> Outcome:
    rows = seen.store.read(schemas.CALIBRATION).filter(pl.col("fold") == cal.ALL).drop_nulls("ece_calibrated")
    limit, errors = seen.config.checks.calibration_error, dict(rows.select("scorer", "ece_calibrated").iter_rows())
    return Outcome(
        [f"the calibration error of {s} is {e:.3f}, above {limit:g}" for s, e in errors.items() if e > limit],
        f"no calibration error is above {limit:g}" if errors else "no calibration error is known: there are no votes",
        {f"ece_{s}": e for s, e in errors.items()},
    )


def _excluded_pairs(seen: _Seen) -> Outcome:
    # The details behind the status are of one image each.
    reason = pl.col("excluded_because").str.extract(r"^image_\d ([^:]+)").alias("reason")
    counts = seen.store.scan(schemas.PREFERENCES).group_by(reason).len().collect().sort("len", descending=True)
    excluded, limit = counts.drop_nulls("reason"), seen.config.checks.excluded_share
    n, pairs = sum(excluded["len"]), sum(counts["len"])
    share = n / max(1, pairs)
    why = ", ".join(f"{count} {reason}" for reason, count in excluded.head(_TOLD).iter_rows()) or "none"
    text = f"{n} of {pairs} pairs ({share:.1%}) are excluded: {why}"
    problems = [f"{text}; the limit is {limit:.1%}"] if share > limit else []
    return Outcome(problems, text, {"excluded": n, "share_excluded": share})


def _latest_drift(seen: _Seen) -> pl.DataFrame:
    rows = seen.store.read(schemas.DRIFT)
    return rows.filter(pl.col("measurement") == pl.col("measurement").max())


def _drift_accuracy(seen: _Seen) -> Outcome:
    rows, limit = _latest_drift(seen).filter(pl.col("subject") != drift.CONSENSUS), seen.config.checks.accuracy_points
    moved = rows.drop_nulls("points")
    problems = [
        f"{subject}: {points:+.1f} points of accuracy on the frozen sample from revision {before} to {now}, above {limit:g}"
        for subject, points, before, now in moved.select("subject", "points", "revision_before", "revision").iter_rows()
        if abs(points) > limit
    ]
    numbers: dict[str, float | int] = {}
    for column in ("accuracy", "points"):
        known = rows.drop_nulls(column).select("subject", column)
        numbers |= {f"{column}_{subject}": value for subject, value in known.iter_rows()}
    gone, present = (
        max(rows.select(pairs).to_series().to_list(), default=0)
        for pairs in ("pairs_gone", pl.col("pairs") + pl.col("pairs_without_choice"))
    )
    if gone and not present:
        problems = [
            f"all {gone} pairs of the frozen sample left the store, so that nothing is measured; remove the folders "
            f"frozen_sample and frozen_labels of the store, and another one is drawn"
        ]
    said = f"no scorer's accuracy moved by more than {limit:g} points" if len(moved) else _NOTHING_BEFORE
    left = f"; {gone} pairs of the frozen sample left the store" if gone else ""
    return Outcome(problems, said + left, numbers | {"pairs": present, "pairs_gone": gone})


def _drift_consensus(seen: _Seen) -> Outcome:
    rows, limit = _latest_drift(seen).filter(pl.col("subject") == drift.CONSENSUS), seen.config.checks.consensus_share
    changed = rows.drop_nulls("share_changed").select("share_changed", "revision_before", "revision").rows()
    if not changed:
        return Outcome([], _NOTHING_BEFORE)
    share, before, now = changed[0]
    text = f"{share:.1%} of the frozen sample's consensus labels changed from revisions {before} to {now}"
    return Outcome([f"{text}, more than {limit:.1%}"] if share > limit else [], text, {"share_changed": share})


_NOTHING_BEFORE = "there is nothing to compare with yet"


# --- which checks a table has ----------------------------------------------------------------------------------------


def _checks(table: schemas.Table) -> dict[str, Callable[[_Seen], Outcome]]:
    """Return name -> check of a table, in the order in which they run."""
    found: dict[str, Callable[[_Seen], Outcome]] = {"schema": _schema}
    if any(c.dtype in (pl.Float32, pl.Float64) for c in table.columns):
        found["no_nan"] = _no_nan
    found["unique_key"] = _unique_key
    if table.name in _ACCOUNTS or any(c.name == "status" for c in table.columns):
        found["rows_accounted"] = _rows_accounted
    if table.name in orientation.TABLES:
        found["orientation_symmetry"] = _orientation
    return found | _OWN.get(table.name, {})


_OWN: dict[str, dict[str, Callable[[_Seen], Outcome]]] = {
    "calibration": {"calibration_error": _calibration_error},
    "preferences": {"excluded_pairs": _excluded_pairs},
    "drift": {"drift_accuracy": _drift_accuracy, "drift_consensus": _drift_consensus},
}


def _read_by_readers(store: Store, table: schemas.Table) -> list[str]:
    """Return the partitions that count: of shards in the catalogue and of active revisions; of others what is committed."""
    shards = store.catalogued_shards() or []
    if table.cut_by == "whole":
        return [WHOLE]
    if table.cut_by == "shard":
        return shards
    if table is schemas.SCORES:
        return [f"{s}/revision={r}/{shard}" for s, r in store.current_revisions().items() for shard in shards]
    return [m.partition for m in store.manifests(table.name)]


def _listed(told: list[str]) -> str:
    more = f"; and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
    return "; ".join(told[:_TOLD]) + more
