"""One asset per reward model over shard partitions; a run decodes every image once for the selected ones.

Belongs here: what Dagster sees of scoring, which runs in a process of its own. Does not belong here: scoring.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dagster as dg

from assets import gpus
from assets import metadata as meta
from assets.ingest import CATALOGUE_TABLES
from assets.launchers import KILLED_IS_REPEATED, ProcessClient, launch_folder, only_kills_are_repeated, step_name
from assets.partitions import EVERY_SHARD, SHARDS
from assets.resources import Polyphony
from pipelines import catalogue, schemas
from pipelines.config import Config, ScorerConfig
from pipelines.scoring import batches, checkpoints
from pipelines.tables import Built, Store, StoreError

SECONDS_BETWEEN_OBSERVATIONS = 10.0
Done = dict[str, dict[str, Built]]
"""Scorer -> shard -> its scores."""


def score_key(scorer: str) -> dg.AssetKey:
    """Return the asset key of a scorer's scores."""
    return dg.AssetKey(["scores", scorer])


def build_scores(config: Config) -> dg.AssetsDefinition:
    """Return the multi-asset of the configured scorers."""
    specs = [
        dg.AssetSpec(
            score_key(s.name),
            deps=["images", *(t.name for t in CATALOGUE_TABLES)],
            group_name="scores",
            kinds={"torch", "parquet"},
            description=f"{s.kind} scores of every (image, prompt), by {(s.checkpoint or s.function).rsplit('/', 1)[-1]}.",
            code_version=f"{batches.CODE_VERSION}:{checkpoints.KINDS[s.kind].preprocessing}",
            metadata=meta.spec_metadata(schemas.SCORES),
        )
        for s in config.scorers
    ]

    @dg.multi_asset(
        name="scores",
        specs=specs,
        can_subset=True,
        partitions_def=SHARDS,
        backfill_policy=EVERY_SHARD,
        pool=gpus.pool(config.scoring.device, config.scoring.workers),
        retry_policy=KILLED_IS_REPEATED,
    )
    def scores(context: dg.AssetExecutionContext, polyphony: Polyphony) -> Iterator[dg.MaterializeResult]:
        with only_kills_are_repeated():
            present, store = polyphony.config, polyphony.store
            selected = [s for s in present.scorers if score_key(s.name) in context.selected_asset_keys]
            found = found_done(store, selected, context.partition_keys)
            try:
                score(context, present, selected, [k for k in context.partition_keys if not _is_in_all(k, found)])
            except dg.Failure:
                # One unreadable file, or a failing model, costs what is not scored; the rest is there and is shown.
                for name, shards in committed(store, selected, context.partition_keys, found).items():
                    for key, built in shards.items():
                        shard = meta.partition_metadata(store, schemas.SCORES, built)
                        context.log_event(dg.AssetMaterialization(score_key(name), metadata=shard, partition=key))
                raise
            for name, shards in committed(store, selected, context.partition_keys, found).items():
                if absent := [k for k in context.partition_keys if k not in shards]:
                    raise StoreError(f"scores of {name}: {absent} changed while they were scored; score them again")
                for key, built in shards.items():
                    shard = meta.partition_metadata(store, schemas.SCORES, built)
                    context.add_asset_metadata(shard, asset_key=score_key(name), partition_key=key)
                whole = meta.of_builts(store, schemas.SCORES, shards.values())
                yield dg.MaterializeResult(asset_key=score_key(name), metadata=whole)

    return scores


def found_done(store: Store, scorers: Sequence[ScorerConfig], keys: Sequence[str]) -> Done:
    """Return what is scored already, so that nothing is to be done; no model is loaded to see it.

    Raises:
        StoreError: a shard is not ingested, or the catalogue has not seen it.
    """
    for key in keys:
        catalogue.require_images_and_scorables(store, key)
    states = batches.states(store, scorers, keys)
    return {
        name: {k: Built(m, True) for k, m in state.current.items() if k not in state.lost}
        for name, state in states.items()
    }


def committed(store: Store, scorers: Sequence[ScorerConfig], keys: Sequence[str], before: Done) -> Done:
    """Return what is scored now; of it `before` lay there already."""
    states = batches.states(store, scorers, keys)
    return {
        name: {
            k: Built(m, k in before[name] and before[name][k].manifest.content == m.content)
            for k, m in state.current.items()
        }
        for name, state in states.items()
    }


def _is_in_all(key: str, done: Done) -> bool:
    return all(key in shards for shards in done.values())


def score(
    context: dg.AssetExecutionContext, config: Config, scorers: Sequence[ScorerConfig], keys: Sequence[str]
) -> None:
    """Score shards in a process of its own, if there are any, and show how it goes on."""
    total = len(context.partition_keys)
    if unchanged := total - len(keys):
        context.log.info(f"{unchanged} of {total} shards unchanged")
    if not keys:
        return
    folder = launch_folder(config, context.run.run_id)
    shards = folder / f"{step_name(context)}.shards"
    shards.write_text("".join(f"{key}\n" for key in keys))
    names = ",".join(s.name for s in scorers)
    ProcessClient().run(
        context=context,
        module="pipelines",
        arguments=["score", "--scorers", names, "--shards-file", str(shards.resolve()), "--no-activate"],
        config=config,
        log_file=folder / f"{step_name(context)}.log",
        on_message=_observer(context, [score_key(s.name) for s in scorers], len(keys)),
        device=config.scoring.device,
        processes=config.scoring.workers,
    )


def _observer(
    context: dg.AssetExecutionContext, asset_keys: Sequence[dg.AssetKey], total: int
) -> Callable[[dict[str, Any]], None]:
    """Return what takes the messages of `python -m pipelines score` and shows the speed on the assets' plots."""
    started = last = time.monotonic()
    done = failed = images = 0

    def observe(message: dict[str, Any]) -> None:
        nonlocal last, done, failed, images
        if "error" in message:
            failed += 1
            context.log.error(f"{message['shard']}: {message['error']}")
        else:
            done += 1
            images += max((s["images"] for s in message["scorers"].values() if not s["is_unchanged"]), default=0)
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_OBSERVATIONS or done + failed == total:
            last = now
            speed = {
                "shards_done": done,
                "shards_failed": failed,
                "images_per_second": images / max(now - started, 1e-9),
            }
            for key in asset_keys:
                context.log_event(dg.AssetObservation(key, metadata=dict(meta.numbers(speed))))

    return observe
