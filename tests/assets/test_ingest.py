"""What a run of ingestion leaves on the instance when files are bad, and what its checks say."""

from pathlib import Path

import dagster as dg
import pytest

from assets.ingest import SHARD_TABLES, build_ingest
from assets.partitions import SHARDS
from assets.resources import Polyphony


@pytest.fixture
def project(tiny_config, world_copy, sources_of, tmp_path):
    """Return ingest(shards to select, **options of the form) over raw files of its own, the instance, store and shards."""
    home = {"home": str(tmp_path), "store": "", "world": None, "sources": sources_of(world_copy)}
    config = tiny_config.model_copy(update=home)
    file = tmp_path / "polyphony.json"
    file.write_text(config.model_dump_json())
    polyphony = Polyphony(config_file=str(file))
    instance = dg.DagsterInstance.ephemeral()
    shards = polyphony.shards()
    instance.add_dynamic_partitions(str(SHARDS.name), [s.key for s in shards])

    def ingest(selected=shards, **options):
        return dg.materialize(
            build_ingest(config)[1:],
            resources={"polyphony": polyphony},
            instance=instance,
            run_config={"ops": {"ingested": {"config": options}}},
            tags={
                "dagster/asset_partition_range_start": selected[0].key,
                "dagster/asset_partition_range_end": selected[-1].key,
            },
            raise_on_error=False,
        )

    return ingest, instance, polyphony.store, shards, world_copy


def failed_checks(result):
    return {(c.asset_key.to_user_string(), c.check_name) for c in result.get_asset_check_evaluations() if not c.passed}


def started(result):
    return {e.step_key for e in result.all_events if e.is_step_start}


def test_a_bad_file_fails_the_run_and_the_other_shards_are_materialized_and_checked(project):
    ingest, instance, store, shards, world = project
    bad = shards[1]
    (world / "pickapic" / bad.file).write_bytes(b"no parquet")
    result = ingest()
    assert not result.success
    assert started(result) == {"ingested"}
    for table in SHARD_TABLES:
        made = instance.get_materialized_partitions(dg.AssetKey(table.name))
        assert made == {s.key for s in shards} - {bad.key}
        event = instance.get_latest_materialization_event(dg.AssetKey(table.name)).asset_materialization
        assert event.metadata["dagster/partition_row_count"].value == store.require(table.name, event.partition).rows
    checked = {c.asset_key.to_user_string() for c in result.get_asset_check_evaluations() if c.passed}
    assert checked == {t.name for t in SHARD_TABLES}
    assert not failed_checks(result)


@pytest.fixture
def damaged(project):
    """The same, all ingested, the file of one shard's votes longer than its commit says."""
    ingest, _, store, shards, _ = project
    assert ingest().success
    with Path(store.data_path("votes", shards[0].key)).open("ab") as file:
        file.write(b"more")
    return ingest, shards


def test_a_blocking_check_of_a_shard_stops_what_comes_after_it_in_the_run(damaged):
    ingest, _ = damaged
    result = ingest()
    assert not result.success
    assert ("votes", "schema") in failed_checks(result)
    assert started(result) == {"ingested"}


def test_a_run_of_one_shard_checks_that_shard_alone(damaged):
    ingest, shards = damaged
    result = ingest(shards[1:2])
    found = [c for c in result.get_asset_check_evaluations() if c.asset_key == dg.AssetKey("votes")]
    assert all(c.passed for c in found)
    assert next(c for c in found if c.check_name == "schema").metadata["partitions"].value == 1


def test_a_dry_run_does_not_hide_what_a_check_found(damaged):
    ingest, _ = damaged
    assert ("votes", "schema") in failed_checks(ingest(dry_run=True))


def test_a_damaged_table_whose_numbers_are_shown_fails_its_check_and_not_whoever_reads_it(project):
    ingest, _, store, _, _ = project
    assert ingest().success
    Path(store.data_path("accounting")).write_bytes(b"no parquet")
    result = ingest()
    assert not result.success
    assert ("accounting", "schema") in failed_checks(result)
