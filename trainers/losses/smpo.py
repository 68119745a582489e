"""SmPO-Diffusion (Lu et al. 2025, arXiv 2506.02698): a smoothed preference as a weight on the margin."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainers.losses.batch import PairBatch


def smpo(batch: PairBatch, *, beta: float, gamma: float) -> torch.Tensor:
    """Return -log sigmoid(omega * z), omega = gamma * (2p - 1), z = 0.5 * beta * s, one number per pair, [B].

    p is the batch's probability of the winner (gamma never enters p); the paper measures s on inverted latents. `beta` is
    in the convention with the half (the released program: 2000 to 5000); code that writes z = beta * s uses half the
    number. At policy = reference, and at p = 0.5 whatever the policy, the loss is log 2 exactly.
    """
    omega = gamma * (2 * batch.need("probability") - 1)
    return -F.logsigmoid(omega * (0.5 * beta * batch.margin))
