import diffusers
import pytest
import torch

from trainers.backbones import random_pipelines


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (random_pipelines.sd15_unet_config, 859_520_964),
        (random_pipelines.sd21_unet_config, 865_910_724),
        (random_pipelines.sdxl_unet_config, 2_567_463_684),
    ],
)
def test_the_published_unets_have_the_published_numbers_of_parameters(config, parameters):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config())
    assert sum(p.numel() for p in unet.parameters()) == parameters


def test_a_seed_decides_the_weights_and_the_global_randomness_stays(make_pipeline, tmp_path):
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_pipeline("sdxl", tmp_path / name, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    for part in ("unet", "vae"):
        a, b, c = ((tmp_path / n / part / "diffusion_pytorch_model.safetensors").read_bytes() for n in ("a", "b", "c"))
        assert a == b != c


def test_tiny_pipelines_have_the_parts_of_their_family(backbone_of):
    unets = {case: backbone_of(case).unet.config for case in ("sd15", "sd21", "sdxl")}
    assert [c.use_linear_projection for c in unets.values()] == [False, True, True]
    assert [c.addition_embed_type for c in unets.values()] == [None, None, "text_time"]
    assert [len(backbone_of(case).text_encoders) for case in unets] == [1, 1, 2]
