"""What is measured on a GPU: one training step of an architecture under some settings, with the project's own code.

Models have the published architectures and random weights and are made on the device. The step is that of `trainers.loop`:
`PairForward`, `Reference`, `Bound`, `schedules.optimizer` and accelerate, the loop's transfers to the host among them; what
stands in for its files is `Source`, pairs in memory from which batches are made as `data.PairData` makes them (the same draws
and counter-based noise, posteriors sampled, float16 in memory), in a thread ahead, page-locked.
Belongs here: building and timing one job. Does not belong here: which jobs, tables (`training_gpu`).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft.helpers import disable_input_dtype_casting
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.training_flops import PairCost, Shapes, pair_cost
from pipelines.config import BackboneConfig
from pipelines.curation import HumanPolicy
from trainers import data, randomness
from trainers.backbones import speed
from trainers.backbones.adapters import cast_frozen, make_trainable, trained_parameters
from trainers.backbones.conditioning import Conditioning
from trainers.backbones.random_pipelines import sd15_unet_config, sdxl_unet_config
from trainers.backbones.stable_diffusion import StableDiffusionBackbone
from trainers.backbones.stable_diffusion_xl import StableDiffusionXLBackbone
from trainers.forward import PairForward
from trainers.objectives import Bound
from trainers.recipes import DiffusionDPO, FullWeights, LoRA, Optimiser, Recipe, ReferencePolicy
from trainers.references import Reference
from trainers.schedules import optimizer

SEED, IMAGES, TIMESTEPS = 0, 256, 1000
LEAST_STEPS, MOST_STEPS = 5, 25
OUT_OF_MEMORY = "out of memory"
WEIGHTS: dict[str, FullWeights | LoRA] = {"full": FullWeights(), "lora": LoRA()}


# --- architectures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A UNet's configuration and what it is given of a picture; pixels: of that picture's side."""

    unet: dict[str, Any]
    shapes: Shapes
    pixels: int


def architectures(is_tiny: bool) -> dict[str, Architecture]:
    """Return the published SD1.5 and SDXL by name, or the same kinds of layers so small that a CPU runs them at once."""
    found = {
        "sd15": Architecture(sd15_unet_config(), Shapes((4, 64, 64), 77, 768), 512),
        "sdxl": Architecture(sdxl_unet_config(), Shapes((4, 128, 128), 77, 2048, 1280), 1024),
    }
    return {name: _shrunk(a) for name, a in found.items()} if is_tiny else found


def _shrunk(whole: Architecture) -> Architecture:
    pooled = 40 if whole.shapes.pooled else 0
    has_attention = "CrossAttnDownBlock2D"
    config = {
        **whole.unet,
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D" if pooled else has_attention, has_attention],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D" if pooled else "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": [2, 4],
        "norm_num_groups": 8,
    }
    if pooled:
        config |= {
            "transformer_layers_per_block": [1, 2],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + pooled,
        }
    return Architecture(config, Shapes((4, 8, 8), 24, 32, pooled), 64)


def cost(architecture: Architecture, weights: str) -> PairCost:
    """Return the FLOP of a pair."""

    def meta(rule: FullWeights | LoRA | None) -> UNet2DConditionModel:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(architecture.unet).requires_grad_(False)
            return unet if rule is None else make_trainable(unet, rule, SEED)

    return pair_cost(meta, WEIGHTS[weights], architecture.shapes)


