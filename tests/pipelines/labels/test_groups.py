"""Groups of annotators: planted tastes are found, noise is said to be noise, and every number is what its formula says."""

import itertools
import shutil

import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize

from pipelines import catalogue, schemas, steps
from pipelines.config import Config, ConfigError, LabelsConfig, ScorerConfig, small_world
from pipelines.labels import calibration as cal
from pipelines.labels import groups as gro
from pipelines.labels import margins as mar
from pipelines.scoring import batches
from pipelines.tables import Store

SCORERS = ("a", "b", "c")
OPPOSITE = ((1.5, -1.0, 0.5), (-1.5, 1.0, 0.5))


@pytest.fixture(scope="module")
def crowd(margins_of, votes_of, hexadecimal):
    """Make margins, votes and the taste of people who choose by one of several weights of z, a pair of their own each time."""

    def make(tastes, people=40, each=60, seed=0, per_prompt=4, scale=(1.0, 20.0, 0.1), shares=None):
        rng = np.random.default_rng(seed)
        n = people * each
        common = rng.normal(size=(n, 1))
        # Scorers agree more than not, as real ones do.
        z = 0.7 * common + 0.7 * rng.normal(size=(n, len(tastes[0])))
        taste = rng.permutation(np.resize(np.arange(len(tastes)) if shares is None else shares, people))
        who = np.repeat(np.arange(people), each)
        label = (rng.random(n) < cal.sigmoid((z * np.array(tastes)[taste[who]]).sum(1))).astype(float)
        d = {s: column * f for s, column, f in zip(SCORERS, z.T, scale, strict=False)}
        prompts = [hexadecimal(f"prompt {k // per_prompt}") for k in rng.permutation(n)]
        margins = margins_of(d, prompt_id=prompts)
        votes = votes_of(list(zip(margins["pair_id"], [f"p{w:03d}" for w in who], label, strict=True)))
        return margins, votes, taste

    return make


def found(margins, votes, scorers=SCORERS):
    table, finding = gro.annotator_groups(votes, margins, scorers)
    return schemas.ANNOTATOR_GROUPS.conform(table), finding


# --- what is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_two_opposite_tastes_are_found(crowd, seed):
    margins, votes, taste = crowd(OPPOSITE, seed=seed)
    table, finding = found(margins, votes)
    assert (finding.groups, finding.is_noise, finding.note[:8]) == (2, False, "2 groups")
    assert gro.adjusted_rand_index(table["group"].to_numpy(), taste) > 0.9
    assert finding.gain[1] > 5 * finding.gain_error[1]


def test_three_tastes_are_found(crowd):
    margins, votes, taste = crowd(((2, 0, 0), (0, 2, 0), (0, 0, 2)), people=60, each=80)
    table, finding = found(margins, votes)
    assert finding.groups == 3
    assert gro.adjusted_rand_index(table["group"].to_numpy(), taste) > 0.9


def test_where_all_have_one_taste_there_is_one_group_and_it_is_said_that_more_would_be_noise(crowd):
    ones = 0
    for seed in range(20):
        margins, votes, _ = crowd(((1.0, 0.5, 0.2),), people=24, each=40, seed=seed)
        table, finding = found(margins, votes)
        assert finding.is_noise == (finding.groups == 1) == finding.note.startswith("one group")
        assert table["group"].n_unique() == finding.groups
        ones += finding.groups == 1
    # By chance a needless group beats one by more than a standard error in less than one of six.
    assert ones >= 18


