import math

import pytest
import torch

from trainers import losses


def test_the_loss_is_the_one_worked_out_by_hand(batch_with):
    # Winner: target 0, policy 2, reference 1; the loser is predicted perfectly. s = (1 - 0) - (4 - 0) = -3 = z.
    batch = batch_with([[4.0], [0.0]], [[1.0], [0.0]])
    expected = (2 - 2 * (1 - 1 / (1 + math.exp(3))) * (2 - 1)) ** 2
    assert losses.dspo(batch, beta=2.0).item() == pytest.approx(expected)


def test_the_gradient_reaches_the_loser_through_the_sigmoid(batch_with):
    batch = batch_with([[4.0], [1.0]], [[1.0], [2.0]])
    losses.dspo(batch, beta=2.0).sum().backward()
    assert batch.policy.grad[1].abs().item() > 1e-3


def test_the_mean_goes_over_channels_and_places_of_each_winner():
    target = torch.zeros(2, 2, 3, 2, 2)
    policy = torch.stack([torch.ones(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)])
    policy[0, 1, 0] = 3.0
    values = losses.dspo(losses.PairBatch(target, policy, policy.clone()), beta=1.0)
    assert values.tolist() == pytest.approx([1.0, (4 * 9 + 8) / 12])
