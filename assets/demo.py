"""`python -m assets.demo`: the whole main job on the embedded small world, through Dagster, on its own instance.

Belongs here: starting jobs and telling what came out. Does not belong here: any step of the work.
"""

from __future__ import annotations

import os
import sys
import time

import dagster as dg
import psutil

from assets.definitions import defs
from assets.jobs import EVERYTHING, PREPARE
from assets.metadata import REUSED
from assets.partitions import SHARDS
from assets.resources import Polyphony
from assets.schedules import RANGE_END, RANGE_START
from pipelines import label_card, schemas
from pipelines.config import small_world
from pipelines.tables import Store

PROCESS_TAG = "polyphony/process"


def close_killed_runs(instance: dg.DagsterInstance) -> int:
    """Mark runs as failed whose demo process is gone (a killed process cannot do so itself); return how many."""
    unfinished = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING]))
    killed = [r for r in unfinished if PROCESS_TAG in r.tags and not is_alive(r.tags[PROCESS_TAG])]
    for run in killed:
        instance.report_run_failed(run, "the process that executed this run was killed")
        # Its place in the pool `gpu` stays taken otherwise, and the next run waits for it for ever.
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return len(killed)


def this_process() -> str:
    """Return what tells this process from all others of the machine: its id and start."""
    return f"{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_alive(process: str) -> bool:
    """Return whether the process that `this_process` named still runs."""
    pid, started = process.split(":")
    try:
        # A clock step may shift what the system computes a start from; another process of that id starts far later.
        return abs(psutil.Process(int(pid)).create_time() - float(started)) < 2
    except psutil.NoSuchProcess:
        return False


def run_job(instance: dg.DagsterInstance, name: str, tags: dict[str, str]) -> dg.ExecuteInProcessResult:
    """Execute a job in this process on the real instance, so that its run, events and metadata are in the UI."""
    job = defs().resolve_job_def(name)
    return job.execute_in_process(
        instance=instance,
        tags={PROCESS_TAG: this_process(), **tags},
        raise_on_error=False,
        run_config={"loggers": {"console": {}}},
    )


def reused_count(result: dg.ExecuteInProcessResult) -> tuple[int, int]:
    """Return (tables that were found unchanged, all tables) of a run, counting a shard of a table as one."""
    flags = []
    for event in result.get_asset_materialization_events():
        materialization = event.materialization
        if REUSED in materialization.metadata:
            flags.append((event.asset_key, materialization.partition, bool(materialization.metadata[REUSED].value)))
    return sum(f for *_, f in flags), len(flags)


def main() -> int:
    """Run the demo; return its exit status."""
    started = time.monotonic()
    instance = dg.DagsterInstance.get()
    polyphony = Polyphony()
    config, store = polyphony.config, polyphony.store
    store.clear_staging()
    if killed := close_killed_runs(instance):
        print(f"{killed} run(s) of a killed process are closed; finished work is kept and not repeated", flush=True)
    reused = total = 0
    for name in (PREPARE, EVERYTHING):
        tags: dict[str, str] = {}
        if name == EVERYTHING:
            shards = instance.get_dynamic_partitions(str(SHARDS.name))
            tags = {RANGE_START: shards[0], RANGE_END: shards[-1]}
        result = run_job(instance, name, tags)
        if not result.success:
            print(f"\nerror: job {name} failed, see above; run {result.run_id} in the UI (make ui)", file=sys.stderr)
            return 1
        found, all_of_them = reused_count(result)
        reused, total = reused + found, total + all_of_them
    # A world or a training of another size promises nothing.
    shipped = small_world()
    is_as_shipped = (config.world, config.training, config.evaluation) == (
        shipped.world,
        shipped.training,
        shipped.evaluation,
    )
    return tell(store, is_as_shipped, reused, total, time.monotonic() - started)


def tell(store: Store, is_as_shipped: bool, reused: int, total: int, seconds: float) -> int:
    """Print the leaderboard, whether it is as promised, where the tables lie and how to query them.

    Returns the exit status: 1 if the small world as shipped does not show what it must.
    """
    from trainers import report

    board = store.read(schemas.LEADERBOARD)
    print("\n" + report.leaderboard_table(board))
    broken = 0
    if is_as_shipped:
        from trainers.evaluate import promises

        for what, holds in promises(board):
            print(f"\ndiffusion_dpo {what}: {'yes' if holds else 'NO'}", end="")
            broken += not holds
        print()
    if reused == total:
        print(
            f"\nAll {total} results were there already, made from the same inputs: nothing recomputed ({seconds:.0f} s)."
        )
    else:
        print(f"\n{total - reused} results computed, {reused} found unchanged, in {seconds:.0f} s.")
    print(f"\nTables: {store.location}  (what they hold: {store.path('data_dictionary.md')})")
    query = "SELECT sources, count(*) AS pairs, avg(minority_score) AS minority FROM preferences GROUP BY ALL"
    print(f'Query:  {sys.executable} -m pipelines sql "{query}"')
    print(f"        polars.read_parquet('{store.data_path('preferences')}')")
    store.publish("report.png", report.summary_picture(store, board))
    print(f"Look:   {store.path('report.png')}")
    print(f"        {store.path('pairs', 'index.html')}   (pairs that people and scorers disagree on, in a browser)")
    print(f"        {store.path(label_card.FILE)}   (who voted, agreement, what each pair policy drops)")
    print("        make ui   (runs, lineage, metadata, sample pictures; http://127.0.0.1:3000)")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
