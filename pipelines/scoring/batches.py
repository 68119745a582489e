"""Scores what a shard owns: every image is decoded once for all scorers, every prompt encoded once per scorer.

    read -> decode and prepare, in threads, at most AHEAD batches before the models -> one model after the other -> parts

Belongs here: the walk over a shard, statuses, resumption, activation of a revision. Does not belong here: a model's
mathematics (a module per kind), how a batch is run (`scorer`), several processes (`workers`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from pipelines import catalogue, images, schemas, stored
from pipelines.config import Config, ScorerConfig
from pipelines.identity import fingerprint
from pipelines.scoring import checkpoints, imported
from pipelines.scoring.checkpoints import CheckpointError, ScoringError
from pipelines.scoring.parts import Parts
from pipelines.tables import Built, Manifest, Store, StoreError

if TYPE_CHECKING:
    from pipelines.scoring.scorer import Scorer

CODE_VERSION = "3"
AHEAD = 2
"""Batches that are decoded before the models need them: what bounds memory."""
SECONDS_BETWEEN_MESSAGES = 10.0
_ABSENT = ("missing", "changed")
"""Statuses of images that may be lost: there at ingestion, and to be tried again. Some were missing at ingestion already."""
_LOOKED_AT = 64
_TRIES = 5
Progress = Callable[[str], None]


def partition(scorer: str, revision: str, shard_key: str) -> str:
    """Return where a scorer's scores of a shard lie below `scores/`."""
    return f"{scorer}/revision={revision}/{shard_key}"


@dataclass(frozen=True)
class _Due:
    """A scorer whose scores of the shard are to be made: where they go, from what, and what is done already."""

    config: ScorerConfig
    revision: str
    where: str
    mark: str
    parts: Parts
    done: pl.DataFrame


def score_shard(
    store: Store,
    shard_key: str,
    scorers: Sequence[ScorerConfig],
    *,
    device: str = "cpu",
    models: dict[str, Any] | None = None,
    threads: int = 0,
    part_seconds: float = 30.0,
    progress: Progress = lambda message: None,
) -> dict[str, Built]:
    """Score the (image, prompt) pairs that a shard owns with every given scorer; return what was built, by scorer.

    Args:
        models: keeps loaded models between shards; a model is loaded only if something is to be scored.
        threads: that decode; 0: one per core.
        part_seconds: a killed run loses at most about so much work; the next one continues behind it.

    Raises:
        hub.CheckpointError: a checkpoint is missing.
        imported.ImportedScoresError: a file of imported scores is not what it must be.
        sources.SourceError: a file that holds images is there but cannot be read now.
        tables.StoreError: the shard is not ingested or there is no catalogue.
    """
    models = {} if models is None else models
    catalogue.require_images_and_scorables(store, shard_key)
    image_manifest = store.require("images", shard_key)
    owned = owned_pairs(store, [shard_key]).collect()
    wanted = _wanted(owned, image_manifest.content)
    built: dict[str, Built] = {}
    due: list[_Due] = []
    for scorer in scorers:
        state = _state(store, scorer, shard_key, wanted)
        if isinstance(state, _Due):
            due.append(state)
        else:
            built[scorer.name] = Built(state, True)

    def commit(of: _Due, rows: pl.DataFrame, facts: dict[str, Any], started: float) -> None:
        if len(rows) != len(owned):
            raise RuntimeError(f"{shard_key}, {of.config.name}: {len(owned)} scores wanted, {len(rows)} accounted for")
        manifest = store.write(
            schemas.SCORES,
            rows.sort("image_id", "prompt_id"),
            partition=of.where,
            made_from=of.mark,
            inputs={f"images/{shard_key}": image_manifest.content},
            extra=facts,
            started=started,
        )
        of.parts.clear()
        built[of.config.name] = Built(manifest, False)

    try:
        started = time.monotonic()
        modelled: list[_Due] = []
        for of in due:
            if of.config.kind != "imported":
                modelled.append(of)
                continue
            rows, facts = imported.score_owned(store, of.config, owned), imported.facts(of.config)
            if facts["revision"] != of.revision:
                raise imported.ImportedScoresError(
                    f"scorer {of.config.name!r}: {of.config.checkpoint}: changed while it was read; score again"
                )
            commit(of, rows, facts, started)
        if modelled:
            if len(owned):
                for of in modelled:
                    _load(models, of, device, progress)
            _score(store, shard_key, owned, modelled, models, threads or cores(), part_seconds, progress, commit)
    except Exception as error:
        for of in due:
            if of.config.name not in built:
                store.record_failure(schemas.SCORES.name, of.where, str(error))
        raise
    return {s.name: built[s.name] for s in scorers}


