"""The contract that every objective answers: see `trainers.losses.batch`."""

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch

from trainers import losses, recipes
from trainers.objectives import Bound

OBJECTIVES = {
    "diffusion_dpo": recipes.DiffusionDPO(beta=5.0),
    "adaptive_dpo": recipes.AdaptiveDPO(beta=5.0),
    "adaptive_dpo, other variants": recipes.AdaptiveDPO(
        beta=5.0, rho=20.0, normalise=False, weighting="exp", margin_term="linear"
    ),
    "adaptive_dpo, ipo": recipes.AdaptiveDPO(beta=5.0, form="ipo", beta_ipo=1.0, weighting="quadratic"),
    "adaptive_dpo, corrected": recipes.AdaptiveDPO(beta=5.0, metric="online_corrected", margin_term="none"),
    "adaptive_dpo, dataset": recipes.AdaptiveDPO(beta=5.0, metric="dataset", margin_term="none"),
    "smpo": recipes.SmPO(beta=5.0),
    "ipo": recipes.IPO(beta_ipo=1.0),
    "cdpo": recipes.CDPO(beta=5.0),
    "rdpo": recipes.RDPO(beta=5.0),
    "soft_dpo": recipes.SoftDPO(beta=5.0),
    "dr_dpo": recipes.DrDPO(beta=5.0, temperature=0.5),
    "dspo": recipes.DSPO(beta=0.5),
    "dmpo": recipes.DMPO(beta=5.0),
    "sdpo": recipes.SDPO(beta=5.0),
    "mapo": recipes.MaPO(timesteps=10),
    "kto": recipes.KTO(beta=5.0, undesirable_weight=2.0),
    "sft": recipes.SFT(),
    "group_robust": recipes.GroupRobust(beta=5.0, groups=3),
}
PARTS = {
    "reference": ("reference",),
    "annotators": ("annotator_errors",),
    "probability": ("probability",),
    "minority": ("minority",),
    "group": ("group",),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
every_precision = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def batch_of(pairs=4, seed=0, dtype=torch.float32, is_opposed=False):
    """Return a batch that has everything; is_opposed: winner's and loser's errors point opposite ways."""
    generator = torch.Generator().manual_seed(seed)
    target, noise, other = torch.randn(3, 2, pairs, 3, 4, 4, generator=generator, dtype=torch.float64)
    if is_opposed:
        noise[1] = 0.1 * noise[1] - noise[0]
    wide = torch.promote_types(dtype, torch.float32)
    return losses.PairBatch(
        *(t.to(dtype) for t in (target, target + 0.5 * noise, target + 0.5 * other)),
        probability=torch.linspace(0.55, 1.0, pairs, dtype=wide),
        minority=torch.linspace(0.0, 0.9, pairs, dtype=wide),
        group=torch.arange(pairs) % 4 - 1,
        annotator_errors=torch.rand(2, 2, pairs, generator=generator, dtype=torch.float64).to(wide),
    )


def pairs_of(batch, index):
    """Return some of a batch's pairs."""
    return losses.PairBatch(
        batch.target[:, index],
        batch.policy[:, index],
        batch.reference[:, index],
        batch.probability[index],
        batch.minority[index],
        batch.group[index],
        batch.annotator_errors[..., index],
    )


def statistics_of(bound, batch, steps=12):
    """Return what the loss is given after some optimiser steps on other batches."""
    state = bound.state()
    for step in range(steps):
        state = bound.update(state, bound.sums(batch_of(seed=step + 1), state))
    return {**state, **bound.sums(batch, state)}


def test_every_objective_of_the_recipes_is_tested_here():
    assert {type(o) for o in OBJECTIVES.values()} == set(recipes.Objective.__subclasses__())


@every_objective
def test_the_fields_of_an_objective_are_the_numbers_that_its_functions_take(objective):
    functions = [getattr(losses, objective.name + s, None) for s in ("", "_sums", "_state", "_update", "_details")]
    taken = {
        p.name
        for f in functions
        if f is not None
        for p in inspect.signature(f).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    assert taken == {f.name for f in fields(objective)}


@every_objective
def test_an_objective_gives_one_finite_number_per_pair(objective):
    bound, batch = Bound(objective), batch_of(pairs=5)
    values = bound.loss(batch, statistics_of(bound, batch))
    assert values.shape == (5,)
    assert values.dtype == torch.float32
    assert torch.isfinite(values).all()


@every_objective
def test_an_objective_reads_what_it_says_that_it_needs(objective):
    bound, batch = Bound(objective), batch_of()
    statistics = statistics_of(bound, batch)
    whole = bound.loss(batch, statistics)
    unneeded = {part: None for need, parts in PARTS.items() for part in parts if need not in objective.needs}
    assert torch.equal(bound.loss(replace(batch, **unneeded), statistics), whole)
    for need in objective.needs:
        for part in PARTS[need]:
            with pytest.raises(ValueError, match=part):
                bound.loss(replace(batch, **{part: None}), statistics)


@every_objective
def test_pairs_do_not_mix_while_statistics_are_fixed(objective):
    bound, batch = Bound(objective), batch_of(pairs=4)
    statistics = statistics_of(bound, batch)
    alone = torch.cat([bound.loss(pairs_of(batch, [i]), statistics) for i in range(4)])
    torch.testing.assert_close(bound.loss(batch, statistics), alone)


@every_objective
def test_sums_over_two_halves_add_up_to_those_over_the_whole(objective):
    bound, batch = Bound(objective), batch_of(pairs=6, dtype=torch.float64)
    state = bound.state()
    first, second = (bound.sums(pairs_of(batch, h), state) for h in (slice(0, 2), slice(2, 6)))
    whole = bound.sums(batch, state)
    assert first.keys() == whole.keys()
    assert not whole.keys() & state.keys()
    for name, total in whole.items():
        torch.testing.assert_close(first[name] + second[name], total)


@every_objective
def test_gradient_reaches_the_policy_only(objective):
    bound, batch = Bound(objective), batch_of()
    given = [batch.policy, batch.reference, batch.probability, batch.minority, batch.annotator_errors]
    for tensor in given:
        tensor.requires_grad_()
    # Statistics first, as the loop takes them: they must not leave the batch without gradient.
    statistics = statistics_of(bound, batch)
    bound.loss(batch, statistics).sum().backward()
    assert batch.policy.grad.abs().sum() > 0
    assert [t.grad for t in given[1:]] == [None] * 4


@every_objective
def test_statistics_and_details_carry_no_gradient(objective):
    # Bound calls them without gradient; they do not depend on it.
    batch = batch_of()
    batch.policy.requires_grad_()
    bound = Bound(objective)
    statistics = statistics_of(bound, batch)
    for suffix, given in (("_sums", bound.state()), ("_details", statistics)):
        function = getattr(losses, objective.name + suffix, None)
        if function is not None:
            known = inspect.signature(function).parameters
            numbers = {k: v for k, v in objective.numbers().items() if k in known}
            assert not any(t.requires_grad for t in function(batch, given, **numbers).values())


@every_objective
def test_the_gradient_is_that_of_finite_differences_in_float64(objective):
    # Two objectives have gradients that are not those of their values, by design, and have tests of their own. Opposed
    # errors leave SDPO's safeguard out, and at the start of a run Adaptive-DPO's metric is 0.
    bound, batch = Bound(objective), batch_of(pairs=2, dtype=torch.float64, is_opposed=True)
    statistics = statistics_of(bound, batch, steps=0)
    policy = batch.policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: bound.loss(replace(batch, policy=p), statistics), (policy,))


@every_objective
def test_bfloat16_predictions_stay_near_float32(objective):
    bound, exact, rounded = Bound(objective), batch_of(), batch_of(dtype=torch.bfloat16)
    expected = bound.loss(exact, statistics_of(bound, exact))
    values = bound.loss(rounded, statistics_of(bound, rounded))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=0.03, rtol=0.03)


