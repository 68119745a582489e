"""Samples and scores per model, held-out pairs per recipe, the leaderboard."""

import dagster as dg

from assets import checks
from assets import metadata as meta
from assets.alerts import freshness
from assets.gpus import POOL
from assets.resources import Polyphony
from assets.specs import Specs, check_specs
from assets.training import trained_key
from pipelines import schemas
from pipelines.config import Config
from trainers import versions
from trainers.recipes import recipes_in_order

BASE = "base"


def build_evaluation(config: Config) -> list[dg.AssetsDefinition]:
    """Return the assets that judge the base and every configured recipe."""
    specs = Specs(config)
    recipes = [r.name for r in recipes_in_order(config.training.recipes)]
    per_model = [(table, model) for model in (BASE, *recipes) for table in ("samples", "evaluations")]
    steps = [_step(specs, *which) for which in (*per_model, *(("held_out", r) for r in recipes))]
    return [*steps, _leaderboard(specs, recipes)]


def _dependencies(table: str, model: str) -> list[dg.AssetKey]:
    if table == "evaluations":
        return [dg.AssetKey(["samples", model])]
    trained = [] if model == BASE else [trained_key(model)]
    return [*trained, dg.AssetKey("catalogue_prompts" if table == "samples" else "preferences")]


_VERSIONS = {
    "samples": versions.SAMPLING,
    "evaluations": versions.EVALUATION,
    "held_out": versions.EVALUATION,
}


def _step(specs: Specs, name: str, model: str) -> dg.AssetsDefinition:
    table, key = schemas.TABLES[name], dg.AssetKey([name, model])

    @dg.asset(
        key=key,
        deps=_dependencies(name, model),
        pool=POOL,
        check_specs=check_specs(key, table),
        **specs.table(
            table,
            "evaluation",
            kinds=("torch", "parquet"),
            code_version=_VERSIONS[name],
            description=f"One row per {table.row}: {model}.",
            partition=model,
            device="gpu",
        ),
    )
    def step(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        from trainers.steps import Training

        store = polyphony.store
        with polyphony.on_device("training", context.log.info) as config:
            built = getattr(Training(store, config, context.log.info), name)(model)
        if built.is_reused:
            context.log.info(f"{built.manifest.rows} rows, unchanged")
        return dg.MaterializeResult(
            metadata=meta.of_builts(store, table, [built]),
            check_results=checks.results(store, config, key, table, [built]),
        )

    return step


def _leaderboard(specs: Specs, recipes: list[str]) -> dg.AssetsDefinition:
    models = [dg.AssetKey(["evaluations", m]) for m in (BASE, *recipes)]

    @dg.asset(
        deps=[*models, *(dg.AssetKey(["held_out", r]) for r in recipes)],
        check_specs=check_specs("leaderboard", schemas.LEADERBOARD),
        **specs.table(
            schemas.LEADERBOARD,
            "evaluation",
            code_version=versions.EVALUATION,
            description=f"One row per {schemas.LEADERBOARD.row}, with 95 % bootstrap intervals over prompts.",
            freshness_policy=freshness(specs.config),
        ),
    )
    def leaderboard(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        from trainers import report
        from trainers.steps import Training

        config, store = polyphony.config, polyphony.store
        built = Training(store, config, context.log.info).leaderboard()
        found = checks.results(store, config, "leaderboard", schemas.LEADERBOARD, [built])
        if not checks.can_be_read(found):
            return dg.MaterializeResult(
                metadata=meta.of_builts(store, schemas.LEADERBOARD, [built]), check_results=found
            )
        board = store.read(schemas.LEADERBOARD)
        store.write_views()
        gains = {f"gain_sd {r['model']} {r['scorer']}": r["gain_sd"] for r in board.iter_rows(named=True)}
        return dg.MaterializeResult(
            metadata={
                **meta.of_builts(store, schemas.LEADERBOARD, [built]),
                **meta.numbers(gains),
                "board": dg.MetadataValue.md(report.leaderboard_markdown(board)),
                "gains": meta.picture(report.leaderboard_plot(board), "gains"),
                "samples": meta.picture(report.sample_grid(store, recipes), "samples, base first"),
            },
            check_results=found,
        )

    return leaderboard
