"""Jobs that people start: the sources' shards, then everything over a range of shards."""

from __future__ import annotations

import dagster as dg

from assets.ingest import raw_sources

PREPARE = "prepare"
EVERYTHING = "everything"


def build_jobs() -> list[dg.UnresolvedAssetJobDefinition]:
    """Return the jobs."""
    return [
        dg.define_asset_job(
            PREPARE,
            selection=dg.AssetSelection.assets(raw_sources),
            description="Write the small world where it is configured, and register the sources' shards.",
            executor_def=dg.in_process_executor,
        ),
        dg.define_asset_job(
            EVERYTHING,
            selection=dg.AssetSelection.all() - dg.AssetSelection.assets(raw_sources),
            description="Ingest, score, label, train and evaluate over a range of shards.",
            executor_def=dg.in_process_executor,
        ),
    ]
