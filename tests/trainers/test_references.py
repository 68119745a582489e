import pytest
import torch

from trainers.recipes import ReferencePolicy
from trainers.references import Reference


def weights(module):
    return module.weight.detach().clone()


def moved(module):
    with torch.no_grad():
        module.weight += 1
    return module


def test_a_frozen_reference_never_changes_and_has_no_gradient():
    policy = torch.nn.Linear(2, 2)
    start, reference = weights(policy), Reference(policy, ReferencePolicy("frozen"))
    for step in range(1, 5):
        assert not reference.after_step(step, moved(policy))
    assert torch.equal(weights(reference.model), start)
    assert not any(p.requires_grad for p in reference.model.parameters())


def test_a_hard_copy_follows_every_k_steps_and_is_constant_in_between():
    policy = torch.nn.Linear(2, 2)
    start, reference = weights(policy), Reference(policy, ReferencePolicy("hard_copy", every=3))
    seen = []
    for step in range(1, 7):
        reference.after_step(step, moved(policy))
        seen.append((weights(reference.model) - start).mean().item())
    assert seen == pytest.approx([0, 0, 3, 3, 3, 6])


def test_a_hard_copy_without_a_period_is_refused():
    with pytest.raises(ValueError, match="every"):
        ReferencePolicy("hard_copy")


def test_a_reference_that_changes_is_restored_from_its_state():
    policy = torch.nn.Linear(2, 2)
    reference = Reference(policy, ReferencePolicy("hard_copy", every=1))
    reference.after_step(1, moved(policy))
    other = Reference(torch.nn.Linear(2, 2), reference.rule)
    other.load_state_dict(reference.state_dict())
    assert torch.equal(weights(other.model), weights(policy))
