"""The learning rate by step, and the optimisers by name.

Belongs here: numbers of `recipes.Optimiser` as torch objects. Does not belong here: steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from trainers.recipes import Optimiser


def learning_rate(rule: Optimiser, step: int, steps: int) -> float:
    """Return the rate of the optimiser step with index `step` (from 0) of `steps`.

    Warm-up: rate * (step + 1) / warmup_steps. After it the schedule over the progress x in [0, 1): constant 1; linear 1 - x;
    cosine (1 + cos(pi x)) / 2.
    """
    if step < rule.warmup_steps:
        return rule.learning_rate * (step + 1) / rule.warmup_steps
    progress = (step - rule.warmup_steps) / max(1, steps - rule.warmup_steps)
    match rule.schedule:
        case "constant":
            return rule.learning_rate
        case "linear":
            return rule.learning_rate * (1 - progress)
        case "cosine":
            return rule.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer(rule: Optimiser, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser; its rate is set before every step.

    Adafactor as Diffusion-DPO's SDXL run has it: no relative steps, no parameter scaling, update clipping at 1.
    """
    parameters = list(parameters)
    match rule.kind:
        case "adamw":
            return torch.optim.AdamW(
                parameters,
                lr=rule.learning_rate,
                weight_decay=rule.weight_decay,
                fused=parameters[0].device.type == "cuda",
            )
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(
                parameters,
                lr=rule.learning_rate,
                weight_decay=rule.weight_decay,
                clip_threshold=1.0,
                scale_parameter=False,
                relative_step=False,
                warmup_init=False,
            )
