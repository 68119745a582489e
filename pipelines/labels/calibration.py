"""Calibration of scorers against human votes, without centring or intercept: swapping the images flips signs only.

    p_k = sigmoid(a_k d_k)                                    a_k by logistic regression, ties as half votes, mean loss
    h   = sum_k w_k z_k,  z_k = d_k / rms(d_k)                ensemble logit; p = sigmoid(h); w by logistic regression with
                                                              the penalty 30 / prompts / 2 * sum_k (w_k - mean w)^2
    h  += t_g(image_0) - t_g(image_1)                         only with the generator term, Bradley-Terry (1952)

The penalty draws the weights together, not to zero: the mean of z is a strong judge where votes are few, and p stays
calibrated. It counts prompts, not votes, since votes on one prompt are not independent.

Cross-fitted by prompt: fold f's numbers were fitted without the prompts of fold f; fold -1 was fitted on all.

Belongs here: from scores to probabilities. Does not belong here: which scorer's side wins (`consensus`), pools (`smoothed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipelines import schemas
from pipelines.labels import margins as mar
from pipelines.labels.margins import FOLDS

RIDGE = 1e-6
"""Penalty RIDGE/2 * |w|^2 beside the mean loss: it decides only what the votes leave open."""
PROMPTS_OF_EQUALITY = 30
"""How many prompts of votes the belief is worth that all scorers deserve the same weight: see equality."""
GENERATOR_PROMPTS = 1
"""The same of the belief that generators are equally liked."""
ALL = -1
ENSEMBLE = "ensemble"
GENERATOR = "generator:"
BINS = 10
_BLOCK = 1 << 13
"""Rows that fit into a processor's cache, and few enough that BLAS does not hand them to threads that wait for each other."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return the logistic function 1 / (1 + exp(-x)), without overflow at either end."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


# --- the fit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Rows of a fit, sorted by fold: x [N, K], y and weight [N], and where each fold begins and ends."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    ends: np.ndarray

    def blocks(self, without: int) -> Iterator[slice]:
        """Yield pieces that fit into a processor's cache, of all rows but those of a fold."""
        for fold in range(len(self.ends) - 1):
            if fold != without:
                for start in range(self.ends[fold], self.ends[fold + 1], _BLOCK):
                    yield slice(start, min(start + _BLOCK, self.ends[fold + 1]))

    def slopes(self, w: np.ndarray, penalty: np.ndarray, without: int) -> tuple[np.ndarray, np.ndarray]:
        """Return gradient [K] and Hessian [K, K] of the mean loss with its penalty."""
        gradient, hessian, total = np.zeros(len(w)), np.zeros((len(w), len(w))), 0.0
        for rows in self.blocks(without):
            x, weight = self.x[rows], self.weight[rows]
            p = sigmoid(x @ w)
            gradient += (weight * (p - self.y[rows])) @ x
            hessian += (x * (weight * p * (1 - p))[:, None]).T @ x
            total += weight.sum()
        return gradient / total + penalty @ w, hessian / total + penalty + 1e-12 * np.eye(len(w))

    def has_votes(self, without: int) -> bool:
        """Return whether anything is left to fit."""
        return any(self.weight[rows].any() for rows in self.blocks(without))

    def fit(self, penalty: np.ndarray, without: int, start: np.ndarray) -> np.ndarray:
        """Return the weights at which the gradient vanishes, by damped Newton steps from `start`."""
        w = start
        gradient, hessian = self.slopes(w, penalty, without)
        for _ in range(100):
            step = np.linalg.solve(hessian, gradient)
            # Newton's error is squared by every step: behind a step so small nothing is left to gain.
            if np.abs(step).max() < 1e-5 * max(1.0, np.abs(w).max()):
                return w - step
            # Margins with heavy tails make a full step overshoot; a shorter one always lowers the gradient.
            while True:
                new_gradient, new_hessian = self.slopes(w - step, penalty, without)
                if np.linalg.norm(new_gradient) < np.linalg.norm(gradient) or np.abs(step).max() < 1e-12:
                    break
                step /= 2
            w, gradient, hessian = w - step, new_gradient, new_hessian
        return w


