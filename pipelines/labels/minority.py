"""Minority votes: is a vote against what most people would say of the pair?

Adaptive-DPO's metric with reward models as annotators (Zhang et al. 2025, arXiv 2503.16921), d_m signed towards the vote:

    z_m = RHO * d_m / rms(d_m)                  RHO = 3.75, the released scale at batch 16
    c   = | mean_m sigmoid(z_m) - 1 |           the annotators disagree with the vote
    v   = min( std_m(z_m), 1 )                  unbiased, over the annotators
    u   = c * v
    minority_score = 1 - p(recorded label)      under the cross-fitted ensemble

What a store with several raters per pair teaches beyond that, cross-fitted by prompt (a prompt that teaches nothing is judged
by what all others teach; targets are left out, while g of other prompts and r rest on fits that saw the prompt's votes too):

    minority_probability = sigmoid(w . (g, |g|, r, 1))      g = ensemble logit signed towards the vote
    r = sum over the annotator's votes on other prompts of (agree - max(p, 1 - p)) / (n + PRIOR_VOTES)
    target: the vote is against the majority of the others' decided votes, where a pair has 3 decided votes or more;
    inputs divided by their rms, with the penalty 6 / prompts / 2 on the weights of |g| and r

and, on request, Raykar et al. (2010): a true side per pair, one accuracy per annotator, and the scorers as its prior.

Unknown values, so that nobody has to guess: with one scorer there is no v and no u; where a score is missing everything that
needs all scorers is null; an unknown annotator has r = 0; a tied vote has no row; with one vote per pair `others` is 0 and
`share_against` null; where all agree `share_against` is 0. minority_probability is null in the whole store if nothing in it
can teach it: one vote per pair does not tell what most people would say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl

from pipelines import schemas
from pipelines.labels import calibration as cal
from pipelines.labels import margins as mar

RHO = 3.75
PRIOR_VOTES = 20
LEAST_VOTES = 3
"""Decided votes that a pair must have for its votes to teach minority_probability."""
LEAST_TARGETS = 50
"""Votes that must remain to learn from when the prompts of a fold are left out, some of them against the others."""
PROMPTS_OF_DOUBT = 6
"""How many prompts of votes the belief is worth that |g| and r say nothing."""
EM_STEPS = 200
_EM_PRIOR = (8.0, 4.0)
"""Votes with and against the true side that an annotator is taken to have beside his own."""


@dataclass(frozen=True)
class Lesson:
    """What minority_probability was learned from, for the manifest.

    calibrated_on: sources of the target votes; none: not learned. targets: people behind them; share: of those, against the
    others. ece: expected calibration error of the cross-fitted probability on the targets, ten equal bins of [0, 1].
    weights: per fold left out (the last: none), of (g, |g|, r, 1). share_clamped: votes whose v is clamped at 1.
    """

    calibrated_on: tuple[str, ...]
    note: str
    targets: int
    share: float | None
    ece: float | None
    weights: tuple[tuple[float, ...], ...]
    share_clamped: float | None

    def facts(self) -> dict[str, object]:
        """Return plain values for a manifest."""
        found = asdict(self)
        return {"calibrated_on": found.pop("calibrated_on"), "calibration_note": found.pop("note"), **found}


def pair_metrics(margins: pl.DataFrame, calibration: pl.DataFrame, scorers: Sequence[str]) -> pl.DataFrame:
    """Return per row of `margins`: pair_id, logit (for image_0), confidence_0, confidence_1, stability.

    confidence_i is c of a vote for image_i; v is the same for both.
    """
    z = RHO * mar.matrix(margins, scorers) / cal.rms_of(calibration, scorers)
    against_0 = 1 - cal.sigmoid(z).mean(1)
    numbers = {
        "logit": cal.ensemble_logit(margins, calibration, scorers),
        "confidence_0": against_0,
        "confidence_1": 1 - against_0,
        "stability": np.minimum(z.std(1, ddof=1), 1.0) if len(scorers) > 1 else np.full(len(z), np.nan),
    }
    columns = {name: pl.Series(values).fill_nan(None) for name, values in numbers.items()}
    return pl.DataFrame({"pair_id": margins["pair_id"], **columns})


@dataclass(frozen=True)
class Rated:
    """Decided votes as arrays, [N]: row of margins, side (1: image_0), people, annotator's number (-1: unknown).

    others, against: people behind the decided votes of other raters on the pair, and of those who chose the other image.
    """

    row: np.ndarray
    side: np.ndarray
    people: np.ndarray
    annotator: np.ndarray
    others: np.ndarray
    against: np.ndarray


def rated(votes: pl.DataFrame, row: np.ndarray) -> Rated:
    """Return decided votes with what the other raters of their pairs say.

    votes: pair_id, annotator_id, label_0, people. row: their rows of margins. Other raters are all people who voted on the
    pair but the vote's own known annotator, or but one person of a row that counts for several unknown ones.
    """
    side, people = votes["label_0"].to_numpy(), votes["people"].to_numpy().astype(np.int64)
    known = votes["annotator_id"].is_not_null().to_numpy()
    annotator = np.where(known, mar.codes(votes["annotator_id"]), 0)
    annotator = np.where(known, annotator, -1)
    on_pair = np.bincount(row, people)[row] if len(row) else people
    on_first = np.bincount(row, people * side)[row] if len(row) else people
    on_side = np.where(side == 1, on_first, on_pair - on_first)
    own, own_side = np.where(known, people, 1), np.where(known, people, 1)
    # Only who voted more than once on a pair has more than this one vote to leave out.
    several = np.flatnonzero(known & (on_pair > people))
    if len(several):
        _, group = np.unique(row[several] * (annotator.max() + 1) + annotator[several], return_inverse=True)
        own[several] = np.bincount(group, people[several])[group]
        _, group = np.unique(group * 2 + side[several].astype(np.int64), return_inverse=True)
        own_side[several] = np.bincount(group, people[several])[group]
    others, against = on_pair - own, (on_pair - on_side) - (own - own_side)
    return Rated(row, side, people, annotator, others.astype(np.int64), against.astype(np.int64))


def minority(
    votes: pl.DataFrame, margins: pl.DataFrame, metrics: pl.DataFrame, *, em: bool = False
) -> tuple[pl.DataFrame, Lesson]:
    """Return the minority table, one row per decided vote by pair and vote_id, and what it was learned from.

    Args:
        votes: vote_id, pair_id, annotator_id, label_0, people, source of the counted votes.
        margins, metrics: see `margins` and pair_metrics; rows aligned.
        em: fill em_probability.
    """
    votes = votes.filter(pl.col("label_0") != 0.5)
    row = mar.vote_rows(margins, votes)
    order = _by_pair_and_id(row, votes["vote_id"])
    votes, row = votes[order], row[order]
    those = rated(votes, row)
    prompt = mar.codes(margins["prompt_id"])[row]
    logit, stability = (metrics[c].fill_null(np.nan).to_numpy()[row] for c in ("logit", "stability"))
    toward = np.where(those.side == 1, logit, -logit)
    c = np.where(those.side == 1, *(metrics[f"confidence_{i}"].fill_null(np.nan).to_numpy()[row] for i in (0, 1)))
    score = annotator_score(those, toward, prompt)
    probability, lesson = _learned(those, toward, score, margins["prompt_id"].gather(row), votes["source"], stability)
    unknown = np.full(len(row), np.nan)
    numbers = {
        "confidence": c,
        "stability": stability,
        "metric": c * stability,
        "minority_score": cal.sigmoid(-toward),
        "annotator_score": score,
        "minority_probability": unknown if probability is None else probability,
        "em_probability": _em(those, margins, logit) if em else unknown,
        "share_against": np.divide(those.against, those.others, out=unknown.copy(), where=those.others > 0),
    }
    table = votes.select("vote_id", "pair_id", "annotator_id", "label_0", "people").with_columns(
        *(pl.Series(name, values).fill_nan(None) for name, values in numbers.items()),
        others=pl.Series(those.others),
    )
    return table.select(list(schemas.MINORITY.polars_schema)), lesson


def _by_pair_and_id(row: np.ndarray, vote_id: pl.Series) -> np.ndarray:
    """Return the order of votes by row, then by id, so that the order of shards does not show."""
    order = np.argsort(row, kind="stable")
    several = np.flatnonzero((np.bincount(row) > 1)[row[order]]) if len(row) else order
    if len(several):
        among = pl.DataFrame({"row": row[order[several]], "id": vote_id.gather(order[several])})
        order[several] = order[several][among.select(pl.arg_sort_by("row", "id")).to_series().to_numpy()]
    return order


def agreement_surplus(toward: np.ndarray) -> np.ndarray:
    """Return agree - max(p, 1 - p) of votes: 1 where p favours the voted side, less how often one would expect that.

    toward: ensemble logit signed towards the vote, [N]; 0 where it is even or unknown.
    """
    with np.errstate(invalid="ignore"):
        surplus = (toward > 0) - cal.sigmoid(np.abs(toward))
    return np.where(np.isnan(toward) | (toward == 0), 0.0, surplus)


def annotator_score(those: Rated, toward: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Return r of every vote's annotator from his votes on other prompts, [N]; 0 where he is unknown or has none.

    toward: ensemble logit signed towards the vote; prompt: number of its prompt.
    """
    known = np.flatnonzero(those.annotator >= 0)
    result = np.zeros(len(toward))
    if not len(known):
        return result
    who, people = those.annotator[known], those.people[known] * ~np.isnan(toward[known])
    surplus = people * agreement_surplus(toward[known])
    _, here = mar.together(who, prompt[known])
    total, n = (np.bincount(who, v)[who] - np.bincount(here, v)[here] for v in (surplus, people))
    result[known] = total / (n + PRIOR_VOTES)
    return result


