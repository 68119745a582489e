"""SD1.5's architecture at a fraction of its width, random weights: what two CPU cores can train.

UNet, autoencoder and text encoder are narrowed alike, so that the work which caches save keeps about its share of a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainers.backbones.random_pipelines import sd15_unet_config
from trainers.world_models import tokenizer as world_tokenizer

TOKENS = 77
HEADS = 8


def unet_config(divide: int) -> dict[str, Any]:
    """Return SD1.5's UNet configuration with all widths divided: as many blocks, layers and heads."""
    published = sd15_unet_config()
    widths = [c // divide for c in published["block_out_channels"]]
    return {
        **published,
        "block_out_channels": widths,
        "cross_attention_dim": text_width(divide),
        "norm_num_groups": 32 if widths[0] % 32 == 0 else 8,
    }


def text_width(divide: int) -> int:
    """Return the text encoder's width: a multiple of its heads."""
    return -(-768 // divide // HEADS) * HEADS


def text_encoder(divide: int, **ids: int) -> CLIPTextModel:
    """Return CLIP-L's text encoder, narrowed.

    Args:
        ids: of a tokenizer: vocab_size, bos_token_id, eos_token_id, pad_token_id.
    """
    width = text_width(divide)
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=12,
            num_attention_heads=HEADS,
            max_position_embeddings=TOKENS,
            **ids,
        )
    )


def autoencoder(divide: int) -> AutoencoderKL:
    """Return SD's autoencoder, narrowed."""
    return AutoencoderKL(
        block_out_channels=[max(8, c // divide // 8 * 8) for c in (128, 256, 512, 512)],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.18215,
    )


def write_sd15(folder: Path, divide: int) -> Path:
    """Write the narrowed pipeline as plain diffusers does and return its folder."""
    vocabulary, merges = world_tokenizer.vocabulary(world_tokenizer.build())
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS, pad_token="<|endoftext|>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=autoencoder(divide),
            text_encoder=text_encoder(
                divide,
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel.from_config(unet_config(divide)),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder
