"""Adaptive-DPO (Zhang et al. 2025, arXiv 2503.16921): pairs that look like minority votes count for less.

M = 3 virtual annotators look at the same noisy latents: the policy and two moving averages of it, slow (0.9999) and fast
(0.5). All that they say is without gradient. From margins s_m to the loss:

    z_m           margins in units in which a sigmoid of them is a probability, by the source of the metric (below)
    confidence    c = |mean_m sigmoid(z_m) - 1|           large: the annotators disagree with the label
    stability     v = min(std_m(z_m), 1)                  unbiased, over the annotators
    metric        u = c * v                               Eq. 13; higher: more likely a minority vote
    weight        W = 1 / (c1 + k1 * u)
    margin term   G = -u^2 / b + mean of s                b = beta / 2; the mean is over the micro-batch of all processes
    loss          -W * log sigmoid(b * s - G)

Sources of the metric. `online` is the released program: z_m = rho * s_m / ||s_m||, the norm over the micro-batch of all
processes, and u = 0 in the first 2 optimiser steps. It depends on the batch's size (rms of z = rho / sqrt(B)) and gives
pairs that all annotators find wrong (v near 0) full weight. `online_corrected`: z_m = rho / 4 * s_m / sigma_m, the released
scale at B = 16, with sigma_m the running rms of s_m up to the step before, and u = c; u = 0 until sigma rests on 10 steps.
`dataset`: u is the pair's minority value of `preferences`; there are no annotators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch, Statistics

Metric = Literal["online", "online_corrected", "dataset"]
Weighting = Literal["linear", "quadratic", "exp"]
MarginTerm = Literal["none", "linear", "quadratic"]

ANNOTATORS = 3
WARM_UP_STEPS = 2
"""Optimiser steps without a metric while the moving averages are still the policy (`online`)."""
SCALE_UPDATES = 10
"""Steps that sigma rests on before it is used (`online_corrected`)."""
DECAY = 0.99
"""Of the running rms."""

_WEIGHTS: dict[Weighting, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "linear": lambda u, c1, k1: 1 / (c1 + k1 * u),
    "quadratic": lambda u, c1, k1: 1 / (c1 + k1 * u.pow(2)),
    "exp": lambda u, c1, k1: 1 / (c1 + torch.exp(k1 * u)),
}
_POWERS: dict[MarginTerm, int] = {"linear": 1, "quadratic": 2}


def adaptive_dpo(
    batch: PairBatch,
    statistics: Statistics,
    *,
    beta: float,
    metric: Metric,
    form: Literal["dpo", "ipo"],
    beta_ipo: float,
    rho: float,
    normalise: bool,
    c1: float,
    k1: float,
    weighting: Weighting,
    margin_term: MarginTerm,
) -> torch.Tensor:
    """Return -W * log sigmoid(b * s - G), or W * (s + G / b - 1 / (2 * beta_ipo))^2 in the form `ipo`, per pair, [B].

    b = 0.5 * beta: `beta` is in the convention with the half, z = 0.5 * beta * s; the released program writes beta * s and
    uses half the number (1000). `rho` without `normalise` (`online` alone): z_m = rho * s_m, 1e4. At the start of a run,
    policy = annotators = reference, u is 0 and the loss log 2 / c1 exactly (weighting `exp`: log 2 / (c1 + 1)); by the
    metric `dataset` it is W * log 2.
    """
    u = _judged(batch, statistics, metric, rho, normalise)["metric"]
    weight = weight_of(u, c1=c1, k1=k1, weighting=weighting)
    b = 0.5 * beta
    term = margin_term_of(u, statistics, b=b, margin_term=margin_term)
    if form == "ipo":
        return weight * (batch.margin + term / b - 1 / (2 * beta_ipo)).pow(2)
    return -weight * F.logsigmoid(b * batch.margin - term)


def minority_metric(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return confidence c, stability v and metric u = c * v, each [B], of the annotators' z, [M, B]."""
    # 1 - sigmoid(z) loses small values in rounding, sigmoid(-z) does not.
    confidence = torch.sigmoid(-z).mean(0)
    stability = z.std(0).clamp_max(1)
    return confidence, stability, confidence * stability


def weight_of(u: torch.Tensor, *, c1: float, k1: float, weighting: Weighting) -> torch.Tensor:
    """Return W: 1 / (c1 + k1 * u) (linear), 1 / (c1 + k1 * u^2) (quadratic), 1 / (c1 + exp(k1 * u)) (exp).

    The last is the released program's variant `sigmoid`; its W is 1 / (c1 + 1), not 1 / c1, at u = 0.
    """
    return _WEIGHTS[weighting](u, c1, k1)