# --- a job -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What to measure. micro: pairs per forward; accumulation: forwards per optimiser step.

    attention: torch's scaled_dot_product_attention with its own choice of kernel (sdpa), cuDNN's kernel first (cudnn), or
    diffusers' plain processor, which writes the matrix of weights (plain). norms: as autocast has them (float32), or reading
    and writing half precision (half). adapter_input: peft casts it to the adapter's float32, or leaves it (as_it_is).
    cudnn_benchmark: convolutions choose their kernel by trying. compile: as `training.compile`; blocks are in channels-last
    layout, too.
    """

    architecture: str
    weights: str
    micro: int
    accumulation: int = 1
    attention: Literal["sdpa", "cudnn", "plain"] = "sdpa"
    channels_last: bool = False
    cudnn_benchmark: bool = False
    norms: Literal["float32", "half"] = "float32"
    adapter_input: Literal["float32", "as_it_is"] = "float32"
    checkpointing: bool = False
    compile: speed.Parts = "none"
    optimiser: Literal["adamw", "adafactor"] = "adamw"


class _WithoutFiles:
    """A backbone of the project with the noise schedule of Stable Diffusion and no files."""

    def __init__(self, family: Literal["sd15", "sdxl"], pixels: int, device: torch.device) -> None:
        self.config = BackboneConfig(name=family, family=family, checkpoint="random", resolution=pixels)
        self.device, self.predicts_velocity = device, False
        schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
        self.alphas_cumprod = schedule.alphas_cumprod.to(device)


class _SD15(_WithoutFiles, StableDiffusionBackbone):
    pass


class _SDXL(_WithoutFiles, StableDiffusionXLBackbone):
    pass


_CLASSES: dict[str, type[Any]] = {"sd15": _SD15, "sdxl": _SDXL}


class Source:
    """Pairs in memory, in the place of `data.PairData`: random latents and embeddings, the draws and noise of the project."""

    def __init__(self, shapes: Shapes, recipe: Recipe) -> None:
        self._shapes, self._recipe = shapes, recipe
        random = torch.Generator().manual_seed(SEED)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random).half()

        self._mean, self._log_variance = normal(IMAGES, *shapes.latent), normal(IMAGES, *shapes.latent) - 4
        self._hidden = normal(IMAGES // 2, shapes.tokens, shapes.width)
        self._pooled = normal(IMAGES // 2, shapes.pooled) if shapes.pooled else None

    def batch(self, number: int, pairs: int) -> data.Batch:
        """Return the `number`-th batch of so many pairs."""
        rows = [(number * pairs + i) % (IMAGES // 2) for i in range(pairs)]
        epochs = [(number * pairs + i) // (IMAGES // 2) for i in range(pairs)]
        drawn = data.draws(SEED, [f"pair-{r:064d}" for r in rows], epochs, self._recipe, TIMESTEPS)
        latents = torch.stack([self._latents([2 * r + side for r in rows], drawn) for side in range(2)])
        pooled = None if self._pooled is None else self._pooled[rows].float()
        conditioning = Conditioning(self._hidden[rows].float(), pooled)
        noise = randomness.normal(self._shapes.latent, [(*k, "noise") for k in drawn.keys])
        return data.Batch(drawn.keys, latents, conditioning, torch.tensor(drawn.timesteps), noise)

    def _latents(self, images: list[int], drawn: data.Draws) -> torch.Tensor:
        deviation = (0.5 * self._log_variance[images].float()).exp()
        named = [(*k, "posterior", f"image-{i:064d}") for k, i in zip(drawn.keys, images, strict=True)]
        return (self._mean[images].float() + deviation * randomness.normal(self._shapes.latent, named)) * 0.18215


class Steps:
    """The models of a job; `step` takes an optimiser step."""

    def __init__(self, job: Job, architecture: Architecture, device: torch.device, backend: str = "inductor") -> None:
        """Make the models on the device.

        Args:
            backend: of torch.compile.
        """
        self.job, self.device = job, device
        weights = WEIGHTS[job.weights]
        rule = Optimiser(job.optimiser, learning_rate=1e-8, warmup_steps=0)
        recipe = Recipe("speed", "", HumanPolicy(), objective=DiffusionDPO(5000.0), weights=weights, optimiser=rule)
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
        self._scope = contextlib.ExitStack()
        self._settings(device)
        with device:
            policy = UNet2DConditionModel.from_config(architecture.unet).requires_grad_(False)
        self._change(policy)
        policy = make_trainable(policy, weights, SEED).to(device)
        if isinstance(weights, LoRA):
            cast_frozen(policy, torch.bfloat16)
            if job.adapter_input == "as_it_is":
                self._scope.enter_context(disable_input_dtype_casting(policy))
        reference = Reference(policy, ReferencePolicy(), torch.bfloat16)
        if job.compile != "none":
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            self._scope.callback(torch.compiler.reset)
            speed.compile_parts(policy, job.compile, backend)
            reference.compile(job.compile, backend)
        self.optimizer = optimizer(rule, trained_parameters(policy).values())
        self.model, self.optimizer = self.accelerator.prepare(policy, self.optimizer)
        backbone = _CLASSES[job.architecture](job.architecture, architecture.pixels, device)
        self.bound = Bound(recipe.objective)
        self.forward = PairForward(backbone, recipe, self.bound, self.model, reference, None, self.accelerator.autocast)
        source = Source(architecture.shapes, recipe)
        self._batches = self._scope.enter_context(_ahead(source, job.micro, is_pinned=device.type == "cuda"))

    def _settings(self, device: torch.device) -> None:
        was = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.job.cudnn_benchmark
        self._scope.callback(setattr, torch.backends.cudnn, "benchmark", was)
        if self.job.attention == "cudnn":
            kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            self._scope.enter_context(sdpa_kernel([*kernels, SDPBackend.MATH], set_priority=True))

    def _change(self, unet: UNet2DConditionModel) -> None:
        """Change the UNet as the job has it, before anything is copied from it."""
        unet.set_attn_processor(AttnProcessor() if self.job.attention == "plain" else AttnProcessor2_0())
        speed.arrange(unet, "blocks" if self.job.channels_last else self.job.compile)
        if self.job.norms == "half":
            speed.halve_norms(unet)
        if self.job.checkpointing:
            unet.enable_gradient_checkpointing()

    def step(self) -> float:
        """Take an optimiser step as `trainers.loop` does; return its mean loss."""
        job, observed = self.job, []
        for _ in range(job.accumulation):
            batch = next(self._batches).to(self.device)
            pairs = self.forward(batch)
            values = self.bound.loss(pairs, {})
            self.accelerator.backward(values.mean() / job.accumulation)
            change = (pairs.policy_error - pairs.reference_error).detach()
            drift = (pairs.policy.detach().float() - pairs.need("reference").float()).pow(2).mean((0, 2, 3, 4))
            told = [
                values.detach().float(),
                batch.timesteps.float(),
                pairs.margin.detach(),
                change[0],
                change[1],
                drift,
            ]
            observed.append(torch.stack(told))
        table = torch.cat(observed, 1).double().cpu()
        if not bool(table.isfinite().all()):
            raise FloatingPointError("the loss is not a number")
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0))
        if norm != norm:
            raise FloatingPointError("the gradient is not a number")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(table[0].mean())

    def close(self) -> None:
        """Give back memory and settings."""
        self._scope.close()
        self.accelerator.free_memory()
        del self.model, self.optimizer, self.forward


@contextlib.contextmanager
def _ahead(source: Source, pairs: int, *, is_pinned: bool) -> Iterator[Iterator[data.Batch]]:
    """Give an endless iterator whose next batch is made while the last one is used, as the loop's is."""

    def made(number: int) -> data.Batch:
        batch = source.batch(number, pairs)
        return batch.pinned() if is_pinned else batch

    with ThreadPoolExecutor(1) as pool:
        following = [pool.submit(made, 0)]

        def each() -> Iterator[data.Batch]:
            for number in itertools.count(1):
                batch = following.pop().result()
                following.append(pool.submit(made, number))
                yield batch

        yield each()


