"""Objectives: one file per paper, one pure function each, from the errors of a batch of pairs to one number per pair."""

from trainers.losses.batch import PairBatch
from trainers.losses.diffusion_dpo import diffusion_dpo

__all__ = ["PairBatch", "diffusion_dpo"]
