"""What lies in the store, what of it is older than its inputs, what failed last, and what to press.

Everything is compared as the steps themselves compare it: a line is current exactly where its step would find the table
unchanged. Commits are read in bulk; no image, score or model is read.
Belongs here: the state of data tables, scores that are due, labels whose inputs changed. Does not belong here: making any
of it, removing it (`retention`), models and samples (`trainers.status`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from pipelines import accounting, catalogue, ingest, schemas, steps
from pipelines.config import Config, ConfigError
from pipelines.files import services_as_oserror
from pipelines.scoring import batches, report
from pipelines.scoring.batches import ScorerState
from pipelines.sources import Shard, SourceError
from pipelines.tables import WHOLE, Failure, Manifest, Store, made_of

NAMED = 3
"""Partitions that are named one by one; of more, all are to be materialized: what is current is skipped."""
_INGEST, _SCORE, _LABEL = (f"python -m pipelines {what}" for what in ("ingest", "score", "label"))
_SHARD_TABLES = frozenset(t.name for t in ingest.TABLES)


@dataclass(frozen=True)
class Line:
    """The state of one table.

    asset: its key in Dagster, joined by '/'. expected: how many partitions it should have. done: those that are what would
    be made now. stale: committed, but made from something else. missing: not committed. failed: partition -> why the last
    attempt failed, of those that are not done. because: why it is not current, or what else should be known. press: what to
    do, '' where there is nothing to do.
    """

    table: str
    asset: str
    expected: int
    done: int
    stale: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    failed: Mapping[str, Failure] = field(default_factory=dict)
    because: str = ""
    press: str = ""

    @property
    def is_current(self) -> bool:
        """Return whether there is nothing to do."""
        return self.done == self.expected


def lines(store: Store, config: Config, shards: Sequence[Shard] | None = None) -> list[Line]:
    """Return the state of every data table, in the order in which they are made.

    Shards of a source that cannot be listed count as they lie in the store; the line of `raw_sources` says why it cannot.
    A scorer whose files are missing has a line that says so. `scorer_precision` has none: what it would be made from depends
    on the device.

    Args:
        shards: of all sources as they are now; None: they are listed.
    """
    seen = _Seen(store, config)
    sources = _Sources(store, config, shards)
    return [
        sources.line(),
        *_ingest_lines(seen, sources),
        *_catalogue_lines(seen, sources),
        _accounting_line(seen, sources),
        *_score_lines(seen, sources.keys),
        _active_line(seen),
        *_report_lines(seen),
        *_label_lines(seen),
    ]


def due_scores(store: Store, config: Config) -> dict[str, list[str]]:
    """Return scorer -> the shards whose scores under its present revision are missing or made from something else.

    Shards that are not catalogued, or were ingested again since, are not due: the catalogue says what they own. A scorer
    whose files are missing cannot score and is left out (`lines` says why).
    """
    seen = _Seen(store, config)
    keys = seen.scorable
    return {
        name: [k for k in keys if k not in state.current] for name, state in seen.scores.items() if not state.problem
    }


def inputs_current(store: Store, config: Config) -> dict[str, str | None]:
    """Return label table -> None if it is what would be made now, else one sentence: what is older than what, what to do."""
    old = _old_labels(_Seen(store, config))
    return {name: None if of is None else of.text for name, of in old.items()}


def main_text(store: Store, config: Config) -> str:
    """Return the state of all data tables for a terminal."""
    return text(lines(store, config))


# --- lines -----------------------------------------------------------------------------------------------------------


def line(
    table: str,
    asset: str,
    problems: Mapping[str, str | None],
    committed: Collection[str],
    command: str,
    *,
    failed: Mapping[str, Failure] | None = None,
    note: str = "",
) -> Line:
    """Return the line of a table.

    Args:
        table: its name in the store.
        asset: its key in Dagster, joined by '/'.
        problems: expected partition -> why it is not what would be made now; None: it is.
        committed: partitions that lie there, whatever they were made from.
        command: what makes it without Dagster.
        failed: see Line; of other partitions too.
        note: what should be known though the table is current.
    """
    left = {p: why for p, why in problems.items() if why is not None}
    # Reasons of what lies there say more than that the rest is missing.
    reasons = dict.fromkeys(why for p, why in sorted(left.items(), key=lambda item: item[0] not in committed))
    told = [*list(reasons)[:NAMED], *([f"{len(reasons) - NAMED} other reasons"] if len(reasons) > NAMED else [])]
    return Line(
        table=table,
        asset=asset,
        expected=len(problems),
        done=len(problems) - len(left),
        stale=tuple(p for p in left if p in committed),
        missing=tuple(p for p in left if p not in committed),
        failed={p: f for p, f in (failed or {}).items() if p in left},
        because="; ".join([*told, *([note] if note else [])]),
        press=f"materialize {asset}{_which(list(left), len(problems))} (`{command}`)" if left else "",
    )


def _which(left: list[str], expected: int) -> str:
    if left == [WHOLE]:
        return ""
    if len(left) == expected:
        return ", all partitions"
    if len(left) <= NAMED:
        return f", partition{'s' if len(left) > 1 else ''} {', '.join(left)}"
    return ", all partitions (what is current is skipped)"


def why_old(
    table: schemas.Table,
    manifest: Manifest | None,
    inputs: Mapping[str, str | None],
    code_version: str,
    parameters: Mapping[str, Any] | None,
) -> str | None:
    """Return why a partition is not what `Store.build` would make now; None: it is.

    Args:
        manifest: its commit, None where there is none.
        inputs: '<table>/<partition>' -> content of what it would be made from; None: that is not there.
        parameters: None: they cannot be known now, only inputs are compared.
    """
    if manifest is None:
        return "not made yet"
    names = inputs.keys() | manifest.inputs.keys()
    if changed := sorted(n for n in names if inputs.get(n) != manifest.inputs.get(n)):
        return f"older than {_told(changed)}"
    contents = {name: content for name, content in inputs.items() if content is not None}
    if parameters is None or manifest.fingerprint == made_of(table, contents, code_version, parameters):
        return None
    return "made under other options, of other shards or scorers, or by another version of the program"


def _told(names: Iterable[str]) -> str:
    """Return which tables these '<table>/<partition>' are of, as Dagster calls them."""
    assets: dict[str, int] = {}
    for name in names:
        parts = name.split("/")
        asset = "/".join(parts[:2]) if parts[0] == schemas.SCORES.name else parts[0]
        assets[asset] = assets.get(asset, 0) + 1
    return ", ".join(f"{asset} ({n} partitions)" if n > 1 else asset for asset, n in assets.items())


# --- what is compared ------------------------------------------------------------------------------------------------


class _Seen:
    """The commits of a store as they lay there when they were first asked for, each table read once."""

    def __init__(self, store: Store, config: Config) -> None:
        self.store, self.config = store, config
        self._commits: dict[tuple[str, str], dict[str, Manifest]] = {}

    def of(self, table: str, below: str = "") -> dict[str, Manifest]:
        """Return partition -> commit of a table, of those below a path."""
        key = (table, below)
        if key not in self._commits:
            self._commits[key] = {m.partition: m for m in self.store.manifests(table, below)}
        return self._commits[key]

    def contents(self, table: str, partitions: Iterable[str] = (WHOLE,)) -> dict[str, str | None]:
        """Return '<table>/<partition>' -> content, None where it is not committed."""
        found = self.of(table)
        return {f"{table}/{p}": found[p].content if p in found else None for p in partitions}

    @cached_property
    def catalogued(self) -> list[str]:
        """The shards that the catalogue was made of, in its order."""
        return self.store.catalogued_shards() or []

    @cached_property
    def scorable(self) -> list[str]:
        """The catalogued shards of which the catalogue has seen what is ingested now."""
        pairs = (("catalogue_images", "images"), ("catalogue_scorables", "votes"), ("catalogue_prompts", "prompts"))
        seen = [(of, self.of(name).get(WHOLE)) for name, of in pairs]

        def is_seen(key: str) -> bool:
            return all(
                m is not None and key in self.of(of) and m.inputs.get(f"{of}/{key}") == self.of(of)[key].content
                for of, m in seen
            )

        return [k for k in self.catalogued if is_seen(k)]

    @cached_property
    def scores(self) -> dict[str, ScorerState]:
        """What lies there of every scorer's scores of the scorable shards."""
        return batches.states(self.store, self.config.scorers, self.scorable)

    @cached_property
    def active(self) -> dict[str, str]:
        """Scorer -> active revision."""
        return self.store.current_revisions()

    def active_scores(self, scorer: str) -> dict[str, Manifest]:
        """Return shard -> commit of a scorer's active scores, whatever they were made from."""
        if scorer not in self.active:
            return {}
        state = self.scores.get(scorer)
        if state is not None and state.revision == self.active[scorer]:
            return state.commits
        below = batches.partition(scorer, self.active[scorer], "")
        return {p.removeprefix(below): m for p, m in self.of(schemas.SCORES.name, below).items()}

    def like(self, manifest: Manifest | None, keys: Sequence[str]) -> dict[str, str | None]:
        """Return the present contents of the tables that a commit names among its inputs, over these shards."""
        found: dict[str, str | None] = {}
        for table in dict.fromkeys(n.split("/")[0] for n in (manifest.inputs if manifest is not None else ())):
            found |= self.contents(table, keys if table in _SHARD_TABLES else (WHOLE,))
        return found


