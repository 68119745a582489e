"""Sensors that act: new source shards become partitions, finished re-scoring becomes one relabel.

Belongs here: when a run or a partition is requested. Does not belong here: telling people (`alerts`).
"""

import dagster as dg

from assets.jobs import INGEST, RELABEL, RESCORE
from assets.partitions import SHARDS
from assets.resources import Polyphony
from assets.schedules import RANGE_END, RANGE_START, REASON, THEN_RELABEL, UNFINISHED, due_scores
from pipelines import ingest

FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


@dg.sensor(
    job_name=INGEST,
    minimum_interval_seconds=300,
    # It lists file names (of some layouts it reads footers too) and starts nothing unless it is told to.
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Registers new shards of the sources as partitions; with automation.ingest_new_shards it also requests one "
    "run that ingests exactly these. Shards whose file is gone stay until raw_sources is materialized.",
)
def new_source_shards(context: dg.SensorEvaluationContext, polyphony: Polyphony) -> dg.SensorResult | dg.SkipReason:
    """Compare the sources' shards with the instance's partitions.

    Raises:
        SourceError: a source cannot be read. The tick fails, for people see failed ticks and overlook skipped ones.
    """
    config = polyphony.config
    if config.world is not None and not (config.world_folder / "world.json").exists():
        return dg.SkipReason("the small world is not written yet; run the job prepare")
    listed = [s.key for s in ingest.list_shards(config)]
    known = context.instance.get_dynamic_partitions(str(SHARDS.name))
    present, registered = set(listed), set(known)
    new = [k for k in listed if k not in registered]
    if gone := [k for k in known if k not in present]:
        context.log.info(f"{len(gone)} partitions without a file: {', '.join(gone)}; raw_sources removes them")
    if not new:
        more = f", {len(gone)} partitions have no file any more ({', '.join(gone[:5])})" if gone else ""
        return dg.SkipReason(f"no new shard among {len(listed)}{more}")
    context.log.info(f"{len(new)} new shards: {', '.join(new)}")
    # New partitions come last, so that they are one range.
    tags = {RANGE_START: new[0], RANGE_END: new[-1], REASON: f"{len(new)} new shards"}
    return dg.SensorResult(
        dynamic_partitions_requests=[SHARDS.build_add_request(new)],
        run_requests=[dg.RunRequest(tags=tags)] if config.automation.ingest_new_shards else [],
    )


@dg.sensor(
    job_name=RELABEL,
    minimum_interval_seconds=60,
    # One switch for both: without the schedule no run carries the tag that it waits for.
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="When the last run of rescore that carries the tag polyphony/then = relabel is finished and no scores are "
    "due, requests one relabel. The schedule rescoring sets the tag; in the Launchpad you can, too.",
)
def relabel_after_rescoring(
    context: dg.SensorEvaluationContext, polyphony: Polyphony
) -> dg.SensorResult | dg.SkipReason:
    """Decide once per finished run that was the last; the cursor holds its end.

    Not a run status sensor: where its evaluation fails, the run that it was about is never looked at again.
    """
    instance = context.instance
    unfinished = instance.get_runs_count(dg.RunsFilter(job_name=RESCORE, tags=THEN_RELABEL, statuses=UNFINISHED))
    if unfinished:
        return dg.SkipReason(f"{unfinished} re-scoring runs are not finished")
    finished = dg.RunsFilter(job_name=RESCORE, tags=THEN_RELABEL, statuses=FINISHED)
    last = instance.get_run_records(finished, limit=1, order_by="end_time")
    ended = last[0].end_time or 0.0 if last else 0.0
    if ended <= float(context.cursor or 0):
        return dg.SkipReason("no re-scoring run has finished since the last relabel was decided on")
    due, problem = due_scores(polyphony)
    if problem:
        return dg.SkipReason(f"not relabelled: {problem}")
    if any(due.values()):
        left = ", ".join(f"{scorer} {len(shards)} shards" for scorer, shards in due.items() if shards)
        return dg.SensorResult(skip_reason=f"not relabelled: still due are {left}; see failed runs", cursor=repr(ended))
    request = dg.RunRequest(run_key=last[0].dagster_run.run_id, tags={REASON: "re-scoring is finished"})
    return dg.SensorResult(run_requests=[request], cursor=repr(ended))
