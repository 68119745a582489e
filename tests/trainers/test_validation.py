import io
import math

import polars as pl
import pytest
import torch
from PIL import Image

from pipelines import schemas
from pipelines.tables import Store
from trainers.validation import by_labels, fixed_draws, grid, held_out_pairs, is_better


def test_accuracy_and_loss_by_label_source_are_the_ones_worked_out_by_hand():
    pairs = pl.DataFrame({"consensus": [1.0, -1.0, None], "is_minority": [False, True, False]})
    margin = torch.tensor([[2.0, -2.0], [4.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    found = by_labels(margin, pairs, beta=1.0)
    # Human: right 1 of 2, 2 of 2, ties.
    assert found["implicit_accuracy_human"] == (pytest.approx((1 + 0 + 1 + 1 + 0.5 + 0.5) / 6), 3)
    assert found["implicit_accuracy_consensus"] == (pytest.approx((1 + 0 + 0 + 0) / 4), 2)
    assert found["implicit_accuracy_minority"] == (1.0, 1)

    def loss(z):
        return math.log(1 + math.exp(-z))

    assert found["loss_minority"] == (pytest.approx(loss(2)), 1)
    assert found["loss_consensus"] == (pytest.approx((loss(1) + loss(-1) + 2 * loss(-2)) / 4), 2)


def test_a_source_that_decides_no_pair_is_left_out():
    pairs = pl.DataFrame(
        {"consensus": [None, 0.0], "is_minority": [False, False]}, schema_overrides={"consensus": float}
    )
    assert by_labels(torch.ones(2, 1), pairs, 1.0).keys() == {"implicit_accuracy_human", "loss_human"}


def test_losses_are_better_when_they_fall_and_everything_else_when_it_rises():
    assert is_better("loss_human", 0.5, 0.6)
    assert not is_better("loss_human", 0.7, 0.6)
    assert is_better("median_score", 0.7, 0.6)
    assert not is_better("implicit_accuracy_human", 0.6, 0.6)
    assert is_better("loss_human", 9.0, None)


def test_fixed_draws_lie_in_the_middle_of_equal_parts_of_the_schedule():
    drawn = [fixed_draws("validation", ["a", "b"], d, 4, 1000) for d in range(4)]
    assert [d.timesteps for d in drawn] == [[125, 125], [375, 375], [625, 625], [875, 875]]
    assert len({k for d in drawn for k in d.keys}) == 8


def test_held_out_pairs_are_decided_by_people_and_know_their_other_labels(cached_config):
    store = Store(cached_config.store_location)
    pairs = held_out_pairs(store, 30)
    joined = pairs.join(store.read(schemas.PREFERENCES), on="pair_id", suffix="_all")
    assert len(joined) == 30
    assert set(joined["split"]) == {"validation"}
    for row in joined.iter_rows(named=True):
        human_side = 1.0 if row["winner_id"] == row["image_0_id"] else 0.0
        assert (row["human_label_0"] > 0.5) == (human_side == 1.0)
        label = row["consensus_label_0"]
        expected = None if label in (None, 0.5) else (1.0 if label == human_side else -1.0)
        assert row["consensus"] == expected
        value = row["minority_probability"] if row["minority_probability"] is not None else row["minority_score"]
        assert row["is_minority"] == (value is not None and value > 0.5)
    assert {1.0, -1.0} <= set(joined["consensus"])


def test_samples_are_laid_side_by_side():
    pictures = [Image.new("RGB", (8, 8), (i * 20, 0, 0)) for i in range(10)]
    sheet = Image.open(io.BytesIO(grid(pictures, columns=4, side=16)))
    assert sheet.size == (64, 48)
    assert sheet.getpixel((8, 40)) == (160, 0, 0)
    assert sheet.getpixel((60, 40)) == (255, 255, 255)
    assert grid([]) == b""