# --- sources and ingestion -------------------------------------------------------------------------------------------


class _Sources:
    """The shards of all sources as they are now, and what keeps a source from being looked at."""

    def __init__(self, store: Store, config: Config, shards: Sequence[Shard] | None) -> None:
        self.config = config
        self.problems: dict[str, str | None] = dict.fromkeys(s.name for s in config.sources)
        self.shards = self._listed() if shards is None else list(shards)
        self.plans: dict[str, ingest.Plan] = {}
        for source in config.sources:
            try:
                of_source = [s for s in self.shards if s.source == source.name]
                with services_as_oserror(source.location):
                    self.plans[source.name] = ingest.plan(source, of_source, config.images, config.limits)
            except (SourceError, OSError) as error:
                self.problems[source.name] = self.problems[source.name] or str(error)
        committed = store.manifests(schemas.VOTES.name) if self.unreadable else []
        blind = tuple(f"{name}." for name in self.unreadable)
        listed = [s.key for s in self.shards]
        self.unseen = [m.partition for m in committed if m.partition.startswith(blind) and m.partition not in listed]
        self.keys = [*listed, *self.unseen]

    def _listed(self) -> list[Shard]:
        try:
            return ingest.list_shards(self.config)
        except SourceError as error:
            whole = str(error)
        found: list[Shard] = []
        for source in self.config.sources:
            try:
                found += ingest.list_source(source)
            except SourceError as error:
                self.problems[source.name] = str(error)
        if not self.unreadable:
            # Not one source's problem: keys that repeat.
            self.problems = dict.fromkeys(self.problems, whole)
        return found

    @property
    def unreadable(self) -> list[str]:
        """Return the sources that cannot be looked at."""
        return [name for name, why in self.problems.items() if why is not None]

    def line(self) -> Line:
        """Return the line of the sources themselves: a partition of it is a source."""
        is_unwritten = self.config.world is not None and not (self.config.world_folder / "world.json").exists()
        found = line("raw_sources", "raw_sources", self.problems, (), "python -m pipelines world")
        if found.is_current or is_unwritten:
            return found
        press = f"make the source readable (see why), then materialize {found.asset}"
        return replace(found, press=press)

    def marks(self, shard: Shard) -> set[str] | str:
        """Return the fingerprints under which a shard counts as ingested, or why they cannot be known."""
        if shard.source not in self.plans:
            return self.problems[shard.source] or ""
        try:
            return ingest.present_marks(self.plans[shard.source], shard)
        except (SourceError, OSError) as error:
            return str(error)


