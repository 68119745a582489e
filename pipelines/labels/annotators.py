"""Annotators: how reliable people are, whether the place of a picture sways them, how far raters agree.

    reliability   (k + a) / (n + a + b), k of n decided votes with the majority of the pair's other raters, divided by the
                  design effect of a person's votes on one prompt; Beta(a, b) over annotators by maximum likelihood
                  (empirical Bayes)
    first_share   share of decided votes for the image displayed first; its interval, too, takes prompts as clusters
    alpha         Krippendorff's, nominal: 1 - D_o / D_e, over pairs with two votes or more (Krippendorff 2011)
        D_o = 1/n sum_pairs sum_{c != k} n_pc n_pk / (m_p - 1)          D_e = sum_{c != k} n_c n_k / (n (n - 1))

Belongs here: people. Does not belong here: single votes (`minority`).
"""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy.special import betaincinv, betaln

from pipelines import schemas
from pipelines.labels import margins as mar
from pipelines.labels.intervals import clustered_share, design_effect, wilson
from pipelines.labels.minority import LEAST_VOTES, PRIOR_VOTES, agreement_surplus

UNKNOWN = "unknown"
ALL = "all"
RESAMPLES = 1_000
_PRIOR_STRENGTH = (2.0, 2_000.0)
"""Bounds of a + b: where all annotators seem alike the likelihood has no maximum."""
_VALUES = (0.0, 0.5, 1.0)
_WHO = pl.col("annotator_id").fill_null(UNKNOWN)


def annotators(votes: pl.DataFrame, margins: pl.DataFrame, minority: pl.DataFrame) -> pl.DataFrame:
    """Return the annotators table, sorted by id.

    Args:
        votes: pair_id, annotator_id, label_0, people, was_swapped of the counted votes.
        minority: the minority table of the same votes.
    """
    names = votes.select(_WHO).to_series().unique().sort()
    prompts = mar.codes(margins["prompt_id"])
    counts = _voted(votes, _numbers(votes, names), prompts[mar.vote_rows(margins, votes)], len(names))
    counts |= _judged(
        minority, _numbers(minority, names), prompts[mar.rows_of(margins, minority["pair_id"])], len(names)
    )
    score = counts.pop("surplus") / (counts.pop("judged") + PRIOR_VOTES)
    counts["annotator_score"] = np.where(names == UNKNOWN, 0.0, score)
    columns = {}
    for column, dtype in schemas.ANNOTATORS.polars_schema.items():
        if column != "annotator_id":
            values = pl.Series(counts[column], dtype=pl.Float64)
            columns[column] = values.round().cast(pl.Int64) if dtype == pl.Int64 else values.fill_nan(None)
    return pl.DataFrame({"annotator_id": names, **columns})


def _numbers(frame: pl.DataFrame, names: pl.Series) -> np.ndarray:
    """Return the place of every row's annotator among `names`, [N]."""
    places = names.to_frame("annotator_id").with_row_index("at")
    found = frame.select(_WHO).join(places, on="annotator_id", how="left", maintain_order="left")
    return found["at"].to_numpy().astype(np.int64)


def _voted(votes: pl.DataFrame, who: np.ndarray, prompt: np.ndarray, annotators: int) -> dict[str, np.ndarray]:
    """Return what is counted of all votes, [annotators] each: decided ones, ties, prompts, and those for the first image."""
    people, label = votes["people"].to_numpy().astype(float), votes["label_0"].to_numpy()
    placed, first = _placed(votes)
    of_sittings, sitting = mar.together(who, prompt)
    ties, decided, n, k = (
        np.bincount(who, v, minlength=annotators)
        for v in (people * (label == 0.5), people * (label != 0.5), placed, first)
    )
    low, high = wilson(_ratio(k, n), n / design_effect(first, placed, sitting, who))
    prompts = np.bincount(of_sittings, minlength=annotators)
    shares = {"first_share": _ratio(k, n), "first_low": low, "first_high": high}
    return {"votes": decided, "ties": ties, "prompts": prompts, "placed": n, **shares}


