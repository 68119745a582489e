import pytest
import torch

from pipelines.config import ConfigError
from trainers import backbones
from trainers.backbones.adapters import adapters_off, cast_frozen, has_adapters, trained_parameters
from trainers.recipes import FullWeights, LoRA

RULE = LoRA(rank=2, alpha=6)


def digest_of(unet):
    return {name: p.detach().clone() for name, p in unet.named_parameters()}


def test_all_weights_are_trained_from_the_base(backbone, question):
    asked = question(backbone)
    unet = backbone.trainable(FullWeights(), None, seed=0)
    assert unet.training
    assert trained_parameters(unet).keys() == dict(unet.named_parameters()).keys()
    assert not has_adapters(unet)
    assert torch.equal(backbone.predict(unet, *asked), backbone.predict(backbone.unet, *asked))
    with torch.no_grad():
        next(unet.parameters()).add_(1)
    assert not torch.equal(next(unet.parameters()), next(backbone.unet.parameters())), "it is a UNet of its own"


def test_a_lora_predicts_at_first_exactly_like_the_base(backbone, question):
    asked = question(backbone)
    unet = backbone.trainable(RULE, None, seed=0)
    assert unet.training
    assert torch.equal(backbone.predict(unet, *asked), backbone.predict(backbone.unet, *asked))


def test_only_a_loras_adapters_are_trained_in_float32(backbone):
    unet = backbone.trainable(RULE, None, seed=0)
    trained = trained_parameters(unet)
    attentions = {name.split(".to_")[0] for name, _ in backbone.unet.named_parameters() if ".to_q." in name}
    # Two matrices on each of four projections.
    assert len(trained) == 8 * len(attentions)
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {min(p.shape) for p in trained.values()} == {RULE.rank}


