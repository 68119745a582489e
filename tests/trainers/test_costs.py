import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipelines.config import BackboneConfig, small_world
from trainers import backbones, costs, recipes
from trainers.backbones import speed
from trainers.backbones.adapters import trained_parameters
from trainers.backbones.random_pipelines import TINY_RESOLUTION, make_pipeline
from trainers.ema_annotators import EmaAnnotators
from trainers.recipes import AdaptiveDPO, FullWeights, LoRA, Optimiser, ReferencePolicy, tiny
from trainers.references import Reference

CPU = torch.device("cpu")
FULL, ADAPTERS = tiny.diffusion_dpo(), replace(tiny.diffusion_dpo(), weights=LoRA(rank=4, alpha=4))


@pytest.fixture(scope="module")
def config():
    return small_world().backbone


@pytest.fixture(scope="module")
def backbone(config):
    return backbones.load(config)


@pytest.fixture(scope="module")
def shape(backbone):
    return costs.Shape(3, backbone.latent_shape, 20, backbone.unet.config.cross_attention_dim)


def memory(config, rule, shape, **options):
    return costs.memory(config, rule, shape, **{"precision": "fp32", "device": CPU, **options})


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# --- models and optimisers -------------------------------------------------------------------------------------------


def test_bytes_of_full_weights_are_those_of_the_loaded_unet(config, backbone, shape):
    count = sum(p.numel() for p in backbone.unet.parameters())
    found = memory(config, FULL, shape)
    assert (found.parameters, found.trained) == (count, count)
    assert (found.weights, found.gradients, found.reference) == (4 * count, 4 * count, 4 * count)
    assert found.optimiser == 8 * count
    assert found.annotators == 0
    assert found.total == 5 * 4 * count + found.activations


def test_bytes_of_adapters_are_those_of_their_matrices_and_the_reference_is_free(config, backbone, shape):
    ends = ADAPTERS.weights.targets
    targets = [m for n, m in backbone.unet.named_modules() if n.endswith(ends) and isinstance(m, nn.Linear)]
    count = sum(4 * (m.in_features + m.out_features) for m in targets)
    found, full = memory(config, ADAPTERS, shape), memory(config, FULL, shape)
    assert found.trained == count
    assert found.parameters == full.parameters + count
    assert (found.gradients, found.optimiser, found.reference) == (4 * count, 8 * count, 0)
    assert found.optimiser < full.optimiser / 20


def test_adafactor_keeps_rows_and_columns_of_what_has_two_dimensions(config, backbone, shape):
    expected = 0
    for parameter in backbone.unet.parameters():
        *rest, last = parameter.shape
        expected += 4 * (parameter[..., 0].numel() + parameter[..., 0, :].numel() if rest else last)
    rule = replace(FULL, optimiser=Optimiser("adafactor"))
    assert memory(config, rule, shape).optimiser == expected


HARD_COPY, EMA = ReferencePolicy("hard_copy", 5), ReferencePolicy("ema", 5, 0.9)


@pytest.mark.parametrize(
    ("weights", "reference", "precision"),
    [
        (FullWeights(), ReferencePolicy(), "fp32"),
        (FullWeights(), ReferencePolicy(), "bf16"),
        (FullWeights(), HARD_COPY, "bf16"),
        (FullWeights(), EMA, "bf16"),
        (LoRA(), ReferencePolicy(), "bf16"),
        (LoRA(), HARD_COPY, "fp32"),
        (LoRA(), EMA, "bf16"),
    ],
)
def test_models_take_what_the_real_ones_take(config, backbone, shape, weights, reference, precision):
    rule = replace(FULL, weights=weights, reference=reference, objective=AdaptiveDPO())
    policy, dtype = backbone.trainable(weights, None, 0), {"bf16": torch.bfloat16}.get(precision)
    speed.prepare(policy, dtype, "none")
    shadow = Reference(policy, reference, dtype)._shadow
    annotators = EmaAnnotators(policy).models
    found = memory(config, rule, shape, precision=precision)
    assert found.weights == size(policy.parameters())
    assert found.gradients == size(trained_parameters(policy).values())
    assert found.reference == (0 if shadow is None else size(shadow.tensors.values()))
    assert found.annotators == sum(size(m.tensors.values()) for m in annotators)


def test_objectives_without_a_reference_hold_none(config, shape):
    assert memory(config, tiny.sft(), shape).reference == 0
    # But trajectories are inverted under one.
    inverted = replace(tiny.sft(), noising=recipes.Inversion())
    assert memory(config, inverted, shape).reference > 0


# --- activations -----------------------------------------------------------------------------------------------------


def really_saved(backbone, rule, shape, *, precision="fp32", checkpointed=False):
    """Bytes that a real forward leaves for backward: distinct memory of the saved tensors, without the weights."""
    policy = backbone.trainable(rule.weights, None, 0)
    speed.prepare(policy, torch.bfloat16 if precision == "bf16" else None, "none")
    weights, saved = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def keep(tensor):
        # Held, so that no other tensor gets its memory.
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def block(module, *arguments):
        for a in arguments:
            if isinstance(a, torch.Tensor):
                keep(a)
        return torch.utils.checkpoint.checkpoint(module, *arguments, use_reentrant=False)

    if checkpointed:
        policy.enable_gradient_checkpointing(block)
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    batch = costs.random_batch(shape, CPU)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        out = backbone.predict(
            policy, batch.latents.flatten(0, 1), batch.timesteps.repeat(2), batch.conditioning.twice()
        )
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in weights)


