"""What assets are given: the configuration, with what one run says otherwise, and the store it names."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import Literal

import dagster as dg
from pydantic import Field

from assets import gpus
from pipelines import config as configuration
from pipelines import ingest
from pipelines.config import Config
from pipelines.scoring import devices
from pipelines.sources import Shard
from pipelines.tables import Store


class TiePolicy(enum.Enum):
    """The tie policies, and the configuration's own."""

    # The launchpad shows and takes the names.
    configured = "configured"
    drop = "drop"
    human = "human"
    tie_breaker = "tie_breaker"
    keep_order = "keep_order"


class Polyphony(dg.ConfigurableResource):
    """The project's configuration, and what this run says otherwise: all steps of a run agree on it.

    Tables that a run makes under other options than the configuration's are refused by later runs that read them under
    the configuration's own, which say what to materialize again.
    """

    config_file: str = Field(
        default="", description="TOML file; empty: $POLYPHONY_CONFIG, else the embedded small world."
    )
    tie_policy: TiePolicy = Field(
        default=TiePolicy.configured,
        description="What decides a pair on which the scorers' votes are even, instead of labels.tie_policy.",
    )
    training_steps: int = Field(
        default=0, ge=0, description="Optimiser steps of every recipe, instead of training.steps; 0: as configured."
    )
    training_batch_size: int = Field(
        default=0, ge=0, description="Pairs per step, instead of training.batch_size; 0: as configured."
    )

    @property
    def config(self) -> Config:
        """Return the configuration of this run.

        Raises:
            ConfigError: the file, or what the run says otherwise, is wrong.
        """
        config = configuration.load(self.config_file or None)
        labels = {} if self.tie_policy is TiePolicy.configured else {"tie_policy": self.tie_policy.value}
        chosen = {"steps": self.training_steps, "batch_size": self.training_batch_size}
        training = {name: value for name, value in chosen.items() if value}
        return configuration.changed(config, labels=labels, training=training)

    @contextlib.contextmanager
    def on_device(self, part: Literal["scoring", "training"], progress: Callable[[str], None]) -> Iterator[Config]:
        """Take a device for a step that computes in this process; yield the configuration that names it."""
        config = self.config
        # A machine may have GPUs that this torch cannot use.
        device = devices.resolve_device(getattr(config, part).device)
        with gpus.lease(device, progress=progress) as lease:
            yield configuration.changed(config, **{part: {"device": lease.device}})

    @property
    def store(self) -> Store:
        """Return the store."""
        return Store(self.config.store_location)

    def shards(self) -> list[Shard]:
        """Return the shards of all sources as they are now on disk."""
        return ingest.list_shards(self.config)

    def shard_keys(self) -> list[str]:
        """Return their keys."""
        return [s.key for s in self.shards()]
