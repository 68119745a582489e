import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import training, training_flops, training_gpu, training_jobs
from pipelines.tables import Store
from trainers import inversion
from trainers.recipes import Inversion, recipe

# --- counting --------------------------------------------------------------------------------------------------------


def test_a_product_of_matrices_counts_a_multiplication_and_an_addition():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert training_flops.count(lambda: a @ b) == 2 * 3 * 5 * 7


def test_attention_is_counted_on_the_meta_device():
    q, k, v = (torch.empty(2, 8, n, 40, device="meta") for n in (64, 77, 77))
    found = training_flops.count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert found == 2 * 2 * (2 * 8 * 64 * 77 * 40)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_pair_costs_a_forward_and_two_for_the_gradients_of_all_weights_and_activations(name):
    cost = training_jobs.cost(training_jobs.architectures(True)[name], "full")
    assert cost.reference == cost.forward
    # The first layer's input and the embedding of time and prompt need no gradient.
    assert 1.8 * cost.forward < cost.backward < 2 * cost.forward


def test_adapters_cost_their_own_products_and_save_the_gradients_of_frozen_weights():
    architecture = training_jobs.architectures(True)["sd15"]
    full, lora = (training_jobs.cost(architecture, w) for w in ("full", "lora"))
    assert lora.reference == full.reference
    assert lora.backward < 0.75 * full.backward
    policy = training_jobs.make_trainable(
        training_jobs.UNet2DConditionModel.from_config(architecture.unet), training_jobs.WEIGHTS["lora"], 0
    )
    tokens = []
    for name, module in policy.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda m, i, o: tokens.append(i[0].shape[:-1].numel() * m.weight.numel()))
    shapes = architecture.shapes
    policy(
        torch.zeros(2, *shapes.latent),
        torch.zeros(2, dtype=torch.long),
        encoder_hidden_states=torch.zeros(2, shapes.tokens, shapes.width),
    )
    assert lora.forward - full.forward == 2 * sum(tokens) > 0


# --- the CPU part ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return training.tiny(tmp_path_factory.mktemp("bench"), training.QUICK)


def online(world, mode):
    noising = Inversion(mode, 4, "policy" if mode == "released" else "reference", is_cached=False)
    rule = replace(recipe("smpo"), name=f"smpo_{mode}", noising=noising, optimiser=training.RULE)
    return training.Ours(world.run(rule, replace(training.QUICK, repeats=2)))


@pytest.mark.parametrize("mode", ["consistent", "released"])
def test_the_bound_counts_the_forwards_that_inverting_online_takes(tiny, mode):
    ours = online(tiny, mode)
    rows, taken = [], []
    inverts = ours.trainer.policy if mode == "released" else ours.trainer.reference
    predict = ours.trainer.backbone.predict

    def counted(unet, noisy, timesteps, conditioning):
        if unet is inverts or (mode == "released" and unet is ours.trainer.model):
            rows.append(len(noisy))
        return predict(unet, noisy, timesteps, conditioning)

    ours.trainer.backbone.predict = counted
    try:
        for _ in range(3):
            rows.clear()
            ours.step()
            # The step's own forward of that model is no inversion.
            taken.append((sum(rows) - 2 * tiny.pairs) / (2 * tiny.pairs))
    finally:
        del ours.trainer.backbone.predict
        ours.trainer.close()
    size = replace(training.QUICK, repeats=2, levels=4)
    assert training.forwards(ours, mode, size) == dict(enumerate(taken[1:], start=1))


def test_consistent_inversion_with_ten_levels_takes_ten_forwards_on_average():
    # Level j of 1 to 9 takes 2 j of them: with four more for the step itself 3.5 times the work.
    assert training.expected_forwards("consistent", 10, 1000) == 10
    assert training.expected_forwards("released", 10, 1000) == pytest.approx(12.8, abs=0.3)
    assert len(inversion.levels(1000, 10, "consistent")) == 9


