"""Inversion: noisy latents that a model's own DDIM step, run backwards, leads to, in place of forward Gaussian noise.

    step(x, e)  x' = sqrt(a') (x - sqrt(1-a) e) / sqrt(a) + sqrt(1-a') e                DDIM, arXiv 2010.02502, backwards
    ReNoise     e1 = model(x);  e2 = model(step(x, e1));  x' = step(x, (e1+e2)/2)       arXiv 2403.14602, one correction
    target      e = (x_t0 - sqrt(abar_t0) x0) / sqrt(1-abar_t0),   or v = sqrt(abar_t0) e - sqrt(1-abar_t0) x0

The grid of n steps over T timesteps has the levels j*D + 1 with D = T // n; a latent at level l has the noise of timestep l.
Every latent walks its own number of steps: at each level only those that go so far are forwarded.

All functions take `predict(x [M, C, H, W], labels [M], rows [M]) -> [M, C, H, W]`, which returns what the model predicts (e
or v) at these timestep labels under the conditionings `rows`. No gradient flows. x is kept in float32 at least.
Belongs here: grids, steps, targets. Does not belong here: backbones, where trajectories are stored (`trajectories`), losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""predict(x [M, C, H, W], labels [M], rows [M]) -> e or v, [M, C, H, W]; a label may be negative (see `released`)."""
Noise = Callable[[torch.Tensor, int], torch.Tensor]
"""noise(rows [M], level) -> standard normal noise [M, C, H, W] of these rows on reaching that level."""
Label = Literal["source", "target"]
"""At which end of a step the correction e2 is evaluated."""

INPO_ETA = 0.1


@dataclass(frozen=True)
class Mode:
    """How latents are inverted.

    is_clean_first: the first step starts from the clean latent (a = 1), else from a pseudo level D below the first. second:
    the label of e2; None: one prediction per step. eta: noise of eta * sqrt(variance) is added after each step.
    """

    is_clean_first: bool
    second: Label | None
    eta: float = 0.0

    @property
    def forwards(self) -> int:
        """Return the model's forwards per step."""
        return 1 if self.second is None else 2


MODES: dict[str, Mode] = {
    "released": Mode(is_clean_first=False, second="source"),
    "consistent": Mode(is_clean_first=True, second="target"),
    "inpo": Mode(is_clean_first=False, second=None, eta=INPO_ETA),
}
"""By the name that `recipes.Inversion` gives them; see the functions of these names."""


# --- grids -----------------------------------------------------------------------------------------------------------


def levels(length: int, steps: int, mode: str) -> torch.Tensor:
    """Return the levels at which latents can end on a schedule of `length` timesteps, ascending, int64.

    consistent: j*D + 1 for j = 1..n-1. released and inpo: the same after a first level 1.

    Raises:
        ValueError: the grid does not fit into the schedule.
    """
    return torch.tensor([step.level for step in _grid(length, steps, MODES[mode])])


def drawable(length: int, steps: int, mode: str) -> torch.Tensor:
    """Return the timesteps that training draws t0 from: the levels (consistent), or the whole schedule (released, inpo)."""
    return levels(length, steps, mode) if MODES[mode].is_clean_first else torch.arange(length)


def level_of(t0: torch.Tensor, length: int, steps: int, mode: str) -> torch.Tensor:
    """Return the levels at which the latents for these timesteps end: t0 itself (consistent), or the next one from it on.

    Above the highest level that one: such a latent has less noise than its label says. t0: on the CPU, of any shape.

    Raises:
        ValueError: a t0 is none of the mode's timesteps.
    """
    grid, allowed = levels(length, steps, mode), drawable(length, steps, mode)
    if (odd := t0[~torch.isin(t0, allowed)]).numel():
        raise ValueError(
            f"inversion, mode {mode}, {steps} steps: t0: expected "
            + (f"one of the levels {grid.tolist()}" if len(allowed) == len(grid) else f"timesteps in [0, {length})")
            + f", found {odd.unique().tolist()}"
        )
    return grid[torch.searchsorted(grid, t0.to(grid).contiguous()).clamp(max=len(grid) - 1)]


