import math

import numpy as np
import polars as pl
import pytest

from pipelines import identity, schemas
from pipelines.labels import calibration as cal
from pipelines.labels import margins as mar
from pipelines.labels.margins import FOLDS

SCORERS = ["s", "t"]
JUDGED = ("slope", "weight", "rms", "accuracy", "ece_raw", "ece_calibrated")


def column(*values):
    return np.array(values, float)


@pytest.fixture(scope="module")
def made_up(margins_of):
    """Make margins of two scorers of very different units, and votes drawn from a known logit."""

    def make(n=600, seed=0, prompts=120, **models):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(n, 2))
        label = (0.8 * z[:, 0] + 0.4 * z[:, 1] + rng.logistic(size=n) > 0).astype(float)
        label[rng.random(n) < 0.1] = 0.5
        margins = margins_of(
            {"s": 3.0 * z[:, 0], "t": 0.01 * z[:, 1]},
            [f"{k:06d}" for k in range(n)],
            [identity.prompt_id(f"prompt {k % prompts}") for k in range(n)],
            **models,
        )
        return margins, pl.DataFrame({"pair_id": margins["pair_id"], "label_0": label})

    return make


def calibrate(margins, votes, scorers=SCORERS, **options):
    table = cal.calibrate(margins, votes.with_columns(people=pl.lit(1)), scorers, **options)
    return schemas.CALIBRATION.conform(table)


def numbers(table, *names):
    return table.sort("scorer", "fold").select(names).to_numpy().astype(float)


def scaled(margins, scorer, factor):
    """Return margins whose scorer counts in another unit; a power of two, so that nothing is rounded."""
    return margins.with_columns(pl.col(f"score_{i}_{scorer}") * factor for i in (0, 1))


# --- the fit -------------------------------------------------------------------------------------------------------


def test_the_slope_of_equal_margins_is_the_log_odds_of_agreement():
    w = cal.fit_logistic(np.ones((4, 1)), column(1, 1, 1, 0), np.ones(4), ridge=0.0)
    assert w[0] == pytest.approx(math.log(3))


def test_the_slope_is_in_units_of_the_margin():
    x = column(2, 2, -2, -2)[:, None]
    w = cal.fit_logistic(x, column(1, 0, 0, 0), np.ones(4), ridge=0.0)
    # Three of four agree with the sign of the margin, whose size is 2.
    assert w[0] == pytest.approx(math.log(3) / 2)


def test_a_tie_is_half_a_vote_for_each_side():
    with_tie = cal.fit_logistic(np.ones((2, 1)), column(1, 0.5), np.ones(2), ridge=0.0)
    as_votes = cal.fit_logistic(np.ones((4, 1)), column(1, 1, 1, 0), np.ones(4), ridge=0.0)
    assert with_tie[0] == pytest.approx(as_votes[0])


def test_a_weight_of_two_is_the_same_row_twice():
    x, y = column(1, -0.5, 2)[:, None], column(1, 1, 0)
    twice = cal.fit_logistic(np.vstack([x, x[:1]]), np.append(y, y[0]), np.ones(4), 1e-3)
    assert cal.fit_logistic(x, y, column(2, 1, 1), 1e-3) == pytest.approx(twice)


def test_there_is_nothing_to_fit_without_votes():
    assert cal.fit_logistic(np.ones((3, 2)), np.zeros(3), np.zeros(3), 1e-3).tolist() == [0.0, 0.0]


def test_votes_that_a_margin_separates_give_a_finite_slope():
    w = cal.fit_logistic(column(1, -1, 2)[:, None], column(1, 0, 1), np.ones(3), 1e-6)
    assert 5 < w[0] < 30


@pytest.mark.parametrize("ridge", [1e-6, 1e-3])
def test_the_gradient_vanishes_at_the_fit_even_for_margins_with_heavy_tails(ridge):
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(2, 200))
        x = rng.standard_t(rng.choice([1.0, 1.5, 3.0]), (n, int(rng.integers(1, 4))))
        x /= np.sqrt((x**2).mean(0))
        y = rng.choice([0.0, 0.5, 1.0], n)
        w = cal.fit_logistic(x, y, np.ones(n), ridge)
        p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
        assert np.abs(x.T @ (p - y) / n + ridge * w).max() < 1e-7


