"""The re-scoring schedule: exactly what is due, once."""

import os
import shutil

import dagster as dg
import pytest

from assets.jobs import RELABEL, RESCORE
from assets.partitions import SHARDS
from assets.resources import Polyphony
from assets.schedules import RANGE_END, RANGE_START, THEN_RELABEL, build_schedules, ranges
from assets.scores import build_scores, score_key
from pipelines import catalogue
from pipelines.config import ScorerConfig
from pipelines.scoring import checkpoints, workers
from pipelines.tables import Store

A, B, C, D = "abcd"


@pytest.fixture(scope="module")
def scored(ingested, tiny_config, tmp_path_factory):
    """(store, configuration) of the tiny world with the scores of both scorers; read only."""
    store = Store(str(shutil.copytree(ingested[0].location, tmp_path_factory.mktemp("scored") / "store")))
    for _, result in workers.score_shards(store, tiny_config, ingested[1], tiny_config.scorers):
        assert isinstance(result, dict), result
    return store, tiny_config


class Project:
    """A scored store of its own under an instance of its own."""

    def __init__(self, scored, folder):
        self.store = Store(str(shutil.copytree(scored[0].location, folder / "store")))
        self.config = scored[1].model_copy(update={"store": self.store.location, "home": str(folder / "home")})
        self.keys = catalogue.shard_keys(self.store)
        self.instance = dg.DagsterInstance.local_temp(str(folder))
        self.instance.add_dynamic_partitions(SHARDS.name, self.keys)
        self.file = folder / "polyphony.json"

    @property
    def resource(self):
        self.file.write_text(self.config.model_dump_json())
        return Polyphony(config_file=str(self.file))

    def tick(self, loaded=None):
        """Evaluate the schedule; return the requests, or the words of the skipped tick. loaded: configuration of the assets."""
        schedule, _ = build_schedules(loaded or self.config)
        with dg.build_schedule_context(instance=self.instance, resources={"polyphony": self.resource}) as context:
            found = schedule.evaluate_tick(context)
        return found.run_requests or found.skip_message

    def job(self):
        return dg.Definitions(
            assets=[build_scores(self.config)],
            jobs=[dg.define_asset_job(RESCORE)],
            resources={"polyphony": self.resource},
        ).resolve_job_def(RESCORE)

    def run(self, request):
        return self.job().execute_in_process(
            instance=self.instance,
            tags=request.tags,
            asset_selection=list(request.asset_selection),
            raise_on_error=False,
        )

    def leave_waiting(self, request):
        """Put a requested run into the instance, as the daemon does before it starts it."""
        return self.instance.create_run_for_job(
            self.job(), tags=request.tags, asset_selection=frozenset(request.asset_selection)
        )

    def forget(self, scorer, key):
        """Remove a scorer's scores of a shard."""
        where = f"{scorer.name}/revision={checkpoints.revision(scorer)}/{key}"
        os.remove(self.store.path("_manifests", "scores", f"{where}.json"))

    def scores(self):
        """Return partition -> time of commit of everything that is scored."""
        return {m.partition: m.written_at for m in self.store.manifests("scores")}


@pytest.fixture
def project(scored, tmp_path):
    return Project(scored, tmp_path)


def asked(request):
    """Return (scorers, first shard, last shard) of a request."""
    scorers = [k.path[-1] for k in request.asset_selection]
    return scorers, request.tags[RANGE_START], request.tags[RANGE_END]


def test_neighbours_that_lack_the_same_scorers_are_one_range_and_nothing_else_is_in_it():
    assert [(r.scorers, r.shards) for r in ranges({"x": [D, A, B]}, [A, B, C, D])] == [(("x",), (A, B)), (("x",), (D,))]
    mixed = ranges({"x": [A, B, C], "y": [B]}, [C, A, B, D])
    assert [(r.scorers, r.shards) for r in mixed] == [(("x",), (C, A)), (("x", "y"), (B,))]
    assert ranges({"x": []}, [A, B]) == []


def test_nothing_due_is_a_skipped_tick_that_says_so(project):
    assert "every catalogued shard has scores" in project.tick()


def test_the_schedule_is_off_until_somebody_switches_it_on(project):
    schedule, relabelling = build_schedules(project.config)
    assert relabelling.default_status is dg.DefaultScheduleStatus.STOPPED
    assert (relabelling.cron_schedule, relabelling.job_name) == (project.config.automation.relabel_cron, RELABEL)
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert (schedule.cron_schedule, schedule.job_name) == (project.config.automation.rescore_cron, RESCORE)