def _ingest_lines(seen: _Seen, sources: _Sources) -> Iterable[Line]:
    # Recorded under the votes, with which a shard counts as ingested.
    failed = seen.store.failures(schemas.VOTES.name)
    marks = {shard.key: sources.marks(shard) for shard in sources.shards}
    now = time.time()
    failed |= {k: Failure(found, now, "") for k, found in marks.items() if isinstance(found, str)}
    for table in ingest.TABLES:
        problems = {k: _shard_problem(seen, table.name, k, marks.get(k)) for k in sources.keys}
        found = line(table.name, table.name, problems, seen.of(table.name), _INGEST, failed=failed)
        # Dagster knows a shard from then on.
        yield replace(found, press=f"materialize raw_sources, then {found.press}") if found.missing else found


def _shard_problem(seen: _Seen, table: str, key: str, marks: set[str] | str | None) -> str | None:
    """Return why a shard's table is not what ingestion would make now; marks: None where its source cannot be listed."""
    if isinstance(marks, str):
        return "a file cannot be read"
    if key not in seen.of(table):
        return "not ingested"
    prints = {m.fingerprint for t in ingest.TABLES if (m := seen.of(t.name).get(key)) is not None}
    if marks is None or (len(prints) == 1 and prints <= marks):
        return None
    # Of an interrupted ingestion some tables are what they should be, and are not to be called old.
    is_old = seen.of(table)[key].fingerprint not in marks or len(prints & marks) > 1
    return "its file changed, or it was ingested under other options" if is_old else None


