"""What the active scores look like, how right they are and how alike; what bfloat16 costs where it is configured."""

import contextlib
from collections.abc import Iterator
from typing import Any

import dagster as dg
import polars as pl

from assets import checks
from assets import metadata as meta
from assets.gpus import POOL
from assets.ingest import CATALOGUE_TABLES
from assets.resources import Polyphony
from assets.scores import score_key
from assets.specs import Specs, check_specs
from pipelines import catalogue, schemas
from pipelines.config import Config
from pipelines.scoring import devices, precision, report
from pipelines.tables import Store

_TABLES = (schemas.SCORER_REPORT, schemas.SCORER_CORRELATION)


def build_scorer_report(config: Config) -> list[dg.AssetsDefinition]:
    """Return the assets that report on the configured scorers."""
    specs = Specs(config)
    return [_precision(specs), _report(specs)]


def _precision(specs: Specs) -> dg.AssetsDefinition:
    table = schemas.SCORER_PRECISION

    @dg.asset(
        deps=["votes", "images", *(t.name for t in CATALOGUE_TABLES)],
        pool=POOL,
        check_specs=check_specs("scorer_precision", table),
        **specs.table(
            table,
            "scores",
            kinds=("torch", "parquet"),
            code_version=precision.CODE_VERSION,
            description=f"One row per {table.row}: those that are configured in bfloat16.",
            device="gpu",
        ),
    )
    def scorer_precision(context: dg.AssetExecutionContext, polyphony: Polyphony) -> dg.MaterializeResult:
        config, store = polyphony.config, polyphony.store
        done, flips, measured = [], {}, precision.configured(config)
        with contextlib.ExitStack() as held:
            if measured:
                config = held.enter_context(polyphony.on_device("scoring", context.log.info))
            for scorer in measured:
                device = devices.resolve_device(config.scoring.device)
                done.append(precision.measure(store, scorer, device, progress=context.log.info))
                row = store.read(table, done[-1].manifest.partition).row(0, named=True)
                flips[f"share_flipped_{scorer.name}"] = row["share_flipped"]
                context.log.info(precision.text(row))
        return dg.MaterializeResult(
            metadata={**meta.of_builts(store, table, done), **meta.numbers(flips)},
            check_results=checks.results(store, config, "scorer_precision", table, done),
        )

    return scorer_precision


def _report(specs: Specs) -> dg.AssetsDefinition:
    scores = [score_key(name) for name in specs.scorers]

    @dg.multi_asset(
        name="scorer_report",
        specs=[
            dg.AssetSpec(
                t.name,
                deps=["votes", *(c.name for c in CATALOGUE_TABLES), *scores, "active_scores", "scorer_precision"],
                **specs.table(t, "scores", code_version=report.CODE_VERSION),
            )
            for t in _TABLES
        ],
        check_specs=[c for t in _TABLES for c in check_specs(t.name, t)],
    )
    def scorer_report(context: dg.AssetExecutionContext, polyphony: Polyphony) -> Iterator[dg.MaterializeResult]:
        config, store = polyphony.config, polyphony.store
        built = report.build(store, config, catalogue.shard_keys(store))
        found = {t.name: checks.results(store, config, t.name, t, [built[t.name]]) for t in _TABLES}
        # The report shows both.
        can_be_read = all(map(checks.can_be_read, found.values()))
        for t in _TABLES:
            facts = meta.of_builts(store, t, [built[t.name]])
            if t is schemas.SCORER_REPORT and can_be_read:
                facts |= _shown(context, store)
            yield dg.MaterializeResult(asset_key=t.name, metadata=facts, check_results=found[t.name])

    return scorer_report


def _shown(context: dg.AssetExecutionContext, store: Store) -> dict[str, Any]:
    rows = store.read(schemas.SCORER_REPORT).filter(pl.col("source") == report.ALL)
    accuracy = {f"accuracy_{name}": value for name, value in rows.select("scorer", "accuracy").iter_rows()}
    context.log.info(", ".join(f"{n} {100 * v:.1f} %" for n, v in accuracy.items() if v is not None))
    return {
        **meta.numbers(accuracy),
        "report": dg.MetadataValue.md(report.table_text(store)),
        "picture": meta.picture(report.picture(store), "accuracy, likeness, scores by source"),
    }