def forwards(mode: str, steps: int, t0: int, length: int = 1000) -> int:
    """Return how many forwards of the model one latent costs on its way to t0."""
    end = level_of(torch.tensor(t0), length, steps, mode)
    return MODES[mode].forwards * int((levels(length, steps, mode) <= end).sum())


@dataclass(frozen=True)
class _Step:
    """One step of a grid: to `level`, from the noise of timestep `start` (None: from the clean latent)."""

    level: int
    start: int | None
    first: int
    second: int | None


def _grid(length: int, steps: int, mode: Mode) -> list[_Step]:
    if not 2 <= steps <= length // 2:
        raise ValueError(f"inversion: steps: expected 2 to {length // 2} for {length} timesteps, found {steps}")
    stride = length // steps
    grid = []
    for level in range(stride + 1 if mode.is_clean_first else 1, (steps - 1) * stride + 2, stride):
        label = level - stride
        is_clean = mode.is_clean_first and label == 1
        second = None if mode.second is None else {"source": label, "target": level}[mode.second]
        grid.append(_Step(level, None if is_clean else max(label, 0), label, second))
    return grid


# --- steps -----------------------------------------------------------------------------------------------------------


def ddim_inverse_step(x: torch.Tensor, e: torch.Tensor, a: torch.Tensor, a_next: torch.Tensor) -> torch.Tensor:
    """Return x at noise level a_next, given x at level a and its noise e; with a_next > a it is DDIM's sampling step."""
    return a_next.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - a_next).sqrt() * e


def target(
    x: torch.Tensor,
    x0: torch.Tensor,
    t0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    predicts_velocity: bool,
) -> torch.Tensor:
    """Return what the model should predict at (x, t0) to lead back to x0, shaped as x.

    e = (x - sqrt(abar) x0) / sqrt(1-abar), so that x = sqrt(abar) x0 + sqrt(1-abar) e; or v = sqrt(abar) e - sqrt(1-abar) x0.
    x, x0: [2, B, C, H, W]; t0: [B]. In float32 at least. A rounding of x is magnified by 1 / sqrt(1-abar_t0).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    abar = alphas_cumprod.to(x.device, wide)[t0].view(-1, 1, 1, 1)
    x, x0 = x.to(wide), x0.to(wide)
    e = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
    return abar.sqrt() * e - (1 - abar).sqrt() * x0 if predicts_velocity else e


@torch.no_grad()
def walk(
    x0: torch.Tensor,
    ends: Sequence[int],
    alphas_cumprod: torch.Tensor,
    steps: int,
    predict: Predict,
    *,
    mode: Mode,
    predicts_velocity: bool,
    noise: Noise | None = None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (level, rows [M], x [M, C, H, W]) level by level: the latents that have reached it; each row goes to its end.

    x0: clean scaled latents [N, C, H, W]. ends: the level at which each stops, N of them. noise: see Mode.eta.
    """
    wide = torch.promote_types(x0.dtype, torch.float32)
    abar = alphas_cumprod.to(x0.device, wide)
    clean = torch.ones((), device=x0.device, dtype=wide)

    def noise_in(latents: torch.Tensor, label: int, rows: torch.Tensor) -> torch.Tensor:
        out = predict(latents, torch.full_like(rows, label), rows).to(wide)
        a = abar[max(label, 0)]
        return a.sqrt() * out + (1 - a).sqrt() * latents if predicts_velocity else out

    whole = x0.to(wide).clone()
    for step in _grid(len(alphas_cumprod), steps, mode):
        rows = torch.tensor([i for i, end in enumerate(ends) if end >= step.level], device=x0.device)
        if not len(rows):
            return
        a, a_next = clean if step.start is None else abar[step.start], abar[step.level]
        x = whole[rows]
        e = noise_in(x, step.first, rows)
        if step.second is not None:
            e = (e + noise_in(ddim_inverse_step(x, e, a, a_next), step.second, rows)) / 2
        x = ddim_inverse_step(x, e, a, a_next)
        if mode.eta:
            if noise is None:
                raise ValueError("inversion: this mode adds noise after each step: give `noise`")
            variance = (1 - a) / (1 - a_next) * (1 - a_next / a)
            x = x + mode.eta * variance.sqrt() * noise(rows, step.level).to(x)
        whole[rows] = x
        yield step.level, rows, x


