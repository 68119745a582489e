"""The dry run of one recipe on one store: what it would train on, what it needs, how long it takes; nothing is written.

Belongs here: reading a run's tables and caches, and telling all of it to a person. Does not belong here: how memory,
operations and seconds are counted (`costs`), training.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import polars as pl
import torch

from pipelines import schemas
from pipelines.tables import Store
from trainers import costs, data, inversion, trajectories, validation
from trainers.caches import EMPTY_PROMPT
from trainers.checkpoints import CODE_VERSION, CheckpointFile
from trainers.costs import Memory, Operations, Seconds, Shape
from trainers.loop import Run, micro_batches
from trainers.recipes import Inversion

SPLITS = ("train", "validation", "test")
TOLD_REASONS = 6
"""Reasons that are told by name; the rest are counted together."""
_HALF = 2
"""Bytes of a cached number."""
_OPTIONS = ("seed", "processes", "micro_batch", "activation_checkpointing", "compile", "checkpoint_every", "export")
_ADVICE = "lower training.micro_batch or set training.activation_checkpointing"


@dataclass(frozen=True)
class Number:
    """One number of the run as it would be used; `note`: who says so, where that is not the recipe or the default alone."""

    name: str
    value: Any
    note: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint from which the run would continue."""

    path: str
    bytes: int
    written: str
    steps_done: int


@dataclass(frozen=True)
class Split:
    """Preferences of a split after the recipe's policy: pairs that are left, and (reason, count) of the others."""

    name: str
    preferences: int
    pairs: int
    excluded: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Cache:
    """Rows of a table that the run reads, how many of them lie below `where`, how many any run needs, and bytes of one."""

    name: str
    where: str
    wanted: int
    present: int
    stored: int
    row_bytes: int

    @property
    def missing(self) -> int:
        """Return how many rows are not there."""
        return self.wanted - self.present


@dataclass(frozen=True)
class Scratch:
    """The local copy of whole caches: bytes that it would have, bytes of it that lie there, free bytes of its disk."""

    folder: str
    wanted: int
    present: int
    free: int


@dataclass(frozen=True)
class Duration:
    """A part of the run: seconds by the measured speed, and what was multiplied."""

    what: str
    seconds: float
    because: str


@dataclass(frozen=True)
class Plan:
    """Everything about a run that can be known before it.

    start: the recipe that it starts from ('' for the backbone). finished: folder of the model where there is nothing to do.
    statistics_over: pairs of a micro-batch of all processes, where the objective mixes them. epochs: passes over the
    training pairs. forwards: of the model that inverts, per latent and optimiser step (0: none, or cached). available: free
    memory of the device, bytes. seconds, durations: None, empty where not measured; not_measured says why.
    """

    recipe: str
    summary: str
    backbone: str
    device: str
    numbers: tuple[Number, ...]
    start: str
    is_start_trained: bool
    folder: str
    finished: str | None
    checkpoint: Checkpoint | None
    splits: tuple[Split, ...]
    steps: int
    batch_size: int
    processes: int
    accumulation: int
    micro_batch: int
    statistics_over: int | None
    epochs: float | None
    memory: Memory
    available: int
    checkpoint_bytes: int
    caches: tuple[Cache, ...]
    scratch: Scratch
    operations: Operations
    forwards: float
    seconds: Seconds | None
    not_measured: str
    durations: tuple[Duration, ...]

    @property
    def pairs(self) -> int:
        """Return the pairs that are trained on."""
        return next(s.pairs for s in self.splits if s.name == "train")


