"""The EMA annotators of Adaptive-DPO (arXiv 2503.16921): two averages of the policy that judge the same noisy latents.

Belongs here: how the averages follow the policy. Does not belong here: what their margins mean (`losses.adaptive_dpo`).
"""

from __future__ import annotations

import torch

from trainers.references import Shadow

DECAYS = (0.9999, 0.5)
"""Of the released program: a slow and a fast one."""


def decay_after(updates: int, limit: float) -> float:
    """Return the decay of the update that follows `updates` earlier ones: min(limit, (1 + n) / (10 + n)), 0 at n = 0.

    This is the schedule of diffusers' EMAModel, which the released program uses: its first update copies.
    """
    return min(limit, (1 + updates) / (10 + updates)) if updates else 0.0


class EmaAnnotators:
    """Averages of the policy's trained weights, each callable as a UNet."""

    def __init__(self, policy: torch.nn.Module, decays: tuple[float, ...] = DECAYS) -> None:
        self._decays = decays
        self.models = [Shadow(policy) for _ in decays]

    def after_step(self, steps_done: int, policy: torch.nn.Module) -> None:
        """Update every average after an optimiser step."""
        for model, limit in zip(self.models, self._decays, strict=True):
            model.follow(policy, decay_after(steps_done - 1, limit))

    def state_dict(self) -> list[dict[str, torch.Tensor]]:
        """Return what a checkpoint needs."""
        return [m.state_dict() for m in self.models]

    def load_state_dict(self, states: list[dict[str, torch.Tensor]]) -> None:
        """Restore what `state_dict` gave."""
        for model, state in zip(self.models, states, strict=True):
            model.load_state_dict(state)