def _sorted_by_fold(x: np.ndarray, y: np.ndarray, weight: np.ndarray, folds: np.ndarray) -> _Rows:
    if (folds[:-1] <= folds[1:]).all():
        return _Rows(x, y, weight, np.searchsorted(folds, np.arange(FOLDS + 1)))
    used = np.flatnonzero(weight > 0)
    order = used[np.argsort(folds[used], kind="stable")]
    ends = np.concatenate([[0], np.cumsum(np.bincount(folds[used], minlength=FOLDS))])
    return _Rows(x[order], y[order], weight[order], ends)


def fit_logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray, ridge: float) -> np.ndarray:
    """Minimise mean_w( -y log sigmoid(x.w) - (1-y) log sigmoid(-x.w) ) + ridge/2 |w|^2 by damped Newton steps.

    Args:
        x: [N, K]; y: labels in [0, 1], [N]; weight: votes per row, [N].

    Returns:
        w, [K]; zeros where there is nothing to fit.
    """
    penalty = ridge * np.eye(x.shape[1])
    return fit_cross(x, y, weight, np.zeros(len(x), np.int8), penalty, only_all=True)[ALL]


def fit_cross(
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    folds: np.ndarray,
    penalty: np.ndarray,
    only_all: bool = False,
) -> np.ndarray:
    """Return the weights [FOLDS + 1, K]: row f fitted without the rows of fold f, the last row fitted on all.

    Args:
        x, y, weight: see fit_logistic. folds: 0 .. FOLDS-1, [N].
        penalty: P of w'Pw / 2 beside the mean loss, [K, K]; or one for each row of the result, [FOLDS + 1, K, K].
        only_all: leave the rows of the folds zero.
    """
    rows, found = _sorted_by_fold(x, y, weight, folds), np.zeros((FOLDS + 1, x.shape[1]))
    penalties = np.broadcast_to(penalty, (FOLDS + 1, x.shape[1], x.shape[1]))
    if rows.has_votes(ALL):
        found[ALL] = rows.fit(penalties[ALL], ALL, np.zeros(x.shape[1]))
    for f in () if only_all else range(FOLDS):
        if rows.has_votes(f):
            # The fit on all rows is near.
            found[f] = rows.fit(penalties[f], f, found[ALL])
    # What rounding leaves of zero: the sign of a logit is read, and an even one must be even.
    found[np.abs(found) < 1e-9] = 0.0
    return found


def prompts_in_fits(prompt_id: pl.Series, weight: np.ndarray) -> np.ndarray:
    """Return how many prompts with weight each row of a cross-fit is fitted on, [FOLDS + 1]; at least 1."""
    prompts = prompt_id.filter(pl.Series(weight > 0)).unique().to_frame("prompt_id")
    per_fold = np.bincount(mar.folds(prompts), minlength=FOLDS)
    return np.maximum(np.append(len(prompts) - per_fold, len(prompts)), 1)


def equality(scorers: int, prompts: np.ndarray) -> np.ndarray:
    """Return the penalties PROMPTS_OF_EQUALITY / prompts * (I - 1/K) that draw K weights together, [FOLDS + 1, K, K]."""
    deviation = np.eye(scorers) - 1 / max(1, scorers)
    return (PROMPTS_OF_EQUALITY / prompts)[:, None, None] * deviation


# --- votes per pair --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairVotes:
    """What people say of each row of `margins`, [N]: votes and their mean label, decided votes and their mean label.

    votes counts people, ties among them; a mean is 0.5 where there is no vote.
    """

    votes: np.ndarray
    label: np.ndarray
    decided: np.ndarray
    decided_label: np.ndarray


