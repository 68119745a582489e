"""DPO that knows that labels are wrong with probability e: conservative (Mitchell 2023) and robust (arXiv 2403.00409).

Both are written by log sigmoid(-z) = log sigmoid(z) - z, so that they are log 2 exactly at z = 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch


def cdpo(batch: PairBatch, *, beta: float, flip_probability: float) -> torch.Tensor:
    """Return -(1 - e) * log sigmoid(z) - e * log sigmoid(-z), z = 0.5 * beta * s, one number per pair, [B].

    The cross entropy against a winner that is right with probability 1 - e (e: `flip_probability`), equal to
    -log sigmoid(z) + e * z; it is smallest at sigmoid(z) = 1 - e. `beta` is in the convention with the half; code that
    writes z = beta * s uses half the number. At policy = reference the loss is log 2 exactly.
    """
    z = 0.5 * beta * batch.margin
    return -F.logsigmoid(z) + flip_probability * z


def rdpo(batch: PairBatch, *, beta: float, flip_probability: float) -> torch.Tensor:
    """Return [-(1 - e) * log sigmoid(z) + e * log sigmoid(-z)] / (1 - 2e), z = 0.5 * beta * s, per pair, [B].

    Its mean over labels flipped with probability e < 0.5 (`flip_probability`) is DPO's loss on the true label (Chowdhury et
    al. 2024); equal to -log sigmoid(z) - e / (1 - 2e) * z, so that it is not bounded below. `beta` is in the
    convention with the half; code that writes z = beta * s uses half the number. At policy = reference the loss is log 2
    exactly.
    """
    z = 0.5 * beta * batch.margin
    return -F.logsigmoid(z) - flip_probability / (1 - 2 * flip_probability) * z
