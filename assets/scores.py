"""One asset per reward model over shard partitions; a run decodes every image once for the selected ones.

Belongs here: what Dagster sees of scoring, which runs in a process of its own. Does not belong here: scoring.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dagster as dg

from assets import checks, forms, gpus
from assets import metadata as meta
from assets.ingest import CATALOGUE_TABLES
from assets.launchers import KILLED_IS_REPEATED, ProcessClient, launch_folder, only_kills_are_repeated, step_name
from assets.partitions import EVERY_SHARD, SHARDS
from assets.resources import Polyphony
from assets.specs import Specs, check_specs
from pipelines import catalogue, plots, schemas
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
    specs = Specs(config)

    @dg.multi_asset(
        name="scores",
        specs=[_spec(specs, s) for s in config.scorers],
        check_specs=[c for s in config.scorers for c in check_specs(score_key(s.name), schemas.SCORES)],
        can_subset=True,
        partitions_def=SHARDS,
        backfill_policy=EVERY_SHARD,
        pool=gpus.pool(config.scoring.device, config.scoring.workers),
        retry_policy=KILLED_IS_REPEATED,
    )
    def scores(
        context: dg.AssetExecutionContext, config: forms.ScoringOptions, polyphony: Polyphony
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        with only_kills_are_repeated():
            present, store = config.applied(polyphony.config), polyphony.store
            selected = [s for s in present.scorers if score_key(s.name) in context.selected_asset_keys]
            found = found_done(store, selected, context.partition_keys)
            chosen = forms.choose(context, config, lambda key: _is_in_all(key, found))
            if config.dry_run:
                # It finds out itself what is left, inside shards too.
                context.log.info(_forecast(context, present, selected, context.partition_keys))
                return
            due = [k for k in chosen.keys if not _is_in_all(k, found)]
            try:
                score(context, present, selected, chosen.keys, due)
            except dg.Failure:
                # One unreadable file, or a failing model, costs what is not scored; the rest is there and is shown.
                _tell_shards(
                    forms.ShardChoice(context, [], is_whole=False),
                    committed(store, selected, chosen.keys, found),
                    store,
                )
                raise
            done = committed(store, selected, chosen.keys, found)
            _tell_shards(chosen, done, store)
            for name, shards in done.items():
                if absent := [k for k in chosen.keys if k not in shards]:
                    raise StoreError(f"scores of {name}: {absent} changed while they were scored; score them again")
                yield from _results(context, chosen, store, present, name, list(shards.values()))

    return scores


def _spec(specs: Specs, scorer: ScorerConfig) -> dg.AssetSpec:
    weights = (scorer.checkpoint or scorer.function).rsplit("/", 1)[-1]
    return dg.AssetSpec(
        score_key(scorer.name),
        deps=["images", *(t.name for t in CATALOGUE_TABLES)],
        **specs.table(
            schemas.SCORES,
            "scores",
            kinds=("torch", "parquet"),
            code_version=f"{batches.CODE_VERSION}:{checkpoints.KINDS[scorer.kind].preprocessing}",
            description=f"{scorer.kind} scores of every (image, prompt), by {weights}.",
            device="gpu",
            tags={"polyphony/kind": scorer.kind},
        ),
    )


def _tell_shards(chosen: forms.ShardChoice, done: Done, store: Store) -> None:
    for name, shards in done.items():
        for key, built in shards.items():
            chosen.tell(score_key(name), key, meta.partition_metadata(store, schemas.SCORES, built))


def _results(
    context: dg.AssetExecutionContext,
    chosen: forms.ShardChoice,
    store: Store,
    config: Config,
    scorer: str,
    builts: list[Built],
) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
    """Yield a scorer's materialization, or of a part of the selected shards the checks alone."""
    key = score_key(scorer)
    found = [
        r
        for r in checks.results(store, config, key, schemas.SCORES, builts)
        if dg.AssetCheckKey(key, str(r.check_name)) in context.selected_asset_check_keys
    ]
    if not chosen.is_whole:
        yield from found
        return
    metadata = meta.of_builts(store, schemas.SCORES, builts)
    if checks.can_be_read(found):
        counts = plots.score_counts(store, [b.manifest.partition for b in builts])
        metadata["histogram"] = meta.picture(plots.score_histogram(counts, scorer), "scores by source")
    yield dg.MaterializeResult(asset_key=key, metadata=metadata, check_results=found)


def _forecast(
    context: dg.AssetExecutionContext, config: Config, scorers: Sequence[ScorerConfig], keys: Sequence[str]
) -> str:
    """Return what scoring these shards would take."""
    from pipelines.scoring import devices, forecast

    device = devices.resolve_device(config.scoring.device)
    places = devices.places(device, config.scoring.workers)
    threads = config.scoring.threads or max(1, batches.cores() // len(places))
    store = Store(config.store_location)
    # A scorer whose speed is not known is measured.
    with gpus.lease(device, progress=context.log.info) as lease:
        ahead = forecast.forecast(store, keys, scorers, device=lease.device, threads=threads, progress=context.log.info)
    return ahead.text(len(places))


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
    context: dg.AssetExecutionContext,
    config: Config,
    scorers: Sequence[ScorerConfig],
    chosen: Sequence[str],
    keys: Sequence[str],
) -> None:
    """Score those of the chosen shards that are due in a process of its own, if there are any, and show how it goes on."""
    if unchanged := len(chosen) - len(keys):
        context.log.info(f"{unchanged} of {len(chosen)} shards unchanged")
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
