import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from assets.definitions import defs
from pipelines import config as configuration
from pipelines import schemas

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def definitions():
    return defs()


@pytest.fixture(scope="module")
def graph(definitions):
    return definitions.resolve_asset_graph()


def test_the_definitions_are_loadable(definitions):
    dg.Definitions.validate_loadable(definitions)


def test_loading_the_definitions_imports_no_torch_and_takes_under_three_seconds():
    code = """
import sys, time, json
start = time.process_time()
from assets.definitions import defs
defs().resolve_asset_graph()
print(json.dumps({"seconds": time.process_time() - start,
                  "heavy": [m for m in ("torch", "diffusers", "transformers", "accelerate") if m in sys.modules]}))
"""
    # Of the processor, not of the clock: others may hold the machine.
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(3)]
    assert runs[0]["heavy"] == []
    assert min(r["seconds"] for r in runs) < 3


def test_every_scorer_recipe_and_model_has_its_assets(graph):
    config = configuration.load()
    keys = {k.to_user_string() for k in graph.get_all_asset_keys()}
    expected = {f"scores/{s.name}" for s in config.scorers} | {f"trained/{r}" for r in config.training.recipes}
    expected |= {f"{t}/{m}" for t in ("samples", "evaluations") for m in ("base", *config.training.recipes)}
    expected |= {f"held_out/{r}" for r in config.training.recipes} | {"leaderboard", "preferences", "raw_sources"}
    assert expected <= keys


def test_every_table_of_the_store_is_an_asset_with_its_columns(graph):
    declared = {
        node.metadata["dagster/table_name"]
        for node in (graph.get(k) for k in graph.get_all_asset_keys())
        if "dagster/table_name" in node.metadata
    }
    # A training run writes these beside its metrics.
    assert declared | {"training_validations", "training_pairs"} == set(schemas.TABLES)


def test_shards_are_partitions_of_ingest_scores_and_latents_only(graph):
    partitioned = {k.to_user_string() for k in graph.get_all_asset_keys() if graph.get(k).partitions_def is not None}
    scores = {f"scores/{s.name}" for s in configuration.load().scorers}
    assert partitioned == {"votes", "images", "image_names", "prompts", "latents"} | scores


@pytest.mark.parametrize(
    ("recipe", "table"),
    [("adaptive_dpo", "minority"), ("smpo", "smoothed"), ("balanced_dpo", "consensus"), ("smpo", "trajectories/smpo")],
)
def test_a_variant_depends_on_the_labels_that_it_is_about(graph, recipe, table):
    assert dg.AssetKey(table.split("/")) in graph.get(dg.AssetKey(["trained", recipe])).parent_keys


def ancestors(graph, key):
    found, todo = set(), [dg.AssetKey(key)]
    while todo:
        for parent in graph.get(todo.pop()).parent_keys:
            if parent not in found:
                found.add(parent)
                todo.append(parent)
    return {k.to_user_string() for k in found}


def test_lineage_leads_from_the_leaderboard_to_the_raw_files(graph):
    assert {"raw_sources", "votes", "catalogue_prompts", "scores/pickscore", "preferences", "latents"} <= ancestors(
        graph, "leaderboard"
    )


def test_balanced_dpo_depends_on_the_consensus(graph):
    parents = {k.to_user_string() for k in graph.get(dg.AssetKey(["trained", "balanced_dpo"])).parent_keys}
    assert "consensus" in parents


def test_make_puts_our_dagster_yaml_where_dagster_loads_it(tmp_path):
    subprocess.run(["make", "-s", "home", f"POLYPHONY_HOME={tmp_path}"], cwd=ROOT, check=True)
    code = """
import json, dagster as dg
i = dg.DagsterInstance.get()
print(json.dumps({"root": i.root_directory, "telemetry": i.telemetry_enabled, "nux": i.nux_enabled,
  "slots": i.run_monitoring_settings.get("free_slots_after_run_end_seconds"),
  "pool": i.get_concurrency_config().pool_config.default_pool_limit}))
"""
    home = tmp_path / "dagster_home"
    out = subprocess.check_output([sys.executable, "-c", code], env=_environment(home), text=True, cwd=tmp_path)
    assert json.loads(out) == {"root": str(home), "telemetry": False, "nux": False, "slots": 60, "pool": 1}
    assert (home / "dagster.yaml").read_text() == (ROOT / "dagster.yaml").read_text()


def _environment(home):
    import os

    return {**os.environ, "DAGSTER_HOME": str(home)}
