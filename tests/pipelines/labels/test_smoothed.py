import math

import numpy as np
import pytest

from pipelines import schemas
from pipelines.labels import margins as mar
from pipelines.labels.smoothed import PUBLISHED, smoothed

PROBABILITIES = ("smpo_pick", "smpo_clip", "calibrated_pick", "calibrated_clip")
PROBABILITIES += ("p_smpo", "p_ensemble", "p_linear", "p_log")
SCALE = 98.5
"""Of PickScore's cosine, near the published model's."""


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def one(margins_of, prompt_of, calibration_of):
    """Return the row of a pair with these two scores of PickScore and this difference of CLIP.

    A second pair, of fold 0, gives the differences the root mean squares 4 (pick) and 1/8 (clip).
    """

    def run(pick, clip, scorers=("pick", "clip"), smpo="pick", published=False, **numbers):
        second = [None if pick is None else 20 + math.sqrt(32 - (pick[0] - pick[1]) ** 2)]
        third = [None if clip is None else math.sqrt(2 / 64 - clip**2)]
        first = pick or (None, None)
        given = {"pick": ([first[0], *second], [first[1], 20.0]), "clip": ([clip, *third], [0.0, 0.0])}
        margins = margins_of({s: given[s] for s in scorers}, ["x", "y"], [prompt_of(3), prompt_of(0)])
        own = {"slope": 0.5, "weight": 1.0, "rms": 4.0, "min": 16.0, "max": 24.0} | numbers
        clips = {"slope": 16.0, "weight": 0.25, "rms": 0.125, "min": 0.25, "max": 0.5, "logit_scale": 1.0}
        calibration = calibration_of(only=3, pick=own, clip=clips)
        table = smoothed(margins, calibration, list(scorers), smpo, published_constants=published)
        table = schemas.SMOOTHED.conform(table)
        assert table["pair_id"].to_list() == ["x", "y"]
        return table.row(0, named=True)

    return run


def test_every_column_by_hand(one):
    row = one((21.0, 20.0), -0.0625)
    assert row["smpo_pick"] == row["p_smpo"] == pytest.approx(sigmoid(1 / 8))
    assert row["smpo_clip"] == pytest.approx(sigmoid(-0.0625 / 0.25))
    assert row["calibrated_pick"] == pytest.approx(sigmoid(0.5))
    assert row["calibrated_clip"] == pytest.approx(sigmoid(-1.0))
    # z = 1 / 4 and -1/16 / (1/8).
    assert row["p_ensemble"] == pytest.approx(sigmoid(1.0 * 0.25 - 0.25 * 0.5))
    assert row["p_linear"] == pytest.approx((sigmoid(0.5) + sigmoid(-1.0)) / 2)
    assert row["p_log"] == pytest.approx(sigmoid((0.5 - 1.0) / 2))
    assert row["z_mean"] == pytest.approx((0.25 - 0.5) / 2)
    assert row["z_std"] == pytest.approx(0.75 / math.sqrt(2))


def test_there_is_a_column_of_either_form_for_every_scorer(one):
    assert set(one((20.0, 20.0), 0.0)) == {"pair_id", *PROBABILITIES, "z_mean", "z_std"}


def test_smpos_form_is_the_softmax_of_the_scaled_scores(one):
    scaled = [(r - 16.0) / (24.0 - 16.0) for r in (21.0, 19.5)]
    softmax = math.exp(scaled[0]) / (math.exp(scaled[0]) + math.exp(scaled[1]))
    assert one((21.0, 19.5), 0.0)["p_smpo"] == pytest.approx(softmax)


def test_another_scorer_can_give_smpos_preference(one):
    assert one((21.0, 19.5), 0.125, smpo="clip")["p_smpo"] == pytest.approx(sigmoid(0.5))


# --- the published constants ---------------------------------------------------------------------------------------


def test_with_the_published_constants_the_score_and_the_raw_cosine_give_the_same(one):
    cosines = (0.25, 0.21875)
    from_cosine = one(cosines, 0.0, published=True, logit_scale=1.0)
    from_score = one(tuple(SCALE * c for c in cosines), 0.0, published=True, logit_scale=SCALE)
    r = [(c - PUBLISHED[0]) / (PUBLISHED[1] - PUBLISHED[0]) for c in cosines]
    expected = math.exp(r[0]) / (math.exp(r[0]) + math.exp(r[1]))
    assert from_cosine["p_smpo"] == pytest.approx(expected, abs=1e-6)
    assert from_score["p_smpo"] == pytest.approx(expected, abs=1e-6)
    assert from_score["p_smpo"] != pytest.approx(one(tuple(SCALE * c for c in cosines), 0.0)["p_smpo"], abs=1e-3)


