"""Which of a UNet's weights are trained: all, or low-rank adapters on it; and the frozen ones in half precision.

Belongs here: a UNet's weights, whatever the backbone. Does not belong here: where they are stored (`exports`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pipelines.config import ConfigError
from trainers.recipes import FullWeights, LoRA

ADAPTER = "default"
_MATRIX_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def make_trainable(unet: UNet2DConditionModel, weights: FullWeights | LoRA, seed: int) -> UNet2DConditionModel:
    """Return the UNet in train mode with gradients for the recipe's weights only, adapters added to it for a LoRA.

    At first adapters change nothing: W + (alpha / rank) B A with B = 0 and A drawn from `seed` (Kaiming uniform, as peft
    has it), whatever the global random state, which stays as it was.

    Raises:
        ConfigError: a target of the LoRA is no layer of the UNet.
    """
    if isinstance(weights, FullWeights):
        return unet.requires_grad_(True).train()
    unet.requires_grad_(False)
    layers = [name for name, module in unet.named_modules() if isinstance(module, _MATRIX_PRODUCTS)]
    if unknown := [t for t in weights.targets if not any(f".{name}".endswith(f".{t}") for name in layers)]:
        raise ConfigError(f"LoRA: targets {unknown} are the end of no layer's name in the UNet, such as {layers[-1]!r}")
    rule = LoraConfig(
        r=weights.rank, lora_alpha=weights.alpha, target_modules=list(weights.targets), init_lora_weights=True
    )
    # Adapters are drawn on the CPU, where they are made.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(rule, adapter_name=ADAPTER)
    return unet.train()


def has_adapters(unet: nn.Module) -> bool:
    """Return whether the UNet carries adapters."""
    return bool(adapter_layers(unet))


def trained_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter of what is trained."""
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


def adapter_layers(unet: nn.Module) -> list[BaseTunerLayer]:
    """Return the layers of the UNet that carry adapters."""
    return [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]


@contextlib.contextmanager
def adapters_off(unet: nn.Module | Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Within it the UNet predicts exactly what it does without its adapters; one that has none is left alone.

    Args:
        unet: the UNet, or its `adapter_layers`: to look for them takes as long as some forwards.
    """
    found = adapter_layers(unet) if isinstance(unet, nn.Module) else unet
    layers = [m for m in found if not m.disable_adapters]
    # peft stops and starts gradients with the adapters; which of them were trained is not for it to say.
    parameters = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, is_trained in parameters:
            parameter.requires_grad_(is_trained)


def cast_frozen(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the UNet with the frozen weights of its linear and convolutional layers in half precision.

    Under autocast of that type it computes bit for bit what it did: these are the layers whose weights autocast rounds,
    here once in place of at every forward. Norms stay in float32, trained weights too.
    """
    for module in unet.modules():
        if isinstance(module, _MATRIX_PRODUCTS):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
    return unet
