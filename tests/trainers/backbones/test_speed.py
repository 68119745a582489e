import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from trainers.backbones.speed import arrange, compile_parts, halve_norms


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([3, 700]),
        torch.randn(2, 5, 8, generator=generator),
    )


def output(model):
    noisy, steps, hidden = inputs()
    return model(noisy, steps, encoder_hidden_states=hidden).sample


def in_bfloat16(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return output(model).float()


class WideGroupNorm(torch.nn.GroupNorm):
    """As autocast runs norms on a GPU: in float32. On a CPU it lets them be."""

    def forward(self, x):
        return super().forward(x.float())


class WideLayerNorm(torch.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float())


def widened(unet):
    for module in unet.modules():
        for kind, wide in ((torch.nn.GroupNorm, WideGroupNorm), (torch.nn.LayerNorm, WideLayerNorm)):
            if type(module) is kind:
                module.__class__ = wide
    return unet


def test_norms_in_half_precision_are_as_near_to_float32_as_norms_in_float32(unet):
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        exact = output(unet)
    wide, half = (in_bfloat16(f(copy.deepcopy(unet))) for f in (widened, halve_norms))
    assert not torch.equal(wide, half)
    errors = [((x - exact).norm() / exact.norm()).item() for x in (wide, half)]
    assert errors[0] < 0.02
    assert errors[1] < 2 * errors[0]


def test_norms_in_half_precision_hand_on_what_they_were_given(unet):
    halve_norms(unet)
    seen = []
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.register_forward_hook(lambda m, given, made: seen.append((given[0].dtype, made.dtype)))
    in_bfloat16(unet)
    assert len(seen) > 10
    assert all(given == made for given, made in seen)
    assert (torch.bfloat16, torch.bfloat16) in seen
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


def test_in_float32_such_norms_change_nothing_and_gradients_reach_their_weights(unet):
    before = output(unet).detach()
    halve_norms(unet)
    after = output(unet)
    assert torch.equal(after, before)
    after.square().sum().backward()
    assert unet.conv_norm_out.weight.grad.abs().sum() > 0


def test_a_copy_of_a_model_with_such_norms_has_weights_of_its_own(unet):
    halve_norms(unet)
    other = copy.deepcopy(unet)
    before = output(unet)
    with torch.no_grad():
        other.conv_norm_out.weight.zero_()
    assert torch.equal(output(unet), before)
    assert not torch.equal(output(other), before)


def test_the_layout_of_weights_changes_no_value(unet):
    before = output(unet).detach()
    assert arrange(unet, "none").conv_in.weight.is_contiguous()
    arrange(unet, "blocks")
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output(unet).detach(), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("parts", ["none", "transformers", "blocks"])
def test_compiled_parts_compute_what_plain_ones_do(unet, parts):
    before = output(unet).detach()
    compile_parts(arrange(unet, parts), parts, backend="eager")
    # Of one that was compiled torch keeps what it runs instead.
    compiled = {type(m).__name__ for m in unet.modules() if m._compiled_call_impl is not None}
    expected = {"none": set(), "transformers": {"BasicTransformerBlock"}}
    assert compiled == expected.get(parts, {"BasicTransformerBlock", "ResnetBlock2D", "GroupNorm"})
    torch.testing.assert_close(output(unet).detach(), before, atol=1e-5, rtol=1e-4)
