import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from accelerate.state import AcceleratorState

from pipelines import schemas
from pipelines.config import ConfigError, ValidationConfig
from pipelines.tables import Store, StoreError
from trainers import data, loop, recipes
from trainers.recipes import (
    SFT,
    AdaptiveDPO,
    DrDPO,
    Inversion,
    LoRA,
    MaPO,
    Optimiser,
    ReferencePolicy,
    recipe,
)
from trainers.steps import Training

NO_VALIDATION = ValidationConfig(every=0)
CURVE = Path(__file__).parent / "golden_loss_curve.txt"


class StopHere(Exception):
    """Stands for a kill between two steps."""


def with_training(config, **options):
    options = {"batch_size": 8, "validation": NO_VALIDATION, **options}
    return config.model_copy(update={"training": config.training.model_copy(update=options)})


def elsewhere(config, folder):
    """Return the configuration of a copy of its store."""
    shutil.copytree(config.home, folder)
    return config.model_copy(update={"home": str(folder)})


def training_of(config, progress=lambda message: None):
    return Training(Store(config.store_location), config, progress)


def run_of(config, rule):
    training = training_of(config)
    return loop.Run(training.store, config, rule, training.backbone)


def trained(config, rule, report=lambda row: None):
    loop.train(run_of(config, rule), lambda message: None, report)
    return Store(config.store_location).read(schemas.TRAINING_METRICS, rule.name)


def variant(name="diffusion_dpo", /, **changes):
    return dataclasses.replace(recipe(name), **changes)


def weights_of(folder):
    from safetensors.torch import load_file

    (file,) = [*folder.glob("unet/*.safetensors"), *folder.glob("pytorch_lora_weights.safetensors")]
    return load_file(file)


def stop_after(step):
    def report(row):
        if row["step"] == step and "loss" in row:
            raise StopHere

    return report


SPEEDLESS = pl.exclude("pairs_per_second", "peak_memory_mib")
LORA = LoRA(rank=4, alpha=4)
VARIANTS = {
    "full": variant(),
    "lora": variant(weights=LORA, optimiser=Optimiser(learning_rate=1e-2)),
    "hard copy": variant("balanced_dpo", reference=ReferencePolicy("hard_copy", every=2)),
    "ema reference": variant(reference=ReferencePolicy("ema", every=1, decay=0.8)),
    "lora, ema reference": variant(weights=LORA, reference=ReferencePolicy("ema", every=2, decay=0.5)),
    "lora, hard copy": variant(weights=LORA, reference=ReferencePolicy("hard_copy", every=3)),
    "adaptive, online": variant(weights=LORA, objective=AdaptiveDPO(metric="online")),
    "adaptive, online, full": variant(objective=AdaptiveDPO(metric="online", form="ipo")),
    "adaptive, corrected": variant(weights=LORA, objective=AdaptiveDPO(metric="online_corrected", margin_term="none")),
    "adaptive, dataset": recipe("adaptive_dpo"),
    "trajectories": variant("smpo", noising=Inversion(steps=3)),
    "released inversion": variant(
        "smpo", noising=Inversion("released", steps=3, under="policy", is_cached=False), weights=LORA
    ),
    "adafactor": variant(optimiser=Optimiser("adafactor", schedule="cosine")),
    "no reference": variant(objective=MaPO()),
    "dr_dpo": variant(objective=DrDPO()),
}
"""What differs in a run's state, and so can be lost when it resumes."""


# --- steps -----------------------------------------------------------------------------------------------------------


def test_the_first_loss_is_log_two_and_training_lowers_it(cached_config):
    metrics = trained(with_training(cached_config, batch_size=None), recipe("diffusion_dpo"))
    assert metrics["step"].to_list() == [1, 2, 3, 4, 5, 6]
    assert metrics["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"][0] == metrics["drift"][0] == 0
    assert metrics["implicit_accuracy"][0] == 0.5
    assert metrics["margin"][-2:].mean() > 0
    assert metrics["loss"][-2:].mean() < math.log(2)
    assert metrics["drift"][-1] > 0


