"""Samples and scores per model, held-out pairs per recipe, the leaderboard."""

import dagster as dg

from assets import metadata as meta
from assets.resources import Polyphony
from assets.training import trained_key
from pipelines import schemas
from pipelines.config import Config
from trainers.recipes import recipes_in_order

BASE = "base"


def build_evaluation(config: Config) -> list[dg.AssetsDefinition]:
    """Return the assets that judge the base and every configured recipe."""
    recipes = [r.name for r in recipes_in_order(config.training.recipes)]
    per_model = [a for model in (BASE, *recipes) for a in (_step("samples", model), _step("evaluations", model))]
    return [*per_model, *(_step("held_out", r) for r in recipes), _leaderboard(recipes)]


def _dependencies(table: str, model: str) -> list[dg.AssetKey]:
    if table == "evaluations":
        return [dg.AssetKey(["samples", model])]
    trained = [] if model == BASE else [trained_key(model)]
    return [*trained, dg.AssetKey("catalogue_prompts" if table == "samples" else "preferences")]


def _step(table: str, model: str) -> dg.AssetsDefinition:
    schema = schemas.TABLES[table]

    @dg.asset(
        key=[table, model],
        deps=_dependencies(table, model),
        group_name="evaluation",
        kinds={"torch", "parquet"},
        description=f"One row per {schema.row}: {model}.",
        code_version="1",
        pool="gpu",
        metadata=meta.spec_metadata(schema),
    )
    def step(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        from trainers.steps import Training

        store = polyphony.store
        built = getattr(Training(store, polyphony.config, context.log.info), table)(model)
        if built.is_reused:
            context.log.info(f"{built.manifest.rows} rows, unchanged")
        return dg.MaterializeResult(metadata=meta.of_builts(store, schema, [built]))

    return step


def _leaderboard(recipes: list[str]) -> dg.AssetsDefinition:
    models = [dg.AssetKey(["evaluations", m]) for m in (BASE, *recipes)]

    @dg.asset(
        deps=[*models, *(dg.AssetKey(["held_out", r]) for r in recipes)],
        group_name="evaluation",
        kinds={"polars", "parquet"},
        description=f"One row per {schemas.LEADERBOARD.row}, with 95 % bootstrap intervals over prompts.",
        code_version="1",
        metadata=meta.spec_metadata(schemas.LEADERBOARD),
    )
    def leaderboard(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        from trainers import report
        from trainers.steps import Training

        store = polyphony.store
        built = Training(store, polyphony.config, context.log.info).leaderboard()
        board = store.read(schemas.LEADERBOARD)
        store.write_views()
        gains = {
            f"gain_sd_{r['model']}_{r['scorer']}".replace(":", "_"): r["gain_sd"] for r in board.iter_rows(named=True)
        }
        return dg.MaterializeResult(
            metadata={
                **meta.of_builts(store, schemas.LEADERBOARD, [built]),
                **meta.numbers(gains),
                "board": dg.MetadataValue.md(report.leaderboard_markdown(board)),
                "gains": meta.picture(report.leaderboard_plot(board), "gains"),
                "samples": meta.picture(report.sample_grid(store, recipes), "samples, base first"),
            }
        )

    return leaderboard
