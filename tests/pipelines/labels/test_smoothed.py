import math

import polars as pl
import pytest

from pipelines import schemas
from pipelines.labels.smoothed import smoothed

SLOPE = {"pick": 0.4, "clip": 12.0}
WEIGHT = {"pick": 0.5, "clip": 0.25}
RMS = {"pick": 2.0, "clip": 0.1}
KEYS = {"pair_id": "x", "prompt_id": "00000003" + "0" * 24, "image_0_id": "a", "image_1_id": "b"}


def calibration(low=16.0, high=24.0):
    rows = [
        {
            "scorer": s,
            "fold": f,
            "slope": SLOPE[s] if f == 3 else 99.0,
            "weight": WEIGHT[s] if f == 3 else 99.0,
            "rms": RMS[s],
            "min": low,
            "max": high,
            "votes": 1,
        }
        for s in SLOPE
        for f in range(-1, 5)
    ]
    return pl.DataFrame(rows, schema=schemas.CALIBRATION.polars_schema)


def one(pick, clip, table=None, scorers=("pick", "clip"), smpo="pick"):
    frame = pl.DataFrame(
        {**KEYS, "d_pick": [pick], "d_clip": [clip]}, schema_overrides={"d_pick": pl.Float64, "d_clip": pl.Float64}
    )
    result = smoothed(frame, calibration() if table is None else table, list(scorers), smpo)
    return schemas.SMOOTHED.conform(result).row(0, named=True)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_every_column_by_hand():
    row = one(1.0, -0.05)
    assert row["p_smpo"] == pytest.approx(sigmoid(1 / 8))
    assert row["p_ensemble"] == pytest.approx(sigmoid(0.5 * 0.5 - 0.25 * 0.5))
    assert row["p_linear"] == pytest.approx((sigmoid(0.4) + sigmoid(-0.6)) / 2)
    assert row["p_log"] == pytest.approx(sigmoid((0.4 - 0.6) / 2))
    assert row["z_mean"] == pytest.approx(0.0)
    assert row["z_std"] == pytest.approx(math.sqrt(0.5))


def test_smpos_form_is_the_softmax_of_the_scaled_scores():
    first, second = 21.0, 19.5
    scaled = [(r - 16.0) / (24.0 - 16.0) for r in (first, second)]
    softmax = math.exp(scaled[0]) / (math.exp(scaled[0]) + math.exp(scaled[1]))
    assert one(first - second, 0.0)["p_smpo"] == pytest.approx(softmax)


def test_the_same_probability_comes_from_the_score_and_from_the_raw_cosine():
    scale = 98.6
    from_score = one(0.04 * scale, 0.0, calibration(0.11543526500463486 * scale, 0.28201571106910706 * scale))
    from_cosine = one(0.04, 0.0, calibration(0.11543526500463486, 0.28201571106910706))
    assert from_score["p_smpo"] == pytest.approx(from_cosine["p_smpo"])


def test_the_weight_of_smpo_stays_below_its_bound_inside_the_range():
    p = one(8.0, 0.0)["p_smpo"]
    assert 10 * (2 * p - 1) == pytest.approx(10 * math.tanh(0.5))
    assert 10 * (2 * p - 1) <= 4.63


def test_swapping_the_images_gives_the_complement():
    here, there = one(1.3, -0.02), one(-1.3, 0.02)
    for name in ("p_smpo", "p_ensemble", "p_linear", "p_log"):
        assert here[name] + there[name] == pytest.approx(1.0)
    assert here["z_mean"] == pytest.approx(-there["z_mean"])
    assert here["z_std"] == pytest.approx(there["z_std"])


def test_equal_images_are_an_even_preference():
    row = one(0.0, 0.0)
    assert [row[k] for k in ("p_smpo", "p_ensemble", "p_linear", "p_log")] == [0.5] * 4


def test_a_column_is_null_where_a_scorer_that_it_needs_has_no_score():
    row = one(1.0, None)
    assert row["p_smpo"] == pytest.approx(sigmoid(1 / 8))
    assert [row[k] for k in ("p_ensemble", "p_linear", "p_log", "z_mean", "z_std")] == [None] * 5
    assert one(None, 0.1)["p_smpo"] is None


def test_a_single_scorer_has_pools_but_no_spread():
    row = one(1.0, None, scorers=("pick",))
    assert row["p_linear"] == pytest.approx(row["p_log"]) == pytest.approx(sigmoid(0.4))
    assert row["z_std"] is None


def test_a_store_whose_scores_are_all_equal_gives_an_even_preference():
    assert one(0.0, 0.0, calibration(20.0, 20.0))["p_smpo"] == 0.5
