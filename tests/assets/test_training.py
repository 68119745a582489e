"""Training as an asset: a real trainer, killed."""

import contextlib
import json
import signal
import threading
import time

import dagster as dg
import psutil
import pytest

from assets.resources import Polyphony
from assets.training import build_training, trained_key
from pipelines.config import EvaluationConfig, TrainingConfig
from pipelines.world.raw import WorldConfig

WORLD = WorldConfig(
    rows_per_shard=80,
    pickapic_shards={"train": 2, "validation": 1, "test": 1},
    pickapic_prompts={"train": 30, "validation": 8, "test": 8},
    hpd_train_prompts=6,
    hpd_test_groups=3,
    hpd_test_groups_of_ten=1,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory, build_home):
    """A home in which everything is ready for training."""
    made = build_home(
        tmp_path_factory.mktemp("training") / "home",
        WORLD,
        training=TrainingConfig(recipes=("diffusion_dpo",), steps=16, checkpoint_every=2, device="cpu"),
        evaluation=EvaluationConfig(prompts=6, seeds=2, steps=4, bootstrap=200),
    )
    made.run("trainers.train", "cache")
    return made


def test_a_dry_run_tells_the_plan_and_writes_and_materializes_nothing(home):
    def files():
        return {p: p.stat().st_mtime_ns for p in home.folder.rglob("*") if p.is_file()}

    before = files()
    result = dg.materialize(
        [a for a in build_training(home.config) if a.key == trained_key("diffusion_dpo")],
        resources={"polyphony": Polyphony(config_file=str(home.config_file))},
        run_config={"ops": {"trained__diffusion_dpo": {"config": {"dry_run": True}}}},
    )
    assert files() == before
    assert result.get_asset_materialization_events() == []
    (event,) = result.get_asset_observation_events()
    plan = event.asset_observation_data.asset_observation.metadata["plan"].value
    assert "diffusion_dpo" in plan


def rows_of(home):
    return [
        json.loads(line)
        for file in home.folder.glob("runs/diffusion_dpo/*/metrics.jsonl")
        for line in file.read_text().splitlines()
    ]


def kill_trainer_in_the_middle(home, killed):
    for _ in range(4000):
        if len(rows_of(home)) >= 5:
            break
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        # Some end by themselves meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[2:4] == ["-m", "trainers.train"]:
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)


def test_a_killed_trainer_is_repeated_by_itself_and_resumes_from_its_checkpoint(home):
    killed = []
    killer = threading.Thread(target=kill_trainer_in_the_middle, args=(home, killed))
    killer.start()
    result = dg.materialize(
        [a for a in build_training(home.config) if a.key == trained_key("diffusion_dpo")],
        resources={"polyphony": Polyphony(config_file=str(home.config_file))},
        raise_on_error=False,
    )
    killer.join()
    assert len(killed) == 1
    assert result.success
    assert [e.event_type_value for e in result.all_events].count("STEP_UP_FOR_RETRY") == 1
    log = next(home.folder.glob("runs/diffusion_dpo/*/log.txt")).read_text()
    assert "resumed after step" in log
    observed = [e.asset_observation_data.asset_observation for e in result.get_asset_observation_events()]
    curve = {o.metadata["step"].value: o.metadata for o in observed if "loss" in o.metadata}
    assert set(curve) >= {10, 15, 16}
    assert {"loss", "implicit_accuracy", "margin", "gradient_norm", "drift", "pairs_per_second"} <= set(curve[16])
    assert any("validation implicit_accuracy_human" in o.metadata for o in observed)
