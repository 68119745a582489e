"""Recipes at the tiny backbone's scale: 60 steps of 64 pairs of the small world, a minute or two on a CPU.

Belongs here: a recipe per method, and why its numbers are what they are. Does not belong here: papers' runs (`papers`).
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.curation import ConsensusPolicy, HumanPolicy, SmoothedPolicy
from trainers.recipes.parts import (
    CDPO,
    DMPO,
    DSPO,
    IPO,
    KTO,
    RDPO,
    SDPO,
    SFT,
    AdaptiveDPO,
    DrDPO,
    GroupRobust,
    Inversion,
    MaPO,
    Recipe,
    ReferencePolicy,
    SmPO,
    SoftDPO,
)

CORRECTED = AdaptiveDPO(metric="online_corrected", margin_term="none")
BY_DATASET = AdaptiveDPO(metric="dataset", margin_term="none")
INPO = Inversion("inpo", steps=10, under="policy", is_cached=False)


def diffusion_dpo() -> Recipe:
    """Diffusion-DPO (arXiv 2311.12908) on human labels, at the tiny backbone's scale.

    The released SD1.5 run uses beta 2000 to 5000 and rate 2e-5 on epsilon errors; the tiny backbone predicts v, whose
    errors are larger: with beta 2000 the loss was 3 to 10 and held-out pairs were judged worse (68 % against 73 %).
    """
    return Recipe("diffusion_dpo", "human labels, frozen reference (Wallace et al. 2023)", HumanPolicy())


def adaptive_dpo() -> Recipe:
    """Adaptive-DPO (arXiv 2503.16921) with the minority values of `preferences` as weights, at the tiny scale."""
    return replace(
        diffusion_dpo(),
        name="adaptive_dpo",
        summary="human labels, minority votes down-weighted by the dataset's values (Zhang et al. 2025)",
        objective=BY_DATASET,
        minority_column="minority_probability",
    )


def adaptive_dpo_online() -> Recipe:
    """Adaptive-DPO as released, the policy and its averages as annotators, at the tiny scale."""
    return replace(
        diffusion_dpo(),
        name="adaptive_dpo_online",
        summary="human labels, minority votes down-weighted by the policy and its averages (Zhang et al. 2025)",
        objective=AdaptiveDPO(),
    )


def adaptive_dpo_corrected() -> Recipe:
    """Adaptive-DPO with the corrected metric, ours: stably wrong pairs weigh less too, whatever the batch; tiny scale."""
    return replace(
        diffusion_dpo(),
        name="adaptive_dpo_corrected",
        summary="human labels, minority votes down-weighted by the corrected metric",
        objective=CORRECTED,
    )


def smpo() -> Recipe:
    """SmPO-Diffusion (arXiv 2506.02698) on consistent trajectories under the reference, at the tiny scale; 5 levels."""
    return replace(
        diffusion_dpo(),
        name="smpo",
        summary="smoothed labels, inverted latents (Lu et al. 2025)",
        policy=SmoothedPolicy(),
        objective=SmPO(),
        noising=Inversion(steps=5),
    )


def smpo_released() -> Recipe:
    """SmPO-Diffusion as released, at the tiny scale: latents inverted under the policy in every step, 5 levels."""
    return replace(
        smpo(),
        name="smpo_released",
        summary="smoothed labels, latents inverted under the policy (Lu et al. 2025, as released)",
        noising=Inversion("released", steps=5, under="policy", is_cached=False),
    )


def inpo() -> Recipe:
    """DDIM-InPO (arXiv 2503.18454) at the tiny scale: one prediction per inversion step, with noise; human labels."""
    return replace(
        diffusion_dpo(),
        name="inpo",
        summary="human labels, inverted latents with noise (Lu et al. 2025)",
        noising=INPO,
    )


def balanced_dpo() -> Recipe:
    """BalancedDPO (arXiv 2503.12575): the scorers' majority vote, a reference that follows the policy.

    The paper fixes consensus in label space and a reference updated during training; the hard copy and its period are
    our reading.
    """
    return replace(
        diffusion_dpo(),
        name="balanced_dpo",
        summary="consensus labels, reference copied from the policy every 20 steps (Tamboli et al. 2025)",
        policy=ConsensusPolicy(),
        reference=ReferencePolicy("hard_copy", every=20),
    )


def ipo() -> Recipe:
    """IPO (arXiv 2310.12036) at the tiny scale.

    beta_ipo 10 aims at a margin of 0.05, our choice: margins of single pairs spread by nearly as much, and the square holds
    back what exceeds the aim. Held-out pairs were judged at 62 %, with 50 and 100 at 54 and 52 % (DPO: 65 %).
    """
    return replace(
        diffusion_dpo(), name="ipo", summary="human labels, squared margin (Azar et al. 2023)", objective=IPO(10.0)
    )


def cdpo() -> Recipe:
    """Conservative DPO (Mitchell 2023) at the tiny scale; labels wrong with probability 0.1, our choice."""
    return replace(diffusion_dpo(), name="cdpo", summary="human labels, smoothed (Mitchell 2023)", objective=CDPO())


def rdpo() -> Recipe:
    """Robust DPO (arXiv 2403.00409) at the tiny scale; labels wrong with probability 0.1, our choice."""
    return replace(
        diffusion_dpo(),
        name="rdpo",
        summary="human labels, unbiased under flips (Chowdhury et al. 2024)",
        objective=RDPO(),
    )


def soft_dpo() -> Recipe:
    """GDPO's soft labels (arXiv 2409.06691) at the tiny scale: the ensemble's calibrated probability.

    beta 250, our choice: 2p - 1 is 0.37 in the mean of the small world, so that z is about DPO's at beta 100.
    """
    return replace(
        diffusion_dpo(),
        name="soft_dpo",
        summary="the ensemble's calibrated probabilities as soft labels (Furuta et al. 2024)",
        policy=SmoothedPolicy("p_ensemble"),
        objective=SoftDPO(250.0),
    )


def dr_dpo() -> Recipe:
    """Distributionally robust DPO (arXiv 2407.07880) at the tiny scale, with the paper's temperature 1."""
    return replace(
        diffusion_dpo(),
        name="dr_dpo",
        summary="human labels, doubtful pairs down-weighted (Wu et al. 2024)",
        objective=DrDPO(),
    )


