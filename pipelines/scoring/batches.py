"""Scores what a shard owns: every image is decoded once for all scorers, every prompt encoded once per scorer.

Belongs here: the walk over a shard, statuses, activation of a revision. Does not belong here: a model's mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import polars as pl

from pipelines import catalogue, images, schemas, stored
from pipelines.config import Config, ScorerConfig
from pipelines.identity import fingerprint
from pipelines.scoring import checkpoints
from pipelines.tables import Built, Store, StoreError

CODE_VERSION = "2"
Progress = Callable[[str], None]


def partition(scorer: str, revision: str, shard_key: str) -> str:
    """Return where a scorer's scores of a shard lie below `scores/`."""
    return f"{scorer}/revision={revision}/{shard_key}"


def score_shard(
    store: Store,
    shard_key: str,
    scorers: list[ScorerConfig],
    *,
    device: str = "cpu",
    models: dict[str, Any] | None = None,
    progress: Progress = lambda message: None,
) -> dict[str, Built]:
    """Score the (image, prompt) pairs that a shard owns with every given scorer; return what was built, by scorer.

    `models` keeps loaded models between shards; a model is loaded only if something is to be scored.

    Raises:
        hub.CheckpointError: a checkpoint is missing.
        tables.StoreError: the shard is not ingested or there is no catalogue.
    """
    models = {} if models is None else models
    catalogue.require_images_and_scorables(store, shard_key)
    image_manifest = store.require("images", shard_key)
    owned = _owned(store, [shard_key]).collect()
    marks, built, due = {}, {}, []
    for scorer in scorers:
        revision = checkpoints.revision(scorer)
        where = partition(scorer.name, revision, shard_key)
        marks[scorer.name] = (where, _mark(owned, image_manifest.content, revision))
        existing = store.manifest("scores", where)
        # What could not be read then is tried again: the disk may have come back.
        is_whole = existing is not None and not existing.extra.get("images_lost")
        if existing is not None and is_whole and existing.fingerprint == marks[scorer.name][1]:
            built[scorer.name] = Built(existing, True)
        else:
            due.append(scorer)
    if not due:
        return built

    for scorer in due:
        if scorer.name not in models:
            models[scorer.name] = load(scorer, device)
    active = [models[s.name] for s in due]
    frames: dict[str, list[pl.DataFrame]] = {s.name: [] for s in due}
    done = 0
    lost: set[str] = set()
    for frame in _score(store, shard_key, owned, active, min(s.batch_size for s in due), lost):
        for name, part in frame.items():
            frames[name].append(part)
            done += len(part)
        progress(f"{shard_key}: {done}/{len(owned) * len(due)} scores")
    for model in active:
        where, mark = marks[model.name]
        table = pl.concat(frames[model.name]) if frames[model.name] else schemas.SCORES.empty()
        if len(table) != len(owned):
            raise RuntimeError(f"{shard_key}, {model.name}: {len(owned)} scores wanted, {len(table)} accounted for")
        manifest = store.write(
            schemas.SCORES,
            table.sort("image_id", "prompt_id"),
            partition=where,
            made_from=mark,
            inputs={f"images/{shard_key}": image_manifest.content},
            extra={**model.facts, "images_lost": len(lost)},
        )
        built[model.name] = Built(manifest, False)
    return built


