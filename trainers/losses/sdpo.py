"""Diffusion-SDPO (arXiv 2511.03317): the loser's gradient is held back where it would raise the winner's error."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch, Statistics


def sdpo(batch: PairBatch, statistics: Statistics, *, beta: float, mu: float) -> torch.Tensor:
    """Return -log sigmoid(z), z = 0.5 * beta * s, with the gradient through the loser's error scaled, per pair, [B].

    The scale is clamp((1 - mu) * |gA|^2 / (gB . gA), 0, 1) where gB . gA > 0, else 1; gA and gB are the gradients of L^w and
    L^l in the output space, over the micro-batch of all processes: one number, as in the released program. The value is
    Diffusion-DPO's. `beta` is in the convention with the half (the released program: 2000); code that writes z = beta * s
    uses half the number. At policy = reference the loss is log 2 exactly.
    """
    alignment, winner_square = statistics["alignment"], statistics["winner_square"]
    safe = ((1 - mu) * winner_square / alignment).clamp(0, 1)
    scale = torch.where(alignment > 0, safe, torch.ones_like(safe))
    winner, loser = batch.policy_error
    held_back = loser.detach() + scale * (loser - loser.detach())
    return -F.logsigmoid(0.5 * beta * batch.margin_of(torch.stack([winner, held_back])))


def sdpo_sums(batch: PairBatch, statistics: Statistics) -> dict[str, torch.Tensor]:
    """Return `alignment`, gB . gA, [], and `winner_square`, |gA|^2, [], both up to the same factor 4 / (C * H * W)."""
    winner, loser = batch.residual(batch.policy.detach())
    return {
        "alignment": (winner * loser).mean((1, 2, 3)).sum(),
        "winner_square": winner.pow(2).mean((1, 2, 3)).sum(),
    }
