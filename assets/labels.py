"""Labels: global tables that stream all shards in one step, `preferences`, which joins them, and what people look at."""

from collections.abc import Callable

import dagster as dg
import polars as pl

from assets import metadata as meta
from assets.ingest import CATALOGUE_TABLES
from assets.resources import Polyphony
from assets.scores import score_key
from pipelines import catalogue, label_card, label_plots, pairs_page, schemas, steps
from pipelines.config import Config

_PLOTS: dict[str, tuple[str, Callable[[pl.DataFrame], bytes]]] = {
    "reliability": ("probability against the share of people", label_plots.reliability),
    "consensus_report": ("agreement with human votes by aggregation", label_plots.consensus),
    "minority": ("what is known of decided votes", label_plots.minority),
    "annotators": ("annotators by reliability and by score", label_plots.annotators),
}
_PAGES = {
    "consensus": "consensus_against_human",
    "minority": "highest_minority",
    "rater_agreement": "split_votes",
    "preferences": "index",
}
"""Which page of pairs belongs to a table: see `pairs_page`."""


def build_labels(config: Config) -> list[dg.AssetsDefinition]:
    """Return one asset per label table, the pages of pairs and the label card."""
    tables = [_label(name, config) for name in steps.LABEL_TABLES]
    return [_active_scores(config), *tables, pair_pages, card]


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


def _label(name: str, config: Config) -> dg.AssetsDefinition:
    scorers = [s.name for s in config.scorers]
    table = schemas.TABLES[name].of(scorers)
    scores: list[dg.AssetKey | str] = []
    if name in ("margins", "preferences"):
        scores = [*(score_key(s) for s in scorers), "active_scores"]
    shards = ["votes", *(["images"] if name == "preferences" else []), *(t.name for t in CATALOGUE_TABLES)]

    @dg.asset(
        name=name,
        deps=[*shards, *scores, *steps.LABEL_TABLES[name]],
        group_name="labels",
        kinds={"polars", "parquet"},
        description=f"One row per {table.row}.",
        code_version=steps.CODE_VERSION,
        metadata=meta.spec_metadata(table),
    )
    def label(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        store = polyphony.store
        built = getattr(steps.Labels(store, polyphony.config, catalogue.shard_keys(store)), name)()
        context.log.info(f"{built.manifest.rows} rows" + (", unchanged" if built.is_reused else ""))
        facts = {**meta.of_builts(store, table, [built]), **meta.numbers(_facts(name, store.scan(table)))}
        if name in _PAGES:
            facts["pairs"] = dg.MetadataValue.path(store.path("pairs", f"{_PAGES[name]}.html"))
        if name in _PLOTS:
            title, plot = _PLOTS[name]
            facts["plot"] = meta.picture(plot(store.read(schemas.TABLES[name])), title)
        learned = built.manifest.extra
        if note := learned.get("calibration_note"):
            facts["calibration"] = dg.MetadataValue.text(str(note))
            facts |= meta.numbers({f"lesson_{k}": learned[k] for k in ("targets", "share", "ece", "share_clamped")})
        return dg.MaterializeResult(metadata=facts)

    return label


@dg.asset(deps=list(steps.LABEL_TABLES), group_name="labels", kinds={"html"})
def pair_pages(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
    """Pages that show pairs: highest minority, split votes, consensus against the humans, ...; open them in a browser."""
    store = polyphony.store
    written = pairs_page.write_all(store, catalogue.shard_keys(store))
    context.log.info(", ".join(written))
    return dg.MaterializeResult(metadata={name: dg.MetadataValue.path(path) for name, path in written.items()})


@dg.asset(name="label_card", deps=list(steps.LABEL_TABLES), group_name="labels", kinds={"markdown"})
def card(polyphony: Polyphony) -> dg.MaterializeResult:
    """One page: who voted, agreement, the share of minority votes, what each pair policy drops and whose votes."""
    store = polyphony.store
    path = dg.MetadataValue.path(label_card.build(store))
    return dg.MaterializeResult(metadata={"card": dg.MetadataValue.md(store.read_text(label_card.FILE)), "file": path})


def _facts(name: str, frame: pl.LazyFrame) -> dict[str, float | None]:
    """Return the numbers of a label table that are worth watching over time."""
    if name == "calibration":
        whole = frame.filter(pl.col("fold") == -1).collect()
        facts = {f"accuracy_{scorer}": value for scorer, value in whole.select("scorer", "accuracy").rows()}
        return facts | {f"ece_{scorer}": value for scorer, value in whole.select("scorer", "ece_calibrated").rows()}
    numbers: dict[str, dict[str, pl.Expr]] = {
        "consensus": {
            "share_undecided": pl.col("consensus_label_0").is_null().mean(),
            "agreement": pl.col("agreement").mean(),
        },
        "smoothed": {"mean_certainty": (2 * pl.col("p_ensemble") - 1).abs().mean()},
        "minority": {
            "mean_minority_score": pl.col("minority_score").mean(),
            "mean_minority_probability": pl.col("minority_probability").mean(),
            "share_multi_rater": (pl.col("others") > 0).mean(),
        },
        "annotators": {"median_reliability": pl.col("reliability").median()},
        "rater_agreement": {"alpha": pl.col("alpha").filter(pl.col("source") == "all").first()},
        "preferences": {
            "share_excluded": pl.col("excluded_because").is_not_null().mean(),
            "share_unanimous": pl.col("is_unanimous").mean(),
            "share_consensus_against_human": ((pl.col("consensus_label_0") > 0.5) != (pl.col("human_label_0") > 0.5))
            # What the humans decided themselves is not against them.
            .filter(pl.col("human_label_0") != 0.5, pl.col("decided_by") == "majority")
            .mean(),
        },
    }
    return frame.select(**numbers[name]).collect().row(0, named=True) if name in numbers else {}