def test_a_loras_first_weights_are_its_seeds_and_the_global_randomness_stays(backbone_of):
    backbone = backbone_of("sd15")
    before = torch.random.get_rng_state()
    first = digest_of(backbone.trainable(RULE, None, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = digest_of(backbone.trainable(RULE, None, seed=3)), digest_of(backbone.trainable(RULE, None, seed=4))
    torch.random.set_rng_state(before)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_a_target_that_names_no_layer_is_refused(backbone_of):
    with pytest.raises(ConfigError, match=r"targets \['to_z'\]"):
        backbone_of("sd15").trainable(LoRA(targets=("to_q", "to_z")), None, seed=0)


def test_the_scale_is_alpha_over_rank(backbone_of, question, train):
    backbone = backbone_of("sd15")
    asked = question(backbone)
    unet = train(backbone, backbone.trainable(LoRA(rank=2, alpha=6), None, seed=0), asked)
    expected = backbone.trainable(FullWeights(), None, seed=0)
    modules = dict(unet.named_modules())
    with torch.no_grad():
        for name, module in expected.named_modules():
            if f"{name}.lora_A.default" in modules:
                a, b = (modules[f"{name}.lora_{side}.default"].weight for side in "AB")
                assert b.abs().sum() > 0
                module.weight += 3 * b @ a
        torch.testing.assert_close(
            backbone.predict(unet, *asked), backbone.predict(expected, *asked), atol=1e-5, rtol=1e-5
        )


def test_without_its_adapters_a_trained_lora_predicts_exactly_like_the_base(backbone, question, train):
    asked = question(backbone)
    unet = train(backbone, backbone.trainable(RULE, None, seed=0), asked)
    trained, after = set(trained_parameters(unet)), backbone.predict(unet, *asked)
    with adapters_off(unet):
        assert torch.equal(backbone.predict(unet, *asked), backbone.predict(backbone.unet, *asked))
        with adapters_off(unet):
            assert torch.equal(backbone.predict(unet, *asked), backbone.predict(backbone.unet, *asked))
        assert torch.equal(backbone.predict(unet, *asked), backbone.predict(backbone.unet, *asked))
    assert set(trained_parameters(unet)) == trained
    assert torch.equal(backbone.predict(unet, *asked), after)
    assert not torch.allclose(after, backbone.predict(backbone.unet, *asked), atol=1e-3)


def test_frozen_adapters_stay_frozen_and_gradients_survive_the_reference(backbone_of, question):
    backbone = backbone_of("sdxl")
    asked = question(backbone)
    unet = backbone.trainable(RULE, None, seed=0)
    frozen = next(iter(trained_parameters(unet)))
    unet.get_parameter(frozen).requires_grad_(False)
    loss = backbone.predict(unet, *asked).pow(2).mean()
    with torch.no_grad(), adapters_off(unet):
        backbone.predict(unet, *asked)
    assert not unet.get_parameter(frozen).requires_grad
    loss.backward()
    # At first B is 0, so that gradients reach B alone.
    assert all(p.grad.abs().sum() > 0 for n, p in trained_parameters(unet).items() if ".lora_B." in n)


def test_adapters_are_on_again_after_an_error(backbone_of, question, train):
    backbone = backbone_of("sd15")
    asked = question(backbone)
    unet = train(backbone, backbone.trainable(RULE, None, seed=0), asked)
    after = backbone.predict(unet, *asked)
    with pytest.raises(KeyError), adapters_off(unet):
        raise KeyError
    assert torch.equal(backbone.predict(unet, *asked), after)


def test_a_unet_without_adapters_is_left_alone(backbone_of, question):
    backbone = backbone_of("sd15")
    unet, asked = backbone.trainable(FullWeights(), None, seed=0), question(backbone)
    with adapters_off(unet):
        assert torch.equal(backbone.predict(unet, *asked), backbone.predict(backbone.unet, *asked))
    assert all(p.requires_grad for p in unet.parameters())


def test_a_frozen_unet_in_half_precision_computes_the_same_bits_under_autocast(backbone, question):
    asked = question(backbone)
    for dtype in (torch.bfloat16, torch.float16):
        unet = backbone.load_unet(backbone.folder)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            expected = backbone.predict(backbone.unet, *asked)
            assert torch.equal(backbone.predict(cast_frozen(unet, dtype), *asked), expected)
        kinds = {n: p.dtype for n, p in unet.named_parameters()}
        assert {d for n, d in kinds.items() if "norm" in n} == {torch.float32}
        assert {d for n, d in kinds.items() if "norm" not in n} == {dtype}
        assert not torch.allclose(expected.float(), backbone.predict(backbone.unet, *asked), atol=1e-6)


def test_a_lora_on_a_base_in_half_precision_computes_the_same_bits_and_gradients(backbone, question, train):
    asked = question(backbone)
    results = []
    for dtype in (None, torch.bfloat16):
        unet = train(backbone, backbone.trainable(RULE, None, seed=0), asked)
        if dtype is not None:
            cast_frozen(unet, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = backbone.predict(unet, *asked)
            with torch.no_grad(), adapters_off(unet):
                reference = backbone.predict(unet, *asked)
        prediction.float().pow(2).mean().backward()
        trained = trained_parameters(unet)
        assert {p.dtype for p in trained.values()} == {torch.float32}
        results.append([prediction, reference, *(p.grad for p in trained.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_trained_stays_in_float32(backbone_of):
    unet = cast_frozen(backbone_of("sd15").trainable(FullWeights(), None, seed=0), torch.bfloat16)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("weights", [FullWeights(), RULE, None], ids=["full", "lora", "none"])
def test_a_unet_without_memory_has_the_parameters_of_a_real_one(backbone, weights):
    unet = backbones.meta_unet(backbone.config, weights)
    assert {p.device.type for p in unet.parameters()} == {"meta"}
    real = backbone.unet if weights is None else backbone.trainable(weights, None, seed=0)
    expected = {n: (p.shape, p.dtype, p.requires_grad) for n, p in real.named_parameters()}
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in unet.named_parameters()} == expected
