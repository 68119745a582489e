"""What every objective sees: targets and predictions of a batch of pairs, winners first, and the errors they make.

Shapes: [2, B, C, H, W], index 0 the winner, index 1 the loser. Belongs here: quantities that objectives share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class PairBatch:
    """A batch of pairs at one noise level each (a pair shares timestep and noise).

    target: epsilon, or v for v-prediction models. policy, reference: the two models' predictions of it. The errors are
    computed in float32 at least, whatever the precision of the predictions.
    """

    target: torch.Tensor
    policy: torch.Tensor
    reference: torch.Tensor

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("target", "policy", "reference")}
        if len(set(shapes.values())) != 1 or self.target.ndim != 5 or self.target.shape[0] != 2:
            raise ValueError(f"PairBatch: expected three tensors of one shape [2, B, C, H, W], found {shapes}")

    def _error(self, prediction: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(self.target.dtype, torch.float32)
        return (self.target.to(wide) - prediction.to(wide)).pow(2).mean((2, 3, 4))

    @cached_property
    def policy_error(self) -> torch.Tensor:
        """L of the policy, [2, B]: mean over C, H, W of (target - prediction)^2."""
        return self._error(self.policy)

    @cached_property
    def reference_error(self) -> torch.Tensor:
        """L of the reference, [2, B]; no gradient flows into it."""
        return self._error(self.reference.detach())

    @cached_property
    def margin(self) -> torch.Tensor:
        """S = (L_ref^w - L_ref^l) - (L_policy^w - L_policy^l), [B]; > 0: the policy agrees with the label more."""
        reference, policy = self.reference_error, self.policy_error
        return (reference[0] - reference[1]) - (policy[0] - policy[1])
