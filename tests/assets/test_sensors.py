"""New source shards become partitions; finished re-scoring becomes one relabel."""

import os
import shutil

import dagster as dg
import pytest

from assets.jobs import INGEST, RELABEL, RESCORE
from assets.partitions import SHARDS
from assets.resources import Polyphony
from assets.schedules import RANGE_END, RANGE_START, THEN_RELABEL
from assets.sensors import new_source_shards, relabel_after_rescoring
from pipelines import catalogue
from pipelines.config import AutomationConfig, small_world
from pipelines.scoring import checkpoints, workers
from pipelines.sources import SourceError
from pipelines.tables import Store


class Sensors:
    """The sensors over a configuration, on an instance of their own, as the daemon evaluates them."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder
        self.instance = dg.DagsterInstance.local_temp(str(folder))
        self.cursor = None

    def tick(self, sensor):
        """Evaluate a sensor, and add the partitions that it requests."""
        file = self.folder / "polyphony.json"
        file.write_text(self.config.model_dump_json())
        resources = {"polyphony": Polyphony(config_file=str(file))}
        with dg.build_sensor_context(self.instance, cursor=self.cursor, resources=resources) as context:
            found = sensor.evaluate_tick(context)
        self.cursor = found.cursor
        for request in found.dynamic_partitions_requests or ():
            self.instance.add_dynamic_partitions(request.partitions_def_name, request.partition_keys)
        return found

    @property
    def partitions(self):
        return self.instance.get_dynamic_partitions(SHARDS.name)


# --- new source shards ---------------------------------------------------------------------------------------------


@pytest.fixture
def over_files(tiny_config, world_copy, sources_of, tmp_path):
    """Sensors over raw files that a test may add to, all of their shards registered."""
    sensors = Sensors(tiny_config.model_copy(update={"sources": sources_of(world_copy), "world": None}), tmp_path)
    sensors.tick(new_source_shards)
    assert sensors.partitions
    return sensors, world_copy / "pickapic" / "data"


def add_file(folder, name):
    shutil.copy(next(folder.glob("train-00000*")), folder / name)


def test_a_file_that_appears_becomes_a_partition_and_nothing_is_started(over_files):
    sensors, folder = over_files
    before = sensors.partitions
    assert sensors.tick(new_source_shards).skip_message == f"no new shard among {len(before)}"
    add_file(folder, "train-00077-of-00078-0123456789abcdef.parquet")
    assert sensors.tick(new_source_shards).run_requests == []
    assert sensors.partitions == [*before, "pickapic.train-00077-of-00078-0123456789abcdef"]
    assert not sensors.tick(new_source_shards).dynamic_partitions_requests


def test_with_ingest_new_shards_one_run_ingests_exactly_the_new_ones(over_files):
    sensors, folder = over_files
    before = sensors.partitions
    sensors.config = sensors.config.model_copy(update={"automation": AutomationConfig(ingest_new_shards=True)})
    for name in ("aaa.parquet", "zzz.parquet"):
        # One is listed before those that are known, one between them.
        add_file(folder, name)
    (request,) = sensors.tick(new_source_shards).run_requests
    assert new_source_shards.job_name == INGEST
    places = [sensors.partitions.index(request.tags[t]) for t in (RANGE_START, RANGE_END)]
    assert set(sensors.partitions[places[0] : places[1] + 1]) == set(sensors.partitions) - set(before)
    assert len(sensors.partitions) == len(before) + 2
    assert not sensors.tick(new_source_shards).run_requests


def test_a_shard_whose_file_is_gone_is_named_and_stays_a_partition(over_files):
    sensors, folder = over_files
    before = sensors.partitions
    file = next(folder.glob("validation-*"))
    file.unlink()
    assert f"pickapic.{file.stem}" in sensors.tick(new_source_shards).skip_message
    assert sensors.partitions == before


def test_a_source_that_cannot_be_read_fails_the_tick_with_what_is_wrong(over_files):
    sensors, folder = over_files
    shutil.rmtree(folder.parent)
    with pytest.raises(SourceError, match=f"{folder.parent}: no such folder"):
        sensors.tick(new_source_shards)


def test_a_small_world_that_is_not_written_yet_is_a_skipped_tick(tmp_path):
    sensors = Sensors(small_world(tmp_path / "home"), tmp_path)
    assert "run the job prepare" in sensors.tick(new_source_shards).skip_message


# --- relabel after re-scoring --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(ingested, tiny_config, tmp_path_factory):
    """The configuration of a store with the scores of both scorers; read only."""
    store = Store(str(shutil.copytree(ingested[0].location, tmp_path_factory.mktemp("scored") / "store")))
    for _, result in workers.score_shards(store, tiny_config, ingested[1], tiny_config.scorers):
        assert isinstance(result, dict), result
    return tiny_config.model_copy(update={"store": store.location})


class Rescoring(Sensors):
    """Runs of the job rescore of which only the statuses matter, over a scored store."""

    def __init__(self, scored, folder):
        store = shutil.copytree(scored.store, folder / "store")
        super().__init__(scored.model_copy(update={"store": str(store)}), folder)

        @dg.op
        def nothing():
            pass

        @dg.job(name=RESCORE)
        def rescore():
            nothing()

        self.job = rescore

    def start(self, tags=THEN_RELABEL):
        return self.instance.create_run_for_job(self.job, tags=tags, status=dg.DagsterRunStatus.STARTED)

    def end(self, run, success=True):
        kind = dg.DagsterEventType.RUN_SUCCESS if success else dg.DagsterEventType.RUN_FAILURE
        event = dg.DagsterEvent(kind.value, job_name=RESCORE)
        self.instance.report_dagster_event(event, run_id=run.run_id)
        return run.run_id

    def finished(self, **how):
        return self.end(self.start(), **how)

    def scores_of_one_shard(self):
        """Return the file that commits a scorer's scores of a shard."""
        store, scorer = Store(self.config.store), self.config.scorers[0]
        key = catalogue.shard_keys(store)[0]
        return store.path(
            "_manifests", "scores", scorer.name, f"revision={checkpoints.revision(scorer)}", f"{key}.json"
        )

    def requested(self):
        """Return the run keys that a tick requests, or why it requests nothing."""
        found = self.tick(relabel_after_rescoring)
        return [r.run_key for r in found.run_requests or ()] or found.skip_message


