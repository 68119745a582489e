"""Direct score preference optimisation (DSPO, Zhu et al. 2025, ICLR)."""

from __future__ import annotations

import torch

from trainers.losses.batch import PairBatch


def dspo(batch: PairBatch, *, beta: float) -> torch.Tensor:
    """Return mean over C, H, W of [(e_pol - e) - beta * (1 - sigmoid(z)) * (e_pol - e_ref)]^2 on the winner, [B].

    e is the target, e_pol and e_ref the predictions of policy and reference; z = 0.5 * beta * s, and the gradient flows
    through sigmoid(z) too, to the loser's prediction as well. `beta` is in the convention with the half in z, where code
    that writes z = beta * s uses half the number, but it is also the factor in front (the released program: 0.01 in both).
    At policy = reference the loss is the winner's error L^w.
    """
    policy = batch.residual(batch.policy)[0]
    reference = batch.residual(batch.need("reference"))[0]
    pull = beta * torch.sigmoid(-0.5 * beta * batch.margin)
    return (policy + pull[:, None, None, None] * (reference - policy)).pow(2).mean((1, 2, 3))