@pytest.mark.parametrize("seed", [724, 980, 2360, 2889, 4306])
def test_nearly_separable_margins_with_heavy_tails_do_not_send_the_fit_away(seed):
    """Full Newton steps diverge on these draws, to weights of 1e5."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 30))
    x = rng.standard_t(1.0, (n, 2))
    x /= np.sqrt((x**2).mean(0))
    y = (x @ column(20, -20) + rng.logistic(size=n) > 0).astype(float)
    w = cal.fit_logistic(x, y, np.ones(n), 1e-6)
    p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
    assert np.abs(x.T @ (p - y) / n + 1e-6 * w).max() < 1e-7
    assert np.abs(w).max() < 1_000


def test_a_weight_that_nothing_speaks_for_is_zero_and_not_what_rounding_leaves_of_it():
    """The sign of a logit is read, so that an even one must be even: the fits start from the one on all rows."""
    x, y = column(1, -2, 0, 0)[:, None], column(1, 0, 1, 0)
    found = cal.fit_cross(x, y, np.ones(4), np.array([0, 0, 1, 2]), 1e-6 * np.eye(1))[:, 0]
    assert found[cal.ALL] > 1
    # Without fold 0 only pairs are left on which the scorer has equal scores.
    assert found[0] == 0.0


def test_an_even_margin_counts_half_and_a_split_pair_by_its_share(margins_of, votes_of):
    margins = margins_of({"s": [1.0, -1.0, 0.0, 2.0]}, ["a", "b", "c", "d"])
    votes = votes_of([("a", None, 1.0), ("b", None, 1.0), ("c", None, 1.0, 2), ("d", None, 1.0, 3), ("d", None, 0.0)])
    overall = cal.calibrate(margins, votes, ["s"]).filter(pl.col("fold") == cal.ALL, pl.col("scorer") == "s")
    # right: 1, 0, 0.5 of each of two, 0.75 of each of four.
    assert overall["accuracy"].item() == pytest.approx((1 + 0 + 1 + 3) / 8)
    assert overall["votes"].item() == 8


# --- votes per pair ------------------------------------------------------------------------------------------------


def test_what_people_say_of_a_pair_is_counted_by_heads_with_ties_and_without(margins_of, votes_of):
    margins = margins_of({"s": [0.0] * 3}, ["a", "b", "c"])
    said = cal.votes_per_pair(
        margins, votes_of([("c", None, 1.0, 3), ("a", None, 0.0), ("c", None, 0.5), ("c", None, 0.0), ("a", None, 0.5)])
    )
    assert said.votes.tolist() == [2, 0, 5]
    assert said.label.tolist() == pytest.approx([0.25, 0.5, 3.5 / 5])
    assert said.decided.tolist() == [1, 0, 4]
    assert said.decided_label.tolist() == pytest.approx([0.0, 0.5, 0.75])


def test_a_vote_on_a_pair_that_the_margins_lack_is_not_passed_over(margins_of, votes_of):
    with pytest.raises(ValueError, match="1 votes are on pairs that `margins` lacks"):
        cal.votes_per_pair(margins_of({"s": [0.0]}, ["a"]), votes_of([("b", None, 1.0)]))


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_scorer_and_the_ensemble_for_every_fold_and_for_all(made_up):
    table = calibrate(*made_up())
    assert sorted(table.select("scorer", "fold").rows()) == sorted(
        (s, f) for s in (*SCORERS, "ensemble") for f in range(-1, FOLDS)
    )


def test_known_slopes_and_weights_are_recovered(made_up):
    margins, votes = made_up(n=20_000, prompts=2_000)
    table = calibrate(margins, votes.filter(pl.col("label_0") != 0.5))
    overall = table.filter(pl.col("fold") == -1).rows_by_key("scorer", named=True, unique=True)
    assert overall["s"]["rms"] == pytest.approx(3.0, rel=0.03)
    assert overall["t"]["rms"] == pytest.approx(0.01, rel=0.03)
    assert overall["s"]["weight"] == pytest.approx(0.8, abs=0.06)
    assert overall["t"]["weight"] == pytest.approx(0.4, abs=0.06)
    assert overall["ensemble"]["accuracy"] > overall["s"]["accuracy"] > overall["t"]["accuracy"] > 0.5
    # Votes were drawn from that logit, so its probabilities are right; those of raw differences are not.
    assert overall["ensemble"]["ece_calibrated"] < 0.01
    assert overall["s"]["ece_calibrated"] < 0.01 < 0.1 < overall["s"]["ece_raw"]


def test_smallest_and_largest_score_are_of_both_images_and_of_what_is_known(margins_of, votes_of):
    margins = margins_of({"s": ([1.0, 7.0, None], [-2.0, None, None]), "t": ([None] * 3, [None] * 3)})
    table = calibrate(margins, votes_of([]))
    assert table.filter(scorer="s").select("min", "max").unique().rows() == [(-2.0, 7.0)]
    assert table.filter(scorer="t").select("min", "max").unique().rows() == [(None, None)]


def test_the_belief_that_scorers_deserve_the_same_weight_counts_as_thirty_prompts_do():
    penalty = cal.equality(2, np.array([10, 60]))
    # 30 / 10 * (I - 1/2): equal weights cost nothing, a difference of 2 costs 30 / 10 * 2 / 2.
    assert penalty[0].tolist() == [[1.5, -1.5], [-1.5, 1.5]]
    assert penalty[1].tolist() == [[0.25, -0.25], [-0.25, 0.25]]
    assert penalty[0] @ column(1, 1) == pytest.approx([0, 0])
    assert column(1, -1) @ penalty[0] @ column(1, -1) / 2 == pytest.approx(3.0)
    assert cal.equality(1, np.array([5])).tolist() == [[[0.0]]]


def test_prompts_with_votes_are_counted_for_every_fit(prompt_of):
    prompts = [prompt_of(0), prompt_of(0), prompt_of(0, 1), prompt_of(3), prompt_of(4)]
    found = cal.prompts_in_fits(pl.Series("prompt_id", prompts), column(1, 2, 1, 1, 0))
    # Prompts with votes: two of fold 0, one of fold 3.
    assert found.tolist() == [1, 3, 3, 2, 3, 3]
    assert cal.prompts_in_fits(pl.Series("prompt_id", prompts), np.zeros(5)).tolist() == [1] * 6


def test_few_prompts_leave_the_weights_nearly_equal_and_many_tell_them_apart(made_up):
    def apart(prompts):
        whole = calibrate(*made_up(n=2_000, prompts=prompts)).filter(fold=-1)
        first, second = (whole.filter(scorer=s)["weight"].item() for s in SCORERS)
        return first - second

    # The votes come from 0.8 and 0.4.
    assert 0 < apart(5) < 0.05
    assert 0.25 < apart(2_000) < 0.4


def test_the_factor_of_the_cosine_is_kept_where_it_is_known(made_up):
    table = calibrate(*made_up(n=20), logit_scales={"s": 98.5})
    found = dict(table.select("scorer", "logit_scale").unique().rows())
    assert found == {"s": 98.5, "t": None, "ensemble": None}


def test_the_accuracy_of_a_fold_is_of_the_votes_left_out_of_its_fit(made_up):
    margins, votes = made_up()
    table = calibrate(margins, votes)
    decided = votes.join(margins.with_columns(f=mar.fold()), on="pair_id").filter(pl.col("label_0") != 0.5)
    for f in range(FOLDS):
        its = decided.filter(pl.col("f") == f)
        agrees = (its["score_0_s"] > its["score_1_s"]) == (its["label_0"] == 1)
        row = table.row(by_predicate=(pl.col("scorer") == "s") & (pl.col("fold") == f), named=True)
        assert (row["votes"], row["accuracy"]) == (len(its), pytest.approx(agrees.mean()))
        assert row["ece_raw"] is None
    # Every vote is left out once.
    for scorer in (*SCORERS, "ensemble"):
        *folds, whole = table.filter(scorer=scorer).sort("fold", descending=True).select("votes", "accuracy").rows()
        assert sum(n for n, _ in folds) == whole[0] == len(decided)
        assert sum(n * a for n, a in folds) / whole[0] == pytest.approx(whole[1])


def test_swapping_the_images_changes_no_slope_and_flips_every_logit(made_up, swapped):
    margins, votes = made_up(model_0=["x", "y"] * 300, model_1=["z", "x"] * 300)
    there, flipped = swapped(margins), votes.with_columns(label_0=1 - pl.col("label_0"))
    for term in (False, True):
        table, other = (calibrate(*v, generator_term=term) for v in ((margins, votes), (there, flipped)))
        assert numbers(table, *JUDGED, "votes") == pytest.approx(numbers(other, *JUDGED, "votes"), nan_ok=True)
        h, g = cal.ensemble_logit(margins, table, SCORERS), cal.ensemble_logit(there, other, SCORERS)
        assert h == pytest.approx(-g)


def test_duplicating_every_vote_changes_nothing_but_the_count(made_up):
    margins, votes = made_up()
    table, twice = calibrate(margins, votes), calibrate(margins, pl.concat([votes, votes]))
    assert numbers(table, *JUDGED) == pytest.approx(numbers(twice, *JUDGED), nan_ok=True)
    assert (numbers(twice, "votes") == 2 * numbers(table, "votes")).all()


def test_a_vote_of_several_people_is_as_many_votes(made_up):
    margins, votes = made_up()
    heavy = votes.with_columns(people=1 + pl.int_range(pl.len()) % 3)
    table = cal.calibrate(margins, heavy, SCORERS)
    each = calibrate(margins, heavy.select(pl.col("pair_id", "label_0").repeat_by("people").explode()))
    assert numbers(table, *JUDGED, "votes") == pytest.approx(numbers(each, *JUDGED, "votes"), nan_ok=True)


def test_two_tied_votes_teach_what_one_vote_for_either_side_does(made_up):
    margins, votes = made_up()
    is_tied = pl.col("label_0") == 0.5
    apart = [votes.with_columns(label_0=pl.when(is_tied).then(side).otherwise("label_0")) for side in (0.0, 1.0)]
    tied, split = calibrate(margins, pl.concat([votes, votes])), calibrate(margins, pl.concat(apart))
    columns = ("slope", "weight", "ece_raw", "ece_calibrated")
    assert numbers(tied, *columns) == pytest.approx(numbers(split, *columns), nan_ok=True)
    # A tie is no decided vote, so that it has no say in the accuracy.
    assert tied["votes"].sum() < split["votes"].sum()
    assert not np.allclose(
        *(numbers(t, "weight") for t in (tied, calibrate(margins, votes.filter(~is_tied)))), equal_nan=True
    )


def test_the_order_of_pairs_and_votes_changes_nothing(made_up):
    margins, votes = made_up()
    shuffled = calibrate(
        margins.sample(fraction=1, shuffle=True, seed=1), votes.sample(fraction=1, shuffle=True, seed=2)
    )
    assert numbers(calibrate(margins, votes), *JUDGED, "votes") == pytest.approx(
        numbers(shuffled, *JUDGED, "votes"), nan_ok=True
    )


def test_the_unit_of_a_score_cancels(made_up):
    margins, votes = made_up()
    there = scaled(margins, "t", 1_024)
    table, other = calibrate(margins, votes), calibrate(there, votes)
    assert numbers(table, "weight", "accuracy") == pytest.approx(numbers(other, "weight", "accuracy"), nan_ok=True)
    assert numbers(table.filter(scorer="t"), "slope") == pytest.approx(
        1_024 * numbers(other.filter(scorer="t"), "slope")
    )
    logits = [cal.scorer_logits(m, c, SCORERS) for m, c in ((margins, table), (there, other))]
    assert logits[0] == pytest.approx(logits[1])


def test_no_vote_on_a_prompt_enters_the_numbers_that_judge_it(made_up):
    margins, votes = made_up(model_0=["x", "y", "z"] * 200, model_1=["z", "x", "y"] * 200)
    folds = mar.folds(margins)
    turned = votes.with_columns(label_0=pl.when(pl.Series(folds == 2)).then(1 - pl.col("label_0")).otherwise("label_0"))
    before, after = (calibrate(margins, v, generator_term=True) for v in (votes, turned))
    for f in range(-1, FOLDS):
        mine = [t.filter(pl.col("fold") == f, pl.col("scorer") != "ensemble") for t in (before, after)]
        same = np.allclose(*(numbers(t, "slope", "weight") for t in mine), rtol=1e-9, equal_nan=True)
        assert same is (f == 2)
    logits = [cal.ensemble_logit(margins, t, SCORERS) for t in (before, after)]
    assert ((np.abs(logits[0] - logits[1]) < 1e-9) == (folds == 2)).all()


def test_a_missing_score_leaves_its_scorer_and_the_ensemble_out_of_that_pair_only(made_up):
    margins, votes = made_up()
    holes = margins.with_columns(score_1_t=pl.when(pl.int_range(pl.len()) % 3 > 0).then("score_1_t"))
    table, full = calibrate(holes, votes), calibrate(margins, votes)
    one, is_whole = pl.col("scorer") == "s", holes["score_1_t"].is_not_null()
    columns = ("slope", "rms", "votes", "ece_raw", "ece_calibrated")
    assert numbers(table.filter(one), *columns) == pytest.approx(numbers(full.filter(one), *columns), nan_ok=True)
    h = cal.ensemble_logit(holes, table, SCORERS)
    assert (~np.isnan(h)).tolist() == is_whole.to_list()
    alone = calibrate(holes.filter(is_whole), votes.filter(is_whole))
    for scorer, columns in (("t", ("slope", "accuracy", "votes")), ("ensemble", ("votes",))):
        theirs = [numbers(c.filter(scorer=scorer), *columns) for c in (table, alone)]
        assert theirs[0] == pytest.approx(theirs[1])
    # The unit of s is the rms of all its differences; the ensemble's fit has only the complete pairs.
    g = cal.ensemble_logit(holes.filter(is_whole), alone, SCORERS)
    assert h[is_whole.to_numpy()] == pytest.approx(g, abs=0.05)


def test_without_any_vote_every_probability_is_one_half(made_up):
    margins, votes = made_up(n=20)
    table = calibrate(margins, votes.clear(), generator_term=True)
    assert all(table[c].null_count() == len(table) for c in ("accuracy", "ece_raw", "ece_calibrated"))
    assert table["votes"].sum() == 0
    assert set(cal.sigmoid(cal.ensemble_logit(margins, table, SCORERS))) == {0.5}


def test_ties_alone_give_even_probabilities_and_no_accuracy(made_up):
    margins, votes = made_up(n=50)
    table = calibrate(margins, votes.with_columns(label_0=pl.lit(0.5)))
    assert np.abs(cal.ensemble_logit(margins, table, SCORERS)).max() < 1e-12
    assert table["accuracy"].null_count() == len(table)
    whole = table.filter(scorer="ensemble", fold=-1).row(0, named=True)
    assert whole["ece_calibrated"] == pytest.approx(0.0, abs=1e-12)
    assert whole["ece_raw"] > 0.1, "sigmoid(mean z) is sure of something"


def test_a_fold_that_nobody_voted_in_has_no_accuracy_but_a_fit(made_up):
    margins, votes = made_up()
    table = calibrate(margins, votes.filter(pl.Series(mar.folds(margins) != 3)))
    row = table.filter(scorer="s", fold=3).row(0, named=True)
    whole = table.filter(scorer="s", fold=-1).row(0, named=True)
    assert (row["accuracy"], row["votes"]) == (None, 0)
    assert row["slope"] == pytest.approx(whole["slope"])


def test_a_scorer_that_always_says_the_same_says_nothing_and_leaves_the_ensemble_to_the_others(made_up):
    margins, votes = made_up()
    margins = margins.with_columns(score_0_t=pl.lit(0.0, pl.Float32))
    table, alone = calibrate(margins, votes), calibrate(margins, votes, ["s"])
    mine = table.filter(scorer="t")
    assert set(mine["slope"]) == set(mine["rms"]) == {0.0}
    assert set(mine["accuracy"]) == {0.5}
    h, g = cal.ensemble_logit(margins, table, SCORERS), cal.ensemble_logit(margins, alone, ["s"])
    assert h == pytest.approx(g, rel=0.01)


def test_a_scorer_without_any_score_leaves_the_others_as_they_are(made_up):
    margins, votes = made_up()
    table = calibrate(margins.with_columns(score_0_t=pl.lit(None, pl.Float32)), votes)
    full = calibrate(margins, votes)
    columns = ("slope", "accuracy", "votes")
    assert numbers(table.filter(scorer="s"), *columns) == pytest.approx(numbers(full.filter(scorer="s"), *columns))
    nothing = table.filter(pl.col("scorer") != "s")
    assert (nothing["accuracy"].null_count(), nothing["votes"].sum()) == (len(nothing), 0)


def test_no_pairs_at_all_give_a_table(made_up):
    margins, votes = made_up(n=5)
    assert len(calibrate(margins.clear(), votes.clear())) == 3 * (FOLDS + 1)


# --- the generator term --------------------------------------------------------------------------------------------


def by_generator(margins_of, lift, n=12_000, seed=3):
    """Margins that say little, and votes that the generators decide: what each adds is known."""
    rng = np.random.default_rng(seed)
    names = np.array(list(lift))
    first, second = rng.integers(0, len(names), (2, n))
    added = np.array(list(lift.values()))
    z = rng.normal(size=n)
    h = 0.5 * z + added[first] - added[second]
    margins = margins_of(
        {"s": z},
        [f"{k:06d}" for k in range(n)],
        [identity.prompt_id(f"prompt {k % 800}") for k in range(n)],
        names[first].tolist(),
        names[second].tolist(),
    )
    labels = (h + rng.logistic(size=n) > 0).astype(float)
    return margins, pl.DataFrame({"pair_id": margins["pair_id"], "label_0": labels}), h


def test_what_a_generator_adds_is_recovered_and_enters_the_ensemble(margins_of):
    lift = {"sd": -0.8, "xl": 0.5, "flux": 0.3}
    margins, votes, h = by_generator(margins_of, lift)
    table = calibrate(margins, votes, ["s"], generator_term=True)
    whole = table.filter(pl.col("fold") == -1)
    found = {n: whole.filter(scorer=f"generator:{n}")["weight"].item() for n in lift}
    # Only differences are identified; the ridge makes the sum zero.
    assert found == pytest.approx(lift, abs=0.1)
    assert whole.filter(scorer="s")["weight"].item() == pytest.approx(0.5, abs=0.06)
    assert cal.ensemble_logit(margins, table, ["s"]) == pytest.approx(h, abs=0.3)
    plain = calibrate(margins, votes, ["s"])
    assert plain["scorer"].unique().sort().to_list() == ["ensemble", "s"]
    accuracy = [t.filter(scorer="ensemble", fold=-1)["accuracy"].item() for t in (table, plain)]
    assert accuracy[0] > accuracy[1] + 0.03
    assert numbers(table.filter(scorer="s"), "slope") == pytest.approx(numbers(plain.filter(scorer="s"), "slope"))


def test_a_pair_with_one_unknown_generator_gets_nothing_from_the_term(margins_of):
    margins, votes, _ = by_generator(margins_of, {"sd": -0.8, "xl": 0.8}, n=400)
    table = calibrate(margins, votes, ["s"], generator_term=True)
    half = margins.with_columns(model_1=pl.lit(None, pl.String))
    weight = cal.by_fold(table, "s", "weight") / mar.rms(mar.matrix(half, ["s"]))
    expected = mar.matrix(half, ["s"])[:, 0] * weight[mar.folds(half)]
    assert cal.ensemble_logit(half, table, ["s"]) == pytest.approx(expected)


def test_a_generator_that_the_fit_never_saw_adds_nothing(margins_of):
    margins, votes, _ = by_generator(margins_of, {"sd": -0.8, "xl": 0.8}, n=400)
    table = calibrate(margins, votes, ["s"], generator_term=True)
    new = margins.with_columns(model_0=pl.lit("new"), model_1=pl.lit("newer"))
    bare = margins.with_columns(model_0=pl.lit(None, pl.String), model_1=pl.lit(None, pl.String))
    assert cal.ensemble_logit(new, table, ["s"]) == pytest.approx(cal.ensemble_logit(bare, table, ["s"]))


def test_two_images_of_one_generator_are_not_told_apart_by_it(margins_of):
    margins, votes, _ = by_generator(margins_of, {"sd": -0.8, "xl": 0.8}, n=400)
    table = calibrate(margins, votes, ["s"], generator_term=True)
    same = margins.with_columns(model_0=pl.lit("xl"), model_1=pl.lit("xl"))
    bare = margins.with_columns(model_0=pl.lit(None, pl.String), model_1=pl.lit(None, pl.String))
    assert cal.ensemble_logit(same, table, ["s"]) == pytest.approx(cal.ensemble_logit(bare, table, ["s"]))


# --- reliability ---------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(margins_of, votes_of, calibration_of, prompt_of):
    """Four pairs of fold 0 with d = 2, -2, 1, 0, the slope 0.5, and their votes."""
    ids, d = ["a", "b", "c", "d"], [2.0, -2.0, 1.0, 0.0]
    margins = margins_of({"s": d}, ids, [prompt_of(0)] * 4)
    rows = [("a", None, 1.0, 3), ("a", None, 0.0), ("b", None, 0.0), ("c", None, 0.5), ("d", None, 1.0)]
    rms = math.sqrt(9 / 4)
    calibration = calibration_of(only=0, s={"slope": 0.5, "weight": 0.5 * rms, "rms": rms})
    return margins, calibration, votes_of(rows)


def reliability(margins, calibration, votes, scorers=("s",)):
    return schemas.RELIABILITY.conform(cal.reliability(margins, calibration, votes, list(scorers)))


def test_reliability_by_hand(judged):
    found = {
        (r["stage"], r["bin"]): (r["votes"], r["probability"], r["agreement"])
        for r in reliability(*judged).filter(scorer="s").iter_rows(named=True)
    }
    p = {x: 1 / (1 + math.exp(-x)) for x in (0.0, 0.5, 1.0, 2.0)}
    # Of four people on a (favoured: image_0) three chose it, the one on b (favoured: image_1) did.
    # Bins of [0.5, 1]: p(2) = 0.881 in the eighth, p(1) = 0.731 in the fifth, p(0.5) = 0.622 in the third.
    assert found == {
        ("raw", 7): (5, pytest.approx(p[2.0]), pytest.approx(4 / 5)),
        ("raw", 4): (1, pytest.approx(p[1.0]), 0.5),
        ("raw", 0): (1, 0.5, 0.5),
        ("calibrated", 4): (5, pytest.approx(p[1.0]), pytest.approx(4 / 5)),
        ("calibrated", 2): (1, pytest.approx(p[0.5]), 0.5),
        ("calibrated", 0): (1, 0.5, 0.5),
    }
    gaps = 5 * abs(p[2.0] - 0.8) + abs(p[1.0] - 0.5) + 0
    assert cal.ece(reliability(*judged), "s", "raw") == pytest.approx(gaps / 7)


def test_the_raw_ensemble_is_the_mean_z_and_the_calibrated_one_the_fitted_logit(judged):
    table = reliability(*judged).filter(scorer="ensemble")
    top = {r["stage"]: r["probability"] for r in table.sort("bin").iter_rows(named=True)}
    assert top["raw"] == pytest.approx(1 / (1 + math.exp(-2 / 1.5)))
    assert top["calibrated"] == pytest.approx(1 / (1 + math.exp(-0.5 * 2)))


def test_a_certain_probability_is_in_the_last_bin(margins_of, votes_of, calibration_of):
    sure = margins_of({"s": [80.0]}, ["a"])
    calibration = calibration_of(s={"slope": 1.0, "weight": 80.0})
    table = reliability(sure, calibration, votes_of([("a", None, 0.0)])).filter(scorer="s", stage="raw")
    assert table.select("bin", "probability", "agreement").rows() == [(9, 1.0, 0.0)]
    assert cal.ece(table, "s", "raw") == 1.0


def test_the_calibration_errors_of_the_table_are_those_of_the_reliability_table(made_up):
    margins, votes = made_up()
    table = calibrate(margins, votes)
    curves = reliability(margins, table, votes.with_columns(people=pl.lit(1)), SCORERS)
    for scorer in (*SCORERS, "ensemble"):
        row = table.filter(scorer=scorer, fold=-1).row(0, named=True)
        for stage in ("raw", "calibrated"):
            assert row[f"ece_{stage}"] == cal.ece(curves, scorer, stage)
            assert curves.filter(scorer=scorer, stage=stage)["votes"].sum() == len(votes)


def test_pairs_without_a_score_or_without_a_vote_are_in_no_bin(judged):
    margins, calibration, votes = judged
    holes = margins.with_columns(score_0_s=pl.when(pl.col("pair_id") != "a").then("score_0_s"))
    table = reliability(holes, calibration, votes.filter(pl.col("pair_id") != "d")).filter(scorer="s", stage="raw")
    assert table["votes"].sum() == 2
    nothing = reliability(margins, calibration, votes.clear())
    assert len(nothing) == 0
    assert cal.ece(nothing, "s", "raw") is None