def test_a_changed_revision_requests_every_shard_of_that_scorer_and_no_other(project, make_tiny_clip, tmp_path):
    weights = make_tiny_clip(tmp_path / "new-weights", seed=5)
    pickscore, clip = project.config.scorers
    changed = clip.model_copy(update={"checkpoint": str(weights)})
    project.config = project.config.model_copy(update={"scorers": (pickscore, changed)})
    (request,) = project.tick()
    assert asked(request) == (["clip"], project.keys[0], project.keys[-1])
    assert THEN_RELABEL.items() <= request.tags.items()

    before = project.scores()
    assert project.run(request).success
    after = project.scores()
    assert before.items() <= after.items(), "nothing that was there is made again"
    new = f"clip/revision={checkpoints.revision(changed)}/"
    assert set(after) - set(before) == {f"{new}{key}" for key in project.keys}
    assert "every catalogued shard has scores" in project.tick()


def test_missing_shards_of_one_scorer_are_requested_exactly(project):
    pickscore = project.config.scorers[0]
    for key in (project.keys[1], project.keys[2], project.keys[4]):
        project.forget(pickscore, key)
    first, second = project.tick()
    assert asked(first) == (["pickscore"], project.keys[1], project.keys[2])
    assert asked(second) == (["pickscore"], project.keys[4], project.keys[4])
    assert first.run_key != second.run_key

    before = project.scores()
    result = project.run(second)
    assert result.success
    assert set(project.scores()) - set(before) == {
        f"pickscore/revision={checkpoints.revision(pickscore)}/{project.keys[4]}"
    }
    made = {(m.asset_key, m.partition) for m in result.asset_materializations_for_node("scores")}
    assert made == {(score_key("pickscore"), project.keys[4])}
    assert [asked(r) for r in project.tick()] == [asked(first)]


def test_ranges_follow_the_order_of_the_partitions_and_not_that_of_the_catalogue(project):
    for key in project.keys:
        project.instance.delete_dynamic_partition(SHARDS.name, key)
    project.instance.add_dynamic_partitions(SHARDS.name, [project.keys[0], *project.keys[:0:-1]])
    for key in (project.keys[1], project.keys[-1]):
        project.forget(project.config.scorers[1], key)
    found = [asked(r) for r in project.tick()]
    assert found == [(["clip"], project.keys[-1], project.keys[-1]), (["clip"], project.keys[1], project.keys[1])]


def test_what_an_unfinished_run_scores_is_not_requested_again_and_a_failed_run_is(project):
    clip = project.config.scorers[1]
    for key in project.keys[:2]:
        project.forget(clip, key)
    (request,) = project.tick()
    waiting = project.leave_waiting(request)
    assert "not finished" in project.tick()

    project.forget(clip, project.keys[2])
    (more,) = project.tick()
    assert asked(more) == (["clip"], project.keys[2], project.keys[2])

    project.instance.report_run_failed(project.instance.get_run_by_id(waiting.run_id), "the machine went away")
    (again,) = project.tick()
    assert asked(again) == (["clip"], project.keys[0], project.keys[2])


def test_due_shards_that_are_no_partitions_are_named_and_the_others_scored(project):
    clip = project.config.scorers[1]
    gone, kept = project.keys[0], project.keys[1]
    project.instance.delete_dynamic_partition(SHARDS.name, gone)
    project.forget(clip, gone)
    said = project.tick()
    assert gone in said
    assert "raw_sources" in said
    project.forget(clip, kept)
    assert [asked(r) for r in project.tick()] == [(["clip"], kept, kept)]


def test_a_scorer_whose_files_are_missing_is_named_and_the_others_scored(project, tmp_path):
    pickscore, clip = project.config.scorers
    lost = clip.model_copy(update={"checkpoint": str(tmp_path / "nowhere")})
    project.config = project.config.model_copy(update={"scorers": (pickscore, lost)})
    assert "clip, whose files are missing" in project.tick()
    project.forget(pickscore, project.keys[0])
    assert [asked(r) for r in project.tick()] == [(["pickscore"], project.keys[0], project.keys[0])]


def test_a_store_without_a_catalogue_is_a_skipped_tick_that_names_the_job_to_run(project):
    os.rename(project.store.location, project.store.location + ".away")
    assert "run the job ingest" in project.tick()


def test_a_scorer_that_was_never_run_is_due_with_every_shard(project, tiny_clip):
    third = ScorerConfig(name="third", kind="clip", checkpoint=str(tiny_clip))
    project.config = project.config.model_copy(update={"scorers": (*project.config.scorers, third)})
    (request,) = project.tick()
    assert asked(request) == (["third"], project.keys[0], project.keys[-1])


def test_a_scorer_that_the_loaded_assets_do_not_have_is_named_and_the_others_scored(project, tiny_clip):
    loaded, pickscore = project.config, project.config.scorers[0]
    third = ScorerConfig(name="third", kind="clip", checkpoint=str(tiny_clip))
    project.config = loaded.model_copy(update={"scorers": (*loaded.scorers, third)})
    said = project.tick(loaded)
    assert "third" in said
    assert "reload" in said
    project.forget(pickscore, project.keys[0])
    assert [asked(r) for r in project.tick(loaded)] == [(["pickscore"], project.keys[0], project.keys[0])]