def _learned(
    those: Rated, toward: np.ndarray, score: np.ndarray, prompt_id: pl.Series, source: pl.Series, stability: np.ndarray
) -> tuple[np.ndarray | None, Lesson]:
    """Return minority_probability of every vote (None: nothing teaches it), and what it was learned from."""
    x = np.stack([toward, np.abs(toward), score, np.ones(len(toward))], 1)
    has_all = ~np.isnan(toward)
    decided_on_pair = np.bincount(those.row, those.people)[those.row] if len(those.row) else those.people
    is_target = has_all & (decided_on_pair >= LEAST_VOTES) & (2 * those.against != those.others) & (those.others > 0)
    y, weight = (2 * those.against > those.others).astype(float), those.people * is_target
    known = ~np.isnan(stability)
    clamped = float((stability[known] == 1).mean()) if known.any() else None
    folds = mar.folds(prompt_id.to_frame("prompt_id"))
    least = [_least(y, weight, folds != f) for f in range(mar.FOLDS)]
    if not is_target.any() or min(n for n, _ in least) < LEAST_TARGETS or not all(both for _, both in least):
        n = int(weight.sum())
        why = f"uncalibrated: {n} votes have other raters with a majority (on pairs with {LEAST_VOTES} decided votes); "
        why += f"needed without any fold of prompts: {LEAST_TARGETS}, some for and some against the others"
        return None, Lesson((), why, n, None, None, (), clamped)
    scale = np.sqrt(np.average(x[is_target] ** 2, axis=0, weights=weight[is_target]))
    scale[scale == 0] = 1.0
    # The logit is calibrated, and the share of minority votes is what is to be learned: neither is drawn to zero.
    doubt = PROMPTS_OF_DOUBT / cal.prompts_in_fits(prompt_id, weight)
    penalty = cal.RIDGE * np.eye(4) + doubt[:, None, None] * np.diag([0.0, 1.0, 1.0, 0.0])
    weights = cal.fit_cross(np.where(has_all[:, None], x, 0.0) / scale, y, weight, folds, penalty) / scale
    # A prompt without a target is in no fit, so that all targets may judge it.
    is_fitted = prompt_id.is_in(prompt_id.filter(pl.Series(weight > 0)).unique().implode()).to_numpy()
    probability = cal.sigmoid((x * weights[np.where(is_fitted, folds, cal.ALL)]).sum(1))
    people = float(weight.sum())
    lesson = Lesson(
        tuple(sorted(source.filter(pl.Series(is_target)).unique())),
        "calibrated on votes with other raters; the error on sources with one vote per pair cannot be observed",
        int(people),
        float(weight @ y) / people,
        calibration_error(probability[is_target], y[is_target], weight[is_target]),
        tuple(tuple(float(v) for v in w) for w in weights),
        clamped,
    )
    return probability, lesson


