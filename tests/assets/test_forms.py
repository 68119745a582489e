"""What the launchpad's forms do: limits, dry runs, options of one run."""

import dagster as dg
import pytest

from assets.ingest import build_ingest
from assets.labels import build_labels
from assets.partitions import SHARDS
from assets.resources import Polyphony, TiePolicy
from pipelines import config as configuration
from pipelines.config import ConfigError
from pipelines.scoring import batches


@pytest.fixture
def project(tiny_config, tmp_path):
    """Return ingest(**options of the form) over the raw files of the tiny world, the instance, and the store."""
    file = tmp_path / "polyphony.json"
    file.write_text(
        tiny_config.model_copy(update={"home": str(tmp_path), "store": "", "world": None}).model_dump_json()
    )
    polyphony = Polyphony(config_file=str(file))
    instance = dg.DagsterInstance.ephemeral()
    keys = polyphony.shard_keys()
    instance.add_dynamic_partitions(str(SHARDS.name), keys)

    def ingest(**options):
        return dg.materialize(
            build_ingest(tiny_config)[1:2],
            resources={"polyphony": polyphony},
            instance=instance,
            run_config={"ops": {"ingested": {"config": options}}},
            tags={"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]},
        )

    return ingest, instance, polyphony.store, keys


def shards_of(store):
    return [m.partition for m in store.manifests("votes")]


def test_a_dry_run_writes_nothing_and_materializes_nothing(project):
    ingest, instance, store, _ = project
    assert ingest(dry_run=True).success
    assert shards_of(store) == []
    assert instance.get_materialized_partitions(dg.AssetKey("votes")) == set()


def test_a_limit_does_as_many_shards_as_it_says_and_the_next_run_the_others(project):
    ingest, instance, store, keys = project
    assert ingest(limit=2).success
    assert sorted(shards_of(store)) == sorted(keys[:2])
    for table in ("votes", "images", "image_names", "prompts"):
        assert instance.get_materialized_partitions(dg.AssetKey(table)) == set(keys[:2])
    event = instance.get_latest_materialization_event(dg.AssetKey("votes")).asset_materialization
    assert event.metadata["dagster/partition_row_count"].value == store.require("votes", event.partition).rows
    assert ingest(limit=2).success
    assert sorted(shards_of(store)) == sorted(keys[:4])
    result = ingest(limit=len(keys))
    assert instance.get_materialized_partitions(dg.AssetKey("votes")) == set(keys)
    assert {e.check_name for e in result.get_asset_check_evaluations()} >= {"schema", "unique_key", "rows_accounted"}
    assert all(e.passed for e in result.get_asset_check_evaluations())


def test_options_of_a_run_are_those_of_all_its_steps(tiny_config, tmp_path):
    file = tmp_path / "polyphony.json"
    file.write_text(tiny_config.model_dump_json())
    plain = Polyphony(config_file=str(file))
    assert plain.config == configuration.load(file)
    varied = Polyphony(config_file=str(file), tie_policy=TiePolicy.drop, training_steps=7, training_batch_size=3).config
    assert varied.labels.tie_policy == "drop"
    assert (varied.training.steps, varied.training.batch_size) == (7, 3)
    assert varied.model_dump(exclude={"labels", "training"}) == plain.config.model_dump(exclude={"labels", "training"})


def test_an_option_of_a_run_that_cannot_be_is_refused_by_name(tiny_config, tmp_path):
    file = tmp_path / "polyphony.json"
    file.write_text(tiny_config.model_dump_json())
    with pytest.raises(ConfigError, match=r"options of this run: .*tie_breaker"):
        _ = Polyphony(config_file=str(file), tie_policy=TiePolicy.tie_breaker).config


def test_a_tie_policy_of_one_run_is_refused_by_readers_under_the_configurations_own(
    ingested_copy, tiny_config, tmp_path
):
    store, keys = ingested_copy
    config = tiny_config.model_copy(update={"home": str(tmp_path), "store": store.location})
    models = {}
    for key in keys:
        batches.score_shard(store, key, list(config.scorers), models=models)
    file = tmp_path / "polyphony.json"
    file.write_text(config.model_dump_json())

    def materialize(*names, **options):
        return dg.materialize(
            build_labels(config),
            selection=list(names),
            resources={"polyphony": Polyphony(config_file=str(file), **options)},
            instance=dg.DagsterInstance.ephemeral(),
            raise_on_error=False,
        )

    assert materialize("active_scores", "margins", "calibration", "consensus", "smoothed", "minority").success
    before = store.require("consensus").fingerprint
    assert materialize("consensus", tie_policy=TiePolicy.drop).success
    assert store.require("consensus").fingerprint != before
    failed = materialize("preferences")
    assert not failed.success
    reason = str(next(e for e in failed.all_events if e.is_step_failure).event_specific_data)
    assert "consensus was made under other options" in reason
    assert materialize("consensus", "preferences").success
