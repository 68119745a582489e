"""Reference models: frozen, or a hard copy of the policy every K optimiser steps (BalancedDPO)."""

from __future__ import annotations

import copy

import torch

from trainers.recipes import ReferencePolicy


class Reference:
    """A model without gradients that starts as the policy and follows its recipe."""

    def __init__(self, policy_model: torch.nn.Module, rule: ReferencePolicy) -> None:
        self.model = copy.deepcopy(policy_model).requires_grad_(False).eval()
        self.rule = rule

    def after_step(self, steps_done: int, policy_model: torch.nn.Module) -> bool:
        """Follow the rule after an optimiser step; return whether the reference changed."""
        if self.rule.kind != "hard_copy" or steps_done % self.rule.every:
            return False
        self.model.load_state_dict(policy_model.state_dict())
        return True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint needs; empty where the reference never changes."""
        return {} if self.rule.kind == "frozen" else self.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` gave."""
        if state:
            self.model.load_state_dict(state)
