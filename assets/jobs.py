"""Jobs that people and schedules start."""

from __future__ import annotations

import dagster as dg

from assets.ingest import CATALOGUE_TABLES, RAW, SHARD_TABLES

PREPARE, INGEST, RESCORE, RELABEL = "prepare", "ingest", "rescore", "relabel"
TRAIN, EVALUATE, EVERYTHING = "train", "evaluate", "everything"


def build_jobs() -> list[dg.UnresolvedAssetJobDefinition]:
    """Return the jobs.

    Those of short steps run in one process (a process per step costs 2 to 3 seconds); where recipes can train side by side
    on several devices, every step has its own.
    """
    everything = dg.AssetSelection.all()
    groups = dg.AssetSelection.groups
    shards = dg.AssetSelection.assets(*(t.name for t in SHARD_TABLES))
    scores = dg.AssetSelection.key_prefixes("scores")
    ingest = shards | dg.AssetSelection.assets(*(t.name for t in CATALOGUE_TABLES), "accounting")
    latents = dg.AssetSelection.assets("latents")
    return [
        _job(PREPARE, dg.AssetSelection.assets(RAW), "Write the small world, and register the sources' shards."),
        _job(INGEST, ingest, "Ingest a range of shards, and catalogue what is ingested."),
        _job(RESCORE, scores, "Score a range of shards; what is scored already is skipped."),
        _job(
            RELABEL,
            (groups("scores") - scores) | groups("labels", "store"),
            "Activate complete revisions, make every label table again that is not current, and look at drift.",
        ),
        _job(
            TRAIN,
            (groups("caches") - latents) | groups("training"),
            "Encode prompts and train every recipe (latents by shard: materialize `latents` before, or run `everything`).",
            is_short=False,
        ),
        _job(EVALUATE, groups("evaluation"), "Sample, score and compare every trained recipe.", is_short=False),
        _job(
            EVERYTHING,
            everything - dg.AssetSelection.assets(RAW),
            "Ingest, score, label, train and evaluate over a range of shards.",
            is_short=False,
        ),
    ]


def _job(
    name: str, selection: dg.AssetSelection, description: str, *, is_short: bool = True
) -> dg.UnresolvedAssetJobDefinition:
    return dg.define_asset_job(
        name,
        selection=selection,
        description=description,
        executor_def=dg.in_process_executor if is_short else None,
    )
