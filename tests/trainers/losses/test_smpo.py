import math

import pytest

from trainers import losses


def test_the_loss_is_the_one_worked_out_by_hand(batch_with_margins):
    # omega = 10 * (2 * 0.75 - 1) = 5, z = 0.2 * 1.
    batch = batch_with_margins(0.2, probability=[0.75])
    assert losses.smpo(batch, beta=2.0, gamma=10.0).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_equally_good_images_cost_log_two_and_have_no_gradient(batch_with_margins):
    batch = batch_with_margins(3.0, probability=[0.5])
    loss = losses.smpo(batch, beta=2000.0, gamma=10.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert batch.policy.grad.abs().max() == 0
