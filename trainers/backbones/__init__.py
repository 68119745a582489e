"""Backbones: what differs between the models that are trained; everything else uses their few functions.

    load(config, device) -> a backbone      of the class that the folder's model_index.json asks for
    resolve(config), digest(config)         the same without loading weights
    meta_unet(config, weights) -> UNet      on the meta device: parameters and bytes without memory

A backbone offers

    folder, digest              where it lies; the key of everything that is cached with it
    timesteps, alphas_cumprod   of the noise schedule, T and abar [T]
    predicts_velocity           v = sqrt(abar) eps - sqrt(1 - abar) x0 rather than eps
    latent_scale, vae_factor    between the autoencoder's latents and the UNet's; pixels per cell of the latent and side
    latent_shape                C, H, W of a picture's latent
    pictures_at_once            how many pictures a forward of the autoencoder or a sampling batch takes
    unet                        the untuned UNet, frozen
    encode_prompts(texts) -> Conditioning
    to_pixels(picture) -> [3, R, R];  encode_images(pixels [N, 3, R, R]) -> mean, log-variance [N, C, H, W]
    decode_latents(scaled latents [N, C, H, W]) -> pictures
    predict(unet, noisy [N, C, H, W], timesteps [N], conditioning) -> [N, C, H, W]; `unet` is anything callable as one
    trainable(weights, start, seed) -> UNet     with the recipe's weights (all, or LoRA) trainable, from the base or an export
    load_unet(folder) -> UNet   an exported model's, frozen
    export(unet, folder)        what plain diffusers loads; exports.kind(folder) says which sort lies there
    pipeline(unet)              a diffusers pipeline that samples with `unet` (DDIM)

What lies in a UNet's weights (adapters, frozen parts) is in `adapters`. Belongs here: choosing the class. Does not belong
here: a family's details (`stable_diffusion`, `stable_diffusion_xl`), files (`folders`), training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipelines.config import BackboneConfig
from trainers.backbones.folders import digest, resolve

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from trainers.backbones.stable_diffusion import StableDiffusionBackbone
    from trainers.recipes import FullWeights, LoRA

__all__ = ["digest", "load", "meta_unet", "resolve"]


def load(config: BackboneConfig, device: str | torch.device = "cpu") -> StableDiffusionBackbone:
    """Return the backbone; its weights are read when they are first used.

    Raises:
        CheckpointError: the folder or a part of it is missing.
        ConfigError: what lies there is not of the family that the configuration says.
    """
    # diffusers' pipelines take seconds to import: whoever wants the types alone must not wait.
    from trainers.backbones.folders import find
    from trainers.backbones.stable_diffusion import StableDiffusionBackbone
    from trainers.backbones.stable_diffusion_xl import StableDiffusionXLBackbone

    classes = {c.pipeline_class.__name__: c for c in (StableDiffusionBackbone, StableDiffusionXLBackbone)}
    checkpoint = find(config)
    return classes[checkpoint.pipeline](config, checkpoint, device)


def meta_unet(config: BackboneConfig, weights: FullWeights | LoRA | None = None) -> UNet2DConditionModel:
    """Return the UNet on the meta device, from its configuration alone: shapes, parameters, `requires_grad`, no memory.

    weights: what is trained; None: nothing.

    Raises:
        CheckpointError: the UNet's configuration is missing.
    """
    from diffusers import UNet2DConditionModel

    from trainers.backbones.adapters import make_trainable
    from trainers.backbones.folders import unet_folder

    options = UNet2DConditionModel.load_config(unet_folder(config))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(options).requires_grad_(False)
        return unet if weights is None else make_trainable(unet, weights, seed=0)
