"""What a process of a run costs: bytes of memory, operations, seconds; found with the models and the forward of training.

Memory and operations are counted on tensors without memory (meta, fake), which run the same code: there is no formula that
has to be kept in step with a model. Seconds are measured, on random inputs.
Belongs here: costs of models and of a micro-batch. Does not belong here: pairs, caches, and how all of it is told (`plan`).
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config import BackboneConfig
from trainers import backbones
from trainers.backbones import speed
from trainers.backbones.adapters import trained_parameters
from trainers.backbones.conditioning import Conditioning
from trainers.data import Batch
from trainers.ema_annotators import EmaAnnotators
from trainers.forward import PairForward
from trainers.objectives import Bound
from trainers.recipes import Forward, Inversion, LoRA, Recipe
from trainers.references import Reference, Shadow
from trainers.schedules import optimizer

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_META = torch.device("meta")
_REPEATS, _SECONDS = 5, 10.0
"""Timed repeats, fewer where they would take longer."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a micro-batch: pairs, a latent's C, H, W, and the embeddings' tokens, width and pooled width (None: none)."""

    pairs: int
    latent: tuple[int, ...]
    tokens: int
    width: int
    pooled_width: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes that a process holds when it holds most: at the end of a micro-batch's forward, or soon after.

    activations: saved for backward. recomputed: under activation checkpointing, the most that backward computes anew at
    once, or what autocast holds in half precision of the trained weights until the forward ends, whichever is more. Not
    counted: gradients of activations, workspaces of kernels, the allocator's gaps, what validation loads.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimiser: int
    reference: int
    annotators: int
    activations: int
    recomputed: int

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        models = self.weights + self.gradients + self.optimiser + self.reference + self.annotators
        return models + self.activations + self.recomputed


@dataclass(frozen=True)
class Operations:
    """Floating point operations of matrix products and convolutions (a multiplication and an addition are two).

    pair: forward and backward of the policy, forwards of the reference and the annotators. forward: one latent through one
    model, without gradient.
    """

    pair: int
    forward: int


@dataclass(frozen=True)
class Seconds:
    """Measured on this machine.

    micro_batch: noising, all forwards, loss and backward. forward: the micro-batch's latents through one model, without
    gradient. step: clipping, optimiser, annotators. peak_bytes: most that a GPU held.
    """

    micro_batch: float
    forward: float
    step: float
    peak_bytes: int | None


def available_bytes(device: torch.device) -> int:
    """Return the device's free memory; of the CPU what processes can have without swapping."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def random_batch(shape: Shape, device: torch.device) -> Batch:
    """Return pairs of random numbers, with everything that any objective needs."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device)

    count = shape.pairs
    return Batch(
        keys=[(0, str(i), 0) for i in range(count)],
        latents=normal(2, count, *shape.latent),
        conditioning=Conditioning(
            normal(count, shape.tokens, shape.width),
            None if shape.pooled_width is None else normal(count, shape.pooled_width),
        ),
        timesteps=torch.full((count,), 500, device=device),
        noise=normal(count, *shape.latent),
        probability=torch.full((count,), 0.75, device=device),
        minority=torch.full((count,), 0.25, device=device),
        group=torch.zeros(count, dtype=torch.int64, device=device),
    )


# --- models ----------------------------------------------------------------------------------------------------------