@pytest.fixture
def rescoring(scored, tmp_path):
    return Rescoring(scored, tmp_path)


def test_the_last_of_several_finished_runs_requests_one_relabel(rescoring):
    assert "no re-scoring run has finished" in rescoring.requested()
    first, second = rescoring.start(), rescoring.start()
    rescoring.end(first)
    assert rescoring.requested() == "1 re-scoring runs are not finished"
    last = rescoring.end(second)
    assert rescoring.requested() == [last]
    assert relabel_after_rescoring.job_name == RELABEL
    assert "no re-scoring run has finished" in rescoring.requested()


def test_every_round_of_re_scoring_is_relabelled_also_back_to_an_older_revision(rescoring):
    rounds = []
    for _ in range(3):
        run = rescoring.finished()
        assert rescoring.requested() == [run]
        rounds.append(run)
    assert len(set(rounds)) == 3


def test_where_scores_are_still_due_nothing_is_relabelled_until_another_run_has_made_them(rescoring):
    commit = rescoring.scores_of_one_shard()
    os.rename(commit, commit + ".gone")
    rescoring.finished()
    rescoring.finished(success=False)
    assert "still due are pickscore 1 shards" in rescoring.requested()
    os.rename(commit + ".gone", commit)
    assert "no re-scoring run has finished" in rescoring.requested(), "the failed run was decided on"
    run = rescoring.finished()
    assert rescoring.requested() == [run]


def test_a_failed_run_that_left_everything_scored_is_relabelled(rescoring):
    assert [rescoring.finished(success=False)] == rescoring.requested()


def test_a_person_who_rescores_decides_on_the_labels_himself_unless_the_run_has_the_tag(rescoring):
    rescoring.end(rescoring.start(tags={}))
    assert "no re-scoring run has finished" in rescoring.requested()
    by_hand = rescoring.end(rescoring.start(tags={**THEN_RELABEL, "user": "me"}))
    assert rescoring.requested() == [by_hand]


def test_where_it_cannot_be_said_what_is_due_the_decision_is_left_to_a_later_tick(rescoring, tmp_path):
    run, config = rescoring.finished(), rescoring.config
    os.rename(config.store, config.store + ".away")
    assert "has no catalogue" in rescoring.requested()
    os.rename(config.store + ".away", config.store)
    lost = config.scorers[1].model_copy(update={"checkpoint": str(tmp_path / "nowhere")})
    rescoring.config = config.model_copy(update={"scorers": (config.scorers[0], lost)})
    assert "clip, whose files are missing" in rescoring.requested()
    rescoring.config = config
    assert rescoring.requested() == [run]