def test_people_who_only_toss_coins_are_one_group(crowd):
    margins, votes, _ = crowd(((0.0, 0.0, 0.0),), people=24, each=40, seed=5)
    table, finding = found(margins, votes)
    assert (finding.groups, finding.is_noise) == (1, True)
    assert set(table["group"]) == {0}


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_group_is_0_and_its_weights_are_its_taste(crowd, seed):
    margins, votes, taste = crowd(OPPOSITE, people=60, each=100, shares=(1, 1, 1, 0), seed=seed)
    table, finding = found(margins, votes)
    assert finding.members == (45, 15)
    assert (table["group"].to_numpy() == (taste == 0)).mean() > 0.95
    # z is d over its rms, and d was drawn with a variance of 0.98.
    expected = np.array(OPPOSITE[::-1]) * 0.98**0.5
    assert np.abs(np.array(finding.weights) - expected).max() < 0.25


def test_groups_are_numbered_by_votes_and_then_by_whose_annotator_comes_first():
    people = np.array([1.0, 1, 1, 1, 2, 1, 1])
    ends = np.array([0, 1, 3, 4, 5, 7])
    voters = gro._Voters(np.ones((1, 7)), people, np.zeros(7, np.int8), np.arange(7), ends)
    # Votes of the annotators: 1, 2, 1, 2, 2; of the groups: 2, 2, 4 without the new names.
    assert gro._by_votes(np.array([1, 0, 1, 2, 2]), voters).tolist() == [1, 2, 1, 0, 0]