AT_REFERENCE = {
    "diffusion_dpo": lambda batch: math.log(2),
    "adaptive_dpo": lambda batch: math.log(2),
    "adaptive_dpo, other variants": lambda batch: math.log(2) / 2,
    "adaptive_dpo, ipo": lambda batch: 1 / 4,
    "adaptive_dpo, corrected": lambda batch: math.log(2),
    "adaptive_dpo, dataset": lambda batch: math.log(2) / (1 + 10 * batch.minority),
    "smpo": lambda batch: math.log(2),
    "ipo": lambda batch: 1 / 4,
    "cdpo": lambda batch: math.log(2),
    "rdpo": lambda batch: math.log(2),
    "soft_dpo": lambda batch: math.log(2),
    "dr_dpo": lambda batch: math.log(2),
    "dspo": lambda batch: batch.policy_error[0],
    "dmpo": lambda batch: -math.log(2) - math.log(0.01 * 0.99) / 2,
    "sdpo": lambda batch: math.log(2),
    "kto": lambda batch: 1.5,
    # One pair of each of four groups: equal weights.
    "group_robust": lambda batch: math.log(2),
}


@every_precision
@pytest.mark.parametrize("name", AT_REFERENCE)
def test_policy_equal_to_reference_costs_what_the_docstring_says(name, dtype):
    batch = batch_of(dtype=dtype)
    batch = replace(batch, policy=batch.reference.clone(), annotator_errors=batch.reference_error.expand(2, 2, 4))
    bound = Bound(OBJECTIVES[name])
    values = bound.loss(batch, statistics_of(bound, batch, steps=0))
    expected = torch.as_tensor(AT_REFERENCE[name](batch), dtype=values.dtype).expand(4)
    torch.testing.assert_close(values, expected, rtol=4 * torch.finfo(values.dtype).eps, atol=0)


@every_precision
@pytest.mark.parametrize("name", ["diffusion_dpo", "adaptive_dpo", "smpo", "cdpo", "rdpo", "soft_dpo", "sdpo"])
def test_policy_equal_to_reference_costs_exactly_log_two(name, dtype):
    batch = batch_of(dtype=dtype)
    batch = replace(batch, policy=batch.reference.clone(), annotator_errors=batch.reference_error.expand(2, 2, 4))
    bound = Bound(replace(OBJECTIVES[name], beta=2000.0))
    values = bound.loss(batch, statistics_of(bound, batch, steps=0))
    assert torch.equal(values, torch.full_like(values, math.log(2)))


def test_a_batch_of_wrong_shape_is_refused_with_the_shapes_in_the_message():
    with pytest.raises(ValueError, match=r"\[2, B, C, H, W\]"):
        losses.PairBatch(torch.zeros(2, 3, 4, 8, 8), torch.zeros(2, 3, 4, 8, 8), torch.zeros(2, 3, 4, 8, 7))


def test_columns_of_wrong_shape_are_refused_with_their_name_in_the_message():
    batch = batch_of(pairs=3)
    with pytest.raises(ValueError, match="probability"):
        replace(batch, probability=torch.ones(4))
    with pytest.raises(ValueError, match="annotator_errors"):
        replace(batch, annotator_errors=torch.ones(2, 3))
