"""Tiny random pipelines of every family, made once, and backbones over them."""

import pytest
import torch

from pipelines.config import BackboneConfig
from trainers import backbones
from trainers.backbones import random_pipelines

CASES = {
    "tiny": ("tiny", None),
    "sd15": ("sd15", None),
    "sd21-base": ("sd21", "epsilon"),
    "sd21": ("sd21", "v_prediction"),
    "sdxl": ("sdxl", None),
}


@pytest.fixture(scope="session")
def make_pipeline():
    """Write a tiny random pipeline of a family: make_pipeline(family, folder, prediction=..., seed=...)."""
    return random_pipelines.make_pipeline


@pytest.fixture(scope="session")
def config_of(tmp_path_factory):
    """Return the configuration of a case's backbone; its folder is not written to."""
    root = tmp_path_factory.mktemp("pipelines")

    def config(case):
        family, prediction = CASES[case]
        if not (root / case).exists():
            random_pipelines.make_pipeline(family, root / case, prediction=prediction)
        return BackboneConfig(
            name=case, family=family, checkpoint=str(root / case), resolution=random_pipelines.TINY_RESOLUTION
        )

    return config


@pytest.fixture(scope="session")
def backbone_of(config_of):
    """Return the loaded backbone of a case; read only."""
    loaded = {}

    def backbone(case):
        if case not in loaded:
            loaded[case] = backbones.load(config_of(case))
        return loaded[case]

    return backbone


@pytest.fixture(params=["sd15", "sd21-base", "sd21", "sdxl"])
def case(request):
    return request.param


@pytest.fixture
def backbone(backbone_of, case):
    return backbone_of(case)


@pytest.fixture(scope="session")
def question():
    """Return what a UNet is asked in these tests: noisy latents, timesteps, conditioning of three prompts."""

    def ask(backbone):
        noisy = torch.randn(3, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
        prompts = ["a small red circle", "a triangle, left", ""]
        return noisy, torch.tensor([1, 500, 999]), backbone.encode_prompts(prompts)

    return ask


@pytest.fixture(scope="session")
def train():
    """Move everything that is trained, by two steps of gradient descent towards zero predictions."""

    def step(backbone, unet, asked):
        parameters = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        # One step moves B alone: A's gradient is B's.
        for _ in range(2):
            backbone.predict(unet, *asked).pow(2).mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return unet

    return step
