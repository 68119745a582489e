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
    from pipelines.scoring import batches, devices

    specs = [
        dg.AssetSpec(
            score_key(s.name),
            deps=["images", *(t.name for t in CATALOGUE_TABLES)],
            group_name="scores",
            kinds={"torch", "parquet"},
            description=f"{s.kind} scores of every (image, prompt), by {s.checkpoint.rsplit('/', 1)[-1]}.",
            code_version=batches.CODE_VERSION,
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
        device = devices.resolve_device(present.scoring.device)
        models: dict = {}
        done: dict[str, list] = {s.name: [] for s in selected}
        keys = context.partition_keys
        for i, key in enumerate(keys):
            built = batches.score_shard(store, key, selected, device=device, models=models)
            for name, result in built.items():
                done[name].append(result)
                shard_metadata = meta.partition_metadata(store, schemas.SCORES, result)
                context.add_asset_metadata(shard_metadata, asset_key=score_key(name), partition_key=key)
            unchanged = all(b.is_reused for b in built.values())
            rows = sum(b.manifest.rows for b in built.values())
            context.log.info(f"{i + 1}/{len(keys)} {key}: {rows} scores" + (", unchanged" if unchanged else ""))
        for scorer in selected:
            yield dg.MaterializeResult(
                asset_key=score_key(scorer.name), metadata=meta.of_builts(store, schemas.SCORES, done[scorer.name])
            )

    return scores