def plan(run: Run, *, measure: bool = True) -> Plan:
    """Return the plan of a run.

    Args:
        measure: load the models and time a micro-batch; without it the plan has no duration.

    Raises:
        StoreError: a table that the run reads is missing.
        ConfigError: the step's pairs cannot be shared out evenly.
    """
    recipe, options, backbone = run.recipe, run.config.training, run.backbone.model
    device = torch.device(run.backbone.device)
    micro, accumulation = micro_batches(run.batch_size, options.processes, options.micro_batch)
    finished, checkpoint = run.finished(), _checkpoint(run)
    done = run.steps if finished is not None else 0 if checkpoint is None else checkpoint.steps_done
    pairs = data.training_pairs(run.store, recipe)
    shape = _shape(run, micro)
    wanted = _wanted_trajectories(run, pairs, range(done, run.steps), backbone.timesteps)
    missing = _missing_trajectories(run, wanted)
    caches = tuple(_caches(run, pairs, shape, wanted, missing))
    needs = costs.memory(
        run.backbone.config,
        recipe,
        shape,
        precision=run.precision,
        device=device,
        activation_checkpointing=options.activation_checkpointing,
    )
    available = costs.available_bytes(device)
    too_large = f"{_size(needs.total)} do not fit into the {_size(available)} that are free on {device}"
    reasons = {
        "nothing to train": done == run.steps,
        "no pairs to train on": pairs.is_empty(),
        too_large: needs.total > available,
        "not asked for": not measure,
    }
    not_measured = next((reason for reason, is_so in reasons.items() if is_so), "")
    seconds = None
    if not not_measured:
        seconds = costs.seconds(
            backbone,
            recipe,
            shape,
            precision=run.precision,
            activation_checkpointing=options.activation_checkpointing,
        )
    forwards = _forwards_per_latent(run, backbone.timesteps)
    return Plan(
        recipe=recipe.name,
        summary=recipe.summary,
        backbone=run.backbone.partition(),
        device=str(device),
        numbers=tuple(_numbers(run)),
        start=recipe.start,
        is_start_trained=run.start is not None,
        folder=str(run.folder),
        finished=None if finished is None else str(finished.model),
        checkpoint=checkpoint,
        splits=tuple(_split(run, name) for name in SPLITS),
        steps=run.steps,
        batch_size=run.batch_size,
        processes=options.processes,
        accumulation=accumulation,
        micro_batch=micro,
        statistics_over=options.processes * micro if recipe.objective.mixes_pairs else None,
        epochs=run.steps * run.batch_size / len(pairs) if len(pairs) else None,
        memory=needs,
        available=available,
        checkpoint_bytes=_checkpoint_bytes(run, needs),
        caches=caches,
        scratch=_scratch(run, caches),
        operations=costs.operations(
            run.backbone.config, recipe, shape, activation_checkpointing=options.activation_checkpointing
        ),
        forwards=forwards,
        seconds=seconds,
        not_measured=not_measured,
        durations=() if seconds is None else tuple(_durations(run, seconds, shape, done, forwards, missing)),
    )


# --- the recipe ------------------------------------------------------------------------------------------------------


def _numbers(run: Run) -> Iterator[Number]:
    """Yield every number of the recipe, then those that the configuration alone says."""
    used = {"steps": run.steps, "batch_size": run.batch_size}
    for name, said in _flat(run.recipe.numbers()):
        value = used.get(name, said)
        yield Number(name, value, "" if value == said else f"training.{name}; the recipe has {said}")
    options = run.config.training
    resolved = "" if options.precision == run.precision else f"{options.precision} on {run.backbone.device}"
    yield Number("training.precision", run.precision, resolved)
    for name in _OPTIONS:
        yield Number(f"training.{name}", getattr(options, name))
    yield Number("training.validation.every", options.validation.every)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in ("name", "summary"):
            yield prefix + key, value


def _checkpoint(run: Run) -> Checkpoint | None:
    """Return the run's checkpoint.

    Raises:
        CheckpointFileError: training would refuse it.
    """
    path = run.folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        # Mapped: of a file of many gigabytes only the part that is asked for is read.
        state: Any = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception:
        # torch raises several unrelated types for damaged files.
        state = {}
    if state.get("code_version") != CODE_VERSION:
        # It says what is wrong and what to do.
        state = CheckpointFile(path).load()
    written = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")
    return Checkpoint(str(path), path.stat().st_size, written, len(state["metrics"]))