def test_the_bare_work_is_that_of_our_step(tiny):
    rule = replace(recipe("diffusion_dpo"), optimiser=replace(training.RULE, learning_rate=1e-3, warmup_steps=0))
    ours = training.Ours(tiny.run(rule, replace(training.QUICK, repeats=2)))
    bare = training.Bare(ours, rule.weights)
    noisy, target, timesteps, hidden = bare.ready[0]
    with torch.no_grad():
        error = (bare.policy(noisy, timesteps, hidden).sample - target).pow(2).mean((1, 2, 3))
    seen = []
    loss = ours.trainer.bound.loss
    ours.trainer.bound.loss = lambda batch, statistics: (seen.append(batch), loss(batch, statistics))[1]
    ours.step()
    ours.trainer.close()
    assert torch.allclose(seen[0].policy_error.flatten(), error, rtol=1e-4)


def test_the_quick_run_prints_every_way_and_every_goal(tiny, capsys):
    report = training.Report()
    training.measure(tiny, training.QUICK, report)
    report.show()
    shown = capsys.readouterr().out
    for way in (
        "plain online step",
        "ours: caches",
        "bare forwards",
        "cached trajectories",
        "released",
        "online metric",
    ):
        assert way in shown
    assert len(report.rows) == 9 + 3
    assert len(report.goals) == 2 + 3 + 2
    assert shown.count("PASS  ") + shown.count("MISSED  ") == len(report.goals)


def test_goals_are_judged_by_the_figures():
    report = training.Report()
    report.at_most("a", 1.05, 1.05)
    report.at_most("b", 1.0501, 1.05)
    report.at_least("c", 0.9, 0.9)
    report.at_least("d", 0.8999, 0.9)
    assert [g.is_met for g in report.goals] == [True, False, True, False]


def test_ratios_are_taken_within_turns():
    times = training.Times(["slow", "fast"])
    times.seconds = {"slow": {1: 2.0, 3: 40.0, 5: 9.0}, "fast": {1: 1.0, 2: 7.0, 3: 10.0, 4: 7.0, 5: 3.0}}
    assert times.ratio("slow", "fast") == 3.0
    assert times.ratio("slow", "fast", {1: 2.0, 3: 2.0, 5: 3.0}) == 1.0
    assert times.median("slow") == 9.0


@pytest.mark.slow
def test_a_narrow_sd15_runs_through_all_of_it(capsys, monkeypatch):
    assert training.main(["--quick"]) == 0
    shown = capsys.readouterr().out
    assert "sd15/20 lora" in shown
    assert "published SD1.5" in shown


