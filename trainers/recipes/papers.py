"""Recipes with the papers' numbers for SD1.5, SD2.1 and SDXL, each with its source.

Belongs here: what was published, and what is our reading of it. Does not belong here: numbers for the small world (`tiny`).
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.curation import ConsensusPolicy, HumanPolicy, SmoothedPolicy
from trainers.recipes import tiny
from trainers.recipes.parts import (
    DMPO,
    DSPO,
    KTO,
    RDPO,
    SDPO,
    SFT,
    AdaptiveDPO,
    DiffusionDPO,
    Inversion,
    LoRA,
    MaPO,
    Optimiser,
    Recipe,
    ReferencePolicy,
    SmPO,
)


def diffusion_dpo_sd15() -> Recipe:
    """Diffusion-DPO (arXiv 2311.12908) on SD1.5 as released.

    Program SalesforceAIResearch/DiffusionDPO, launchers/sd15.sh: AdamW, 2000 steps of 2048 pairs, warm-up 500, beta 5000. The
    rate is 1e-8 times the pairs of a step (the paper's text is 1000 times off). A fifth of the prompts is dropped; pictures
    are mirrored, there each by itself.
    """
    return replace(
        tiny.diffusion_dpo(),
        name="diffusion_dpo_sd15",
        family="sd15",
        objective=DiffusionDPO(5000.0),
        optimiser=Optimiser(learning_rate=2.048e-5, warmup_steps=500),
        batch_size=2048,
        steps=2000,
        prompt_dropout=0.2,
        flip=True,
    )


def diffusion_dpo_sd21() -> Recipe:
    """Diffusion-DPO on SD2.1. The paper has none: all numbers are those of SD1.5, our choice.

    They fit SD2.1-base, which predicts epsilon. The 768-pixel model predicts v, whose errors are larger: lower beta there.
    """
    return replace(diffusion_dpo_sd15(), name="diffusion_dpo_sd21", family="sd21")


def diffusion_dpo_sdxl() -> Recipe:
    """Diffusion-DPO on SDXL as released (launchers/sdxl.sh): Adafactor, warm-up 200, the rest as on SD1.5."""
    return replace(
        diffusion_dpo_sd15(),
        name="diffusion_dpo_sdxl",
        family="sdxl",
        optimiser=Optimiser("adafactor", learning_rate=2.048e-5, warmup_steps=200),
    )


def diffusion_dpo_lora_sd15() -> Recipe:
    """Diffusion-DPO on SD1.5 in the set-up of Adaptive-DPO's runs (arXiv 2503.16921): the baseline that it compares with.

    LoRA with rank and alpha 8, AdamW, rate 1e-5, constant; one epoch of Pick-a-Pic v2, 851,293 decided pairs; beta 2000, 1000
    in the program's own convention. Prompts are not dropped, pictures mirrored. Of the paper's 16 to 64 pairs per step we
    take 64.
    """
    return replace(
        tiny.diffusion_dpo(),
        name="diffusion_dpo_lora_sd15",
        family="sd15",
        objective=DiffusionDPO(2000.0),
        weights=LoRA(rank=8, alpha=8),
        optimiser=Optimiser(learning_rate=1e-5, warmup_steps=0),
        batch_size=64,
        steps=13_301,
        prompt_dropout=0.0,
        flip=True,
    )


def adaptive_dpo_sd15() -> Recipe:
    """Adaptive-DPO (arXiv 2503.16921) on SD1.5 as released; rho 15, c1 1, k1 10, quadratic margin term.

    The metric's scale depends on the pairs of a micro-batch over all processes: with 16 of them (`training.micro_batch`) the
    root mean square of z is 3.75, with 64 it is 1.9.
    """
    return replace(
        diffusion_dpo_lora_sd15(),
        name="adaptive_dpo_sd15",
        summary=tiny.adaptive_dpo_online().summary,
        objective=AdaptiveDPO(beta=2000.0),
    )


def adaptive_ipo_sd15() -> Recipe:
    """Adaptive-DPO in its form for IPO on SD1.5; beta_ipo 100 is the released program's default."""
    return replace(
        adaptive_dpo_sd15(),
        name="adaptive_ipo_sd15",
        summary="human labels, squared margin, minority votes down-weighted by the policy and its averages",
        objective=AdaptiveDPO(beta=2000.0, form="ipo", beta_ipo=100.0),
    )


def adaptive_dpo_corrected_sd15() -> Recipe:
    """Adaptive-DPO with the corrected metric, ours, in the released set-up on SD1.5."""
    return replace(
        adaptive_dpo_sd15(),
        name="adaptive_dpo_corrected_sd15",
        summary=tiny.adaptive_dpo_corrected().summary,
        objective=replace(tiny.CORRECTED, beta=2000.0),
    )


def adaptive_dpo_dataset_sd15() -> Recipe:
    """Adaptive-DPO with the minority values of `preferences` as weights, in the released set-up on SD1.5; at DPO's speed."""
    return replace(
        adaptive_dpo_sd15(),
        name="adaptive_dpo_dataset_sd15",
        summary=tiny.adaptive_dpo().summary,
        objective=replace(tiny.BY_DATASET, beta=2000.0),
        minority_column="minority_probability",
    )


def rdpo_sd15() -> Recipe:
    """Robust DPO (arXiv 2403.00409), the robust baseline of Adaptive-DPO, in its set-up on SD1.5.

    Labels wrong with probability 0.1: our choice, the paper's is not known to us.
    """
    return replace(
        diffusion_dpo_lora_sd15(),
        name="rdpo_sd15",
        summary=tiny.rdpo().summary,
        objective=RDPO(2000.0, flip_probability=0.1),
    )


def sft_sd15() -> Recipe:
    """Supervised fine-tuning of SD1.5 on the humans' winners.

    Diffusion-DPO's program does it by the switch --sft; with which numbers is not said: they are its DPO run's, our choice.
    """
    return replace(diffusion_dpo_sd15(), name="sft_sd15", summary=tiny.sft().summary, objective=SFT())


def smpo_sft_sd15() -> Recipe:
    """The model that the released SD1.5 runs of SmPO-Diffusion and DDIM-InPO start from, policy and reference alike.

    Their launchers name a checkpoint 'sd15-sft' that was never published, nor was how it was made. This stage stands in for
    it: winners, steps and rate are those of sft_sd15, our choice; results that build on it are not comparable to the papers'.
    """
    return replace(sft_sd15(), name="smpo_sft_sd15", summary="the stage that SmPO and InPO start from, our stand-in")


def smpo_sd15() -> Recipe:
    """SmPO-Diffusion (arXiv 2506.02698) on SD1.5, on consistent trajectories under the reference.

    Program JaydenLyh/SmPO, examples/sd15.sh: AdamW, 200 steps of 1024 pairs, warm-up 100, rate 1e-8 times the pairs of a
    step, beta 2000; gamma 10. A grid of ten steps has nine levels to draw t0 from, the paper's number. The labels are the
    paper's with `labels.smpo_constants = "published"`.
    """
    return replace(
        diffusion_dpo_sd15(),
        name="smpo_sd15",
        summary=tiny.smpo().summary,
        policy=SmoothedPolicy(),
        objective=SmPO(2000.0, gamma=10.0),
        noising=Inversion(steps=10),
        optimiser=Optimiser(learning_rate=1.024e-5, warmup_steps=100),
        batch_size=1024,
        steps=200,
        start="smpo_sft_sd15",
    )


def smpo_released_sd15() -> Recipe:
    """SmPO-Diffusion on SD1.5 with the released inversion: under the policy, in every step, 5 levels."""
    return replace(
        smpo_sd15(),
        name="smpo_released_sd15",
        summary=tiny.smpo_released().summary,
        noising=Inversion("released", steps=5, under="policy", is_cached=False),
    )


def smpo_sdxl() -> Recipe:
    """SmPO-Diffusion on SDXL (examples/sdxl.sh): Adafactor, beta 5000, from the backbone; the rest as smpo_sd15."""
    return replace(
        smpo_sd15(),
        name="smpo_sdxl",
        family="sdxl",
        objective=SmPO(5000.0, gamma=10.0),
        optimiser=Optimiser("adafactor", learning_rate=1.024e-5, warmup_steps=100),
        start="",
    )


def smpo_released_sdxl() -> Recipe:
    """SmPO-Diffusion on SDXL with the released inversion: under the policy, in every step, 10 levels."""
    return replace(
        smpo_sdxl(),
        name="smpo_released_sdxl",
        summary=tiny.smpo_released().summary,
        noising=Inversion("released", steps=10, under="policy", is_cached=False),
    )


def inpo_sd15() -> Recipe:
    """DDIM-InPO (arXiv 2503.18454) on SD1.5: human labels, latents inverted under the policy with noise, 10 levels.

    Program JaydenLyh/InPO, examples/sd15.sh: 400 steps, warm-up 200, beta 2000; the rest, the start too, as SmPO's.
    """
    return replace(
        smpo_sd15(),
        name="inpo_sd15",
        summary=tiny.inpo().summary,
        policy=HumanPolicy(),
        objective=DiffusionDPO(2000.0),
        noising=tiny.INPO,
        optimiser=Optimiser(learning_rate=1.024e-5, warmup_steps=200),
        steps=400,
    )


def inpo_sdxl() -> Recipe:
    """DDIM-InPO on SDXL (examples/sdxl.sh): Adafactor, beta 5000, from the backbone; the rest as inpo_sd15."""
    return replace(
        inpo_sd15(),
        name="inpo_sdxl",
        family="sdxl",
        objective=DiffusionDPO(5000.0),
        optimiser=Optimiser("adafactor", learning_rate=1.024e-5, warmup_steps=200),
        start="",
    )


def balanced_dpo_sd15() -> Recipe:
    """BalancedDPO (arXiv 2503.12575) on SD1.5: the scorers' majority vote, a reference that follows the policy.

    The abstract fixes consensus in label space and a reference that is updated; the paper's numbers are not known to us. Our
    reading: Diffusion-DPO's numbers, and a hard copy after every quarter of the steps.
    """
    return _balanced(diffusion_dpo_sd15())


def balanced_dpo_sd21() -> Recipe:
    """BalancedDPO on SD2.1; see balanced_dpo_sd15 and, for v-prediction, diffusion_dpo_sd21."""
    return _balanced(diffusion_dpo_sd21())


def balanced_dpo_sdxl() -> Recipe:
    """BalancedDPO on SDXL; see balanced_dpo_sd15."""
    return _balanced(diffusion_dpo_sdxl())


def _balanced(base: Recipe) -> Recipe:
    return replace(
        base,
        name=f"balanced_dpo_{base.family}",
        summary="consensus labels, reference copied from the policy every 500 steps (Tamboli et al. 2025)",
        policy=ConsensusPolicy(),
        reference=ReferencePolicy("hard_copy", every=500),
    )


def dspo_sd15() -> Recipe:
    """DSPO (ICLR 2025) on SD1.5: beta 0.001, the rest as Diffusion-DPO (huaishengzhu/DSPO, launchers/sd15.sh).

    Its SDXL run has another loss, which is not built here.
    """
    return replace(diffusion_dpo_sd15(), name="dspo_sd15", summary=tiny.dspo().summary, objective=DSPO(0.001))


def dmpo_sd15() -> Recipe:
    """DMPO (arXiv 2507.07510) on SD1.5: beta 2000, alpha 0.01, the rest as Diffusion-DPO.

    Numbers of Diffusion-SDPO's program (scripts/train/sd15_dmpo.sh), which adds its own safeguard; not of DMPO's authors.
    """
    return replace(
        diffusion_dpo_sd15(), name="dmpo_sd15", summary=tiny.dmpo().summary, objective=DMPO(2000.0, alpha=0.01)
    )


def sdpo_sd15() -> Recipe:
    """Diffusion-SDPO (arXiv 2511.03317) on SD1.5: mu 0.9, the rest as Diffusion-DPO.

    Program AIDC-AI/Diffusion-SDPO, scripts/train/sd15_diffusion_dpo.sh. The safeguard is one number per micro-batch: the
    program's has 8 pairs of one process, ours those of all processes.
    """
    return replace(diffusion_dpo_sd15(), name="sdpo_sd15", summary=tiny.sdpo().summary, objective=SDPO(5000.0, mu=0.9))


def sdpo_sdxl() -> Recipe:
    """Diffusion-SDPO on SDXL (sdxl_diffusion_dpo.sh): mu 0.6, a tenth of SD1.5's rate, warm-up 500, Adafactor."""
    return replace(
        diffusion_dpo_sdxl(),
        name="sdpo_sdxl",
        summary=tiny.sdpo().summary,
        objective=SDPO(5000.0, mu=0.6),
        optimiser=Optimiser("adafactor", learning_rate=2.048e-6, warmup_steps=500),
    )


def kto_sd15() -> Recipe:
    """Diffusion-KTO (arXiv 2404.04465) on SD1.5: AdamW, 20,000 steps of 2048 pictures, rate 1e-7, warm-up 200.

    Program jacklishufan/diffusion-kto, exps/example.sh (8-bit Adam there); beta 2000, 1000 in its own convention. It judges
    pictures one by one and draws desirable ones with probability 0.8; here both of 1024 pairs are taken with the weights 0.8
    and 0.2, which is the same in the mean.
    """
    return replace(
        diffusion_dpo_sd15(),
        name="kto_sd15",
        summary=tiny.kto().summary,
        objective=KTO(2000.0, desirable_weight=0.8, undesirable_weight=0.2),
        optimiser=Optimiser(learning_rate=1e-7, warmup_steps=200),
        batch_size=1024,
        steps=20_000,
    )


def mapo_sdxl() -> Recipe:
    """MaPO (arXiv 2406.06424) on SDXL: beta 0.1, AdamW, rate 1e-5, constant, 2000 steps of 16 pairs.

    Numbers of the README's run (mapo-t2i/mapo; 8-bit AdamW there) on one GPU: the paper's own batch is not known to us.
    """
    return replace(
        diffusion_dpo_sdxl(),
        name="mapo_sdxl",
        summary=tiny.mapo().summary,
        objective=MaPO(beta=0.1, snr=0.5, timesteps=1000),
        optimiser=Optimiser(learning_rate=1e-5, warmup_steps=0),
        batch_size=16,
        prompt_dropout=0.0,
    )
