"""What a recipe is made of, as frozen plain values: objectives, noising, references, weights, optimisers.

The classes of objectives hold the arguments of the function of `trainers.losses` of the same name; their beta is in the
convention z = 0.5 * beta * s.
Belongs here: what can be chosen, and what is refused. Does not belong here: chosen numbers (`tiny`, `papers`), mathematics.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from pipelines.curation import Policy

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
    mixes_pairs: ClassVar[bool] = False
    """Whether a pair's loss depends on the other pairs of its micro-batch (of all processes)."""

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
    def mixes_pairs(self) -> bool:  # type: ignore[override]
        """Return whether margins are judged by the micro-batch's."""
        return self.metric == "online"

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
    mixes_pairs: ClassVar[bool] = True
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
    mixes_pairs: ClassVar[bool] = True
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
    mixes_pairs: ClassVar[bool] = True
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
    mixes_pairs: ClassVar[bool] = True
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
