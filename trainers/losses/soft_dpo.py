"""DPO on soft labels by geometric averaging (GDPO, Furuta et al. 2024, arXiv 2409.06691)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch


def soft_dpo(batch: PairBatch, *, beta: float) -> torch.Tensor:
    """Return -log sigmoid((2p - 1) * z), z = 0.5 * beta * s, one number per pair, [B].

    p is the batch's probability of the winner: the soft label. `beta` is in the convention with the half; code that writes
    z = beta * s uses half the number. At policy = reference the loss is log 2 exactly; at p = 1 it is Diffusion-DPO's.
    """
    return -F.logsigmoid((2 * batch.need("probability") - 1) * (0.5 * beta * batch.margin))
