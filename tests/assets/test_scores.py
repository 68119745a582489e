"""The scores assets: one per scorer, a run decodes once for the selected ones."""

import tomllib

import dagster as dg
import pytest

from assets.labels import build_labels
from assets.partitions import SHARDS
from assets.resources import Polyphony
from assets.scores import build_scores, score_key
from pipelines import config as configuration
from pipelines import images, stored
from pipelines.scoring import checkpoints
from pipelines.sources import SourceError


def toml_of(config):
    """Return what the tests vary of a configuration as TOML."""
    lines = [f'home = "{config.home}"', f'store = "{config.store}"']
    for table, parts in (("sources", config.sources), ("scorers", config.scorers), ("backbones", config.backbones)):
        for part in parts:
            lines.append(f"[[{table}]]")
            lines += [f"{k} = {v!r}".replace("'", '"') for k, v in part.model_dump(exclude_defaults=True).items()]
    lines.append(f"[scoring]\nworkers = {config.scoring.workers}\npart_seconds = {config.scoring.part_seconds}")
    assert tomllib.loads("\n".join(lines))
    return "\n".join(lines)


@pytest.fixture
def project(ingested_copy, tiny_config, tmp_path):
    """Return materialize(selection, workers) over the ingested tiny world, and the store's parts."""
    store, keys = ingested_copy
    instance = dg.DagsterInstance.ephemeral()
    instance.add_dynamic_partitions(str(SHARDS.name), keys)

    def run(scorers=None, workers=1, selection=None, labels=False):
        config = tiny_config.model_copy(
            update={
                "store": store.location,
                "home": str(tmp_path / "home"),
                "scoring": configuration.ScoringConfig(workers=workers),
                "scorers": scorers or tiny_config.scorers,
            }
        )
        file = tmp_path / "polyphony.toml"
        file.write_text(toml_of(config))
        tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
        return dg.materialize(
            [build_labels(config)[0]] if labels else [build_scores(config)],
            resources={"polyphony": Polyphony(config_file=str(file))},
            instance=instance,
            selection=None if selection is None else [score_key(s) for s in selection],
            tags={} if labels else tags,
            raise_on_error=False,
        )

    return run, store, keys


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


def test_a_run_decodes_an_image_once_for_the_selected_scorers_and_touches_no_other(project, monkeypatch):
    run, store, _ = project
    decoded = []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda data: decoded.append(data) or real(data))
    assert run(selection=["clip"]).success
    alone = len(decoded)
    assert alone == len(set(decoded))
    assert {m.partition.split("/")[0] for m in store.manifests("scores")} == {"clip"}
    decoded.clear()
    assert run().success
    assert len(decoded) == alone, "clip is finished, so every image is decoded for pickscore alone"
    decoded.clear()
    assert run().success
    assert decoded == []


def test_a_shard_that_cannot_be_read_fails_the_run_after_the_others_are_scored(project, monkeypatch):
    run, store, keys = project
    real = stored.read_images

    def read(store, key, *rest):
        if key == keys[0]:
            raise SourceError("the disk is away")
        return real(store, key, *rest)

    monkeypatch.setattr(stored, "read_images", read)
    result = run()
    assert not result.success
    failure = next(e for e in result.all_events if e.is_step_failure)
    assert "the disk is away" in str(failure.event_specific_data)
    assert {m.partition.rsplit("/", 1)[1] for m in store.manifests("scores")} == set(keys[1:])
    monkeypatch.undo()
    assert run().success


def test_active_scores_switch_only_when_every_shard_is_scored(project, tiny_config):
    run, store, _ = project
    assert not run(labels=True).success
    assert store.current_revisions() == {}
    assert run().success
    assert run(labels=True).success
    assert store.current_revisions() == {s.name: checkpoints.revision(s) for s in tiny_config.scorers}
