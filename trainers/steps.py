"""The torch steps on a store: caches, training, samples, evaluation. What Dagster and the command line both call.

Belongs here: the order of things and their arguments. Does not belong here: how any of them works.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

from pipelines import catalogue
from pipelines.config import Config, ConfigError
from pipelines.scoring import devices
from pipelines.tables import Built, Manifest, Store
from trainers import caches, evaluate, loop, sampling
from trainers.recipes import Recipe, recipes_in_order
from trainers.recipes import recipe as recipe_of
from trainers.recorder import Report

Progress = Callable[[str], None]


def process_device(device: str) -> str:
    """Return the device of this process: of several on one machine each has the GPU of its local rank."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


class Training:
    """A store, a configuration and the backbone, loaded when first needed."""

    def __init__(self, store: Store, config: Config, progress: Progress = print) -> None:
        self.store, self.config, self.progress = store, config, progress
        self.device = process_device(devices.resolve_device(config.training.device))
        self.backbone = caches.Backbone(config.backbone, self.device)

    def shard_keys(self) -> list[str]:
        """Return the shards of the catalogue: training needs the tables alone, not the raw files."""
        return catalogue.shard_keys(self.store)

    def latents(self, shard_key: str, recipes: Iterable[str] = ()) -> Built:
        """Cache one shard's latents, mirrored ones too if a configured recipe, or one of `recipes`, mirrors pairs."""
        return caches.cache_latents(self.store, shard_key, self.backbone, self.progress, flips=self.mirrors(recipes))

    def mirrors(self, recipes: Iterable[str] = ()) -> bool:
        """Return whether a configured recipe, or one of `recipes`, mirrors pairs."""
        return any(r.flip for r in recipes_in_order([*self.config.training.recipes, *recipes]))

    def prompt_embeddings(self) -> Built:
        """Cache all prompts' embeddings."""
        return caches.cache_prompts(self.store, self.backbone, self.progress)

    def recipes(self) -> list[Recipe]:
        """Return the configured recipes and those that they start from, in the order of training."""
        return recipes_in_order(self.config.training.recipes)

    def run(self, recipe: str, *, is_plan: bool = False) -> loop.Run:
        """Return the run of a recipe on the store as it is.

        Args:
            is_plan: the recipe that it starts from need not be trained; the run cannot be trained then.

        Raises:
            NotTrained: the recipe that it starts from is not trained.
        """
        rule = recipe_of(recipe)
        start = None
        if rule.start:
            start = self.run(rule.start, is_plan=True).finished() if is_plan else self._trained(rule.start)
        return loop.Run(self.store, self.config, rule, self.backbone, start)

    def train(self, recipe: str, report: Report = lambda row: None) -> loop.Trained:
        """Train a recipe, or resume it, or find it unchanged."""
        return loop.train(self.run(recipe), self.progress, report)

    def trajectories(self, recipe: str) -> list[Manifest]:
        """Make the trajectories that a recipe's run reads, or resume that, or find them; return all that lie there.

        A run that is finished needs none.
        """
        run = self.run(recipe)
        if run.trajectories is None:
            raise ConfigError(f"recipe {recipe!r} reads no cached trajectories")
        if run.finished() is None:
            with contextlib.closing(loop.Trainer(run, self.progress)) as trainer:
                trainer.make_trajectories()
        return self.store.manifests("trajectories", run.trajectories)

    def _trained(self, recipe: str) -> loop.Trained:
        done = self.run(recipe).finished()
        if done is None:
            raise loop.NotTrained(
                f"recipe {recipe!r} is not trained on the present preferences; run `python -m trainers.train train "
                f"--recipe {recipe}` or materialize trained/{recipe}"
            )
        return done

    def samples(self, model: str) -> Built:
        """Sample the base or a trained recipe."""
        trained = None if model == sampling.BASE else self._trained(model)
        return sampling.sample(
            self.store,
            self.config,
            self.backbone,
            model,
            None if trained is None else trained.model,
            None if trained is None else trained.metrics.manifest,
            self.progress,
        )

    def evaluations(self, model: str) -> Built:
        """Score a model's samples."""
        return evaluate.evaluate(self.store, self.config, model, self.device, self.progress)

    def held_out(self, recipe: str) -> Built:
        """Measure a trained recipe's implicit accuracy on held-out pairs."""
        trained = self._trained(recipe)
        return evaluate.held_out(
            self.store, self.config, self.backbone, recipe, trained.model, trained.metrics.manifest, self.progress
        )

    def leaderboard(self) -> Built:
        """Compare all configured recipes with the base."""
        return evaluate.leaderboard(self.store, self.config, [r.name for r in self.recipes()])
