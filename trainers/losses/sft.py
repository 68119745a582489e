"""Supervised fine-tuning on the winners: the baseline of every paper here."""

from __future__ import annotations

import torch

from trainers.losses.batch import PairBatch


def sft(batch: PairBatch) -> torch.Tensor:
    """Return L^w, the diffusion loss of the winner, one number per pair, [B]. There is no beta."""
    return batch.policy_error[0]
