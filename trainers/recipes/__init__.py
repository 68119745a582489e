"""Recipes: pair policy x noising x objective x reference x trained weights x optimiser numbers, as frozen plain values.

A variant is a named function of `tiny` or `papers`. Imports no torch, so that Dagster can read it.
Belongs here: finding and listing recipes. Does not belong here: their numbers, machines (`config.training`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pipelines.config import ConfigError
from trainers.recipes import papers, tiny
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
    DiffusionDPO,
    DrDPO,
    Family,
    Forward,
    FullWeights,
    GroupRobust,
    Inversion,
    LoRA,
    MaPO,
    Minority,
    Need,
    Noising,
    Objective,
    Optimiser,
    Recipe,
    ReferencePolicy,
    SmPO,
    SoftDPO,
)

__all__ = [
    "CDPO",
    "COLUMNS",
    "DMPO",
    "DSPO",
    "IPO",
    "KTO",
    "RDPO",
    "RECIPES",
    "SDPO",
    "SFT",
    "AdaptiveDPO",
    "DiffusionDPO",
    "DrDPO",
    "Family",
    "Forward",
    "FullWeights",
    "GroupRobust",
    "Inversion",
    "LoRA",
    "MaPO",
    "Minority",
    "Need",
    "Noising",
    "Objective",
    "Optimiser",
    "Recipe",
    "ReferencePolicy",
    "SmPO",
    "SoftDPO",
    "listing",
    "recipe",
    "recipes_in_order",
    "table",
]

_ALL: tuple[Callable[[], Recipe], ...] = (
    tiny.diffusion_dpo,
    tiny.adaptive_dpo,
    tiny.adaptive_dpo_online,
    tiny.adaptive_dpo_corrected,
    tiny.smpo,
    tiny.smpo_released,
    tiny.inpo,
    tiny.balanced_dpo,
    tiny.ipo,
    tiny.cdpo,
    tiny.rdpo,
    tiny.soft_dpo,
    tiny.dr_dpo,
    tiny.dspo,
    tiny.dmpo,
    tiny.sdpo,
    tiny.mapo,
    tiny.kto,
    tiny.sft,
    tiny.group_robust,
    papers.diffusion_dpo_sd15,
    papers.diffusion_dpo_lora_sd15,
    papers.adaptive_dpo_sd15,
    papers.adaptive_ipo_sd15,
    papers.adaptive_dpo_corrected_sd15,
    papers.adaptive_dpo_dataset_sd15,
    papers.rdpo_sd15,
    papers.sft_sd15,
    papers.smpo_sft_sd15,
    papers.smpo_sd15,
    papers.smpo_released_sd15,
    papers.inpo_sd15,
    papers.balanced_dpo_sd15,
    papers.dspo_sd15,
    papers.dmpo_sd15,
    papers.sdpo_sd15,
    papers.kto_sd15,
    papers.diffusion_dpo_sd21,
    papers.balanced_dpo_sd21,
    papers.diffusion_dpo_sdxl,
    papers.smpo_sdxl,
    papers.smpo_released_sdxl,
    papers.inpo_sdxl,
    papers.balanced_dpo_sdxl,
    papers.sdpo_sdxl,
    papers.mapo_sdxl,
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
