"""Training speed on a GPU, published architectures with random weights: `python -m benchmarks.training_gpu --out FILE`.

SD1.5 at 512 pixels and SDXL at 1024, all weights and LoRA, bf16 autocast, cached latents: pairs/s, TFLOP/s of useful work,
the share of the card's own bf16 matrix rate, peak memory. For each of the four the micro-batch is searched, then settings are
tried one at a time on top of it, then those that helped together. What a step is stands in `training_jobs`. One optimiser
step per forward unless it says otherwise: recipes accumulate more, so the optimiser weighs more here than in a run.

Within --seconds: the order is that of importance, what does not fit is named. Jobs run in a process of their own, which is
stopped where one takes too long, and started again for the next. Rows come as they are measured; --out gets them as JSON
lines. Without a GPU it says what it would run. `--device cpu --tiny` runs everything on models of no size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import training_jobs
from benchmarks.training_flops import PairCost
from benchmarks.training_jobs import Job

GOALS = {"sd15": 60.0, "sdxl": 8.0}
"""Pairs/s of the fastest way, all weights or LoRA."""
PUBLISHED = {"sd15": 2.96, "sdxl": 0.237}
"""Pairs/s and A100 of Diffusion-DPO (arXiv 2311.12908), autoencoder and text encoder in the loop."""
GROUPS = (("sd15", "full"), ("sdxl", "full"), ("sdxl", "lora"), ("sd15", "lora"))
MICRO = {"sd15": (16, 32, 64), "sdxl": (1, 2, 4, 8)}
WORTH = 1.01
"""A setting helps if it is so many times as fast; a larger micro-batch, too."""
JOB_SECONDS = 45.0
COMPILE_SECONDS = {"none": 0.0, "transformers": 60.0, "blocks": 200.0}
"""How long a job may take, and how much longer where it compiles."""
LEAST_SECONDS = {"none": 8.0, "transformers": 70.0, "blocks": 180.0}
"""A job is not begun with less time left."""

Group = tuple[str, str]
Changes = dict[str, Any]
_FULL, _LORA = ("sd15-full", "sdxl-full"), ("sdxl-lora", "sd15-lora")
TOGETHER: Changes = {}
"""Stands in a plan for all that helped so far."""
AGAIN: Changes = {"micro": 1}
"""The baseline once more: what differs is noise."""
PLAN: tuple[tuple[Sequence[str], Sequence[Changes]], ...] = (
    (_FULL, ({"norms": "half"}, {"attention": "cudnn"}, {"channels_last": True})),
    (_LORA, ({"adapter_input": "as_it_is"}, {"norms": "half"}, {"attention": "cudnn"})),
    (_FULL, ({"compile": "transformers"}, TOGETHER, AGAIN)),
    (_LORA, ({"compile": "transformers"}, TOGETHER)),
    (_LORA, ({"compile": "blocks", "norms": "half", "adapter_input": "as_it_is"},)),
    (_FULL, ({"compile": "blocks", "norms": "half"},)),
    (("sdxl-full",), ({"checkpointing": True, "micro": 2}, {"optimiser": "adafactor"}, {"accumulation": 4})),
    (("sd15-full",), ({"attention": "plain"}, {"accumulation": 4}, {"cudnn_benchmark": True})),
    (("sdxl-full",), ({"attention": "plain"}, {"cudnn_benchmark": True})),
)
"""What is tried after the micro-batches are found, in the order of importance; micro: how many times the baseline's."""
OTHER_WORK = ("accumulation", "optimiser")
"""Settings that change what is computed, not how: never part of what helped."""


# --- the process that holds the GPU ----------------------------------------------------------------------------------


