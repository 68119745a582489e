import math

import pytest

from trainers import losses, recipes
from trainers.objectives import Bound


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("policy", "gains", "divergence"),
    [
        ([[1.0], [3.0]], (1.0, -1.0), 0.0),
        ([[0.0], [1.0]], (2.0, 1.0), 1.5),
        # A mean below 0 is no divergence.
        ([[3.0], [4.0]], (-1.0, -2.0), 0.0),
    ],
)
def test_the_loss_is_the_one_worked_out_by_hand(policy, gains, divergence, batch_with):
    batch = batch_with(policy, [[2.0], [2.0]])
    bound = Bound(recipes.KTO(beta=3.0, desirable_weight=1.0, undesirable_weight=2.0))
    winner, loser = (1.5 * (g - divergence) for g in gains)
    expected = (1 - sigmoid(winner)) + 2 * (1 - sigmoid(-loser))
    assert bound.loss(batch, bound.sums(batch, {})).item() == pytest.approx(expected)


def test_the_divergence_is_the_mean_over_all_images_of_all_processes(batch_with):
    first, second = batch_with([[0.0], [1.0]], [[2.0], [2.0]]), batch_with([[1.0], [2.0]], [[2.0], [2.0]])
    sums = [losses.kto_sums(b, {}) for b in (first, second)]
    total = {k: sums[0][k] + sums[1][k] for k in sums[0]}
    assert (total["gains"] / total["images"]).item() == pytest.approx((2 + 1 + 1 + 0) / 4)
