"""Scores what a shard owns: every image is decoded once for all scorers, every prompt encoded once per scorer.

    read -> decode and prepare, in threads, at most AHEAD batches before the models -> one model after the other -> parts

Belongs here: the walk over a shard, statuses, resumption, activation of a revision. Does not belong here: a model's
mathematics (a module per kind), how a batch is run (`scorer`), several processes (`workers`).
"""

from __future__ import annotations

import json
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
from pipelines.scoring.parts import Parts
from pipelines.tables import Built, Store, StoreError

if TYPE_CHECKING:
    from pipelines.scoring.scorer import Scorer

CODE_VERSION = "3"
AHEAD = 2
"""Batches that are decoded before the models need them: what bounds memory."""
SECONDS_BETWEEN_MESSAGES = 10.0
Progress = Callable[[str], None]


def partition(scorer: str, revision: str, shard_key: str) -> str:
    """Return where a scorer's scores of a shard lie below `scores/`."""
    return f"{scorer}/revision={revision}/{shard_key}"


@dataclass(frozen=True)
class _Due:
    """A scorer whose scores of the shard are to be made: where they go, from what, and what is done already."""

    config: ScorerConfig
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
    built: dict[str, Built] = {}
    due: list[_Due] = []
    for scorer in scorers:
        revision = checkpoints.revision(scorer)
        where, mark = (
            partition(scorer.name, revision, shard_key),
            _mark(store, scorer, owned, image_manifest.content, revision),
        )
        existing = store.manifest("scores", where)
        # What could not be read then is tried again: the disk may have come back.
        is_whole = existing is not None and not existing.extra.get("images_lost")
        if existing is not None and is_whole and existing.fingerprint == mark:
            built[scorer.name] = Built(existing, True)
        else:
            parts = Parts(store, where, mark)
            due.append(_Due(scorer, where, mark, parts, parts.read()))

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

    started = time.monotonic()
    for of in (d for d in due if d.config.kind == "imported"):
        rows, facts = imported.score_owned(store, of.config, owned), imported.facts(of.config)
        if partition(of.config.name, facts["revision"], shard_key) != of.where:
            raise imported.ImportedScoresError(
                f"scorer {of.config.name!r}: {of.config.checkpoint}: changed while it was read; score again"
            )
        commit(of, rows, facts, started)
    if modelled := [d for d in due if d.config.kind != "imported"]:
        for of in modelled:
            if of.config.name not in models:
                progress(f"loading {of.config.name} ({of.config.kind}) on {device}")
                models[of.config.name] = load(of.config, device)
        _score(store, shard_key, owned, modelled, models, threads or cores(), part_seconds, progress, commit)
    return {s.name: built[s.name] for s in scorers}