def votes_per_pair(margins: pl.DataFrame, votes: pl.DataFrame) -> PairVotes:
    """Return what people say of every pair. votes: pair_id, label_0, people."""
    rows = mar.vote_rows(margins, votes)
    people, label = votes["people"].to_numpy().astype(float), votes["label_0"].to_numpy()
    is_decided = label != 0.5

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(rows, values, minlength=len(margins))

    def mean(label: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.divide(label, count, out=np.full(len(count), 0.5), where=count > 0)

    n, decided = total(people), total(people * is_decided)
    return PairVotes(n, mean(total(people * label), n), decided, mean(total(people * is_decided * label), decided))


# --- the tables ------------------------------------------------------------------------------------------------------


def calibrate(
    margins: pl.DataFrame,
    votes: pl.DataFrame,
    scorers: Sequence[str],
    *,
    logit_scales: Mapping[str, float] | None = None,
    generator_term: bool = False,
) -> pl.DataFrame:
    """Return the calibration table.

    Args:
        margins: of `margins.margins`.
        votes: pair_id, label_0, people (how many a row stands for) of the counted votes.
        logit_scales: scorer -> factor of the cosine in its score, where it is one.
        generator_term: learn what a generator adds for its image (columns model_0, model_1 of margins), as rows
            'generator:<name>'. It lifts the fit where generators differ, by learning their bias.
    """
    d, folds, humans = mar.matrix(margins, scorers), mar.folds(margins), votes_per_pair(margins, votes)
    known, rms = ~np.isnan(d), mar.rms(d)
    is_complete = known.all(1)
    names, generators = _generators(margins) if generator_term else ([], np.zeros((len(margins), 0)))

    # Sorted by fold once, for all fits.
    by_fold = np.argsort(folds, kind="stable")
    x = np.empty((len(d), len(scorers) + len(names)))
    for k, scale in enumerate(rms):
        x[:, k] = np.nan_to_num(d[by_fold, k]) / scale
    x[:, len(scorers) :] = generators[by_fold]
    label, votes_of, at = humans.label[by_fold], humans.votes[by_fold], folds[by_fold]
    weight = humans.votes * is_complete
    prompts = prompts_in_fits(margins["prompt_id"], weight)
    penalty = np.zeros((FOLDS + 1, x.shape[1], x.shape[1])) + RIDGE * np.eye(x.shape[1])
    penalty[:, : len(scorers), : len(scorers)] += equality(len(scorers), prompts)
    # What one generator adds is known up to what all add; that is drawn to zero.
    penalty[:, len(scorers) :, len(scorers) :] += (GENERATOR_PROMPTS / prompts)[:, None, None] * np.eye(len(names))

    def one(k: int) -> np.ndarray:
        # Fitted on z and returned in the units of d, so that the ridge does not depend on a scorer's scale.
        return fit_cross(x[:, [k]], label, votes_of * known[by_fold, k], at, RIDGE * np.eye(1))[:, 0] / rms[k]

    with ThreadPoolExecutor(2) as pool:
        # The longest first.
        ensemble = pool.submit(fit_cross, x, label, weight[by_fold], at, penalty)
        slopes = list(pool.map(one, range(len(scorers))))
    weights = ensemble.result()

    ranges = {s: _range(margins, s) for s in scorers}
    true_rms = [scale if np.nan_to_num(column).any() else 0.0 for scale, column in zip(rms, d.T, strict=True)]
    rows: list[dict[str, object]] = []
    for f in (ALL, *range(FOLDS)):
        for k, scorer in enumerate(scorers):
            low, high = ranges[scorer]
            own = {"weight": weights[f, k], "rms": true_rms[k], "min": low, "max": high}
            scale = (logit_scales or {}).get(scorer)
            rows.append({"scorer": scorer, "fold": f, "slope": slopes[k][f], "logit_scale": scale, **own})
        rows.append({"scorer": ENSEMBLE, "fold": f, "slope": 1.0})
        rows += [
            {"scorer": GENERATOR + name, "fold": f, "weight": w, "votes": 0}
            for name, w in zip(names, weights[f, len(scorers) :], strict=True)
        ]
    table = pl.DataFrame(rows, schema=schemas.CALIBRATION.polars_schema)
    return _judged(table, d, folds, ensemble_logit(margins, table, scorers), humans, scorers)


def _range(margins: pl.DataFrame, scorer: str) -> tuple[float | None, float | None]:
    """Return the smallest and the largest score; None where there is none."""
    both = [margins[f"score_{i}_{scorer}"] for i in (0, 1)]
    known = [v for s in both for v in (s.min(), s.max()) if v is not None]
    return (min(known), max(known)) if known else (None, None)  # type: ignore[return-value]


def _generators(margins: pl.DataFrame) -> tuple[list[str], np.ndarray]:
    """Return the generators' names and [N, G]: +1 for image_0's, -1 for image_1's, 0 in pairs where one is unknown."""
    is_known = pl.col("model_0").is_not_null() & pl.col("model_1").is_not_null()
    both = margins.select(*(pl.when(is_known).then(f"model_{i}").alias(f"model_{i}") for i in (0, 1)))
    names = sorted(set(both["model_0"].drop_nulls()) | set(both["model_1"].drop_nulls()))
    sides = (
        [np.stack([(both[f"model_{i}"] == n).fill_null(False).to_numpy() for n in names], 1) for i in (0, 1)]
        if names
        else []
    )
    return names, sides[0].astype(float) - sides[1] if names else np.zeros((len(margins), 0))


def _judged(
    table: pl.DataFrame, d: np.ndarray, folds: np.ndarray, h: np.ndarray, humans: PairVotes, scorers: Sequence[str]
) -> pl.DataFrame:
    """Return the table with accuracy and votes, by fold of the pairs left out, and calibration errors over all."""
    label = humans.decided_label
    facts: list[dict[str, object]] = []
    curves = _curves(table, d, folds, h, humans, scorers)
    for name, margin in [*zip(scorers, d.T, strict=True), (ENSEMBLE, h)]:
        weight = np.where(np.isnan(margin), 0.0, humans.decided)
        right = weight * np.where(margin > 0, label, np.where(margin < 0, 1 - label, 0.5))
        hits, votes = (np.bincount(folds, v, minlength=FOLDS) for v in (right, weight))
        for f in (ALL, *range(FOLDS)):
            k, n = (hits.sum(), votes.sum()) if f == ALL else (hits[f], votes[f])
            facts.append(
                {
                    "scorer": name,
                    "fold": f,
                    "accuracy": float(k / n) if n else None,
                    "votes": int(n),
                    **({f"ece_{s}": ece(curves, name, s) for s in ("raw", "calibrated")} if f == ALL else {}),
                }
            )
    judged = pl.DataFrame(
        facts,
        schema_overrides={"fold": pl.Int8, **dict.fromkeys(("accuracy", "ece_raw", "ece_calibrated"), pl.Float64)},
    )
    return table.update(judged, on=["scorer", "fold"]).select(list(schemas.CALIBRATION.polars_schema))


def reliability(
    margins: pl.DataFrame, calibration: pl.DataFrame, votes: pl.DataFrame, scorers: Sequence[str]
) -> pl.DataFrame:
    """Return the reliability table: how often people chose the favoured image, by its probability, raw and calibrated.

    The favoured image's probability max(p, 1 - p) falls into one of 10 equal bins of [0.5, 1], so that swapping the
    images changes nothing. raw is sigmoid(d), the softmax of two scores as published; the raw ensemble is sigmoid(mean z).
    """
    d, h = mar.matrix(margins, scorers), ensemble_logit(margins, calibration, scorers)
    return _curves(calibration, d, mar.folds(margins), h, votes_per_pair(margins, votes), scorers)


def _curves(
    calibration: pl.DataFrame,
    d: np.ndarray,
    folds: np.ndarray,
    h: np.ndarray,
    humans: PairVotes,
    scorers: Sequence[str],
) -> pl.DataFrame:
    slopes, votes_known = _slopes(calibration, scorers), humans.votes > 0

    def logit_of(k: int, stage: str) -> np.ndarray:
        if k < len(scorers):
            return d[:, k] if stage == "raw" else d[:, k] * slopes[folds, k]
        return d @ (1 / mar.rms(d)) / len(scorers) if stage == "raw" else h

    def curve(k: int, stage: str) -> pl.DataFrame:
        logit = logit_of(k, stage)
        rows = np.flatnonzero(~np.isnan(logit) & votes_known)
        logit, votes, label = logit[rows], humans.votes[rows], humans.label[rows]
        p = sigmoid(np.abs(logit))
        bins = np.minimum(((p - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)
        chosen = np.where(logit > 0, label, np.where(logit < 0, 1 - label, 0.5))
        count, sum_p, sum_chosen = (np.bincount(bins, v, minlength=BINS) for v in (votes, votes * p, votes * chosen))
        at = np.flatnonzero(count)
        numbers = {
            "bin": at,
            "votes": count[at],
            "probability": sum_p[at] / count[at],
            "agreement": np.clip(sum_chosen[at] / count[at], 0, 1),
        }
        names = (pl.lit([*scorers, ENSEMBLE][k]).alias("scorer"), pl.lit(stage).alias("stage"))
        return pl.DataFrame(numbers).cast({"bin": pl.Int32, "votes": pl.Int64}).select(*names, pl.all())

    with ThreadPoolExecutor(2) as pool:
        stages = [(k, stage) for k in range(len(scorers) + 1) for stage in ("raw", "calibrated")]
        return pl.concat(pool.map(curve, *zip(*stages, strict=True)))


def ece(reliability: pl.DataFrame, scorer: str, stage: str) -> float | None:
    """Return the expected calibration error sum_b votes_b / votes * |probability_b - agreement_b|; None without votes."""
    bins = reliability.filter(pl.col("scorer") == scorer, pl.col("stage") == stage)
    votes, gap = bins["votes"].to_numpy(), (bins["probability"] - bins["agreement"]).abs().to_numpy()
    return float(votes @ gap / votes.sum()) if len(bins) else None


# --- what others read of it ------------------------------------------------------------------------------------------


def by_fold(calibration: pl.DataFrame, scorer: str, column: str) -> np.ndarray:
    """Return a column of a scorer for the folds 0 .. FOLDS-1, [FOLDS]."""
    return calibration.filter(pl.col("scorer") == scorer, pl.col("fold") != ALL).sort("fold")[column].to_numpy()


def rms_of(calibration: pl.DataFrame, scorers: Sequence[str]) -> np.ndarray:
    """Return rms(d) over the pairs that were calibrated on, [K]; 1 where every d was 0 or unknown."""
    rms = np.array([by_fold(calibration, s, "rms")[0] for s in scorers], float)
    return np.where(rms > 0, rms, 1.0)


def scorer_logits(margins: pl.DataFrame, calibration: pl.DataFrame, scorers: Sequence[str]) -> np.ndarray:
    """Return a_k d_k with the slope of the prompt's fold, [N, K]; NaN where a score is missing."""
    return mar.matrix(margins, scorers) * _slopes(calibration, scorers)[mar.folds(margins)]


def _slopes(calibration: pl.DataFrame, scorers: Sequence[str]) -> np.ndarray:
    return np.stack([by_fold(calibration, s, "slope") for s in scorers], 1)


def ensemble_logit(margins: pl.DataFrame, calibration: pl.DataFrame, scorers: Sequence[str]) -> np.ndarray:
    """Return h with the weights of the prompt's fold, [N]; NaN where a scorer has no score."""
    d, folds = mar.matrix(margins, scorers), mar.folds(margins)
    h = np.zeros(len(d))
    for column, s, rms in zip(d.T, scorers, rms_of(calibration, scorers), strict=True):
        h += column * (by_fold(calibration, s, "weight") / rms)[folds]
    names = [s for s in calibration["scorer"].unique().sort() if s.startswith(GENERATOR)]
    if names:
        theirs, sides = _generators(margins)
        learned = {n.removeprefix(GENERATOR): by_fold(calibration, n, "weight") for n in names}
        # A generator that the fit never saw adds nothing.
        added = np.stack([learned.get(n, np.zeros(FOLDS)) for n in theirs], 1) if theirs else np.zeros((FOLDS, 0))
        h = h + (sides * added[folds]).sum(1)
    return h
