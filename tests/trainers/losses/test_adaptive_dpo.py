import math

import pytest
import torch

from trainers import losses, recipes
from trainers.losses.adaptive_dpo import minority_metric, weight_of
from trainers.objectives import Bound

CORRECTED = recipes.AdaptiveDPO(metric="online_corrected", margin_term="none")


def softplus(x):
    return math.log(1 + math.exp(x))


@pytest.fixture
def annotated(batch_with_margins, with_margins):
    """Return a batch with these margins of policy, slow and fast average."""

    def batch(policy, slow, fast):
        return batch_with_margins(*policy, annotator_errors=[with_margins(slow), with_margins(fast)])

    return batch


def with_sigma(sigma, updates=50.0):
    """Return the corrected metric's state in which every annotator's sigma is this number."""
    return {
        "steps": torch.tensor(updates),
        "scale_updates": torch.full((3,), updates),
        "running_rms": torch.full((3,), sigma * (1 - 0.99**updates), dtype=torch.float64),
    }


def test_metric_weight_and_loss_are_those_worked_out_by_hand(annotated):
    # s^ = s / 5: z (rho = 1) is (0.6, 0.8, 0) for the first pair and (0.8, 0.6, 1) for the second. Its unbiased variance
    # is 13/75 and 1/25. b = 1; the mean of s is 3.5.
    batch = annotated((3.0, 4.0), (4.0, 3.0), (0.0, 5.0))
    bound = Bound(recipes.AdaptiveDPO(beta=2.0, rho=1.0))
    sums = bound.sums(batch, bound.state())
    assert sums["squared_margins"].tolist() == pytest.approx([25.0, 25.0, 25.0])
    statistics = {**bound.state(), **sums, "steps": torch.tensor(2.0)}
    confidence = [sum(1 / (1 + math.exp(z)) for z in zs) / 3 for zs in ((0.6, 0.8, 0.0), (0.8, 0.6, 1.0))]
    stability = [math.sqrt(13 / 75), 0.2]
    metric = [c * v for c, v in zip(confidence, stability, strict=True)]
    details = bound.details(batch, statistics)
    assert details["margin"].tolist() == pytest.approx([3.0, 4.0])
    assert details["confidence"].tolist() == pytest.approx(confidence)
    assert details["stability"].tolist() == pytest.approx(stability)
    assert details["metric"].tolist() == pytest.approx(metric)
    assert details["weight"].tolist() == pytest.approx([1 / (1 + 10 * u) for u in metric])
    expected = [softplus(-(s - (3.5 - u**2))) / (1 + 10 * u) for s, u in zip((3, 4), metric, strict=True)]
    assert bound.loss(batch, statistics).tolist() == pytest.approx(expected)


def test_stability_is_clamped_and_confidence_of_sure_annotators_keeps_its_digits():
    confidence, stability, metric = minority_metric(torch.tensor([[30.0], [40.0], [35.0]]))
    assert stability.item() == 1.0
    assert confidence.item() == pytest.approx((math.exp(-30) + math.exp(-35) + math.exp(-40)) / 3, rel=1e-5)
    assert metric.item() == confidence.item()


@pytest.mark.parametrize(
    ("weighting", "expected"), [("linear", 1 / 7), ("quadratic", 1 / 4.5), ("exp", 1 / (2 + math.exp(5)))]
)
def test_the_weights_are_those_of_their_formulas(weighting, expected):
    weight = weight_of(torch.tensor([0.5]), c1=2.0, k1=10.0, weighting=weighting)
    assert weight.item() == pytest.approx(expected)


def test_the_released_metric_is_zero_in_the_first_two_optimiser_steps(annotated):
    batch = annotated((3.0, -4.0), (4.0, -3.0), (0.5, -5.0))
    bound = Bound(recipes.AdaptiveDPO())
    state = bound.state()
    seen = []
    for _ in range(4):
        sums = bound.sums(batch, state)
        details = bound.details(batch, {**state, **sums})
        seen.append(details["metric"].max().item())
        assert details["confidence"][1] > 0.9
        state = bound.update(state, sums)
    assert seen[:2] == [0.0, 0.0]
    assert min(seen[2:]) > 0.5