def _checkpoint_bytes(run: Run, needs: Memory) -> int:
    """Return about what a checkpoint takes on the disk: what is trained, and what follows it."""
    moving = 0 if run.recipe.reference.kind == "frozen" else needs.reference
    return needs.gradients + needs.optimiser + needs.annotators + moving


# --- pairs -----------------------------------------------------------------------------------------------------------


def _split(run: Run, name: str) -> Split:
    counted = (
        data.decided(run.store, run.recipe, [name])
        .group_by(pl.col("target_label_0").is_not_null().alias("is_kept"), "excluded_because")
        .len()
        .collect()
    )
    left_out = counted.filter(~pl.col("is_kept")).sort("len", "excluded_because", descending=[True, False])
    excluded = tuple((str(r["excluded_because"]), int(r["len"])) for r in left_out.iter_rows(named=True))
    kept = int(counted.filter("is_kept")["len"].sum())
    return Split(name, kept + sum(n for _, n in excluded), kept, excluded)


# --- caches ----------------------------------------------------------------------------------------------------------


def _shape(run: Run, micro: int) -> Shape:
    first = (
        run.store.scan(schemas.PROMPT_EMBEDDINGS, run.backbone.partition("all"))
        .select("tokens", "width", "pooled_width")
        .head(1)
        .collect()
        .row(0, named=True)
    )
    return Shape(micro, tuple(run.backbone.model.latent_shape), first["tokens"], first["width"], first["pooled_width"])


def _wanted_trajectories(run: Run, pairs: pl.DataFrame, steps: range, schedule_length: int) -> pl.DataFrame | None:
    """Return what the steps read of `trajectories`; None: nothing cached."""
    if run.trajectories is None or pairs.is_empty() or not len(steps):
        return None
    return data.wanted_trajectories(pairs, steps, run.batch_size, run.config.training.seed, run.recipe, schedule_length)


def _missing_trajectories(run: Run, wanted: pl.DataFrame | None) -> pl.DataFrame:
    if wanted is None or run.trajectories is None:
        return schemas.TRAJECTORIES.empty().select("image_id", "prompt_id", "is_flipped", "level")
    # Without the model that the recipe starts from there can be none of it.
    is_started = not run.recipe.start or run.start is not None
    return trajectories.missing(run.store, run.trajectories, wanted) if is_started else wanted


def _caches(
    run: Run, pairs: pl.DataFrame, shape: Shape, wanted: pl.DataFrame | None, missing: pl.DataFrame
) -> Iterator[Cache]:
    below, cells = run.backbone.partition(), math.prod(shape.latent)

    def cache(table: schemas.Table, where: str, needed: pl.DataFrame, present: int, row_bytes: int) -> Cache:
        stored = sum(m.rows for m in run.store.manifests(table.name, f"{where}/"))
        return Cache(table.name, where, len(needed), present, stored, row_bytes)

    images = pl.concat([pairs["winner_id"], pairs["loser_id"]]).unique().alias("image_id").to_frame()
    sides = pl.DataFrame({"is_flipped": [False, True] if run.recipe.flip else [False]})
    latents = images.join(sides, how="cross")
    # Mean and log-variance.
    yield cache(schemas.LATENTS, below, latents, _there(run.store, schemas.LATENTS, below, latents), 2 * _HALF * cells)
    prompts = pl.DataFrame({"prompt_id": [*pairs["prompt_id"].unique(), EMPTY_PROMPT]})
    embedded = _there(run.store, schemas.PROMPT_EMBEDDINGS, below, prompts)
    numbers = shape.tokens * shape.width + (shape.pooled_width or 0)
    yield cache(schemas.PROMPT_EMBEDDINGS, below, prompts, embedded, _HALF * numbers)
    if wanted is not None and run.trajectories is not None:
        row = trajectories.size_bytes(1, shape.latent)
        yield cache(schemas.TRAJECTORIES, run.trajectories.rstrip("/"), wanted, len(wanted) - len(missing), row)


def _there(store: Store, table: schemas.Table, where: str, wanted: pl.DataFrame) -> int:
    there = store.scan(table, f"{where}/").select(wanted.columns)
    return wanted.lazy().join(there, on=wanted.columns, how="semi").select(pl.len()).collect().item()


