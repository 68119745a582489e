"""The maintenance job: removes what nobody needs any more, and says what it removed and what it kept.

Dagster's event log grows for ever, revisions of scores are never overwritten. Belongs here: the job, its form and its
schedule; Dagster's own runs. Does not belong here: which revisions and launches may go (`pipelines.retention`).
"""

import datetime as dt
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
from pydantic import Field

from assets.resources import Polyphony
from pipelines import retention
from pipelines.config import AutomationConfig, Config

_OPTIONS = AutomationConfig.model_fields
_RECORDS = 500
_WAIT_SECONDS = 30.0


class Maintenance(dg.Config):
    """The form in the Launchpad."""

    keep_run_days: float = Field(gt=0, description=_OPTIONS["keep_run_days"].description)
    keep_revisions: int = Field(ge=1, description=_OPTIONS["keep_revisions"].description)
    dry_run: bool = Field(default=False, description="say what would be removed, and remove nothing")


def build_maintenance(config: Config) -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    """Return the job `maintenance`, with the configuration's numbers in its form, and its schedule (off)."""
    automation = config.automation
    form = Maintenance(keep_run_days=automation.keep_run_days, keep_revisions=automation.keep_revisions)

    @dg.job(
        description="Removes old runs with their events and logs, old revisions of scores and old launches. Runs that hold "
        "the latest materialization of anything stay.",
        config=dg.RunConfig(ops={"prune": form}),
        executor_def=dg.in_process_executor,
    )
    def maintenance() -> None:
        prune()

    schedule = dg.ScheduleDefinition(
        name="maintenance_schedule",
        job=maintenance,
        cron_schedule=automation.maintenance_cron,
        execution_timezone=automation.timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Runs the job maintenance with the numbers of the configuration.",
    )
    return maintenance, schedule


@dg.op(out=dg.Out(dg.Nothing))
def prune(context: dg.OpExecutionContext, config: Maintenance, polyphony: Polyphony) -> None:
    """Remove old runs, revisions of scores and launches; the numbers are metadata of the op's output."""
    runs = prune_runs(context.instance, config.keep_run_days, dry_run=config.dry_run)
    context.log.info(runs.text(config.dry_run))
    if runs.removed and not config.dry_run:
        context.log.info(compact(context.instance))
    present = polyphony.config
    scores = retention.prune_scores(polyphony.store, present, config.keep_revisions, dry_run=config.dry_run)
    launches = retention.prune_launches(present.home, config.keep_run_days, dry_run=config.dry_run)
    for removed in (*scores, *launches):
        context.log.info(removed.text)
    context.add_output_metadata(
        {
            "dry_run": config.dry_run,
            "runs_removed": len(runs.removed),
            "runs_kept_for_latest_events": len(runs.kept),
            "revisions_removed": len(scores),
            "launches_removed": len(launches),
            "bytes_of_revisions_and_launches": sum(r.bytes for r in (*scores, *launches)),
        }
    )


@dataclass(frozen=True)
class PrunedRuns:
    """Ids of finished runs older than asked: removed ones, and kept ones, which hold what is latest of an asset."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]

    def text(self, is_dry: bool) -> str:
        """Return the sentence for the log."""
        return (
            f"runs: {len(self.removed)} {'would be removed' if is_dry else 'removed'} with their events and logs, "
            f"{len(self.kept)} as old kept for the latest events of assets"
        )


def prune_runs(instance: dg.DagsterInstance, keep_days: float, *, dry_run: bool) -> PrunedRuns:
    """Delete the runs that finished more than `keep_days` days ago, with their events and compute logs.

    A run that holds the latest materialization of any asset or partition, or an asset's latest observation, stays:
    deleting it would make the asset look as if it had never been made. Results of checks outlive their runs.
    """
    finished = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
    before = dt.datetime.now(dt.UTC) - dt.timedelta(days=keep_days)
    old = [
        r.dagster_run.run_id for r in instance.get_run_records(dg.RunsFilter(statuses=finished, updated_before=before))
    ]
    needed = runs_of_latest_events(instance) if old else set()
    removed = tuple(r for r in old if r not in needed)
    if not dry_run:
        for run_id in removed:
            _delete(instance, run_id)
    return PrunedRuns(removed, tuple(r for r in old if r in needed))


def runs_of_latest_events(instance: dg.DagsterInstance) -> set[str]:
    """Return the runs with the latest materialization of every asset and partition and every asset's latest observation."""
    found: set[str] = set()
    for asset in instance.all_asset_keys():
        latest = instance.get_latest_storage_id_by_partition(asset, dg.DagsterEventType.ASSET_MATERIALIZATION)
        ids = sorted(latest.values())
        for start in range(0, len(ids), _RECORDS):
            some = dg.AssetRecordsFilter(asset, storage_ids=ids[start : start + _RECORDS])
            found.update(r.run_id for r in instance.fetch_materializations(some, limit=_RECORDS).records)
        found.update(r.run_id for r in instance.fetch_materializations(asset, limit=1).records)
        found.update(r.run_id for r in instance.fetch_observations(asset, limit=1).records)
    return found


def _delete(instance: dg.DagsterInstance, run_id: str) -> None:
    instance.compute_log_manager.delete_logs(prefix=[run_id])
    instance.delete_run(run_id)
    if instance.event_log_storage.is_run_sharded:
        # SQLite: a file per run, which is left behind empty.
        for file in _files(instance, run_id):
            file.unlink(missing_ok=True)


def compact(instance: dg.DagsterInstance) -> str:
    """Give the space of deleted events back to the disk where the event log is SQLite; return a sentence for the log."""
    if not instance.event_log_storage.is_run_sharded:
        return "event log: not SQLite, its database looks after its space"
    index = _files(instance, "index")[0]
    before = index.stat().st_size
    try:
        with closing(sqlite3.connect(index, timeout=_WAIT_SECONDS, isolation_level=None)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.OperationalError as error:
        return f"event log: {index} is in use ({error}); its free space is filled by new events"
    return f"event log: {index} had {before / 1e6:.1f} MB, has {index.stat().st_size / 1e6:.1f} MB"


def _files(instance: dg.DagsterInstance, shard: str) -> Sequence[Path]:
    # What is cut by run is SQLite, which alone has this method.
    path = instance.event_log_storage.path_for_shard(shard)  # type: ignore[attr-defined]
    return [Path(path + suffix) for suffix in ("", "-wal", "-shm")]
