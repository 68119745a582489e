"""Minority votes: Adaptive-DPO's metric with reward models as annotators (Zhang et al. 2025, arXiv 2503.16921).

For a vote for one side, with d_m signed towards that side:

    z_m = RHO * d_m / rms(d_m)                  RHO = 3.75, the released scale at batch 16
    c   = | mean_m sigmoid(z_m) - 1 |           the annotators disagree with the vote
    v   = min( std_m(z_m), 1 )                  unbiased, over the annotators
    u   = c * v

    minority_score = 1 - p(recorded label)      under the cross-fitted ensemble
"""

from __future__ import annotations

import polars as pl

from pipelines import schemas
from pipelines.labels import calibration as cal
from pipelines.labels.margins import difference_column

RHO = 3.75


def side_metrics(differences: pl.DataFrame, calibration: pl.DataFrame, scorers: list[str]) -> pl.DataFrame:
    """Return per pair and side (pair_id, side in {0.0, 1.0} = label_0 of a vote for it): c, v, u, minority_score."""
    sides = []
    for side in (0.0, 1.0):
        sign = 2 * side - 1
        z = [pl.col(difference_column(s)) * (sign * RHO / cal.rms_of(calibration, s)) for s in scorers]
        p = [cal.sigmoid(x) for x in z]
        has_all = pl.all_horizontal(x.is_not_null() for x in z)
        confidence = (pl.sum_horizontal(p) / len(p) - 1).abs()
        spread = pl.concat_list(z).list.std(ddof=1) if len(z) > 1 else pl.lit(None, pl.Float64)
        stability = pl.min_horizontal(spread, pl.lit(1.0))
        sides.append(
            differences.select(
                "pair_id",
                side=pl.lit(side),
                confidence=pl.when(has_all).then(confidence),
                # min_horizontal skips nulls, so that a single annotator would look maximally unstable.
                stability=pl.when(has_all & spread.is_not_null()).then(stability),
                minority_score=1 - cal.sigmoid(sign * cal.ensemble_logit(calibration, scorers)),
            ).with_columns(metric=pl.col("confidence") * pl.col("stability"))
        )
    return pl.concat(sides)


def minority(votes: pl.DataFrame, sides: pl.DataFrame) -> pl.DataFrame:
    """Return the minority table, one row per decided vote.

    votes: vote_id, pair_id, annotator_id, label_0, count of the counted votes. Other raters are the people who voted on the
    pair (an unknown count is one), but for the same known annotator, and but for one of a row that counts for several.
    """
    decided = votes.filter(pl.col("label_0") != 0.5).select(
        "vote_id", "pair_id", "annotator_id", "label_0", people=pl.col("count").fill_null(1)
    )
    known = pl.col("annotator_id").is_not_null()
    # Counts are signed, so that a difference below zero cannot wrap around.
    people = pl.col("people").sum()
    on_pair, on_side = (people.over(k) for k in (["pair_id"], ["pair_id", "label_0"]))
    own = pl.when(known).then(people.over("pair_id", "annotator_id")).otherwise(1)
    own_side = pl.when(known).then(people.over("pair_id", "annotator_id", "label_0")).otherwise(1)
    return (
        decided.with_columns(others=on_pair - own, against=(on_pair - on_side) - (own - own_side))
        .with_columns(share_against=pl.when(pl.col("others") > 0).then(pl.col("against") / pl.col("others")))
        .join(sides, left_on=["pair_id", "label_0"], right_on=["pair_id", "side"], how="left")
        .select(list(schemas.MINORITY.polars_schema))
        .sort("vote_id")
    )
