"""Training on a CUDA device: run by `make test-gpu`."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState

from pipelines import schemas
from pipelines.config import ValidationConfig
from pipelines.tables import Store
from trainers import loop
from trainers.recipes import AdaptiveDPO, Inversion, LoRA, Optimiser, ReferencePolicy, recipe
from trainers.steps import Training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _own_precision():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def on_gpu(config, **options):
    options = {"device": "cuda", "batch_size": 16, "validation": ValidationConfig(every=0), **options}
    return config.model_copy(update={"training": config.training.model_copy(update=options)})


def trained(config, rule, report=lambda row: None):
    training = Training(Store(config.store_location), config, lambda m: None)
    run = loop.Run(training.store, config, rule, training.backbone)
    loop.train(run, lambda m: None, report)
    return training.store.read(schemas.TRAINING_METRICS, rule.name), run


def variant(name="diffusion_dpo", /, **changes):
    import dataclasses

    return dataclasses.replace(recipe(name), **changes)


LORA = LoRA(rank=4, alpha=4)
VARIANTS = {
    "full": variant(),
    "lora": variant(weights=LORA, optimiser=Optimiser(learning_rate=1e-2)),
    "hard copy": variant("balanced_dpo", reference=ReferencePolicy("hard_copy", every=2)),
    "adaptive": variant(weights=LORA, objective=AdaptiveDPO(metric="online")),
    "smpo": variant("smpo", noising=Inversion(steps=3)),
    "adafactor": variant(optimiser=Optimiser("adafactor")),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rule", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_first_margin_is_exactly_zero_in_every_precision_and_training_moves_it(cached_config, rule, precision):
    metrics, _ = trained(on_gpu(cached_config, precision=precision), rule)
    assert metrics["margin"][0] == metrics["drift"][0] == 0
    assert metrics["margin"][-1] != 0
    assert metrics["loss"].is_finite().all()
    assert metrics["peak_memory_mib"][0] > 1


def test_the_gpu_gives_the_cpus_loss_curve(cached_config, tmp_path):
    import shutil

    shutil.copytree(cached_config.home, tmp_path / "cpu")
    cpu = cached_config.model_copy(update={"home": str(tmp_path / "cpu")})
    curves = []
    for config in (on_gpu(cached_config, precision="fp32"), on_gpu(cpu, precision="fp32", device="cpu")):
        AcceleratorState._reset_state(reset_partial_state=True)
        curves.append(trained(config, variant())[0]["loss"].to_list())
    assert curves[0] == pytest.approx(curves[1], abs=2e-3)
    assert curves[0][0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_killed_run_resumes_on_the_gpu(cached_config, tmp_path):
    import shutil

    class StopHere(Exception):
        pass

    def stop(row):
        if row["step"] == 3:
            raise StopHere

    shutil.copytree(cached_config.home, tmp_path / "other")
    other = on_gpu(cached_config.model_copy(update={"home": str(tmp_path / "other")}), precision="bf16")
    whole, _ = trained(on_gpu(cached_config, precision="bf16"), VARIANTS["adaptive"])
    with pytest.raises(StopHere):
        trained(other, VARIANTS["adaptive"], stop)
    resumed, _ = trained(other, VARIANTS["adaptive"])
    # Kernels may add up in another order: near, not equal.
    assert resumed["loss"].to_list() == pytest.approx(whole["loss"].to_list(), abs=2e-3)


@pytest.mark.parametrize("name", ["full", "lora", "hard copy"])
def test_compiled_models_give_the_curve_of_plain_ones(cached_config, tmp_path, name):
    import shutil

    shutil.copytree(cached_config.home, tmp_path / "other")
    other = cached_config.model_copy(update={"home": str(tmp_path / "other")})
    plain, _ = trained(on_gpu(cached_config, precision="bf16", steps=4), VARIANTS[name])
    compiled, _ = trained(on_gpu(other, precision="bf16", steps=4, compile="transformers"), VARIANTS[name])
    # Fused kernels round elsewhere: policy and reference are compiled apart, so that the margin starts near zero.
    assert compiled["loss"].to_list() == pytest.approx(plain["loss"].to_list(), abs=0.05)
    assert abs(compiled["margin"][0]) < 1e-3


def test_validation_samples_and_scores_on_the_gpu(cached_config):
    validation = ValidationConfig(every=3, pairs=20, draws=2, prompts=2)
    config = on_gpu(cached_config, precision="bf16", validation=validation)
    _, run = trained(config, variant())
    frame = Store(config.store_location).read(schemas.TRAINING_VALIDATIONS, "diffusion_dpo")
    assert set(frame["step"]) == {0, 3, 6}
    assert "median_score" in set(frame["metric"])
    assert (run.best_folder / "unet").exists()
