import math

import numpy as np
import polars as pl
import pytest

from pipelines import identity, schemas
from pipelines.labels import calibration as cal
from pipelines.labels.margins import FOLDS, fold

SCORERS = ["s", "t"]
RANGES = pl.DataFrame({"scorer": SCORERS, "low": [-3.0, 0.0], "high": [4.0, 1.0]})


def column(*values):
    return np.array(values, float)


def made_up(n=600, seed=0, prompts=120):
    """Differences of two scorers of very different units, and votes drawn from a known logit."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 2))
    label = (0.8 * z[:, 0] + 0.4 * z[:, 1] + rng.logistic(size=n) > 0).astype(float)
    label[rng.random(n) < 0.1] = 0.5
    differences = pl.DataFrame(
        {
            "pair_id": [f"{k:06d}" for k in range(n)],
            "prompt_id": [identity.prompt_id(f"prompt {k % prompts}") for k in range(n)],
            "d_s": 3.0 * z[:, 0],
            "d_t": 0.01 * z[:, 1],
        }
    )
    return differences, pl.DataFrame({"pair_id": differences["pair_id"], "label_0": label})


def calibrate(differences, votes, scorers=SCORERS):
    table = cal.calibrate(differences, votes.with_columns(people=pl.lit(1)), RANGES, scorers)
    schemas.CALIBRATION.conform(table)
    return table


def numbers(table, *names):
    return table.sort("scorer", "fold").select(names).to_numpy().astype(float)


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


def test_an_even_margin_counts_half_and_a_split_pair_by_its_share():
    margin, label, votes = column(1, -1, 0, 2), column(1, 1, 1, 0.75), column(1, 1, 2, 4)
    # right: 1, 0, 0.5 of each of two, 0.75 of each of four.
    assert cal.tie_aware_accuracy(margin, label, votes) == pytest.approx((1 + 0 + 1 + 3) / 8)
    assert cal.tie_aware_accuracy(margin, label, np.zeros(4)) is None


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_scorer_and_the_ensemble_for_every_fold_and_for_all():
    table = calibrate(*made_up())
    assert sorted(table.select("scorer", "fold").rows()) == sorted(
        (s, f) for s in (*SCORERS, "ensemble") for f in range(-1, FOLDS)
    )
    overall = table.filter(pl.col("fold") == -1, pl.col("scorer") == "s").row(0, named=True)
    assert (overall["min"], overall["max"]) == (-3.0, 4.0)


def test_known_slopes_and_weights_are_recovered():
    differences, votes = made_up(n=20_000, prompts=2_000)
    table = calibrate(differences, votes.filter(pl.col("label_0") != 0.5))
    overall = table.filter(pl.col("fold") == -1).rows_by_key("scorer", named=True, unique=True)
    assert overall["s"]["rms"] == pytest.approx(3.0, rel=0.03)
    assert overall["t"]["rms"] == pytest.approx(0.01, rel=0.03)
    assert overall["s"]["weight"] == pytest.approx(0.8, abs=0.06)
    assert overall["t"]["weight"] == pytest.approx(0.4, abs=0.06)
    assert overall["ensemble"]["accuracy"] > overall["s"]["accuracy"] > overall["t"]["accuracy"] > 0.5


def test_swapping_the_images_changes_no_slope_and_flips_every_logit():
    differences, votes = made_up()
    swapped = differences.with_columns(-pl.col("d_s"), -pl.col("d_t"))
    flipped = votes.with_columns(label_0=1 - pl.col("label_0"))
    table, other = calibrate(differences, votes), calibrate(swapped, flipped)
    columns = ("slope", "weight", "rms", "accuracy", "votes")
    assert numbers(table, *columns) == pytest.approx(numbers(other, *columns), nan_ok=True)
    h = differences.select(h=cal.ensemble_logit(table, SCORERS))["h"].to_numpy()
    g = swapped.select(h=cal.ensemble_logit(other, SCORERS))["h"].to_numpy()
    assert h == pytest.approx(-g)


def test_duplicating_every_vote_changes_nothing_but_the_count():
    differences, votes = made_up()
    table, twice = calibrate(differences, votes), calibrate(differences, pl.concat([votes, votes]))
    columns = ("slope", "weight", "rms", "accuracy")
    assert numbers(table, *columns) == pytest.approx(numbers(twice, *columns), nan_ok=True)
    assert (numbers(twice, "votes") == 2 * numbers(table, "votes")).all()


def test_the_order_of_pairs_and_votes_changes_nothing():
    differences, votes = made_up()
    shuffled = calibrate(
        differences.sample(fraction=1, shuffle=True, seed=1), votes.sample(fraction=1, shuffle=True, seed=2)
    )
    columns = ("slope", "weight", "rms", "accuracy", "votes")
    assert numbers(calibrate(differences, votes), *columns) == pytest.approx(numbers(shuffled, *columns), nan_ok=True)


def test_the_unit_of_a_score_cancels():
    differences, votes = made_up()
    table = calibrate(differences, votes)
    other = calibrate(differences.with_columns(pl.col("d_t") * 1_000), votes)
    assert numbers(table, "weight", "accuracy") == pytest.approx(numbers(other, "weight", "accuracy"), nan_ok=True)
    scaled = differences.with_columns(pl.col("d_t") * 1_000)
    p = differences.select(p=cal.scorer_logit(table, "t"))["p"].to_numpy()
    assert p == pytest.approx(scaled.select(p=cal.scorer_logit(other, "t"))["p"].to_numpy())


def test_no_vote_on_a_prompt_enters_the_numbers_that_judge_it():
    differences, votes = made_up()
    turned = votes.join(differences.select("pair_id", f=fold()), on="pair_id").select(
        "pair_id", label_0=pl.when(pl.col("f") == 2).then(1 - pl.col("label_0")).otherwise("label_0")
    )
    before, after = calibrate(differences, votes), calibrate(differences, turned)
    for f in range(-1, FOLDS):
        mine = [t.filter(pl.col("fold") == f, pl.col("scorer") != "ensemble") for t in (before, after)]
        same = np.allclose(*(numbers(t, "slope", "weight") for t in mine), rtol=1e-12)
        assert same is (f == 2)
    logits = [differences.select(f=fold(), h=cal.ensemble_logit(t, SCORERS)) for t in (before, after)]
    unchanged = (logits[0]["h"] - logits[1]["h"]).abs() < 1e-12
    assert (unchanged == (logits[0]["f"] == 2)).all()


def test_a_missing_score_leaves_its_scorer_and_the_ensemble_out_of_that_pair_only():
    differences, votes = made_up()
    holes = differences.with_columns(d_t=pl.when(pl.int_range(pl.len()) % 3 > 0).then("d_t"))
    table = calibrate(holes, votes)
    full = calibrate(differences, votes)
    one = pl.col("scorer") == "s"
    assert numbers(table.filter(one), "slope", "rms", "votes") == pytest.approx(
        numbers(full.filter(one), "slope", "rms", "votes")
    )
    h = holes.select(h=cal.ensemble_logit(table, SCORERS))["h"]
    assert h.is_null().to_list() == holes["d_t"].is_null().to_list()
    decided = votes.filter(pl.col("label_0") != 0.5).join(holes.filter(pl.col("d_t").is_not_null()), on="pair_id")
    assert table.filter(pl.col("scorer") == "ensemble", pl.col("fold") == -1)["votes"].item() == len(decided)


def test_without_any_vote_every_probability_is_one_half():
    differences, votes = made_up(n=20)
    table = calibrate(differences, votes.clear())
    assert table["accuracy"].null_count() == len(table)
    assert table["votes"].sum() == 0
    p = differences.select(p=cal.sigmoid(cal.ensemble_logit(table, SCORERS)))["p"]
    assert set(p) == {0.5}


def test_a_scorer_that_always_says_the_same_has_no_weight():
    differences, votes = made_up()
    table = calibrate(differences.with_columns(d_t=pl.lit(0.0)), votes)
    mine = table.filter(pl.col("scorer") == "t")
    assert set(mine["slope"]) == set(mine["weight"]) == {0.0}
    assert set(mine["accuracy"]) == {0.5}
    assert cal.rms_of(table, "t") == 1.0


def test_no_pairs_at_all_give_a_table():
    differences, votes = made_up(n=5)
    assert len(calibrate(differences.clear(), votes.clear())) == 3 * (FOLDS + 1)
