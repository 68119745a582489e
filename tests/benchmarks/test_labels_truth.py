import json

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from benchmarks import labels_truth as lt


def by_comparing_all(is_positive, score, weight):
    positive, negative = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
    won = (score[positive][:, None] > score[negative]) + 0.5 * (score[positive][:, None] == score[negative])
    weights = weight[positive][:, None] * weight[negative]
    return (won * weights).sum() / weights.sum()


@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_the_auc_is_the_share_of_comparisons_won_with_ties_half(levels):
    rng = np.random.default_rng(levels)
    is_positive, weight = rng.random(300) < 0.3, rng.integers(0, 4, 300).astype(float)
    score = (rng.integers(0, levels, 300) + is_positive) / 7
    assert lt.auc(is_positive, score, weight) == pytest.approx(by_comparing_all(is_positive, score, weight), abs=1e-12)
    assert lt.auc(is_positive, score) == pytest.approx(by_comparing_all(is_positive, score, np.ones(300)), abs=1e-12)


def test_the_auc_of_one_kind_of_votes_alone_is_unknown():
    assert np.isnan(lt.auc(np.ones(3, bool), np.arange(3.0)))


def test_the_auc_within_folds_ignores_what_sets_folds_apart():
    rng = np.random.default_rng(0)
    folds, is_positive = np.repeat(np.arange(5), 80), rng.random(400) < 0.4
    score = is_positive + rng.normal(size=400)
    shifted = score - 10.0 * folds
    assert lt.auc_within(folds, is_positive, shifted) == pytest.approx(lt.auc_within(folds, is_positive, score))
    assert lt.auc(is_positive, shifted) < lt.auc(is_positive, score) - 0.1


def test_a_bound_cannot_learn_a_prompt_by_heart():
    rng = np.random.default_rng(1)
    folds, is_positive = rng.integers(0, 5, 500), rng.random(500) < 0.3
    # 100 random columns explain 500 random truths well, but only those that they were fitted on.
    assert abs(lt.auc(is_positive, lt.cross_fitted(rng.normal(size=(500, 100)), is_positive, folds)) - 0.5) < 0.1


def test_a_bound_finds_what_its_inputs_tell():
    rng = np.random.default_rng(2)
    x, folds = rng.normal(size=(4000, 2)), rng.integers(0, 5, 4000)
    logit = 2 * x[:, 0] - x[:, 1] - 1
    is_positive = rng.random(4000) < 1 / (1 + np.exp(-logit))
    found = lt.cross_fitted(x, is_positive, folds, ridge=0.0)
    assert np.abs(found - logit).mean() < 0.15


def test_the_calibration_error_counts_people():
    probability, is_positive = np.array([0.25, 0.25, 0.85]), np.array([True, False, True])
    # Bin 0.2-0.3: three people of four against, said to be one; bin 0.8-0.9: one of one.
    expected = (4 * abs(0.25 - 0.75) + 1 * abs(0.85 - 1)) / 5
    assert lt.calibration_error(probability, is_positive, np.array([3, 1, 1])) == pytest.approx(expected)


def raw_labels(world):
    files = sorted((world / "pickapic" / "data").glob("*.parquet"))
    names = ["label_0", "label_1", "best_image_uid", "image_0_uid", "image_1_uid", "has_label"]
    rows = pl.concat(pl.from_arrow(pq.read_table(f, columns=names)) for f in files)
    return rows, json.loads((world / "hpdv2" / "train.json").read_text())


def test_flips_turn_single_decided_votes_round_and_the_truth_with_them(world_copy):
    rows, records = raw_labels(world_copy)
    truth = pl.read_parquet(world_copy / "truth" / "votes.parquet")
    ranked = (world_copy / "hpdv2" / "test.json").read_bytes()
    is_decided = (rows["label_0"].is_not_null() & (rows["label_0"] != 0.5)).fill_null(False)

    assert lt.flip_single_votes(world_copy, 1.0, seed=0) == is_decided.sum() + len(records)

    now, records_now = raw_labels(world_copy)
    assert now.filter(~is_decided).equals(rows.filter(~is_decided))
    turned, before = now.filter(is_decided), rows.filter(is_decided)
    assert (turned["label_0"] == 1 - before["label_0"]).all()
    assert (turned["label_0"] + turned["label_1"] == 1).all()
    chosen = pl.when(pl.col("label_0") == 1).then("image_0_uid").otherwise("image_1_uid")
    assert turned["best_image_uid"].equals(turned.select(chosen).to_series(), check_names=False)
    assert [r["human_preference"] for r in records_now] == [r["human_preference"][::-1] for r in records]
    assert (world_copy / "hpdv2" / "test.json").read_bytes() == ranked

    truth_now = pl.read_parquet(world_copy / "truth" / "votes.parquet")
    assert truth_now["source_row"].equals(truth["source_row"])
    changed = truth_now["is_against_mean"] != truth["is_against_mean"]
    assert changed.fill_null(False).sum() == truth_now["is_flipped"].sum() == is_decided.sum() + len(records)
    assert not truth_now.filter(pl.col("source_row").str.starts_with("test.json"))["is_flipped"].any()


def test_flips_at_a_rate_turn_about_that_share_and_the_same_ones_again(world_copy, tiny_world, tmp_path):
    rows, records = raw_labels(world_copy)
    decided = (rows["label_0"] != 0.5).sum() + len(records)
    count = lt.flip_single_votes(world_copy, 0.2, seed=3)
    assert abs(count / decided - 0.2) < 4 * (0.16 / decided) ** 0.5
    # The same draw once more turns the same votes back.
    assert lt.flip_single_votes(world_copy, 0.2, seed=3) == count
    assert raw_labels(world_copy)[0].equals(raw_labels(tiny_world)[0])
    assert raw_labels(world_copy)[1] == raw_labels(tiny_world)[1]


def test_an_interval_over_seeds_is_student_s():
    mean, low, high = lt.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    # t(0.975, 2) = 4.302653, standard error 1 / sqrt(3)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