def _least(y: np.ndarray, weight: np.ndarray, rows: np.ndarray) -> tuple[float, bool]:
    """Return how many people teach in these rows, and whether some are for and some against."""
    total = float(weight[rows].sum())
    return total, 0 < float((weight * y)[rows].sum()) < total


def calibration_error(p: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """Return sum_b n_b / n |mean p - mean y| over ten equal bins of [0, 1]."""
    bins = np.minimum((p * cal.BINS).astype(np.int64), cal.BINS - 1)
    gap = np.bincount(bins, weight * p, minlength=cal.BINS) - np.bincount(bins, weight * y, minlength=cal.BINS)
    return float(np.abs(gap).sum() / weight.sum())


def _em(those: Rated, margins: pl.DataFrame, logit: np.ndarray) -> np.ndarray:
    """Return the probability that the true side is not the voted one, [N], by joint EM (Raykar et al. 2010).

    A pair has one true side; its prior is sigmoid(b h), h the ensemble logit; an annotator names it with his accuracy,
    whichever it is; unknown annotators share one. The vote itself counts, and nothing is cross-fitted.
    """
    prior = np.full(len(margins), np.nan)
    prior[those.row] = logit
    prior = np.nan_to_num(prior)
    who, sign = those.annotator + 1, 2 * those.side - 1
    slope, accuracy = 1.0, np.full(int(who.max(initial=0)) + 1, _EM_PRIOR[0] / sum(_EM_PRIOR))
    posterior = cal.sigmoid(prior)
    voted = np.bincount(those.row, minlength=len(margins)) > 0
    for _ in range(EM_STEPS):
        before = posterior
        odds = np.log(accuracy / (1 - accuracy))
        spoken = np.bincount(those.row, those.people * sign * odds[who], minlength=len(margins))
        posterior = cal.sigmoid(slope * prior + spoken)
        agree = np.where(those.side == 1, posterior[those.row], 1 - posterior[those.row])
        right, n = (np.bincount(who, those.people * v, minlength=len(accuracy)) for v in (agree, np.ones(len(agree))))
        accuracy = (right + _EM_PRIOR[0]) / (n + sum(_EM_PRIOR))
        slope = float(
            cal.fit_logistic(prior[voted][:, None], posterior[voted], np.ones(int(voted.sum())), cal.RIDGE)[0]
        )
        if np.abs(posterior - before).max(initial=0.0) < 1e-6:
            break
    return np.where(those.side == 1, 1 - posterior[those.row], posterior[those.row])
