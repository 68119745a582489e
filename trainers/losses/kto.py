"""Diffusion-KTO (Li et al. 2024, arXiv 2404.04465, Eq. 8): every image is desirable or not by itself."""

from __future__ import annotations

import torch

from trainers.losses.batch import PairBatch, Statistics


def kto(
    batch: PairBatch, statistics: Statistics, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> torch.Tensor:
    """Return w_d * (1 - sigmoid(b * (g^w - KL))) + w_u * (1 - sigmoid(-b * (g^l - KL))), b = 0.5 * beta, per pair, [B].

    g = L_ref - L_policy of an image; KL = max(mean g, 0) over the images of the micro-batch of all processes, held fixed.
    The winner is the desirable image, the loser the undesirable one, summed. `beta` is in the convention with the half, by
    which b * (g^w - g^l) is DPO's z; the released program writes beta * (g - KL) and so uses half the number. At policy =
    reference the loss is (w_d + w_u) / 2.
    """
    gain = 0.5 * beta * (_gain(batch) - (statistics["gains"] / statistics["images"]).clamp_min(0))
    return desirable_weight * torch.sigmoid(-gain[0]) + undesirable_weight * torch.sigmoid(gain[1])


def kto_sums(batch: PairBatch, statistics: Statistics) -> dict[str, torch.Tensor]:
    """Return `gains`, the sum of g over the images, [], and `images`, their number, []."""
    gain = _gain(batch).detach()
    return {"gains": gain.sum(), "images": torch.ones_like(gain).sum()}


def _gain(batch: PairBatch) -> torch.Tensor:
    """Return g, [2, B]."""
    return batch.reference_error - batch.policy_error
