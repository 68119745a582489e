"""Assembles the definitions; defines nothing."""

from __future__ import annotations

import dagster as dg

from assets import alerts, jobs, sensors
from assets.caches import build_caches
from assets.checks import build_checks
from assets.evaluation import build_evaluation
from assets.ingest import build_ingest
from assets.labels import build_labels
from assets.loggers import compact_logger
from assets.maintenance import build_maintenance
from assets.resources import Polyphony
from assets.schedules import build_schedules
from assets.scorer_report import build_scorer_report
from assets.scores import build_scores
from assets.store import build_store
from assets.training import build_training
from pipelines import config as configuration


@dg.definitions
def defs() -> dg.Definitions:
    """Return everything Dagster is to know, for the configuration in $POLYPHONY_CONFIG or the small world."""
    config = configuration.load()
    maintenance, prune_weekly = build_maintenance(config)
    return dg.Definitions(
        assets=[
            *build_ingest(config),
            build_scores(config),
            *build_scorer_report(config),
            *build_labels(config),
            *build_caches(config),
            *build_training(config),
            *build_evaluation(config),
            *build_store(config),
        ],
        asset_checks=build_checks(),
        jobs=[*jobs.build_jobs(), maintenance],
        schedules=[*build_schedules(config), prune_weekly],
        sensors=[
            sensors.new_source_shards,
            sensors.relabel_after_rescoring,
            alerts.run_failure_alert,
            alerts.freshness_alert,
        ],
        loggers={"console": compact_logger},
        resources={"polyphony": Polyphony()},
    )
