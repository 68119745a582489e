import math

import pytest
import torch

from trainers import losses, recipes
from trainers.objectives import Bound


@pytest.mark.parametrize(("temperature", "mean"), [(1.0, (0.5 + 0.75) / 2), (0.5, (0.25 + 0.5625) / 2)])
def test_the_mean_over_the_batch_is_the_papers_loss_worked_out_by_hand(temperature, mean, batch_with_margins):
    # sigmoid(z) is 0.5 and 0.75; exp(log sigmoid(z) / b') is sigmoid(z)^(1 / b').
    batch = batch_with_margins(0.0, math.log(3))
    bound = Bound(recipes.DrDPO(beta=2.0, temperature=temperature))
    loss = bound.loss(batch, bound.sums(batch, {})).mean()
    assert loss.item() == pytest.approx(-temperature * math.log(mean))


def test_the_gradient_is_that_of_the_papers_loss(batch_with_margins):
    batch = batch_with_margins(0.5, -2.0, 1.0, -0.1)
    bound = Bound(recipes.DrDPO(beta=3.0, temperature=0.7))
    (ours,) = torch.autograd.grad(bound.loss(batch, bound.sums(batch, {})).mean(), batch.policy, retain_graph=True)
    whole = -0.7 * (torch.sigmoid(1.5 * batch.margin) ** (1 / 0.7)).mean().log()
    torch.testing.assert_close(ours, torch.autograd.grad(whole, batch.policy)[0])


def test_a_high_temperature_gives_diffusion_dpo(batch_with_margins):
    batch = batch_with_margins(0.5, -2.0, 1.0)
    bound = Bound(recipes.DrDPO(beta=3.0, temperature=1e6))
    loss = bound.loss(batch, bound.sums(batch, {})).mean()
    assert loss.item() == pytest.approx(losses.diffusion_dpo(batch, beta=3.0).mean().item(), rel=1e-5)


def test_a_batch_of_hopeless_pairs_in_float32_keeps_its_loss_and_gradient(batch_with_margins):
    batch = batch_with_margins(-150.0, -300.0, dtype=torch.float32)
    bound = Bound(recipes.DrDPO(beta=2.0))
    loss = bound.loss(batch, bound.sums(batch, {}))
    # log mean(e^-150, e^-300) = -150 - log 2.
    assert loss.dtype == torch.float32
    assert loss.mean().item() == pytest.approx(150 + math.log(2), rel=1e-6)
    loss.mean().backward()
    assert batch.policy.grad[0, 0].abs().item() > 1
    assert batch.policy.grad[0, 1].item() == 0