def test_what_two_nearly_equal_scorers_leave_open_hides_no_taste(margins_of, votes_of, hexadecimal):
    """How a weight is shared between them is mostly chance, and moves few logits; k-means of bare weights sees nothing else."""
    rng = np.random.default_rng(0)
    n, people = 3_000, 30
    z = rng.normal(size=(n, 2))
    z = np.column_stack([z[:, 0], z[:, 0] + 0.02 * rng.normal(size=n), z[:, 1]])
    who = np.repeat(np.arange(people), n // people)
    taste = np.arange(people) % 2
    label = (rng.random(n) < cal.sigmoid(z[:, 0] + (2 * taste[who] - 1) * 1.2 * z[:, 2])).astype(float)
    margins = margins_of(dict(zip(SCORERS, z.T, strict=True)), prompt_id=[hexadecimal(k) for k in range(n)])
    votes = votes_of(list(zip(margins["pair_id"], [f"p{w:03d}" for w in who], label, strict=True)))
    table, finding = found(margins, votes)
    assert finding.groups == 2
    assert gro.adjusted_rand_index(table["group"].to_numpy(), taste) > 0.9
    bare = table.select(f"weight_{s}" for s in SCORERS).to_numpy()
    assert gro.adjusted_rand_index(gro.k_means(bare, 2), taste) < 0.2


def test_everything_is_the_same_again_and_with_the_images_of_all_pairs_swapped(crowd, swapped):
    margins, votes, _ = crowd(OPPOSITE, people=24, each=40)
    table, finding = found(margins, votes)
    again, finding_again = found(margins, votes)
    assert again.equals(table)
    assert finding_again == finding
    there, finding_there = found(swapped(margins), votes.with_columns(label_0=1 - pl.col("label_0")))
    assert there.equals(table)
    assert finding_there == finding


def test_the_order_of_votes_and_scorers_changes_the_last_bits_only(crowd):
    margins, votes, _ = crowd(OPPOSITE, people=24, each=40)
    table, finding = found(margins, votes)
    there, finding_there = found(margins, votes.sample(fraction=1, shuffle=True, seed=1), SCORERS[::-1])
    assert there["group"].equals(table["group"])
    for s in SCORERS:
        assert np.abs((there[f"weight_{s}"] - table[f"weight_{s}"]).to_numpy()).max() < 1e-9
    assert finding_there.gain == pytest.approx(finding.gain, abs=1e-9)


def test_the_unit_of_a_scorer_changes_no_group_and_a_scorer_that_says_the_same_as_another_none(crowd):
    margins, votes, _ = crowd(OPPOSITE, people=24, each=40)
    table, finding = found(margins, votes)
    scaled, _ = found(margins.with_columns(pl.col("score_0_a", "score_1_a") * 64), votes)
    assert scaled.equals(table)
    doubled = margins.with_columns(score_0_d="score_0_a", score_1_d="score_1_a")
    there, finding_there = found(doubled, votes, (*SCORERS, "d"))
    assert there["group"].equals(table["group"])
    both = (there["weight_a"] + there["weight_d"] - table["weight_a"]).to_numpy()
    assert np.abs(both).max() < 1e-3
    assert finding_there.gain == pytest.approx(finding.gain, abs=1e-4)


# --- who has a group -----------------------------------------------------------------------------------------------


def test_who_has_fewer_than_20_decided_votes_on_pairs_with_all_scores_has_no_group(crowd):
    margins, votes, _ = crowd(OPPOSITE, people=24, each=40)
    first = votes.filter(annotator_id="p000")
    votes = votes.filter(pl.col("annotator_id") != "p000")
    # p001 keeps 19, p002 20, p003 20 of which one is a tie, p004 20 of which one pair lacks a score.
    keep = dict.fromkeys(("p002", "p003", "p004"), 20) | {"p001": 19}
    rank = pl.int_range(pl.len()).over("annotator_id")
    votes = votes.filter(rank < pl.col("annotator_id").replace_strict(keep, default=40))
    is_first = rank == 0
    votes = votes.with_columns(
        label_0=pl.when(is_first & (pl.col("annotator_id") == "p003")).then(0.5).otherwise("label_0")
    )
    lacking = votes.filter(is_first & (pl.col("annotator_id") == "p004"))["pair_id"].item()
    margins = margins.with_columns(score_0_b=pl.when(pl.col("pair_id") != lacking).then("score_0_b"))
    votes = pl.concat([votes, first.with_columns(annotator_id=pl.lit(None, pl.String))])
    table, finding = found(margins, votes)
    of = table.rows_by_key("annotator_id", named=True, unique=True)
    assert {w: (of[w]["votes"], of[w]["status"]) for w in ("p001", "p002", "p003", "p004", "unknown")} == {
        "p001": (19, "few_votes"),
        "p002": (20, "ok"),
        "p003": (19, "few_votes"),
        "p004": (19, "few_votes"),
        "unknown": (40, "unknown"),
    }
    without = table.filter(pl.col("status") != "ok")
    assert set(without["group"]) == {-1}
    assert without["weight_a"].null_count() == len(without) == 4
    assert (finding.annotators, finding.votes) == (20, 19 * 40 + 20)
    assert table.filter(status="ok").select(pl.col("group", "weight_c").null_count()).row(0) == (0, 0)
    assert table["annotator_id"].to_list() == [*(f"p{k:03d}" for k in range(1, 24)), "unknown"]


def test_a_vote_that_counts_for_several_people_counts_so_often(crowd):
    margins, votes, _ = crowd(OPPOSITE, people=8, each=30)
    table, _ = found(margins, votes.with_columns(people=pl.lit(3, pl.Int64)))
    thrice, _ = found(margins, pl.concat([votes] * 3))
    assert table["votes"].to_list() == [90] * 8
    for s in SCORERS:
        assert np.abs((table[f"weight_{s}"] - thrice[f"weight_{s}"]).to_numpy()).max() < 1e-9


def test_without_votes_and_with_few_of_everybody_there_are_no_groups(margins_of, votes_of):
    margins = margins_of({"a": [1.0]}, ["x"])
    for rows, count in (([], 0), ([("x", "p", 1.0), ("x", None, 0.0), ("x", "q", 0.5)], 3)):
        table, finding = found(margins, votes_of(rows), ["a"])
        assert len(table) == count
        assert set(table["group"]) <= {-1}
        assert (finding.groups, finding.is_noise, finding.votes) == (0, True, 0)
        assert finding.note.startswith("no group")


def test_one_annotator_alone_is_one_group(crowd):
    margins, votes, _ = crowd(OPPOSITE[:1], people=1, each=30)
    table, finding = found(margins, votes)
    assert table["group"].to_list() == [0]
    assert (finding.groups, finding.is_noise) == (1, True)
    assert finding.gain_error == (None,)


# --- the numbers ---------------------------------------------------------------------------------------------------


def signed(margins, votes):
    d = mar.matrix(margins, SCORERS)
    z = (d / mar.rms(d))[mar.rows_of(margins, votes["pair_id"])]
    return z * (2 * votes["label_0"].to_numpy() - 1)[:, None]


def test_weights_minimise_the_loss_of_an_annotators_or_a_groups_votes_with_a_prior_of_20(crowd):
    margins, votes, _ = crowd(OPPOSITE, people=12, each=40)
    table, finding = found(margins, votes)
    x = signed(margins, votes)
    pooled = cal.fit_logistic(x, np.ones(len(x)), np.ones(len(x)), cal.RIDGE)
    metric = x.T @ x / len(x)

    def expected(mine):
        def cost(w):
            return np.logaddexp(0, -mine @ w).sum() + 20 / 8 * (w - pooled) @ metric @ (w - pooled)

        return pytest.approx(minimize(cost, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x, abs=1e-4)

    for who in ("p000", "p003", "p011"):
        own = table.filter(annotator_id=who).select(f"weight_{s}" for s in SCORERS).row(0)
        assert own == expected(x[(votes["annotator_id"] == who).to_numpy()])
    assert finding.groups == 2
    group = votes.join(table, on="annotator_id", maintain_order="left")["group"].to_numpy()
    for g, weights in enumerate(finding.weights):
        assert weights == expected(x[group == g])


def test_huge_margins_on_both_sides_do_not_throw_a_fit_out():
    """From where p is 0 or 1 a whole Newton step goes forty times too far, and the next one back again."""
    x = np.concatenate([np.repeat([40.0, -40.0], [9, 11]), np.random.default_rng(0).normal(size=20)])
    voters = gro._Voters(x[None], np.ones(40), np.zeros(40, np.int8), np.arange(40), np.array([0, 20, 40]))
    w = voters.fit(voters.people, np.arange(2), np.full((2, 1), 2.0), np.array([2.0]), np.array([[5.0]]))
    for mine, own in zip((x[:20], x[20:]), w[:, 0], strict=True):
        gradient = -cal.sigmoid(-mine * own) @ mine + 5 * (own - 2)
        assert abs(gradient) < 1e-3


def test_the_likelihood_of_one_group_is_that_of_the_pooled_logistic_without_the_votes_fold(crowd):
    margins, votes, _ = crowd(OPPOSITE, people=12, each=30)
    _, finding = found(margins, votes)
    x, folds = signed(margins, votes), mar.folds(margins)[mar.rows_of(margins, votes["pair_id"])]
    assert set(folds) == set(range(5))
    w = cal.fit_cross(x, np.ones(len(x)), np.ones(len(x)), folds, cal.RIDGE * np.eye(3))
    expected = np.log(cal.sigmoid((x * w[folds]).sum(1))).mean()
    assert finding.log_likelihood[0] == pytest.approx(expected, abs=1e-6)
    assert len(finding.log_likelihood) == gro.MOST_GROUPS
    gains = np.array(finding.log_likelihood) - finding.log_likelihood[0]
    assert finding.gain == pytest.approx(gains, abs=1e-12)


def test_held_out_votes_do_not_choose_the_groups_that_predict_them(crowd):
    """People whose votes on one fold of prompts are another taste's: in sample that is two groups, held out nothing."""
    margins, votes, _ = crowd(OPPOSITE, people=24, each=40)
    rng = np.random.default_rng(1)
    # Everybody's taste is tossed anew for every fold.
    fold = mar.folds(margins)[mar.rows_of(margins, votes["pair_id"])]
    turned = rng.random((24, 5)) < 0.5
    flip = turned[votes["annotator_id"].str.slice(1).cast(pl.Int64).to_numpy(), fold]
    votes = votes.with_columns(label_0=pl.when(pl.Series(flip)).then(1 - pl.col("label_0")).otherwise("label_0"))
    _, finding = found(margins, votes)
    assert finding.groups == 1
    assert max(finding.gain[1:]) < 0


def test_the_error_of_a_gain_is_that_of_the_larger_clusters_by_hand():
    values, people = np.array([1.0, 3.0, 2.0, 2.0]), np.array([1.0, 1.0, 2.0, 0.0])
    # Mean (1 + 3 + 4) / 4 = 2; deviations times people -1, 1, 0, 0.
    apart, even = np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])
    mean, error = gro._difference(values, people, [apart, even])
    assert mean == 2
    # Three clusters with people: 3/2 (1 + 1 + 0) = 3; by the other clusters 0.
    assert error == pytest.approx(3**0.5 / 4)
    assert gro._difference(values, people, [even])[1] == 0
    assert gro._difference(values, people, [np.zeros(4, int)])[1] == np.inf


