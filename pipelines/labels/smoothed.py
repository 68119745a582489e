"""Smoothed preferences: how much rather than which (SmPO-Diffusion, Lu et al. 2025, arXiv 2506.02698).

    SmPO's form:  r' = (r - min) / (max - min),  p = softmax(r'_0, r'_1)[0] = sigmoid(d / (max - min))
    calibrated:   p_k = sigmoid(a_k d_k);  linear pool mean_k p_k;  log pool sigmoid(mean_k a_k d_k);  ensemble sigmoid(h)

min and max are the scorer's over the store, or, as published, those of PickScore's cosine; a score that is a cosine times a
scale has the range of the cosine times that scale, so that p does not depend on the unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from pipelines.labels import calibration as cal
from pipelines.labels import margins as mar

PUBLISHED = (0.11543526500463486, 0.28201571106910706)
"""Smallest and largest PickScore cosine in the released SmPO code."""


def smoothed(
    margins: pl.DataFrame,
    calibration: pl.DataFrame,
    scorers: Sequence[str],
    smpo_scorer: str,
    *,
    published_constants: bool = False,
) -> pl.DataFrame:
    """Return the smoothed table, aligned with `margins`; a column is null where a scorer that it needs has no score.

    Rows do not depend on each other: `margins` may be a piece of the table that was calibrated on.
    published_constants: p_smpo, and the column of the scorer that it comes from, take PUBLISHED instead of the store's range.

    Raises:
        ValueError: the published constants are asked for, and the calibration knows no cosine in the scorer's score.
    """
    d = mar.matrix(margins, scorers)
    ranges = np.array([_range(calibration, s, published_constants and s == smpo_scorer) for s in scorers])
    smpo = cal.sigmoid(d / ranges)
    logits = cal.scorer_logits(margins, calibration, scorers)
    calibrated, z = cal.sigmoid(logits), d / cal.rms_of(calibration, scorers)
    many = len(scorers) > 1
    numbers = {
        **{f"smpo_{s}": smpo[:, k] for k, s in enumerate(scorers)},
        **{f"calibrated_{s}": calibrated[:, k] for k, s in enumerate(scorers)},
        "p_smpo": smpo[:, list(scorers).index(smpo_scorer)],
        "p_ensemble": cal.sigmoid(cal.ensemble_logit(margins, calibration, scorers)),
        "p_linear": calibrated.mean(1),
        "p_log": cal.sigmoid(logits.mean(1)),
        "z_mean": z.mean(1),
        "z_std": z.std(1, ddof=1) if many else np.full(len(d), np.nan),
    }
    columns = {name: pl.Series(values).fill_nan(None) for name, values in numbers.items()}
    return pl.DataFrame({"pair_id": margins["pair_id"], **columns})


def _range(calibration: pl.DataFrame, scorer: str, published: bool) -> float:
    """Return max - min in the unit of the score; 1 where all scores are equal or there is none."""
    row = calibration.filter(pl.col("fold") == cal.ALL, pl.col("scorer") == scorer)
    if published:
        if (scale := row["logit_scale"][0]) is None:
            raise ValueError(
                f"smpo_constants 'published' are cosines of PickScore, and the scores of {scorer!r} are not known to hold "
                f"a cosine; set labels.smpo_scorer to a scorer of kind pickscore, or smpo_constants to 'data'"
            )
        return (PUBLISHED[1] - PUBLISHED[0]) * scale
    low, high = row["min"][0], row["max"][0]
    return high - low if low is not None and high > low else 1.0
