import math

import pytest
import torch

from trainers import losses, recipes

LOG_SIGMOIDS = (math.log(0.75), math.log(0.25))
"""Of z = log 3 and of -z."""


def test_the_conservative_loss_is_the_one_worked_out_by_hand(batch_with_margins):
    loss = losses.cdpo(batch_with_margins(math.log(3)), beta=2.0, flip_probability=0.1)
    assert loss.item() == pytest.approx(-0.9 * LOG_SIGMOIDS[0] - 0.1 * LOG_SIGMOIDS[1])


def test_the_robust_loss_is_the_one_worked_out_by_hand(batch_with_margins):
    loss = losses.rdpo(batch_with_margins(math.log(3)), beta=2.0, flip_probability=0.1)
    assert loss.item() == pytest.approx((-0.9 * LOG_SIGMOIDS[0] + 0.1 * LOG_SIGMOIDS[1]) / 0.8)


def test_the_robust_loss_averaged_over_flips_is_the_loss_on_the_true_label(batch_with_margins):
    margins = torch.linspace(-4, 4, 9).tolist()
    told, flipped = batch_with_margins(*margins), batch_with_margins(*(-s for s in margins))
    numbers = {"beta": 3.0, "flip_probability": 0.3}
    mean = 0.7 * losses.rdpo(told, **numbers) + 0.3 * losses.rdpo(flipped, **numbers)
    torch.testing.assert_close(mean, losses.diffusion_dpo(told, beta=3.0))


def test_the_conservative_loss_is_smallest_where_the_label_is_as_sure_as_it_is_right(batch_with_margins):
    batch = batch_with_margins(math.log(9))
    losses.cdpo(batch, beta=2.0, flip_probability=0.1).sum().backward()
    assert batch.policy.grad.abs().max() < 1e-12


@pytest.mark.parametrize("loss", [losses.cdpo, losses.rdpo])
def test_without_flips_the_loss_is_diffusion_dpo(loss, batch_with_margins):
    batch = batch_with_margins(2.0, -1.0)
    assert torch.equal(loss(batch, beta=5.0, flip_probability=0.0), losses.diffusion_dpo(batch, beta=5.0))


@pytest.mark.parametrize("objective", [recipes.CDPO, recipes.RDPO])
def test_labels_that_are_wrong_half_of_the_time_are_refused(objective):
    with pytest.raises(ValueError, match="flip_probability"):
        objective(flip_probability=0.5)
