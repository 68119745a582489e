"""Floating-point operations of the models in a training step, counted on the meta device: no memory, no arithmetic.

Matrix products, convolutions and attention count, a multiplication with its addition as two; norms and activations do not,
nor does what is recomputed (flash attention's backward, activation checkpointing): rates made of this are of useful work.
Belongs here: counting. Does not belong here: measuring time (`training`, `training_gpu`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from trainers.recipes import FullWeights, LoRA

Weights = FullWeights | LoRA


@dataclass(frozen=True)
class Shapes:
    """What a UNet is given of one picture: latent [C, H, W], tokens x width of the prompt, for SDXL pooled width, else 0."""

    latent: tuple[int, int, int]
    tokens: int
    width: int
    pooled: int = 0


@dataclass(frozen=True)
class PairCost:
    """FLOP of one pair, two pictures: the policy's forward and backward, the reference's forward (no adapters in it)."""

    forward: float
    backward: float
    reference: float

    @property
    def step(self) -> float:
        """Return what cannot be avoided in a step of DPO with cached latents and embeddings."""
        return self.forward + self.backward + self.reference


def count(work: Callable[[], Any]) -> float:
    """Return the FLOP of some work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def pair_cost(make: Callable[[Weights | None], UNet2DConditionModel], weights: Weights, shapes: Shapes) -> PairCost:
    """Return the cost of a pair.

    Args:
        make: returns the UNet on the meta device with these weights trainable; None: none, and no adapters.
    """
    policy, reference = make(weights), make(None)
    found: list[torch.Tensor] = []
    forward = count(lambda: found.append(predict(policy, shapes, 2)))
    backward = count(lambda: found[0].sum().backward())
    with torch.no_grad():
        return PairCost(forward, backward, count(lambda: predict(reference, shapes, 2)))


def predict(unet: UNet2DConditionModel, shapes: Shapes, pictures: int) -> torch.Tensor:
    """Return the prediction of a UNet on the meta device for so many pictures."""
    with torch.device("meta"):
        added = {"text_embeds": torch.empty(pictures, shapes.pooled), "time_ids": torch.empty(pictures, 6)}
        return unet(
            torch.empty(pictures, *shapes.latent),
            torch.empty(pictures, dtype=torch.long),
            encoder_hidden_states=torch.empty(pictures, shapes.tokens, shapes.width),
            added_cond_kwargs=added if shapes.pooled else None,
        ).sample


def encoding_cost(vae: AutoencoderKL, text_encoder: CLIPTextModel, resolution: int, tokens: int) -> float:
    """Return the FLOP of what caches save per pair: two pictures and one prompt encoded by models of this architecture."""
    with torch.device("meta"), torch.no_grad():
        encoder = AutoencoderKL.from_config(vae.config)
        text = CLIPTextModel(text_encoder.config)
        pixels, ids = torch.empty(2, 3, resolution, resolution), torch.zeros(1, tokens, dtype=torch.long)
        return count(lambda: encoder.encode(pixels)) + count(lambda: text(ids))
