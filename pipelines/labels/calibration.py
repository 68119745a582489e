"""Calibration of scorers against human votes, without centring or intercept: swapping the images flips signs only.

    p_k = sigmoid(a_k d_k)                                    a_k by logistic regression, ties as half votes, mean loss
    h   = sum_k w_k z_k,  z_k = d_k / rms(d_k)                ensemble logit; p = sigmoid(h)

cross-fitted by prompt: fold f's numbers were fitted without the prompts of fold f; fold -1 was fitted on all.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from pipelines import schemas
from pipelines.labels.margins import FOLDS, difference_column, fold

RIDGE = 1e-3
"""Penalty RIDGE/2 * |w|^2 beside the mean loss, so that it scales with the number of votes."""
ALL = -1


def fit_logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray, ridge: float) -> np.ndarray:
    """Minimise mean_w( -y log sigmoid(x.w) - (1-y) log sigmoid(-x.w) ) + ridge/2 |w|^2 by damped Newton steps.

    Args:
        x: [N, K]; y: labels in [0, 1], [N]; weight: votes per row, [N].

    Returns:
        w, [K]; zeros where there is nothing to fit.
    """
    w = np.zeros(x.shape[1])
    if weight.sum() == 0:
        return w
    share = weight / weight.sum()

    def loss(w: np.ndarray) -> float:
        margin = x @ w
        return float(share @ (np.logaddexp(0, margin) - y * margin) + ridge / 2 * w @ w)

    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        gradient = x.T @ (share * (p - y)) + ridge * w
        hessian = (x * (share * p * (1 - p))[:, None]).T @ x + (ridge + 1e-12) * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        # Margins with heavy tails make a full step overshoot.
        while loss(w - step) > loss(w) + 1e-12 and np.abs(step).max() > 1e-10:
            step /= 2
        w -= step
        if np.abs(step).max() < 1e-10 * max(1.0, np.abs(w).max()):
            break
    return w


def tie_aware_accuracy(margin: np.ndarray, label: np.ndarray, weight: np.ndarray) -> float | None:
    """Return the share of decided votes that the sign of the margin gets right; an even margin counts half.

    label: mean of the votes of a row in [0, 1]; weight: number of decided votes.
    """
    total = weight.sum()
    if total == 0:
        return None
    right = np.where(margin > 0, label, np.where(margin < 0, 1 - label, 0.5))
    return float((weight * right).sum() / total)


def calibrate(
    differences: pl.DataFrame, votes: pl.DataFrame, score_ranges: pl.DataFrame, scorers: list[str]
) -> pl.DataFrame:
    """Return the calibration table.

    differences: of `margins.differences`. votes: pair_id, label_0, people (how many a row stands for) of the counted votes.
    score_ranges: scorer, min, max of the scores.
    """
    people, decided = pl.col("people"), pl.col("label_0") != 0.5
    weighted = pl.col("label_0") * people
    per_pair = votes.group_by("pair_id").agg(
        label=weighted.sum() / people.sum(),
        votes=people.sum(),
        decided=people.filter(decided).sum(),
        decided_label=weighted.filter(decided).sum() / people.filter(decided).sum(),
    )
    per_pair = per_pair.with_columns(pl.col("decided_label").fill_nan(None))
    frame = differences.join(per_pair, on="pair_id", how="left").with_columns(fold=fold()).sort("pair_id")
    ranges = {name: (low, high) for name, low, high in score_ranges.iter_rows()}
    columns = [difference_column(s) for s in scorers]
    d = frame.select(columns).to_numpy().astype(float)
    known = ~np.isnan(d)
    rms = np.array(
        [np.sqrt(np.mean(d[known[:, k], k] ** 2)) if known[:, k].any() else 0.0 for k in range(len(scorers))]
    )
    z = np.where(known, d, 0.0) / np.where(rms > 0, rms, 1.0)
    count = frame["votes"].fill_null(0).to_numpy().astype(float)
    label = frame["label"].fill_null(0.5).to_numpy()
    decided_votes = frame["decided"].fill_null(0).to_numpy().astype(float)
    decided_label = frame["decided_label"].fill_null(0.5).to_numpy()
    folds = frame["fold"].to_numpy()

    rows = []
    for f in (ALL, *range(FOLDS)):
        use = (folds != f) & (count > 0)
        left_out = (folds == f) if f != ALL else np.ones(len(frame), bool)
        complete = use & known.all(1)
        weights = fit_logistic(z[complete], label[complete], count[complete], RIDGE)
        for k, scorer in enumerate(scorers):
            fit = use & known[:, k]
            # Fitted on z and returned in the units of d, so that the ridge does not depend on a scorer's scale.
            slope = fit_logistic(z[fit][:, [k]], label[fit], count[fit], 1e-6)[0] / (rms[k] if rms[k] > 0 else 1.0)
            judged = left_out & known[:, k]
            rows.append(
                {
                    "scorer": scorer,
                    "fold": f,
                    "slope": slope,
                    "weight": weights[k],
                    "rms": rms[k],
                    "min": ranges.get(scorer, (None, None))[0],
                    "max": ranges.get(scorer, (None, None))[1],
                    "accuracy": tie_aware_accuracy(d[judged, k], decided_label[judged], decided_votes[judged]),
                    "votes": int(decided_votes[judged].sum()),
                }
            )
        judged = left_out & known.all(1)
        rows.append(
            {
                "scorer": "ensemble",
                "fold": f,
                "slope": 1.0,
                "weight": None,
                "rms": None,
                "min": None,
                "max": None,
                "accuracy": tie_aware_accuracy(z[judged] @ weights, decided_label[judged], decided_votes[judged]),
                "votes": int(decided_votes[judged].sum()),
            }
        )
    return pl.DataFrame(rows, schema=schemas.CALIBRATION.polars_schema)


def ensemble_logit(calibration: pl.DataFrame, scorers: list[str]) -> pl.Expr:
    """Return h of a row of `differences` from the weights of its prompt's fold; null where a scorer has no score."""
    cases: pl.Expr = pl.lit(None, pl.Float64)
    for f in range(FOLDS):
        part = {r["scorer"]: r for r in calibration.filter(pl.col("fold") == f).iter_rows(named=True)}
        terms = [pl.col(difference_column(s)) * (part[s]["weight"] / (part[s]["rms"] or 1.0)) for s in scorers]
        cases = pl.when(fold() == f).then(sum(terms[1:], terms[0])).otherwise(cases)
    return cases


def scorer_logit(calibration: pl.DataFrame, scorer: str) -> pl.Expr:
    """Return a_k d_k with the slope of the prompt's fold."""
    cases: pl.Expr = pl.lit(None, pl.Float64)
    for f in range(FOLDS):
        slope = calibration.filter(pl.col("fold") == f, pl.col("scorer") == scorer)["slope"][0]
        cases = pl.when(fold() == f).then(pl.col(difference_column(scorer)) * slope).otherwise(cases)
    return cases


def sigmoid(x: pl.Expr) -> pl.Expr:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + (-x).exp())


def rms_of(calibration: pl.DataFrame, scorer: str) -> float:
    """Return rms(d_k) over all pairs; 1 where every difference is 0."""
    return calibration.filter(pl.col("fold") == ALL, pl.col("scorer") == scorer)["rms"][0] or 1.0
