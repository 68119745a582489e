"""Group-robust DPO (GR-DPO, Ramesh et al. 2024, arXiv 2405.20304, Algorithm 1): the worst-off group weighs most.

G groups of annotators and, as the last one, the pairs of unknown group (index -1): G + 1 weights alpha, which rise by
exp(eta * L_g). The number of groups is an upper bound: a group of which no pair was seen has no part in the loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch, Statistics
from trainers.losses.diffusion_dpo import diffusion_dpo


def group_robust(batch: PairBatch, statistics: Statistics, *, beta: float) -> torch.Tensor:
    """Return alpha_g * N / N_g * -log sigmoid(z), z = 0.5 * beta * s, of pairs of group g, one number per pair, [B].

    Its mean over pairs drawn as they come is sum_g alpha_g * L_g, L_g the mean loss of group g. N_g are the pairs of group g
    seen so far, this micro-batch included, N their sum; alpha is of the step before, and sums to 1 over the groups seen. No
    group of a batch is without weight for being rare in it: its pairs weigh more instead. `beta` is in the convention with
    the half; code that writes z = beta * s uses half the number. At policy = reference the first micro-batch costs log 2 in
    the mean.
    """
    alpha, seen = statistics["alpha"], statistics["seen_pairs"] + statistics["group_pairs"]
    alpha = torch.where(seen > 0, alpha, torch.zeros_like(alpha))
    weight = alpha / alpha.sum() * (seen.sum() / seen.clamp_min(1))
    return weight[_index(batch, alpha)] * diffusion_dpo(batch, beta=beta)


def group_robust_state(*, groups: int) -> dict[str, torch.Tensor]:
    """Return equal weights `alpha`, zero `seen_pairs` and `last_losses`, all [groups + 1], the unknown group last."""
    count = groups + 1
    return {
        "alpha": torch.full((count,), 1 / count),
        "seen_pairs": torch.zeros(count),
        "last_losses": torch.zeros(count),
    }


def group_robust_sums(batch: PairBatch, statistics: Statistics, *, beta: float) -> dict[str, torch.Tensor]:
    """Return `group_losses`, the sum of -log sigmoid(z) by group, and `group_pairs`, how many, both [groups + 1].

    Raises:
        ValueError: the batch has a group that the state has no weight for.
    """
    known = len(statistics["alpha"]) - 1
    if (group := batch.need("group")).numel() and int(group.max()) >= known:
        raise ValueError(
            f"group_robust: expected groups 0 to {known - 1} or -1 for unknown, found {int(group.max())}; set the "
            "objective's `groups` to the number of groups at least"
        )
    loss = diffusion_dpo(batch, beta=beta).detach()
    member = F.one_hot(_index(batch, statistics["alpha"]), known + 1).to(loss.dtype)
    return {"group_losses": (loss[:, None] * member).sum(0), "group_pairs": member.sum(0)}


def group_robust_update(state: Statistics, sums: Statistics, *, eta: float) -> dict[str, torch.Tensor]:
    """Return alpha_g * exp(eta * L_g) / Z, with L_g the group's mean loss in the last step that had pairs of it.

    A group without pairs in a step rises by what is known of it, so that it loses no weight for being rare; the paper's
    step, which raises the drawn group alone by exp(eta * N / N_g * L), does the same in the mean. A group of which nothing
    is known rises as the others do in the mean.
    """
    seen, now = state["seen_pairs"] + sums["group_pairs"], sums["group_pairs"]
    loss = torch.where(now > 0, sums["group_losses"] / now.clamp_min(1), state["last_losses"])
    rise = torch.where(seen > 0, loss, loss.sum() / (seen > 0).sum())
    return {"alpha": torch.softmax(state["alpha"].log() + eta * rise, 0), "seen_pairs": seen, "last_losses": loss}


def _index(batch: PairBatch, alpha: torch.Tensor) -> torch.Tensor:
    """Return the place of each pair's group in alpha, [B]; unknown groups come last."""
    group = batch.need("group")
    return torch.where(group < 0, len(alpha) - 1, group)