def _owned(store: Store, shard_keys: list[str]) -> pl.LazyFrame:
    """Return the (image, prompt) pairs that the shards own: image_id, prompt_id, owner, prompt."""
    return (
        store.scan(schemas.CATALOGUE_SCORABLES)
        .filter(pl.col("owner").is_in(shard_keys))
        .join(store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt"), on="prompt_id")
        .sort("image_id", "prompt_id")
    )


def _mark(owned: pl.DataFrame, images_content: str, revision: str) -> str:
    # Only what this shard owns enters: a new shard elsewhere leaves these scores as they are.
    rows = owned.select("image_id", "prompt_id").rows()
    wanted = fingerprint(rows=rows, images=images_content)
    return fingerprint(code_version=CODE_VERSION, version=schemas.SCORES.version, rows=wanted, revision=revision)


def require_current(store: Store, config: Config, shard_keys: list[str]) -> None:
    """Refuse scores that were made for other images or another ownership than the present ones.

    Raises:
        StoreError: a shard's scores under the present revision of a scorer are missing or old; names shard and scorer.
    """
    by_owner = {key: part for (key,), part in _owned(store, shard_keys).collect().group_by("owner")}
    nothing = pl.DataFrame(schema={"image_id": pl.String, "prompt_id": pl.String})
    contents = {m.partition: m.content for m in store.require_all("images", shard_keys)}
    for scorer in config.scorers:
        revision = checkpoints.revision(scorer)
        for key in shard_keys:
            content = contents[key]
            # group_by does not promise an order within a group.
            owned = by_owner.get(key, nothing).sort("image_id", "prompt_id")
            manifest = store.manifest("scores", partition(scorer.name, revision, key))
            if manifest is None or manifest.fingerprint != _mark(owned, content, revision):
                state = "missing" if manifest is None else "older than the shard or the catalogue"
                raise StoreError(
                    f"scores of {scorer.name} revision {revision}, shard {key}, are {state}; score it "
                    f"(`python -m pipelines score`, or materialize scores/{scorer.name})"
                )


def load(scorer: ScorerConfig, device: str) -> Any:
    """Load one scorer's model."""
    from pipelines.scoring.clip import ClipScorer

    return ClipScorer(scorer, device)


def _score(
    store: Store, shard_key: str, owned: pl.DataFrame, models: list[Any], batch: int, lost: set[str]
) -> Iterator[dict[str, pl.DataFrame]]:
    """Yield, per batch of images, a frame of scores per model; add the images that cannot be read any more to `lost`."""
    import torch

    prompts: dict[str, list[tuple[str, str]]] = {}
    for image_id, prompt_id, prompt in owned.select("image_id", "prompt_id", "prompt").iter_rows():
        prompts.setdefault(image_id, []).append((prompt_id, prompt))
    preparers = {m.preprocessing: m.prepare for m in models}

    def decode(row: stored.StoredImage) -> tuple[dict[str, Any] | None, str, str | None]:
        if row.data is None:
            return None, row.status, row.reason
        try:
            image = images.decode_rgb(row.data)
        except images.UndecodableImage as error:
            return None, "undecodable", str(error)
        return {key: prepare(image) for key, prepare in preparers.items()}, "ok", None

    with ThreadPoolExecutor(2) as pool:
        for rows in stored.read_images(store, shard_key, prompts.keys(), batch):
            lost.update(r.image_id for r in rows if r.is_lost)
            decoded = list(pool.map(decode, rows))
            good = [(r.image_id, d[0]) for r, d in zip(rows, decoded, strict=True) if d[0] is not None]
            bad = [
                (r.image_id, prompt_id, None, status, reason)
                for r, (prepared, status, reason) in zip(rows, decoded, strict=True)
                if prepared is None
                for prompt_id, _ in prompts[r.image_id]
            ]
            pairs = [(i, image_id, *p) for i, (image_id, _) in enumerate(good) for p in prompts[image_id]]
            result = {}
            for model in models:
                scored = []
                if pairs:
                    tensors = torch.stack([d[model.preprocessing] for _, d in good])
                    for start in range(0, len(pairs), batch):
                        part = pairs[start : start + batch]
                        values = model.score(tensors[[p[0] for p in part]], [p[3] for p in part])
                        scored += [(p[1], p[2], float(v), "ok", None) for p, v in zip(part, values, strict=True)]
                result[model.name] = pl.DataFrame(scored + bad, schema=schemas.SCORES.polars_schema, orient="row")
            yield result


def activate(store: Store, config: Config, shard_keys: list[str]) -> dict[str, str]:
    """Make the present revisions the active ones if every shard is scored; return scorer -> revision.

    Raises:
        StoreError: a shard's scores are missing or old.
    """
    require_current(store, config, shard_keys)
    revisions = {s.name: checkpoints.revision(s) for s in config.scorers}
    if store.current_revisions() != revisions:
        import json

        store.publish("scores/current.json", json.dumps({"revisions": revisions}, indent=1).encode())
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
