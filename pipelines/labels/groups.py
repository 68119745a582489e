"""Groups of annotators who vote alike, and the group that stands behind every pair: what group-robust training reads.

    x_i   = +-z of the pair of vote i, z_k = d_k / rms(d_k), signed towards the vote;  n_i its people
    w_0   = argmin_w sum_i n_i log(1 + exp(-w . x_i))                                       of all annotators together
    w_a   = argmin_w sum_i n_i log(1 + exp(-w . x_i)) + 20/8 (w - w_0)' C (w - w_0)         i: the votes of annotator a
    C     = sum_i n_i x_i x_i' / sum_i n_i;    (w - w')' C (w - w') = mean squared difference of the logits of two people
    groups: k-means of the w_a in the metric of C

A vote tells at most x x' / 4 of w (its Fisher information), so that the penalty is worth 20 votes, in every direction alike,
and what is left of chance in w_a is as large in every direction, as k-means takes it to be; a scorer that says the same as
another, or is measured in another unit, changes no group.

How many groups there are, held-out votes say. Fold by fold of prompts everything is fitted without the fold, and each vote
of the fold is predicted by the pooled weights of its annotator's group (of one group w_0; of several drawn to w_0 by 20 votes
as well). k is the smallest number that the likeliest one does not beat by more than the standard error of the difference (the
one-standard-error rule of Breiman et al. 1984); all votes of one annotator, or on one prompt, are one observation, and the
larger error of the two counts. One group means that differences between annotators are noise, or the votes too few to tell.
Of very many votes every n-th annotator's choose k, as long as a quarter of a million votes of a thousand people remain.

Belongs here: who votes alike. Does not belong here: how reliable people are (`annotators`), what a loss makes of groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import polars as pl

from pipelines import schemas
from pipelines.labels import calibration as cal
from pipelines.labels import margins as mar
from pipelines.labels.annotators import UNKNOWN

LEAST_VOTES = 20
"""Decided votes, on pairs that every scorer scored, without which nothing is said of an annotator."""
PRIOR_VOTES = 20
"""How many votes the belief is worth that an annotator, or a group, is like all."""
MOST_GROUPS = 5
SAMPLE = 250_000, 1_000
"""Votes and annotators that are enough to choose the number of groups by."""
NO_GROUP = -1
RESTARTS = 10
LEAST_GAIN = 1e-4
"""Share of its cost that a step of k-means must save for another one to follow."""
_NEWTON_STEPS = 100
_BLOCK = 1 << 13
"""Rows that fit into a processor's cache."""