# --- catalogue and accounting ----------------------------------------------------------------------------------------


def _catalogue_lines(seen: _Seen, sources: _Sources) -> Iterable[Line]:
    keys = seen.catalogued
    if not sources.unreadable:
        keys = [k for k in sources.keys if k in seen.of(schemas.VOTES.name)]
    for table in catalogue.TABLES:
        found = seen.of(table.name).get(WHOLE)
        parameters: dict[str, Any] = {"shards": keys}
        if table is schemas.CATALOGUE_PROMPTS:
            parameters["splits"] = seen.config.splits.model_dump()
        why = why_old(table, found, seen.like(found, keys), catalogue.CODE_VERSION, parameters)
        yield line(table.name, table.name, {WHOLE: why}, seen.of(table.name), _INGEST)


def _accounting_line(seen: _Seen, sources: _Sources) -> Line:
    table = schemas.ACCOUNTING
    found, keys = seen.of(table.name).get(WHOLE), set(sources.keys)
    layouts = {name: how.source.layout for name, how in sources.plans.items()}
    inputs = seen.like(found, [k for k in seen.catalogued if k in keys])
    why = why_old(table, found, inputs, accounting.CODE_VERSION, None if sources.unreadable else {"layouts": layouts})
    return line(table.name, table.name, {WHOLE: why}, seen.of(table.name), _INGEST)


# --- scores ----------------------------------------------------------------------------------------------------------


def _score_lines(seen: _Seen, keys: Sequence[str]) -> Iterable[Line]:
    recorded = seen.store.failures(schemas.SCORES.name)
    for name, state in seen.scores.items():
        below, active = batches.partition(name, state.revision, ""), seen.active_scores(name)
        problems = {k: _score_problem(seen, name, state, active, k) for k in keys}
        found = line(
            schemas.SCORES.name,
            f"scores/{name}",
            problems,
            {*state.commits, *active},
            f"{_SCORE} --scorers {name}",
            failed={p.removeprefix(below): f for p, f in recorded.items() if p.startswith(below)},
            note=_told_lost(state),
        )
        if state.problem:
            found = replace(found, press=f"make its files readable (see why), then {found.press}")
        yield found


def _score_problem(seen: _Seen, name: str, state: ScorerState, active: Collection[str], key: str) -> str | None:
    if state.problem:
        return state.problem
    if key in state.current:
        return None
    if key not in seen.scorable:
        return "not in the catalogue as it is ingested now: materialize the catalogue first"
    if key in state.stale:
        return "made for other images, or for another ownership in the catalogue"
    if key in active and seen.active[name] != state.revision:
        return f"of revision {seen.active[name]}, the present one is {state.revision}"
    return "not scored"


def _told_lost(state: ScorerState) -> str:
    if not state.lost:
        return ""
    some = ", ".join(list(state.lost)[:NAMED])
    return (
        f"{sum(state.lost.values())} images of {len(state.lost)} shards ({some}) could not be read; when they are back, "
        f"materialize these shards again"
    )


def _active_line(seen: _Seen) -> Line:
    problems: dict[str, str | None] = {}
    for name, state in seen.scores.items():
        is_active = seen.active.get(name) == state.revision
        now = f"the active revision of {name} is {seen.active.get(name, 'none')}"
        problems[name] = None if is_active else state.problem or f"{now}, the present one is {state.revision}"
    found = line("active_scores", "active_scores", problems, seen.active, _SCORE)
    # It has no partitions: all that are complete are switched at once.
    press = f"materialize active_scores when all shards are scored (`{_SCORE}`)" if found.press else ""
    return replace(found, press=press)


def _report_lines(seen: _Seen) -> Iterable[Line]:
    """Yield the lines of the scorer report, which is made from the active scores."""
    root, scorers = _root(seen), [s.name for s in seen.config.scorers]
    inputs = seen.contents(schemas.VOTES.name, seen.catalogued) | _active_contents(seen)
    for name in ("catalogue_votes", "catalogue_pairs", "catalogue_scorables"):
        inputs |= seen.contents(name)
    sampling = {"resamples": report.RESAMPLES, "seed": report.SEED, "bins": report.BINS}
    for table, more in ((schemas.SCORER_REPORT, sampling), (schemas.SCORER_CORRELATION, {})):
        found = seen.of(table.name).get(WHOLE)
        why = why_old(table, found, inputs, report.CODE_VERSION, {"scorers": scorers, **more})
        if root is not None and found is not None:
            why = root.cause
        yield line(table.name, table.name, {WHOLE: why}, seen.of(table.name), "python -m pipelines scorers")


