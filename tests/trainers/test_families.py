"""Every family of backbones through caches, the loop, its export and plain diffusers, with tiny random weights."""

import dataclasses
import math

import pytest
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from pipelines import schemas
from pipelines.config import BackboneConfig, ValidationConfig
from pipelines.tables import Store
from trainers import loop
from trainers.backbones.random_pipelines import TINY_RESOLUTION, make_pipeline
from trainers.recipes import AdaptiveDPO, FullWeights, Inversion, LoRA, Optimiser, recipe
from trainers.steps import Training

PIPELINES = {"sd15": StableDiffusionPipeline, "sd21": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
RATE = Optimiser(learning_rate=1e-3, warmup_steps=0)


@pytest.mark.parametrize(
    ("family", "prediction", "weights"),
    [
        ("sd15", "epsilon", FullWeights()),
        ("sd21", "epsilon", LoRA(rank=2, alpha=2)),
        ("sd21", "v_prediction", FullWeights()),
        ("sdxl", "epsilon", FullWeights()),
        ("sdxl", "epsilon", LoRA(rank=2, alpha=4)),
    ],
)
def test_a_family_trains_from_its_caches_and_its_export_draws_in_plain_diffusers(
    cached_config, tmp_path, family, prediction, weights
):
    folder = make_pipeline(family, tmp_path / "base", prediction=prediction)
    backbone = BackboneConfig(name=family, family=family, checkpoint=str(folder), resolution=TINY_RESOLUTION)
    options = {"steps": 2, "batch_size": 4, "validation": ValidationConfig(every=2, pairs=6, draws=1, prompts=2)}
    config = cached_config.model_copy(
        update={
            "backbones": (backbone,),
            "training": cached_config.training.model_copy(update=options),
            "evaluation": cached_config.evaluation.model_copy(update={"steps": 2}),
        }
    )
    training = Training(Store(config.store_location), config, lambda m: None)
    for key in training.shard_keys():
        training.latents(key)
    training.prompt_embeddings()
    plain = dataclasses.replace(recipe("diffusion_dpo"), family=family, weights=weights, optimiser=RATE)
    smpo = dataclasses.replace(
        recipe("smpo"), family=family, weights=weights, optimiser=RATE, noising=Inversion(steps=3)
    )
    adaptive = dataclasses.replace(plain, name="adaptive", objective=AdaptiveDPO())
    for rule in (plain, smpo, adaptive):
        done = loop.train(loop.Run(training.store, config, rule, training.backbone), lambda m: None)
        metrics = training.store.read(schemas.TRAINING_METRICS, rule.name)
        assert metrics["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        assert metrics["margin"][1] != 0
    whole = isinstance(weights, FullWeights)
    pipeline = PIPELINES[family].from_pretrained(done.model if whole else folder, local_files_only=True)
    if not whole:
        pipeline.load_lora_weights(str(done.model))
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": TINY_RESOLUTION, "width": TINY_RESOLUTION}
    picture = pipeline("a red circle", num_inference_steps=2, **size).images[0]
    assert picture.size == (TINY_RESOLUTION, TINY_RESOLUTION)
