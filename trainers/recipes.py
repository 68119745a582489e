"""Recipes: pair policy x noising x objective x reference x trained weights x optimiser numbers, as frozen plain values.

A variant is a named function here. Imports no torch, so that Dagster can read it. The classes of objectives hold the
arguments of the function of `trainers.losses` of the same name; their beta is in the convention z = 0.5 * beta * s.
Belongs here: the papers' numbers, with their source. Does not belong here: mathematics, machines (`config.training`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from pipelines.config import ConfigError
from pipelines.curation import ConsensusPolicy, HumanPolicy, Policy, SmoothedPolicy

Need = Literal["reference", "annotators", "probability", "minority", "group"]
"""What an objective needs beside the policy's predictions.

reference: predictions of the reference model. annotators: errors of the EMA annotators. probability: of the winner, by the
pair policy. minority: the pair's minority value. group: the index of its annotators' group.
"""
Minority = Literal["metric", "minority_score", "minority_probability"]


# --- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """Which loss of `trainers.losses` (`name`), its numbers (the fields), and what it needs."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})

    def numbers(self) -> dict[str, Any]:
        """Return the arguments of the loss."""
        return asdict(self)


@dataclass(frozen=True)
class DiffusionDPO(Objective):
    """Diffusion-DPO (arXiv 2311.12908)."""

    name: ClassVar[str] = "diffusion_dpo"
    beta: float = 100.0


@dataclass(frozen=True)
class AdaptiveDPO(Objective):
    """Adaptive-DPO (arXiv 2503.16921): minority instances are down-weighted.

    metric: `online` (the released program: policy and its EMAs as annotators), `online_corrected`, or `dataset` (the pair's
    minority value of `preferences`, read from minority_column; no EMAs). rho with normalise false: 1e4; `dataset` reads
    neither. form `ipo` uses beta_ipo. The margin term and normalise are the released metric's alone.
    """

    name: ClassVar[str] = "adaptive_dpo"
    beta: float = 100.0
    metric: Literal["online", "online_corrected", "dataset"] = "online"
    form: Literal["dpo", "ipo"] = "dpo"
    beta_ipo: float = 100.0
    rho: float = 15.0
    normalise: bool = True
    c1: float = 1.0
    k1: float = 10.0
    weighting: Literal["linear", "quadratic", "exp"] = "linear"
    margin_term: Literal["none", "linear", "quadratic"] = "quadratic"

    def __post_init__(self) -> None:
        if self.metric != "online" and self.margin_term != "none":
            raise ValueError(
                f"AdaptiveDPO: the metric {self.metric!r} has no margin term, found {self.margin_term!r}; "
                "give margin_term='none'"
            )
        if self.metric == "online_corrected" and not self.normalise:
            raise ValueError("AdaptiveDPO: the metric 'online_corrected' is normalised; leave normalise true")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """Return what the metric's source needs."""
        return frozenset({"reference", "minority" if self.metric == "dataset" else "annotators"})


@dataclass(frozen=True)
class SmPO(Objective):
    """SmPO-Diffusion (arXiv 2506.02698): the smoothed preference as a weight gamma * (2p - 1) on z."""

    name: ClassVar[str] = "smpo"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "probability"})
    beta: float = 100.0
    gamma: float = 10.0


@dataclass(frozen=True)
class IPO(Objective):
    """IPO (arXiv 2310.12036) on the diffusion margin."""

    name: ClassVar[str] = "ipo"
    beta_ipo: float = 100.0


@dataclass(frozen=True)
class CDPO(Objective):
    """Conservative DPO (Mitchell 2023): labels are wrong with probability flip_probability."""

    name: ClassVar[str] = "cdpo"
    beta: float = 100.0
    flip_probability: float = 0.1

    def __post_init__(self) -> None:
        _require_below_half("CDPO", self.flip_probability)


@dataclass(frozen=True)
class RDPO(Objective):
    """Robust DPO (arXiv 2403.00409): unbiased under labels flipped with probability flip_probability < 0.5."""

    name: ClassVar[str] = "rdpo"
    beta: float = 100.0
    flip_probability: float = 0.1

    def __post_init__(self) -> None:
        _require_below_half("RDPO", self.flip_probability)


def _require_below_half(name: str, flip_probability: float) -> None:
    if not 0 <= flip_probability < 0.5:
        raise ValueError(f"{name}: flip_probability: expected 0 to below 0.5, found {flip_probability}")


@dataclass(frozen=True)
class SoftDPO(Objective):
    """Soft labels as geometric averaging (GDPO, arXiv 2409.06691): (2p - 1) z."""

    name: ClassVar[str] = "soft_dpo"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "probability"})
    beta: float = 100.0


