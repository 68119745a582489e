"""One asset per recipe, trained in a process of its own.

Belongs here: what Dagster sees of training. Does not belong here: training, and the process (`launchers`).
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets import checks, forms, gpus
from assets import metadata as meta
from assets.launchers import KILLED_IS_REPEATED, ProcessClient, only_kills_are_repeated
from assets.resources import Polyphony
from assets.specs import Specs, check_specs
from pipelines import schemas
from pipelines.config import Config
from pipelines.tables import Built, Store
from trainers import versions
from trainers.recipes import Inversion, Recipe, recipes_in_order

if TYPE_CHECKING:
    from trainers.steps import Training

OBSERVE_EVERY_STEPS = 5
STEP_OBSERVATIONS, VALIDATION_OBSERVATIONS = 400, 100
"""Per run at most, beside the last ones: each is an event in Dagster's log."""
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
    specs, recipes = Specs(config), recipes_in_order(config.training.recipes)
    return [*(_trajectories(specs, r) for r in recipes if _has_trajectories(r)), *(_trained(specs, r) for r in recipes)]


def _launched(config: Config) -> dict[str, Any]:
    """Return the arguments of assets that start the trainer."""
    pool = gpus.pool(config.training.device, config.training.processes)
    return {"pool": pool, "retry_policy": KILLED_IS_REPEATED}


def _has_trajectories(recipe: Recipe) -> bool:
    return isinstance(recipe.noising, Inversion) and recipe.noising.is_cached


