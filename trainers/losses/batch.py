"""What every objective sees: targets and predictions of a batch of pairs, winners first, and the errors they make.

Shapes: [2, B, C, H, W], index 0 the winner, index 1 the loser. Belongs here: quantities that objectives share, and the
contract between objectives and the loop.

The contract. An objective is a pure function `loss(batch[, statistics], *, <numbers>) -> Tensor [B]`, one number per pair,
whose mean is minimised. What depends on more than one pair is a statistic, given to it, so that for fixed statistics pairs
do not mix. Where an objective has statistics, its file also has

    <name>_sums(batch, statistics, *, <numbers>) -> Statistics   sums over the batch's pairs, without gradient; the loop adds
                                                    them up over all processes and hands them to the loss of the same
                                                    micro-batch
    <name>_state(*, <numbers>) -> Statistics        a running statistic at the start of a run; kept in checkpoints
    <name>_update(state, sums, *, <numbers>) -> Statistics       the state after an optimiser step, from the sums over all
                                                    micro-batches and processes of that step
    <name>_details(batch, statistics, *, <numbers>) -> dict of Tensor [B]     what is worth recording per pair

`statistics` holds the state's and the sums' entries together, under different names; sums are given the state alone. Each
function takes those of the objective's numbers that it reads. At optimiser step k the loss sees the state after step k - 1.
No transfers between devices, no collectives inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

Statistics = Mapping[str, torch.Tensor]
"""Named statistics of more than one pair; float32 or wider."""


@dataclass(frozen=True)
class PairBatch:
    """A batch of pairs at one noise level each (a pair shares timestep and, but for inverted latents, noise).

    target: epsilon, or v for v-prediction models. policy, reference: the two models' predictions of it; reference is None
    for objectives without one. The errors are computed in float32 at least, whatever the precision of the predictions.
    probability: of the winner, [B], 0.5 to 1. minority: the pair's minority value, [B]. group: index of the annotators'
    group, [B], int64. annotator_errors: L of M annotators beside the policy, [M, 2, B].
    """

    target: torch.Tensor
    policy: torch.Tensor
    reference: torch.Tensor | None = None
    probability: torch.Tensor | None = None
    minority: torch.Tensor | None = None
    group: torch.Tensor | None = None
    annotator_errors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        tensors = {"target": self.target, "policy": self.policy, "reference": self.reference}
        shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
        if len(set(shapes.values())) != 1 or self.target.ndim != 5 or self.target.shape[0] != 2:
            raise ValueError(f"PairBatch: expected tensors of one shape [2, B, C, H, W], found {shapes}")
        pairs = self.target.shape[1]
        for name in ("probability", "minority", "group"):
            column = getattr(self, name)
            if column is not None and tuple(column.shape) != (pairs,):
                raise ValueError(f"PairBatch: {name}: expected shape [{pairs}], found {tuple(column.shape)}")
        if self.annotator_errors is not None and tuple(self.annotator_errors.shape[1:]) != (2, pairs):
            raise ValueError(
                f"PairBatch: annotator_errors: expected shape [M, 2, {pairs}], found {tuple(self.annotator_errors.shape)}"
            )

    def need(self, name: str) -> torch.Tensor:
        """Return an optional part; no gradient flows into it.

        Raises:
            ValueError: the batch lacks it.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"PairBatch: the objective needs {name}, the batch has none")
        return value.detach()

    def residual(self, prediction: torch.Tensor) -> torch.Tensor:
        """Return target - prediction, [2, B, C, H, W]."""
        wide = torch.promote_types(self.target.dtype, torch.float32)
        return self.target.to(wide) - prediction.to(wide)

    def error(self, prediction: torch.Tensor) -> torch.Tensor:
        """Return L of a prediction, [2, B]: mean over C, H, W of (target - prediction)^2."""
        return self.residual(prediction).pow(2).mean((2, 3, 4))

    def margin_of(self, error: torch.Tensor) -> torch.Tensor:
        """Return s of models that make these errors, [..., 2, B] -> [..., B]."""
        reference = self.reference_error
        return (reference[0] - reference[1]) - (error[..., 0, :] - error[..., 1, :])

    @cached_property
    def policy_error(self) -> torch.Tensor:
        """L of the policy, [2, B]."""
        # Whoever asks first may do so without gradients (sums, details); the loss asks later and needs them.
        with torch.enable_grad():
            return self.error(self.policy)

    @cached_property
    def reference_error(self) -> torch.Tensor:
        """L of the reference, [2, B]; no gradient flows into it."""
        return self.error(self.need("reference"))

    @cached_property
    def margin(self) -> torch.Tensor:
        """S = (L_ref^w - L_ref^l) - (L_policy^w - L_policy^l), [B]; > 0: the policy agrees with the label more."""
        with torch.enable_grad():
            return self.margin_of(self.policy_error)