def owned_pairs(store: Store, shard_keys: Sequence[str]) -> pl.LazyFrame:
    """Return the (image, prompt) pairs that the shards own: image_id, prompt_id, owner, prompt."""
    return (
        store.scan(schemas.CATALOGUE_SCORABLES)
        .filter(pl.col("owner").is_in(list(shard_keys)))
        .join(store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt"), on="prompt_id")
        .sort("image_id", "prompt_id")
    )


def _mark(store: Store, scorer: ScorerConfig, owned: pl.DataFrame, images_content: str, revision: str) -> str:
    # Only what this shard owns enters: a new shard elsewhere leaves these scores as they are.
    rows = owned.select("image_id", "prompt_id").rows()
    wanted = fingerprint(rows=rows, images=images_content)
    parts = {"code_version": CODE_VERSION, "version": schemas.SCORES.version, "rows": wanted, "revision": revision}
    if scorer.kind == "imported":
        # A file names images, and which image a name means is known over all shards.
        parts["names"] = [store.require(t).content for t in ("catalogue_names", "catalogue_images")]
    return fingerprint(**parts)


def unfinished(
    store: Store, scorer: ScorerConfig, revision: str, shard_key: str, owned: pl.DataFrame, images_content: str
) -> pl.DataFrame | None:
    """Return the pairs of a shard that a scorer has left, its parts counted as done; None if the shard is committed."""
    where, mark = partition(scorer.name, revision, shard_key), _mark(store, scorer, owned, images_content, revision)
    existing = store.manifest("scores", where)
    if existing is not None and existing.fingerprint == mark and not existing.extra.get("images_lost"):
        return None
    return owned.join(Parts(store, where, mark).read(), on=["image_id", "prompt_id"], how="anti")


def require_current(store: Store, config: Config, shard_keys: list[str]) -> None:
    """Refuse scores that were made for other images or another ownership than the present ones.

    Raises:
        StoreError: a shard's scores under the present revision of a scorer are missing or old; names shard and scorer.
    """
    by_owner = {key: part for (key,), part in owned_pairs(store, shard_keys).collect().group_by("owner")}
    nothing = pl.DataFrame(schema={"image_id": pl.String, "prompt_id": pl.String})
    contents = {m.partition: m.content for m in store.require_all("images", shard_keys)}
    for scorer in config.scorers:
        revision = checkpoints.revision(scorer)
        for key in shard_keys:
            content = contents[key]
            # group_by does not promise an order within a group.
            owned = by_owner.get(key, nothing).sort("image_id", "prompt_id")
            manifest = store.manifest("scores", partition(scorer.name, revision, key))
            if manifest is None or manifest.fingerprint != _mark(store, scorer, owned, content, revision):
                state = "missing" if manifest is None else "older than the shard or the catalogue"
                raise StoreError(
                    f"scores of {scorer.name} revision {revision}, shard {key}, are {state}; score it "
                    f"(`python -m pipelines score`, or materialize scores/{scorer.name})"
                )


def load(scorer: ScorerConfig, device: str) -> Scorer:
    """Load one scorer's model."""
    from pipelines.scoring import scorer as models

    return models.load(scorer, device)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Prepared:
    """A decoded picture as every model's input, or why there is none."""

    image: stored.StoredImage
    inputs: dict[str, Any]
    status: str
    reason: str | None


def _prepare_ahead(
    store: Store, shard_key: str, wanted: set[str], models: list[Scorer], chunk: int, threads: int
) -> Iterator[list[_Prepared]]:
    """Yield the wanted images of a shard in chunks, decoded once and prepared once per distinct preprocessing."""
    from pipelines.scoring.pictures import Picture

    preparers = {m.preprocessing: m.prepare for m in models}

    def prepare(row: stored.StoredImage) -> _Prepared:
        if row.data is None:
            return _Prepared(row, {}, row.status, row.reason)
        try:
            picture = Picture(images.decode(row.data), row.data)
            inputs = {key: how(picture) for key, how in preparers.items()}
        except images.UndecodableImage as error:
            return _Prepared(row, {}, "undecodable", str(error))
        # The encoded bytes are not needed any more, and a chunk of them is large.
        return _Prepared(stored.StoredImage(row.image_id, None, "ok", None), inputs, "ok", None)

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
    wanted = set().union(*left.values())
    active = [models[d.config.name] for d in due]
    frames = {d.config.name: [d.done] for d in due}
    seconds = dict.fromkeys(frames, 0.0)
    lost: set[str] = set()
    for model in active:
        before = time.monotonic()
        model.encode_all([p for prompts in left[model.name].values() for _, p in prompts])
        seconds[model.name] += time.monotonic() - before
    chunk = max((m.batch_size for m in active), default=1)
    done = 0
    for prepared in _prepare_ahead(store, shard_key, wanted, active, chunk, threads):
        lost.update(p.image.image_id for p in prepared if p.image.is_lost)
        for of, model in zip(due, active, strict=True):
            before = time.monotonic()
            rows = _rows(model, prepared, left[model.name])
            seconds[model.name] += time.monotonic() - before
            frames[model.name].append(rows)
            of.parts.add(rows.filter(~pl.col("image_id").is_in(list(lost))), part_seconds)
            for message in model.messages:
                progress(message)
            model.messages.clear()
        done += len(prepared)
        if time.monotonic() - last > SECONDS_BETWEEN_MESSAGES or done == len(wanted):
            last = time.monotonic()
            rate = done / max(last - started, 1e-9)
            progress(
                f"{shard_key}: {done}/{len(wanted)} images with {', '.join(m.name for m in active)}, "
                f"{rate:.1f} images/s, {(len(wanted) - done) / rate:.0f} s left"
            )
    for of, model in zip(due, active, strict=True):
        # How fast this model alone was, for estimates; what earlier runs had done is no part of it.
        scored = sum(len(prompts) for prompts in left[model.name].values())
        facts = {"images_lost": len(lost), "pairs_scored": scored, "model_seconds": round(seconds[model.name], 3)}
        commit(of, pl.concat(frames[model.name]), {**model.facts, **facts}, started)


def _prompts_of(pairs: pl.DataFrame) -> dict[str, list[tuple[str, str]]]:
    """Return image_id -> its (prompt_id, prompt)s."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for image_id, prompt_id, prompt in pairs.select("image_id", "prompt_id", "prompt").iter_rows():
        prompts.setdefault(image_id, []).append((prompt_id, prompt))
    return prompts


def _rows(model: Scorer, prepared: list[_Prepared], left: dict[str, list[tuple[str, str]]]) -> pl.DataFrame:
    """Return one model's rows of `scores` for a chunk of images."""
    good = [p for p in prepared if p.status == "ok" and p.image.image_id in left]
    pairs = [(i, *prompt) for i, p in enumerate(good) for prompt in left[p.image.image_id]]
    values = model.score_pairs([p.inputs[model.preprocessing] for p in good], [(i, text) for i, _, text in pairs])
    rows: list[tuple[str, str, float | None, str, str | None]] = [
        (good[i].image.image_id, prompt_id, float(value), "ok", None)
        for (i, prompt_id, _), value in zip(pairs, values, strict=True)
    ]
    rows += [
        (p.image.image_id, prompt_id, None, p.status, p.reason)
        for p in prepared
        if p.status != "ok"
        for prompt_id, _ in left.get(p.image.image_id, ())
    ]
    return pl.DataFrame(rows, schema=schemas.SCORES.polars_schema, orient="row")


def activate_finished(store: Store, config: Config, shard_keys: list[str]) -> tuple[dict[str, str], list[str]]:
    """Make the present revision of every scorer active whose shards are all scored.

    Returns scorer -> active revision, and why others are not: their earlier revision, if there is one, stays active.
    """
    before = store.current_revisions()
    revisions, pending = {}, []
    for scorer in config.scorers:
        try:
            require_current(store, config.model_copy(update={"scorers": (scorer,)}), shard_keys)
            revisions[scorer.name] = checkpoints.revision(scorer)
        except StoreError as error:
            pending.append(str(error))
            if scorer.name in before:
                revisions[scorer.name] = before[scorer.name]
    if revisions != before:
        store.publish("scores/current.json", json.dumps({"revisions": revisions}, indent=1).encode())
    return revisions, pending


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
