"""Caches per backbone: latents by shard, prompt embeddings."""

import dagster as dg

from assets import metadata as meta
from assets.partitions import EVERY_SHARD, SHARDS
from assets.resources import Polyphony
from pipelines import schemas


@dg.asset(
    deps=["images", "catalogue_images"],
    group_name="caches",
    kinds={"torch", "parquet"},
    partitions_def=SHARDS,
    backfill_policy=EVERY_SHARD,
    pool="gpu",
    metadata=meta.spec_metadata(schemas.LATENTS),
)
def latents(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
    """Every image a shard owns, encoded by the backbone's autoencoder."""
    from trainers.steps import Training

    store = polyphony.store
    training = Training(store, polyphony.config, lambda message: None)
    done = []
    for i, key in enumerate(context.partition_keys):
        done.append(training.latents(key))
        shard_metadata = meta.partition_metadata(store, schemas.LATENTS, done[-1])
        context.add_asset_metadata(shard_metadata, asset_key="latents", partition_key=key)
        unchanged = ", unchanged" if done[-1].is_reused else ""
        context.log.info(f"{i + 1}/{len(context.partition_keys)} {key}: {done[-1].manifest.rows} latents{unchanged}")
    return dg.MaterializeResult(metadata=meta.of_builts(store, schemas.LATENTS, done))


@dg.asset(
    deps=["catalogue_prompts"],
    group_name="caches",
    kinds={"torch", "parquet"},
    pool="gpu",
    metadata=meta.spec_metadata(schemas.PROMPT_EMBEDDINGS),
)
def prompt_embeddings(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
    """Every prompt, and the empty one, encoded by the backbone's text encoder."""
    from trainers.steps import Training

    store = polyphony.store
    built = Training(store, polyphony.config, context.log.info).prompt_embeddings()
    return dg.MaterializeResult(metadata=meta.of_builts(store, schemas.PROMPT_EMBEDDINGS, [built]))
