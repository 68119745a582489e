"""What the active scores look like, how right they are and how alike; what bfloat16 costs where it is configured."""

from collections.abc import Iterator

import dagster as dg
import polars as pl

from assets import metadata as meta
from assets.ingest import CATALOGUE_TABLES
from assets.resources import Polyphony
from assets.scores import score_key
from pipelines import catalogue, schemas
from pipelines.config import Config
from pipelines.scoring import devices, precision, report

_TABLES = (schemas.SCORER_REPORT, schemas.SCORER_CORRELATION)


def build_scorer_report(config: Config) -> list[dg.AssetsDefinition]:
    """Return the assets that report on the configured scorers."""
    scores = [score_key(s.name) for s in config.scorers]
    return [_precision(), _report(scores)]


def _precision() -> dg.AssetsDefinition:
    @dg.asset(
        deps=["votes", "images", *(t.name for t in CATALOGUE_TABLES)],
        group_name="scores",
        kinds={"torch", "parquet"},
        description=f"One row per {schemas.SCORER_PRECISION.row}: those that are configured in bfloat16.",
        code_version=precision.CODE_VERSION,
        pool="gpu",
        metadata=meta.spec_metadata(schemas.SCORER_PRECISION),
    )
    def scorer_precision(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        config, store = polyphony.config, polyphony.store
        done, flips = [], {}
        for scorer in precision.configured(config):
            device = devices.resolve_device(config.scoring.device)
            done.append(precision.measure(store, scorer, device, progress=context.log.info))
            row = store.read(schemas.SCORER_PRECISION, done[-1].manifest.partition).row(0, named=True)
            flips[f"share_flipped_{scorer.name}"] = row["share_flipped"]
            context.log.info(precision.text(row))
        return dg.MaterializeResult(
            metadata={**meta.of_builts(store, schemas.SCORER_PRECISION, done), **meta.numbers(flips)}
        )

    return scorer_precision


def _report(scores: list[dg.AssetKey]) -> dg.AssetsDefinition:
    @dg.multi_asset(
        name="scorer_report",
        specs=[
            dg.AssetSpec(
                t.name,
                deps=["votes", *(c.name for c in CATALOGUE_TABLES), *scores, "active_scores", "scorer_precision"],
                group_name="scores",
                kinds={"polars", "parquet"},
                description=f"One row per {t.row}.",
                code_version=report.CODE_VERSION,
                metadata=meta.spec_metadata(t),
            )
            for t in _TABLES
        ],
    )
    def scorer_report(context: dg.AssetExecutionContext, polyphony: Polyphony) -> Iterator[dg.MaterializeResult]:
        config, store = polyphony.config, polyphony.store
        built = report.build(store, config, catalogue.shard_keys(store))
        rows = store.read(schemas.SCORER_REPORT).filter(pl.col("source") == report.ALL)
        accuracy = {f"accuracy_{name}": value for name, value in rows.select("scorer", "accuracy").iter_rows()}
        context.log.info(", ".join(f"{n} {100 * v:.1f} %" for n, v in accuracy.items() if v is not None))
        shown = {
            **meta.numbers(accuracy),
            "report": dg.MetadataValue.md(report.table_text(store)),
            "picture": meta.picture(report.picture(store), "accuracy, likeness, scores by source"),
        }
        for t in _TABLES:
            more = shown if t is schemas.SCORER_REPORT else {}
            yield dg.MaterializeResult(asset_key=t.name, metadata={**meta.of_builts(store, t, [built[t.name]]), **more})

    return scorer_report