def test_the_published_constants_are_those_of_the_one_scorer_and_leave_the_others_their_range(one):
    row, plain = (one((21.0, 20.0), 0.125, published=p, logit_scale=SCALE) for p in (True, False))
    assert row["smpo_pick"] == row["p_smpo"] != plain["smpo_pick"]
    for column in ("smpo_clip", "calibrated_pick", "calibrated_clip", "p_ensemble", "p_linear", "p_log"):
        assert row[column] == plain[column]


def test_the_weight_of_smpo_stays_below_its_bound_inside_the_published_range(margins_of, calibration_of):
    """10 (2 p - 1) of SmPO's loss, at both ends of the range and in between; outside of it there is no bound."""
    cosines = np.linspace(*PUBLISHED, 33)
    first, second = (SCALE * c.ravel() for c in np.meshgrid(cosines, cosines))
    margins = margins_of({"pick": (first, second)})
    calibration = calibration_of(pick={"slope": 1.0, "weight": 1.0, "logit_scale": SCALE})
    p = smoothed(margins, calibration, ["pick"], "pick", published_constants=True)["p_smpo"].to_numpy()
    omega = np.abs(10 * (2 * p - 1))
    assert omega.max() == pytest.approx(10 * math.tanh(0.5), abs=1e-4)
    assert omega.max() <= 4.63


def test_the_published_constants_are_refused_where_no_cosine_is_known_in_the_score(one):
    with pytest.raises(ValueError, match="scores of 'pick' are not known to hold a cosine; set labels"):
        one((21.0, 20.0), 0.0, published=True)
    assert one((0.25, 0.125), 0.125, smpo="clip", published=True)["p_smpo"] == pytest.approx(
        sigmoid(0.125 / (PUBLISHED[1] - PUBLISHED[0]))
    )


# --- what holds for every column -----------------------------------------------------------------------------------


def test_swapping_the_images_gives_the_complement(one):
    here, there = one((21.5, 20.25), -0.03125), one((20.25, 21.5), 0.03125)
    for name in PROBABILITIES:
        assert here[name] + there[name] == pytest.approx(1.0)
    assert here["z_mean"] == pytest.approx(-there["z_mean"])
    assert here["z_std"] == pytest.approx(there["z_std"])


def test_equal_images_are_an_even_preference(one):
    row = one((20.0, 20.0), 0.0)
    assert [row[k] for k in PROBABILITIES] == [0.5] * 8


def test_a_column_is_null_where_a_scorer_that_it_needs_has_no_score(one):
    row = one((21.0, 20.0), None)
    assert row["p_smpo"] == row["smpo_pick"] == pytest.approx(sigmoid(1 / 8))
    assert row["calibrated_pick"] == pytest.approx(sigmoid(0.5))
    missing = ("smpo_clip", "calibrated_clip", "p_ensemble", "p_linear", "p_log", "z_mean", "z_std")
    assert [row[k] for k in missing] == [None] * 7
    other = one(None, 0.125)
    assert (other["p_smpo"], other["smpo_pick"]) == (None, None)
    assert other["smpo_clip"] == pytest.approx(sigmoid(0.5))


def test_a_single_scorer_has_pools_but_no_spread(one):
    row = one((21.0, 20.0), None, scorers=("pick",))
    assert row["p_linear"] == pytest.approx(row["p_log"]) == row["calibrated_pick"] == pytest.approx(sigmoid(0.5))
    assert row["p_ensemble"] == pytest.approx(sigmoid(1.0 * 0.25))
    assert row["z_std"] is None


def test_a_store_whose_scores_are_all_equal_or_absent_gives_even_preferences_or_none(margins_of, calibration_of):
    numbers = {"slope": 0.0, "weight": 0.0}
    for low, high, score, expected in ((20.0, 20.0, 20.0, 0.5), (None, None, None, None)):
        calibration = calibration_of(pick=numbers | {"min": low, "max": high})
        table = smoothed(margins_of({"pick": ([score], [score])}), calibration, ["pick"], "pick")
        row = table.row(0, named=True)
        assert [row[k] for k in ("p_smpo", "p_ensemble", "p_linear", "p_log", "calibrated_pick")] == [expected] * 5


def test_a_sure_scorer_gives_certainty_and_no_overflow(margins_of, calibration_of):
    calibration = calibration_of(pick={"slope": 1e6, "weight": 1e6, "min": 0.0, "max": 1e-3})
    margins = margins_of({"pick": [3.0, -3.0]})
    assert mar.rms(mar.matrix(margins, ["pick"]))[0] == 3.0
    table = schemas.SMOOTHED.conform(smoothed(margins, calibration, ["pick"], "pick"))
    for column in ("p_smpo", "p_ensemble", "p_linear", "p_log"):
        assert table[column].to_list() == pytest.approx([1.0, 0.0])
