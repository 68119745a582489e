"""How fast a step is, against what public scripts do and against what cannot be avoided: `python -m benchmarks.training`.

    plain    an online step as public scripts write it: decode both pictures of every pair in the training process (the
             scripts' default), encode them with the autoencoder and the prompts with the text encoder, draw noise, policy, a
             second UNet as reference, loss, backward, clip, AdamW
    ours     `trainers.loop.Trainer` step by step: batches from memory-mapped caches made ahead in a thread, adapters taken
             off for the reference of a LoRA, statistics, metrics and their record
    bare     the policy's forward and backward, the reference's forward, the optimiser, on prepared tensors; nothing else

In one process, one step at a time in turns whose order rotates, with the same micro-batch, threads, precision (float32),
trained weights and no activation checkpointing; DPO's loss in all three. What our loop does ahead is added to its time.
Figures are medians over the turns, ratios medians of the turns' own ratios. On two backbones: the small world's tiny one, and
SD1.5's architecture at a tenth of its width with random weights and 256-pixel JPEGs. Then SmPO with cached trajectories
against inverting online, and Adaptive-DPO online and by the dataset's minority values against DPO.

A bound is what the ratio would be if time were FLOP (matrix products, convolutions, attention), of the steps that were timed.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image

from benchmarks.scoring import build_store, machine
from benchmarks.training_backbones import TOKENS, autoencoder, text_encoder, unet_config, write_sd15
from benchmarks.training_flops import PairCost, Shapes, encoding_cost, pair_cost
from pipelines import catalogue, ingest, schemas, steps
from pipelines.config import BackboneConfig, Config, TrainingConfig, ValidationConfig, small_world
from pipelines.scoring import batches
from pipelines.tables import Store
from pipelines.world.raw import WorldConfig, write_world
from trainers import backbones, data, inversion
from trainers.backbones.adapters import make_trainable
from trainers.caches import Backbone
from trainers.loop import Run, Trainer
from trainers.recipes import AdaptiveDPO, DiffusionDPO, FullWeights, Inversion, LoRA, Optimiser, Recipe, recipe
from trainers.schedules import optimizer
from trainers.steps import Training

BETA, SEED = 100.0, 0
RULE = Optimiser(learning_rate=1e-6)
"""So small that the weights stay what they were."""
SHARE_OF_BARE, SHARE_OF_BOUND = 0.9, 0.9
CACHED_OVER_DPO, ONLINE_OVER_DPO, DATASET_OVER_DPO = 1.15, 1.7, 1.05
WEIGHTS: dict[str, FullWeights | LoRA] = {"full": FullWeights(), "lora": LoRA()}


@dataclass(frozen=True)
class Size:
    """How much is run.

    repeats: turns that are counted; SmPO inverts online, which takes long, in one of every_online. *_pairs: per step of the
    tiny and the narrowed backbone. divide: of SD1.5's widths. pixels, pictures: of its store. levels: n of the inversion.
    """

    repeats: int
    every_online: int
    levels: int
    tiny_pairs: int
    narrow_pairs: int
    divide: int
    pixels: int
    pictures: int
    world: WorldConfig

    @property
    def steps(self) -> int:
        """Return the optimiser steps of every way: one more, which is not counted."""
        return self.repeats + 1


WHOLE = Size(
    repeats=15,
    every_online=3,
    levels=10,
    tiny_pairs=32,
    narrow_pairs=2,
    divide=10,
    pixels=256,
    pictures=96,
    world=WorldConfig(
        rows_per_shard=120,
        pickapic_shards={"train": 2, "validation": 1, "test": 1},
        pickapic_prompts={"train": 40, "validation": 8, "test": 8},
        hpd_train_prompts=6,
        hpd_test_groups=3,
        hpd_test_groups_of_ten=1,
    ),
)
QUICK = Size(
    repeats=1,
    every_online=1,
    levels=3,
    tiny_pairs=2,
    narrow_pairs=1,
    divide=20,
    pixels=64,
    pictures=24,
    world=replace(
        WHOLE.world,
        rows_per_shard=40,
        pickapic_shards={"train": 1, "validation": 1, "test": 1},
        pickapic_prompts={"train": 10, "validation": 3, "test": 3},
        hpd_train_prompts=2,
        hpd_test_groups=2,
    ),
)


# --- the stores ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A store with everything but training done, its backbone, and the pairs of a step."""

    name: str
    store: Store
    config: Config
    backbone: Backbone
    pairs: int

    def run(self, rule: Recipe, size: Size) -> Run:
        """Return a run of so many steps that nothing but steps happens in them."""
        training = TrainingConfig(
            steps=size.steps,
            batch_size=self.pairs,
            micro_batch=self.pairs,
            precision="fp32",
            device="cpu",
            checkpoint_every=size.steps + 1,
            loss_limit=1e9,
            validation=ValidationConfig(every=0),
        )
        return Run(self.store, self.config.model_copy(update={"training": training}), rule, self.backbone)

    def shapes(self) -> Shapes:
        """Return what its UNet is given of one picture."""
        hidden = self.backbone.model.encode_prompts([""]).hidden
        return Shapes(self.backbone.model.latent_shape, hidden.shape[1], hidden.shape[2])