def _judged(minority: pl.DataFrame, who: np.ndarray, prompt: np.ndarray, annotators: int) -> dict[str, np.ndarray]:
    """Return what others and the ensemble say of decided votes, [annotators] each; surplus and judged make the score."""
    people, against, score = (
        minority[c].cast(pl.Float64).fill_null(np.nan).to_numpy() for c in ("people", "share_against", "minority_score")
    )
    is_compared = ~np.isnan(against) & (against != 0.5)
    compared, agreeing = people * is_compared, people * (is_compared & (against < 0.5))
    with np.errstate(divide="ignore", invalid="ignore"):
        surplus = people * agreement_surplus(np.log1p(-score) - np.log(score))
    n, k, total, judged = (
        np.bincount(who, v, minlength=annotators) for v in (compared, agreeing, surplus, people * ~np.isnan(score))
    )
    effect = design_effect(agreeing, compared, mar.together(who, prompt)[1], who)
    mean, low, high = _reliability(k / effect, n / effect)
    shares = {"reliability": mean, "reliability_low": low, "reliability_high": high}
    return {"compared": n, "agreeing": k, "surplus": total, "judged": judged, **shares}


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _placed(votes: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return per vote the people whose decided vote is on a known display order, and those who chose the first image."""
    label, swapped = votes["label_0"].to_numpy(), votes["was_swapped"]
    placed = votes["people"].to_numpy() * (swapped.is_not_null().to_numpy() & (label != 0.5))
    first = np.where(swapped.fill_null(False).to_numpy(), 1 - label, label)
    return placed.astype(float), placed * first


def _reliability(k: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return posterior mean and 95 % interval of k of n under a beta prior fitted to all; NaN where n is 0."""
    mean, low, high = (np.full(len(n), np.nan) for _ in range(3))
    seen = np.flatnonzero(n > 0)
    if len(seen):
        k, n = k[seen], n[seen]
        a, b = beta_prior(k, n)
        mean[seen] = (a + k) / (a + b + n)
        low[seen], high[seen] = (betaincinv(a + k, b + n - k, q) for q in (0.025, 0.975))
    return mean, low, high


def beta_prior(k: np.ndarray, n: np.ndarray) -> tuple[float, float]:
    """Return a, b > 0 that make k of n likeliest under a beta-binomial, a + b between 2 and 2,000."""
    # Slow to import, and this module is read where Dagster's definitions load.
    from scipy.optimize import minimize

    start = np.clip((k.sum() + 1) / (n.sum() + 2), 1e-3, 1 - 1e-3)

    def cost(x: np.ndarray) -> float:
        mean, strength = 1 / (1 + np.exp(-x[0])), np.exp(x[1])
        a, b = mean * strength, (1 - mean) * strength
        return float(-(betaln(a + k, b + n - k) - betaln(a, b)).mean())

    bounds = [(-8.0, 8.0), tuple(np.log(_PRIOR_STRENGTH))]
    found = minimize(cost, [np.log(start / (1 - start)), np.log(20.0)], bounds=bounds, method="L-BFGS-B").x
    mean, strength = 1 / (1 + np.exp(-found[0])), np.exp(found[1])
    return float(mean * strength), float((1 - mean) * strength)


# --- agreement -------------------------------------------------------------------------------------------------------


def krippendorff_alpha(counts: np.ndarray) -> float | None:
    """Return Krippendorff's alpha for nominal values; None where fewer than two values occur in comparable units.

    counts: ratings of every unit with every value, [U, C]. Units with one rating or none are not comparable.
    """
    disagreement, values = _coincidences(counts)
    return _alpha(disagreement.sum(), values.sum(0))


def _coincidences(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return per comparable unit sum_{c != k} n_c n_k / (m - 1), [V], and its ratings by value, [V, C]."""
    values = counts[counts.sum(1) >= 2].astype(float)
    m = values.sum(1)
    return (m**2 - (values**2).sum(1)) / (m - 1), values


def _alpha(disagreement: float, values: np.ndarray) -> float | None:
    n = values.sum()
    expected = n**2 - (values**2).sum()
    return None if expected <= 0 else float(1 - disagreement * (n - 1) / expected)


def _alpha_interval(counts: np.ndarray, clusters: np.ndarray) -> tuple[float | None, float | None]:
    """Return the 95 % interval of alpha over bootstrap resamples of clusters, seed 0; None of fewer than two clusters."""
    comparable = counts.sum(1) >= 2
    disagreement, values = _coincidences(counts)
    _, which = np.unique(clusters[comparable], return_inverse=True)
    sums = np.stack([np.bincount(which, v) for v in (disagreement, *values.T)], 1) if len(which) else np.zeros((0, 1))
    if len(sums) < 2:
        return None, None
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = np.bincount(rng.integers(0, len(sums), len(sums)), minlength=len(sums)) @ sums
        found.append(_alpha(drawn[0], drawn[1:]))
    known = [f for f in found if f is not None]
    return (float(np.quantile(known, 0.025)), float(np.quantile(known, 0.975))) if known else (None, None)


def rater_agreement(votes: pl.DataFrame, margins: pl.DataFrame) -> pl.DataFrame:
    """Return the rater_agreement table: a row per source, then 'all'.

    Every vote is a rating, also a second one of the same person.

    votes: pair_id, annotator_id, label_0, people, was_swapped, source of the counted votes.
    """
    prompts = mar.codes(margins["prompt_id"])
    row = mar.vote_rows(margins, votes)
    groups = [(s, (votes["source"] == s).to_numpy()) for s in votes["source"].unique().sort()]
    groups.append((ALL, np.ones(len(votes), bool)))
    return pl.DataFrame(
        [{"source": name, **_agreement(votes.filter(is_in), row[is_in], prompts)} for name, is_in in groups],
        schema=schemas.RATER_AGREEMENT.polars_schema,
    )


def _agreement(votes: pl.DataFrame, row: np.ndarray, prompts: np.ndarray) -> dict[str, object]:
    people, label = votes["people"].to_numpy().astype(float), votes["label_0"].to_numpy()
    pairs, unit = np.unique(row, return_inverse=True)
    counts = np.stack([np.bincount(unit, people * (label == v), minlength=len(pairs)) for v in _VALUES], 1)
    comparable = counts.sum(1) >= 2
    decided = counts[:, [0, 2]]
    low, high = _alpha_interval(counts, prompts[pairs])
    several = decided[decided.sum(1) >= LEAST_VOTES]
    placed, first = _placed(votes)
    first_share, first_low, first_high = clustered_share(first, placed, prompts[row])
    return {
        "pairs": int(comparable.sum()),
        "ratings": int(counts[comparable].sum()),
        "raters": votes.filter(pl.Series(comparable[unit]))["annotator_id"].drop_nulls().n_unique(),
        "alpha": krippendorff_alpha(counts),
        "alpha_low": low,
        "alpha_high": high,
        "alpha_decided": krippendorff_alpha(decided),
        "minority_share": float(several.min(1).sum() / several.sum()) if len(several) else None,
        "placed": int(placed.sum()),
        "first_share": first_share,
        "first_low": first_low,
        "first_high": first_high,
    }