def test_the_loss_curve_of_ten_steps_is_the_one_on_record(cached_config):
    """A change that is to change no number must leave this curve as it is; RECORD_CURVE=1 in the environment writes it."""
    metrics = trained(with_training(cached_config, batch_size=16, steps=10), recipe("diffusion_dpo"))
    found = metrics["loss"].to_list()
    if os.environ.get("RECORD_CURVE"):
        CURVE.write_text("".join(f"{v:.6f}\n" for v in found))
    expected = [float(line) for line in CURVE.read_text().split()]
    assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("rule", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_killed_run_resumes_to_exactly_the_weights_and_metrics_of_an_unbroken_one(cached_config, tmp_path, rule):
    config = with_training(cached_config, steps=5, log_pairs=True)
    other = elsewhere(config, tmp_path / "elsewhere")
    curve = trained(config, rule)
    expected = weights_of(run_of(config, rule).model_folder)
    with pytest.raises(StopHere):
        trained(other, rule, stop_after(3))
    said = []
    loop.train(run_of(other, rule), said.append)
    assert any("resumed after step 2" in line for line in said)
    found = weights_of(run_of(other, rule).model_folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    stores = [Store(c.store_location) for c in (config, other)]
    assert stores[1].read(schemas.TRAINING_METRICS, rule.name).select(SPEEDLESS).equals(curve.select(SPEEDLESS))
    whole, resumed = (s.read(schemas.TRAINING_PAIRS, rule.name) for s in stores)
    assert whole.equals(resumed)
    assert len(whole) == 5 * 8


@pytest.mark.parametrize("step", [1, 2, 9, 12, 14])
def test_a_run_may_be_killed_at_any_step(cached_config, tmp_path, step):
    config = with_training(cached_config, steps=15, checkpoint_every=2, batch_size=4)
    other = elsewhere(config, tmp_path / "elsewhere")
    rule = VARIANTS["adaptive, corrected"]
    trained(config, rule)
    with pytest.raises(StopHere):
        trained(other, rule, stop_after(step))
    trained(other, rule)
    expected, found = (weights_of(run_of(c, rule).model_folder) for c in (config, other))
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", ["full", "lora", "hard copy", "adaptive, dataset", "trajectories"])
def test_micro_batches_change_nothing_but_rounding(cached_config, tmp_path, name):
    config = with_training(cached_config, steps=4, batch_size=12)
    other = with_training(elsewhere(config, tmp_path / "elsewhere"), batch_size=12, micro_batch=3)
    rule = VARIANTS[name]
    whole, parts = trained(config, rule), trained(other, rule)
    for column in ("loss", "margin", "gradient_norm", "drift"):
        assert parts[column].to_list() == pytest.approx(whole[column].to_list(), rel=1e-3, abs=1e-5), column


DISTRIBUTED = """
import sys, json
sys.path.insert(0, {folder!r})
from test_loop import VARIANTS, run_of
from pipelines.config import Config
from trainers import loop
config = Config.model_validate_json(open({config!r}).read())
for name in {names!r}:
    loop.train(run_of(config, VARIANTS[name]), lambda m: None)
"""


def test_two_processes_give_the_loss_curve_and_weights_of_one(cached_config, tmp_path):
    # Two micro-batches in one process, one in each of two: statistics are over the same pairs.
    names = ["full", "lora", "hard copy", "lora, ema reference", "dr_dpo", "trajectories"]
    accumulated = ["full", "lora, hard copy"]
    for part, steps, options in (
        (names, 4, {"one": {}, "two": {}}),
        (accumulated, 4, {"one": {"micro_batch": 6}, "two": {"micro_batch": 3}}),
        # Its scale is used from the tenth step on.
        (["adaptive, corrected"], 14, {"one": {}, "two": {}}),
    ):
        folder = tmp_path / part[-1].replace(" ", "")
        one, two = (
            with_training(elsewhere(cached_config, folder / k), steps=steps, batch_size=12, log_pairs=True, **o)
            for k, o in options.items()
        )
        for name in part:
            trained(one, VARIANTS[name])
        (folder / "config.json").write_text(two.model_dump_json())
        script = folder / "script.py"
        script.write_text(
            DISTRIBUTED.format(folder=str(Path(__file__).parent), config=str(folder / "config.json"), names=part)
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        manifest = Store(two.store_location).manifest("training_metrics", VARIANTS[part[-1]].name)
        assert manifest.extra["processes"] == 2
        # Runs of one recipe's name overwrite one another's metrics: compare every run by its own record.
        for name in part:
            curves = []
            for config in (one, two):
                lines = (run_of(config, VARIANTS[name]).folder / "metrics.jsonl").read_text().splitlines()
                curves.append([json.loads(line) for line in lines])
            for column in ("loss", "margin", "gradient_norm"):
                first, second = ([r[column] for r in curve] for curve in curves)
                assert second == pytest.approx(first, rel=1e-3, abs=1e-5), (name, column)
            # Rounding grows along a run.
            allowed = 1e-5 if steps <= 4 else 1e-4
            assert [r["loss"] for r in curves[1]] == pytest.approx([r["loss"] for r in curves[0]], abs=allowed), name
            expected, found = (weights_of(run_of(c, VARIANTS[name]).model_folder) for c in (one, two))
            for key in expected:
                torch.testing.assert_close(found[key], expected[key], atol=3e-5, rtol=1e-3)
        rule = VARIANTS[part[-1]]
        frames = [Store(c.store_location).read(schemas.TRAINING_PAIRS, rule.name) for c in (one, two)]
        assert frames[0]["pair_id"].equals(frames[1]["pair_id"])
        if "adaptive" in part[-1]:
            weights = [f["weight"].to_numpy() for f in frames]
            assert weights[0].min() < 0.9
            assert abs(weights[0] - weights[1]).max() < 1e-3


@pytest.fixture
def other_precision():
    """Let the process train in another precision, which accelerate fixes once per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["full", "lora", "lora, hard copy", "adaptive, online"])
def test_in_bfloat16_the_first_margin_is_exactly_zero_and_weights_stay_float32(cached_config, other_precision, name):
    config = with_training(cached_config, steps=3, precision="bf16")
    metrics = trained(config, VARIANTS[name])
    assert metrics["margin"][0] == metrics["drift"][0] == 0
    assert metrics["margin"][2] != 0
    assert {w.dtype for w in weights_of(run_of(config, VARIANTS[name]).model_folder).values()} == {torch.float32}


def test_float16_needs_a_gpu_and_says_so(cached_config):
    with pytest.raises(ConfigError, match=r"fp16.*needs a GPU"):
        run_of(with_training(cached_config, precision="fp16"), recipe("diffusion_dpo"))


def test_activation_checkpointing_changes_no_number(cached_config, tmp_path):
    config = with_training(cached_config, steps=3)
    other = with_training(elsewhere(config, tmp_path / "elsewhere"), activation_checkpointing=True)
    for name in ("full", "lora, hard copy"):
        plain, saving = trained(config, VARIANTS[name]), trained(other, VARIANTS[name])
        assert saving["loss"].to_list() == pytest.approx(plain["loss"].to_list(), abs=1e-6)


def test_a_statistic_over_micro_batches_is_part_of_what_a_run_is(cached_config):
    def mark(rule, **options):
        return run_of(with_training(cached_config, **options), rule).mark

    plain, mixing = variant(), variant(objective=DrDPO())
    assert mark(plain) == mark(plain, micro_batch=4) == mark(plain, processes=2)
    assert mark(mixing) == mark(mixing, micro_batch=8)
    assert mark(mixing, micro_batch=4) == mark(mixing, micro_batch=2, processes=2)
    assert mark(mixing) != mark(mixing, micro_batch=4)
    for metric, margin in (("online_corrected", "none"), ("dataset", "none")):
        rule = variant(objective=AdaptiveDPO(metric=metric, margin_term=margin))
        assert mark(rule) == mark(rule, micro_batch=4)
    assert mark(VARIANTS["adaptive, online"]) != mark(VARIANTS["adaptive, online"], micro_batch=4)
    assert mark(plain) == mark(variant(summary="said otherwise"))
    assert mark(plain) != mark(plain, compile="blocks")


def test_trajectories_of_another_precision_are_others(cached_config):
    rule = VARIANTS["trajectories"]
    exact, half = (run_of(with_training(cached_config, precision=p), rule).trajectories for p in ("fp32", "bf16"))
    assert exact != half


def test_preferences_that_labels_have_left_behind_are_not_trained_on(cached_config):
    store = Store(cached_config.store_location)
    frame = store.scan(schemas.SMOOTHED)
    table = schemas.SMOOTHED.of(schemas.SMOOTHED.scorers(frame.collect_schema().names()))
    store.write(table, frame.collect().head(10), made_from="another")
    with pytest.raises(StoreError, match="preferences"):
        run_of(cached_config, recipe("diffusion_dpo"))


def test_a_pair_is_mirrored_as_a_whole_from_mirrored_latents(cached_config):
    training = training_of(cached_config)
    rule = variant(flip=True)
    for key in training.shard_keys():
        from trainers import caches

        caches.cache_latents(training.store, key, training.backbone, flips=True)
    trainer = loop.Trainer(run_of(with_training(cached_config), rule), lambda m: None)
    ids = trainer.pairs.pairs["pair_id"].to_list()[:24]
    drawn = data.draws(0, ids, [0] * 24, rule, 1000)
    batch = trainer.pairs.batch(list(range(24)), drawn)
    straight = trainer.pairs.batch(list(range(24)), dataclasses.replace(drawn, is_flipped=[False] * 24))
    for i, is_flipped in enumerate(drawn.is_flipped):
        for side in (0, 1):
            assert torch.equal(batch.latents[side, i], straight.latents[side, i]) != is_flipped
    assert torch.equal(batch.noise, straight.noise)
    assert 0 < sum(drawn.is_flipped) < 24


def test_training_reads_no_images(cached_config):
    rule = recipe("diffusion_dpo")
    for folder in ("images", "scores"):
        shutil.rmtree(Path(cached_config.store_location) / folder)
    shutil.rmtree(cached_config.world_folder)
    assert len(trained(with_training(cached_config, steps=2), rule)) == 2


def test_rates_follow_the_recipes_warm_up(cached_config):
    rule = variant(optimiser=Optimiser(learning_rate=1e-4, warmup_steps=4))
    metrics = trained(with_training(cached_config, steps=5), rule)
    assert metrics["learning_rate"].to_list() == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4])


# --- what stops a run ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_the_run_with_the_step_and_the_pairs(cached_config):
    config = with_training(cached_config, steps=6, checkpoint_every=2)
    run = run_of(config, variant())
    trainer = loop.Trainer(run, lambda m: None)
    trainer.start()
    for step in range(2):
        trainer.step(step)
    with torch.no_grad():
        next(trainer.policy.parameters()).fill_(float("nan"))
    rows = data.batch_rows(2, 8, len(trainer.pairs), 0)
    named = {trainer.pairs.pairs["pair_id"][r] for r, _ in rows}
    with pytest.raises(loop.TrainingStopped, match="step 3: the loss is not a number") as stopped:
        trainer.step(2)
    trainer.close()
    assert sum(pair in str(stopped.value) for pair in named) == loop.NAMED_PAIRS


def test_a_loss_that_explodes_stops_the_run_with_the_largest_first(cached_config):
    config = with_training(cached_config, steps=6, loss_limit=5.0)
    rule = variant(optimiser=Optimiser(learning_rate=0.05, warmup_steps=0))
    with pytest.raises(loop.TrainingStopped, match=r"above training.loss_limit = 5; largest losses: \w{32} \(loss"):
        trained(config, rule)


@pytest.mark.parametrize(("options", "message"), [({"batch_size": 10, "micro_batch": 4}, "does not divide")])
def test_a_batch_that_cannot_be_shared_out_is_refused(cached_config, options, message):
    with pytest.raises(ConfigError, match=message):
        trained(with_training(cached_config, **options), variant())


def test_pairs_are_shared_out_by_processes_and_micro_batches():
    assert loop.micro_batches(2048, 8, 32) == (32, 8)
    assert loop.micro_batches(64, 2, None) == (32, 1)
    assert loop.micro_batches(8, 2, 64) == (4, 1)
    with pytest.raises(ConfigError, match=r"10 pairs.*4 processes"):
        loop.micro_batches(10, 4, None)


def test_a_recipe_for_another_family_is_refused(cached_config):
    with pytest.raises(ConfigError, match=r"family 'sdxl'.*'tiny' is 'tiny'"):
        run_of(cached_config, variant(family="sdxl"))


# --- validation, records, exports ------------------------------------------------------------------------------------


def test_validation_measures_held_out_pairs_by_label_source_and_samples(cached_config):
    validation = ValidationConfig(every=2, pairs=40, draws=2, prompts=3)
    config = with_training(cached_config, steps=5, batch_size=16, validation=validation)
    rule, rows = recipe("diffusion_dpo"), []
    trained(config, rule, rows.append)
    store = Store(config.store_location)
    frame = store.read(schemas.TRAINING_VALIDATIONS, rule.name)
    assert frame["step"].unique().sort().to_list() == [0, 2, 4, 5]
    at = {(s, m): (v, n) for s, m, v, n in frame.rows()}
    assert at[0, "implicit_accuracy_human"] == (0.5, 40)
    assert at[0, "loss_human"][0] == pytest.approx(math.log(2))
    assert at[5, "loss_human"][0] != at[4, "loss_human"][0]
    assert at[5, "median_score"][1] == 3
    assert 0 < at[5, "implicit_accuracy_minority"][1] < 40
    assert [r["step"] for r in rows if "validation" in r] == [0, 2, 4, 5]
    run = run_of(config, rule)
    assert len(list((run.folder / "samples").glob("*.png"))) == 4
    best = json.loads((run.folder / "best.json").read_text())
    values = {s: v for s, m, v, _ in frame.rows() if m == "implicit_accuracy_human" and s}
    assert best["value"] == max(values.values())
    assert values[best["step"]] == best["value"]


def test_the_best_validation_can_become_the_model(cached_config, tmp_path):
    # Under a rate that ruins the model the first validation is the best.
    validation = ValidationConfig(every=1, pairs=40, draws=2, prompts=0, best_by="loss_human")
    config = with_training(cached_config, steps=4, batch_size=16, validation=validation, export="best", loss_limit=1e6)
    rule = variant(optimiser=Optimiser(learning_rate=3e-3, warmup_steps=4))
    trained(config, rule)
    run = run_of(config, rule)
    best = json.loads((run.folder / "best.json").read_text())
    assert best["step"] < 4
    short = with_training(elsewhere(config, tmp_path / "short"), steps=best["step"], batch_size=16, export="last")
    trained(short, rule)
    expected, found = weights_of(run_of(short, rule).model_folder), weights_of(run.model_folder)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_validation_with_an_unknown_metric_or_scorer_is_refused(cached_config):
    for options, message in (({"best_by": "fid"}, "best_by"), ({"scorer": "fid"}, r"pickscore.*found 'fid'")):
        config = with_training(cached_config, validation=ValidationConfig(**options))
        with pytest.raises(ConfigError, match=message):
            trained(config, variant())


def test_what_adaptive_dpo_thinks_of_every_pair_can_be_joined_with_preferences(cached_config):
    config = with_training(cached_config, steps=4, batch_size=16, log_pairs=True)
    rule = VARIANTS["adaptive, online"]
    trained(config, rule)
    store = Store(config.store_location)
    frame = store.read(schemas.TRAINING_PAIRS, rule.name)
    joined = frame.join(store.read(schemas.PREFERENCES), on="pair_id", suffix="_dataset")
    assert len(joined) == len(frame) == 64
    late = frame.filter(pl.col("step") > 2)
    assert (frame.filter(pl.col("step") <= 2)["metric"] == 0).all()
    assert (frame.filter(pl.col("step") <= 2)["weight"] == 1).all()
    # u = c v, W = 1 / (1 + 10 u)
    assert (late["metric"] - late["confidence"] * late["stability"]).abs().max() < 1e-6
    assert (late["weight"] - 1 / (1 + 10 * late["metric"])).abs().max() < 1e-6
    assert late["metric"].max() > 0


def test_objectives_without_a_reference_report_no_margin(cached_config):
    metrics = trained(with_training(cached_config, steps=3), variant(objective=SFT()))
    assert metrics["margin"].null_count() == metrics["implicit_accuracy"].null_count() == 3
    assert metrics["loss"].is_not_nan().all()


def test_a_run_that_was_finished_once_is_not_trained_again(cached_config):
    first = with_training(cached_config, steps=3, log_pairs=True)
    other = with_training(cached_config, steps=3, seed=1)
    rule, store = variant(), Store(cached_config.store_location)
    names = (schemas.TRAINING_METRICS, schemas.TRAINING_VALIDATIONS, schemas.TRAINING_PAIRS)
    trained(first, rule)
    before = [store.read(t, rule.name) for t in names]
    trained(other, rule)
    assert not store.read(names[0], rule.name).equals(before[0])
    rows = []
    trained(first, rule, rows.append)
    assert rows == []
    assert all(store.read(t, rule.name).equals(b) for t, b in zip(names, before, strict=True))
    assert run_of(first, rule).finished() is not None
    # Without its model there is nothing to bring back.
    trained(other, rule)
    shutil.rmtree(run_of(first, rule).model_folder)
    trained(first, rule, rows.append)
    assert len(rows) == 3


def test_rows_of_pairs_are_never_those_of_another_run(cached_config):
    logging = with_training(cached_config, steps=4, checkpoint_every=2, log_pairs=True)
    plain = with_training(cached_config, steps=4, checkpoint_every=2, seed=1)
    rule, store = variant(), Store(cached_config.store_location)
    trained(logging, rule)
    assert len(store.read(schemas.TRAINING_PAIRS, rule.name)) == 32
    trained(plain, rule)
    assert store.read(schemas.TRAINING_PAIRS, rule.name).is_empty()
    # Asked for the pairs of a run that recorded none, it trains again.
    asked = with_training(plain, log_pairs=True)
    assert run_of(plain, rule).finished() is not None
    assert run_of(asked, rule).finished() is None
    with pytest.raises(StopHere):
        trained(with_training(plain, seed=2), rule, stop_after(3))
    with pytest.raises(StoreError, match=r"first 2 steps.*log_pairs"):
        trained(with_training(plain, seed=2, log_pairs=True), rule)


def test_validation_after_a_resume_still_compares_with_the_start(cached_config, tmp_path):
    validation = ValidationConfig(every=2, pairs=24, draws=2, prompts=0)
    rule = VARIANTS["lora"]
    whole = with_training(cached_config, steps=4, checkpoint_every=2, validation=validation)
    other = elsewhere(whole, tmp_path / "elsewhere")
    trained(whole, rule)
    # Killed while it measured nothing, or something else; resumed as the unbroken run was.
    for kept in (NO_VALIDATION, validation.model_copy(update={"draws": 3})):
        config = elsewhere(other, tmp_path / f"every{kept.every}")
        with pytest.raises(StopHere):
            trained(with_training(config, validation=kept), rule, stop_after(3))
        trained(with_training(config, validation=validation), rule)
        frames = [
            Store(c.store_location).read(schemas.TRAINING_VALIDATIONS, rule.name).filter(pl.col("step") == 4)
            for c in (whole, config)
        ]
        assert frames[0].equals(frames[1])


def test_the_best_model_cannot_be_exported_without_validation(cached_config):
    with pytest.raises(ConfigError, match=r"export = 'best'.*every"):
        trained(with_training(cached_config, export="best"), variant())
    validation = ValidationConfig(every=1, pairs=8, draws=1, prompts=0, best_by="median_score")
    with pytest.raises(ConfigError, match=r"median_score.*found \['implicit"):
        trained(with_training(cached_config, export="best", validation=validation), variant())


def test_a_recipe_can_start_from_another_recipes_model(cached_config, monkeypatch):
    stages = [variant(name="stage", objective=SFT()), variant(name="after", start="stage")]
    for rule in stages:
        monkeypatch.setitem(recipes.RECIPES, rule.name, lambda rule=rule: rule)
    config = with_training(cached_config, steps=3)
    training = training_of(config)
    with pytest.raises(loop.NotTrained, match="--recipe stage"):
        training.run("after")
    first = training.train("stage")
    training.train("after")
    metrics = training.store.read(schemas.TRAINING_METRICS, "after")
    assert metrics["margin"][0] == 0
    run = training.run("after")
    trainer = loop.Trainer(run, lambda m: None)
    start = weights_of(first.model)
    assert all(torch.equal(start[n], p) for n, p in trainer.policy.named_parameters())


def test_a_finished_run_is_found_and_another_seed_is_another_run(cached_config):
    cached_config = with_training(cached_config, steps=2)
    first = training_of(cached_config).train("diffusion_dpo")
    again = training_of(cached_config).train("diffusion_dpo")
    assert not first.metrics.is_reused
    assert again.metrics.is_reused
    assert again.model == first.model
    other = cached_config.model_copy(
        update={"training": cached_config.training.model_copy(update={"seed": 1, "steps": 2})}
    )
    second = training_of(other).train("diffusion_dpo")
    assert second.model != first.model
    assert (first.model / "unet").exists()


def test_the_export_is_a_plain_diffusers_folder_with_the_base_models_other_parts(cached_config):
    from diffusers import StableDiffusionPipeline

    training = training_of(with_training(cached_config, steps=2))
    trained = training.train("diffusion_dpo")
    base = training.backbone.model.folder
    for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
        names = sorted(p.name for p in (base / part).iterdir())
        assert sorted(p.name for p in (trained.model / part).iterdir()) == names
        assert all((base / part / n).read_bytes() == (trained.model / part / n).read_bytes() for n in names)
    pipeline = StableDiffusionPipeline.from_pretrained(trained.model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a small red circle", num_inference_steps=2, guidance_scale=3.0).images[0]
    assert picture.size == (32, 32)
    start, end = weights_of(base), weights_of(trained.model)
    assert any(not torch.equal(start[k].float(), end[k].float()) for k in start)


def test_a_policy_that_excludes_everything_is_an_error_that_says_so(cached_config):
    @dataclasses.dataclass(frozen=True)
    class Nobody:
        name: str = "nobody"

        def apply(self, preferences):
            return preferences.with_columns(target_label_0=pl.lit(None, pl.Float64))

    training = training_of(cached_config)
    empty = dataclasses.replace(recipe("diffusion_dpo"), policy=Nobody())
    run = loop.Run(training.store, cached_config, empty, training.backbone)
    with pytest.raises(StoreError, match="excluded all"):
        loop.train(run, lambda message: None)


def test_training_pairs_are_train_pairs_with_the_side_that_people_chose_as_winner(cached_config):
    store = Store(cached_config.store_location)
    pairs = data.select_pairs(store, recipe("diffusion_dpo").policy, ["train"])
    joined = pairs.join(store.read(schemas.PREFERENCES), on="pair_id")
    assert len(joined) == len(pairs) > 50
    assert set(joined["split"]) == {"train"}
    first = joined["winner_id"] == joined["image_0_id"]
    assert (first == (joined["human_label_0"] > 0.5)).all()
    assert (joined["human_label_0"] != 0.5).all()


def test_samples_of_a_model_wait_for_its_training(cached_config):
    with pytest.raises(loop.NotTrained, match="--recipe diffusion_dpo"):
        training_of(cached_config).samples("diffusion_dpo")


def test_a_backbone_that_predicts_epsilon_trains_from_log_two_as_well(cached_config, tmp_path):
    folder = tmp_path / "epsilon"
    shutil.copytree(cached_config.backbone.checkpoint, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "epsilon"}))
    config = cached_config.model_copy(
        update={
            "backbones": (cached_config.backbone.model_copy(update={"name": "epsilon", "checkpoint": str(folder)}),),
            "training": with_training(cached_config, steps=2).training,
        }
    )
    training = training_of(config)
    assert not training.backbone.model.predicts_velocity
    for key in training.shard_keys():
        training.latents(key)
    training.prompt_embeddings()
    training.train("diffusion_dpo")
    metrics = training.store.read(schemas.TRAINING_METRICS, "diffusion_dpo")
    assert metrics["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"][1] != 0


def test_a_missing_backbone_is_named_with_what_to_do(cached_config, tmp_path):
    from pipelines.hub import CheckpointError

    missing = cached_config.backbone.model_copy(update={"checkpoint": str(tmp_path)})
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing.*world_models"):
        training_of(cached_config.model_copy(update={"backbones": (missing,)}))
