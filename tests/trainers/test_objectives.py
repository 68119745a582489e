import pytest
import torch

from trainers import losses, recipes
from trainers.objectives import Bound


@pytest.fixture
def batch():
    target, policy, reference = torch.randn(3, 2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    policy.requires_grad_()
    return losses.PairBatch(target, policy, reference, annotator_errors=torch.rand(2, 2, 4))


def test_an_objectives_numbers_reach_its_loss(batch):
    bound = Bound(recipes.DiffusionDPO(beta=7.0))
    assert torch.equal(bound.loss(batch, {}), losses.diffusion_dpo(batch, beta=7.0))
    assert not torch.equal(bound.loss(batch, {}), losses.diffusion_dpo(batch, beta=8.0))


def test_an_objective_without_statistics_has_none_of_any_kind(batch):
    bound = Bound(recipes.IPO())
    assert bound.sums(batch, {}) == bound.state() == bound.details(batch, {}) == {}
    assert bound.update({"kept": torch.ones(1)}, {}) == {"kept": torch.ones(1)}


def test_statistics_taken_first_leave_the_loss_its_gradient(batch):
    bound = Bound(recipes.AdaptiveDPO())
    state = bound.state()
    sums = bound.sums(batch, state)
    assert not any(t.requires_grad for t in sums.values())
    bound.loss(batch, {**state, **sums}).mean().backward()
    assert batch.policy.grad.abs().sum() > 0


def test_an_optimiser_step_updates_the_state_and_leaves_the_old_one(batch):
    bound = Bound(recipes.AdaptiveDPO())
    before = bound.state()
    after = bound.update(before, bound.sums(batch, before))
    assert before["steps"].item() == 0
    assert after["steps"].item() == 1
    assert after.keys() == before.keys()


def test_what_an_objective_needs_is_what_the_loop_asks_for():
    online, dataset = recipes.AdaptiveDPO(), recipes.AdaptiveDPO(metric="dataset", margin_term="none")
    assert Bound(online).needs("annotators")
    assert not Bound(online).needs("minority")
    assert Bound(dataset).needs("minority")
    assert not Bound(dataset).needs("annotators")
    assert not Bound(recipes.SFT()).needs("reference")