class Worker:
    """A process that answers messages, one line of JSON each; a new one is started where the last is gone."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()

    def start(self) -> None:
        """Start the process unless it runs."""
        if self._process is not None:
            return
        self._answers = queue.Queue()
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        )
        self._process = process
        threading.Thread(target=_forward, args=(process, self._answers), daemon=True).start()

    def ask(self, message: Any, timeout: float) -> dict[str, Any]:
        """Return the answer; `error` says where there is none, and then the process is gone."""
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            return {"error": f"stopped after {timeout:.0f} s"}
        if answer is None:
            self.stop()
            return {"error": "the process ended; see what it said above"}
        return json.loads(answer)

    def stop(self) -> None:
        """End the process and all that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def _forward(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put(None)


def answer(device: torch.device, is_tiny: bool, seconds: float) -> None:
    """Be the process: answer jobs from standard input until it ends."""
    # Whatever else is printed must not stand between the answers.
    out, sys.stdout = sys.stdout, sys.stderr
    known = training_jobs.architectures(is_tiny)
    for line in sys.stdin:
        message = json.loads(line)
        if message is None:
            told = {"rate": training_jobs.matrix_rate(device), "machine": _machine(device)}
        else:
            job = Job(**message)
            try:
                backend = "eager" if is_tiny else "inductor"
                told = training_jobs.measure(job, known[job.architecture], device, seconds, backend)
            except Exception as error:
                # One setting may be beyond a version or a card; the others are worth having all the same.
                text = str(error).strip().splitlines() or [""]
                told = {"error": f"{type(error).__name__}: {text[0][:160]}"}
        print(json.dumps(told), file=out, flush=True)


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    import diffusers

    return (
        f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPUs"
    )


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """A group's baseline and the fastest job, with their pairs/s, and the settings that helped, with theirs."""

    baseline: Job
    rate: float
    fastest: tuple[Job, float]
    helped: list[tuple[float, Changes]] = field(default_factory=list)


class Bench:
    """Runs jobs while there is time, prints a row for each and keeps what was best."""

    def __init__(
        self, worker: Worker, out: Path | None, seconds: float, groups: Iterable[Group], is_tiny: bool
    ) -> None:
        self._worker, self._out = worker, out
        self._end = time.monotonic() + seconds
        self.matrix_rate = float("nan")
        self.groups: dict[Group, Measured] = {}
        # Counted beside the measuring: it takes a while and the GPU need not wait.
        known, self._pool = training_jobs.architectures(is_tiny), ThreadPoolExecutor(1)
        self._costs: dict[Group, Future[PairCost]] = {
            g: self._pool.submit(training_jobs.cost, known[g[0]], g[1]) for g in groups
        }
        self.missed: list[str] = []

    def cost(self, group: Group) -> PairCost:
        """Return the FLOP of a pair."""
        return self._costs[group].result()

    def _left(self) -> float:
        return self._end - time.monotonic()

    def open(self) -> bool:
        """Measure the card's matrix rate; return whether it answered."""
        told = self._worker.ask(None, min(120.0, self._left()))
        self._write(told)
        if "error" in told:
            say(f"the device does not answer: {told['error']}")
            return False
        self.matrix_rate = told["rate"]
        say(f"{told['machine']}; measured bf16 matrix rate {self.matrix_rate / 1e12:.1f} TFLOP/s")
        say(
            f"{'model':<6}{'train':<6}{'settings':<34}{'micro':>6}{'pairs/s':>9}{'/ base':>8}{'TFLOP/s':>9}{'of rate':>9}"
            f"{'GiB':>7}{'first 2':>10}"
        )
        return True

    def run(self, job: Job, label: str) -> float | None:
        """Return a job's pairs/s; None where it has none or there was no time."""
        group = (job.architecture, job.weights)
        if self._left() < LEAST_SECONDS[job.compile]:
            self.missed.append(f"{job.architecture} {job.weights} {label}, micro-batch {job.micro}")
            return None
        limit = min(JOB_SECONDS + COMPILE_SECONDS[job.compile], self._left())
        told = self._worker.ask(asdict(job), limit)
        start = f"{job.architecture:<6}{job.weights:<6}{label:<34}{job.micro:>6}"
        if "error" in told:
            say(f"{start}  {told['error']}")
            self._write({"job": asdict(job), **told})
            if told["error"] != training_jobs.OUT_OF_MEMORY:
                # Whatever state it left behind.
                self._worker.stop()
            return None
        rate = job.micro * job.accumulation / told["seconds"]
        flops = rate * self.cost(group).step
        base = self.groups[group].rate if group in self.groups else rate
        memory = "" if told["peak_gib"] is None else f"{told['peak_gib']:.1f}"
        say(
            f"{start}{rate:>9.2f}{rate / base:>8.3f}{flops / 1e12:>9.1f}{flops / self.matrix_rate:>9.1%}{memory:>7}"
            f"{told['warming']:>8.1f} s"
        )
        more = {"pairs_per_second": rate, "flops": flops, "of_rate": flops / self.matrix_rate}
        self._write({"job": asdict(job), **told, **more})
        if group in self.groups and rate > self.groups[group].fastest[1]:
            self.groups[group].fastest = (job, rate)
        return rate

    def _write(self, row: dict[str, Any]) -> None:
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """End the process."""
        self._worker.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- jobs ------------------------------------------------------------------------------------------------------

    def search(self, group: Group, sizes: Sequence[int]) -> None:
        """Find the micro-batch: ascending, until one does not fit or is not worth it."""
        best: tuple[Job, float] | None = None
        for micro in sizes:
            job = Job(*group, micro)
            rate = self.run(job, "baseline")
            if rate is None or (best is not None and rate < WORTH * best[1]):
                break
            best = (job, rate)
        if best is not None:
            self.groups[group] = Measured(*best, fastest=best)

    def attempt(self, group: Group, changes: Changes) -> None:
        """Try changes to the baseline; micro among them is how many times the baseline's."""
        found = self.groups[group]
        changes = {k: v * found.baseline.micro if k == "micro" else v for k, v in changes.items()}
        rate = self.run(replace(found.baseline, **changes), settings(changes) or "baseline again")
        if rate is not None and rate >= WORTH * found.rate and not set(changes) & set(OTHER_WORK):
            found.helped.append((rate, changes))

    def together(self, group: Group) -> None:
        """Try all that helped at once, the more helpful of two that exclude each other."""
        found = self.groups[group]
        if len(found.helped) > 1:
            changes: Changes = {}
            for _, helpful in sorted(found.helped, key=lambda h: h[0]):
                changes |= helpful
            say(f"{'':<12}together: {settings(changes)}")
            self.run(replace(found.baseline, **changes), "together")


def settings(changes: Changes) -> str:
    """Return changes to the baseline in words."""
    told = [k if isinstance(v, bool) else f"{k} {v}" for k, v in changes.items() if k != "micro"]
    return ", ".join(told).replace("_", " ")


def everything(
    bench: Bench, micro: dict[Group, Sequence[int]], plan: Sequence[tuple[Sequence[str], Sequence[Changes]]]
) -> None:
    """Find the micro-batch of the groups of `micro`, then run a plan on them."""
    for group, sizes in micro.items():
        # Adapters take less memory than all weights: smaller sizes than theirs are not worth a look.
        other = bench.groups.get((group[0], "full"))
        bench.search(group, [s for s in sizes if other is None or s >= other.baseline.micro])
    for names, attempts in plan:
        for group in [g for g in bench.groups if "-".join(g) in names]:
            for changes in attempts:
                if changes:
                    bench.attempt(group, changes)
                else:
                    bench.together(group)


def judge(bench: Bench) -> bool:
    """Print ceilings and goals; return whether the goals of all that was measured are met."""
    for group in bench.groups:
        flop = bench.cost(group).step
        say(
            f"{' '.join(group)}: {flop / 1e12:.2f} TFLOP a pair, {bench.matrix_rate / flop:.1f} pairs/s would be all of the "
            "card's matrix rate"
        )
    is_met = True
    for name in dict.fromkeys(architecture for architecture, _ in bench.groups):
        found = [m.fastest for (architecture, _), m in bench.groups.items() if architecture == name]
        (job, rate), goal = max(found, key=lambda f: f[1]), GOALS[name]
        told = settings({k: v for k, v in asdict(job).items() if v != getattr(Job(name, "", 0), k)})
        say(
            f"{'PASS' if rate >= goal else 'MISSED':<8}{name}: {rate:.2f} pairs/s, goal {goal:g} ({told}); "
            f"{rate / PUBLISHED[name]:.1f} x the published {PUBLISHED[name]:g} per A100, which has the encoders in the loop"
        )
        is_met &= rate >= goal
    return is_met


def say(message: str) -> None:
    """Print one line at once."""
    print(message, flush=True)


def describe(micro: dict[Group, Sequence[int]]) -> None:
    """Print what would be run."""
    say("no CUDA device here, so nothing is measured. On a machine with one this command runs, in bf16:")
    known = training_jobs.architectures(False)
    for (name, weights), sizes in micro.items():
        cost = training_jobs.cost(known[name], weights)
        tried = [settings(c) for names, attempts in PLAN if f"{name}-{weights}" in names for c in attempts if c]
        say(
            f"  {name} {weights}: {cost.step / 1e12:.2f} TFLOP a pair (policy {cost.forward / 1e12:.2f} + "
            f"{cost.backward / 1e12:.2f}, reference {cost.reference / 1e12:.2f}); micro-batches {list(sizes)}; then "
            f"{'; '.join(tried)}; and what helped together"
        )
    say(
        f"goals: {', '.join(f'{n} {g:g} pairs/s' for n, g in GOALS.items())}. `--device cpu --tiny` shows here that it runs"
    )


def _micro(chosen: str, is_tiny: bool) -> dict[Group, Sequence[int]]:
    """Return group -> micro-batches that are searched, from 'sd15-full,sdxl-full=4'; an empty string is all of them."""
    names = {"-".join(g): g for g in GROUPS}
    found: dict[Group, Sequence[int]] = {}
    for part in chosen.split(",") if chosen else names:
        name, _, size = part.partition("=")
        if name not in names or not (size.isdecimal() or not size):
            raise SystemExit(
                f"--only: expected some of {list(names)}, each with '=<micro-batch>' or not; found {part!r}"
            )
        found[names[name]] = (int(size),) if size else (1, 2) if is_tiny else MICRO[names[name][0]]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="models of no size, compiled without generating code; no goals"
    )
    parser.add_argument(
        "--only", default="", help=f"some of {[*map('-'.join, GROUPS)]}; sdxl-full=4: micro-batch 4, no search"
    )
    parser.add_argument("--seconds", type=float, default=1200.0, help="when to end")
    parser.add_argument("--per-job", type=float, default=2.0, help="seconds for which a job's steps are timed")
    parser.add_argument(
        "--stages", type=int, nargs=2, default=(0, len(PLAN)), help="first and last of the plan's stages"
    )
    parser.add_argument("--out", type=Path, help="file to which rows are added as JSON lines")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.worker:
        answer(device, options.tiny, options.per_job)
        return 0
    micro = _micro(options.only, options.tiny)
    if device.type == "cuda" and not torch.cuda.is_available():
        describe(micro)
        return 0
    command = [sys.executable, "-m", "benchmarks.training_gpu", "--worker", "--device", options.device]
    command += ["--per-job", str(options.per_job), *(["--tiny"] if options.tiny else [])]
    worker = Worker(command)
    worker.start()
    bench = Bench(worker, options.out, options.seconds, micro, options.tiny)
    try:
        if not bench.open():
            return 1
        first, last = options.stages
        everything(bench, micro, PLAN[first : last + 1])
        for what in bench.missed:
            say(f"no time left for: {what}")
        if lost := [" ".join(g) for g in micro if g not in bench.groups]:
            say(f"no micro-batch of {micro} was measured for {lost}")
            return 1
        if options.tiny:
            say("--tiny: shows that it runs; no goals")
            return 0
        return 0 if judge(bench) else 1
    finally:
        bench.close()


if __name__ == "__main__":
    sys.exit(main())