def dspo() -> Recipe:
    """DSPO (ICLR 2025) at the tiny scale.

    beta is a factor of predictions, not of errors, so that a v model needs no other scale; but with the released 0.001 the
    loss is SFT's to a tenth of a percent. 0.5 is our choice: the aim lies a third beyond the winner's target, as seen from
    the reference. The loser has next to no part in either; held-out pairs are judged as by SFT (41 and 40 %).
    """
    return replace(
        diffusion_dpo(), name="dspo", summary="human labels, score matching (Zhu et al. 2025)", objective=DSPO(0.5)
    )


def dmpo() -> Recipe:
    """DMPO (arXiv 2507.07510) at the tiny scale, with the released alpha 0.01."""
    return replace(
        diffusion_dpo(), name="dmpo", summary="human labels, reverse divergence (Li et al. 2025)", objective=DMPO()
    )


def sdpo() -> Recipe:
    """Diffusion-SDPO (arXiv 2511.03317) at the tiny scale.

    mu 0.7, our choice: the winner's error grows half as much as DPO's, held-out pairs are judged alike (64 and 65 %). Up to
    0.5 the safeguard never acts here; with 0.9, as in its SD1.5 run, nothing is learned (49 %).
    """
    return replace(
        diffusion_dpo(),
        name="sdpo",
        summary="human labels, the winner's error safeguarded (Fu et al. 2025)",
        objective=SDPO(mu=0.7),
    )


def mapo() -> Recipe:
    """MaPO (arXiv 2406.06424) at the tiny scale.

    Without a reference raw errors are compared. For v they differ within a pair by 0.25 (standard deviation), so that the
    released 1000 in the sigmoid, a slope of 250, sees signs alone; 20 has a slope of 5. The weight beta rises from 0.1 to 1
    in its place. Both are our choice: held-out pairs are judged at 45 %, with the released numbers at 40 %, as by SFT (losers
    are harder pictures, so that fine-tuning gains more on them).
    """
    return replace(
        diffusion_dpo(),
        name="mapo",
        summary="human labels, no reference (Hong et al. 2024)",
        objective=MaPO(beta=1.0, timesteps=20),
    )


def kto() -> Recipe:
    """Diffusion-KTO (arXiv 2404.04465) at the tiny scale; beta as DPO's, whose z is the difference of its two arguments."""
    return replace(
        diffusion_dpo(),
        name="kto",
        summary="winners desirable, losers undesirable (Li et al. 2024)",
        objective=KTO(),
    )


def sft() -> Recipe:
    """Supervised fine-tuning on the humans' winners, the papers' baseline, at the tiny scale."""
    return replace(diffusion_dpo(), name="sft", summary="fine-tuned on the humans' winners", objective=SFT())


def group_robust() -> Recipe:
    """Group-robust DPO (GR-DPO, arXiv 2405.20304) over the annotators' groups, at the tiny scale; eta 0.01 as the paper's."""
    return replace(
        diffusion_dpo(),
        name="group_robust",
        summary="human labels, the worst-off group of annotators weighs most (Ramesh et al. 2024)",
        objective=GroupRobust(),
    )