@dataclass(frozen=True)
class DrDPO(Objective):
    """Distributionally robust DPO (arXiv 2407.07880)."""

    name: ClassVar[str] = "dr_dpo"
    beta: float = 100.0
    temperature: float = 1.0


@dataclass(frozen=True)
class DSPO(Objective):
    """Direct score preference optimisation (ICLR 2025)."""

    name: ClassVar[str] = "dspo"
    beta: float = 0.01


@dataclass(frozen=True)
class DMPO(Objective):
    """Divergence minimisation preference optimisation (arXiv 2507.07510)."""

    name: ClassVar[str] = "dmpo"
    beta: float = 100.0
    alpha: float = 0.01


@dataclass(frozen=True)
class SDPO(Objective):
    """Diffusion-SDPO (arXiv 2511.03317): the loser's gradient is scaled so that the winner's error does not grow."""

    name: ClassVar[str] = "sdpo"
    beta: float = 100.0
    mu: float = 0.9


@dataclass(frozen=True)
class MaPO(Objective):
    """Margin-aware preference optimisation (arXiv 2406.06424): no reference model."""

    name: ClassVar[str] = "mapo"
    needs: ClassVar[frozenset[Need]] = frozenset()
    beta: float = 0.1
    snr: float = 0.5
    timesteps: int = 1000


@dataclass(frozen=True)
class KTO(Objective):
    """Diffusion-KTO (arXiv 2404.04465): the winner desirable, the loser undesirable."""

    name: ClassVar[str] = "kto"
    beta: float = 100.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning on the winners."""

    name: ClassVar[str] = "sft"
    needs: ClassVar[frozenset[Need]] = frozenset()


@dataclass(frozen=True)
class GroupRobust(Objective):
    """Group-robust DPO (GRPO, arXiv 2405.20304): the worst-off group of annotators weighs most.

    groups: how many there may be, beside the unknown one; those that do not occur change nothing.
    """

    name: ClassVar[str] = "group_robust"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "group"})
    beta: float = 100.0
    eta: float = 0.01
    groups: int = 8


# --- noising ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward:
    """Gaussian noise shared by the pair; latents are drawn from their posteriors."""

    name: ClassVar[str] = "forward"


@dataclass(frozen=True)
class Inversion:
    """Inverted latents (see `trainers.inversion`) of `steps` grid levels, from the posteriors' means.

    under: the model that inverts. is_cached: trajectories are a dataset, made before training (under the reference only).
    """

    name: ClassVar[str] = "inversion"
    mode: Literal["released", "consistent", "inpo"] = "consistent"
    steps: int = 10
    under: Literal["reference", "policy"] = "reference"
    is_cached: bool = True

    def __post_init__(self) -> None:
        if self.is_cached and self.under == "policy":
            raise ValueError("Inversion: trajectories under the policy change with it and cannot be cached")


Noising = Forward | Inversion


# --- reference, weights, optimiser -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferencePolicy:
    """The reference model, moved every `every` optimiser steps but where it is `frozen` at the start.

    hard_copy: becomes the policy. ema: reference <- decay * reference + (1 - decay) * policy.
    """

    kind: Literal["frozen", "hard_copy", "ema"] = "frozen"
    every: int = 0
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.kind != "frozen" and self.every < 1:
            raise ValueError(f"ReferencePolicy: {self.kind} needs every >= 1 optimiser steps, found {self.every}")
        if self.kind == "ema" and not 0 < self.decay < 1:
            raise ValueError(f"ReferencePolicy: ema needs a decay between 0 and 1, found {self.decay}")


@dataclass(frozen=True)
class FullWeights:
    """All of the UNet is trained."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the attention's projections are trained (arXiv 2106.09685); the scale is alpha / rank."""

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: int = 8
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Optimiser:
    """The optimiser's numbers; the rate warms up linearly over warmup_steps and then follows the schedule."""

    kind: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    warmup_steps: int = 5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_gradient_norm: float = 1.0


# --- recipes ---------------------------------------------------------------------------------------------------------

Family = Literal["tiny", "sd15", "sd21", "sdxl"]


@dataclass(frozen=True)
class Recipe:
    """One training run but for data, seed and machine.

    family: the backbones it is meant for. batch_size: pairs per optimiser step over all processes. flip: pairs are
    mirrored with probability 0.5, both images alike. start: the recipe whose trained model policy and reference start
    from; '' for the backbone.
    """

    name: str
    summary: str
    policy: Policy
    family: Family = "tiny"
    objective: Objective = DiffusionDPO()
    noising: Noising = Forward()
    reference: ReferencePolicy = ReferencePolicy()
    weights: FullWeights | LoRA = FullWeights()
    optimiser: Optimiser = field(default_factory=Optimiser)
    batch_size: int = 64
    steps: int = 60
    prompt_dropout: float = 0.1
    flip: bool = False
    minority_column: Minority = "metric"
    start: str = ""

    def numbers(self) -> dict[str, Any]:
        """Return everything that a run depends on, as plain values."""
        parts = ("policy", "objective", "noising", "reference", "weights")
        return {**asdict(self), **{p: {"kind": _name(getattr(self, p)), **asdict(getattr(self, p))} for p in parts}}


