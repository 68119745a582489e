"""Partitions: one per shard of any source; tables that are cut by shard carry them, everything else is whole."""

from __future__ import annotations

import warnings

import dagster as dg

# Backfill policies are marked beta; that a range of shards is one run is what this project builds on.
warnings.filterwarnings("ignore", category=dg.BetaWarning, message=".*backfill_policy.*")

SHARDS = dg.DynamicPartitionsDefinition(name="shards")
EVERY_SHARD = dg.BackfillPolicy.single_run()
"""A range of shards is one run: the work inside skips what is done, shard by shard."""