@pytest.mark.parametrize("rule", [FULL, ADAPTERS], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_those_of_a_real_forward_to_the_byte(config, backbone, shape, rule, checkpointed):
    found = memory(config, rule, shape, activation_checkpointing=checkpointed)
    assert found.activations == really_saved(backbone, rule, shape, checkpointed=checkpointed)


@pytest.mark.parametrize("rule", [FULL, ADAPTERS], ids=["full", "lora"])
def test_activations_under_autocast_are_those_of_a_real_forward_but_for_norms_statistics(config, backbone, shape, rule):
    found = memory(config, rule, shape, precision="bf16").activations
    # On a CPU norms in bfloat16 keep their means in float32, which fake tensors do not know.
    assert found == pytest.approx(really_saved(backbone, rule, shape, precision="bf16"), rel=0.01)
    assert found < memory(config, rule, shape).activations


def test_activations_grow_with_the_pairs_and_shrink_with_checkpointing(config, shape):
    one, two = (memory(config, FULL, replace(shape, pairs=n)).activations for n in (3, 6))
    assert two == pytest.approx(2 * one, rel=0.01)
    checkpointed = memory(config, FULL, shape, activation_checkpointing=True)
    assert checkpointed.activations < one / 3
    assert 0 < checkpointed.recomputed < one
    assert checkpointed.total < memory(config, FULL, shape).total


def test_under_checkpointing_and_autocast_the_half_precision_copies_of_the_weights_count(config, backbone, shape):
    layers = [m for m in backbone.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    copies = sum(2 * p.numel() for m in layers for p in m.parameters(recurse=False))
    small = replace(shape, pairs=1)
    found = memory(config, FULL, small, precision="bf16", activation_checkpointing=True)
    assert found.recomputed == copies
    # Adapters alone are copied where they are trained.
    found = memory(config, ADAPTERS, small, precision="bf16", activation_checkpointing=True)
    assert found.recomputed < copies / 2


def test_counting_leaves_no_tensor_without_memory_behind(config, backbone, shape):
    memory(config, FULL, shape)
    costs.operations(config, FULL, shape)
    batch = costs.random_batch(shape, CPU)
    out = backbone.predict(backbone.unet, batch.latents[0], batch.timesteps, batch.conditioning)
    assert torch.isfinite(out).all()


# --- operations and seconds ------------------------------------------------------------------------------------------


def test_operations_of_a_pair_are_those_of_its_forwards_and_its_backward(config, shape):
    def of(rule, **options):
        return costs.operations(config, rule, shape, **options)

    fine_tuned, compared, judged = (of(r) for r in (tiny.sft(), FULL, replace(FULL, objective=AdaptiveDPO())))
    # Both pictures through the reference, and through two averages more.
    assert compared.pair - fine_tuned.pair == 2 * compared.forward
    assert judged.pair - compared.pair == 2 * 2 * compared.forward
    # Backward costs twice the forward, less what leads to the inputs.
    assert 5.5 * compared.forward < fine_tuned.pair < 6 * compared.forward
    again = of(FULL, activation_checkpointing=True).pair - compared.pair
    assert 0 < again <= 2 * compared.forward


def test_operations_of_adapters_spare_the_gradients_of_frozen_weights(config, shape):
    full, adapters = costs.operations(config, FULL, shape), costs.operations(config, ADAPTERS, shape)
    assert adapters.pair < 0.85 * full.pair


@pytest.mark.parametrize("name", ["diffusion_dpo", "adaptive_dpo_online", "soft_dpo", "group_robust", "adaptive_dpo"])
def test_a_micro_batch_of_any_objective_is_timed(backbone, shape, name, monkeypatch):
    monkeypatch.setattr(costs, "_REPEATS", 1)
    tries = [costs.seconds(backbone, recipes.recipe(name), shape, precision="fp32") for _ in range(3)]
    assert min(min(t.micro_batch, t.forward, t.step) for t in tries) > 0
    # The fastest of three: another process may hold the machine during one of them.
    assert min(t.forward for t in tries) < min(t.micro_batch for t in tries)
    assert {t.peak_bytes for t in tries} == {None}


def test_sdxls_conditioning_is_counted_and_timed(tmp_path):
    folder = make_pipeline("sdxl", tmp_path / "sdxl")
    config = BackboneConfig(name="xl", family="sdxl", checkpoint=str(folder), resolution=TINY_RESOLUTION)
    backbone = backbones.load(config)
    told = backbone.encode_prompts(["a red circle"])
    shape = costs.Shape(2, backbone.latent_shape, *told.hidden.shape[1:], told.pooled.shape[1])
    rule = replace(ADAPTERS, family="sdxl")
    assert memory(config, rule, shape).activations == really_saved(backbone, rule, shape)
    assert costs.operations(config, rule, shape).pair > 0
    assert costs.seconds(backbone, rule, shape, precision="bf16").micro_batch > 0
