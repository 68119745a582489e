"""Objectives: one file per paper, pure functions from the errors of a batch of pairs to one number per pair.

The contract they answer stands in `trainers.losses.batch`.
"""

from trainers.losses.adaptive_dpo import (
    adaptive_dpo,
    adaptive_dpo_details,
    adaptive_dpo_state,
    adaptive_dpo_sums,
    adaptive_dpo_update,
)
from trainers.losses.batch import PairBatch, Statistics
from trainers.losses.diffusion_dpo import diffusion_dpo
from trainers.losses.dmpo import dmpo
from trainers.losses.dr_dpo import dr_dpo, dr_dpo_sums
from trainers.losses.dspo import dspo
from trainers.losses.group_robust import group_robust, group_robust_state, group_robust_sums, group_robust_update
from trainers.losses.ipo import ipo
from trainers.losses.kto import kto, kto_sums
from trainers.losses.mapo import mapo
from trainers.losses.robust import cdpo, rdpo
from trainers.losses.sdpo import sdpo, sdpo_sums
from trainers.losses.sft import sft
from trainers.losses.smpo import smpo
from trainers.losses.soft_dpo import soft_dpo

__all__ = [
    "PairBatch",
    "Statistics",
    "adaptive_dpo",
    "adaptive_dpo_details",
    "adaptive_dpo_state",
    "adaptive_dpo_sums",
    "adaptive_dpo_update",
    "cdpo",
    "diffusion_dpo",
    "dmpo",
    "dr_dpo",
    "dr_dpo_sums",
    "dspo",
    "group_robust",
    "group_robust_state",
    "group_robust_sums",
    "group_robust_update",
    "ipo",
    "kto",
    "kto_sums",
    "mapo",
    "rdpo",
    "sdpo",
    "sdpo_sums",
    "sft",
    "smpo",
    "soft_dpo",
]
