"""Smoothed preferences: how much rather than which (SmPO-Diffusion, Lu et al. 2025, arXiv 2506.02698).

    SmPO's form:  r' = (r - min) / (max - min),  p = softmax(r'_0, r'_1)[0] = sigmoid(d / (max - min))
    calibrated:   p_k = sigmoid(a_k d_k);  linear pool mean_k p_k;  log pool sigmoid(mean_k a_k d_k);  ensemble sigmoid(h)

min and max are the scorer's over the store; the form does not depend on the unit of the score.
"""

from __future__ import annotations

import polars as pl

from pipelines import schemas
from pipelines.labels import calibration as cal
from pipelines.labels.margins import difference_column


def smoothed(
    differences: pl.DataFrame, calibration: pl.DataFrame, scorers: list[str], smpo_scorer: str
) -> pl.DataFrame:
    """Return the smoothed table; a column is null where a scorer that it needs has no score."""
    row = calibration.filter(pl.col("fold") == cal.ALL, pl.col("scorer") == smpo_scorer)
    low, high = row["min"][0], row["max"][0]
    width = (high - low) if low is not None and high > low else 1.0
    logits = [cal.scorer_logit(calibration, s) for s in scorers]
    z = pl.concat_list(pl.col(difference_column(s)) / cal.rms_of(calibration, s) for s in scorers)
    has_all = pl.all_horizontal(pl.col(difference_column(s)).is_not_null() for s in scorers)
    k = len(scorers)
    return differences.select(
        "pair_id",
        "prompt_id",
        "image_0_id",
        "image_1_id",
        p_smpo=cal.sigmoid(pl.col(difference_column(smpo_scorer)) / width),
        p_ensemble=cal.sigmoid(cal.ensemble_logit(calibration, scorers)),
        p_linear=pl.when(has_all).then(pl.sum_horizontal(cal.sigmoid(x) for x in logits) / k),
        p_log=pl.when(has_all).then(cal.sigmoid(pl.sum_horizontal(logits) / k)),
        z_mean=pl.when(has_all).then(z.list.mean()),
        z_std=pl.when(has_all & pl.lit(k > 1)).then(z.list.std(ddof=1)),
    ).select(list(schemas.SMOOTHED.polars_schema))
