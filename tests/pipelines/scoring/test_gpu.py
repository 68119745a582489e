"""What only a GPU can show: float32 there is float32, and memory that runs out costs time, not the run. `make test-gpu`."""

import numpy as np
import pytest
import torch

from benchmarks import random_models
from pipelines.config import small_world
from pipelines.scoring.pictures import Picture
from pipelines.scoring.scorer import load
from pipelines.world import scene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def pictures(count, seed=0):
    from PIL import Image

    rng = np.random.default_rng(seed)
    prompts = [scene.all_prompts()[i] for i in rng.integers(0, 1000, count)]
    drawn = scene.render(scene.sample_scenes([scene.parse_prompt(p) for p in prompts], rng))
    return [Picture(Image.fromarray(p).resize((256, 256))) for p in drawn], prompts


@pytest.mark.parametrize("config", small_world().scorers, ids=lambda s: s.name)
def test_float32_on_the_gpu_gives_the_scores_of_the_cpu(config):
    shown, prompts = pictures(64)
    here, there = load(config), load(config, "cuda")
    prepared = [here.prepare(p) for p in shown]
    scale = getattr(here, "logit_scale", 1.0) if config.kind == "pickscore" else 1.0
    np.testing.assert_allclose(there.score(prepared, prompts), here.score(prepared, prompts), atol=1e-5 * max(1, scale))


def test_a_vit_b_keeps_float32_in_its_convolution_too(tmp_path):
    config = next(s for s in random_models.write(tmp_path, "base", 16) if s.name == "hpsv2")
    shown, prompts = pictures(16)
    here, there = load(config), load(config, "cuda")
    prepared = [here.prepare(p) for p in shown]
    np.testing.assert_allclose(there.score(prepared, prompts), here.score(prepared, prompts), atol=1e-5)


@pytest.mark.parametrize("config", small_world().scorers, ids=lambda s: s.name)
def test_bfloat16_on_the_gpu_stays_near_float32(config):
    shown, prompts = pictures(256)
    exact = load(config, "cuda")
    quick = load(config.model_copy(update={"precision": "bfloat16"}), "cuda")
    prepared = [exact.prepare(p) for p in shown]
    a, b = exact.score(prepared, prompts), quick.score(prepared, prompts)
    assert np.std(a - b) < 0.05 * np.std(a)


def test_memory_that_runs_out_halves_the_batch_and_gives_the_same_scores(tmp_path):
    config = next(s for s in random_models.write(tmp_path, "base", 512) if s.name == "hpsv2")
    model = load(config, "cuda")
    shown, prompts = pictures(16)
    prepared = [model.prepare(p) for p in shown] * 32
    wanted = model.score(prepared[:16], prompts)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600e6) / total)
        scores = model.score(prepared, prompts * 32)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert model.batch_size < 512
    assert model.messages
    np.testing.assert_allclose(scores[:16], wanted, atol=1e-5)