def _name(part: Any) -> str:
    return getattr(part, "name", None) or part.kind


# --- recipes at the tiny backbone's scale ----------------------------------------------------------------------------

_CORRECTED = AdaptiveDPO(metric="online_corrected", margin_term="none")
_BY_DATASET = AdaptiveDPO(metric="dataset", margin_term="none")
_INPO = Inversion("inpo", steps=10, under="policy", is_cached=False)


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
        objective=_BY_DATASET,
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
        objective=_CORRECTED,
    )


def smpo() -> Recipe:
    """SmPO-Diffusion (arXiv 2506.02698) on consistent trajectories under the reference, at the tiny scale."""
    return replace(
        diffusion_dpo(),
        name="smpo",
        summary="smoothed labels, inverted latents (Lu et al. 2025)",
        policy=SmoothedPolicy(),
        objective=SmPO(),
        noising=Inversion(),
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
        noising=_INPO,
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


# --- recipes with the papers' numbers --------------------------------------------------------------------------------


def diffusion_dpo_sd15() -> Recipe:
    """Diffusion-DPO (arXiv 2311.12908) on SD1.5 as released.

    Program SalesforceAIResearch/DiffusionDPO, launchers/sd15.sh: AdamW, 2000 steps of 2048 pairs, warm-up 500, beta 5000. The
    rate is 1e-8 times the pairs of a step (the paper's text is 1000 times off). A fifth of the prompts is dropped; pictures
    are mirrored, there each by itself.
    """
    return replace(
        diffusion_dpo(),
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
        diffusion_dpo(),
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
        summary=adaptive_dpo_online().summary,
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
        summary=adaptive_dpo_corrected().summary,
        objective=replace(_CORRECTED, beta=2000.0),
    )


def adaptive_dpo_dataset_sd15() -> Recipe:
    """Adaptive-DPO with the minority values of `preferences` as weights, in the released set-up on SD1.5; at DPO's speed."""
    return replace(
        adaptive_dpo_sd15(),
        name="adaptive_dpo_dataset_sd15",
        summary=adaptive_dpo().summary,
        objective=replace(_BY_DATASET, beta=2000.0),
        minority_column="minority_probability",
    )


def rdpo_sd15() -> Recipe:
    """Robust DPO (arXiv 2403.00409), the robust baseline of Adaptive-DPO, in its set-up on SD1.5.

    Labels wrong with probability 0.1: our choice, the paper's is not known to us.
    """
    return replace(
        diffusion_dpo_lora_sd15(),
        name="rdpo_sd15",
        summary=rdpo().summary,
        objective=RDPO(2000.0, flip_probability=0.1),
    )


def sft_sd15() -> Recipe:
    """Supervised fine-tuning of SD1.5 on the humans' winners.

    Diffusion-DPO's program does it by the switch --sft; with which numbers is not said: they are its DPO run's, our choice.
    """
    return replace(diffusion_dpo_sd15(), name="sft_sd15", summary=sft().summary, objective=SFT())


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
        summary=smpo().summary,
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
        summary=smpo_released().summary,
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
        summary=smpo_released().summary,
        noising=Inversion("released", steps=10, under="policy", is_cached=False),
    )


