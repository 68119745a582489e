"""Caches per backbone: latents by shard, prompt embeddings."""

import dagster as dg

from assets import checks
from assets import metadata as meta
from assets.gpus import POOL
from assets.partitions import EVERY_SHARD, SHARDS
from assets.resources import Polyphony
from assets.specs import Specs, check_specs
from pipelines import schemas
from pipelines.config import Config
from trainers import versions


def build_caches(config: Config) -> list[dg.AssetsDefinition]:
    """Return the caches that every recipe reads."""
    specs = Specs(config)
    return [_latents(specs), _prompt_embeddings(specs)]


def _latents(specs: Specs) -> dg.AssetsDefinition:
    table = schemas.LATENTS

    @dg.asset(
        deps=["images", "catalogue_images"],
        partitions_def=SHARDS,
        backfill_policy=EVERY_SHARD,
        pool=POOL,
        check_specs=check_specs("latents", table),
        **specs.table(table, "caches", kinds=("torch", "parquet"), code_version=versions.CACHES, device="gpu"),
    )
    def latents(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        """Every image a shard owns, encoded by the backbone's autoencoder."""
        from trainers.steps import Training

        store, done = polyphony.store, []
        with polyphony.on_device("training", context.log.info) as config:
            training = Training(store, config, lambda message: None)
            for i, key in enumerate(context.partition_keys):
                done.append(training.latents(key))
                shard_metadata = meta.partition_metadata(store, table, done[-1])
                context.add_asset_metadata(shard_metadata, asset_key="latents", partition_key=key)
                unchanged = ", unchanged" if done[-1].is_reused else ""
                context.log.info(
                    f"{i + 1}/{len(context.partition_keys)} {key}: {done[-1].manifest.rows} latents{unchanged}"
                )
        return dg.MaterializeResult(
            metadata=meta.of_builts(store, table, done),
            check_results=checks.results(store, config, "latents", table, done),
        )

    return latents


def _prompt_embeddings(specs: Specs) -> dg.AssetsDefinition:
    table = schemas.PROMPT_EMBEDDINGS

    @dg.asset(
        deps=["catalogue_prompts"],
        pool=POOL,
        check_specs=check_specs("prompt_embeddings", table),
        **specs.table(table, "caches", kinds=("torch", "parquet"), code_version=versions.CACHES, device="gpu"),
    )
    def prompt_embeddings(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        """Every prompt, and the empty one, encoded by the backbone's text encoder."""
        from trainers.steps import Training

        store = polyphony.store
        with polyphony.on_device("training", context.log.info) as config:
            built = Training(store, config, context.log.info).prompt_embeddings()
        return dg.MaterializeResult(
            metadata=meta.of_builts(store, table, [built]),
            check_results=checks.results(store, config, "prompt_embeddings", table, [built]),
        )

    return prompt_embeddings