def test_the_smallest_number_within_a_standard_error_of_the_likeliest_is_chosen():
    n = 400
    voters = gro._Voters(np.ones((1, n)), np.ones(n), np.zeros(n, np.int8), np.arange(n), np.arange(n + 1))
    alternating = np.resize([1.0, -1.0], n)
    # Errors of the differences: 1/20. Two is 0.1 below the best, three 0.04.
    likelihood = np.stack([np.zeros(n) - 2, np.zeros(n) - 0.1, np.zeros(n) - 0.04, alternating, np.zeros(n) - 1])
    chosen, numbers = gro._chosen(voters, likelihood)
    assert chosen == 3
    assert numbers["gain"] == pytest.approx((0, 1.9, 1.96, 2, 1))
    assert numbers["gain_error"] == pytest.approx((0, 0, 0, 0.05, 0), abs=1e-4)
    assert gro._chosen(voters, likelihood[[1, 3]] * 0 + 7)[0] == 1, "one wins where all are even"


def test_of_very_many_votes_a_part_of_the_annotators_chooses_the_number_and_all_are_grouped(crowd, monkeypatch):
    margins, votes, taste = crowd(OPPOSITE, people=60, each=40)
    assert found(margins, votes)[1].judged == 2_400
    monkeypatch.setattr(gro, "SAMPLE", (500, 20))
    table, finding = found(margins, votes)
    assert (finding.judged, finding.votes, finding.groups) == (800, 2_400, 2)
    assert gro.adjusted_rand_index(table["group"].to_numpy(), taste) > 0.8
    monkeypatch.setattr(gro, "SAMPLE", (500, 31))
    assert found(margins, votes)[1].judged == 2_400, "too few annotators would remain"


