"""The torch steps on a store: caches, training, samples, evaluation. What Dagster and the command line both call.

Belongs here: the order of things and their arguments. Does not belong here: how any of them works.
"""

from __future__ import annotations

from collections.abc import Callable

from pipelines import catalogue
from pipelines.config import Config
from pipelines.scoring import devices
from pipelines.tables import Built, Store
from trainers import caches, evaluate, loop, sampling
from trainers.recipes import recipe as recipe_of

Progress = Callable[[str], None]


class Training:
    """A store, a configuration and the backbone, loaded when first needed."""

    def __init__(self, store: Store, config: Config, progress: Progress = print) -> None:
        self.store, self.config, self.progress = store, config, progress
        self.device = devices.resolve_device(config.training.device)
        self.backbone = caches.Backbone(config.backbone, self.device)

    def shard_keys(self) -> list[str]:
        """Return the shards of the catalogue: training needs the tables alone, not the raw files."""
        return catalogue.shard_keys(self.store)

    def latents(self, shard_key: str) -> Built:
        """Cache one shard's latents."""
        return caches.cache_latents(self.store, shard_key, self.backbone, self.progress)

    def prompt_embeddings(self) -> Built:
        """Cache all prompts' embeddings."""
        return caches.cache_prompts(self.store, self.backbone, self.progress)

    def run(self, recipe: str) -> loop.Run:
        """Return the run of a recipe on the store as it is."""
        return loop.Run(self.store, self.config, recipe_of(recipe), self.backbone)

    def train(self, recipe: str) -> loop.Trained:
        """Train a recipe, or resume it, or find it unchanged."""
        return loop.train(self.run(recipe), self.progress)

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
        return evaluate.leaderboard(self.store, self.config, list(self.config.training.recipes))