def _scratch(run: Run, caches: Sequence[Cache]) -> Scratch:
    files = (f for cache in caches for f in (run.scratch / cache.name / cache.where).rglob("*") if f.is_file())
    nearest = next(folder for folder in (run.scratch, *run.scratch.absolute().parents) if folder.exists())
    return Scratch(
        folder=str(run.scratch),
        wanted=sum((cache.stored + cache.missing) * cache.row_bytes for cache in caches),
        present=sum(f.stat().st_size for f in files),
        free=shutil.disk_usage(nearest).free,
    )


# --- duration --------------------------------------------------------------------------------------------------------


def _forwards_per_latent(run: Run, schedule_length: int) -> float:
    """Return the mean forwards of an inversion in the step itself, per latent; 0 for cached ones."""
    rule = run.recipe.noising
    if not isinstance(rule, Inversion) or rule.is_cached:
        return 0.0
    drawn = data.timesteps_of(rule, schedule_length)
    return sum(inversion.forwards(rule.mode, rule.steps, t, schedule_length) for t in drawn) / len(drawn)


def _durations(
    run: Run, seconds: Seconds, shape: Shape, done: int, forwards: float, missing: pl.DataFrame
) -> Iterator[Duration]:
    options, schedule_length = run.config.training, run.backbone.model.timesteps
    per_latent = seconds.forward / (2 * shape.pairs)
    accumulation = run.batch_size // (options.processes * shape.pairs)
    rule = run.recipe.noising
    if isinstance(rule, Inversion) and len(missing):
        longest = missing.group_by("image_id", "prompt_id", "is_flipped").agg(pl.col("level").max())["level"]
        cost = {t: inversion.forwards(rule.mode, rule.steps, t, schedule_length) for t in set(longest)}
        count = sum(cost[t] for t in longest)
        yield Duration(
            "trajectories",
            count * per_latent / options.processes,
            f"{len(missing)} latents, {count} forwards",
        )
    step = accumulation * (seconds.micro_batch + forwards * seconds.forward) + seconds.step
    compiled = ", measured without torch.compile" if options.compile else ""
    yield Duration("training", (run.steps - done) * step, f"{run.steps - done} steps at {step:.3g} s{compiled}")
    if options.validation.every:
        every = options.validation.every
        times = len({*range(every * (done // every + 1), run.steps, every), run.steps} - {done}) + (not done)
        held_out = len(validation.held_out_pairs(run.store, options.validation.pairs))
        of_pairs = 2 * held_out * options.validation.draws
        # With guidance a sampling step takes two forwards.
        of_samples = 2 * options.validation.prompts * run.config.evaluation.steps
        # The model at the start is measured once, for the others to be compared with.
        count = times * (of_pairs + of_samples) + (0 if done else of_pairs)
        yield Duration(
            "validation",
            count * per_latent / options.processes,
            f"{times} times, {count} forwards; decoding and scoring come on top",
        )


# --- telling ---------------------------------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """Return the plan as aligned text."""
    parts = (
        ("run", _told_run(plan)),
        ("numbers", [(n.name, _told_number(n)) for n in plan.numbers]),
        ("pairs", _told_pairs(plan)),
        ("memory per process", _told_memory(plan)),
        ("caches", _told_caches(plan)),
        ("cost", _told_cost(plan)),
    )
    lines = [f"{plan.recipe}: {plan.summary}"]
    for title, rows in parts:
        width = max(len(name) for name, _ in rows)
        lines += ["", title, *(f"  {name.ljust(width)}  {told}".rstrip() for name, told in rows)]
    return "\n".join(lines)


def _told_run(plan: Plan) -> list[tuple[str, str]]:
    state = "nothing is there yet"
    if plan.finished is not None:
        state = f"finished, nothing to train: {plan.finished}"
    elif plan.checkpoint is not None:
        found = plan.checkpoint
        state = f"continues after step {found.steps_done} from {found.path} ({_size(found.bytes)}, {found.written})"
    start = "the backbone"
    if plan.start:
        start = f"{plan.start}, " + ("trained" if plan.is_start_trained else "not trained yet: it is trained first")
    processes = "process" if plan.processes == 1 else "processes"
    layout = f"{plan.processes} {processes} x {plan.accumulation} forwards x {plan.micro_batch}"
    if plan.statistics_over is not None:
        layout += f", the objective's statistics over {plan.statistics_over}"
    return [
        ("backbone", f"{plan.backbone} on {plan.device}"),
        ("starts from", start),
        ("folder", plan.folder),
        ("state", state),
        ("steps", f"{plan.steps} of {plan.batch_size} pairs ({layout})"),
    ]


def _told_number(number: Number) -> str:
    value = "" if number.value is None else f"{number.value}"
    return f"{value}  ({number.note})" if number.note else value


def _told_pairs(plan: Plan) -> list[tuple[str, str]]:
    rows = []
    for split in plan.splits:
        rows.append((split.name, f"{split.pairs} of {split.preferences} preferences"))
        told, rest = split.excluded[:TOLD_REASONS], split.excluded[TOLD_REASONS:]
        rows += [("", f"- {count}  {reason}") for reason, count in told]
        if rest:
            rows.append(("", f"- {sum(count for _, count in rest)}  {len(rest)} other reasons"))
    epochs = "there is nothing to train on" if plan.epochs is None else f"{plan.epochs:.3g}"
    return [*rows, ("epochs", epochs)]


def _told_memory(plan: Plan) -> list[tuple[str, str]]:
    needs = plan.memory
    sizes = {k: v for k, v in asdict(needs).items() if k not in ("parameters", "trained")}
    rows = [(name, _size(size)) for name, size in sizes.items() if size]
    rows[0] = ("weights", f"{rows[0][1]}  ({needs.parameters:,} parameters, {needs.trained:,} trained)")
    # Processes have a GPU each, but share the machine's memory.
    count = 1 if torch.device(plan.device).type == "cuda" else plan.processes
    told = f"{_size(needs.total)}" + (f" x {count}" if count > 1 else "")
    fits = "" if needs.total * count <= plan.available else f": too much, {_ADVICE}"
    rows.append(("together", f"{told} of {_size(plan.available)} that are free on {plan.device}{fits}"))
    if plan.seconds is not None and plan.seconds.peak_bytes is not None:
        rows.append(("measured", f"{_size(plan.seconds.peak_bytes)} at most"))
    return [*rows, ("checkpoint", f"about {_size(plan.checkpoint_bytes)} on the disk")]


def _told_caches(plan: Plan) -> list[tuple[str, str]]:
    rows = []
    for cache in plan.caches:
        told = f"{cache.present} of {cache.wanted} rows lie in {cache.where}"
        if cache.missing:
            told += f"; to be made: {cache.missing}, {_size(cache.missing * cache.row_bytes)}"
        rows.append((cache.name, told))
    scratch = plan.scratch
    told = f"{_size(scratch.wanted)} of copies in {scratch.folder}, {_size(scratch.present)} lie there; "
    return [*rows, ("scratch", told + f"{_size(scratch.free)} are free")]


def _told_cost(plan: Plan) -> list[tuple[str, str]]:
    per_pair = plan.operations.pair + 2 * plan.forwards * plan.operations.forward
    inverted = f", {plan.forwards:.3g} forwards per latent to invert it among them" if plan.forwards else ""
    rows = [("per pair", f"{_scaled(per_pair)}FLOP{inverted}")]
    if plan.seconds is None:
        return [*rows, ("duration", f"not measured: {plan.not_measured}")]
    taken = plan.seconds.micro_batch + plan.forwards * plan.seconds.forward
    rows.append(("measured", f"{taken:.3g} s per micro-batch, {_scaled(per_pair * plan.micro_batch / taken)}FLOP/s"))
    rows += [(part.what, f"{_time(part.seconds)}  ({part.because})") for part in plan.durations]
    return [*rows, ("duration", f"about {_time(sum(part.seconds for part in plan.durations))}")]


def _scaled(number: float) -> str:
    for prefix in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
