"""Consensus: a majority vote of several reward models per pair (BalancedDPO, Tamboli et al. 2025, arXiv 2503.12575).

    vote_k = sign(d_k) in {-1, 0, 1};   y = sign(sum_k vote_k);   agreement = |sum_k vote_k| / K

K counts the scorers that have a score of both images, and the humans' majority where it votes too.

The paper fixes aggregation in label space; what decides an even vote is our reading, hence a policy:
`drop` (undecided), `human` (the mean human label), `tie_breaker` (one scorer), `keep_order` (image_0 in id order: a
fixed coin, independent of what was displayed first).

Baselines of the paper's ablation: `random_scorer` (one scorer's vote, drawn by a hash of seed, pair and scorer's name),
`raw_sum` (sign of sum_k d_k), `zscore_sum` (sign of sum_k d_k / rms_k). They know no tie policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import polars as pl

from pipelines import schemas
from pipelines.labels import margins as mar
from pipelines.labels.calibration import PairVotes
from pipelines.labels.intervals import clustered_share

AGGREGATIONS = ("majority", "random_scorer", "raw_sum", "zscore_sum")
TIE_POLICIES = ("drop", "human", "tie_breaker", "keep_order")
ALL_LEVELS = "all"


def consensus(
    margins: pl.DataFrame,
    human_label_0: pl.Series,
    scorers: Sequence[str],
    tie_policy: str,
    tie_breaker: str = "",
    *,
    human_votes: bool = False,
    seed: int = 0,
    rms: np.ndarray | None = None,
) -> pl.DataFrame:
    """Return the consensus table, aligned with `margins`.

    Args:
        human_label_0: mean human label of every row of `margins`; null where nobody voted.
        human_votes: the humans' majority is one voter more (an even one votes 0).
        seed: of the draw of random_scorer.
        rms: margins.rms over all pairs, [K], where `margins` is a piece of them.

    Raises:
        ValueError: the tie policy, or the scorer of policy 'tie_breaker', is unknown.
    """
    if tie_policy not in TIE_POLICIES:
        raise ValueError(f"tie_policy: expected one of {list(TIE_POLICIES)}, found {tie_policy!r}")
    if tie_policy == "tie_breaker" and tie_breaker not in scorers:
        raise ValueError(f"tie_breaker: expected one of {list(scorers)}, found {tie_breaker!r}")
    d = mar.matrix(margins, scorers)
    human = np.sign(human_label_0.fill_null(np.nan).to_numpy() - 0.5)
    votes = np.sign(d)
    voting = np.column_stack([votes, human]) if human_votes else votes
    voters, total = (~np.isnan(voting)).sum(1), np.nansum(voting, 1)
    decider = {
        "drop": np.full(len(d), np.nan),
        "human": human,
        "tie_breaker": votes[:, list(scorers).index(tie_breaker)] if tie_breaker in scorers else human,
        "keep_order": np.ones(len(d)),
    }[tie_policy]
    side = np.where(total != 0, np.sign(total), np.where(voters > 0, decider, np.nan))
    is_decided = ~np.isnan(side) & (side != 0)
    # In the order of the names, so that the order of the configuration does not even change the last bit of a sum.
    by_name = np.argsort(scorers)
    nobody = np.full(len(d), np.nan)
    drawn = votes[np.arange(len(d)), _drawn(margins["pair_id"], scorers, seed)] if len(scorers) else nobody
    by = np.where(total != 0, 0, np.where(is_decided, 1, 2))
    return pl.DataFrame(
        {
            "pair_id": margins["pair_id"],
            **{f"vote_{s}": _votes(votes[:, k]) for k, s in enumerate(scorers)},
            "vote_human": _votes(human if human_votes else nobody),
            "votes_0": (voting > 0).sum(1).astype(np.int32),
            "votes_1": (voting < 0).sum(1).astype(np.int32),
            "voters": voters.astype(np.int32),
            "agreement": pl.Series(np.where(voters > 0, np.abs(total) / np.maximum(voters, 1), np.nan)).fill_nan(None),
            "consensus_label_0": _label(side),
            "decided_by": pl.Series(["majority", tie_policy, "none"], dtype=pl.String).gather(by),
            "random_scorer_label_0": _label(drawn),
            "raw_sum_label_0": _label(d[:, by_name].sum(1)),
            "zscore_sum_label_0": _label((d / (mar.rms(d) if rms is None else rms))[:, by_name].sum(1)),
        }
    )


def _votes(signs: np.ndarray) -> pl.Series:
    return pl.Series(signs).fill_nan(None).cast(pl.Int8)


def _label(side: np.ndarray) -> pl.Series:
    """Return 1, 0, or null where the side is 0 or unknown."""
    return pl.Series(np.where(side > 0, 1.0, np.where(side < 0, 0.0, np.nan))).fill_nan(None)


def _drawn(pair_id: pl.Series, scorers: Sequence[str], seed: int) -> np.ndarray:
    """Return which scorer is drawn for every pair, [N]: the one with the smallest hash of seed, pair and its name."""
    keys = [np.uint64(int.from_bytes(hashlib.sha256(f"{seed}/{s}".encode()).digest()[:8], "big")) for s in scorers]
    # A pair's id is a hash itself; mixing its first 60 bits with a scorer's key is enough.
    pair = pair_id.str.slice(0, 15).str.to_integer(base=16, dtype=pl.Int64).to_numpy().astype(np.uint64)
    return np.argmin(np.stack([_mixed(pair ^ key) for key in keys], 1), 1)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Return uint64 x with every bit depending on every bit (finaliser of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def report(consensus: pl.DataFrame, margins: pl.DataFrame, humans: PairVotes, scorers: Sequence[str]) -> pl.DataFrame:
    """Return the consensus_report table: how often decided human votes agree with each way to a label, by agreement.

    The majority is that of the scorers alone: a human voter, or a tie policy that asks the humans, would agree with itself.
    Labels are compared where there are any; a pair without one says nothing (unlike an even margin in `calibration`,
    which counts half). Intervals take prompts as clusters.
    """
    prompts = mar.codes(margins["prompt_id"])
    of_scorers = np.stack([consensus[f"vote_{s}"].cast(pl.Float64).fill_null(np.nan).to_numpy() for s in scorers])
    total, voters = np.nansum(of_scorers, 0), np.count_nonzero(~np.isnan(of_scorers), 0)
    ways = {"majority": _label(total), **{a: consensus[f"{a}_label_0"] for a in AGGREGATIONS if a != "majority"}}
    ways |= {s: _label(v) for s, v in zip(scorers, of_scorers, strict=True)}
    surplus = np.abs(total).astype(np.int64)
    level = voters * (voters.max(initial=0) + 1) + surplus
    order = np.argsort(level, kind="stable")
    found, starts = np.unique(level[order], return_index=True)
    groups = [(ALL_LEVELS, np.arange(len(level)))]
    for rows in np.split(order, starts[1:]) if len(found) else []:
        groups.append((f"{surplus[rows[0]]} of {voters[rows[0]]}", rows))
    facts = []
    for way, label in ways.items():
        value = label.fill_null(np.nan).to_numpy()
        is_labelled = ~np.isnan(value)
        votes = np.where(is_labelled, humans.decided, 0.0)
        right = votes * np.where(value == 1, humans.decided_label, 1 - humans.decided_label)
        for name, rows in groups:
            share, low, high = clustered_share(right[rows], votes[rows], prompts[rows])
            facts.append((way, name, len(rows), int(is_labelled[rows].sum()), int(votes[rows].sum()), share, low, high))
    return pl.DataFrame(facts, schema=schemas.CONSENSUS_REPORT.polars_schema, orient="row")
