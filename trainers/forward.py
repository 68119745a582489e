"""From a batch of pairs to the predictions that an objective sees: noising or inversion, policy, reference, annotators.

Belongs here: which model predicts what of a batch. Does not belong here: losses, optimisation, where batches come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from trainers import inversion, losses, noising, randomness
from trainers.data import Batch
from trainers.ema_annotators import EmaAnnotators
from trainers.objectives import Bound
from trainers.recipes import Inversion, Recipe
from trainers.references import Reference

Unet = Callable[..., Any]


class PairForward:
    """The models of a run; called with a batch it gives the objective's input, with gradient to the policy only."""

    def __init__(
        self,
        backbone: Any,
        recipe: Recipe,
        bound: Bound,
        policy: Unet,
        reference: Reference | Unet | None,
        annotators: EmaAnnotators | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Hold the models.

        Args:
            backbone: see `trainers.backbones`.
            autocast: the context in which models run; `policy` may have its own besides.
        """
        self.backbone, self.recipe, self.bound = backbone, recipe, bound
        self.policy, self.reference, self.annotators = policy, reference, annotators
        self._autocast = autocast

    def __call__(self, batch: Batch) -> losses.PairBatch:
        """Return targets and predictions of a batch that lies on the backbone's device."""
        noisy, target = self.noised(batch)
        flat, steps, conditioning = noisy.flatten(0, 1), batch.timesteps.repeat(2), batch.conditioning.twice()

        def predicted(unet: Unet) -> torch.Tensor:
            return self.backbone.predict(unet, flat, steps, conditioning).view_as(noisy)

        reference = errors = None
        with torch.no_grad(), self._autocast():
            if self.bound.needs("reference"):
                assert self.reference is not None
                reference = predicted(self.reference)
            if self.bound.needs("annotators"):
                assert self.annotators is not None
                wide = torch.promote_types(target.dtype, torch.float32)
                errors = torch.stack(
                    [(target.to(wide) - predicted(m).to(wide)).pow(2).mean((2, 3, 4)) for m in self.annotators.models]
                )
        with self._autocast():
            policy = predicted(self.policy)
        return losses.PairBatch(
            target.contiguous(),
            policy,
            reference,
            probability=batch.probability,
            minority=batch.minority,
            group=batch.group,
            annotator_errors=errors,
        )

    def noised(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x at the pairs' timesteps, target of the prediction), [2, B, C, H, W] each."""
        backbone, rule = self.backbone, self.recipe.noising
        if isinstance(rule, Inversion):
            return self._inverted(batch, rule)
        assert batch.noise is not None
        return noising.noised(
            batch.latents,
            batch.noise,
            batch.timesteps,
            backbone.alphas_cumprod,
            predicts_velocity=backbone.predicts_velocity,
        )

    @torch.no_grad()
    def _inverted(self, batch: Batch, rule: Inversion) -> tuple[torch.Tensor, torch.Tensor]:
        backbone = self.backbone
        if batch.inverted is not None:
            target = inversion.target(
                batch.inverted,
                batch.latents,
                batch.timesteps,
                backbone.alphas_cumprod,
                predicts_velocity=backbone.predicts_velocity,
            )
            return batch.inverted, target
        model = self.reference if rule.under == "reference" else self.policy
        conditioning = batch.conditioning.twice()

        def predict(x: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            with self._autocast():
                return backbone.predict(model, x, labels, conditioning[rows]).float()

        def noise(rows: torch.Tensor, level: int) -> torch.Tensor:
            count = len(batch.keys)
            named = [(*batch.keys[r % count], "inversion", r // count, level) for r in rows.tolist()]
            return randomness.normal(tuple(batch.latents.shape[2:]), named)

        return inversion.invert(
            batch.latents,
            batch.timesteps,
            backbone.alphas_cumprod,
            rule.steps,
            predict,
            mode=rule.mode,
            predicts_velocity=backbone.predicts_velocity,
            noise=noise,
        )
