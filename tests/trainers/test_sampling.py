import io
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import identity, schemas
from pipelines.config import WEIGHTS, BackboneConfig, EvaluationConfig, PromptSuiteConfig
from pipelines.tables import StoreError
from trainers import backbones, caches, randomness, sampling
from trainers.backbones import random_pipelines
from trainers.recipes import FullWeights, LoRA
from trainers.sampling import BASE, draw

PROMPTS = ["a small red circle", "a triangle, left"]
RULE = LoRA(rank=2, alpha=6)


@pytest.fixture(scope="module")
def backbone_of(tmp_path_factory):
    """Return the loaded random backbone of a family; read only."""
    root, loaded = tmp_path_factory.mktemp("families"), {}

    def backbone(family):
        if family not in loaded:
            folder = random_pipelines.make_pipeline(family, root / family)
            config = BackboneConfig(
                name=family, family=family, checkpoint=str(folder), resolution=random_pipelines.TINY_RESOLUTION
            )
            loaded[family] = backbones.load(config)
        return loaded[family]

    return backbone


@pytest.fixture
def noise():
    return randomness.normal((4, 8, 8), [("test", i) for i in range(len(PROMPTS))])


def moved(unet):
    """Change what is trained of a UNet."""
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return unet


def as_array(pictures):
    return np.stack([np.asarray(p) for p in pictures])


@pytest.mark.parametrize("family", ["tiny", "sd15", "sd21", "sdxl"])
def test_pictures_are_those_of_the_diffusers_pipeline_with_ddim(backbone_of, noise, family):
    backbone = backbone_of(family)
    plain = diffusers.DiffusionPipeline.from_pretrained(backbone.folder, local_files_only=True)
    plain.scheduler = diffusers.DDIMScheduler.from_config(plain.scheduler.config, clip_sample=False)
    expected = plain(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=4.0, height=16, width=16).images
    assert np.array_equal(
        as_array(draw(backbone, backbone.unet, PROMPTS, noise, steps=3, guidance=4.0)), as_array(expected)
    )


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("weights", [FullWeights(), RULE], ids=["full", "lora"])
def test_a_policy_in_training_draws_as_its_export_does_and_stays_in_training(
    backbone_of, noise, family, weights, tmp_path
):
    backbone = backbone_of(family)
    policy = moved(backbone.trainable(weights, None, seed=0))
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    modes: list[bool] = []
    hook = policy.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    drawn = as_array(draw(backbone, policy, PROMPTS, noise, steps=3, guidance=4.0))
    hook.remove()
    assert modes == [False] * 3
    assert policy.training
    assert all(m.training for m in policy.modules())
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trained
    assert all(p.grad is None for p in policy.parameters())
    backbone.export(policy, tmp_path / "model")
    exported = draw(backbone, backbone.load_unet(tmp_path / "model"), PROMPTS, noise, steps=3, guidance=4.0)
    assert np.abs(drawn.astype(int) - as_array(exported)).max() <= 1
    base = as_array(draw(backbone, backbone.unet, PROMPTS, noise, steps=3, guidance=4.0))
    assert not backbone.unet.training
    assert np.abs(drawn.astype(int) - base).max() > 1


def test_a_policy_that_fails_to_draw_is_in_training_again(backbone_of, noise):
    policy = backbone_of("sdxl").trainable(RULE, None, seed=0)
    with pytest.raises(RuntimeError):
        draw(backbone_of("sdxl"), policy, PROMPTS, noise[:, :3], steps=1, guidance=4.0)
    assert policy.training


def test_a_picture_is_decided_by_its_noise_not_by_its_company(backbone_of, noise):
    backbone = backbone_of("sdxl")
    together = as_array(draw(backbone, backbone.unet, PROMPTS, noise, steps=3, guidance=4.0)).astype(int)
    alone = as_array(draw(backbone, backbone.unet, PROMPTS[1:], noise[1:], steps=3, guidance=4.0))
    assert np.abs(together[1] - alone[0]).max() <= 1


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(ingested_copy, tiny_config, backbone_of):
    """Return (store, configuration, backbone) of a family over the tiny world."""

    def make(family):
        store, _ = ingested_copy
        chosen = backbone_of(family).config
        config = tiny_config.model_copy(
            update={
                "backbones": (chosen,),
                "evaluation": EvaluationConfig(prompts=3, seeds=2, steps=2, guidance=3.0, bootstrap=200),
            }
        )
        return store, config, caches.Backbone(chosen, "cpu")

    return make