# --- pairs -----------------------------------------------------------------------------------------------------------


def invert(
    x0: torch.Tensor,
    t0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    steps: int,
    predict: Predict,
    *,
    mode: str,
    predicts_velocity: bool,
    second: Label | None = None,
    noise: Noise | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x_t0, target) of pairs with a timestep each, both [2, B, C, H, W], by a mode of MODES.

    x0: clean scaled latents [2, B, C, H, W], winners first. t0: [B]. Row side*B + b of `predict` is side `side` of pair b.
    second: another label for e2 than the mode's.

    Raises:
        ValueError: a t0 or the steps do not fit the mode; see level_of.
    """
    ends = level_of(t0.cpu(), len(alphas_cumprod), steps, mode).tolist()
    rule = MODES[mode] if second is None else replace(MODES[mode], second=second)
    x0 = x0.detach().to(torch.promote_types(x0.dtype, torch.float32))
    flat = x0.flatten(0, 1)
    x = flat.clone()
    for _, rows, reached in walk(
        flat, ends * 2, alphas_cumprod, steps, predict, mode=rule, predicts_velocity=predicts_velocity, noise=noise
    ):
        x[rows] = reached
    x = x.view_as(x0)
    return x, target(x, x0, t0, alphas_cumprod, predicts_velocity=predicts_velocity)


def released(
    x0: torch.Tensor,
    t0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    steps: int,
    predict: Predict,
    *,
    predicts_velocity: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `invert` as SmPO-Diffusion's program does it (arXiv 2506.02698).

    Every label tau of 1 - D, 1, D + 1, ..., (n-2)*D + 1 below t0 takes a step from abar_tau to abar_(tau+D), both predictions
    at label tau. The first goes to the model as the negative number that it is, and abar_0 stands for its noise. The latent
    ends at the level above t0, t0 labels it: on average 99 timesteps of difference with n = 5, 49 with n = 10.
    """
    return invert(x0, t0, alphas_cumprod, steps, predict, mode="released", predicts_velocity=predicts_velocity)


def consistent(
    x0: torch.Tensor,
    t0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    steps: int,
    predict: Predict,
    *,
    predicts_velocity: bool,
    second: Label = "target",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `invert` with latents whose noise is that of their label, t0 being a level.

    The first step starts from the clean latent, a = 1 exactly, e1 at label 1, and ends at level D + 1. second: label of e2;
    with the level that the step goes to (as in ReNoise) sampling back returns nearer to x0 than with the one it leaves.
    """
    return invert(
        x0, t0, alphas_cumprod, steps, predict, mode="consistent", predicts_velocity=predicts_velocity, second=second
    )


def inpo(
    x0: torch.Tensor,
    t0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    steps: int,
    predict: Predict,
    noise: Noise,
    *,
    predicts_velocity: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `invert` as DDIM-InPO does it (arXiv 2503.18454; n = 10).

    Grid and labels of `released`, one prediction per step, and x + 0.1 * sqrt(variance) * noise after every step, with the
    variance of DDIM's eta = 1 between the step's two levels (a, then a'): (1-a)/(1-a') * (1 - a'/a). That grid, and abar_0 in
    the pseudo step's variance too, is our reading of the program, which leaves both to its library. Winner and loser have
    noise of their own; the target counts the noise in.
    """
    return invert(x0, t0, alphas_cumprod, steps, predict, mode="inpo", predicts_velocity=predicts_velocity, noise=noise)
