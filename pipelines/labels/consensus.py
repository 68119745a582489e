"""Consensus: a majority vote of several reward models per pair (BalancedDPO, Tamboli et al. 2025, arXiv 2503.12575).

    vote_k = sign(d_k) in {-1, 0, 1};   y = sign(sum_k vote_k);   agreement = |sum_k vote_k| / K

K counts the scorers that have a score of both images.

The paper fixes aggregation in label space; what decides an even vote is our reading, hence a policy:
`drop` (undecided), `human` (the mean human label), `tie_breaker` (one scorer), `keep_order` (image_0 in id order: a
fixed coin, independent of what was displayed first).
"""

from __future__ import annotations

import polars as pl

from pipelines import schemas
from pipelines.labels.margins import difference_column


def consensus(
    differences: pl.DataFrame,
    human_label_0: pl.DataFrame,
    scorers: list[str],
    tie_policy: str,
    tie_breaker: str = "",
) -> pl.DataFrame:
    """Return the consensus table. human_label_0: pair_id, human_label_0 (pairs without votes may be absent).

    Raises:
        ValueError: the tie policy, or the scorer of policy 'tie_breaker', is unknown.
    """
    if tie_policy not in ("drop", "human", "tie_breaker", "keep_order"):
        raise ValueError(f"tie_policy: expected drop, human, tie_breaker or keep_order, found {tie_policy!r}")
    if tie_policy == "tie_breaker" and tie_breaker not in scorers:
        raise ValueError(f"tie_breaker: expected one of {scorers}, found {tie_breaker!r}")
    votes = [pl.col(difference_column(s)).sign() for s in scorers]
    total = pl.sum_horizontal(votes)
    decider = {
        "drop": pl.lit(None, pl.Float64),
        "human": (pl.col("human_label_0") - 0.5).sign(),
        "tie_breaker": pl.col(difference_column(tie_breaker)).sign() if tie_breaker else pl.lit(None, pl.Float64),
        "keep_order": pl.lit(1.0),
    }[tie_policy]
    # A decider that is itself even leaves the pair undecided.
    decider = pl.when(decider != 0).then(decider)
    side = pl.when(pl.col("total") != 0).then(pl.col("total").sign()).otherwise(decider)
    return (
        differences.join(human_label_0, on="pair_id", how="left")
        .with_columns(
            votes_0=pl.sum_horizontal((v > 0).fill_null(False) for v in votes).cast(pl.Int32),
            votes_1=pl.sum_horizontal((v < 0).fill_null(False) for v in votes).cast(pl.Int32),
            voters=pl.sum_horizontal(v.is_not_null() for v in votes).cast(pl.Int32),
            total=total,
        )
        .with_columns(
            agreement=pl.when(pl.col("voters") > 0).then(pl.col("total").abs() / pl.col("voters")),
            side=pl.when(pl.col("voters") > 0).then(side),
        )
        .with_columns(
            consensus_label_0=(pl.col("side") + 1) / 2,
            decided_by=pl.when(pl.col("side").is_null())
            .then(pl.lit("none"))
            .when(pl.col("total") != 0)
            .then(pl.lit("majority"))
            .otherwise(pl.lit(tie_policy)),
        )
        .select(list(schemas.CONSENSUS.polars_schema))
    )
