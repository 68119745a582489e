"""Random pipelines of every family, for tests, dry runs and benchmarks: tiny ones, or of the published sizes.

The published UNets' configurations are functions here; `UNet2DConditionModel.from_config(sdxl_unet_config())` is SDXL's UNet
with random weights. Belongs here: shapes. Does not belong here: anything that has learned (`world_models`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainers.recipes import Family
from trainers.world_models import tokenizer as world_tokenizer

Size = Literal["tiny", "published"]
TINY_RESOLUTION = 16
"""Pixels of the tiny pipelines' pictures; their latents are [4, 8, 8]."""
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_VOCABULARY, _TOKENS = 49_408, 77


# --- UNets -----------------------------------------------------------------------------------------------------------


def sd15_unet_config() -> dict[str, Any]:
    """Return the published configuration of SD1.5's UNet (859,520,964 parameters)."""
    return {
        "sample_size": 64,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }


def sd21_unet_config() -> dict[str, Any]:
    """Return the published configuration of SD2.1's UNet (865,910,724 parameters), that of 768 pixels."""
    return {
        **sd15_unet_config(),
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    }


def sdxl_unet_config() -> dict[str, Any]:
    """Return the published configuration of SDXL's UNet (2,567,463,684 parameters)."""
    return {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


def _unet_config(family: Family, size: Size) -> dict[str, Any]:
    published = {"tiny": sd15_unet_config, "sd15": sd15_unet_config, "sd21": sd21_unet_config, "sdxl": sdxl_unet_config}
    config = published[family]()
    if size == "published":
        return config
    small = {
        **config,
        "sample_size": TINY_RESOLUTION // 2,
        "block_out_channels": [16, 32],
        "down_block_types": config["down_block_types"][-2:],
        "up_block_types": config["up_block_types"][:2],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4 if isinstance(config["attention_head_dim"], int) else [2, 4],
        "norm_num_groups": 8,
    }
    if family == "sdxl":
        small |= {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 32 + 48,
            "transformer_layers_per_block": [1, 2],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 40,
        }
    return small


# --- the other parts -------------------------------------------------------------------------------------------------


def _vae(family: Family, size: Size) -> AutoencoderKL:
    channels, layers, groups = ((128, 256, 512, 512), 2, 32) if size == "published" else ((8, 16), 1, 4)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=4,
        sample_size=512 if size == "published" else TINY_RESOLUTION,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )


def _tokenizer(size: Size, *, pad: str) -> CLIPTokenizer:
    """Return the small world's tokenizer, at the published size with unused words up to CLIP's vocabulary."""
    words = world_tokenizer.build()
    vocab, merges = world_tokenizer.vocabulary(words)
    length = words.model_max_length
    if size == "published":
        special = list(vocab)[-2:]
        rest = [t for t in vocab if t not in special]
        rest += [f"unused-{i}" for i in range(_VOCABULARY - len(vocab))]
        vocab, length = {t: i for i, t in enumerate([*rest, *special])}, _TOKENS
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length, pad_token=pad)


_TEXT = {
    "clip-l": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "clip-h": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    "clip-g": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "tiny-2": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
}


def _text_config(name: str, tokenizer: CLIPTokenizer, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        **_TEXT[name],
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection,
        hidden_act="quick_gelu" if name == "clip-l" else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        # The first of these ends the text: its state becomes the pooled embedding.
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# --- pipelines -------------------------------------------------------------------------------------------------------


def make_pipeline(
    family: Family,
    folder: Path,
    *,
    size: Size = "tiny",
    prediction: Literal["epsilon", "v_prediction"] | None = None,
    seed: int = 0,
) -> Path:
    """Write a pipeline with random weights as plain diffusers does, and return its folder.

    The tiny sizes are a few hundred kilobytes (resolution TINY_RESOLUTION) and have the family's parts, scheduler and
    kinds of layers; the published ones are written in float16, as they are published. The global random state stays as
    it was.

    Args:
        prediction: what the UNet predicts; None: v for sd21, else epsilon.
    """
    prediction = prediction or ("v_prediction" if family == "sd21" else "epsilon")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(_unet_config(family, size))
        vae = _vae(family, size)
        pipeline = _sdxl(unet, vae, size, prediction) if family == "sdxl" else _sd(family, unet, vae, size, prediction)
    if size == "published":
        pipeline = pipeline.to(torch.float16)
    pipeline.save_pretrained(folder)
    return folder


def _sd(
    family: Family, unet: UNet2DConditionModel, vae: AutoencoderKL, size: Size, prediction: str
) -> StableDiffusionPipeline:
    # SD2.1 pads with "!", SD1.5 with the end of the text.
    tokenizer = _tokenizer(size, pad="!" if family == "sd21" else "<|endoftext|>")
    name = {"sd21": "clip-h"}.get(family, "clip-l") if size == "published" else "tiny"
    kind = DDIMScheduler if family == "sd21" else PNDMScheduler
    options = {"clip_sample": False} if family == "sd21" else {"skip_prk_steps": True}
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(name, tokenizer, projection=_TEXT[name]["hidden_size"])),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=kind(**_SCHEDULE, set_alpha_to_one=False, prediction_type=prediction, **options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(unet: UNet2DConditionModel, vae: AutoencoderKL, size: Size, prediction: str) -> StableDiffusionXLPipeline:
    tokenizers = [_tokenizer(size, pad=pad) for pad in ("<|endoftext|>", "!")]
    names, projection = (("clip-l", "clip-g"), 1280) if size == "published" else (("tiny", "tiny-2"), 40)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(names[0], tokenizers[0], _TEXT[names[0]]["hidden_size"])),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(names[1], tokenizers[1], projection)),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_SCHEDULE, prediction_type=prediction, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