def _active_contents(seen: _Seen) -> dict[str, str | None]:
    """Return '<table>/<partition>' -> content of the active scores of every scorer and catalogued shard."""
    found: dict[str, str | None] = {}
    for scorer in seen.config.scorers:
        commits = seen.active_scores(scorer.name)
        for key in seen.catalogued:
            where = batches.partition(scorer.name, seen.active.get(scorer.name, ""), key)
            found[f"{schemas.SCORES.name}/{where}"] = commits[key].content if key in commits else None
    return found


# --- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Old:
    """What is old, the root cause, and what to do about it."""

    what: str
    cause: str
    refresh: str

    @property
    def text(self) -> str:
        """Return the sentence."""
        return f"{self.what}{self.cause}; {self.refresh}"


def _root(seen: _Seen) -> _Old | None:
    """Return the first thing upstream of all labels that is not current: the catalogue, then scores, then the active ones."""
    for table in catalogue.TABLES:
        found = seen.of(table.name).get(WHOLE)
        inputs = seen.like(found, seen.catalogued)
        why = why_old(table, found, inputs, catalogue.CODE_VERSION, None)
        if why is not None:
            return _Old(
                "", f"{table.name} is {why}", f"materialize {table.name} (`{_INGEST}`), then scores (`{_SCORE}`)"
            )
    left = {n: [k for k in seen.catalogued if k not in s.current] for n, s in seen.scores.items()}
    if due := {n: keys for n, keys in left.items() if keys}:
        problem = next((seen.scores[n].problem for n in due if seen.scores[n].problem), "")
        told = ", ".join(f"scores/{n} ({len(keys)} of {len(seen.catalogued)} shards)" for n, keys in due.items())
        assets = ", ".join(f"scores/{n}" for n in due)
        return _Old(
            "",
            problem or f"{told} are missing under the present revision or made from something else",
            f"materialize {assets}, then active_scores (`{_SCORE}`)",
        )
    if other := [n for n, s in seen.scores.items() if seen.active.get(n) != s.revision]:
        told = ", ".join(other)
        why = f"the present revision of {told} is not the active one"
        return _Old("", why, f"materialize active_scores (`{_SCORE}`)")
    return None


class _Options(steps.Labels):
    """The label steps over scores as they lie there, asked for nothing but the options that their tables depend on."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__(seen.store, seen.config, seen.catalogued)
        catalogued = set(seen.catalogued)
        self._scored = {
            s.name: [m for k, m in seen.active_scores(s.name).items() if k in catalogued] for s in seen.config.scorers
        }

    def of(self, name: str) -> dict[str, Any]:
        """Return the options and constants of a label table.

        Raises:
            ConfigError: labels.groups_file cannot be read.
        """
        return self._parameters(name)


def _label_inputs(seen: _Seen, name: str) -> dict[str, str | None]:
    """Return '<table>/<partition>' -> content of all that a label table would be made from."""
    found = seen.contents(schemas.VOTES.name, seen.catalogued)
    for table in ("catalogue_votes", "catalogue_pairs", *steps.LABEL_TABLES[name]):
        found |= seen.contents(table)
    if name in ("margins", "preferences"):
        found |= _active_contents(seen)
    if name == "preferences":
        found |= seen.contents("catalogue_prompts") | seen.contents(schemas.IMAGES.name, seen.catalogued)
    return found


def _old_labels(seen: _Seen) -> dict[str, _Old | None]:
    """Return label table -> what is older than what and what to do; None: it is what would be made now."""
    root, options = _root(seen), _Options(seen)
    causes: dict[str, str] = {}
    old: dict[str, _Old | None] = dict.fromkeys(steps.LABEL_TABLES)
    for name, needed in steps.LABEL_TABLES.items():
        what = f"{name} is {'old' if WHOLE in seen.of(name) else 'not made yet'}: "
        if root is not None:
            old[name] = _Old(what, root.cause, f"{root.refresh}, then the labels (`{_LABEL}`)")
            continue
        first = next((t for t in needed if t in causes), None)
        cause = causes[first] if first is not None else _cause(seen, options, name)
        if cause is not None:
            causes[name] = cause
            path = ", then ".join([*_old_before(name, causes), name])
            old[name] = _Old("" if first is None else what, cause, f"materialize {path} (`{_LABEL}`)")
    return old


def _cause(seen: _Seen, options: _Options, name: str) -> str | None:
    """Return what is wrong with a label table itself, its inputs as they lie there; None: nothing."""
    try:
        parameters = options.of(name)
    except ConfigError as error:
        return f"{name} cannot be made: {error}"
    found = seen.of(name).get(WHOLE)
    why = why_old(schemas.TABLES[name], found, _label_inputs(seen, name), steps.CODE_VERSION, parameters)
    return None if why is None else f"{name} is {why}"


def _old_before(name: str, causes: Mapping[str, str]) -> list[str]:
    """Return the label tables that a label table is made from, directly or not, and that are not current."""
    before: set[str] = set()
    for needed in steps.LABEL_TABLES[name]:
        before |= {needed, *_old_before(needed, causes)}
    return [t for t in steps.LABEL_TABLES if t in before and t in causes]


def _label_lines(seen: _Seen) -> Iterable[Line]:
    found = _old_labels(seen)
    for name, old in found.items():
        # What to do before stands in the lines above.
        yield line(name, name, {WHOLE: None if old is None else old.cause}, seen.of(name), _LABEL)
    yield _drift_line(seen, found["consensus"])


def _drift_line(seen: _Seen, old: _Old | None) -> Line:
    """Return the line of drift: current where its latest measurement is of the present margins and consensus.

    old: what is old of consensus.
    """
    table, measured = schemas.FROZEN_LABELS, seen.of(schemas.FROZEN_LABELS.name)
    latest = max(measured.values(), key=lambda m: int(m.extra["measurement"]), default=None)
    inputs = seen.contents("frozen_sample") | seen.contents("margins") | seen.contents("consensus")
    why = old.cause if old is not None and latest is not None else why_old(table, latest, inputs, "", None)
    made = seen.of(schemas.DRIFT.name)
    if why is None and WHOLE not in made:
        why = "not made yet"
    return line(schemas.DRIFT.name, schemas.DRIFT.name, {WHOLE: why}, made, _LABEL)


# --- for people ------------------------------------------------------------------------------------------------------

_HEAD = ("table", "done", "stale", "missing", "failed", "what to press, from top to bottom")


def _cells(of: Line) -> tuple[str, ...]:
    numbers = (len(part) for part in (of.stale, of.missing, of.failed))
    return (of.asset, f"{of.done}/{of.expected}", *(str(n) if n else "" for n in numbers), of.press)


def _notes(found: Sequence[Line]) -> list[str]:
    """Return why lines are not current and what failed, each once for all tables of which it is true."""
    told: dict[str, list[str]] = {}
    for one in found:
        if one.because:
            told.setdefault(one.because, []).append(one.asset)
        for partition, failure in list(one.failed.items())[:NAMED]:
            when = datetime.fromtimestamp(failure.at).isoformat(" ", "minutes")
            told.setdefault(f"{partition} failed ({when}): {failure.message}", []).append(one.asset)
        if len(one.failed) > NAMED:
            told.setdefault(f"{len(one.failed) - NAMED} other partitions failed", []).append(one.asset)
    return [f"{', '.join(assets)}: {note}" for note, assets in told.items()]


def text(found: Sequence[Line]) -> str:
    """Return lines as an aligned table, with the reasons below it."""
    rows = [_HEAD, *map(_cells, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    told = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = _notes(found)
    return "\n".join([*told, *(["", *notes] if notes else [])])


def markdown(found: Sequence[Line]) -> str:
    """Return lines as a table in GitHub's Markdown, with the reasons below it."""
    rows = ["| " + " | ".join(map(_escaped, cells)) + " |" for cells in (_HEAD, *map(_cells, found))]
    rows.insert(1, "|---" * len(_HEAD) + "|")
    notes = [f"- {_escaped(note)}" for note in _notes(found)]
    return "\n".join([*rows, *(["", *notes] if notes else [])])


def _escaped(told: str) -> str:
    # A message may hold anything, and the UI takes angle brackets for HTML.
    return " ".join(told.replace("|", "\\|").replace("<", "&lt;").split())
