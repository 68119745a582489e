"""From a recipe's objective (plain values) to the functions of `trainers.losses` that the loop calls.

Belongs here: binding numbers to functions. Does not belong here: mathematics.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from trainers import losses
from trainers.losses import PairBatch, Statistics
from trainers.recipes import Objective


class Bound:
    """An objective with its numbers: see the contract in `trainers.losses.batch`."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._loss = self._function("")
        self._sums, self._state = self._function("_sums", None), self._function("_state", None)
        self._update, self._details = self._function("_update", None), self._function("_details", None)
        self._takes_statistics = self._sums is not None or self._state is not None

    def _function(self, suffix: str, *default: None) -> Callable[..., Any] | None:
        function = getattr(losses, self.objective.name + suffix, *default)
        if function is None:
            return None
        known = inspect.signature(function).parameters
        return partial(function, **{k: v for k, v in self.objective.numbers().items() if k in known})

    def needs(self, what: str) -> bool:
        """Return whether the objective needs that part of a batch."""
        return what in self.objective.needs

    def loss(self, batch: PairBatch, statistics: Statistics) -> torch.Tensor:
        """Return one number per pair, [B]."""
        assert self._loss is not None
        return self._loss(batch, statistics) if self._takes_statistics else self._loss(batch)

    @torch.no_grad()
    def sums(self, batch: PairBatch, state: Statistics) -> dict[str, torch.Tensor]:
        """Return the batch's sums, to be added up over processes; empty where the objective has none."""
        return {} if self._sums is None else dict(self._sums(batch, state))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the running statistics at the start of a run."""
        return {} if self._state is None else dict(self._state())

    @torch.no_grad()
    def update(self, state: Statistics, sums: Statistics) -> dict[str, torch.Tensor]:
        """Return the running statistics after an optimiser step."""
        return dict(state) if self._update is None else dict(self._update(state, sums))

    @torch.no_grad()
    def details(self, batch: PairBatch, statistics: Statistics) -> dict[str, torch.Tensor]:
        """Return what the objective records per pair; empty where it records nothing."""
        return {} if self._details is None else dict(self._details(batch, statistics))
