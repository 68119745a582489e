import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from trainers.backbones.adapters import make_trainable, trained_parameters
from trainers.recipes import FullWeights, LoRA, ReferencePolicy
from trainers.references import Reference, Shadow

FULL, ADAPTERS = FullWeights(), LoRA(rank=2, alpha=2)
both = pytest.mark.parametrize("weights", [FULL, ADAPTERS], ids=["full", "lora"])


def policy(weights, seed=0):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return make_trainable(unet, weights, seed=1)


def move(unet, by=0.01):
    with torch.no_grad():
        for parameter in trained_parameters(unet).values():
            parameter += by


def inputs(seed=3):
    generator = torch.Generator().manual_seed(seed)
    noisy, hidden = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 3, 8, generator=generator)
    return noisy, torch.tensor([10, 900]), hidden


@torch.no_grad()
def output(model):
    noisy, steps, hidden = inputs()
    return model(noisy, steps, encoder_hidden_states=hidden).sample


def first_weight(shadow):
    return next(iter(shadow.state_dict().values())).flatten()[0].item()


@both
def test_every_reference_starts_as_exactly_the_policy(weights):
    unet = policy(weights)
    for rule in (
        ReferencePolicy(),
        ReferencePolicy("hard_copy", every=2),
        ReferencePolicy("ema", every=1, decay=0.5),
    ):
        assert torch.equal(output(Reference(unet, rule)), output(unet))


@both
def test_a_frozen_reference_stays_the_start_while_the_policy_moves(weights):
    unet = policy(weights)
    reference, start = Reference(unet, ReferencePolicy()), output(unet)
    for step in range(1, 4):
        move(unet)
        assert not reference.after_step(step, unet)
    assert torch.equal(output(reference), start)
    assert not torch.equal(output(unet), start)


@both
def test_a_hard_copy_is_the_policy_of_every_kth_step_and_constant_in_between(weights):
    unet = policy(weights)
    reference, seen = Reference(unet, ReferencePolicy("hard_copy", every=3)), [output(unet)]
    for step in range(1, 7):
        move(unet)
        seen.append(output(unet))
        assert reference.after_step(step, unet) == (step % 3 == 0)
        assert torch.equal(output(reference), seen[step // 3 * 3])


@both
def test_an_ema_reference_follows_by_its_decay(weights):
    unet = policy(weights)
    reference = Reference(unet, ReferencePolicy("ema", every=2, decay=0.75))
    start = {n: p.detach().clone() for n, p in trained_parameters(unet).items()}
    for step in range(1, 5):
        move(unet, 1.0)
        reference.after_step(step, unet)
    # After two steps 0.25 * 2, then 0.75 * that + 0.25 * 4.
    state = reference.state_dict()
    assert all(torch.allclose(state[n] - start[n], torch.tensor(1.375), atol=1e-5) for n in start)


@both
def test_gradients_reach_the_policy_and_no_reference(weights):
    unet = policy(weights)
    reference = Reference(unet, ReferencePolicy("hard_copy", every=1))
    move(unet)
    noisy, steps, hidden = inputs()
    with torch.no_grad():
        reference(noisy, steps, encoder_hidden_states=hidden)
    unet(noisy, steps, encoder_hidden_states=hidden).sample.square().sum().backward()
    assert all(p.grad is not None for p in trained_parameters(unet).values())
    assert not any(t.requires_grad for t in reference.state_dict().values())


@both
def test_a_reference_that_moves_is_restored_from_its_state(weights):
    unet = policy(weights)
    reference = Reference(unet, ReferencePolicy("hard_copy", every=1))
    move(unet)
    reference.after_step(1, unet)
    move(unet)
    state = copy.deepcopy(reference.state_dict())
    other = Reference(unet, reference.rule)
    assert not torch.equal(output(other), output(reference))
    other.load_state_dict(state)
    assert torch.equal(output(other), output(reference))


def test_under_adapters_a_shadow_holds_the_adapters_alone_and_a_frozen_reference_nothing():
    unet = policy(ADAPTERS)
    shadow = Shadow(unet)
    assert shadow.state_dict().keys() == trained_parameters(unet).keys()
    held, whole = (sum(t.numel() for t in ts) for ts in (shadow.state_dict().values(), unet.parameters()))
    assert held < whole / 4
    assert Reference(unet, ReferencePolicy()).state_dict() == {}


def test_a_shadow_of_adapters_computes_with_its_own_weights_and_leaves_the_policy_alone():
    unet = policy(ADAPTERS)
    move(unet, 0.05)
    shadow, kept = Shadow(unet), output(unet)
    move(unet, 0.05)
    moved = output(unet)
    assert torch.equal(output(shadow), kept)
    assert torch.equal(output(unet), moved)
    assert all(p.requires_grad for p in trained_parameters(unet).values())


def test_in_bfloat16_a_copied_reference_still_starts_as_exactly_the_policy():
    unet = policy(FULL)
    reference = Reference(unet, ReferencePolicy(), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output(reference), output(unet))
    assert {t.dtype for t in Shadow(unet, torch.bfloat16).state_dict().values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("kind", ["hard_copy", "ema"])
def test_a_reference_that_moves_needs_a_period(kind):
    with pytest.raises(ValueError, match="every"):
        ReferencePolicy(kind)


def test_an_ema_reference_needs_a_decay():
    with pytest.raises(ValueError, match="decay"):
        ReferencePolicy("ema", every=1)