def _load(models: dict[str, Any], of: _Due, device: str, progress: Progress) -> None:
    """Load a scorer's model unless it is there in the revision that is due."""
    kept = models.get(of.config.name)
    if kept is not None and kept.revision == of.revision:
        return
    # The old one first: two of them may not fit on the device.
    models.pop(of.config.name, None)
    del kept
    progress(f"loading {of.config.name} ({of.config.kind}) on {device}")
    model = load(of.config, device)
    if not model.revision == checkpoints.revision(of.config) == of.revision:
        raise CheckpointError(
            f"scorer {of.config.name!r}: its files changed while they were read; score again when they are written"
        )
    models[of.config.name] = model


def owned_pairs(store: Store, shard_keys: Sequence[str]) -> pl.LazyFrame:
    """Return the (image, prompt) pairs that the shards own: image_id, prompt_id, owner, prompt."""
    return (
        store.scan(schemas.CATALOGUE_SCORABLES)
        .filter(pl.col("owner").is_in(list(shard_keys)))
        .join(store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt"), on="prompt_id")
        .sort("image_id", "prompt_id")
    )


def _wanted(owned: pl.DataFrame, images_content: str) -> str:
    """Return the fingerprint of what a shard owns: a new shard elsewhere leaves it as it is."""
    # What `fingerprint(rows=owned.rows(), images=...)` is, ids being hexadecimal: a list for each of a million rows would
    # take longer than all label steps, and another fingerprint would score everything again.
    rows = owned.select(pl.format('["{}", "{}"]', "image_id", "prompt_id").str.join(", ")).item() or ""
    return hashlib.sha256(f'{{"images": "{images_content}", "rows": [{rows}]}}'.encode()).hexdigest()[:16]


def _mark(store: Store, scorer: ScorerConfig, wanted: str, revision: str) -> str:
    """Return the fingerprint of what a scorer's scores of a shard are made from; wanted: of _wanted."""
    return _mark_of(wanted, revision, _names(store, scorer))


def _names(store: Store, scorer: ScorerConfig) -> list[str] | None:
    """Return the content of what tells which image a name means; None for scorers that look at images."""
    # A file names images, and which image a name means is known over all shards.
    named = ("catalogue_names", "catalogue_images")
    return [store.require(t).content for t in named] if scorer.kind == "imported" else None


def _mark_of(wanted: str, revision: str, names: list[str] | None) -> str:
    parts: dict[str, Any] = {"code_version": CODE_VERSION, "version": schemas.SCORES.version}
    parts |= {"rows": wanted, "revision": revision}
    return fingerprint(**parts if names is None else {**parts, "names": names})


def _state(store: Store, scorer: ScorerConfig, shard_key: str, wanted: str) -> Manifest | _Due:
    """Return the commit of a scorer's scores of a shard if there is nothing to do, else what there is to do."""
    revision = checkpoints.revision(scorer)
    where = partition(scorer.name, revision, shard_key)
    mark = _mark(store, scorer, wanted, revision)
    parts = Parts(store, where, mark)
    existing = store.manifest("scores", where)
    if existing is None or existing.fingerprint != mark:
        return _Due(scorer, revision, where, mark, parts, parts.read())
    if not existing.extra.get("images_lost"):
        return existing
    # What could not be read then is tried again: the disk may have come back.
    rows = store.read(schemas.SCORES, where)
    is_absent = pl.col("status").is_in(_ABSENT)
    absent = set(rows.filter(is_absent)["image_id"])
    if not any(i.data is not None for some in stored.read_images(store, shard_key, absent, _LOOKED_AT) for i in some):
        return existing
    return _Due(scorer, revision, where, mark, parts, rows.filter(~is_absent))


def unfinished(
    store: Store, scorer: ScorerConfig, shard_key: str, owned: pl.DataFrame, images_content: str
) -> pl.DataFrame | None:
    """Return the pairs of a shard that a scorer has left, its parts counted as done; None if the shard is committed."""
    state = _state(store, scorer, shard_key, _wanted(owned, images_content))
    return owned.join(state.done, on=["image_id", "prompt_id"], how="anti") if isinstance(state, _Due) else None


@dataclass(frozen=True)
class ScorerState:
    """What lies there of a scorer's scores under its present revision, over some shards.

    revision: '' where the scorer's files are missing or unreadable; `problem` says why, and every shard is missing.
    commits: shard -> commit, of any shard. current: those whose scores are what would be made now. stale: shards whose scores
    were made for other images or another ownership.
    """

    revision: str
    problem: str
    commits: dict[str, Manifest]
    current: dict[str, Manifest]
    stale: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def lost(self) -> dict[str, int]:
        """Return shard -> images that could not be read; scoring it again tries these again."""
        return {k: n for k, m in self.current.items() if (n := m.extra.get("images_lost"))}


def states(store: Store, scorers: Sequence[ScorerConfig], shard_keys: Sequence[str]) -> dict[str, ScorerState]:
    """Return scorer -> what lies there of these shards; no image is read and no model loaded.

    Raises:
        StoreError: a shard is not ingested.
    """
    # Sorted as the catalogue writes it; the prompts' texts are not needed here.
    owned = store.scan(schemas.CATALOGUE_SCORABLES).filter(pl.col("owner").is_in(list(shard_keys))).collect()
    by_owner = {key: part for (key,), part in owned.partition_by("owner", as_dict=True, maintain_order=True).items()}
    nothing = pl.DataFrame(schema={"image_id": pl.String, "prompt_id": pl.String})
    wanted = {
        m.partition: _wanted(by_owner.get(m.partition, nothing), m.content)
        for m in store.require_all("images", shard_keys)
    }
    return {s.name: _scorer_state(store, s, wanted) for s in scorers}


def _scorer_state(store: Store, scorer: ScorerConfig, wanted: dict[str, str]) -> ScorerState:
    try:
        revision = checkpoints.revision(scorer)
    except (CheckpointError, imported.ImportedScoresError) as error:
        return ScorerState("", str(error), {}, {}, (), tuple(wanted))
    below = partition(scorer.name, revision, "")
    commits = {m.partition.removeprefix(below): m for m in store.manifests(schemas.SCORES.name, below)}
    made = [k for k in wanted if k in commits]
    names = _names(store, scorer) if made else None
    current = {k: commits[k] for k in made if commits[k].fingerprint == _mark_of(wanted[k], revision, names)}
    stale = tuple(k for k in made if k not in current)
    return ScorerState(revision, "", commits, current, stale, tuple(k for k in wanted if k not in commits))


def _incomplete(
    store: Store, scorers: Sequence[ScorerConfig], shard_keys: Sequence[str]
) -> dict[str, tuple[str, str | None]]:
    """Return scorer -> (its present revision, why that is not complete over these shards; None: it is).

    A scorer whose files are missing has no revision, ''.
    """
    found: dict[str, tuple[str, str | None]] = {}
    for name, state in states(store, scorers, shard_keys).items():
        left = next((k for k in shard_keys if k not in state.current), None)
        if state.problem or left is None:
            found[name] = (state.revision, state.problem or None)
            continue
        how = "missing" if left in state.missing else "older than the shard or the catalogue"
        why = (
            f"scores of {name} revision {state.revision}, shard {left}, are {how}; score it "
            f"(`python -m pipelines score`, or materialize scores/{name})"
        )
        found[name] = (state.revision, why)
    return found


def require_current(store: Store, config: Config, shard_keys: list[str]) -> None:
    """Refuse scores that were made for other images or another ownership than the present ones.

    Raises:
        StoreError: a shard's scores under the present revision of a scorer are missing or old; names shard and scorer.
    """
    for _, why in _incomplete(store, config.scorers, shard_keys).values():
        if why is not None:
            raise StoreError(why)


def require_active(store: Store, config: Config, shard_keys: list[str]) -> dict[str, str]:
    """Return scorer -> revision if the present revisions are complete, made for the present images, and active.

    Raises:
        StoreError: a shard's scores are missing or old, or another revision is the active one.
    """
    require_current(store, config, shard_keys)
    active = store.current_revisions()
    revisions = {s.name: checkpoints.revision(s) for s in config.scorers}
    for name, revision in revisions.items():
        if active.get(name) != revision:
            raise StoreError(
                f"{store.location}: the active revision of {name} is {active.get(name, 'none')}, the configuration's is "
                f"{revision}; make it the active one (`python -m pipelines score`, or materialize active_scores)"
            )
    return revisions


def load(scorer: ScorerConfig, device: str) -> Scorer:
    """Load one scorer's model."""
    from pipelines.scoring import scorer as models

    return models.load(scorer, device)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Prepared:
    """An image as the models' inputs, or why there is none: for all of them (status), or for one preprocessing (refused)."""

    image: stored.StoredImage
    status: str
    reason: str | None
    inputs: dict[str, Any]
    refused: dict[str, str]
    seconds: float = 0.0


def _prepare_ahead(
    store: Store, shard_key: str, wanted: set[str], models: list[Scorer], chunk: int, threads: int
) -> Iterator[list[_Prepared]]:
    """Yield the wanted images of a shard in chunks, decoded once and prepared once per distinct preprocessing."""
    from pipelines.scoring.pictures import Picture

    preparers = {m.preprocessing: m.prepare for m in models}

    def prepare(row: stored.StoredImage) -> _Prepared:
        if row.data is None:
            return _Prepared(row, row.status, row.reason, {}, {})
        started = time.perf_counter()
        # The encoded bytes are not needed any more behind this, and a chunk of them is large.
        bare = stored.StoredImage(row.image_id, None, "ok", None)
        try:
            picture = Picture(images.decode(row.data), row.data)
        except images.UndecodableImage as error:
            return _Prepared(bare, "undecodable", str(error), {}, {})
        inputs: dict[str, Any] = {}
        refused: dict[str, str] = {}
        for key, how in preparers.items():
            try:
                inputs[key] = how(picture)
            except images.UndecodableImage as error:
                refused[key] = str(error)
        return _Prepared(bare, "ok", None, inputs, refused, time.perf_counter() - started)

    with ThreadPoolExecutor(threads, "prepare") as pool:
        waiting: deque[list[Future[_Prepared]]] = deque()
        try:
            for rows in stored.read_images(store, shard_key, wanted, chunk):
                waiting.append([pool.submit(prepare, row) for row in rows])
                if len(waiting) > AHEAD:
                    yield [f.result() for f in waiting.popleft()]
            while waiting:
                yield [f.result() for f in waiting.popleft()]
        finally:
            for future in (f for futures in waiting for f in futures):
                future.cancel()


def _score(
    store: Store,
    shard_key: str,
    owned: pl.DataFrame,
    due: list[_Due],
    models: dict[str, Scorer],
    threads: int,
    part_seconds: float,
    progress: Progress,
    commit: Callable[[_Due, pl.DataFrame, dict[str, Any], float], None],
) -> None:
    """Score with every due model what earlier runs have not; commit the scorers' tables at the end."""
    started = last = time.monotonic()
    left = {d.config.name: _prompts_of(owned.join(d.done, on=["image_id", "prompt_id"], how="anti")) for d in due}
    wanted: set[str] = set().union(*left.values())
    frames = {d.config.name: [d.done] for d in due}
    seconds = dict.fromkeys(frames, 0.0)
    lost: set[str] = set()
    done, preparing = 0, 0.0
    active = [(d, models[d.config.name]) for d in due if left[d.config.name]]
    for of, model in active:
        before = time.monotonic()
        model.encode_all([p for prompts in left[of.config.name].values() for _, p in prompts])
        seconds[of.config.name] += time.monotonic() - before
    chunk = max((model.batch_size for _, model in active), default=1)
    scorers = [model for _, model in active]
    for prepared in _prepare_ahead(store, shard_key, wanted, scorers, chunk, threads) if active else ():
        lost.update(p.image.image_id for p in prepared if p.image.is_lost)
        preparing += sum(p.seconds for p in prepared)
        for of, model in active:
            name, before = of.config.name, time.monotonic()
            rows = _rows(model, prepared, left[name])
            seconds[name] += time.monotonic() - before
            frames[name].append(rows)
            of.parts.add(rows.filter(~pl.col("image_id").is_in(list(lost))) if lost else rows, part_seconds)
            for message in model.messages:
                progress(message)
            model.messages.clear()
        done += len(prepared)
        if time.monotonic() - last > SECONDS_BETWEEN_MESSAGES or done == len(wanted):
            last = time.monotonic()
            rate = done / max(last - started, 1e-9)
            progress(
                f"{shard_key}: {done}/{len(wanted)} images with {', '.join(m.name for m in scorers)}, "
                f"{rate:.1f} images/s, {(len(wanted) - done) / rate:.0f} s left"
            )
    for of in due:
        name = of.config.name
        rows = pl.concat(frames[name])
        facts: dict[str, Any] = {} if name not in models else models[name].facts
        # How fast this model alone and the preparing threads were, for forecasts; earlier runs' work is no part of it.
        facts |= {
            "revision": of.revision,
            "images_lost": len(lost & left[name].keys()),
            "pairs_scored": sum(map(len, left[name].values())),
            "model_seconds": round(seconds[name], 3),
            "images_prepared": done - len(lost),
            "preparing_seconds": round(preparing, 3),
        }
        commit(of, rows, facts, started)


def _prompts_of(pairs: pl.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """Return image_id -> its (prompt_id, prompt)s."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for image_id, prompt_id, prompt in pairs.select("image_id", "prompt_id", "prompt").iter_rows():
        prompts.setdefault(image_id, []).append((prompt_id, prompt))
    return prompts


def _rows(model: Scorer, prepared: list[_Prepared], left: dict[str, list[tuple[str, str]]]) -> pl.DataFrame:
    """Return one model's rows of `scores` for a chunk of images.

    Raises:
        ScoringError: the model gave something that is no number.
    """
    mine = [p for p in prepared if p.image.image_id in left]
    key = model.preprocessing
    good = [p for p in mine if key in p.inputs]
    pairs = [(i, *prompt) for i, p in enumerate(good) for prompt in left[p.image.image_id]]
    values = model.score_pairs([p.inputs[key] for p in good], [(i, text) for i, _, text in pairs])
    rows: list[tuple[str, str, float | None, str, str | None]] = []
    for (i, prompt_id, prompt), value in zip(pairs, values, strict=True):
        if not math.isfinite(value):
            raise ScoringError(
                f"scorer {model.name!r} ({model.config.precision} on {model.device}): the score of image "
                f"{good[i].image.image_id} with the prompt {prompt[:200]!r} is {value}; broken weights give such scores, "
                f"or a number too large for the precision"
            )
        rows.append((good[i].image.image_id, prompt_id, float(value), "ok", None))
    for p in mine:
        if key not in p.inputs:
            status, reason = (p.status, p.reason) if p.status != "ok" else ("unscorable", p.refused[key])
            rows += [(p.image.image_id, prompt_id, None, status, reason) for prompt_id, _ in left[p.image.image_id]]
    return pl.DataFrame(rows, schema=schemas.SCORES.polars_schema, orient="row")


def activate_finished(
    store: Store, config: Config, shard_keys: list[str], scorers: Sequence[ScorerConfig] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Make the present revision of every scorer (of these) active whose shards are all scored.

    Returns scorer -> active revision, of all scorers that have one, and why others of these are not complete: their
    earlier revision, if there is one, stays active.
    """
    found = _incomplete(store, config.scorers if scorers is None else scorers, shard_keys)
    complete = {name: revision for name, (revision, why) in found.items() if why is None}
    for name, revision in complete.items():
        # Leftovers of a run that was killed between its commit and its end.
        store.remove(f"_parts/scores/{partition(name, revision, '')}".rstrip("/"))
    for _ in range(_TRIES):
        # Read again after the checks, which take time: another run may have activated another scorer meanwhile.
        now = store.current_revisions()
        if complete.items() <= now.items():
            break
        store.publish("scores/current.json", json.dumps({"revisions": {**now, **complete}}, indent=1).encode())
    return store.current_revisions(), [why for _, why in found.values() if why is not None]


def activate(store: Store, config: Config, shard_keys: list[str]) -> dict[str, str]:
    """Make the present revisions the active ones; return scorer -> revision.

    Raises:
        StoreError: a shard's scores are missing or old; the scorers that are complete are active nevertheless.
    """
    revisions, pending = activate_finished(store, config, shard_keys)
    if pending:
        raise StoreError("; ".join(pending))
    return revisions


def current_scores(store: Store, scorers: list[str], shard_keys: list[str]) -> pl.LazyFrame:
    """Return the active revisions' scores: scorer, image_id, prompt_id, score, status, reason.

    Raises:
        StoreError: a scorer has no active revision.
    """
    current = store.current_revisions()
    if missing := [s for s in scorers if s not in current]:
        raise StoreError(f"{store.location}: no active scores of {missing}; score all shards first")
    return pl.concat(
        store.scan(schemas.SCORES, partitions=[partition(s, current[s], k) for k in shard_keys]).select(
            pl.lit(s).alias("scorer"), "image_id", "prompt_id", "score", "status", "reason"
        )
        for s in scorers
    )
