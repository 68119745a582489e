"""What the UI's buttons do, asked of GraphQL over a finished store: launch, backfill, terminate."""

import pytest

from pipelines import schemas


@pytest.fixture(scope="module")
def home(build_home, tiny_world_config, tmp_path_factory):
    return build_home(tmp_path_factory.mktemp("graphql") / "home", tiny_world_config)


@pytest.fixture(scope="module")
def dagster(home, dagster_over):
    with dagster_over(home) as dagster:
        assert dagster.finish(dagster.launch("prepare")) == "SUCCESS"
        yield dagster


MATERIALIZATION = """
query ($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode {
      assetMaterializations(limit: 1) {
        runId
        metadataEntries {
          label
          ... on IntMetadataEntry { intValue }
          ... on TableSchemaMetadataEntry { schema { columns { name } } }
        }
      }
      metadataEntries { label ... on TableSchemaMetadataEntry { schema { columns { name } } } }
    }
  }
}
"""


def test_a_launched_label_succeeds_and_answers_with_its_rows_and_columns(dagster, home):
    run_id = dagster.launch(assets=[["consensus"]])
    assert dagster.finish(run_id) == "SUCCESS"
    node = dagster.ask(MATERIALIZATION, key={"path": ["consensus"]})["assetNodeOrError"]
    (materialization,) = node["assetMaterializations"]
    assert materialization["runId"] == run_id
    found = {e["label"]: e for e in (*node["metadataEntries"], *materialization["metadataEntries"])}
    table = home.store.read(schemas.CONSENSUS)
    assert found["dagster/row_count"]["intValue"] == len(table) > 0
    assert [c["name"] for c in found["dagster/column_schema"]["schema"]["columns"]] == table.columns


BACKFILL = """
mutation ($parameters: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $parameters) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}
"""
BACKFILLED = """
query ($id: String!, $key: AssetKeyInput!) {
  partitionBackfillOrError(backfillId: $id) {
    ... on PartitionBackfill { partitionNames runs(limit: 10) { id } }
  }
  assetNodeOrError(assetKey: $key) { ... on AssetNode { assetMaterializations { runId partition } } }
}
"""


def test_a_backfill_of_two_shards_is_one_run_that_materializes_these_two(dagster, home):
    shards = [m.partition for m in home.store.manifests("votes")]
    asset = {"path": ["scores", "clip"]}
    chosen = dagster.instance.get_dynamic_partitions("shards")[1:3]
    assert set(chosen) < set(shards)
    parameters = {"assetSelection": [asset], "partitionNames": chosen}
    answer = dagster.ask(BACKFILL, parameters=parameters)["launchPartitionBackfill"]
    assert answer["__typename"] == "LaunchBackfillSuccess", answer
    dagster.backfill()
    backfill = dagster.ask(BACKFILLED, id=answer["backfillId"], key=asset)["partitionBackfillOrError"]
    assert set(backfill["partitionNames"]) == set(chosen)
    (run,) = backfill["runs"]
    assert dagster.finish(run["id"]) == "SUCCESS"
    found = dagster.ask(BACKFILLED, id=answer["backfillId"], key=asset)["assetNodeOrError"]["assetMaterializations"]
    assert {(m["runId"], m["partition"]) for m in found} == {(run["id"], shard) for shard in chosen}


TERMINATE = """
mutation ($id: String!) {
  terminateRun(runId: $id) {
    __typename
    ... on TerminateRunFailure { message }
    ... on PythonError { message }
  }
}
"""


def test_terminating_a_run_that_scores_leaves_no_process_of_it(dagster, home, tmp_path, eventually, left_after):
    before = set(home.processes())
    hold = tmp_path / "hold"
    hold.touch()
    # Another argument is another revision, whose scores are all missing.
    *others, held = home.config.scorers
    held = held.model_copy(update={"options": {"hold": str(hold)}})
    file = tmp_path / "held.json"
    file.write_text(home.config.model_copy(update={"scorers": (*others, held)}).model_dump_json())
    shard = dagster.instance.get_dynamic_partitions("shards")[0]
    run_id = dagster.launch(
        assets=[["scores", held.name]],
        config={"resources": {"polyphony": {"config": {"config_file": str(file)}}}},
        tags={"dagster/partition": shard},
    )
    dagster.dequeue()
    eventually(
        (tmp_path / "hold.reached").exists, 60, lambda: f"nothing is scored, the run is {dagster.status(run_id)}"
    )
    assert set(home.processes()) - before
    answer = dagster.ask(TERMINATE, id=run_id)["terminateRun"]
    assert answer["__typename"] == "TerminateRunSuccess", answer
    eventually(lambda: dagster.status(run_id) == "CANCELED", 30, lambda: f"the run is {dagster.status(run_id)}")
    assert left_after(lambda: set(home.processes()) - before, 10) == set()
