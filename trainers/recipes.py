"""Recipes: pair policy x noising x objective x reference x optimiser numbers, as frozen plain values.

A variant is a named function here. Imports no torch, so that Dagster can read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipelines.config import ConfigError
from pipelines.curation import ConsensusPolicy, HumanPolicy, Policy


@dataclass(frozen=True)
class Objective:
    """Which loss of `trainers.losses`, and its beta (convention z = 0.5 * beta * s)."""

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: float = 100.0


@dataclass(frozen=True)
class ReferencePolicy:
    """The reference model: `frozen` at the base, or `hard_copy` of the policy every `every` optimiser steps."""

    kind: Literal["frozen", "hard_copy"] = "frozen"
    every: int = 0

    def __post_init__(self) -> None:
        if self.kind == "hard_copy" and self.every < 1:
            raise ValueError(f"ReferencePolicy: hard_copy needs every >= 1 optimiser steps, found {self.every}")


@dataclass(frozen=True)
class Optimiser:
    """AdamW's numbers; the rate warms up linearly and then stays."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    warmup_steps: int = 5
    max_gradient_norm: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """One training run but for data, seed and device."""

    name: str
    summary: str
    policy: Policy
    objective: Objective = Objective()
    reference: ReferencePolicy = ReferencePolicy()
    optimiser: Optimiser = Optimiser()
    batch_size: int = 64
    steps: int = 60
    prompt_dropout: float = 0.1

    def numbers(self) -> dict[str, Any]:
        """Return everything that a run depends on, as plain values."""
        return asdict(self)


def diffusion_dpo() -> Recipe:
    """Diffusion-DPO (arXiv 2311.12908) on human labels, at the tiny backbone's scale.

    The released SD1.5 run uses beta 2000 to 5000 and rate 2e-5 on epsilon errors; the tiny backbone predicts v, whose
    errors are larger: with beta 2000 the loss was 3 to 10 and held-out pairs were judged worse (68 % against 73 %).
    """
    return Recipe("diffusion_dpo", "human labels, frozen reference (Wallace et al. 2023)", HumanPolicy())


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


RECIPES: dict[str, Callable[[], Recipe]] = {r.__name__: r for r in (diffusion_dpo, balanced_dpo)}


def recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe: expected one of {sorted(RECIPES)}, found {name!r}")
    return RECIPES[name]()