def test_blocks_of_rows_change_nothing(crowd, monkeypatch):
    margins, votes, _ = crowd(OPPOSITE, people=10, each=30)
    whole, _ = found(margins, votes)
    monkeypatch.setattr(gro, "_BLOCK", 70)
    assert found(margins, votes)[0].equals(whole)


# --- k-means -------------------------------------------------------------------------------------------------------


def best_cost(points, k):
    """The least cost of all ways to give the points to k clusters."""
    costs = []
    for ways in itertools.product(range(k), repeat=len(points)):
        parts = [points[np.array(ways) == j] for j in range(k)]
        costs.append(sum(((p - p.mean(0)) ** 2).sum() for p in parts if len(p)))
    return min(costs)


@pytest.mark.parametrize(("k", "seed"), [(2, 0), (2, 1), (3, 2), (3, 3)])
def test_k_means_finds_the_cheapest_clusters_of_few_points(k, seed):
    points = np.random.default_rng(seed).normal(size=(8, 2))
    cluster = gro.k_means(points, k)
    cost = sum(((points[cluster == j] - points[cluster == j].mean(0)) ** 2).sum() for j in range(k))
    assert cost == pytest.approx(best_cost(points, k))
    assert np.array_equal(cluster, gro.k_means(points, k))


def test_equal_points_are_one_cluster_and_few_distinct_ones_as_many_as_differ():
    assert set(gro.k_means(np.full((9, 3), 0.1), 4)) == {0}
    points = np.repeat(np.eye(2), 5, 0)
    assert gro.adjusted_rand_index(gro.k_means(points, 4), np.repeat([0, 1], 5)) == 1
    assert set(gro.k_means(points, 1)) == {0}


