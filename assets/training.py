"""One asset per recipe, trained in a process of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets import metadata as meta
from assets.launchers import run_module
from assets.resources import Polyphony
from pipelines import schemas
from pipelines.config import CONFIG_VARIABLE, Config
from pipelines.tables import Built, Store
from trainers.recipes import Inversion, Recipe, recipes_in_order

OBSERVE_EVERY_STEPS = 5
_LABELS = {
    "consensus": "consensus",
    "smoothed": "smoothed",
    "without_minority": "minority",
    "minority_only": "minority",
}
"""The table of labels that a pair policy reads through preferences, so that the graph shows it."""
_NEEDED = {"minority": "minority", "group": "pair_groups"}
"""The table behind what an objective needs of a pair."""


def trained_key(recipe: str) -> dg.AssetKey:
    """Return the asset key of a recipe's trained model."""
    return dg.AssetKey(["trained", recipe])


def build_training(config: Config) -> list[dg.AssetsDefinition]:
    """Return one asset per configured recipe, and per recipe that one starts from; with their trajectories."""
    recipes = recipes_in_order(config.training.recipes)
    return [*(_trajectories(r) for r in recipes if _has_trajectories(r)), *map(_trained, recipes)]


def _has_trajectories(recipe: Recipe) -> bool:
    return isinstance(recipe.noising, Inversion) and recipe.noising.is_cached


def _trajectories(recipe: Recipe) -> dg.AssetsDefinition:
    key = dg.AssetKey(["trajectories", recipe.name])

    @dg.asset(
        key=key,
        deps=_dependencies(recipe),
        group_name="caches",
        kinds={"torch", "parquet"},
        description=f"The inverted latents that {recipe.name} trains on; what another run has made already is reused.",
        code_version="1",
        pool="gpu",
        metadata=meta.spec_metadata(schemas.TRAJECTORIES),
    )
    def trajectories(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        from trainers.steps import Training

        store = polyphony.store
        run = Training(store, polyphony.config, context.log.info).run(recipe.name)
        assert run.trajectories is not None
        before = {m.partition for m in store.manifests("trajectories", run.trajectories)}
        if run.finished() is None:
            _run_trainer(context, polyphony, "trajectories", recipe.name, run.folder / "trajectories.log")
        made = [Built(m, m.partition in before) for m in store.manifests("trajectories", run.trajectories)]
        return dg.MaterializeResult(metadata=meta.of_builts(store, schemas.TRAJECTORIES, made))

    return trajectories


def _run_trainer(
    context: dg.AssetExecutionContext,
    polyphony: Polyphony,
    what: str,
    recipe: str,
    log_file: Path,
    on_metrics: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:
    run_module(
        "trainers.train",
        [what, "--recipe", recipe, "--json"],
        log_file=log_file,
        on_line=context.log.info,
        on_metrics=on_metrics,
        environment={CONFIG_VARIABLE: polyphony.config_file} if polyphony.config_file else None,
    )


def _dependencies(recipe: Recipe) -> list[dg.AssetKey]:
    labels = [_LABELS[recipe.policy.name]] if recipe.policy.name in _LABELS else []
    needed = [table for need, table in _NEEDED.items() if need in recipe.objective.needs]
    names = dict.fromkeys(["preferences", "latents", "prompt_embeddings", *labels, *needed])
    return [*map(dg.AssetKey, names), *([trained_key(recipe.start)] if recipe.start else [])]


def _trained(recipe: Recipe) -> dg.AssetsDefinition:
    key = trained_key(recipe.name)

    @dg.asset(
        key=key,
        deps=[
            *_dependencies(recipe),
            *([dg.AssetKey(["trajectories", recipe.name])] if _has_trajectories(recipe) else []),
        ],
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
            if "validation" in row:
                found = {f"validation_{k}": v for k, v in row["validation"].items()}
                context.log_event(dg.AssetObservation(key, metadata={"step": row["step"], **meta.numbers(found)}))
            elif row["step"] % OBSERVE_EVERY_STEPS == 0 or row["step"] == row["of"]:
                numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "of")}
                context.log_event(dg.AssetObservation(key, metadata={"step": row["step"], **meta.numbers(numbers)}))
                accuracy = row["implicit_accuracy"]
                context.log.info(
                    f"step {row['step']}/{row['of']}: loss {row['loss']:.4f}"
                    + (f", implicit accuracy {accuracy:.2f}" if accuracy is not None else "")
                    + f", {row['pairs_per_second']:.0f} pairs/s"
                )

        run = Training(store, config, context.log.info).run(recipe.name)
        existing = run.finished()
        if existing is None:
            _run_trainer(context, polyphony, "train", recipe.name, run.folder / "log.txt", observe)
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
                **meta.numbers(_known(last.select("loss", "implicit_accuracy", "pairs_per_second").mean())),
                **meta.numbers(_last_validation(store, recipe.name)),
                "model": dg.MetadataValue.path(str(finished.model)),
                "pairs": finished.metrics.manifest.extra["pairs"],
                "curves": meta.picture(report.training_plot(metrics, recipe.name), "curves"),
                meta.REUSED: dg.MetadataValue.bool(existing is not None),
            }
        )

    return trained


def _known(means: pl.DataFrame) -> dict[str, float]:
    return {k: v for k, v in means.row(0, named=True).items() if v is not None}


def _last_validation(store: Store, recipe: str) -> dict[str, float]:
    frame = store.read(schemas.TRAINING_VALIDATIONS, recipe)
    last = frame.filter(pl.col("step") == pl.col("step").max())
    return {f"validation_{k}": v for k, v in last.select("metric", "value").rows()}
