"""One asset per reward model over shard partitions; a run decodes every image once for the selected ones."""

from collections.abc import Iterator

import dagster as dg

from assets import metadata as meta
from assets.ingest import CATALOGUE_TABLES
from assets.partitions import EVERY_SHARD, SHARDS
from assets.resources import Polyphony
from pipelines import schemas
from pipelines.config import Config


def score_key(scorer: str) -> dg.AssetKey:
    """Return the asset key of a scorer's scores."""
    return dg.AssetKey(["scores", scorer])


def build_scores(config: Config) -> dg.AssetsDefinition:
    """Return the multi-asset of the configured scorers."""
    from pipelines.scoring import batches, checkpoints, workers

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
        name="scores", specs=specs, can_subset=True, partitions_def=SHARDS, backfill_policy=EVERY_SHARD, pool="gpu"
    )
    def scores(context: dg.AssetExecutionContext, polyphony: Polyphony) -> Iterator[dg.MaterializeResult]:
        present, store = polyphony.config, polyphony.store
        selected = [s for s in present.scorers if score_key(s.name) in context.selected_asset_keys]
        keys = context.partition_keys
        done: dict[str, list] = {s.name: [] for s in selected}
        failed: list[str] = []
        results = workers.score_shards(
            store,
            present,
            keys,
            selected,
            device=present.scoring.device,
            workers=present.scoring.workers,
            progress=context.log.info,
        )
        for i, (key, result) in enumerate(results, 1):
            if isinstance(result, Exception):
                # One unreadable file costs one shard; the others are finished and kept.
                failed.append(str(result))
                context.log.error(f"{i}/{len(keys)} {key}: {result}")
                continue
            for name, built in result.items():
                done[name].append(built)
                shard_metadata = meta.partition_metadata(store, schemas.SCORES, built)
                context.add_asset_metadata(shard_metadata, asset_key=score_key(name), partition_key=key)
            unchanged = all(b.is_reused for b in result.values())
            rows = sum(b.manifest.rows for b in result.values())
            context.log.info(f"{i}/{len(keys)} {key}: {rows} scores" + (", unchanged" if unchanged else ""))
        if failed:
            raise dg.Failure(f"{len(failed)} of {len(keys)} shards failed, the others are scored: " + "; ".join(failed))
        for scorer in selected:
            yield dg.MaterializeResult(
                asset_key=score_key(scorer.name), metadata=meta.of_builts(store, schemas.SCORES, done[scorer.name])
            )

    return scores
