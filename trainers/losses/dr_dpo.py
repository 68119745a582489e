"""Distributionally robust DPO (Dr. DPO, Wu et al. 2024, arXiv 2407.07880): pairs that it doubts count for less."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch, Statistics


def _log_likelihood(batch: PairBatch, beta: float, temperature: float) -> torch.Tensor:
    return F.logsigmoid(0.5 * beta * batch.margin) / temperature


def dr_dpo(batch: PairBatch, statistics: Statistics, *, beta: float, temperature: float) -> torch.Tensor:
    """Return -b' * (log m + exp(h / b') / m - 1), h = log sigmoid(z), z = 0.5 * beta * s, one number per pair, [B].

    m is the mean of exp(h / b') over the micro-batch of all processes, b' the `temperature`. Over that micro-batch the mean
    of the numbers is the paper's -b' * log mean exp(h / b'), and so is their gradient with m held fixed: the tangent of
    -b' * log at m. A pair weighs exp(h / b') / m; a large b' gives Diffusion-DPO. `beta` is in the convention with the
    half; code that writes z = beta * s uses half the number. At policy = reference the loss is log 2.
    """
    log_mean = (statistics["likelihoods"] / statistics["pairs"]).log()
    return -temperature * (log_mean + torch.expm1(_log_likelihood(batch, beta, temperature) - log_mean))


def dr_dpo_sums(
    batch: PairBatch, statistics: Statistics, *, beta: float, temperature: float
) -> dict[str, torch.Tensor]:
    """Return `likelihoods`, the sum of exp(h / b') over the pairs, [], and `pairs`, their number, [].

    The sum is float64, as exp(-|z| / b') leaves float32 at |z| = 88 * b', which runs with large beta reach.
    """
    likelihoods = _log_likelihood(batch, beta, temperature).detach().double().exp()
    return {"likelihoods": likelihoods.sum(), "pairs": torch.ones_like(likelihoods).sum()}
