"""The launchpad's forms: what people vary from run to run.

What a table is made from is said by the configuration alone, or for one run by the resource `polyphony` (`resources`), so
that all steps of a run agree on it.
Belongs here: options that change how much is done, not what it means. Does not belong here: the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg
from pydantic import Field

from pipelines.config import Config


class ShardOptions(dg.Config):
    """How many of the selected shards one run does."""

    limit: int = Field(
        default=0,
        ge=0,
        description="At most so many shards that are not done yet; 0: all that are selected. A backfill counts those that "
        "are left as failed: they are not materialized.",
    )
    dry_run: bool = Field(
        default=False,
        description="Only say, in the log, what is to be done: nothing is written. A backfill counts all shards as failed, "
        "for nothing is materialized.",
    )


class ScoringOptions(ShardOptions):
    """How many shards one run scores, and how."""

    batch_size: int = Field(
        default=0, ge=0, description="Pictures per forward, instead of each scorer's own; 0: as configured."
    )
    workers: int = Field(
        default=-1,
        ge=-1,
        description="Processes that score, instead of scoring.workers; 0: one per GPU; -1: as configured. "
        "It leases as many GPUs, and waits for them; the step's pool is that of the configuration.",
    )

    def applied(self, config: Config) -> Config:
        """Return the configuration with the form's numbers; scores and their revision do not depend on them."""
        scorers = config.scorers
        if self.batch_size:
            scorers = tuple(s.model_copy(update={"batch_size": self.batch_size}) for s in scorers)
        scoring = config.scoring if self.workers < 0 else config.scoring.model_copy(update={"workers": self.workers})
        return config.model_copy(update={"scorers": scorers, "scoring": scoring})


class TrainingOptions(dg.Config):
    """Whether to train, or to say what it would take."""

    dry_run: bool = Field(
        default=False,
        description="Only say what would be trained: pairs and why others are excluded, memory, caches, duration.",
    )


class ShardChoice:
    """The shards that a run does: all that are selected, or those that its form leaves of them."""

    def __init__(self, context: dg.AssetExecutionContext, keys: Sequence[str], *, is_whole: bool) -> None:
        self._context, self.keys, self.is_whole = context, list(keys), is_whole

    def tell(self, asset: dg.CoercibleToAssetKey, key: str, metadata: Mapping[str, Any]) -> None:
        """Record what was made of a shard: with the run's result, or alone where a range is not materialized as a whole."""
        if self.is_whole:
            self._context.add_asset_metadata(metadata, asset_key=asset, partition_key=key)
        else:
            self._context.log_event(dg.AssetMaterialization(asset, metadata=metadata, partition=key))


def choose(context: dg.AssetExecutionContext, options: ShardOptions, is_done: Callable[[str], bool]) -> ShardChoice:
    """Return the shards that the run does; says which are left, and why nothing is done in a dry run.

    A run that does not do all selected shards yields no result for them, so that the others stay unmaterialized; steps
    that come after it in the same run are skipped.
    """
    keys = list(context.partition_keys)
    if not (options.limit or options.dry_run):
        return ShardChoice(context, keys, is_whole=True)
    due = [k for k in keys if not is_done(k)]
    context.log.info(f"{len(keys) - len(due)} of {len(keys)} shards are done; to do: {', '.join(due) or 'none'}")
    if options.dry_run:
        context.log.info("dry run: nothing is written, nothing counts as materialized")
        return ShardChoice(context, [], is_whole=False)
    if len(due) <= options.limit:
        return ShardChoice(context, keys, is_whole=True)
    context.log.info(f"limit: {options.limit} of them in this run; start it again for the others")
    return ShardChoice(context, due[: options.limit], is_whole=False)