# --- the adjusted Rand index ---------------------------------------------------------------------------------------


def test_the_adjusted_rand_index_by_hand():
    # Together in both: {0, 1}; in the first {0, 1, 2} and {3, 4, 5}: 6; in the second {0, 1}, {2, 3}, {4, 5}: 3; of 15 pairs.
    first, second = np.array([0, 0, 0, 1, 1, 1]), np.array(list("aabbcc"))
    expected = 6 * 3 / 15
    assert gro.adjusted_rand_index(first, second) == pytest.approx((2 - expected) / ((6 + 3) / 2 - expected))
    assert gro.adjusted_rand_index(second, first) == gro.adjusted_rand_index(first, second)


def test_the_adjusted_rand_index_is_1_up_to_names_0_by_chance_and_negative_below():
    groups = np.array([0, 0, 1, 1, 2, 2, 2])
    assert gro.adjusted_rand_index(groups, np.array([5, 5, 0, 0, 3, 3, 3])) == 1
    assert gro.adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(-0.5)
    rng = np.random.default_rng(0)
    drawn = [gro.adjusted_rand_index(rng.integers(0, 2, 40), rng.integers(0, 3, 40)) for _ in range(400)]
    assert abs(np.mean(drawn)) < 0.01


def test_where_nothing_is_to_tell_the_adjusted_rand_index_is_1():
    for same in (np.zeros(5), np.arange(5), np.zeros(0)):
        assert gro.adjusted_rand_index(same, same) == 1
    assert gro.adjusted_rand_index(np.zeros(6), np.arange(6) % 2) == 0, "one group says nothing of two tastes"


# --- groups that are given -----------------------------------------------------------------------------------------


def given(*rows, dtype=pl.Int64):
    return pl.DataFrame(list(rows), schema={"annotator_id": pl.String, "group": dtype}, orient="row")


def test_given_groups_are_taken_as_they_are(margins_of, votes_of):
    margins = margins_of({"a": [1.0, 2.0]}, ["x", "y"])
    votes = votes_of([("x", "p", 1.0), ("y", "p", 0.0), ("x", "q", 0.5), ("y", "r", 1.0), ("y", None, 1.0)])
    table, finding = gro.given_groups(votes, margins, ["a"], given(("p", 2), ("q", 0), ("absent", 1), dtype=pl.UInt8))
    table = schemas.ANNOTATOR_GROUPS.conform(table)
    assert table.select("annotator_id", "votes", "group", "status").rows() == [
        ("p", 2, 2, "ok"),
        ("q", 0, 0, "ok"),
        ("r", 1, -1, "not_given"),
        ("unknown", 1, -1, "unknown"),
    ]
    assert table["weight_a"].null_count() == 4
    assert (finding.groups, finding.is_noise, finding.annotators, finding.votes) == (2, False, 2, 2)
    assert finding.members == (1, 0, 1)
    assert finding.note == "given, not found; 1 of the 3 annotators given have no counted vote"


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (pl.DataFrame({"annotator": ["p"], "group": [0]}), "expected the columns annotator_id"),
        (pl.DataFrame({"annotator_id": ["p"], "group": ["red"]}), "group .integer"),
        (pl.DataFrame({"annotator_id": [3], "group": [0]}), "annotator_id .String"),
        (given(("p", -1), ("q", None), ("r", 0)), "2 of 3 are null, negative, or 3 and more"),
        (given(("p", 10**9), ("q", 0)), "1 of 2 are null, negative, or 2 and more"),
        (given(("p", 0), ("unknown", 0)), "or 'unknown'"),
        (given(("p", 0), ("p", 1)), "ids repeat"),
        (given((None, 0)), "ids repeat, are null"),
    ],
)
def test_a_table_that_gives_no_groups_is_refused(margins_of, votes_of, frame, why):
    with pytest.raises(ValueError, match=why):
        gro.given_groups(votes_of([]), margins_of({"a": [1.0]}), ["a"], frame)