class _Models:
    """A recipe's models around a policy, on the policy's device, as `loop.Trainer` makes them."""

    def __init__(self, policy: Any, recipe: Recipe, precision: str) -> None:
        dtype = _DTYPES.get(precision)
        speed.prepare(policy, dtype, "none")
        self.policy, self.recipe, self.bound = policy, recipe, Bound(recipe.objective)
        rule = recipe.noising
        has_reference = self.bound.needs("reference") or (isinstance(rule, Inversion) and rule.under == "reference")
        self.reference = Reference(policy, recipe.reference, dtype) if has_reference else None
        self.annotators = EmaAnnotators(policy) if self.bound.needs("annotators") else None
        self.optimizer = optimizer(recipe.optimiser, trained_parameters(policy).values())

    def forward(self, backbone: Any, autocast: Callable[[], Any] = contextlib.nullcontext) -> PairForward:
        """Return the forward of training on latents that are noised already."""
        # Inversion is counted apart: how long it is depends on the timestep.
        recipe = replace(self.recipe, noising=Forward())
        return PairForward(backbone, recipe, self.bound, self.policy, self.reference, self.annotators, autocast)


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    dtype = _DTYPES.get(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _predicted(backbone: Any, unet: Any, batch: Batch) -> torch.Tensor:
    """Return the predictions of both sides' latents, [2B, C, H, W]."""
    steps, conditioning = batch.timesteps.repeat(2), batch.conditioning.twice()
    return backbone.predict(unet, batch.latents.flatten(0, 1), steps, conditioning)


# --- memory ----------------------------------------------------------------------------------------------------------


class _Saved:
    """A hook that adds up the tensors that autograd saves, each memory once; `but`: what is there anyway."""

    def __init__(self, but: Iterable[torch.Tensor]) -> None:
        self._but = {StorageWeakRef(t.untyped_storage()) for t in but}
        self._sizes: dict[StorageWeakRef, int] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        mark = StorageWeakRef(storage)
        if mark not in self._but:
            self._sizes[mark] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def beside(self, other: _Saved) -> int:
        """Return the bytes that `other` does not have."""
        return sum(size for mark, size in self._sizes.items() if mark not in other._sizes)


def saved_for_backward(
    unet: Any, forward: Callable[[], Any], *, but: Iterable[torch.Tensor], activation_checkpointing: bool
) -> tuple[int, int]:
    """Return (bytes saved for backward, most bytes of a checkpointed block) of a forward of the UNet.

    A checkpointed block keeps its inputs; what else it would have saved exists while backward is in it.

    Args:
        forward: calls the UNet, with gradient.
        but: tensors that are there anyway: the weights.
    """
    weights = list(but)
    kept, most = _Saved(weights), 0

    def block(module: Any, *arguments: Any) -> Any:
        nonlocal most
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                kept(argument)
        inside = _Saved(weights)
        with torch.autograd.graph.saved_tensors_hooks(inside, _unchanged):
            out = module(*arguments)
        most = max(most, inside.beside(kept))
        return out

    if activation_checkpointing:
        unet.enable_gradient_checkpointing(block)
    with torch.autograd.graph.saved_tensors_hooks(kept, _unchanged):
        forward()
    return kept.bytes, most


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _activations(
    config: BackboneConfig,
    policy: Any,
    shape: Shape,
    precision: str,
    device: torch.device,
    activation_checkpointing: bool,
) -> tuple[int, int]:
    """Return what `saved_for_backward` does of a policy on the meta device, as if it lay on `device`.

    Fake tensors have no memory either, but they say which device they lie on: which attention runs there, and what autocast
    does, is theirs to decide, and the meta device decides otherwise.
    """
    # Loaded anew, because the model keeps tensors of its own, here fake ones.
    backbone = backbones.load(config, device)
    with FakeTensorMode():
        weights = {
            name: torch.empty(p.shape, dtype=p.dtype, device=device, requires_grad=p.requires_grad)
            for name, p in policy.named_parameters()
        }
        batch = random_batch(shape, device)

        def unet(*arguments: Any, **options: Any) -> Any:
            return torch.func.functional_call(policy, weights, arguments, options)

        def forward() -> torch.Tensor:
            with _autocast(device, precision):
                return _predicted(backbone, unet, batch)

        return saved_for_backward(
            policy, forward, but=weights.values(), activation_checkpointing=activation_checkpointing
        )


def memory(
    config: BackboneConfig,
    recipe: Recipe,
    shape: Shape,
    *,
    precision: str,
    device: torch.device,
    activation_checkpointing: bool = False,
) -> Memory:
    """Return what one process of a run holds.

    Args:
        precision: fp32, bf16 or fp16.
        device: where it would run; a GPU must be there, as its kernels are asked what they save.
    """
    models = _Models(backbones.meta_unet(config, recipe.weights), recipe, precision)
    policy, trained = models.policy, trained_parameters(models.policy)
    is_copied = models.reference is not None and (
        recipe.reference.kind != "frozen" or not isinstance(recipe.weights, LoRA)
    )
    dtype = None if recipe.reference.kind == "ema" else _DTYPES.get(precision)
    annotators = [] if models.annotators is None else models.annotators.models
    activations, recomputed = _activations(config, policy, shape, precision, device, activation_checkpointing)
    if activation_checkpointing and precision in _DTYPES:
        recomputed = max(recomputed, autocast_bytes(policy))
    return Memory(
        parameters=sum(p.numel() for p in policy.parameters()),
        trained=sum(p.numel() for p in trained.values()),
        weights=_nbytes(policy.parameters()),
        gradients=_nbytes(trained.values()),
        optimiser=optimiser_bytes(models.optimizer),
        reference=_nbytes(Shadow(policy, dtype).tensors.values()) if is_copied else 0,
        annotators=sum(_nbytes(m.tensors.values()) for m in annotators),
        activations=activations,
        recomputed=recomputed,
    )


def autocast_bytes(policy: torch.nn.Module) -> int:
    """Return the bytes of the trained weights of linear and convolutional layers in half precision.

    Autocast makes such a copy of each where it is first used and keeps it to the end of its context. Without activation
    checkpointing the copies are saved for backward, and counted there.
    """
    layers = [m for m in policy.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    return sum(2 * p.numel() for m in layers for p in m.parameters(recurse=False) if p.requires_grad)


def optimiser_bytes(made: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimiser's state (but for each parameter's count of steps), by letting it step.

    Its parameters must lie on the meta device.
    """
    for group in made.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    made.step()
    made.zero_grad(set_to_none=True)
    states = [value for state in made.state.values() for value in state.values()]
    return _nbytes(t for t in states if isinstance(t, torch.Tensor) and t.ndim)


# --- operations ------------------------------------------------------------------------------------------------------


def operations(
    config: BackboneConfig, recipe: Recipe, shape: Shape, *, activation_checkpointing: bool = False
) -> Operations:
    """Return what a pair of the recipe costs, with what is computed anew under activation checkpointing."""
    models = _Models(backbones.meta_unet(config, recipe.weights), recipe, "fp32")
    backbone = backbones.load(config, _META)
    batch = random_batch(replace(shape, pairs=1), _META)
    with FlopCounterMode(display=False) as once, torch.no_grad():
        _predicted(backbone, models.policy, batch)
    if activation_checkpointing:
        models.policy.enable_gradient_checkpointing()
    with FlopCounterMode(display=False) as counter:
        models.forward(backbone)(batch).policy.sum().backward()
    return Operations(pair=counter.get_total_flops(), forward=once.get_total_flops() // 2)


# --- seconds ---------------------------------------------------------------------------------------------------------


def seconds(
    backbone: Any, recipe: Recipe, shape: Shape, *, precision: str, activation_checkpointing: bool = False
) -> Seconds:
    """Return how long a micro-batch takes on the backbone's device, on random inputs; medians, after a warm-up.

    The models are loaded for it and dropped afterwards.
    """
    device = torch.device(backbone.device)
    models = _Models(backbone.trainable(recipe.weights, None, 0), recipe, precision)
    if activation_checkpointing:
        models.policy.enable_gradient_checkpointing()
    autocast = functools.partial(_autocast, device, precision)
    forward, batch = models.forward(backbone, autocast), random_batch(shape, device)
    state = {k: v.to(device) for k, v in models.bound.state().items()}

    def micro_batch() -> None:
        pairs = forward(batch)
        values = models.bound.loss(pairs, {**state, **models.bound.sums(pairs, state)})
        values.mean().backward()

    def without_gradient() -> None:
        with torch.no_grad(), autocast():
            _predicted(backbone, models.policy, batch)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(models.policy.parameters(), recipe.optimiser.max_gradient_norm)
        models.optimizer.step()
        if models.annotators is not None:
            models.annotators.after_step(1, models.policy)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole, single, last = (_median(work, device) for work in (micro_batch, without_gradient, step))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Seconds(micro_batch=whole, forward=single, step=last, peak_bytes=peak)


def _median(work: Callable[[], None], device: torch.device) -> float:
    work()
    taken: list[float] = []
    while len(taken) < _REPEATS and sum(taken) < _SECONDS:
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
