"""Labels: global tables that stream all shards in one step, and preferences, which joins them."""

import dagster as dg
import polars as pl

from assets import metadata as meta
from assets.ingest import CATALOGUE_TABLES
from assets.resources import Polyphony
from assets.scores import score_key
from pipelines import catalogue, schemas, steps
from pipelines.config import Config

_DEPENDENCIES = {
    "calibration": (),
    "consensus": (),
    "smoothed": ("calibration",),
    "minority": ("calibration",),
    "preferences": ("calibration", "consensus", "smoothed"),
}


def build_labels(config: Config) -> list[dg.AssetsDefinition]:
    """Return one asset per label table."""
    scores = [score_key(s.name) for s in config.scorers]
    return [_active_scores(config), *(_label(name, scores) for name in steps.LABEL_TABLES)]


def _active_scores(config: Config) -> dg.AssetsDefinition:
    @dg.asset(
        deps=[score_key(s.name) for s in config.scorers],
        group_name="scores",
        kinds={"json"},
        description="Which revision of every scorer is the active one; switched when all shards are scored.",
    )
    def active_scores(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        from pipelines.scoring import batches

        store = polyphony.store
        before = store.current_revisions()
        revisions = batches.activate(store, polyphony.config, catalogue.shard_keys(store))
        context.log.info(f"active revisions: {revisions}")
        return dg.MaterializeResult(
            metadata={
                "revisions": dg.MetadataValue.json(revisions),
                meta.REUSED: dg.MetadataValue.bool(before == revisions),
            }
        )

    return active_scores


def _label(name: str, scores: list[dg.AssetKey]) -> dg.AssetsDefinition:
    table = schemas.TABLES[name]

    @dg.asset(
        name=name,
        deps=["votes", *(t.name for t in CATALOGUE_TABLES), *scores, "active_scores", *_DEPENDENCIES[name]],
        group_name="labels",
        kinds={"polars", "parquet"},
        description=f"One row per {table.row}.",
        code_version=steps.CODE_VERSION,
        metadata=meta.spec_metadata(table),
    )
    def label(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        store = polyphony.store
        built = getattr(steps.Labels(store, polyphony.config, catalogue.shard_keys(store)), name)()
        facts = _facts(name, store.scan(table))
        context.log.info(f"{built.manifest.rows} rows" + (", unchanged" if built.is_reused else ""))
        return dg.MaterializeResult(metadata={**meta.of_builts(store, table, [built]), **meta.numbers(facts)})

    return label


def _facts(name: str, frame: pl.LazyFrame) -> dict[str, float | None]:
    """Return the numbers of a label table that are worth watching over time."""
    if name == "calibration":
        whole = frame.filter(pl.col("fold") == -1).collect()
        return {f"accuracy_{scorer}": value for scorer, value in whole.select("scorer", "accuracy").rows()}
    facts = {
        "consensus": {
            "share_undecided": pl.col("consensus_label_0").is_null().mean(),
            "agreement": pl.col("agreement").mean(),
        },
        "smoothed": {"mean_certainty": (2 * pl.col("p_ensemble") - 1).abs().mean()},
        "minority": {
            "mean_minority_score": pl.col("minority_score").mean(),
            "share_multi_rater": (pl.col("others") > 0).mean(),
        },
        "preferences": {"share_excluded": pl.col("excluded_because").is_not_null().mean()},
    }[name]
    return frame.select(**facts).collect().row(0, named=True)
