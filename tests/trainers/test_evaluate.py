import numpy as np
import polars as pl
import pytest

from trainers.evaluate import HELD_OUT, bootstrap_by_prompt, compare, promises


def evaluations(scores, scorer="pickscore"):
    rows = [(f"p{i}", s, scorer, float(v)) for i, row in enumerate(scores) for s, v in enumerate(row)]
    return pl.DataFrame(rows, schema=["prompt_id", "seed", "scorer", "score"], orient="row")


def test_gain_and_win_rate_are_the_ones_worked_out_by_hand():
    base, model = evaluations([[0, 2], [4, 6]]), evaluations([[1, 2], [3, 9]])
    (row,) = compare(base, model, resamples=200)
    assert row["gain"] == pytest.approx((1 + 0 - 1 + 3) / 4)
    assert row["win_rate"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert row["gain_sd"] == pytest.approx(0.75 / np.std([0, 2, 4, 6], ddof=1))
    assert (row["samples"], row["prompts"]) == (4, 2)
    assert row["gain_low"] <= row["gain"] <= row["gain_high"]


def test_a_model_equal_to_the_base_gains_nothing_and_wins_half():
    base = evaluations(np.arange(12).reshape(6, 2))
    (row,) = compare(base, base, resamples=200)
    assert (row["gain"], row["gain_low"], row["gain_high"], row["win_rate"]) == (0, 0, 0, 0.5)


def test_models_sampled_on_other_prompts_are_not_compared():
    with pytest.raises(ValueError, match="sample both again"):
        compare(evaluations([[1, 2]]), evaluations([[1, 2], [3, 4]]), resamples=200)


def test_the_bootstrap_resamples_prompts_with_all_their_rows():
    # Rows of a prompt are equal: with prompts as units the mean's standard error is that of 40 values, not of 400.
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=40), 10)
    means = bootstrap_by_prompt(values[:, None], np.repeat(np.arange(40), 10), resamples=4000)[:, 0]
    assert means.std() == pytest.approx(values.std() / np.sqrt(40), rel=0.1)


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        values = rng.normal(size=(60, 1))
        low, high = np.quantile(bootstrap_by_prompt(values, np.arange(60), 400, seed=trial), [0.025, 0.975])
        covered += low <= 0 <= high
    assert 180 <= covered <= 198


def board(gain_sd=0.3, gain_sd_low=0.1, fidelity=-0.01, accuracy_low=0.6):
    rows = [
        ("diffusion_dpo", "taste:majority", 0.2, gain_sd, gain_sd_low, 0.9),
        ("diffusion_dpo", "fidelity", fidelity, 0.0, 0.0, 0.5),
        ("diffusion_dpo", HELD_OUT, None, None, None, accuracy_low),
    ]
    return pl.DataFrame(
        rows, schema=["model", "scorer", "gain", "gain_sd", "gain_sd_low", "win_rate_low"], orient="row"
    )


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"gain_sd": 0.19}, [0]),
        ({"gain_sd_low": -0.01}, [0]),
        ({"fidelity": -0.06}, [1]),
        ({"accuracy_low": 0.5}, [2]),
    ],
)
def test_a_leaderboard_that_does_not_show_what_the_small_world_promises_is_told_so(change, broken):
    assert [i for i, (_, holds) in enumerate(promises(board(**change))) if not holds] == broken