def _trajectories(specs: Specs, recipe: Recipe) -> dg.AssetsDefinition:
    table, key = schemas.TRAJECTORIES, dg.AssetKey(["trajectories", recipe.name])

    @dg.asset(
        key=key,
        deps=_dependencies(recipe),
        check_specs=check_specs(key, table),
        **_launched(specs.config),
        **specs.table(
            table,
            "caches",
            kinds=("torch", "parquet"),
            code_version=versions.TRAJECTORIES,
            description=f"The inverted latents that {recipe.name} trains on; what another run has made already is reused.",
            device="gpu",
        ),
    )
    def trajectories(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        from trainers.steps import Training

        with only_kills_are_repeated():
            config, store = polyphony.config, polyphony.store
            run = Training(store, config, context.log.info).run(recipe.name)
            assert run.trajectories is not None
            before = {m.partition for m in store.manifests("trajectories", run.trajectories)}
            if run.finished() is None:
                _run_trainer(context, config, "trajectories", recipe.name, run.folder / "trajectories.log")
            made = [Built(m, m.partition in before) for m in store.manifests("trajectories", run.trajectories)]
            return dg.MaterializeResult(
                metadata=meta.of_builts(store, table, made),
                check_results=checks.results(store, config, key, table, made),
            )

    return trajectories


def _run_trainer(
    context: dg.AssetExecutionContext,
    config: Config,
    what: str,
    recipe: str,
    log_file: Path,
    on_message: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:
    ProcessClient().run(
        context=context,
        module="trainers.train",
        arguments=[what, "--recipe", recipe],
        config=config,
        log_file=log_file,
        on_message=on_message,
        device=config.training.device,
        processes=config.training.processes,
    )


def _dependencies(recipe: Recipe) -> list[dg.AssetKey]:
    labels = [_LABELS[recipe.policy.name]] if recipe.policy.name in _LABELS else []
    needed = [table for need, table in _NEEDED.items() if need in recipe.objective.needs]
    names = dict.fromkeys(["preferences", "latents", "prompt_embeddings", *labels, *needed])
    return [*map(dg.AssetKey, names), *([trained_key(recipe.start)] if recipe.start else [])]


def _trained(specs: Specs, recipe: Recipe) -> dg.AssetsDefinition:
    table, key = schemas.TRAINING_METRICS, trained_key(recipe.name)
    arguments = specs.table(
        table,
        "training",
        kinds=("torch", "diffusers"),
        code_version=versions.TRAINING,
        description=f"Model tuned by {recipe.name}: {recipe.summary}.",
        partition=recipe.name,
        device="gpu",
        tags={"polyphony/objective": recipe.objective.name, "polyphony/pairs": recipe.policy.name},
    )
    trajectories = [dg.AssetKey(["trajectories", recipe.name])] if _has_trajectories(recipe) else []

    @dg.multi_asset(
        name=f"trained__{recipe.name}",
        specs=[dg.AssetSpec(key, deps=[*_dependencies(recipe), *trajectories], **arguments)],
        check_specs=check_specs(key, table),
        # A dry run yields nothing: only what can be a subset may do so.
        can_subset=True,
        **_launched(specs.config),
    )
    def trained(
        context: dg.AssetExecutionContext, config: forms.TrainingOptions, polyphony: Polyphony
    ) -> Iterator[dg.MaterializeResult]:
        from trainers.steps import Training

        with only_kills_are_repeated():
            present, store = polyphony.config, polyphony.store
            training = Training(store, present, context.log.info)
            if config.dry_run:
                _tell_plan(context, key, training, recipe.name)
                return
            run = training.run(recipe.name)
            existing = run.finished()
            if existing is None:
                _run_trainer(context, present, "train", recipe.name, run.folder / "log.txt", _observer(context, key))
            else:
                context.log.info("unchanged, nothing to train")
            finished = existing or run.finished()
            if finished is None:
                raise dg.Failure(
                    f"{recipe.name}: the trainer ended without committing its model; see {run.folder / 'log.txt'}",
                    allow_retries=False,
                )
            found = checks.results(store, present, key, table, [finished.metrics])
            metadata = {
                **meta.of_builts(store, table, [finished.metrics]),
                "model": dg.MetadataValue.path(str(finished.model)),
                "pairs": finished.metrics.manifest.extra["pairs"],
                meta.REUSED: dg.MetadataValue.bool(existing is not None),
            }
            if checks.can_be_read(found):
                metadata |= _curves(store, recipe.name)
            yield dg.MaterializeResult(asset_key=key, metadata=metadata, check_results=found)

    return trained


def _tell_plan(context: dg.AssetExecutionContext, key: dg.AssetKey, training: "Training", recipe: str) -> None:
    """Show the dry run in the log and on the asset's page."""
    from trainers import plan

    text = plan.describe(plan.plan(training.run(recipe, is_plan=True)))
    context.log.info(text)
    context.log_event(dg.AssetObservation(key, metadata={"plan": dg.MetadataValue.md(f"```\n{text}\n```")}))


def _observer(context: dg.AssetExecutionContext, key: dg.AssetKey) -> Callable[[dict[str, Any]], None]:
    """Return what takes the trainer's rows and shows some of them on the asset's plots, and in the log."""
    last_validation = 0

    def observe(row: dict[str, Any]) -> None:
        nonlocal last_validation
        step, of = row["step"], row["of"]
        if "validation" in row:
            if step != of and step - last_validation < of / VALIDATION_OBSERVATIONS:
                return
            last_validation = step
            found = {f"validation {k}": v for k, v in row["validation"].items()}
            context.log_event(dg.AssetObservation(key, metadata={"step": step, **meta.numbers(found)}))
        elif step % max(OBSERVE_EVERY_STEPS, math.ceil(of / STEP_OBSERVATIONS)) == 0 or step == of:
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "of")}
            context.log_event(dg.AssetObservation(key, metadata={"step": step, **meta.numbers(numbers)}))
            accuracy = row["implicit_accuracy"]
            context.log.info(
                f"step {step}/{of}: loss {row['loss']:.4f}"
                + (f", implicit accuracy {accuracy:.2f}" if accuracy is not None else "")
                + f", {row['pairs_per_second']:.0f} pairs/s"
            )

    return observe


def _curves(store: Store, recipe: str) -> dict[str, Any]:
    """Return what is read from a run's tables: means of the last quarter, the last validation, the curves."""
    from trainers import report

    metrics = store.read(schemas.TRAINING_METRICS, recipe)
    validations = store.read(schemas.TRAINING_VALIDATIONS, recipe)
    last = metrics.tail(max(1, len(metrics) // 4))
    return {
        **meta.numbers(_known(last.select("loss", "implicit_accuracy", "pairs_per_second").mean())),
        **meta.numbers(_last_validation(validations)),
        "curves": meta.picture(report.training_plot(metrics, recipe, validations), "curves"),
    }


def _known(means: pl.DataFrame) -> dict[str, float]:
    return {k: v for k, v in means.row(0, named=True).items() if v is not None}


def _last_validation(frame: pl.DataFrame) -> dict[str, float]:
    last = frame.filter(pl.col("step") == pl.col("step").max())
    return {f"validation {k}": v for k, v in last.select("metric", "value").rows()}
