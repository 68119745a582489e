"""Margin-aware preference optimisation (MaPO, Hong et al. 2024, arXiv 2406.06424): no reference model."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch


def mapo(batch: PairBatch, *, beta: float, snr: float, timesteps: int) -> torch.Tensor:
    """Return L^w - beta * log sigmoid(T * (phi(L^w) - phi(L^l))), phi(L) = snr * L / (exp(snr * L) - 1), per pair, [B].

    phi falls from 1 at L = 0: a likelihood that needs no reference. `beta` (released: 0.1) is a weight beside the error and
    stands outside the sigmoid: the convention with the half does not apply. T = `timesteps`. Where winner and loser are
    predicted equally well the loss is L^w + beta * log 2.
    """
    # 0 / 0 at a perfect prediction; the limit is 1.
    scaled = (snr * batch.policy_error).clamp_min(torch.finfo(batch.policy_error.dtype).tiny)
    likelihood = scaled / torch.expm1(scaled)
    margin = timesteps * (likelihood[0] - likelihood[1])
    return batch.policy_error[0] - beta * F.logsigmoid(margin)