def margin_term_of(u: torch.Tensor, statistics: Statistics, *, b: float, margin_term: MarginTerm) -> torch.Tensor:
    """Return G, [B]: -u / b + mean of s (linear), -u^2 / b + mean of s (quadratic), 0 (none)."""
    if margin_term == "none":
        return torch.zeros_like(u)
    return -u.pow(_POWERS[margin_term]) / b + statistics["margins"] / statistics["pairs"]


def adaptive_dpo_sums(batch: PairBatch, statistics: Statistics, *, metric: Metric) -> dict[str, torch.Tensor]:
    """Return `margins`, the sum of s, [], `pairs`, how many, [], and, of annotators, `squared_margins`, of s_m^2, [M]."""
    margin = batch.margin.detach()
    sums = {"margins": margin.sum(), "pairs": torch.ones_like(margin).sum()}
    return sums if metric == "dataset" else {**sums, "squared_margins": _annotator_margins(batch).pow(2).sum(1)}


def adaptive_dpo_state(*, metric: Metric) -> dict[str, torch.Tensor]:
    """Return zeros: `steps`, [], and per annotator `scale_updates` and `running_rms`, [M]; nothing for `dataset`."""
    if metric == "dataset":
        return {}
    names = ("scale_updates", "running_rms")
    return {"steps": torch.zeros(()), **{name: torch.zeros(ANNOTATORS) for name in names}}


def adaptive_dpo_update(state: Statistics, sums: Statistics) -> dict[str, torch.Tensor]:
    """Return the state after a step: running_rms <- 0.99 * running_rms + 0.01 * rms of the step, per annotator.

    An annotator whose rms is 0 is passed over, as s is exactly 0 while the policy is the reference.
    """
    if not state:
        return {}
    rms = (sums["squared_margins"] / sums["pairs"]).sqrt()
    running = torch.where(rms > 0, DECAY * state["running_rms"] + (1 - DECAY) * rms, state["running_rms"])
    return {
        "steps": state["steps"] + 1,
        "scale_updates": state["scale_updates"] + (rms > 0),
        "running_rms": running,
    }


def adaptive_dpo_details(
    batch: PairBatch,
    statistics: Statistics,
    *,
    metric: Metric,
    rho: float,
    normalise: bool,
    c1: float,
    k1: float,
    weighting: Weighting,
) -> dict[str, torch.Tensor]:
    """Return margin s, metric u and weight W, and of annotators confidence c and stability v, each [B]."""
    judged = _judged(batch, statistics, metric, rho, normalise)
    weight = weight_of(judged["metric"], c1=c1, k1=k1, weighting=weighting)
    return {"margin": batch.margin.detach(), **judged, "weight": weight}


def _annotator_margins(batch: PairBatch) -> torch.Tensor:
    """Return s_m, [M, B], the policy's first."""
    others = batch.margin_of(batch.need("annotator_errors"))
    return torch.cat([batch.margin[None], others]).detach()


def _scaled(margins: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return margins / scale, [M, B]; 0 where the scale is 0: an annotator that is the reference has no opinion."""
    return torch.where(scale[:, None] > 0, margins / scale[:, None], torch.zeros_like(margins))


def _online(batch: PairBatch, statistics: Statistics, rho: float, normalise: bool) -> dict[str, torch.Tensor]:
    margins = _annotator_margins(batch)
    z = rho * (_scaled(margins, statistics["squared_margins"].sqrt()) if normalise else margins)
    confidence, stability, u = minority_metric(z)
    u = torch.where(statistics["steps"] >= WARM_UP_STEPS, u, torch.zeros_like(u))
    return {"confidence": confidence, "stability": stability, "metric": u}


def _corrected(batch: PairBatch, statistics: Statistics, rho: float, normalise: bool) -> dict[str, torch.Tensor]:
    updates = statistics["scale_updates"]
    bias = -torch.expm1(updates * math.log(DECAY))
    # 0 / 0 before the first update; with the bound sigma is 0.
    sigma = statistics["running_rms"] / bias.clamp_min(torch.finfo(bias.dtype).tiny)
    confidence, stability, _ = minority_metric(rho / 4 * _scaled(_annotator_margins(batch), sigma))
    u = torch.where(updates.min() >= SCALE_UPDATES, confidence, torch.zeros_like(confidence))
    return {"confidence": confidence, "stability": stability, "metric": u}


def _dataset(batch: PairBatch, statistics: Statistics, rho: float, normalise: bool) -> dict[str, torch.Tensor]:
    return {"metric": batch.need("minority")}


_METRICS: dict[Metric, Callable[[PairBatch, Statistics, float, bool], dict[str, torch.Tensor]]] = {
    "online": _online,
    "online_corrected": _corrected,
    "dataset": _dataset,
}


def _judged(
    batch: PairBatch, statistics: Statistics, metric: Metric, rho: float, normalise: bool
) -> dict[str, torch.Tensor]:
    """Return confidence, stability (of annotators alone) and metric per pair, each [B], without gradient."""
    return _METRICS[metric](batch, statistics, rho, normalise)
