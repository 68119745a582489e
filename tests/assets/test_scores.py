"""The scores assets: one per scorer, and one process that decodes once for the selected ones."""

import contextlib
import re
import signal
import threading
import time
from pathlib import Path

import dagster as dg
import psutil
import pytest

from assets.labels import build_labels
from assets.partitions import SHARDS
from assets.resources import Polyphony
from assets.scores import build_scores, score_key
from pipelines import catalogue, ingest, schemas
from pipelines import config as configuration
from pipelines.scoring import checkpoints
from pipelines.tables import Store


@pytest.fixture
def project_over(tiny_config, tmp_path):
    """Return a function: (store, shard keys) -> materialize(scorers, workers, selection)."""

    def over(store, keys):
        instance = dg.DagsterInstance.ephemeral()
        instance.add_dynamic_partitions(str(SHARDS.name), keys)

        def run(scorers=None, workers=1, selection=None, labels=False, **options):
            config = tiny_config.model_copy(
                update={
                    "store": store.location,
                    "home": str(tmp_path / "home"),
                    "scoring": configuration.ScoringConfig(workers=workers, device="cpu"),
                    "scorers": scorers or tiny_config.scorers,
                }
            )
            file = tmp_path / "polyphony.json"
            file.write_text(config.model_dump_json())
            tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
            return dg.materialize(
                [build_labels(config)[0]] if labels else [build_scores(config)],
                resources={"polyphony": Polyphony(config_file=str(file))},
                instance=instance,
                selection=None if selection is None else [score_key(s) for s in selection],
                tags={} if labels else tags,
                run_config={"ops": {"scores": {"config": options}}} if options else None,
                raise_on_error=False,
            )

        return run, instance

    return over


@pytest.fixture
def project(ingested_copy, project_over):
    """Return materialize over the ingested tiny world, the store and its shards."""
    store, keys = ingested_copy
    run, _ = project_over(store, keys)
    return run, store, keys


def launches(tmp_path):
    return list((tmp_path / "home").glob("launches/*/scores.log"))


def rows_of(result, scorer, key):
    events = [
        e.materialization
        for e in result.get_asset_materialization_events()
        if e.asset_key == score_key(scorer) and e.materialization.partition == key
    ]
    return events[-1].metadata["dagster/partition_row_count"].value


@pytest.mark.parametrize("workers", [1, 2])
def test_a_range_of_shards_is_one_run_with_metadata_per_scorer_and_shard(project, tiny_config, workers):
    run, store, keys = project
    result = run(workers=workers)
    assert result.success
    for scorer in tiny_config.scorers:
        revision = checkpoints.revision(scorer)
        commits = {
            m.partition.rsplit("/", 1)[1]: m for m in store.manifests("scores", f"{scorer.name}/revision={revision}/")
        }
        assert set(commits) == set(keys)
        for key in keys:
            assert rows_of(result, scorer.name, key) == commits[key].rows


def test_a_run_scores_the_selected_scorers_alone_and_decodes_no_image_that_is_scored(project):
    run, store, _ = project
    assert run(selection=["clip"]).success
    clip = {m.partition: m for m in store.manifests("scores")}
    assert {p.split("/")[0] for p in clip} == {"clip"}
    assert store.current_revisions() == {}, "a subset activates nothing"
    assert run().success
    both = {m.partition: m for m in store.manifests("scores")}
    assert {p: m.content for p, m in both.items() if p in clip} == {p: m.content for p, m in clip.items()}
    prepared = [sum(m.extra["images_prepared"] for m in found) for found in (clip.values(), both.values())]
    images = sum(len(store.read(schemas.SCORES, p)["image_id"].unique()) for p in clip)
    assert prepared == [images, 2 * images]


def test_nothing_is_started_where_nothing_is_to_be_done(project, tmp_path):
    run, _, keys = project
    assert run().success
    assert len(launches(tmp_path)) == 1
    again = run()
    assert again.success
    assert len(launches(tmp_path)) == 1
    events = [e.materialization for e in again.get_asset_materialization_events()]
    assert len(events) == 2 * len(keys)
    assert all(e.metadata["polyphony/is_unchanged"].value for e in events)


def test_the_speed_is_observed_on_every_scorer(project, tiny_config):
    run, _, keys = project
    observed = {e.asset_key: e.asset_observation_data for e in run().get_asset_observation_events()}
    assert set(observed) == {score_key(s.name) for s in tiny_config.scorers}
    for data in observed.values():
        values = {k: v.value for k, v in data.asset_observation.metadata.items()}
        assert values["shards_done"] == len(keys)
        assert values["images_per_second"] > 0


