import math

import pytest

from trainers import losses


def test_the_loss_is_the_one_worked_out_by_hand(batch_with_margins):
    # sigmoid(z) = 0.5 and 0.75 against Bern(0.75).
    values = losses.dmpo(batch_with_margins(0.0, math.log(3)), beta=2.0, alpha=0.25)
    assert values.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.0], abs=1e-12)


def test_sure_policies_keep_finite_losses(batch_with_margins):
    values = losses.dmpo(batch_with_margins(500.0, -500.0), beta=2.0, alpha=0.01)
    assert values.tolist() == pytest.approx([-math.log(0.99), -math.log(0.01)])