def inpo_sd15() -> Recipe:
    """DDIM-InPO (arXiv 2503.18454) on SD1.5: human labels, latents inverted under the policy with noise, 10 levels.

    Program JaydenLyh/InPO, examples/sd15.sh: 400 steps, warm-up 200, beta 2000; the rest, the start too, as SmPO's.
    """
    return replace(
        smpo_sd15(),
        name="inpo_sd15",
        summary=inpo().summary,
        policy=HumanPolicy(),
        objective=DiffusionDPO(2000.0),
        noising=_INPO,
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
    return replace(diffusion_dpo_sd15(), name="dspo_sd15", summary=dspo().summary, objective=DSPO(0.001))


def dmpo_sd15() -> Recipe:
    """DMPO (arXiv 2507.07510) on SD1.5: beta 2000, alpha 0.01, the rest as Diffusion-DPO.

    Numbers of Diffusion-SDPO's program (scripts/train/sd15_dmpo.sh), which adds its own safeguard; not of DMPO's authors.
    """
    return replace(diffusion_dpo_sd15(), name="dmpo_sd15", summary=dmpo().summary, objective=DMPO(2000.0, alpha=0.01))


def sdpo_sd15() -> Recipe:
    """Diffusion-SDPO (arXiv 2511.03317) on SD1.5: mu 0.9, the rest as Diffusion-DPO.

    Program AIDC-AI/Diffusion-SDPO, scripts/train/sd15_diffusion_dpo.sh. The safeguard is one number per micro-batch: the
    program's has 8 pairs of one process, ours those of all processes.
    """
    return replace(diffusion_dpo_sd15(), name="sdpo_sd15", summary=sdpo().summary, objective=SDPO(5000.0, mu=0.9))


def sdpo_sdxl() -> Recipe:
    """Diffusion-SDPO on SDXL (sdxl_diffusion_dpo.sh): mu 0.6, a tenth of SD1.5's rate, warm-up 500, Adafactor."""
    return replace(
        diffusion_dpo_sdxl(),
        name="sdpo_sdxl",
        summary=sdpo().summary,
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
        summary=kto().summary,
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
        summary=mapo().summary,
        objective=MaPO(beta=0.1, snr=0.5, timesteps=1000),
        optimiser=Optimiser(learning_rate=1e-5, warmup_steps=0),
        batch_size=16,
        prompt_dropout=0.0,
    )


_ALL: tuple[Callable[[], Recipe], ...] = (
    diffusion_dpo,
    adaptive_dpo,
    adaptive_dpo_online,
    adaptive_dpo_corrected,
    smpo,
    smpo_released,
    inpo,
    balanced_dpo,
    ipo,
    cdpo,
    rdpo,
    soft_dpo,
    dr_dpo,
    dspo,
    dmpo,
    sdpo,
    mapo,
    kto,
    sft,
    group_robust,
    diffusion_dpo_sd15,
    diffusion_dpo_lora_sd15,
    adaptive_dpo_sd15,
    adaptive_ipo_sd15,
    adaptive_dpo_corrected_sd15,
    adaptive_dpo_dataset_sd15,
    rdpo_sd15,
    sft_sd15,
    smpo_sft_sd15,
    smpo_sd15,
    smpo_released_sd15,
    inpo_sd15,
    balanced_dpo_sd15,
    dspo_sd15,
    dmpo_sd15,
    sdpo_sd15,
    kto_sd15,
    diffusion_dpo_sd21,
    balanced_dpo_sd21,
    diffusion_dpo_sdxl,
    smpo_sdxl,
    smpo_released_sdxl,
    inpo_sdxl,
    balanced_dpo_sdxl,
    sdpo_sdxl,
    mapo_sdxl,
)
RECIPES: dict[str, Callable[[], Recipe]] = {r.__name__: r for r in _ALL}
COLUMNS = ("name", "family", "objective", "policy", "reference", "weights", "noising", "batch", "steps", "rate")
"""Of `table`."""


def recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe: expected one of {sorted(RECIPES)}, found {name!r}")
    return RECIPES[name]()


def recipes_in_order(names: Iterable[str]) -> list[Recipe]:
    """Return these recipes and those that they start from, each once, every start before what starts from it.

    Raises:
        ConfigError: there is none of that name.
    """
    found: dict[str, Recipe] = {}
    for name in names:
        rule = recipe(name)
        if rule.start:
            found |= {r.name: r for r in recipes_in_order([rule.start])}
        found.setdefault(name, rule)
    return list(found.values())


def table() -> list[tuple[str, ...]]:
    """Return a row of COLUMNS per recipe, as text, in the order of RECIPES."""
    return [_row(make()) for make in RECIPES.values()]


def listing() -> str:
    """Return the table as aligned text."""
    rows = [COLUMNS, *table()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(rule: Recipe) -> tuple[str, ...]:
    reference = rule.reference
    moved = "" if reference.kind == "frozen" else f" every {reference.every}"
    return (
        rule.name,
        rule.family,
        " ".join([rule.objective.name, *filter(None, [getattr(rule.objective, "metric", "")])]),
        rule.policy.name,
        f"{reference.kind}{moved}" if "reference" in rule.objective.needs else "none",
        rule.weights.name + (f" r={rule.weights.rank}" if isinstance(rule.weights, LoRA) else ""),
        _noising(rule.noising),
        str(rule.batch_size),
        str(rule.steps),
        f"{rule.optimiser.learning_rate:g}",
    )


def _noising(noising: Noising) -> str:
    if isinstance(noising, Forward):
        return noising.name
    return f"{noising.mode}-{noising.steps} under {noising.under}" + (", cached" if noising.is_cached else "")
