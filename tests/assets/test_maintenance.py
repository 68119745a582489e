"""Maintenance removes old runs and revisions, and nothing that an asset's state rests on."""

import json
import os
import time
from pathlib import Path

import dagster as dg
import pydantic
import pytest

from assets.maintenance import build_maintenance, compact, prune_runs
from assets.partitions import SHARDS
from assets.resources import Polyphony
from pipelines import schemas
from pipelines.config import AutomationConfig
from pipelines.tables import Store

OLD = 1e-9
"""Days after which every finished run of a test is old."""
A, B = "a", "b"


@dg.asset(check_specs=[dg.AssetCheckSpec("is_sound", asset="whole")])
def whole():
    print("a line in a compute log")
    yield dg.MaterializeResult(
        metadata={"n": 1}, check_results=[dg.AssetCheckResult(passed=True, check_name="is_sound")]
    )


@dg.asset(partitions_def=SHARDS)
def by_shard():
    return dg.MaterializeResult()


@pytest.fixture
def instance(tmp_path):
    instance = dg.DagsterInstance.local_temp(str(tmp_path))
    instance.add_dynamic_partitions(SHARDS.name, [A, B])
    return instance


def make(instance, asset, partition=None):
    result = dg.materialize([asset], instance=instance, partition_key=partition)
    assert result.success
    return result.run_id


def files_of(instance, run_id):
    """Return the files of a run: its events and its logs."""
    return [f for f in Path(instance.root_directory).rglob("*") if run_id in str(f) and f.is_file()]


def run_ids(instance):
    return {r.run_id for r in instance.get_runs()}


def test_old_runs_go_with_their_files_and_the_latest_materialization_of_every_partition_stays(instance):
    superseded = [make(instance, whole), make(instance, by_shard, A), make(instance, by_shard, A)]
    latest = [make(instance, by_shard, A), make(instance, by_shard, B), make(instance, whole)]
    check = dg.AssetCheckKey(whole.key, "is_sound")
    assert all(files_of(instance, r) for r in superseded)

    done = prune_runs(instance, OLD, dry_run=False)

    assert set(done.removed) == set(superseded)
    assert set(done.kept) == run_ids(instance) == set(latest)
    assert not any(files_of(instance, r) for r in superseded)
    events = [e for asset in (whole, by_shard) for e in instance.fetch_materializations(asset.key, limit=100).records]
    assert {e.run_id for e in events} == set(latest)
    assert instance.get_materialized_partitions(by_shard.key) == {A, B}
    materialized = instance.get_latest_materialization_event(whole.key)
    assert materialized.run_id == latest[2]
    assert materialized.asset_materialization.metadata["n"].value == 1
    assert instance.get_latest_asset_check_evaluation_record(check).status.value == "SUCCEEDED"
    status = instance.get_status_by_partition(by_shard.key, [A, B], SHARDS)
    assert {k: v.value for k, v in status.items()} == {A: "MATERIALIZED", B: "MATERIALIZED"}
    assert any("STEP_SUCCESS" in str(e.dagster_event_type) for e in instance.all_logs(latest[2]) if e.is_dagster_event)
    assert prune_runs(instance, OLD, dry_run=False).removed == ()


def test_the_result_of_a_check_outlives_its_run(instance):
    @dg.asset_check(asset=whole)
    def seldom():
        return dg.AssetCheckResult(passed=False, metadata={"share": 0.3})

    checks = dg.Definitions(
        assets=[whole], asset_checks=[seldom], jobs=[dg.define_asset_job("look", dg.AssetSelection.checks(seldom))]
    )
    run = checks.resolve_job_def("look").execute_in_process(instance=instance).run_id
    assert prune_runs(instance, OLD, dry_run=False).removed == (run,)
    record = instance.get_latest_asset_check_evaluation_record(dg.AssetCheckKey(whole.key, "seldom"))
    assert record.event.dagster_event.event_specific_data.metadata["share"].value == 0.3


def test_young_and_unfinished_runs_and_the_latest_observation_stay(instance):
    @dg.op
    def look(context):
        context.log_event(dg.AssetObservation("watched"))

    @dg.job
    def watch():
        look()

    observed = [watch.execute_in_process(instance=instance).run_id for _ in range(2)]
    job = dg.Definitions(assets=[whole]).resolve_implicit_global_asset_job_def()
    waiting = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED).run_id
    assert prune_runs(instance, 1, dry_run=False).removed == ()
    assert set(prune_runs(instance, OLD, dry_run=False).removed) == {observed[0]}
    assert run_ids(instance) == {observed[1], waiting}


def test_failed_and_canceled_runs_go(instance):
    @dg.asset
    def bad():
        raise ValueError("no")

    failed = dg.materialize([bad], instance=instance, raise_on_error=False).run_id
    assert prune_runs(instance, OLD, dry_run=False).removed == (failed,)
    assert instance.get_runs() == []


