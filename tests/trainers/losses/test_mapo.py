import math

import pytest
import torch

from trainers import losses


def test_the_loss_is_the_one_worked_out_by_hand(batch_with):
    # snr * L is 1 for the winner and 2 for the loser.
    batch = batch_with([[2.0], [4.0]])
    margin = 3 * (1 / (math.e - 1) - 2 / (math.e**2 - 1))
    expected = 2 + 0.1 * math.log(1 + math.exp(-margin))
    assert losses.mapo(batch, beta=0.1, snr=0.5, timesteps=3).item() == pytest.approx(expected)


def test_equal_errors_cost_the_winners_error_and_beta_log_two(batch_with):
    batch = batch_with([[0.3], [0.3]])
    assert losses.mapo(batch, beta=0.1, snr=0.5, timesteps=1000).item() == pytest.approx(0.3 + 0.1 * math.log(2))


def test_a_perfect_prediction_has_the_limit_as_its_likelihood(batch_with):
    batch = batch_with([[0.0], [4.0]], dtype=torch.float32)
    loss = losses.mapo(batch, beta=0.1, snr=0.5, timesteps=1)
    loss.sum().backward()
    expected = 0.1 * math.log(1 + math.exp(-(1 - 2 / (math.e**2 - 1))))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(batch.policy.grad[1]).all()
