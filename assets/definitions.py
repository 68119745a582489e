"""Assembles the definitions; defines nothing."""

from __future__ import annotations

import dagster as dg

from assets import caches, ingest, jobs
from assets.evaluation import build_evaluation
from assets.labels import build_labels
from assets.loggers import compact_logger
from assets.resources import Polyphony
from assets.scorer_report import build_scorer_report
from assets.scores import build_scores
from assets.training import build_training
from pipelines import config as configuration


@dg.definitions
def defs() -> dg.Definitions:
    """Return everything Dagster is to know, for the configuration in $POLYPHONY_CONFIG or the small world."""
    config = configuration.load()
    return dg.Definitions(
        assets=[
            ingest.raw_sources,
            ingest.ingested,
            ingest.catalogue,
            ingest.accounting,
            build_scores(config),
            *build_scorer_report(config),
            *build_labels(config),
            caches.latents,
            caches.prompt_embeddings,
            *build_training(config),
            *build_evaluation(config),
        ],
        jobs=jobs.build_jobs(),
        loggers={"console": compact_logger},
        resources={"polyphony": Polyphony()},
    )
