"""The main job, started as a person starts it, on a world small enough to run it three times."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import polars as pl
import pytest

from pipelines import schemas
from pipelines.config import WEIGHTS
from pipelines.tables import Store

ROOT = Path(__file__).parents[2]
CONFIG = """
home = "{home}"

[world]
rows_per_shard = 80
pickapic_shards = {{train = 2, validation = 1, test = 1}}
pickapic_prompts = {{train = 30, validation = 8, test = 8}}
hpd_train_prompts = 6
hpd_test_groups = 3
hpd_test_groups_of_ten = 1

[[sources]]
name = "pickapic"
layout = "pickapic"
location = "{home}/world/pickapic"

[[sources]]
name = "hpd"
layout = "hpd"
location = "{home}/world/hpdv2"
records_per_shard = 20

[[scorers]]
name = "pickscore"
kind = "pickscore"
checkpoint = "{weights}/tiny-pickscore"

[[scorers]]
name = "clip"
kind = "clip"
checkpoint = "{weights}/tiny-clip"

[[backbones]]
name = "tiny"
family = "tiny"
checkpoint = "{weights}/tiny-sd"
resolution = 32

[training]
recipes = ["diffusion_dpo", "smpo"]
device = "cpu"
steps = 8
checkpoint_every = 2

[evaluation]
prompts = 6
seeds = 2
steps = 4
bootstrap = 200
"""


class Demo:
    """A home with a configuration file and Dagster's instance, and the commands over it."""

    def __init__(self, home):
        self.home = home
        (home / "dagster_home").mkdir(parents=True)
        shutil.copy(ROOT / "dagster.yaml", home / "dagster_home")
        config = home / "config.toml"
        config.write_text(CONFIG.format(home=home, weights=WEIGHTS))
        self.environment = {
            **os.environ,
            "POLYPHONY_CONFIG": str(config),
            "POLYPHONY_HOME": str(home),
            "DAGSTER_HOME": str(home / "dagster_home"),
            "HF_HUB_OFFLINE": "1",
        }
        self.store = Store(str(home / "store"))

    def start(self, *module):
        return subprocess.Popen(
            [sys.executable, "-u", "-m", *module],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *module):
        process = self.start(*module)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that was killed while it trained, and then run to its end."""
    demo = Demo(tmp_path_factory.mktemp("demo") / "home")
    process = demo.start("assets.demo")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 5/8" in line:
            break
    else:
        raise AssertionError("the demo never trained:\n" + "".join(lines))
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    # Labels, training and evaluation must do without the truth.
    shutil.rmtree(demo.home / "world" / "truth")
    demo.output = demo.run("assets.demo")
    return demo


def test_a_killed_demo_continues_where_it_was(finished):
    assert "1 run(s) of a killed process are closed" in finished.output
    assert re.search(r"resumed after step [46]", finished.output)
    ingested = [line for line in finished.output.splitlines() if re.search(r"ingested +\d+/", line)]
    assert len(ingested) > 5
    assert all(line.endswith("unchanged") for line in ingested)


def test_the_demo_prints_the_leaderboard_and_where_the_tables_lie(finished):
    for judge in ("pickscore", "clip", "taste:majority", "taste:minority", "fidelity", "held-out pairs"):
        for recipe in ("diffusion_dpo", "smpo"):
            assert re.search(rf"{recipe} +{judge} ", finished.output), (recipe, judge)
    assert str(finished.home / "store") in finished.output
    assert "results computed" in finished.output


def test_a_second_demo_recomputes_nothing_and_says_so(finished):
    before = {(t, m.partition): m for t in schemas.TABLES for m in finished.store.manifests(t)}
    output = finished.run("assets.demo")
    assert "nothing recomputed" in output
    assert {(t, m.partition): m for t in schemas.TABLES for m in finished.store.manifests(t)} == before


def test_without_dagster_the_same_work_is_found_done(finished):
    pipelines = finished.run("pipelines", "run")
    trainers = finished.run("trainers.train", "all")
    steps = [line for line in (pipelines + trainers).splitlines() if " rows" in line]
    assert len(steps) > 30
    assert all("unchanged" in line for line in steps), [line for line in steps if "unchanged" not in line]


def test_the_query_that_the_demo_prints_works(finished):
    command = re.search(r'Query: +(\S+) -m pipelines sql "(.*)"', finished.output)
    output = finished.run("pipelines", "sql", command[2])
    assert "minority" in output
    assert "pickapic" in output
    path = re.search(r"polars\.read_parquet\('(.*)'\)", finished.output)[1]
    assert len(pl.read_parquet(path)) == finished.store.require("preferences").rows


def test_the_queries_of_the_readme_have_answers(finished):
    text = re.search(r"```sql\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    queries = [q for q in text.split(";") if q.strip()]
    assert len(queries) == 5
    with duckdb.connect() as connection:
        connection.execute(finished.store.read_text("views.sql"))
        assert all(len(connection.sql(q).fetchall()) > 0 for q in queries)


def test_runs_materializations_and_metadata_are_on_the_instance_that_the_ui_serves(finished):
    code = """
import json, dagster as dg
i = dg.DagsterInstance.get()
runs = [(r.job_name, r.status.value) for r in i.get_runs()]
event = i.get_latest_materialization_event(dg.AssetKey("leaderboard")).asset_materialization
shards = i.get_materialized_partitions(dg.AssetKey(["scores", "pickscore"]))
observations = i.fetch_observations(dg.AssetKey(["trained", "diffusion_dpo"]), limit=10).records
print(json.dumps({"runs": runs, "metadata": sorted(event.metadata), "shards": len(shards), "curve": len(observations)}))
"""
    import json

    out = subprocess.check_output([sys.executable, "-c", code], env=finished.environment, text=True, cwd=finished.home)
    found = json.loads(out.splitlines()[-1])
    assert ["everything", "SUCCESS"] in found["runs"]
    assert ["everything", "FAILURE"] in found["runs"]
    assert {"board", "gains", "samples", "dagster/row_count", "dagster/uri"} <= set(found["metadata"])
    assert found["shards"] >= 8
    assert found["curve"] >= 2


def test_no_row_of_the_raw_files_is_lost(finished):
    shards = [m for m in finished.store.manifests("votes") if m.partition.startswith("pickapic")]
    assert sum(m.rows for m in shards) == 4 * 80
    assert all(sum(m.rows_by_status.values()) == m.rows == m.extra["rows_in"] for m in shards)
