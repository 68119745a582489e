"""Other sets of the policy's weights: the reference model, and the EMA annotators of Adaptive-DPO.

Where all weights are trained, such a set is a second model; where adapters are, it is a second set of adapter weights that
is put in for the time of a forward, so that it costs memory for the adapters only. None of them has gradients.
Belongs here: how these weights follow the policy. Does not belong here: what is computed with their predictions.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from trainers.backbones.adapters import adapter_layers, adapters_off, cast_frozen, trained_parameters
from trainers.backbones.speed import Parts, compile_parts
from trainers.recipes import ReferencePolicy


class Shadow:
    """A second set of a model's trained weights, callable as the model; starts as the model is."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
        """Copy the trained weights.

        Args:
            dtype: where all weights are trained, that of the copy's matrix products (see `cast_frozen`); None: as they are.
        """
        trained = trained_parameters(model)
        self._policy = model
        self._module: torch.nn.Module | None = None
        self.tensors: dict[str, torch.Tensor]
        if len(trained) == sum(1 for _ in model.parameters()):
            self._module = copy.deepcopy(model).requires_grad_(False).eval()
            if dtype is not None:
                cast_frozen(self._module, dtype)
            self.tensors = dict(self._module.named_parameters())
        else:
            self.tensors = {name: p.detach().clone() for name, p in trained.items()}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Return what the model returns, with these weights."""
        if self._module is not None:
            return self._module(*arguments, **options)
        return torch.func.functional_call(self._policy, self.tensors, arguments, options)

    def compile(self, parts: Parts, backend: str = "inductor") -> None:
        """Compile parts of a second model; where adapters are put into the policy it is the policy's own that count."""
        if self._module is not None:
            compile_parts(self._module, parts, backend)

    @torch.no_grad()
    def follow(self, model: torch.nn.Module, decay: float = 0.0) -> None:
        """Set every weight to decay * weight + (1 - decay) * the model's."""
        trained = trained_parameters(model)
        mine, theirs = list(self.tensors.values()), [trained[name].detach() for name in self.tensors]
        if decay:
            torch._foreach_lerp_(mine, theirs, 1 - decay)
        else:
            torch._foreach_copy_(mine, theirs)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights."""
        return {name: t.detach() for name, t in self.tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` gave."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


class Reference:
    """The reference model: callable as a UNet; starts as the policy and follows its recipe.

    Frozen under adapters it is the policy with its adapters off, and costs no memory at all.
    """

    def __init__(self, policy: torch.nn.Module, rule: ReferencePolicy, dtype: torch.dtype | None = None) -> None:
        """Make the reference from the policy at the start of the run.

        Args:
            dtype: of the matrix products of a copy that never moves by fractions (frozen, hard copy).
        """
        self.rule, self._policy = rule, policy
        has_adapters = len(trained_parameters(policy)) < sum(1 for _ in policy.parameters())
        self._shadow: Shadow | None = None
        self._layers = adapter_layers(policy)
        if rule.kind != "frozen" or not has_adapters:
            # An average moves by less than half precision can hold.
            self._shadow = Shadow(policy, None if rule.kind == "ema" else dtype)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Return what the UNet returns, with the reference's weights."""
        if self._shadow is not None:
            return self._shadow(*arguments, **options)
        with adapters_off(self._layers):
            return self._policy(*arguments, **options)

    def compile(self, parts: Parts, backend: str = "inductor") -> None:
        """Compile parts of the model, where it is one of its own."""
        if self._shadow is not None:
            self._shadow.compile(parts, backend)

    def after_step(self, steps_done: int, policy: torch.nn.Module) -> bool:
        """Follow the rule after an optimiser step; return whether the reference changed."""
        if self.rule.kind == "frozen" or steps_done % self.rule.every:
            return False
        assert self._shadow is not None
        self._shadow.follow(policy, self.rule.decay)
        return True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint needs; empty where the reference never changes."""
        return {} if self.rule.kind == "frozen" or self._shadow is None else self._shadow.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` gave."""
        if state:
            assert self._shadow is not None
            self._shadow.load_state_dict(state)
