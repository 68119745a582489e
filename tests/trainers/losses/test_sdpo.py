import pytest
import torch

from trainers import losses, recipes
from trainers.objectives import Bound


def batch_with_residuals(winner, loser):
    """Return one pair whose latents of two numbers are missed by these."""
    policy = torch.tensor([winner, loser], dtype=torch.float64)[:, None, None, None, :].requires_grad_()
    return losses.PairBatch(torch.zeros_like(policy), policy, torch.zeros_like(policy))


@pytest.mark.parametrize(
    ("winner", "loser", "scale"),
    [
        # gA . gB is 2 in units of |gA|^2 = 1: (1 - 0.9) * 1 / 2.
        ((1.0, 0.0), (2.0, 2.0), 0.05),
        # A small loser's gradient that points the same way is safe as it is.
        ((1.0, 0.0), (0.05, 0.0), 1.0),
        # Opposed and orthogonal gradients are safe at any size.
        ((1.0, 0.0), (-2.0, 2.0), 1.0),
        ((1.0, 0.0), (0.0, 2.0), 1.0),
    ],
)
def test_only_the_losers_gradient_is_scaled_by_the_number_worked_out_by_hand(winner, loser, scale):
    batch = batch_with_residuals(winner, loser)
    bound = Bound(recipes.SDPO(beta=0.5, mu=0.9))
    loss, plain = bound.loss(batch, bound.sums(batch, {})), losses.diffusion_dpo(batch, beta=0.5)
    (ours,) = torch.autograd.grad(loss.sum(), batch.policy, retain_graph=True)
    (theirs,) = torch.autograd.grad(plain.sum(), batch.policy)
    assert torch.equal(loss, plain)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], scale * theirs[1])