def test_a_dry_run_says_the_same_and_removes_nothing(instance):
    runs = {make(instance, whole) for _ in range(3)}
    dry = prune_runs(instance, OLD, dry_run=True)
    assert run_ids(instance) == runs
    assert all(files_of(instance, r) for r in runs)
    assert "2 would be removed" in dry.text(is_dry=True)
    assert prune_runs(instance, OLD, dry_run=False) == dry


def test_the_event_log_gives_the_space_of_removed_events_back(instance):
    @dg.asset
    def talkative():
        return dg.MaterializeResult(metadata={"picture": "x" * 200_000})

    runs = [make(instance, talkative) for _ in range(20)]
    index = Path(instance.event_log_storage.path_for_shard("index"))
    compact(instance)
    before = index.stat().st_size
    prune_runs(instance, OLD, dry_run=False)
    said = compact(instance)
    assert index.stat().st_size < before / 4, said
    assert instance.get_latest_materialization_event(talkative.key).run_id == runs[-1]
    make(instance, talkative)


def test_a_log_that_is_no_sqlite_file_is_left_alone():
    assert "not SQLite" in compact(dg.DagsterInstance.ephemeral())


# --- the job -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(instance, tiny_config, tmp_path):
    """Return (run(**options) of the job, store) over a store with four revisions of the scorer clip from long ago."""
    store = Store(str(tmp_path / "store"))
    for i in range(4):
        where = f"clip/revision={i:012x}/shard"
        store.write(schemas.SCORES, schemas.SCORES.empty(), partition=where, made_from="x")
        file = f"_manifests/scores/{where}.json"
        commit = {**store.read_json(file), "written_at": time.time() - (50 - i) * 86_400}
        store.publish(file, json.dumps(commit).encode())
    store.publish("scores/current.json", json.dumps({"revisions": {"clip": f"{0:012x}"}}).encode())
    launch = tmp_path / "home" / "launches" / "0123"
    launch.mkdir(parents=True)
    os.utime(launch, (0, 0))
    config = tiny_config.model_copy(update={"store": store.location, "home": str(tmp_path / "home")})
    file = tmp_path / "polyphony.json"
    file.write_text(config.model_dump_json())
    job, _ = build_maintenance(config)
    definitions = dg.Definitions(jobs=[job], resources={"polyphony": Polyphony(config_file=str(file))})

    def run(**options):
        form = {"keep_run_days": OLD, "keep_revisions": 2, **options}
        return definitions.resolve_job_def(job.name).execute_in_process(
            instance=instance, run_config={"ops": {"prune": {"config": form}}}
        )

    return run, store, launch


def revisions(store):
    return {int(m.partition.split("/")[1].removeprefix("revision="), 16) for m in store.manifests("scores")}


def numbers(result):
    (event,) = [e for e in result.all_node_events if e.is_successful_output]
    return {k: v.value for k, v in event.step_output_data.metadata.items()}


def test_the_job_removes_runs_revisions_and_launches_and_reports_the_numbers(project, instance):
    run, store, launch = project
    superseded, latest = make(instance, whole), make(instance, whole)
    dry = numbers(run(dry_run=True))
    assert (dry["dry_run"], dry["runs_removed"], dry["runs_kept_for_latest_events"]) == (True, 1, 1)
    assert {superseded, latest} <= run_ids(instance)
    assert revisions(store) == {0, 1, 2, 3}
    assert launch.exists()

    result = run()
    found = numbers(result)
    # The dry run is old by now, too.
    assert (found["dry_run"], found["runs_removed"], found["runs_kept_for_latest_events"]) == (False, 2, 1)
    assert (found["revisions_removed"], found["launches_removed"]) == (2, 1)
    assert found["revisions_removed"] == dry["revisions_removed"]
    assert run_ids(instance) == {latest, result.run_id}
    assert revisions(store) == {0, 3}, "the active one and the newest"
    assert not launch.exists()


def test_nobody_can_ask_for_less_than_the_active_revision(project):
    run, store, _ = project
    with pytest.raises(pydantic.ValidationError, match="keep_revisions"):
        run(keep_revisions=0)
    assert revisions(store) == {0, 1, 2, 3}


def test_the_form_has_the_configurations_numbers_and_the_schedule_is_off(tiny_config):
    automation = AutomationConfig(
        keep_run_days=12, keep_revisions=3, maintenance_cron="1 2 * * 3", timezone="Asia/Tokyo"
    )
    job, schedule = build_maintenance(tiny_config.model_copy(update={"automation": automation}))
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("1 2 * * 3", "Asia/Tokyo")
    fields = (
        job.run_config_schema.config_type.fields["ops"]
        .config_type.fields["prune"]
        .config_type.fields["config"]
        .config_type.fields
    )
    assert set(fields) == {"keep_run_days", "keep_revisions", "dry_run"}
    assert all(f.description for f in fields.values())
