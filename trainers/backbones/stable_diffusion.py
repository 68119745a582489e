"""Stable Diffusion 1.5, 2.1 and the tiny one: UNet2DConditionModel, one CLIP text encoder, AutoencoderKL.

Belongs here: what differs between backbones (loading, encoding, predicting, exporting). Not here: training.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from pipelines.config import BackboneConfig
from pipelines.hub import CheckpointError, local_folder
from pipelines.identity import file_digest, fingerprint

PARTS = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")


def resolve(config: BackboneConfig) -> Path:
    """Return the local diffusers folder of a backbone, fetching it if it is a hub id.

    Raises:
        CheckpointError: the folder or a part of it is missing.
    """
    folder = local_folder(f"backbone {config.name!r}", "backbone.checkpoint", config.checkpoint)
    missing = [p for p in ("model_index.json", *PARTS) if not (folder / p).exists()]
    if missing:
        raise CheckpointError(
            f"backbone {config.name!r}: {folder / missing[0]} is missing; expected a diffusers folder with "
            f"model_index.json and {list(PARTS)}. The tiny backbone is made by `python -m trainers.world_models`"
        )
    return folder


def digest(config: BackboneConfig) -> str:
    """Return 16 hex characters of the backbone's files and resolution: the key of everything cached with it."""
    folder = resolve(config)
    files = sorted(f for p in PARTS for f in (folder / p).rglob("*") if f.is_file())
    marks = {str(f.relative_to(folder)): file_digest(f) for f in files}
    return fingerprint(files=marks, resolution=config.resolution)


class StableDiffusionBackbone:
    """The functions through which everything else uses the model."""

    def __init__(self, config: BackboneConfig, device: str | torch.device = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.folder = resolve(config)
        self._pipeline: StableDiffusionPipeline | None = None

        def load(part: Any, name: str, **options: Any) -> Any:
            return part.from_pretrained(self.folder / name, **options).to(self.device).requires_grad_(False).eval()

        self.unet: UNet2DConditionModel = load(UNet2DConditionModel, "unet", torch_dtype=torch.float32)
        self.vae: AutoencoderKL = load(AutoencoderKL, "vae", torch_dtype=torch.float32)
        self.text_encoder: CLIPTextModel = load(CLIPTextModel, "text_encoder", dtype=torch.float32)
        self.tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
        self.scheduler = DDIMScheduler.from_pretrained(self.folder, subfolder="scheduler")
        self.alphas_cumprod: torch.Tensor = self.scheduler.alphas_cumprod.to(self.device)
        self.timesteps = int(self.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Return the text encoder's last hidden states, float32 [N, tokens, width]."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    def to_pixels(self, image: Image.Image) -> torch.Tensor:
        """Return an RGB picture as the autoencoder's input: shortest side to the resolution, centre crop, [-1, 1]."""
        size = self.config.resolution
        short = min(image.size)
        if short != size:
            width, height = (max(size, round(side * size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        pixels = np.array(image.crop((left, top, left + size, top + size)), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log-variance of the posterior, unscaled, [N, 4, H/8, W/8] each."""
        posterior = self.vae.encode(pixels.to(self.device)).latent_dist
        return posterior.mean, posterior.logvar

    @property
    def latent_scale(self) -> float:
        """Return the factor between the autoencoder's latents and the UNet's."""
        return float(self.vae.config.scaling_factor)

    def predict(
        self, unet: torch.nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, prompt_embeddings: torch.Tensor
    ) -> torch.Tensor:
        """Return the model's prediction (epsilon or v), shaped as `noisy`, [N, 4, h, w]."""
        return unet(noisy, timesteps, encoder_hidden_states=prompt_embeddings).sample

    @property
    def vae_factor(self) -> int:
        """Return how many pixels make a cell of the latent, per side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def predicts_velocity(self) -> bool:
        """Return whether the UNet predicts v = sqrt(abar) eps - sqrt(1 - abar) x0 rather than eps."""
        return self.scheduler.config.prediction_type == "v_prediction"

    def pipeline(self, unet: torch.nn.Module) -> StableDiffusionPipeline:
        """Return a diffusers pipeline that samples with `unet` (DDIM)."""
        if self._pipeline is None:
            self._pipeline = StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=unet,
                scheduler=self.scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.unet = unet
        return self._pipeline

    def load_unet(self, folder: Path) -> Any:
        """Load an exported model's UNet."""
        return UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).to(self.device).eval()

    def export(self, unet: Any, folder: Path) -> None:
        """Write a folder that plain diffusers loads: the trained UNet, every other part copied untouched."""
        staging = folder.with_name(folder.name + ".writing")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        shutil.copy(self.folder / "model_index.json", staging)
        for part in PARTS[1:]:
            shutil.copytree(self.folder / part, staging / part)
        unet.save_pretrained(staging / "unet")
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
