"""What all backbones offer, on tiny random pipelines of every family."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import small_world
from trainers import backbones
from trainers.recipes import FullWeights


def plain_pipeline(config):
    """Return what plain diffusers makes of a backbone's folder."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(config.checkpoint, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def picture():
    draw = np.random.default_rng(3)
    return Image.fromarray(draw.integers(0, 255, (24, 40, 3), np.uint8))


def test_the_parts_are_those_that_plain_diffusers_reads(backbone):
    plain = plain_pipeline(backbone.config)
    for mine, theirs in (
        (backbone.unet, plain.unet),
        (backbone.vae, plain.vae),
        *((encoder, getattr(plain, name)) for name, encoder in backbone.text_encoders.items()),
    ):
        expected = theirs.state_dict()
        assert mine.state_dict().keys() == expected.keys()
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, expected[name])
            assert not tensor.is_floating_point() or tensor.dtype == torch.float32
        assert not mine.training
        assert not any(p.requires_grad for p in mine.parameters())
    assert type(plain) is backbone.pipeline_class


def test_nothing_is_read_before_it_is_used(config_of, case):
    backbone = backbones.load(config_of(case))
    assert backbone.latent_shape == (4, 8, 8)
    assert backbone.timesteps == len(backbone.alphas_cumprod) == 1000
    assert backbone.vae_factor == 2
    assert backbone.digest == backbones.digest(backbone.config)
    assert not {"unet", "vae", "text_encoders", "tokenizers"} & vars(backbone).keys()


def test_the_schedule_is_the_checkpoints(backbone):
    plain = plain_pipeline(backbone.config)
    torch.testing.assert_close(backbone.alphas_cumprod, plain.scheduler.alphas_cumprod)
    assert backbone.predicts_velocity == (plain.scheduler.config.prediction_type == "v_prediction")
    assert backbone.predicts_velocity == (backbone.config.name == "sd21")
    assert backbone.scheduler.config.clip_sample is False
    assert backbone.latent_scale == plain.vae.config.scaling_factor


def test_the_scale_of_latents_is_known_where_the_file_leaves_it_out(make_pipeline, config_of, tmp_path):
    folder = make_pipeline("sd15", tmp_path / "sd15")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "scaling_factor"}))
    config = config_of("sd15").model_copy(update={"checkpoint": str(folder)})
    assert backbones.load(config).latent_scale == 0.18215


def test_one_encoder_gives_its_last_hidden_states_as_the_pipeline_does(backbone_of):
    for case in ("tiny", "sd15", "sd21"):
        backbone, prompts = backbone_of(case), ["a small red circle", "", "a circle " * 50]
        encoded = backbone.encode_prompts(prompts)
        expected, empty = plain_pipeline(backbone.config).encode_prompt(prompts, "cpu", 1, True)
        torch.testing.assert_close(encoded.hidden, expected)
        torch.testing.assert_close(encoded.hidden[1], empty[0])
        assert encoded.hidden.dtype == torch.float32
        assert encoded.pooled is None


def test_latents_are_the_autoencoders_posterior(backbone, picture):
    pixels = torch.stack([backbone.to_pixels(picture), backbone.to_pixels(picture).flip(-1)])
    mean, log_variance = backbone.encode_images(pixels)
    posterior = plain_pipeline(backbone.config).vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(log_variance, posterior.logvar)
    assert mean.shape == (2, *backbone.latent_shape)


def test_pixels_are_the_middle_of_the_picture_at_the_resolution(backbone_of, picture):
    backbone = backbone_of("sd15")
    small = picture.resize((27, 16), Image.Resampling.BILINEAR).crop((5, 0, 21, 16))
    expected = torch.from_numpy(np.array(small, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(backbone.to_pixels(picture), expected)
    assert torch.equal(backbone.to_pixels(small), expected)


def test_decoding_gives_the_pictures_of_the_pipelines_own_decoder(backbone):
    plain, latents = plain_pipeline(backbone.config), torch.randn(3, *backbone.latent_shape)
    with torch.no_grad():
        decoded = plain.vae.decode(latents / plain.vae.config.scaling_factor).sample
    expected = plain.image_processor.postprocess(decoded, output_type="pil")
    for mine, theirs in zip(backbone.decode_latents(latents), expected, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


def test_autoencoder_and_text_encoders_compute_in_float32_under_autocast(backbone_of, picture):
    backbone = backbone_of("sdxl")
    pixels, prompts = backbone.to_pixels(picture)[None], ["a small red circle"]
    outside = (*backbone.encode_images(pixels), backbone.encode_prompts(prompts))
    with torch.autocast("cpu", torch.bfloat16):
        inside = (*backbone.encode_images(pixels), backbone.encode_prompts(prompts))
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])
    assert torch.equal(inside[2].hidden, outside[2].hidden)
    assert torch.equal(inside[2].pooled, outside[2].pooled)


def test_a_prediction_is_the_unets_for_each_row_alone(backbone, question):
    noisy, timesteps, conditioning = question(backbone)
    together = backbone.predict(backbone.unet, noisy, timesteps, conditioning)
    assert together.shape == noisy.shape
    for i in range(len(noisy)):
        alone = backbone.predict(backbone.unet, noisy[i : i + 1], timesteps[i : i + 1], conditioning[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
    swapped = backbone.predict(backbone.unet, noisy, timesteps, conditioning[[1, 0, 2]])
    assert not torch.allclose(swapped[0], together[0])
    torch.testing.assert_close(swapped[2], together[2], atol=1e-5, rtol=1e-5)


def test_the_pipeline_samples_with_the_unet_that_it_is_given(backbone, question, train):
    noise = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(2))
    options = {"latents": noise, "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    first = backbone.pipeline(backbone.unet)(["a circle"], **options).images
    plain = plain_pipeline(backbone.config)
    plain.scheduler = diffusers.DDIMScheduler.from_config(plain.scheduler.config, clip_sample=False)
    torch.testing.assert_close(plain(["a circle"], **options).images, first)
    other = train(backbone, backbone.trainable(FullWeights(), None, seed=0), question(backbone))
    assert not torch.allclose(backbone.pipeline(other)(["a circle"], **options).images, first)
    assert torch.equal(backbone.pipeline(backbone.unet)(["a circle"], **options).images, first)


def test_memory_bounds_how_many_pictures_are_taken_at_once(config_of):
    def at_once(resolution):
        return backbones.load(config_of("sd15").model_copy(update={"resolution": resolution})).pictures_at_once

    assert [at_once(r) for r in (32, 512, 768, 1024, 2048)] == [64, 8, 3, 2, 1]


def test_a_small_pipeline_of_the_shipped_weights_is_a_tiny_backbone():
    config = small_world().backbone
    backbone = backbones.load(config)
    assert backbone.predicts_velocity
    assert backbone.latent_shape == (4, 8, 8)
    assert backbone.encode_prompts(["a circle"]).hidden.shape[0] == 1