def test_the_narrowed_sd15_is_a_backbone_of_the_family(tmp_path):
    world = training.narrow(tmp_path, replace(training.QUICK, pictures=6))
    assert isinstance(world.store, Store)
    assert world.backbone.model.latent_shape == (4, 8, 8)
    whole = training.unet_config(1)
    assert training.unet_config(10)["block_out_channels"] == [c // 10 for c in whole["block_out_channels"]]
    assert whole == {**whole, **training_jobs.sd15_unet_config()}


# --- the GPU part ----------------------------------------------------------------------------------------------------


def run(folder, *arguments):
    """Run the benchmark where Dagster cannot be imported: a machine with a GPU may have none."""
    (folder / "dagster.py").write_text("raise ImportError('imported by a benchmark')\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "benchmarks.training_gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_tiny_models_run_through_the_plan_and_policy_and_reference_agree_at_first(tmp_path):
    out = tmp_path / "rows.jsonl"
    chosen = ("--only", "sdxl-full=1,sd15-lora=1", "--stages", "0", "1", "--per-job", "0", "--out", str(out))
    done = run(tmp_path, "--device", "cpu", "--tiny", *chosen)
    assert done.returncode == 0, done.stderr[-2000:]
    head, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert head["rate"] > 0
    assert all("error" not in r for r in rows)
    # Two baselines, three settings each.
    assert len(rows) == 8
    for row in rows:
        # Bit for bit the same at first, though the one casts its weights at every forward.
        assert row["first_loss"] == pytest.approx(math.log(2), abs=1e-7), row["job"]
        assert row["pairs_per_second"] == pytest.approx(row["job"]["micro"] / row["seconds"])
        assert row["of_rate"] == pytest.approx(row["flops"] / head["rate"])
        assert row["steps"] == training_jobs.LEAST_STEPS
    assert {r["job"]["norms"] for r in rows} == {"float32", "half"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_it_would_run(capsys):
    assert training_gpu.main(["--only", "sd15-lora"]) == 0
    shown = capsys.readouterr().out
    assert "no CUDA device" in shown
    # Policy forward and backward with adapters, reference without: 156 pairs/s at 790 TFLOP/s.
    assert "5.04 TFLOP a pair" in shown


def test_an_unknown_group_is_refused():
    with pytest.raises(SystemExit, match=r"sd15-full.*found 'sd2'"):
        training_gpu.main(["--only", "sd2"])


ECHO = """
import json, sys, time
for line in sys.stdin:
    message = json.loads(line)
    if message == "hang":
        time.sleep(60)
    if message == "die":
        sys.exit(3)
    print(json.dumps({"said": message}), flush=True)
"""


def test_a_job_that_hangs_or_dies_does_not_take_the_next_one_with_it():
    worker = training_gpu.Worker([sys.executable, "-c", ECHO])
    try:
        assert worker.ask("a", 20) == {"said": "a"}
        started = time.monotonic()
        assert worker.ask("hang", 0.5) == {"error": "stopped after 0 s"}
        assert time.monotonic() - started < 10
        assert worker.ask("b", 20) == {"said": "b"}
        assert "process ended" in worker.ask("die", 20)["error"]
        assert worker.ask("c", 20) == {"said": "c"}
    finally:
        worker.stop()


class Scripted:
    """Answers jobs with times by a rule."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def ask(self, message, timeout):
        job = training_jobs.Job(**message)
        self.asked.append(job)
        found = self.seconds(job)
        if found is None:
            return {"error": training_jobs.OUT_OF_MEMORY}
        return {"seconds": found, "warming": 0.0, "peak_gib": 1.0}

    def stop(self):
        pass


def bench_of(seconds):
    groups = [("sdxl", "full"), ("sd15", "full")]
    bench = training_gpu.Bench(Scripted(seconds), None, 1000.0, groups, is_tiny=True)
    bench.matrix_rate = 1e12
    return bench


def test_the_micro_batch_grows_while_it_fits_and_is_worth_it():
    fixed = bench_of(lambda job: None if job.micro > 4 else 1 + 0.1 * job.micro)
    fixed.search(("sdxl", "full"), (1, 2, 4, 8))
    assert fixed.groups["sdxl", "full"].baseline.micro == 4
    linear = bench_of(lambda job: 0.1 * job.micro)
    linear.search(("sdxl", "full"), (1, 2, 4, 8))
    assert linear.groups["sdxl", "full"].baseline.micro == 1
    fixed.close()
    linear.close()


def test_what_helped_is_tried_together_the_better_of_two_that_exclude_each_other():
    speed = {"half": 0.9, "cudnn": 0.8, "plain": 0.95}

    def seconds(job):
        slower = 1.5 if job.channels_last else 1.0
        return slower * job.micro * speed.get(job.norms, 1.0) * speed.get(job.attention, 1.0) / job.accumulation

    bench = bench_of(seconds)
    plan = [
        (
            ("sd15-full",),
            [
                {"attention": "cudnn"},
                {"attention": "plain"},
                {"norms": "half"},
                {"channels_last": True},
                {"accumulation": 2},
                training_gpu.TOGETHER,
            ],
        )
    ]
    training_gpu.everything(bench, {("sd15", "full"): (2,)}, plan)
    last = bench._worker.asked[-1]
    assert last == training_jobs.Job("sd15", "full", 2, attention="cudnn", norms="half")
    bench.close()
