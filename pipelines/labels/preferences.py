"""Preferences: one row per pair, everything that is known about it side by side; what analysts query and trainers read.

Belongs here: the join. Does not belong here: what a label means (its own module), who may be trained on (`curation`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from pipelines import schemas
from pipelines.labels import margins as mar
from pipelines.labels.calibration import sigmoid, votes_per_pair
from pipelines.labels.minority import LEAST_VOTES

_SAYS_NOTHING = ("ok", "not_imported", "unscorable")
"""What nobody has imported, or one scorer's code cannot take, says nothing about the picture."""


def preferences(
    pairs: pl.DataFrame,
    prompts: pl.DataFrame,
    votes: pl.DataFrame,
    sources: pl.DataFrame,
    margins: pl.DataFrame,
    metrics: pl.DataFrame,
    minority: pl.DataFrame,
    consensus: pl.DataFrame,
    smoothed: pl.DataFrame,
    problems: pl.DataFrame,
    images: pl.DataFrame,
    scorers: Sequence[str],
) -> Iterator[pl.DataFrame]:
    """Yield the preferences table in pieces, in the order of `pairs`.

    Args:
        pairs: pair keys, n_votes, human_label_0, cycle; sorted by pair_id.
        margins, metrics, consensus, smoothed: of the modules of these names (metrics: of minority.pair_metrics), row by row
            of these pairs.
        prompts: prompt_id, prompt, split. votes: the counted votes. minority: the minority table.
        sources: pair_id (or row, see margins.vote_rows) and source of all votes, counted or not.
        problems: scorer, image_id, prompt_id, status, reason of the scores that are none.
        images: image_id, status, reason of every shard that has an image, of all images that are not ok in one of them.

    Raises:
        ValueError: a table was made from other pairs.
    """
    for name, other in {"margins": margins, "metrics": metrics, "consensus": consensus, "smoothed": smoothed}.items():
        if not pairs["pair_id"].equals(other["pair_id"]):
            raise ValueError(f"{name}: holds other pairs than the catalogue; build it again")
    human = pairs["human_label_0"].to_numpy()
    with np.errstate(invalid="ignore"):
        side = np.where(human > 0.5, 1.0, np.where(human < 0.5, 0.0, np.nan))
    said = votes_per_pair(margins, votes)
    smaller = np.where(said.decided >= LEAST_VOTES, np.minimum(said.decided_label, 1 - said.decided_label), np.nan)
    of_pairs = pl.DataFrame(
        {
            "n_decided": pl.Series(said.decided).cast(pl.Int64),
            "minority_share": pl.Series(smaller).fill_nan(None),
            "minority_probability": pl.Series(_on_side(margins, minority, side)).fill_nan(None),
            "sources": _joined_sources(margins, sources),
            "excluded_because": _unusable(pairs, margins, problems, images, scorers),
        }
    )
    columns = list(schemas.PREFERENCES.of(scorers).polars_schema)
    for start in mar.starts(len(pairs)):
        rows = slice(start, start + mar.ROWS)
        scores = margins[rows]
        parts = [
            pairs[rows].with_columns(is_in_cycle=pl.col("cycle").is_not_null()),
            of_pairs[rows],
            _of_the_side(side[rows], mar.matrix(scores, scorers), metrics[rows]),
            *(t.drop("pair_id", "prompt_id", strict=False) for t in (scores, smoothed[rows], consensus[rows])),
        ]
        # A prompt that the catalogue lacks breaks the rule that split is never null, instead of losing its pairs.
        yield (
            pl.concat(parts, how="horizontal")
            .join(prompts, on="prompt_id", how="left", maintain_order="left")
            .select(columns)
        )


