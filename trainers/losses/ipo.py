"""IPO (Azar et al. 2023, arXiv 2310.12036, Eq. 17) on the diffusion margin."""

from __future__ import annotations

import torch

from trainers.losses.batch import PairBatch


def ipo(batch: PairBatch, *, beta_ipo: float) -> torch.Tensor:
    """Return (s - 1 / (2 * beta_ipo))^2, one number per pair, [B].

    `beta_ipo` sets the margin aimed at and acts on s itself: there is no z, and no half. At policy = reference the loss is
    1 / (4 * beta_ipo^2).
    """
    return (batch.margin - 1 / (2 * beta_ipo)).pow(2)
