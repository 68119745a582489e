"""Stable Diffusion 1.5, 2.1 and the tiny one: UNet2DConditionModel, one CLIP text encoder, AutoencoderKL.

Belongs here: loading, encoding, predicting, exporting, for these and, where they do not differ, for all. Not here: training,
what SDXL does otherwise (`stable_diffusion_xl`).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from pipelines.config import BackboneConfig
from trainers.backbones import exports, folders
from trainers.backbones.adapters import has_adapters, make_trainable
from trainers.backbones.conditioning import Conditioning
from trainers.recipes import FullWeights, LoRA

PICTURES_AT_512 = 8
"""How many pictures of 512 x 512 pixels are encoded or sampled at once: about 6 GB in the float32 autoencoder."""
PICTURES_AT_ONCE = 64
_START = "started_from"
"""Attribute of a UNet with adapters: the export that it was before they were added."""


class StableDiffusionBackbone:
    """The functions through which everything else uses the model; see `trainers.backbones`.

    Weights are read when they are first used, in float32: training from caches needs neither autoencoder nor text encoder.
    """

    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    encoder_classes: ClassVar[dict[str, Any]] = {"text_encoder": CLIPTextModel}

    def __init__(
        self, config: BackboneConfig, checkpoint: folders.Checkpoint, device: str | torch.device = "cpu"
    ) -> None:
        """Read the configurations; `load` of `trainers.backbones` finds the checkpoint."""
        self.config, self.checkpoint, self.device = config, checkpoint, torch.device(device)
        self.folder = checkpoint.folder
        # Latents are not bounded as pixels are, whatever a scheduler's file leaves to its default.
        self.scheduler = DDIMScheduler.from_pretrained(checkpoint.part("scheduler"), clip_sample=False)
        self.alphas_cumprod: torch.Tensor = self.scheduler.alphas_cumprod.to(self.device)
        self.timesteps = int(self.scheduler.config.num_train_timesteps)
        self.predicts_velocity: bool = self.scheduler.config.prediction_type == "v_prediction"
        with torch.device("meta"):
            # For the defaults of numbers that the file leaves out.
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(checkpoint.part("vae"))).config
        self.latent_scale = float(vae.scaling_factor)
        self.vae_factor = 2 ** (len(vae.block_out_channels) - 1)
        side = config.resolution // self.vae_factor
        self.latent_shape = (int(vae.latent_channels), side, side)
        self.pictures_at_once = max(1, min(PICTURES_AT_ONCE, PICTURES_AT_512 * 512**2 // config.resolution**2))
        self._sampler: Any = None

    @cached_property
    def digest(self) -> str:
        """Return the key of everything that is cached with the backbone."""
        return folders.digest_of(self.checkpoint, self.config.resolution)

    # --- weights -------------------------------------------------------------------------------------------------

    def _frozen(self, model: Any) -> Any:
        return model.requires_grad_(False).eval().to(self.device)

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """Return the untuned UNet, frozen."""
        return self.load_unet(self.folder)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """Return the autoencoder, frozen."""
        return self._frozen(AutoencoderKL.from_pretrained(self.checkpoint.part("vae"), torch_dtype=torch.float32))

    @cached_property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """Return part -> tokenizer, in the order of the text encoders."""
        names = [n.replace("text_encoder", "tokenizer") for n in self.encoder_classes]
        return {n: CLIPTokenizer.from_pretrained(self.checkpoint.part(n)) for n in names}

    @cached_property
    def text_encoders(self) -> dict[str, Any]:
        """Return part -> text encoder, frozen."""
        return {
            name: self._frozen(kind.from_pretrained(self.checkpoint.part(name), dtype=torch.float32))
            for name, kind in self.encoder_classes.items()
        }

    def load_unet(self, folder: Path) -> UNet2DConditionModel:
        """Return an exported model's UNet (or the base's, of its own folder), frozen; adapters are fused with their base.

        Raises:
            CheckpointError: nothing complete lies there, or a LoRA of another base.
        """
        return self._frozen(self._read_unet(folder))

    def trainable(self, weights: FullWeights | LoRA, start: Path | None, seed: int) -> UNet2DConditionModel:
        """Return a fresh UNet in float32 whose gradients reach the recipe's weights only, in train mode.

        Args:
            start: the export that it is at first, the adapters of a LoRA fused; None: the base.
            seed: of a LoRA's first weights.

        Raises:
            CheckpointError: see load_unet.
            ConfigError: a LoRA's target is no layer of the UNet.
        """
        unet = make_trainable(self._read_unet(start or self.folder), weights, seed)
        setattr(unet, _START, start)
        return unet.to(self.device)

    def _read_unet(self, folder: Path) -> UNet2DConditionModel:
        """Return a UNet on the CPU."""
        if exports.require(folder) == "lora":
            start = exports.start_of(folder, exports.mark(self.folder))
            return exports.fuse(self._read_unet(start or self.folder), folder)
        return UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)

    def export(self, unet: UNet2DConditionModel, folder: Path) -> None:
        """Write a trained UNet as a folder that plain diffusers loads (see `exports`): a pipeline, or its adapters alone."""
        if has_adapters(unet):
            base = {"checkpoint": self.config.checkpoint, "digest": self.digest, "unet": exports.mark(self.folder)}
            exports.write_lora(unet, self.pipeline_class, folder, base=base, start=getattr(unet, _START))
        else:
            exports.write_full(unet, self.checkpoint, folder)

    # --- encoding ------------------------------------------------------------------------------------------------

    def _exact(self) -> torch.autocast:
        """Return the context in which autoencoder and text encoders run, whatever precision is around it."""
        return torch.autocast(self.device.type, enabled=False)

    def _tokens(self, tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
        length = tokenizer.model_max_length
        found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids.to(self.device)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Return the text encoder's last hidden states, float32 [N, tokens, width]."""
        tokens = self._tokens(self.tokenizers["tokenizer"], prompts)
        with self._exact():
            return Conditioning(self.text_encoders["text_encoder"](tokens).last_hidden_state)

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
        """Return mean and log-variance of the posterior, unscaled, [N, C, H, W] each."""
        with self._exact():
            posterior = self.vae.encode(pixels.to(self.device)).latent_dist
        return posterior.mean, posterior.logvar

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> list[Image.Image]:
        """Return the pictures of scaled latents [N, C, H, W]."""
        processor, pictures = VaeImageProcessor(vae_scale_factor=self.vae_factor), []
        with self._exact():
            for part in latents.to(self.device, torch.float32).split(self.pictures_at_once):
                decoded = self.vae.decode(part / self.latent_scale).sample
                pictures += processor.postprocess(decoded, output_type="pil")
        return pictures

    # --- predicting ----------------------------------------------------------------------------------------------

    def predict(
        self, unet: Any, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Return the model's prediction (epsilon or v), shaped as `noisy`, [N, C, H, W].

        Args:
            unet: a UNet, or anything callable as one.
        """
        return unet(noisy, timesteps, encoder_hidden_states=conditioning.hidden).sample

    def pipeline(self, unet: torch.nn.Module) -> Any:
        """Return a diffusers pipeline that samples with `unet` (DDIM); the same one with another UNet at every call."""
        if self._sampler is None:
            self._sampler = self.pipeline_class(
                vae=self.vae,
                unet=unet,
                scheduler=self.scheduler,
                **self.tokenizers,
                **self.text_encoders,
                **self._pipeline_options(),
            )
            self._sampler.set_progress_bar_config(disable=True)
        self._sampler.unet = unet
        return self._sampler

    def release(self) -> None:
        """Let go of the UNet that was sampled with last."""
        if self._sampler is not None:
            self._sampler.unet = None

    def _pipeline_options(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