@dataclass(frozen=True)
class Finding:
    """What the groups were read from and how sure they are, for the manifest.

    groups: how many there are; 0: nobody has enough votes. is_noise: there is no second group that held-out votes show.
    annotators, votes: whose groups are told, and the people behind their votes; judged: those that chose how many groups.
    log_likelihood: of held-out votes, for 1, 2, ... groups, nats per vote; gain: that above one group; gain_error: its
    standard error (null: a single cluster).
    members, weights: annotators of every group and its pooled weights, by scorer in units of z.
    """

    groups: int
    is_noise: bool
    note: str
    annotators: int
    votes: int
    judged: int = 0
    log_likelihood: tuple[float, ...] = ()
    gain: tuple[float, ...] = ()
    gain_error: tuple[float | None, ...] = ()
    members: tuple[int, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()

    def facts(self) -> dict[str, object]:
        """Return plain values for a manifest."""
        return asdict(self)


# --- the tables ------------------------------------------------------------------------------------------------------


def annotator_groups(
    votes: pl.DataFrame, margins: pl.DataFrame, scorers: Sequence[str]
) -> tuple[pl.DataFrame, Finding]:
    """Return the annotator_groups table, sorted by id, and what it was read from.

    Groups are numbered by their votes: 0 has most.

    Args:
        votes: pair_id (or row, see margins.vote_rows), annotator_id, label_0, people of the counted votes.
        margins: of `margins.margins`.
    """
    everyone = _Everyone.of(votes, margins, scorers)
    is_told = (everyone.count >= LEAST_VOTES) & (everyone.names != UNKNOWN).to_numpy()
    group = np.full(len(is_told), NO_GROUP)
    weights = np.full((len(is_told), len(scorers)), np.nan)
    if is_told.any():
        voters = everyone.voters(is_told)
        group[is_told], weights[is_told], finding = _found(voters)
    else:
        why = f"no group: no annotator has {LEAST_VOTES} decided votes on pairs that every scorer scored"
        finding = Finding(0, True, why, 0, 0)
    status = np.where(is_told, "ok", np.where(everyone.names == UNKNOWN, "unknown", "few_votes"))
    return everyone.table(group, status, weights, scorers), finding


def given_groups(
    votes: pl.DataFrame, margins: pl.DataFrame, scorers: Sequence[str], given: pl.DataFrame
) -> tuple[pl.DataFrame, Finding]:
    """Return the annotator_groups table of groups that somebody gives, and what there is to say of it.

    given: annotator_id (each once) and group (0, 1, ...); people of no counted vote may be among them. Others: see
    annotator_groups.

    Raises:
        ValueError: a column is missing or of another type, an annotator comes twice, or a group is null or out of range.
    """
    _check(given)
    everyone = _Everyone.of(votes, margins, scorers)
    mine = everyone.names.to_frame("annotator_id").join(given, on="annotator_id", how="left", maintain_order="left")
    group = mine["group"].cast(pl.Int64).fill_null(NO_GROUP).to_numpy()
    is_told = group >= 0
    status = np.where(is_told, "ok", np.where(everyone.names == UNKNOWN, "unknown", "not_given"))
    members = np.bincount(group[is_told]) if is_told.any() else np.zeros(0, int)
    groups = int(np.count_nonzero(members))
    absent = len(given) - int(is_told.sum())
    why = f"given, not found; {absent} of the {len(given)} annotators given have no counted vote"
    told = int(is_told.sum()), int(everyone.count[is_told].sum())
    finding = Finding(groups, False, why, *told, members=tuple(int(m) for m in members))
    return everyone.table(group, status, np.full((len(group), len(scorers)), np.nan), scorers), finding


def _check(given: pl.DataFrame) -> None:
    found = dict(given.schema)
    if found.get("annotator_id") != pl.String or not found.get("group", pl.Null()).is_integer():
        raise ValueError(f"expected the columns annotator_id (String) and group (integer), found {found}")
    if bad := len(given) - int(given["group"].is_between(0, len(given) - 1).sum()):
        raise ValueError(
            f"column group: {bad} of {len(given)} are null, negative, or {len(given)} and more; leave out whom you give no "
            f"group, and number groups from 0"
        )
    ids = given["annotator_id"]
    if ids.null_count() or ids.n_unique() < len(given) or UNKNOWN in ids:
        raise ValueError(
            f"column annotator_id: ids repeat, are null, or {UNKNOWN!r}; give every known annotator one group"
        )


def pair_groups(pairs: pl.DataFrame, votes: pl.DataFrame, annotators: pl.DataFrame) -> pl.DataFrame:
    """Return the pair_groups table, in the order of `pairs`: the group of most of those who voted for the humans' side.

    Args:
        pairs: pair_id, human_label_0.
        votes: pair_id (or row: of pairs), annotator_id, label_0, people of the counted votes.
        annotators: the annotator_groups table.
    """
    label = pairs["human_label_0"].fill_null(0.5).to_numpy()
    side = np.sign(label - 0.5)
    known = annotators.filter(pl.col("group") >= 0).select("annotator_id", "group")
    row = mar.vote_rows(pairs, votes)
    with_side = np.sign(votes["label_0"].to_numpy() - 0.5) * side[row] > 0
    frame = votes.select("annotator_id", "people").with_columns(row=pl.Series(row)).filter(pl.Series(with_side))
    frame = frame.join(known, on="annotator_id", how="inner", maintain_order="left")
    group, at, people = (frame[c].to_numpy().astype(np.int64) for c in ("group", "row", "people"))
    width = int(group.max(initial=0)) + 1
    distinct, which = np.unique(at * width + group, return_inverse=True)
    of, backed = distinct // width, np.bincount(which, people, minlength=len(distinct))
    most = np.zeros(len(pairs))
    np.maximum.at(most, of, backed)
    first = backed == most[of]
    leaders = np.bincount(of[first], minlength=len(pairs))
    result = np.full(len(pairs), NO_GROUP)
    result[of[first]] = (distinct % width)[first]
    result[leaders != 1] = NO_GROUP
    status = np.select([side == 0, leaders == 0, leaders > 1], ["no_side", "unknown", "tied"], "ok")
    return pl.DataFrame({"pair_id": pairs["pair_id"], "group": pl.Series(result, dtype=pl.Int32), "status": status})


# --- votes as arrays -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Everyone:
    """All annotators by name, [M] with all unknown ones as one, and the votes that groups can be read from, [N].

    count: people behind those votes, [M]; who: number of a vote's annotator; sign: 1 for image_0, -1; z: all pairs', [P, K].
    """

    names: pl.Series
    count: np.ndarray
    who: np.ndarray
    row: np.ndarray
    sign: np.ndarray
    people: np.ndarray
    z: np.ndarray
    prompt_id: pl.Series

    @classmethod
    def of(cls, votes: pl.DataFrame, margins: pl.DataFrame, scorers: Sequence[str]) -> _Everyone:
        """Return the annotators of these votes; decided votes on pairs that every scorer scored can be read."""
        d = mar.matrix(margins, scorers)
        ids = votes["annotator_id"].fill_null(UNKNOWN)
        names, who, row = ids.unique().sort(), mar.codes(ids), mar.vote_rows(margins, votes)
        sign, people = np.sign(votes["label_0"].to_numpy() - 0.5), votes["people"].to_numpy().astype(float)
        used = np.flatnonzero((sign != 0) & ~np.isnan(d).any(1)[row])
        count = np.bincount(who[used], people[used], minlength=len(names))
        return cls(names, count, who[used], row[used], sign[used], people[used], d / mar.rms(d), margins["prompt_id"])

    def voters(self, is_told: np.ndarray) -> _Voters:
        """Return the votes of some annotators, [M], by annotator."""
        mine = np.flatnonzero(is_told[self.who])
        mine = mine[np.argsort(self.who[mine], kind="stable")]
        row = self.row[mine]
        x = np.stack([column[row] * self.sign[mine] for column in self.z.T])
        ends = np.concatenate([[0], np.cumsum(np.bincount(self.who[mine], minlength=len(is_told))[is_told])])
        folds = mar.folds(self.prompt_id.to_frame("prompt_id"))
        return _Voters(x, self.people[mine], folds[row], mar.codes(self.prompt_id)[row], ends)

    def table(self, group: np.ndarray, status: np.ndarray, weights: np.ndarray, scorers: Sequence[str]) -> pl.DataFrame:
        """Return the annotator_groups table of these columns, [M] and [M, K]; an unknown weight is NaN."""
        columns = {f"weight_{s}": pl.Series(w).fill_nan(None) for s, w in zip(scorers, weights.T, strict=True)}
        frame = {
            "annotator_id": self.names,
            "votes": pl.Series(self.count).round().cast(pl.Int64),
            "group": pl.Series(group, dtype=pl.Int32),
            "status": pl.Series(status, dtype=pl.String),
            **columns,
        }
        return pl.DataFrame(frame).select(list(schemas.ANNOTATOR_GROUPS.of(scorers).polars_schema))


@dataclass(frozen=True)
class _Voters:
    """Votes of A annotators, those of annotator a at ends[a] .. ends[a+1], [A + 1]: x [K, N], people, fold and prompt [N]."""

    x: np.ndarray
    people: np.ndarray
    fold: np.ndarray
    prompt: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    def every(self, step: int) -> _Voters:
        """Return the votes of annotators 0, step, 2 step, ..."""
        is_in = self.who % step == 0
        ends = np.concatenate([[0], np.cumsum(np.diff(self.ends)[::step])])
        return _Voters(self.x[:, is_in], self.people[is_in], self.fold[is_in], self.prompt[is_in], ends)

    @cached_property
    def who(self) -> np.ndarray:
        """The number of every vote's annotator, [N]."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends))

    @cached_property
    def metric(self) -> np.ndarray:
        """C, [K, K], with so much added that it has an inverse where scorers agree."""
        return (self.people * self.x) @ self.x.T / self.people.sum() + cal.RIDGE * np.eye(len(self.x))

    @cached_property
    def prior(self) -> np.ndarray:
        """The penalty that is worth PRIOR_VOTES votes, [K, K]."""
        return PRIOR_VOTES / 4 * self.metric

    def blocks(self) -> Iterator[slice]:
        """Yield runs of annotators whose rows fit into a processor's cache; one alone may have more."""
        first = 0
        while first < len(self):
            last = max(first + 1, int(np.searchsorted(self.ends, self.ends[first] + _BLOCK, side="right")) - 1)
            yield slice(first, last)
            first = last

    def logits(self, w: np.ndarray) -> np.ndarray:
        """Return w . x of every vote under its annotator's weights, [N]; w: [A, K]."""
        return np.concatenate([self._logits(run, w) for run in self.blocks()])

    def _logits(self, run: slice, w: np.ndarray) -> np.ndarray:
        votes = np.diff(self.ends[run.start : run.stop + 1])
        return (self.x[:, self._rows(run)] * np.repeat(w[run].T, votes, axis=1)).sum(0)

    def _rows(self, run: slice) -> slice:
        return slice(self.ends[run.start], self.ends[run.stop])

    def slopes(self, w: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return gradient [A, K] and Hessian [A, K, K] of the loss of every annotator's votes; w: [A, K], weight: [N]."""
        scorers = len(self.x)
        i, j = np.triu_indices(scorers)
        gradient, upper = np.empty((scorers, len(self))), np.empty((len(i), len(self)))
        for run in self.blocks():
            x, starts = self.x[:, self._rows(run)], self.ends[run] - self.ends[run.start]
            p = cal.sigmoid(-self._logits(run, w))
            pull = weight[self._rows(run)] * p
            gradient[:, run] = -np.add.reduceat(pull * x, starts, axis=1)
            bent = pull * (1 - p) * x
            upper[:, run] = np.add.reduceat(bent[i] * x[j], starts, axis=1)
        hessian = np.empty((len(self), scorers, scorers))
        hessian[:, i, j] = hessian[:, j, i] = upper.T
        return gradient.T, hessian

    def fit(
        self, weight: np.ndarray, group: np.ndarray, start: np.ndarray, anchor: np.ndarray, penalty: np.ndarray
    ) -> np.ndarray:
        """Return for every group the w that minimises the loss of its votes + (w - anchor)' penalty (w - anchor) / 2, [G, K].

        Damped Newton steps, of each group by itself, from `start`, [G, K].

        Args:
            weight: of the votes, [N]; group: of the annotators, 0 .. G-1, [A]; anchor: [K]; penalty: [K, K].
        """

        def slopes(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            gradient, hessian = (_sums(v, group, len(w)) for v in self.slopes(w[group], weight))
            return gradient + (w - anchor) @ penalty, hessian + penalty

        w, (gradient, hessian) = start, slopes(start)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        for _ in range(_NEWTON_STEPS):
            # Newton's error is squared by every step: behind a step so small nothing is left to gain.
            if np.abs(step).max() < 1e-4:
                break
            tried_gradient, tried_hessian = slopes(w - step)
            # Margins with heavy tails make a full step overshoot; a shorter one always lowers the gradient.
            is_better = np.linalg.norm(tried_gradient, axis=1) < np.linalg.norm(gradient, axis=1)
            w = np.where(is_better[:, None], w - step, w)
            gradient = np.where(is_better[:, None], tried_gradient, gradient)
            hessian = np.where(is_better[:, None, None], tried_hessian, hessian)
            full = np.linalg.solve(hessian, gradient[..., None])[..., 0]
            step = np.where(is_better[:, None], full, step / 2)
        return w - step


def _sums(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Return the sum of values, [A, ...], over every group, [groups, ...]."""
    total = np.zeros((groups, *values.shape[1:]))
    np.add.at(total, group, values)
    return total


# --- finding groups --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """w_0, [K], and w_a, [A, K]."""

    pooled: np.ndarray
    own: np.ndarray


def _found(voters: _Voters) -> tuple[np.ndarray, np.ndarray, Finding]:
    """Return the group of every annotator, [A], their weights, [A, K], and the finding."""
    found = _weights(voters, voters.people)
    step = max(1, min(int(voters.people.sum()) // SAMPLE[0], len(voters) // SAMPLE[1]))
    some = voters.every(step)
    chosen, numbers = _chosen(some, _held_out(some, _Weights(found.pooled, found.own[::step])))
    group = _by_votes(k_means(found.own @ np.linalg.cholesky(voters.metric), chosen), voters)
    of_groups, groups = _of_groups(voters, voters.people, group, found), int(group.max()) + 1
    many = f"{groups} groups: no other number predicts held-out votes better by more than a standard error"
    noise = "one group: more do not predict held-out votes better by more than a standard error, so they would be noise"
    return (
        group,
        found.own,
        Finding(
            groups,
            groups == 1,
            noise if groups == 1 else many,
            len(voters),
            round(voters.people.sum()),
            round(some.people.sum()),
            **numbers,
            members=tuple(int(n) for n in np.bincount(group)),
            weights=tuple(tuple(float(v) for v in w) for w in of_groups),
        ),
    )


def _weights(voters: _Voters, weight: np.ndarray, near: _Weights | None = None) -> _Weights:
    """Return the weights of votes that count so much, [N]. near: where to look for them."""
    nothing, together = np.zeros(len(voters.x)), np.zeros(len(voters), np.int64)
    ridge = cal.RIDGE * max(1.0, weight.sum()) * np.eye(len(voters.x))
    pooled = voters.fit(weight, together, (nothing if near is None else near.pooled)[None], nothing, ridge)[0]
    start = np.repeat(pooled[None], len(voters), 0) if near is None else near.own
    return _Weights(pooled, voters.fit(weight, np.arange(len(voters)), start, pooled, voters.prior))


def _of_groups(voters: _Voters, weight: np.ndarray, group: np.ndarray, found: _Weights) -> np.ndarray:
    """Return the pooled weights of every group, [G, K]; of one group w_0 itself."""
    groups = int(group.max()) + 1
    if groups == 1:
        return found.pooled[None]
    mean = _sums(found.own, group, groups) / np.bincount(group)[:, None]
    return voters.fit(weight, group, mean, found.pooled, voters.prior)


def _held_out(voters: _Voters, near: _Weights) -> np.ndarray:
    """Return the log-likelihood of every vote for 1, 2, ... groups that were found and fitted without its fold, [k, N]."""
    root, most = np.linalg.cholesky(voters.metric), min(MOST_GROUPS, len(voters))
    result = np.zeros((most, len(voters.people)))

    def without(fold: int) -> None:
        held = voters.fold == fold
        weight = np.where(held, 0.0, voters.people)
        found = _weights(voters, weight, near)
        for k in range(1, most + 1):
            group = k_means(found.own @ root, k)
            w = _of_groups(voters, weight, group, found)
            result[k - 1, held] = -np.logaddexp(0, -voters.logits(w[group])[held])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(without, np.unique(voters.fold)))
    return result


def _chosen(voters: _Voters, likelihood: np.ndarray) -> tuple[int, dict[str, tuple]]:
    """Return the number of groups, and what Finding says of all numbers. likelihood: [k, N]."""
    clusters = (voters.who, voters.prompt)

    def above(a: int, b: int) -> tuple[float, float]:
        return _difference(likelihood[a] - likelihood[b], voters.people, clusters)

    mean = likelihood @ voters.people / voters.people.sum()
    best = int(mean.argmax())
    within = [k for k in range(best + 1) if np.less_equal(*above(best, k))]
    gains = [above(k, 0) for k in range(len(mean))]
    return within[0] + 1, {
        "log_likelihood": tuple(float(m) for m in mean),
        "gain": tuple(g for g, _ in gains),
        "gain_error": tuple(e if np.isfinite(e) else None for _, e in gains),
    }


def _difference(values: np.ndarray, people: np.ndarray, clusters: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the mean of values over people and its standard error: the largest of those by each kind of cluster.

    error^2 = C / (C - 1) sum_c (sum_{i in c} n_i (v_i - mean))^2 / n^2; infinite of one cluster, which tells nothing.
    """
    mean = float(values @ people / people.sum())
    errors = []
    for cluster in clusters:
        parts = np.bincount(cluster, people * (values - mean))[np.bincount(cluster, people) > 0]
        spread = len(parts) / (len(parts) - 1) * (parts**2).sum() if len(parts) > 1 else np.inf
        errors.append(float(spread**0.5 / people.sum()))
    return mean, max(errors)


def _by_votes(group: np.ndarray, voters: _Voters) -> np.ndarray:
    """Return the groups with new numbers: more votes come first, then whose first annotator does."""
    _, first = np.unique(group, return_index=True)
    votes = np.bincount(group, np.add.reduceat(voters.people, voters.ends[:-1]))
    place = np.empty(len(first), np.int64)
    place[np.lexsort((first, -votes))] = np.arange(len(first))
    return place[group]


def k_means(points: np.ndarray, k: int) -> np.ndarray:
    """Return the cluster of every point, int64 [N]: the cheapest of RESTARTS seeded runs, the same every time.

    Lloyd's steps (1982) from centres of k-means++ (Arthur and Vassilvitskii 2007), Euclidean distances. There are fewer than
    k clusters where fewer points differ.

    points: [N, D].
    """
    rng = np.random.default_rng(0)
    best, least = np.zeros(len(points), np.int64), np.inf
    for _ in range(RESTARTS if k > 1 else 0):
        centres, before = _first_centres(points, k, rng), np.inf
        while True:
            distance = _distances(points, centres)
            cluster = distance.argmin(1)
            cost = distance.min(1).sum()
            # Where clusters are noise the last points wander for long, for nothing.
            if cost >= before * (1 - LEAST_GAIN):
                break
            centres, before = _centres(points, cluster, centres), cost
        if cost < least:
            best, least = cluster, cost
    return np.unique(best, return_inverse=True)[1]


def _first_centres(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Return k points, each drawn by its squared distance to the nearest one before it, [k, D]."""
    centres = points[[rng.integers(len(points))]]
    while len(centres) < k:
        far = np.cumsum(_distances(points, centres).min(1))
        drawn = np.searchsorted(far, rng.random() * far[-1], side="right")
        centres = np.vstack([centres, points[min(drawn, len(points) - 1)]])
    return centres


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the squared distance of every point to every centre, [N, k]."""
    squares = [(v**2).sum(1) for v in (points, centres)]
    return np.maximum(squares[0][:, None] + squares[1] - 2 * points @ centres.T, 0)


def _centres(points: np.ndarray, cluster: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the mean of every cluster's points, [k, D]; one that lost all stays where it was and may win some back."""
    count = np.bincount(cluster, minlength=len(before))[:, None]
    total = np.stack([np.bincount(cluster, v, minlength=len(before)) for v in points.T], 1)
    return np.where(count > 0, total / np.maximum(count, 1), before)


def adjusted_rand_index(first: np.ndarray, second: np.ndarray) -> float:
    """Return how well two ways to group the same things agree: 1 the same up to names, 0 on average by chance.

    (S - E) / ((P + Q) / 2 - E), E = P Q / C(N, 2): S pairs together in both, P in the first, Q in the second (Hubert and
    Arabie 1985, eq. 5). Where nothing is to tell (both all together, or both all apart) it is 1.

    first, second: group of every thing, [N], of any kind.
    """
    a, b = (np.unique(v, return_inverse=True)[1] for v in (first, second))
    table = np.zeros((a.max(initial=0) + 1, b.max(initial=0) + 1))
    np.add.at(table, (a, b), 1)

    def pairs(count: np.ndarray) -> float:
        return float((count * (count - 1) / 2).sum())

    both, p, q = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = p * q / max(1.0, pairs(table.sum(keepdims=True)))
    return 1.0 if (p + q) / 2 == expected else (both - expected) / ((p + q) / 2 - expected)