def _of_the_side(side: np.ndarray, d: np.ndarray, metrics: pl.DataFrame) -> pl.DataFrame:
    """Return what the scorers say of the humans' side: c, v, u, minority_score, and whether all choose it."""
    logit, stability, *c = (
        metrics[m].fill_null(np.nan).to_numpy() for m in ("logit", "stability", "confidence_0", "confidence_1")
    )
    stability = np.where(np.isnan(side), np.nan, stability)
    confidence = np.where(np.isnan(side), np.nan, np.where(side == 1, *c))
    numbers = {
        "confidence": confidence,
        "stability": stability,
        "metric": confidence * stability,
        "minority_score": sigmoid(np.where(side == 1, -logit, np.where(side == 0, logit, np.nan))),
    }
    is_known = ~(np.isnan(d).any(1) | np.isnan(side))
    is_unanimous = np.where(side[:, None] == 1, d > 0, d < 0).all(1)
    columns = {name: pl.Series(values).fill_nan(None) for name, values in numbers.items()}
    unanimous = pl.DataFrame({"known": is_known, "all": is_unanimous}).select(pl.when("known").then("all")).to_series()
    return pl.DataFrame({**columns, "is_unanimous": unanimous})


def _on_side(margins: pl.DataFrame, minority: pl.DataFrame, side: np.ndarray) -> np.ndarray:
    """Return the mean minority_probability of the people on the humans' side of each pair, [N]; NaN where unknown."""
    known = minority.filter(pl.col("minority_probability").is_not_null())
    rows = mar.rows_of(margins, known["pair_id"])
    with_side = known["label_0"].to_numpy() == side[rows]
    people = known["people"].to_numpy() * with_side
    total = np.bincount(rows, people, minlength=len(side))
    weighted = np.bincount(rows, people * known["minority_probability"].to_numpy(), minlength=len(side))
    return np.divide(weighted, total, out=np.full(len(side), np.nan), where=total > 0)


def _joined_sources(margins: pl.DataFrame, sources: pl.DataFrame) -> pl.Series:
    """Return per pair the names of the sources that hold votes on it, sorted and joined by '+'."""
    rows = mar.vote_rows(margins, sources)
    names = sorted(sources["source"].unique())
    holds = {}
    for name in names:
        holds[name] = np.zeros(len(margins), bool)
        holds[name][rows[(sources["source"] == name).to_numpy()]] = True
    named = [pl.when(pl.lit(pl.Series(held))).then(pl.lit(name)) for name, held in holds.items()]
    # Where there is no source there is no pair.
    return (
        pl.select(pl.concat_str(named, separator="+", ignore_nulls=True)).to_series()
        if named
        else pl.Series([], dtype=pl.String)
    )


def _unusable(
    pairs: pl.DataFrame, margins: pl.DataFrame, problems: pl.DataFrame, images: pl.DataFrame, scorers: Sequence[str]
) -> pl.Series:
    """Return per pair which image no model may be trained on and why, image_0's reason before image_1's; null: none."""
    why = pl.format("{}: {}", "status", pl.col("reason").fill_null("-"))
    of_score = (
        problems.sort("scorer")
        .group_by("image_id", "prompt_id")
        .agg(
            bad=why.filter(~pl.col("status").is_in(_SAYS_NOTHING)).first(),
            is_known=pl.lit(True),
        )
    )
    # An imported score may be ok where there are no bytes to train on; one shard that has them is enough.
    of_image = (
        images.filter(pl.col("status") != "ok")
        .join(images.filter(pl.col("status") == "ok"), on="image_id", how="anti")
        .group_by("image_id")
        .agg(absent=why.sort().first())
    )
    reasons = []
    for i in (0, 1):
        found = pairs.select("prompt_id", image_id=f"image_{i}_id").join(
            of_score, on=["image_id", "prompt_id"], how="left", maintain_order="left"
        )
        found = found.join(of_image, on="image_id", how="left", maintain_order="left")
        is_scored = margins.select(
            pl.any_horizontal(pl.col(f"score_{i}_{s}").is_not_null() for s in scorers)
        ).to_series()
        text = pl.coalesce("bad", "absent")
        reasons.append(
            found.with_columns(is_scored=is_scored).select(
                pl.when(text.is_not_null())
                .then(pl.format(f"image_{i} {{}}", text))
                .when(~pl.col("is_scored") & pl.col("is_known").is_null())
                .then(pl.lit(f"image_{i} not scored"))
                .alias(f"why_{i}")
            )
        )
    return pl.concat(reasons, how="horizontal").select(pl.coalesce("why_0", "why_1")).to_series()