@pytest.fixture
def referred(world_copy, sources_of, tmp_path):
    """(store, shard keys, the raw file of the first shard) of pickapic, whose images stay in the raw files."""
    store, source = Store(str(tmp_path / "referred")), sources_of(world_copy)[0]
    plan = ingest.plan(source, images_config=configuration.ImagesConfig(storage="reference"))
    shards = ingest.LAYOUTS[source.layout].list_shards(source)
    for shard in shards:
        ingest.ingest_shard(store, plan, shard)
    keys = [s.key for s in shards]
    catalogue.build(store, keys)
    return store, keys, store.read(schemas.IMAGES, keys[0])["uri"][0]


# A file that the system refuses to whoever opens it; root, as which tests may run, is refused nothing.
REFUSE = """
import builtins

real = builtins.open


def refuse(file, *arguments, **options):
    if file == {file!r}:
        raise PermissionError(13, "Permission denied", file)
    return real(file, *arguments, **options)


builtins.open = refuse
"""


def test_a_shard_that_cannot_be_read_costs_that_shard_and_the_run(referred, project_over, tmp_path, monkeypatch):
    store, keys, file = referred
    run, instance = project_over(store, keys)
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "sitecustomize.py").write_text(REFUSE.format(file=file))
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "system"))
        result = run()
    assert not result.success
    failure = next(e for e in result.all_events if e.is_step_failure)
    assert f"{file}: cannot be read" in str(failure.event_specific_data)
    assert not any(e.event_type_value == "STEP_UP_FOR_RETRY" for e in result.all_events)
    assert {m.partition.rsplit("/", 1)[1] for m in store.manifests("scores")} == set(keys[1:])
    assert instance.get_materialized_partitions(score_key("clip")) == set(keys[1:])
    assert run().success
    assert instance.get_materialized_partitions(score_key("clip")) == set(keys)


def test_active_scores_switch_only_when_every_shard_is_scored(project, tiny_config):
    run, store, _ = project
    assert not run(labels=True).success
    assert store.current_revisions() == {}
    assert run().success
    assert run(labels=True).success
    assert store.current_revisions() == {s.name: checkpoints.revision(s) for s in tiny_config.scorers}


def test_a_limit_scores_some_shards_by_the_selected_scorers_and_the_next_run_the_others(ingested_copy, project_over):
    store, keys = ingested_copy
    run, instance = project_over(store, keys)
    result = run(selection=["clip"], limit=2, batch_size=3)
    assert result.success
    assert {m.partition.rsplit("/", 1)[1] for m in store.manifests("scores")} == set(keys[:2])
    assert instance.get_materialized_partitions(score_key("clip")) == set(keys[:2])
    checked = result.get_asset_check_evaluations()
    assert {e.asset_key for e in checked} == {score_key("clip")}
    assert all(e.passed for e in checked)
    before = {m.partition: m.content for m in store.manifests("scores")}
    assert run(selection=["clip"], limit=len(keys)).success
    assert instance.get_materialized_partitions(score_key("clip")) == set(keys)
    after = {m.partition: m.content for m in store.manifests("scores")}
    assert {p: after[p] for p in before} == before


def test_a_dry_run_scores_nothing_and_materializes_nothing(ingested_copy, project_over, tmp_path):
    store, keys = ingested_copy
    run, instance = project_over(store, keys)
    before = {p for p in Path(store.location).rglob("*") if p.is_file()}
    result = run(dry_run=True)
    assert result.success
    assert {p for p in Path(store.location).rglob("*") if p.is_file()} == before
    said = "\n".join(e.user_message for e in instance.all_logs(result.run_id))
    pairs = store.require("catalogue_scorables").rows
    for scorer in ("pickscore", "clip"):
        (line,) = re.findall(rf"^{scorer} .*$", said, re.MULTILINE)
        assert re.search(rf" {pairs:,} +{pairs:,} +{len(keys)} ", line), line
    assert not store.manifests("scores")
    assert launches(tmp_path) == []
    assert result.get_asset_materialization_events() == []
    assert instance.get_materialized_partitions(score_key("clip")) == set()


def kill_one_worker(killed):
    """Kill the first process of several that score."""
    for _ in range(4000):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    return
        time.sleep(0.02)


def test_scoring_of_which_one_worker_was_killed_is_repeated_by_itself(ingested_copy, project_over):
    store, keys = ingested_copy
    run, instance = project_over(store, keys)
    killed = []
    killer = threading.Thread(target=kill_one_worker, args=(killed,))
    killer.start()
    result = run(workers=2)
    killer.join()
    assert len(killed) == 1
    assert result.success, [str(e.event_specific_data) for e in result.all_events if e.is_step_failure]
    assert [e.event_type_value for e in result.all_events].count("STEP_UP_FOR_RETRY") == 1
    assert instance.get_materialized_partitions(score_key("clip")) == set(keys)
