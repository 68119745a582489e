"""Partitions: one per shard of any source; tables that are cut by shard carry them, everything else is whole."""

from __future__ import annotations

import dagster as dg

SHARDS = dg.DynamicPartitionsDefinition(name="shards")
EVERY_SHARD = dg.BackfillPolicy.single_run()
"""A range of shards is one run: the work inside skips what is done, shard by shard."""