# --- pairs ---------------------------------------------------------------------------------------------------------


def test_the_group_of_a_pair_is_that_of_most_known_voters_for_the_humans_side_by_hand(votes_of):
    pairs = pl.DataFrame(
        {"pair_id": list("abcdefgh"), "human_label_0": [1.0, 0.25, 0.5, None, 1.0, 0.75, 0.0, 1.0]},
        schema={"pair_id": pl.String, "human_label_0": pl.Float64},
    )
    groups = given(("p", 0), ("q", 1), ("r", 1), ("few", -1))
    rows = [
        *[("a", "p", 1.0)],
        # b: image_1's side; r is against it, and the unknown ones do not count.
        *[("b", "q", 0.0), ("b", "p", 0.0), ("b", "r", 0.0), ("b", "r", 1.0), ("b", None, 0.0, 5)],
        *[("c", "p", 1.0), ("c", "q", 0.0)],
        # e: only people without a group; f: one of either group, and a tie.
        *[("e", "few", 1.0), ("e", None, 1.0), ("e", "stranger", 1.0)],
        *[("f", "p", 1.0), ("f", "q", 1.0), ("f", "r", 0.5)],
        # g: people count; h: the only known one is against the side.
        *[("g", "p", 0.0, 3), ("g", "q", 0.0), ("g", "r", 0.0)],
        *[("h", None, 1.0, 2), ("h", "p", 0.0)],
    ]
    table = schemas.PAIR_GROUPS.conform(gro.pair_groups(pairs, votes_of(rows), groups))
    assert table.rows() == [
        ("a", 0, "ok"),
        ("b", 1, "ok"),
        ("c", -1, "no_side"),
        ("d", -1, "no_side"),
        ("e", -1, "unknown"),
        ("f", -1, "tied"),
        ("g", 0, "ok"),
        ("h", -1, "unknown"),
    ]


def test_swapped_images_leave_the_groups_of_pairs(crowd):
    margins, votes, _ = crowd(OPPOSITE, people=24, each=40)
    table, _ = found(margins, votes)
    pairs = margins.select("pair_id").with_columns(human_label_0=votes["label_0"])
    complement = (1 - pl.col("^(human_)?label_0$")).name.keep()
    here = gro.pair_groups(pairs, votes, table)
    assert here.equals(gro.pair_groups(pairs.with_columns(complement), votes.with_columns(complement), table))
    own = votes.join(table, on="annotator_id", maintain_order="left")
    assert here["group"].equals(own["group"]), "one vote per pair: its annotator's"


def test_no_pairs_have_no_groups(votes_of):
    pairs = pl.DataFrame(schema={"pair_id": pl.String, "human_label_0": pl.Float64})
    assert len(schemas.PAIR_GROUPS.conform(gro.pair_groups(pairs, votes_of([]), given()))) == 0


