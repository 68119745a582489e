"""One asset per recipe, trained in a process of its own."""

from typing import Any

import dagster as dg

from assets import metadata as meta
from assets.launchers import run_module
from assets.resources import Polyphony
from pipelines import schemas
from pipelines.config import CONFIG_VARIABLE, Config
from trainers.recipes import Recipe
from trainers.recipes import recipe as recipe_of

OBSERVE_EVERY_STEPS = 5
_LABELS = {
    "consensus": "consensus",
    "smoothed": "smoothed",
    "without_minority": "minority",
    "minority_only": "minority",
}
"""The table of labels that a pair policy reads through preferences, so that the graph shows it."""


def trained_key(recipe: str) -> dg.AssetKey:
    """Return the asset key of a recipe's trained model."""
    return dg.AssetKey(["trained", recipe])


def build_training(config: Config) -> list[dg.AssetsDefinition]:
    """Return one asset per configured recipe."""
    return [_trained(recipe_of(name)) for name in config.training.recipes]


def _trained(recipe: Recipe) -> dg.AssetsDefinition:
    key = trained_key(recipe.name)
    labels = [_LABELS[recipe.policy.name]] if recipe.policy.name in _LABELS else []

    @dg.asset(
        key=key,
        deps=["preferences", "latents", "prompt_embeddings", *labels],
        group_name="training",
        kinds={"torch", "diffusers"},
        description=f"Model tuned by {recipe.name}: {recipe.summary}.",
        code_version="1",
        pool="gpu",
        metadata=meta.spec_metadata(schemas.TRAINING_METRICS),
    )
    def trained(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        from trainers import report
        from trainers.steps import Training

        config, store = polyphony.config, polyphony.store

        def observe(row: dict[str, Any]) -> None:
            if row["step"] % OBSERVE_EVERY_STEPS == 0 or row["step"] == row["of"]:
                numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "of")}
                context.log_event(dg.AssetObservation(key, metadata={"step": row["step"], **meta.numbers(numbers)}))
                context.log.info(
                    f"step {row['step']}/{row['of']}: loss {row['loss']:.4f}, implicit accuracy "
                    f"{row['implicit_accuracy']:.2f}, {row['pairs_per_second']:.0f} pairs/s"
                )

        run = Training(store, config, context.log.info).run(recipe.name)
        existing = run.finished()
        if existing is None:
            run_module(
                "trainers.train",
                ["train", "--recipe", recipe.name],
                log_file=run.folder / "log.txt",
                on_line=context.log.info,
                on_metrics=observe,
                environment={CONFIG_VARIABLE: polyphony.config_file} if polyphony.config_file else None,
            )
        else:
            context.log.info("unchanged, nothing to train")
        finished = existing or run.finished()
        if finished is None:
            raise dg.Failure(
                f"{recipe.name}: the trainer ended without committing its model; see {run.folder / 'log.txt'}"
            )
        metrics = store.read(schemas.TRAINING_METRICS, recipe.name)
        last = metrics.tail(max(1, len(metrics) // 4))
        return dg.MaterializeResult(
            metadata={
                **meta.of_builts(store, schemas.TRAINING_METRICS, [finished.metrics]),
                **meta.numbers(last.select("loss", "implicit_accuracy", "pairs_per_second").mean().row(0, named=True)),
                "model": dg.MetadataValue.path(str(finished.model)),
                "pairs": finished.metrics.manifest.extra["pairs"],
                "curves": meta.picture(report.training_plot(metrics, recipe.name), "curves"),
                meta.REUSED: dg.MetadataValue.bool(existing is not None),
            }
        )

    return trained
