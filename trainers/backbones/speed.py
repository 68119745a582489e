"""Ways in which a UNet computes the same faster: norms in half precision, parts of it compiled.

On an H200 (bf16, cached latents) half-precision norms give 10 to 12 % and a fifth of the memory; LOG.md has the figures.
Belongs here: how layers are run. Does not belong here: their weights (`adapters`), the context of autocast (`precision`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from trainers.backbones.adapters import adapter_layers, cast_frozen

Parts = Literal["none", "transformers", "blocks"]
"""What is compiled: nothing; every transformer block by itself; those, residual blocks and norms, in channels-last layout."""
_COMPILED: dict[Parts, tuple[type[nn.Module], ...]] = {
    "none": (),
    "transformers": (BasicTransformerBlock,),
    "blocks": (BasicTransformerBlock, ResnetBlock2D, nn.GroupNorm),
}
GRAPHS = 512
"""Of one kind of block: every size, with gradient and without. torch's own limit leaves the rest uncompiled."""


class _HalfGroupNorm(nn.GroupNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input, self.num_groups, _as(self.weight, input), _as(self.bias, input), self.eps)


class _HalfLayerNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, _as(self.weight, input), _as(self.bias, input), self.eps)


def _as(parameter: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


_HALF: dict[type[nn.Module], type[nn.Module]] = {nn.GroupNorm: _HalfGroupNorm, nn.LayerNorm: _HalfLayerNorm}


def halve_norms(unet: nn.Module) -> nn.Module:
    """Return the UNet with norms that read and write the precision that they are given, as autocast does not have them.

    Autocast runs norms in float32 and so writes every activation around them twice as large. Sums within a norm are float32
    all the same, and what follows a norm rounds its output to half precision anyway. Weights stay what they are.
    """
    for module in unet.modules():
        half = _HALF.get(type(module))
        if half is not None:
            module.__class__ = half
    return unet


def prepare(unet: UNet2DConditionModel, dtype: torch.dtype | None, parts: Parts) -> UNet2DConditionModel:
    """Return a policy as it trains under autocast of `dtype` (None: none), before anything is copied from it.

    Norms read and write half precision, frozen weights of an adapted model lie in it, and adapters take their input as it is:
    autocast rounds it itself, peft would write it out in float32 first.
    """
    arrange(unet, parts)
    if dtype is not None:
        halve_norms(unet)
        if layers := adapter_layers(unet):
            cast_frozen(unet, dtype)
            for layer in layers:
                layer.cast_input_dtype_enabled = False
    return unet


def arrange(unet: nn.Module, parts: Parts) -> nn.Module:
    """Return the UNet with its convolutions' weights laid out as `compile_parts` wants them; before it is copied."""
    return unet.to(memory_format=torch.channels_last) if parts == "blocks" else unet  # type: ignore[call-overload]


def compile_parts(unet: nn.Module, parts: Parts, backend: str = "inductor") -> None:
    """Compile parts of a UNet, each by itself: blocks of one size share their code, so that it takes a minute, not ten.

    A compiled model rounds elsewhere than a plain one, and with gradient elsewhere than without: policy and reference, equal
    at the start, then differ by rounding (z by a few tenths at beta 5000 in bf16), without bias to either side.

    Args:
        backend: torch's name of what makes code; "eager" makes none and shows that it could.
    """
    modules = [m for m in unet.modules() if isinstance(m, _COMPILED[parts])]
    if modules:
        torch._dynamo.config.recompile_limit = GRAPHS
        torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    for module in modules:
        # Every size of block gets its own code: with sizes left open it is slower.
        module.compile(dynamic=False, backend=backend)