def pictures(store, model):
    frame = store.read(schemas.SAMPLES, model).sort("prompt_id", "seed")
    return frame, as_array([Image.open(io.BytesIO(b)) for b in frame["bytes"]]).astype(int)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_samples_are_pictures_of_held_out_prompts_with_the_models_own_noise(world, family):
    store, config, backbone = world(family)
    lines = []
    built = sampling.sample(store, config, backbone, BASE, None, None, lines.append)
    frame, drawn = pictures(store, BASE)
    prompts = sampling.evaluation_prompts(store, config)
    assert frame.select("prompt_id", "seed").rows() == sorted((p, s) for p in prompts["prompt_id"] for s in (0, 1))
    assert lines[-1] == "samples of base: 6/6"
    assert frame["image_id"].to_list() == [identity.image_id_of_bytes(b)[0] for b in frame["bytes"]]
    row = frame.row(3, named=True)
    noise = randomness.normal((4, 8, 8), [("sample", row["seed"], row["prompt_id"])])
    expected = draw(backbone.model, backbone.model.unet, [row["prompt"]], noise, steps=2, guidance=3.0)
    assert np.abs(drawn[3] - as_array(expected)[0]).max() <= 1
    assert sampling.sample(store, config, backbone, BASE, None, None).is_reused
    assert built.manifest.rows == 6


@pytest.mark.parametrize("weights", [FullWeights(), RULE], ids=["full", "lora"])
def test_samples_of_an_exported_model_are_keyed_by_its_run(world, weights, tmp_path):
    store, config, backbone = world("sdxl")
    policy = moved(backbone.model.trainable(weights, None, seed=0))
    backbone.model.export(policy, tmp_path / "model")
    run = replace(store.require("catalogue_prompts"), table="training_metrics", fingerprint="of the run")
    sampling.sample(store, config, backbone, BASE, None, None)
    sampling.sample(store, config, backbone, "dpo", tmp_path / "model", run)
    (base, before), (frame, after) = pictures(store, BASE), pictures(store, "dpo")
    assert frame.select("prompt_id", "seed").equals(base.select("prompt_id", "seed"))
    assert np.abs(before - after).max() > 1
    row = frame.row(0, named=True)
    noise = randomness.normal((4, 8, 8), [("sample", row["seed"], row["prompt_id"])])
    assert (
        np.abs(
            after[0] - as_array(draw(backbone.model, policy, [row["prompt"]], noise, steps=2, guidance=3.0))[0]
        ).max()
        <= 1
    )
    assert sampling.sample(store, config, backbone, "dpo", tmp_path / "model", run).is_reused
    other = replace(run, fingerprint="of another run")
    assert not sampling.sample(store, config, backbone, "dpo", tmp_path / "model", other).is_reused


def test_prompts_of_a_suite_are_sampled_in_their_order(world, tmp_path):
    store, config, backbone = world("sd15")
    (tmp_path / "suite.txt").write_text("a small red circle\na triangle, left\na square\na large circle\n")
    config = config.model_copy(
        update={
            "prompt_suites": (PromptSuiteConfig(name="mine", file=str(tmp_path / "suite.txt")),),
            "evaluation": config.evaluation.model_copy(update={"suite": "mine"}),
        }
    )
    sampling.sample(store, config, backbone, BASE, None, None)
    texts = store.read(schemas.SAMPLES, BASE)["prompt"].unique(maintain_order=True).to_list()
    assert texts == ["a small red circle", "a triangle, left", "a square"]


def test_a_store_without_held_out_prompts_is_refused(world):
    store, config, backbone = world("sd15")
    prompts = store.read(schemas.CATALOGUE_PROMPTS)
    store.write(schemas.CATALOGUE_PROMPTS, prompts.filter(split="train"), made_from="train alone")
    with pytest.raises(StoreError, match="no prompt of split test or validation"):
        sampling.sample(store, config, backbone, BASE, None, None)


def test_the_shipped_tiny_weights_still_draw(noise):
    config = BackboneConfig(name="tiny", family="tiny", checkpoint=str(WEIGHTS / "tiny-sd"), resolution=32)
    backbone = backbones.load(config)
    drawn = as_array(draw(backbone, backbone.unet, PROMPTS, noise, steps=8, guidance=3.0))
    assert drawn.shape == (2, 32, 32, 3)
    # A small red circle: somewhere far more red than green.
    assert (drawn[0, ..., 0].astype(int) - drawn[0, ..., 1]).max() > 60