# --- measuring -------------------------------------------------------------------------------------------------------


class Clock:
    """Times between marks on a device's own stream, so that nothing has to wait for a mark."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note the moment at which the device gets here."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between marks; waits for the device."""
        pairs = list(itertools.pairwise(self._marks))
        if not self._is_cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def measure(
    job: Job, architecture: Architecture, device: torch.device, seconds: float, backend: str = "inductor"
) -> dict[str, Any]:
    """Return what a job took, or `error` where it does not fit into memory.

    seconds, least, most: median, shortest and longest step. steps: how many were timed. building, warming: seconds until the
    models were there, and of the first two steps, compiling included. peak_gib: memory, null without a GPU. first_loss: log 2
    where policy and reference compute the same, as they should before the first update.

    Args:
        seconds: how long steps are timed, LEAST_STEPS and MOST_STEPS allowing.
        backend: of torch.compile.
    """
    gc.collect()
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    steps: Steps | None = None
    try:
        steps = Steps(job, architecture, device, backend)
        _wait(device)
        built = time.perf_counter() - started
        loss = steps.step()
        steps.step()
        _wait(device)
        warm = time.perf_counter() - started - built
        clock, began = Clock(device), time.perf_counter()
        clock.mark()
        done = 0
        while done < LEAST_STEPS or (done < MOST_STEPS and time.perf_counter() - began < seconds):
            steps.step()
            clock.mark()
            done += 1
        taken = clock.seconds()
    except torch.OutOfMemoryError:
        return {"error": OUT_OF_MEMORY}
    finally:
        if steps is not None:
            steps.close()
    return {
        "first_loss": loss,
        "seconds": statistics.median(taken),
        "least": min(taken),
        "most": max(taken),
        "steps": done,
        "building": built,
        "warming": warm,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
    }


def matrix_rate(device: torch.device, repeats: int = 30) -> float:
    """Return the measured rate of square bf16 matrix products of random numbers, FLOP/s: the median product's."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    clock = Clock(device)
    clock.mark()
    for _ in range(repeats):
        a @ b
        clock.mark()
    return 2 * side**3 / statistics.median(clock.seconds())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
