"""Divergence minimisation preference optimisation (DMPO, arXiv 2507.07510)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch


def dmpo(batch: PairBatch, *, beta: float, alpha: float) -> torch.Tensor:
    """Return KL(Bern(sigmoid(z)) || Bern(1 - alpha)), z = 0.5 * beta * s, one number per pair, [B].

    The reverse divergence from a label that is wrong with probability `alpha`: 0 at sigmoid(z) = 1 - alpha. `beta` is in the
    convention with the half (the released program: 2000); code that writes z = beta * s uses half the number. At policy =
    reference the loss is -log(2) - log(alpha * (1 - alpha)) / 2.
    """
    z = 0.5 * beta * batch.margin
    agree = torch.sigmoid(z) * (F.logsigmoid(z) - math.log(1 - alpha))
    return agree + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(alpha))
