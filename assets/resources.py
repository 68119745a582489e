"""What assets are given: the configuration and the store it names."""

from __future__ import annotations

import dagster as dg

from pipelines import config as configuration
from pipelines import ingest
from pipelines.config import Config
from pipelines.sources import Shard
from pipelines.tables import Store


class Polyphony(dg.ConfigurableResource):
    """The project's configuration file; empty: $POLYPHONY_CONFIG, else the embedded small world."""

    config_file: str = ""

    @property
    def config(self) -> Config:
        """Return the configuration."""
        return configuration.load(self.config_file or None)

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