# --- the steps -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(ingested, sources_of, tiny_world, tmp_path_factory):
    """(store, configuration, shard keys) with margins, of two imported scorers whose scores are drawn."""
    source, keys = ingested
    folder = tmp_path_factory.mktemp("groups")
    store = Store(str(shutil.copytree(source.location, folder / "store")))
    rows = batches.owned_pairs(store, keys).select("image_id", "prompt_id").collect()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        score = pl.Series(rng.normal(size=len(rows)), dtype=pl.Float32)
        rows.with_columns(score=score).write_parquet(folder / f"{name}.parquet")
    scorers = [ScorerConfig(name=s, kind="imported", checkpoint=str(folder / f"{s}.parquet")) for s in ("a", "b")]
    options = small_world(folder).model_dump() | {"sources": sources_of(tiny_world), "scorers": scorers}
    config = Config.model_validate(options)
    for key in keys:
        batches.score_shard(store, key, config.scorers)
    batches.activate(store, config, keys)
    steps.Labels(store, config, keys).margins()
    return store, config, keys


@pytest.fixture
def built(scored, tmp_path):
    """Return a function that builds both tables of a copy of `scored` under options of labels: {table: Built}, store."""
    store, config, keys = scored
    store = Store(str(shutil.copytree(store.location, tmp_path / "store")))

    def build(**options):
        labels = steps.Labels(store, config.model_copy(update={"labels": LabelsConfig(**options)}), keys)
        return {name: getattr(labels, name)() for name in ("annotator_groups", "pair_groups")}, store

    return build


def test_the_tables_are_made_with_a_row_for_every_annotator_and_pair_and_say_what_was_found(built, scored):
    _, _, keys = scored
    made, store = built()
    votes = catalogue.counted_votes(store, keys).collect()
    table = store.read(schemas.ANNOTATOR_GROUPS)
    assert table["annotator_id"].to_list() == sorted(votes["annotator_id"].fill_null("unknown").unique())
    assert set(table["status"]) == {"ok", "few_votes", "unknown"}
    facts = made["annotator_groups"].manifest.extra
    told = table.filter(status="ok")
    assert (facts["annotators"], facts["votes"]) == (len(told), told["votes"].sum())
    assert facts["groups"] == told["group"].n_unique()
    assert facts["is_noise"] == (facts["groups"] == 1)
    assert len(facts["log_likelihood"]) == gro.MOST_GROUPS
    pairs = store.read(schemas.PAIR_GROUPS)
    assert pairs["pair_id"].equals(store.read(schemas.CATALOGUE_PAIRS)["pair_id"])
    assert pairs.filter(status="ok")["group"].min() == 0
    again, _ = built()
    assert all(b.is_reused for b in again.values())


def test_a_file_of_groups_takes_their_place_until_it_changes(built, tmp_path):
    _, store = built()
    ids = store.read(schemas.ANNOTATOR_GROUPS)["annotator_id"].to_list()[:-1]
    file = tmp_path / "groups.parquet"
    for shift in (0, 1):
        rows = given(*((who, (k + shift) % 3) for k, who in enumerate(ids)))
        rows.write_parquet(file)
        made, _ = built(groups_file=str(file))
        assert not any(b.is_reused for b in made.values())
        assert made["annotator_groups"].manifest.extra["note"].startswith("given")
        table = store.read(schemas.ANNOTATOR_GROUPS).filter(status="ok")
        assert table.select("annotator_id", pl.col("group").cast(pl.Int64)).equals(rows)
    assert all(b.is_reused for b in built(groups_file=str(file))[0].values())
    assert store.read(schemas.PAIR_GROUPS)["group"].unique().sort().to_list()[-3:] == [0, 1, 2]


def test_a_file_of_groups_that_is_none_is_refused_by_name(built, tmp_path):
    file = tmp_path / "groups.parquet"
    with pytest.raises(ConfigError, match=r"labels.groups_file: .*groups.parquet: No such file"):
        built(groups_file=str(file))
    file.write_text("annotator_id,group\n")
    with pytest.raises(ConfigError, match=r"labels.groups_file: .*groups.parquet: not parquet"):
        built(groups_file=str(file))
    given(("p", -1)).write_parquet(file)
    with pytest.raises(ConfigError, match=r"labels.groups_file: .*groups.parquet: column group: 1 of 1 are null"):
        built(groups_file=str(file))
