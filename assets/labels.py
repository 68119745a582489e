"""Labels: global tables that stream all shards in one step, `preferences`, which joins them, and what people look at."""

from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import polars as pl

from assets import checks
from assets import metadata as meta
from assets.alerts import PUBLISHED, freshness
from assets.ingest import CATALOGUE_TABLES
from assets.resources import Polyphony
from assets.scores import score_key
from assets.specs import Specs, check_specs
from pipelines import catalogue, label_card, label_plots, pairs_page, plots, schemas, steps
from pipelines.config import Config

_DRIFT_TABLES = (schemas.FROZEN_SAMPLE, schemas.FROZEN_LABELS, schemas.DRIFT)
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
    """Return the active revisions, one asset per label table, the pages of pairs and the label card."""
    specs = Specs(config)
    tables = [_label(name, specs) for name in steps.LABEL_TABLES]
    return [_active_scores(specs), *tables, _drift(specs), _pair_pages(specs), _card(specs)]


def _active_scores(specs: Specs) -> dg.AssetsDefinition:
    @dg.asset(
        deps=[score_key(name) for name in specs.scorers],
        **specs.of(
            "scores",
            kinds=("json",),
            code_version="1",
            description="Which revision of every scorer is the active one; switched when all shards are scored.",
            **_published("active_scores", specs),
        ),
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


def _label(name: str, specs: Specs) -> dg.AssetsDefinition:
    table = schemas.TABLES[name].of(specs.scorers)
    scores: list[dg.AssetKey | str] = []
    if name in ("margins", "preferences"):
        scores = [*(score_key(s) for s in specs.scorers), "active_scores"]
    shards = ["votes", *(["images"] if name == "preferences" else []), *(t.name for t in CATALOGUE_TABLES)]

    @dg.asset(
        name=name,
        deps=[*shards, *scores, *steps.LABEL_TABLES[name]],
        check_specs=check_specs(name, table),
        **specs.table(table, "labels", code_version=steps.CODE_VERSION, **_published(name, specs)),
    )
    def label(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        config, store = polyphony.config, polyphony.store
        built = getattr(steps.Labels(store, config, catalogue.shard_keys(store)), name)()
        context.log.info(f"{built.manifest.rows} rows" + (", unchanged" if built.is_reused else ""))
        facts = meta.of_builts(store, table, [built])
        found = checks.results(store, config, name, schemas.TABLES[name], [built])
        if not checks.can_be_read(found):
            return dg.MaterializeResult(metadata=facts, check_results=found)
        facts |= meta.numbers(_facts(name, store.scan(table)))
        if name in _PAGES:
            facts["pairs"] = meta.page(store, config, f"{_PAGES[name]}.html")
        if name == "consensus":
            votes = plots.agreement(plots.votes_of(store))
            facts["matrix"] = meta.picture(plots.agreement_matrix(votes), "who agrees with whom")
        if name in _PLOTS:
            title, plot = _PLOTS[name]
            facts["plot"] = meta.picture(plot(store.read(schemas.TABLES[name])), title)
        learned = built.manifest.extra
        if note := learned.get("calibration_note"):
            facts["calibration"] = dg.MetadataValue.text(str(note))
            facts |= meta.numbers({f"lesson_{k}": learned[k] for k in ("targets", "share", "ece", "share_clamped")})
        return dg.MaterializeResult(metadata=facts, check_results=found)

    return label


def _drift(specs: Specs) -> dg.AssetsDefinition:
    @dg.multi_asset(
        specs=[
            dg.AssetSpec(
                t.name,
                deps=["margins", "consensus"],
                **specs.table(t, "labels", code_version=steps.DRIFT_VERSION),
            )
            for t in _DRIFT_TABLES
        ],
        check_specs=[c for t in _DRIFT_TABLES for c in check_specs(t.name, t)],
    )
    def drift(context: dg.AssetExecutionContext, polyphony: Polyphony) -> Iterator[dg.MaterializeResult]:
        """What new revisions changed on the same pairs: accuracy of every scorer, labels of the consensus."""
        config, store = polyphony.config, polyphony.store
        built = steps.Labels(store, config, catalogue.shard_keys(store)).drift()
        for t in _DRIFT_TABLES:
            found = checks.results(store, config, t.name, t, [built[t.name]])
            facts = meta.of_builts(store, t, [built[t.name]])
            if t is schemas.DRIFT and checks.can_be_read(found):
                table = store.read(t)
                facts |= meta.numbers(_drifted(table))
                facts["plot"] = meta.picture(plots.drift(table), "on the frozen sample")
            yield dg.MaterializeResult(asset_key=t.name, metadata=facts, check_results=found)

    return drift


def _drifted(table: pl.DataFrame) -> dict[str, float | None]:
    """Return the numbers of the latest measurement."""
    latest = table.filter(pl.col("measurement") == pl.col("measurement").max())
    accuracy = {f"accuracy_{subject}": value for subject, value in latest.select("subject", "accuracy").rows()}
    consensus = latest.filter(subject="consensus")
    return accuracy | {"share_consensus_changed": None if consensus.is_empty() else consensus["share_changed"][0]}


def _published(name: str, specs: Specs) -> dict[str, Any]:
    """Return the arguments that only what people read has: how old it may become."""
    return {"freshness_policy": freshness(specs.config)} if dg.AssetKey(name) in PUBLISHED else {}


def _pair_pages(specs: Specs) -> dg.AssetsDefinition:
    @dg.asset(deps=list(steps.LABEL_TABLES), **specs.of("labels", kinds=("html",), code_version="1"))
    def pair_pages(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        """Pages that show pairs: highest minority, split votes, consensus against the humans, ...; for a browser."""
        config, store = polyphony.config, polyphony.store
        written = pairs_page.write_all(store, catalogue.shard_keys(store))
        context.log.info(", ".join(written))
        return dg.MaterializeResult(metadata={name: meta.page(store, config, f"{name}.html") for name in written})

    return pair_pages


def _card(specs: Specs) -> dg.AssetsDefinition:
    @dg.asset(
        name="label_card", deps=list(steps.LABEL_TABLES), **specs.of("labels", kinds=("markdown",), code_version="1")
    )
    def card(polyphony: Polyphony) -> dg.MaterializeResult:
        """One page: who voted, agreement, the share of minority votes, what each pair policy drops and whose votes."""
        store = polyphony.store
        path = dg.MetadataValue.path(label_card.build(store))
        shown = dg.MetadataValue.md(store.read_text(label_card.FILE))
        return dg.MaterializeResult(metadata={"card": shown, "file": path})

    return card


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
