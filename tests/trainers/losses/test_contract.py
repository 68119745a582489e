"""The contract that every objective answers: one number per pair, pairs do not mix, gradient into the policy only."""

import math

import pytest
import torch

from trainers import losses

OBJECTIVES = {"diffusion_dpo": lambda batch: losses.diffusion_dpo(batch, beta=5.0)}
every_objective = pytest.mark.parametrize("loss", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def tensors(pairs=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(2, pairs, 3, 4, 4, generator=generator, dtype=torch.float64)
    policy = target + 0.5 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    reference = target + 0.5 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (target, policy, reference)]


@every_objective
def test_an_objective_gives_one_finite_number_per_pair(loss):
    values = loss(losses.PairBatch(*tensors(pairs=5)))
    assert values.shape == (5,)
    assert torch.isfinite(values).all()


@every_objective
def test_pairs_do_not_mix(loss):
    target, policy, reference = tensors(pairs=4)
    whole = loss(losses.PairBatch(target, policy, reference))
    alone = torch.cat([loss(losses.PairBatch(*(t[:, [i]] for t in (target, policy, reference)))) for i in range(4)])
    torch.testing.assert_close(whole, alone)


@every_objective
def test_gradient_reaches_the_policy_only(loss):
    target, policy, reference = (t.requires_grad_() for t in tensors())
    loss(losses.PairBatch(target, policy, reference)).sum().backward()
    assert policy.grad is not None
    assert policy.grad.abs().sum() > 0
    assert reference.grad is None


@every_objective
def test_the_gradient_is_that_of_finite_differences_in_float64(loss):
    target, policy, reference = tensors(pairs=2, dtype=torch.float64)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(losses.PairBatch(target, p, reference)), (policy,))


@every_objective
def test_bfloat16_predictions_stay_near_float32(loss):
    exact = loss(losses.PairBatch(*tensors()))
    rounded = loss(losses.PairBatch(*tensors(dtype=torch.bfloat16)))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_policy_equal_to_reference_costs_exactly_log_two(dtype):
    target, policy, _ = tensors(dtype=dtype)
    values = losses.diffusion_dpo(losses.PairBatch(target, policy, policy.clone()), beta=2000.0)
    expected = torch.full_like(values, math.log(2))
    assert torch.equal(values, expected) or (values - expected).abs().max() < 1e-7


def test_a_batch_of_wrong_shape_is_refused_with_the_shapes_in_the_message():
    with pytest.raises(ValueError, match=r"\[2, B, C, H, W\]"):
        losses.PairBatch(torch.zeros(2, 3, 4, 8, 8), torch.zeros(2, 3, 4, 8, 8), torch.zeros(2, 3, 4, 8, 7))
