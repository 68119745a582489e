import pytest

from trainers import losses


def test_the_loss_is_the_one_worked_out_by_hand(batch_with_margins):
    # The margin aimed at is 1 / (2 * 1) = 0.5.
    assert losses.ipo(batch_with_margins(3.0, 0.5, -1.0), beta_ipo=1.0).tolist() == pytest.approx([6.25, 0.0, 2.25])
