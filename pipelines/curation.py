"""Preferences, one row per pair with everything joined, and the policies that turn them into training labels.

A policy is a frozen dataclass and a pure function: it keeps every row, adds `target_label_0` and, where it uses none,
`excluded_because`. Belongs here: decisions about pairs. Does not belong here: how labels are computed (`labels`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol

import polars as pl

from pipelines import schemas
from pipelines.catalogue import PEOPLE


def preferences(
    pairs: pl.LazyFrame,
    prompts: pl.LazyFrame,
    votes: pl.LazyFrame,
    vote_sources: pl.LazyFrame,
    scores: pl.LazyFrame,
    sides: pl.DataFrame,
    consensus: pl.LazyFrame,
    smoothed: pl.LazyFrame,
    images: pl.LazyFrame,
) -> pl.DataFrame:
    """Return the preferences table.

    pairs: of `catalogue.all_pairs`. votes: the counted votes. vote_sources: pair_id, source of all votes. scores: of
    `batches.current_scores`. sides: of `minority.side_metrics`. images: image_id, status, reason of every image.
    """
    people = PEOPLE.filter(pl.col("label_0") != 0.5)
    share = (pl.col("label_0") * PEOPLE).filter(pl.col("label_0") != 0.5).sum() / people.sum()
    humans = votes.group_by("pair_id").agg(
        minority_share=pl.when(people.sum() >= 3).then(pl.min_horizontal(share, 1 - share))
    )
    sources = vote_sources.group_by("pair_id").agg(sources=pl.col("source").unique().sort().str.join("+"))
    by_image = (
        scores.sort("scorer")
        .group_by("image_id", "prompt_id")
        .agg(
            packed=pl.struct("scorer", "score"),
            # What nobody has imported, or one scorer's code cannot take, says nothing about the picture.
            bad=_WHY.filter(~pl.col("status").is_in(["ok", "not_imported", "unscorable"])).first(),
        )
    )
    # An imported score may be ok where there are no bytes to train on; one shard that has them is enough.
    unreadable = (
        images.with_columns(why=_WHY)
        .group_by("image_id")
        .agg(is_readable=(pl.col("status") == "ok").any(), absent=pl.col("why").sort().first())
        .filter(~pl.col("is_readable"))
        .drop("is_readable")
    )
    # A left join: a prompt that the catalogue lacks breaks the rule that split is never null, instead of losing its pairs.
    frame = pairs.join(prompts.select("prompt_id", "prompt", "split"), on="prompt_id", how="left")
    frame = frame.join(sources, on="pair_id", how="left").join(humans, on="pair_id", how="left")
    for i in (0, 1):
        side = by_image.rename({"image_id": f"image_{i}_id", "packed": f"packed_{i}", "bad": f"bad_{i}"})
        frame = frame.join(side, on=[f"image_{i}_id", "prompt_id"], how="left")
        absent = unreadable.rename({"image_id": f"image_{i}_id", "absent": f"absent_{i}"})
        frame = frame.join(absent, on=f"image_{i}_id", how="left")
    keys = ["prompt_id", "image_0_id", "image_1_id"]
    frame = (
        frame.with_columns(
            is_in_cycle=pl.col("cycle").is_not_null(),
            side=pl.when(pl.col("human_label_0") > 0.5).then(1.0).when(pl.col("human_label_0") < 0.5).then(0.0),
        )
        .join(sides.lazy(), on=["pair_id", "side"], how="left")
        .join(consensus.drop(keys), on="pair_id", how="left")
        .join(smoothed.drop(keys), on="pair_id", how="left")
    )
    unusable = [
        pl.when(pl.coalesce(f"bad_{i}", f"absent_{i}").is_not_null())
        .then(pl.format("image_{} {}", pl.lit(i), pl.coalesce(f"bad_{i}", f"absent_{i}")))
        .when(pl.col(f"packed_{i}").is_null())
        .then(pl.lit(f"image_{i} not scored"))
        for i in (0, 1)
    ]
    result = frame.with_columns(excluded_because=pl.coalesce(unusable)).sort("pair_id").collect()
    packed = {f"scores_{i}": pl.Series([_as_json(v) for v in result[f"packed_{i}"]], dtype=pl.String) for i in (0, 1)}
    return result.with_columns(**packed).select(list(schemas.PREFERENCES.polars_schema))


_WHY = pl.format("{}: {}", "status", pl.col("reason").fill_null("-"))


def _as_json(packed: list[dict] | None) -> str:
    return json.dumps({p["scorer"]: p["score"] for p in packed} if packed is not None else {}, sort_keys=True)


class Policy(Protocol):
    """A pair policy: `apply` adds target_label_0 (1, 0 or null) and fills excluded_because; it drops no row."""

    @property
    def name(self) -> str:
        """Return the name used in tables."""
        ...

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """Return the preferences with target_label_0 and excluded_because."""
        ...


def _with_target(preferences: pl.LazyFrame, label: pl.Expr, why_not: str) -> pl.LazyFrame:
    target = pl.when(pl.col("excluded_because").is_null() & (label != 0.5)).then((label > 0.5).cast(pl.Float64))
    return preferences.with_columns(target_label_0=target).with_columns(
        excluded_because=pl.when(pl.col("target_label_0").is_null())
        .then(pl.coalesce("excluded_because", pl.lit(why_not)))
        .otherwise("excluded_because")
    )


@dataclass(frozen=True)
class HumanPolicy:
    """The side that most humans chose; ties and pairs without votes are excluded."""

    name: str = "human"

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """See Policy."""
        return _with_target(preferences, pl.col("human_label_0"), "human votes are even or absent")


@dataclass(frozen=True)
class ConsensusPolicy:
    """The side of the scorers' consensus; undecided pairs are excluded."""

    name: str = "consensus"

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """See Policy."""
        return _with_target(preferences, pl.col("consensus_label_0"), "the consensus is undecided")