def tiny(home: Path, size: Size) -> World:
    """Return the small world with its tiny backbone, by the real steps."""
    config = small_world(home, size.world)
    write_world(config.world_folder, size.world)
    store, shards = Store(config.store_location), ingest.list_shards(config)
    for shard in shards:
        ingest.ingest_shard(store, ingest.plan(config.source(shard.source)), shard)
    keys = [s.key for s in shards]
    catalogue.build(store, keys)
    return _labelled("tiny", store, config, keys, size.tiny_pairs)


def narrow(home: Path, size: Size) -> World:
    """Return pairs of JPEGs with a narrowed SD1.5, by the real steps."""
    store, config, keys = build_store(home, size.pictures // 2, 1, size.pixels, chained=False)
    checkpoint = write_sd15(home / "narrow", size.divide)
    backbone = BackboneConfig(name="narrow", family="sd15", checkpoint=str(checkpoint), resolution=size.pixels)
    config = config.model_copy(update={"backbones": (backbone,)})
    return _labelled(f"sd15/{size.divide}", store, config, keys, size.narrow_pairs)


def _labelled(name: str, store: Store, config: Config, keys: list[str], pairs: int) -> World:
    models: dict[str, Any] = {}
    for key in keys:
        batches.score_shard(store, key, list(config.scorers), models=models)
    batches.activate(store, config, keys)
    labels = steps.Labels(store, config, keys)
    for table in steps.LABEL_TABLES:
        getattr(labels, table)()
    config = config.model_copy(update={"training": TrainingConfig(device="cpu", recipes=("diffusion_dpo",))})
    training = Training(store, config, lambda message: None)
    for key in keys:
        training.latents(key)
    training.prompt_embeddings()
    return World(name, store, config, training.backbone, pairs)


# --- the ways --------------------------------------------------------------------------------------------------------


class Way(Protocol):
    """Something that takes optimiser steps.

    ahead: seconds of a step's work that is done before it begins. every: in how many turns it takes one.
    """

    ahead: float
    every: int

    def step(self) -> None:
        """Take one."""


class Ours:
    """The project's loop, one step after another."""

    def __init__(self, run: Run, every: int = 1) -> None:
        self.run, self.trainer, self.every = run, Trainer(run, lambda message: None), every
        self.next = self.trainer.start()
        self.ahead = statistics.median(_seconds(partial(self.batch, step)) for step in range(run.steps)[:3])

    def draws(self, step: int) -> tuple[list[int], data.Draws]:
        """Return the rows of a step's pairs and what is drawn for them."""
        run, ids = self.run, self.trainer.pairs.pairs["pair_id"]
        rows = data.batch_rows(step, run.batch_size, len(ids), SEED)
        length = run.backbone.model.timesteps
        drawn = data.draws(SEED, [ids[r] for r, _ in rows], [e for _, e in rows], run.recipe, length)
        return [r for r, _ in rows], drawn

    def batch(self, step: int) -> data.Batch:
        """Return the batch of a step, made anew."""
        return self.trainer.pairs.batch(*self.draws(step))

    def step(self) -> None:
        """Take an optimiser step, its record included."""
        self.trainer.step(self.next)
        self.next += 1


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def dpo(target: torch.Tensor, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return Diffusion-DPO's mean loss as the scripts write it; all [2B, C, H, W], winners first."""
    errors = (policy - target).pow(2).mean((1, 2, 3)).chunk(2)
    before = (reference - target).pow(2).mean((1, 2, 3)).chunk(2)
    margin = (errors[0] - errors[1]) - (before[0] - before[1])
    return -F.logsigmoid(-0.5 * BETA * margin).mean()


class Bare:
    """Forwards, backward and optimiser on tensors that lie ready, those of our first steps."""

    ahead, every = 0.0, 1

    def __init__(self, ours: Ours, weights: FullWeights | LoRA) -> None:
        trainer, model = ours.trainer, ours.run.backbone.model
        self.policy, self.reference = model.trainable(weights, None, SEED), model.load_unet(model.folder)
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer, self.taken = optimizer(RULE, self.trained), 0
        self.ready = []
        for step in range(2):
            batch = ours.batch(step)
            noisy, target = trainer.forward.noised(batch)
            hidden = batch.conditioning.twice().hidden
            self.ready.append((noisy.flatten(0, 1), target.flatten(0, 1), batch.timesteps.repeat(2), hidden))

    def step(self) -> None:
        """Take an optimiser step."""
        noisy, target, timesteps, hidden = self.ready[self.taken % len(self.ready)]
        self.taken += 1
        policy = self.policy(noisy, timesteps, hidden).sample
        with torch.no_grad():
            reference = self.reference(noisy, timesteps, hidden).sample
        dpo(target, policy, reference).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class ForwardAlone:
    """The forward without gradient that a step and every step of an inversion has."""

    ahead, every = 0.0, 1

    def __init__(self, bare: Bare) -> None:
        self.bare = bare

    def step(self) -> None:
        """Take it."""
        noisy, _, timesteps, hidden = self.bare.ready[0]
        with torch.no_grad():
            self.bare.reference(noisy, timesteps, hidden)


class Plain:
    """The public scripts' step."""

    ahead, every = 0.0, 1

    def __init__(self, ours: Ours, weights: FullWeights | LoRA) -> None:
        run, model = ours.run, ours.run.backbone.model
        self.model, self.run, self.pairs, self.taken = model, run, ours.trainer.pairs.pairs, 0
        self.policy, self.reference = model.trainable(weights, None, SEED), model.load_unet(model.folder)
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = optimizer(RULE, self.trained)
        self.abar = model.alphas_cumprod
        frame = run.store.scan(schemas.IMAGES).select("image_id", "bytes").collect()
        self.bytes: dict[str, bytes] = dict(frame.iter_rows())
        self.prompts: dict[str, str] = dict(
            run.store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt").collect().iter_rows()
        )

    def _pixels(self, ids: Sequence[str]) -> torch.Tensor:
        return torch.stack([self.model.to_pixels(Image.open(io.BytesIO(self.bytes[i])).convert("RGB")) for i in ids])

    def step(self) -> None:
        """Take an optimiser step."""
        model, rows = self.model, data.batch_rows(self.taken, self.run.batch_size, len(self.pairs), SEED)
        self.taken += 1
        part = self.pairs[[r for r, _ in rows]]
        pixels = self._pixels([*part["winner_id"], *part["loser_id"]])
        with torch.no_grad():
            latents = model.vae.encode(pixels).latent_dist.sample() * model.latent_scale
            hidden = model.encode_prompts([self.prompts[p] for p in part["prompt_id"]]).hidden.repeat(2, 1, 1)
        noise = torch.randn_like(latents[: len(part)]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, model.timesteps, (len(part),)).repeat(2)
        abar = self.abar[timesteps].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        target = abar.sqrt() * noise - (1 - abar).sqrt() * latents if model.predicts_velocity else noise
        policy = self.policy(noisy, timesteps, hidden).sample
        with torch.no_grad():
            reference = self.reference(noisy, timesteps, hidden).sample
        loss = dpo(target, policy, reference)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, RULE.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


# --- measuring -------------------------------------------------------------------------------------------------------


class Times:
    """Seconds per step of every way, by turn; ratios are taken within turns."""

    def __init__(self, names: Sequence[str]) -> None:
        self.seconds: dict[str, dict[int, float]] = {n: {} for n in names}

    def median(self, name: str) -> float:
        """Return a way's median seconds per step."""
        return statistics.median(self.seconds[name].values())

    def ratio(self, slow: str, fast: str, by: Mapping[int, float] | None = None) -> float:
        """Return the median of slow / fast over the turns that have both, each turn's divided by its entry of `by`."""
        first, second = self.seconds[slow], self.seconds[fast]
        return statistics.median(first[t] / second[t] / (by[t] if by else 1.0) for t in first if t in second)


def in_turns(ways: dict[str, Way], size: Size) -> Times:
    """Run a step of every way in turns, one turn more than is counted; every turn begins with another way.

    What our loop does ahead is done between the ways, and its time is added.
    """
    times, names = Times(list(ways)), list(ways)
    settle = 2 * max(way.ahead for way in ways.values())
    for turn in range(size.repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn % ways[name].every:
                continue
            taken = _seconds(ways[name].step) + ways[name].ahead
            time.sleep(settle)
            if turn:
                times.seconds[name][turn] = taken
    return times


def forwards(ours: Ours, mode: str, size: Size) -> dict[int, float]:
    """Return turn -> how many forwards of a model inverting costs per picture in the step of that turn."""
    length = ours.run.backbone.model.timesteps
    found = {}
    for turn in range(ours.every, size.repeats + 1, ours.every):
        drawn = ours.draws(turn // ours.every)[1].timesteps
        found[turn] = statistics.mean(inversion.forwards(mode, size.levels, t, length) for t in drawn)
    return found


def expected_forwards(mode: str, levels: int, timesteps: int) -> float:
    """Return how many it costs on average over what is drawn."""
    drawn = inversion.drawable(timesteps, levels, mode).tolist()
    return statistics.mean(inversion.forwards(mode, levels, t, timesteps) for t in drawn)


@dataclass(frozen=True)
class Goal:
    """A figure, what it should be, and whether it is."""

    what: str
    is_met: bool


class Report:
    """The table, and the goals below it."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.notes: list[str] = []
        self.goals: list[Goal] = []

    def times(self, world: World, weights: str, times: Times, titles: dict[str, str]) -> None:
        """Add a row per way."""
        for name, title in titles.items():
            found = times.seconds[name].values()
            middle = times.median(name)
            self.rows.append(
                f"{world.name:<9}{weights:<6}{title:<50}{world.pairs / middle:>9.2f}{middle:>9.3f}"
                f"{min(found):>8.3f} -{max(found):>6.3f}{times.ratio(name, 'bare'):>9.2f}"
            )

    def at_most(self, what: str, found: float, limit: float) -> None:
        """Judge a figure that should not exceed a limit."""
        self.goals.append(Goal(f"{what}: {found:.2f}, goal <= {limit:.2f}", found <= limit))

    def at_least(self, what: str, found: float, limit: float) -> None:
        """Judge a share that should reach a limit."""
        self.goals.append(Goal(f"{what}: {found:.1%}, goal >= {limit:.0%}", found >= limit))

    def show(self) -> None:
        """Print everything."""
        head = f"{'backbone':<9}{'train':<6}{'way':<50}{'pairs/s':>9}{'s/step':>9}{'min - max':>16}{'/ bare':>9}"
        print("\n".join([head, *self.rows, "", *self.notes]))
        for goal in self.goals:
            print(f"{'PASS  ' if goal.is_met else 'MISSED'}  {goal.what}")


def measure(world: World, size: Size, report: Report) -> None:
    """Measure everything on one backbone."""
    base = replace(
        recipe("diffusion_dpo"),
        family=world.backbone.config.family,
        objective=DiffusionDPO(beta=BETA),
        optimiser=RULE,
    )
    shapes = world.shapes()

    def meta(weights: FullWeights | LoRA | None) -> Any:
        return backbones.meta_unet(world.backbone.config, weights)

    costs = {name: pair_cost(meta, weights, shapes) for name, weights in WEIGHTS.items()}
    model = world.backbone.model
    encoding = encoding_cost(model.vae, model.text_encoders["text_encoder"], model.config.resolution, shapes.tokens)
    say(f"{world.name}: models, trajectories and batches of {world.pairs} pairs")
    _measure_full(world, size, report, base, costs["full"], encoding)
    _measure_lora(world, size, report, replace(base, weights=WEIGHTS["lora"]), costs["lora"], encoding)


def _measure_full(world: World, size: Size, report: Report, base: Recipe, cost: PairCost, encoding: float) -> None:
    smpo = replace(recipe("smpo"), family=base.family, optimiser=RULE)
    consistent = Inversion("consistent", size.levels, "reference", is_cached=True)
    adaptive = replace(recipe("adaptive_dpo"), family=base.family, optimiser=RULE)
    released = Inversion("released", size.levels, "policy", is_cached=False)
    recipes = {
        "ours": base,
        "smpo cached": replace(smpo, noising=consistent),
        "smpo consistent": replace(smpo, name="smpo_online", noising=replace(consistent, is_cached=False)),
        "smpo released": replace(smpo, name="smpo_released", noising=released),
        "adaptive dataset": adaptive,
        "adaptive online": replace(adaptive, name="adaptive_online", objective=AdaptiveDPO(metric="online")),
    }
    ours = {}
    for name, rule in recipes.items():
        started = time.perf_counter()
        is_online = name in ("smpo consistent", "smpo released")
        ours[name] = Ours(world.run(rule, size), size.every_online if is_online else 1)
        if name == "smpo cached":
            report.notes.append(
                f"{world.name}: trajectories of {size.steps * world.pairs} pairs made before training in "
                f"{time.perf_counter() - started:.1f} s"
            )
    bare = Bare(ours["ours"], FullWeights())
    ways: dict[str, Way] = {
        "plain": Plain(ours["ours"], FullWeights()),
        "bare": bare,
        "forward": ForwardAlone(bare),
        **ours,
    }
    times = _timed(world, size, ways, ours)
    report.times(
        world,
        "full",
        times,
        {
            "plain": "plain online step",
            "ours": "ours: caches (Diffusion-DPO)",
            "bare": "bare forwards, backward, optimiser",
            "forward": "bare forward without gradient, alone",
            "smpo cached": f"ours: SmPO, cached trajectories, n = {size.levels}",
            "smpo consistent": f"ours: SmPO, inverting online, consistent, n = {size.levels}",
            "smpo released": f"ours: SmPO, inverting online, released, n = {size.levels}",
            "adaptive dataset": "ours: Adaptive-DPO, the dataset's values",
            "adaptive online": "ours: Adaptive-DPO, online metric",
        },
    )
    _judge_step(report, world, "full", times, cost, encoding)
    who = f"{world.name} full"
    report.at_most(f"{who}, SmPO with cached trajectories / DPO", times.ratio("smpo cached", "ours"), CACHED_OVER_DPO)
    # Two pictures in a pair, and cost.forward is that of both.
    for mode in ("consistent", "released"):
        name = f"smpo {mode}"
        bounds = {t: 1 + f * cost.forward / cost.step for t, f in forwards(ours[name], mode, size).items()}
        usual = expected_forwards(mode, size.levels, world.backbone.model.timesteps)
        report.notes.append(
            f"{who}: inverting online, {mode}, bound on average {1 + usual * cost.forward / cost.step:.2f} x; "
            f"{1 + usual / times.ratio('bare', 'forward'):.2f} x by the times of the bare step and of its forward alone"
        )
        report.at_least(
            f"{who}, SmPO cached over {mode} online: {times.ratio(name, 'smpo cached'):.2f} x, bound of these steps "
            f"{statistics.median(bounds.values()):.2f} x, share of the bound",
            times.ratio(name, "smpo cached", bounds),
            SHARE_OF_BOUND,
        )
    report.at_most(f"{who}, Adaptive online / DPO", times.ratio("adaptive online", "ours"), ONLINE_OVER_DPO)
    report.at_most(f"{who}, Adaptive dataset / DPO", times.ratio("adaptive dataset", "ours"), DATASET_OVER_DPO)


def _measure_lora(world: World, size: Size, report: Report, rule: Recipe, cost: PairCost, encoding: float) -> None:
    ours = Ours(world.run(rule, size))
    ways: dict[str, Way] = {"plain": Plain(ours, rule.weights), "bare": Bare(ours, rule.weights), "ours": ours}
    times = _timed(world, size, ways, {"ours": ours})
    report.times(
        world,
        "lora",
        times,
        {
            "plain": "plain online step, a second UNet as reference",
            "ours": "ours: caches, adapters off as reference",
            "bare": "bare forwards, backward, optimiser",
        },
    )
    _judge_step(report, world, "lora", times, cost, encoding)


def _timed(world: World, size: Size, ways: dict[str, Way], ours: dict[str, Ours]) -> Times:
    say(f"{world.name}: {len(ways)} ways in turns; a batch is made in {1e3 * ours['ours'].ahead:.0f} ms")
    times = in_turns(ways, size)
    for way in ours.values():
        way.trainer.close()
    return times


def _judge_step(report: Report, world: World, weights: str, times: Times, cost: PairCost, encoding: float) -> None:
    who, bound = f"{world.name} {weights}", (cost.step + encoding) / cost.step
    report.notes.append(
        f"{who}: {cost.step / 1e9:.2f} GFLOP a pair and step (policy {cost.forward / 1e9:.2f} + {cost.backward / 1e9:.2f}, "
        f"reference {cost.reference / 1e9:.2f}), encoding {encoding / 1e9:.2f}: ours {times.ratio('plain', 'ours'):.2f} x as "
        f"fast as the plain step, bound {bound:.2f} x"
    )
    report.at_least(f"{who}, ours of the bare work's speed", times.ratio("bare", "ours"), SHARE_OF_BARE)


def published_bounds() -> str:
    """Return what the bound over the plain step is for the published SD1.5 at 512 pixels."""

    def meta(weights: FullWeights | LoRA | None) -> Any:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config(1)).requires_grad_(False)
            return unet if weights is None else make_trainable(unet, weights, SEED)

    with torch.device("meta"):
        parts = autoencoder(1), text_encoder(1)
    encoding, shapes = encoding_cost(*parts, 512, TOKENS), Shapes((4, 64, 64), TOKENS, 768)
    costs = {name: pair_cost(meta, weights, shapes).step for name, weights in WEIGHTS.items()}
    told = ", ".join(f"{(c + encoding) / c:.2f} x ({name})" for name, c in costs.items())
    return f"the same bound for the published SD1.5 at 512 pixels: {told}"


def say(message: str) -> None:
    """Print one line at once."""
    print(message, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that it runs, judges nothing")
    parser.add_argument("--repeats", type=int, help="turns that are counted")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else WHOLE
    size = replace(size, repeats=options.repeats or size.repeats)
    before, report = machine(), Report()
    builders: dict[str, Callable[[Path, Size], World]] = {"tiny": tiny, "narrow": narrow}
    for name, build in builders.items():
        with tempfile.TemporaryDirectory() as home:
            say(f"{name}: store and caches")
            measure(build(Path(home), size), size, report)
    report.notes.append(published_bounds())
    print(f"\n{before}; float32; {size.repeats} turns after one more")
    report.show()
    if options.quick:
        print("--quick: far too short to judge by")
        return 0
    return 0 if all(g.is_met for g in report.goals) else 1


if __name__ == "__main__":
    sys.exit(main())
