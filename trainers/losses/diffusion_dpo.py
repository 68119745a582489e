"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, Eq. 14)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch


def diffusion_dpo(batch: PairBatch, *, beta: float) -> torch.Tensor:
    """Return -log sigmoid(z), z = 0.5 * beta * s, one number per pair, [B].

    `beta` is in the convention with the half (the released program: 2000 to 5000); code that writes z = beta * s uses
    half the number. At policy = reference the loss is log 2 exactly.
    """
    return -F.logsigmoid(0.5 * beta * batch.margin)