def test_annotators_that_are_the_reference_have_no_opinion(annotated):
    batch = annotated((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    bound = Bound(recipes.AdaptiveDPO())
    state = {**bound.state(), "steps": torch.tensor(5.0)}
    statistics = {**state, **bound.sums(batch, state)}
    assert bound.details(batch, statistics)["confidence"].tolist() == [0.5, 0.5]
    assert bound.loss(batch, statistics).tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("objective", [recipes.AdaptiveDPO(), CORRECTED], ids=["online", "online_corrected"])
def test_no_gradient_flows_through_weight_and_margin_term(objective, annotated):
    batch = annotated((0.3, -0.4, 0.1), (0.4, -0.3, 0.2), (0.1, -0.5, -0.2))
    bound = Bound(objective)
    state = {**with_sigma(0.3), "steps": torch.tensor(9.0)}
    statistics = {**state, **bound.sums(batch, state)}
    (ours,) = torch.autograd.grad(bound.loss(batch, statistics).sum(), batch.policy, retain_graph=True)
    details = bound.details(batch, statistics)
    b = 0.5 * objective.beta
    term = 0 if objective.margin_term == "none" else -(details["metric"] ** 2) / b + batch.margin.detach().mean()
    by_margin = -details["weight"] * b * torch.sigmoid(term - b * batch.margin.detach())
    (margins,) = torch.autograd.grad((batch.margin * by_margin).sum(), batch.policy)
    assert (details["weight"] < 0.9).any()
    torch.testing.assert_close(ours, margins)


@pytest.mark.parametrize(("margin", "is_kept"), [(2.0, True), (-2.0, False)])
def test_the_corrected_weight_is_high_two_sigma_with_the_label_and_low_two_sigma_against_it(margin, is_kept, annotated):
    sigma = 0.05
    margins = (margin * sigma,) * 4
    batch = annotated(margins, margins, margins)
    bound = Bound(CORRECTED)
    statistics = {**with_sigma(sigma), **bound.sums(batch, with_sigma(sigma))}
    weight = bound.details(batch, statistics)["weight"]
    # c = sigmoid(-3.75 * 2) or sigmoid(3.75 * 2).
    assert weight.tolist() == pytest.approx([1 / (1 + 10 / (1 + math.exp(3.75 * margin)))] * 4)
    assert (weight > 0.9).all() if is_kept else (weight < 0.1).all()
    assert torch.equal(bound.details(batch, statistics)["stability"], torch.zeros(4, dtype=torch.float64))


def drawn(pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    policy, slow, fast = 0.1 * torch.randn(3, pairs, generator=generator, dtype=torch.float64)
    return policy.tolist(), slow.tolist(), fast.tolist()


def weights_after_steps(objective, annotated, parts, steps=14):
    """Return W of the 16 pairs of the last step, where each step's batch comes in that many parts of equal size.

    A part is a micro-batch of accumulation or, all alike to the objective, the sums of several ranks.
    """
    bound = Bound(objective)
    state = bound.state()
    for step in range(steps):
        columns = drawn(16, step)
        size = 16 // parts
        batches = [annotated(*(c[i : i + size] for c in columns)) for i in range(0, 16, size)]
        sums = [bound.sums(b, state) for b in batches]
        given = [{**state, **s} for s in sums]
        weights = [bound.details(b, g)["weight"] for b, g in zip(batches, given, strict=True)]
        state = bound.update(state, {k: sum(s[k] for s in sums) for k in sums[0]})
    return torch.cat(weights)


def test_the_corrected_weight_is_the_same_for_one_batch_of_16_four_of_4_and_two_ranks(annotated):
    whole = weights_after_steps(CORRECTED, annotated, 1)
    assert whole.min() < 0.2
    assert whole.max() > 0.5
    torch.testing.assert_close(weights_after_steps(CORRECTED, annotated, 4), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights_after_steps(CORRECTED, annotated, 2), whole, rtol=1e-6, atol=0)


def test_the_released_weight_depends_on_the_micro_batch(annotated):
    released = recipes.AdaptiveDPO()
    whole, quarters = (weights_after_steps(released, annotated, parts) for parts in (1, 4))
    assert (whole - quarters).abs().max() > 0.1


def test_sums_over_ranks_give_the_released_weight_of_the_global_batch(annotated):
    columns = drawn(16, 3)
    bound = Bound(recipes.AdaptiveDPO())
    state = {**bound.state(), "steps": torch.tensor(7.0)}
    whole = annotated(*columns)
    ranks = [annotated(*(c[h] for c in columns)) for h in (slice(0, 8), slice(8, 16))]
    sums = [bound.sums(r, state) for r in ranks]
    total = {k: sums[0][k] + sums[1][k] for k in sums[0]}
    together = torch.cat([bound.loss(r, {**state, **total}) for r in ranks])
    torch.testing.assert_close(together, bound.loss(whole, {**state, **bound.sums(whole, state)}))


def test_the_corrected_scale_is_the_bias_corrected_running_rms_and_passes_over_steps_without_margins(annotated):
    bound = Bound(CORRECTED)
    state = bound.state()
    # rms of (3, 4) is sqrt(12.5), of (6, 8) twice that; the slow average stays at the reference in the first step.
    steps = [((0.0, 0.0),) * 3, ((3.0, 4.0), (0.0, 0.0), (3.0, 4.0)), ((6.0, 8.0),) * 3]
    for margins in steps:
        batch = annotated(*margins)
        state = bound.update(state, bound.sums(batch, state))
    rms = math.sqrt(12.5)
    assert state["steps"].item() == 3
    assert state["scale_updates"].tolist() == [2, 1, 2]
    both = 0.99 * 0.01 * rms + 0.01 * 2 * rms
    assert state["running_rms"].tolist() == pytest.approx([both, 0.02 * rms, both])
    details = bound.details(batch, {**state, **bound.sums(batch, state)})
    sigma = [both / (1 - 0.99**2), 2 * rms, both / (1 - 0.99**2)]
    expected = [sum(1 / (1 + math.exp(3.75 * s / g)) for g in sigma) / 3 for s in (6.0, 8.0)]
    assert details["confidence"].tolist() == pytest.approx(expected)


def test_the_corrected_metric_is_zero_until_its_scale_rests_on_ten_steps(annotated):
    bound = Bound(CORRECTED)
    batch = annotated((0.3, -0.4), (0.4, -0.3), (0.1, -0.5))
    metric = {k: bound.details(batch, with_sigma(0.3, k))["metric"].tolist() for k in (0.0, 9.0, 10.0)}
    assert metric[0.0] == metric[9.0] == [0.0, 0.0]
    assert metric[10.0][1] > 0.9


def test_the_dataset_metric_weighs_by_the_minority_value_and_needs_no_annotators(batch_with_margins):
    batch = batch_with_margins(1.0, 1.0, minority=[0.0, 0.4])
    bound = Bound(recipes.AdaptiveDPO(beta=2.0, metric="dataset", margin_term="none"))
    assert bound.state() == {}
    statistics = bound.sums(batch, {})
    assert bound.loss(batch, statistics).tolist() == pytest.approx([softplus(-1), softplus(-1) / 5])
    details = bound.details(batch, statistics)
    assert details.keys() == {"margin", "metric", "weight"}
    assert bound.update({}, statistics) == {}


def test_options_that_a_metric_does_not_have_are_refused():
    with pytest.raises(ValueError, match="margin_term='none'"):
        recipes.AdaptiveDPO(metric="dataset")
    with pytest.raises(ValueError, match="normalise"):
        recipes.AdaptiveDPO(metric="online_corrected", margin_term="none", normalise=False)


def test_a_batch_without_annotators_is_refused(batch_with_margins):
    with pytest.raises(ValueError, match="annotator_errors"):
        losses.adaptive_dpo_sums(batch_with_margins(1.0), {}, metric="online")
