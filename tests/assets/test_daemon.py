"""A real daemon with a code server: the re-scoring schedule from due shards to labels, and a kill while it trains."""

import os
import signal

import pytest

from pipelines.config import AutomationConfig, TrainingConfig, ValidationConfig

pytestmark = pytest.mark.slow

DAEMON = ("dagster-daemon", "run", "-m", "assets.definitions")
RANGE_START, RANGE_END, PARTITION = (
    "dagster/asset_partition_range_start",
    "dagster/asset_partition_range_end",
    "dagster/partition",
)
START = """
mutation ($schedule: ScheduleSelector!, $sensor: SensorSelector!) {
  startSchedule(scheduleSelector: $schedule) {
    __typename
    ... on ScheduleStateResult { scheduleState { status } }
    ... on PythonError { message }
  }
  startSensor(sensorSelector: $sensor) {
    __typename
    ... on Sensor { sensorState { status } }
    ... on PythonError { message }
  }
}
"""


def switch_on(dagster, schedule, sensor):
    where = {"repositoryLocationName": "assets.definitions", "repositoryName": "__repository__"}
    answer = dagster.ask(START, schedule={**where, "scheduleName": schedule}, sensor={**where, "sensorName": sensor})
    assert answer["startSchedule"]["scheduleState"]["status"] == "RUNNING", answer
    assert answer["startSensor"]["sensorState"]["status"] == "RUNNING", answer


def shards_of(run, partitions):
    """Return the shards that a run was requested for."""
    first = run.tags.get(RANGE_START) or run.tags[PARTITION]
    last = run.tags.get(RANGE_END) or first
    return partitions[partitions.index(first) : partitions.index(last) + 1]


@pytest.fixture(scope="module")
def rescored(build_home, dagster_over, eventually, left_after, tiny_world_config, tmp_path_factory):
    """A home where a scorer's revision changed, half of the shards were scored by hand and a daemon did the rest."""
    every_minute = AutomationConfig(rescore_cron="* * * * *")
    home = build_home(tmp_path_factory.mktemp("rescored") / "home", tiny_world_config, automation=every_minute)
    home.revisions = home.store.current_revisions()
    *others, brightness = home.config.scorers
    changed = brightness.model_copy(update={"revision": "2"})
    home.configure(home.config.model_copy(update={"scorers": (*others, changed)}))
    home.run("pipelines", "score", "--scorers", brightness.name, "--part", "2/2")
    by_hand = home.store.manifests("scores", f"{brightness.name}/")
    old = f"revision={home.revisions[brightness.name]}"
    home.by_hand = {m.partition.rsplit("/", 1)[1] for m in by_hand if old not in m.partition}
    with dagster_over(home) as dagster:
        assert dagster.finish(dagster.launch("prepare")) == "SUCCESS"
        home.shards = list(dagster.instance.get_dynamic_partitions("shards"))
        mine = set(home.processes())
        with home.serving(*DAEMON, log="daemon.txt") as daemon:
            switch_on(dagster, "rescoring", "relabel_after_rescoring")

            def runs(job):
                return [r for r in dagster.instance.get_runs() if r.job_name == job]

            def told():
                seen = [(r.job_name, r.status.value, dict(r.tags)) for r in dagster.instance.get_runs()]
                return f"{seen}; the daemon said: {home.said('daemon.txt')}"

            eventually(lambda: runs("relabel") and runs("relabel")[-1].is_finished, 240, told)
            ended = dagster.instance.get_run_record_by_id(runs("relabel")[-1].run_id).end_time
            first = min(dagster.instance.get_run_record_by_id(r.run_id).create_timestamp for r in runs("rescore"))
            print(f"\nfrom the first request to labels: {ended - first.timestamp():.0f} s, {len(runs('rescore'))} runs")

            def last_tick():
                (state,) = [s for s in dagster.instance.all_instigator_state() if s.instigator_name == "rescoring"]
                (tick,) = dagster.instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=1)
                return tick if tick.timestamp > ended and tick.status.value != "STARTED" else None

            home.tick_after = eventually(last_tick, 120, told)
            home.rescore_runs, home.relabel_runs = runs("rescore"), runs("relabel")
            home.interrupt(daemon)
            home.daemon_status = daemon.poll()
            home.left = left_after(lambda: set(home.processes()) - mine, 60)
    return home


def test_exactly_the_due_shards_are_requested_and_each_once(rescored):
    requested = [s for run in rescored.rescore_runs for s in shards_of(run, rescored.shards)]
    due = set(rescored.shards) - rescored.by_hand
    assert 0 < len(due) < len(rescored.shards)
    assert sorted(requested) == sorted(due)
    assert {run.status.value for run in rescored.rescore_runs} == {"SUCCESS"}
    scored = {key.to_user_string() for run in rescored.rescore_runs for key in run.asset_selection}
    assert scored == {"scores/brightness"}


def test_one_relabel_follows_and_the_next_tick_finds_nothing_due(rescored):
    assert [run.status.value for run in rescored.relabel_runs] == ["SUCCESS"]
    assert rescored.tick_after.status.value == "SKIPPED"


def test_the_new_revision_is_active_and_the_labels_are_made_of_it(rescored):
    now = rescored.store.current_revisions()
    assert now["brightness"] != rescored.revisions["brightness"]
    assert {k: v for k, v in now.items() if k != "brightness"} == {
        k: v for k, v in rescored.revisions.items() if k != "brightness"
    }
    scored = {m.partition for m in rescored.store.manifests("scores", f"brightness/revision={now['brightness']}/")}
    assert scored == {f"brightness/revision={now['brightness']}/{shard}" for shard in rescored.shards}
    said = rescored.run("pipelines", "label").splitlines()
    tables = [line for line in said if " rows" in line]
    assert len(tables) > 8
    assert [line for line in tables if "unchanged" not in line] == []


def test_an_interrupted_daemon_ends_and_leaves_no_process(rescored):
    assert rescored.daemon_status is not None, "it did not end within 30 s"
    assert rescored.left == set()


def test_nothing_of_a_trainer_is_left_ten_seconds_after_its_daemon_was_killed(
    build_home, dagster_over, eventually, left_after, tiny_world_config, tmp_path
):
    endless = TrainingConfig(
        recipes=("diffusion_dpo",), device="cpu", steps=1_000_000, validation=ValidationConfig(every=0)
    )
    home = build_home(tmp_path / "home", tiny_world_config, training=endless)
    home.run("trainers.train", "cache")

    def trainers():
        return home.processes("trainers.train")

    with dagster_over(home) as dagster, home.serving(*DAEMON, log="daemon.txt") as daemon:
        run_id = dagster.launch(assets=[["trained", "diffusion_dpo"]])

        def trains():
            return trainers() and list((home.folder / "runs").rglob("metrics.jsonl"))

        eventually(trains, 120, lambda: f"the run is {dagster.status(run_id)}; {home.said('daemon.txt')}")
        tree = {p for trainer in trainers() for p in (trainer, *trainer.children(recursive=True))}
        os.kill(daemon.pid, signal.SIGKILL)
        assert left_after(lambda: (tree | set(trainers())) & set(home.processes()), 10) == set()
