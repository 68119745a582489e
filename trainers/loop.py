"""The only training loop: one recipe on one store, resumable at every checkpoint, streaming its metrics.

Order of a step: batches of all micro-batches -> forward -> statistics over all processes -> loss -> backward; clip, step;
then what follows the policy (reference, annotators, running statistics). Nothing is random but the counter-based draws of
`data`, so that the state of a run is its weights and statistics.
Belongs here: runs, steps, metrics. Does not belong here: losses, data selection, backbones.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from pipelines import schemas
from pipelines.config import Config, ConfigError
from pipelines.identity import fingerprint
from pipelines.tables import Built, Manifest, Store, StoreError
from trainers import data, trajectories, versions
from trainers.backbones import exports, speed
from trainers.backbones.adapters import trained_parameters
from trainers.caches import Backbone
from trainers.checkpoints import CheckpointFile
from trainers.ema_annotators import EmaAnnotators
from trainers.forward import PairForward
from trainers.losses import PairBatch
from trainers.objectives import Bound
from trainers.precision import DTYPES, resolve_precision
from trainers.recipes import Forward, Inversion, Recipe
from trainers.recorder import Recorder, Report, saved_pairs
from trainers.references import Reference
from trainers.schedules import learning_rate, optimizer
from trainers.validation import METRICS, Validation, is_better

CODE_VERSION = versions.TRAINING
Progress = Callable[[str], None]
NAMED_PAIRS = 5
"""Pairs that an error names."""
SKIPPED_STEPS = 20
"""Steps in a row that float16 may leave out; its scale has fallen a millionfold by then."""


class NotTrained(StoreError):
    """A trained model is needed that is not there; the message says what to run."""


class TrainingStopped(FloatingPointError):
    """The loss or the gradient is not a number or too large; the message names the step and the pairs."""


@dataclass(frozen=True)
class Trained:
    """A finished run: its metrics' commit, the exported model's folder, and whether it lay there already."""

    metrics: Built
    model: Path


def require_family(recipe: Recipe, config: Config) -> None:
    """Check that a recipe is meant for the configured backbone.

    Raises:
        ConfigError: it is meant for another family.
    """
    if recipe.family != config.backbone.family:
        raise ConfigError(
            f"recipe {recipe.name!r} is for backbones of family {recipe.family!r}; training.backbone "
            f"{config.backbone.name!r} is {config.backbone.family!r}: choose another recipe or backbone"
        )


class Run:
    """One recipe on one store: its identity, folder and files."""

    def __init__(
        self, store: Store, config: Config, recipe: Recipe, backbone: Backbone, start: Trained | None = None
    ) -> None:
        """Compute what the run would be made from.

        Args:
            start: the finished run of `recipe.start`.

        Raises:
            StoreError: a table that it reads is missing.
            ConfigError: the recipe is meant for another family of backbones.
        """
        self.store, self.config, self.recipe, self.backbone, self.start = store, config, recipe, backbone, start
        require_family(recipe, config)
        training = config.training
        self.steps = training.steps or recipe.steps
        self.batch_size = training.batch_size or recipe.batch_size
        self.precision = resolve_precision(training.precision, backbone.device)
        self.inputs = [
            store.require_current("preferences"),
            *([store.require_current("pair_groups")] if "group" in recipe.objective.needs else []),
            store.require("prompt_embeddings", backbone.partition("all")),
            *store.manifests("latents", backbone.partition()),
        ]
        # What a statistic is taken over changes the result by more than rounding.
        self.world = int(os.environ.get("WORLD_SIZE", training.processes))
        micro, _ = micro_batches(self.batch_size, self.world, training.micro_batch)
        over = self.world * micro if recipe.objective.mixes_pairs else None
        self.mark = fingerprint(
            code_version=CODE_VERSION,
            recipe={k: v for k, v in recipe.numbers().items() if k != "summary"},
            compile=training.compile,
            trajectories=None if isinstance(recipe.noising, Forward) else trajectories.VERSIONS,
            steps=self.steps,
            batch_size=self.batch_size,
            precision=self.precision,
            statistics_over=over,
            seed=training.seed,
            export=training.export if training.export == "last" else self._choosing(),
            backbone=backbone.digest,
            start=None if start is None else start.metrics.manifest.fingerprint,
            inputs={m.table + "/" + m.partition: m.content for m in self.inputs},
        )
        # A folder per identity: another configuration never overwrites a finished model.
        self.folder = config.runs_folder / recipe.name / self.mark
        self.model_folder = self.folder / "model"
        self.best_folder = self.folder / "best"
        self.scratch = Path(config.home) / "scratch"

    def _choosing(self) -> dict[str, Any]:
        """Return what decides which validation is the best."""
        validation, evaluation = self.config.training.validation, self.config.evaluation
        drawing = evaluation.model_dump(include={"steps", "guidance"}) if "score" in validation.best_by else {}
        return {**validation.model_dump(), **drawing}

    @property
    def trajectories(self) -> str | None:
        """Return where in the table `trajectories` the run's lie: by backbone, start, mode, steps and precision."""
        rule = self.recipe.noising
        if not isinstance(rule, Inversion) or not rule.is_cached:
            return None
        start = "" if self.start is None else f"-from-{self.start.metrics.manifest.fingerprint[:8]}"
        return f"{self.backbone.partition()}{start}/{rule.mode}-{rule.steps}-{self.precision}/"

    def finished(self) -> Trained | None:
        """Return the run if its metrics are committed and its model lies there."""
        manifest = self.store.manifest("training_metrics", self.recipe.name)
        if manifest is None or manifest.fingerprint != self.mark or exports.kind(self.model_folder) is None:
            return None
        if self.config.training.log_pairs and not manifest.extra["has_pairs"]:
            return None
        return Trained(Built(manifest, True), self.model_folder)

    # --- the run's own record of its tables, from which they are committed ---------------------------------------------

    def keep(self, metrics: list[dict[str, Any]], validations: list[dict[str, Any]], extra: dict[str, Any]) -> None:
        """Write what becomes rows of tables beside the model; rows of pairs lie there already."""
        for table, rows in ((schemas.TRAINING_METRICS, metrics), (schemas.TRAINING_VALIDATIONS, validations)):
            pl.DataFrame(rows, schema=table.polars_schema).write_parquet(self.folder / f"{table.name}.parquet")
        staged = self._record.with_suffix(".writing")
        staged.write_text(json.dumps({"mark": self.mark, "extra": extra}))
        staged.replace(self._record)

    @property
    def _record(self) -> Path:
        return self.folder / "finished.json"

    def commit(self, started: float) -> Manifest:
        """Commit the tables of the finished run from its record; the metrics last, which say that it is finished."""
        name, extra = self.recipe.name, json.loads(self._record.read_text())["extra"]
        validations = pl.read_parquet(self.folder / f"{schemas.TRAINING_VALIDATIONS.name}.parquet")
        self.store.write(schemas.TRAINING_VALIDATIONS, validations, partition=name, made_from=self.mark)
        # Empty where none were recorded: rows of another run must not stand beside this one's metrics.
        files = saved_pairs(self.folder) if extra["has_pairs"] else []
        pairs = (pl.read_parquet(f) for f in files)
        self.store.write(schemas.TRAINING_PAIRS, pairs, partition=name, made_from=self.mark)
        return self.store.write(
            schemas.TRAINING_METRICS,
            pl.read_parquet(self.folder / f"{schemas.TRAINING_METRICS.name}.parquet"),
            partition=name,
            made_from=self.mark,
            inputs={f"{m.table}/{m.partition}": m.content for m in self.inputs},
            extra=extra,
            started=started,
        )

    def brought_back(self) -> Trained | None:
        """Return the run if it was finished once and another run's tables took its place since; they are its own again."""
        if not self._record.exists() or exports.kind(self.model_folder) is None:
            return None
        record = json.loads(self._record.read_text())
        if record["mark"] != self.mark or (self.config.training.log_pairs and not record["extra"]["has_pairs"]):
            return None
        return Trained(Built(self.commit(time.monotonic()), True), self.model_folder)


def print_json(row: dict[str, Any]) -> None:
    """Report a row as one line of JSON."""
    print(json.dumps(row), flush=True)


def train(run: Run, progress: Progress = print, report: Report = lambda row: None) -> Trained:
    """Train the run's recipe, or resume it, or return it if it is finished.

    With several processes every one calls this; all return the same.

    Args:
        progress: gets lines for people.
        report: gets the row of every step and validation; see `Recorder`.
    """
    if (done := run.finished() or run.brought_back()) is not None:
        progress(f"{run.recipe.name}: unchanged, nothing to train")
        return done
    return Trainer(run, progress, report).train()


class Trainer:
    """A run while it trains: models, optimiser and everything that follows the policy.

    `train` does everything; `start`, then `step` for one step after another, then `close` does the steps alone.
    """

    def __init__(self, run: Run, progress: Progress = print, report: Report = lambda row: None) -> None:
        """Load models and caches, and the checkpoint if there is one."""
        self.run, self.recipe, self.options = run, run.recipe, run.config.training
        if self.recipe.start and run.start is None:
            raise NotTrained(f"recipe {self.recipe.name!r} starts from {self.recipe.start!r}; train that one first")
        if self.options.export == "best" and not self.options.validation.every:
            raise ConfigError("training.export = 'best' needs validations; set training.validation.every above 0")
        self.started, self._closing, self._skipped = time.monotonic(), contextlib.ExitStack(), 0
        device = torch.device(run.backbone.device)
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if run.precision == "fp32" else run.precision,
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                # The first process may copy caches or export for longer than a default would wait; one that fails is
                # noticed by torchrun, which ends the others.
                InitProcessGroupKwargs(timeout=dt.timedelta(days=1)),
            ],
        )
        self.is_main = self.accelerator.is_main_process
        self.say: Progress = progress if self.is_main else lambda message: None
        self.report: Report = report if self.is_main else lambda row: None
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.micro, self.accumulation = micro_batches(run.batch_size, self.world, self.options.micro_batch)
        self.backbone = run.backbone.model
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run.folder.mkdir(parents=True, exist_ok=True)
        with self._main_first():
            self.pairs = data.PairData(
                run.store,
                data.training_pairs(run.store, self.recipe),
                run.backbone,
                run.scratch,
                self.recipe.noising,
                with_flips=self.recipe.flip,
            )
        self._make_models()
        self.checkpoint = CheckpointFile(run.folder / "checkpoint.pt")
        self._restore()

    # --- models ----------------------------------------------------------------------------------------------------

    def _start_policy(self) -> Any:
        """Return the policy as it is before the first step."""
        start = None if self.run.start is None else self.run.start.model
        policy = self.backbone.trainable(self.recipe.weights, start, self.options.seed)
        return speed.prepare(policy, DTYPES.get(self.run.precision), self.options.compile)

    def _make_models(self) -> None:
        run, recipe = self.run, self.recipe
        policy, dtype = self._start_policy(), DTYPES.get(run.precision)
        if self.options.activation_checkpointing:
            policy.enable_gradient_checkpointing()
        self.bound = Bound(recipe.objective)
        self.state = {k: v.to(self.accelerator.device) for k, v in self.bound.state().items()}
        has_reference = self.bound.needs("reference") or (
            isinstance(recipe.noising, Inversion) and recipe.noising.under == "reference"
        )
        self.reference = Reference(policy, recipe.reference, dtype) if has_reference else None
        self.annotators = EmaAnnotators(policy) if self.bound.needs("annotators") else None
        self.policy = policy
        self.optimizer = optimizer(recipe.optimiser, trained_parameters(policy).values())
        self.validation = (
            Validation(
                run.store,
                run.config,
                run.backbone,
                self.accelerator,
                getattr(recipe.objective, "beta", 1.0),
                self.say,
                self.pairs,
            )
            if self.options.validation.every
            else None
        )
        if self.options.validation.best_by not in METRICS:
            raise ConfigError(
                f"training.validation.best_by: expected one of {list(METRICS)}, found {self.options.validation.best_by!r}"
            )

    def _prepare(self) -> None:
        speed.compile_parts(self.policy, self.options.compile)
        if self.reference is not None:
            self.reference.compile(self.options.compile)
        self.model, self.optimizer = self.accelerator.prepare(self.policy, self.optimizer)
        self.forward = PairForward(
            self.backbone,
            self.recipe,
            self.bound,
            self.model,
            self.reference,
            self.annotators,
            self.accelerator.autocast,
        )
        if self._scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._scaler)

    @contextlib.contextmanager
    def _main_first(self) -> Iterator[None]:
        """Let the first process make what all of them read."""
        if not self.is_main:
            self.accelerator.wait_for_everyone()
        yield
        if self.is_main:
            self.accelerator.wait_for_everyone()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        # Rows per pair first: the checkpoint promises that they are there.
        self.recorder.save_pairs(len(self.metrics))
        scaler = self.accelerator.scaler
        self.checkpoint.save(
            {
                "policy": {n: p.detach() for n, p in trained_parameters(self.policy).items()},
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "reference": None if self.reference is None else self.reference.state_dict(),
                "annotators": None if self.annotators is None else self.annotators.state_dict(),
                "state": self.state,
                "metrics": self.metrics,
                "validations": self.validations,
                "best": self.best,
                "has_pairs": self.options.log_pairs,
                "validation_start": None if self.validation is None else self.validation.start_state(),
            }
        )

    def _restore(self) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._scaler: dict[str, Any] | None = None
        state = self.checkpoint.load()
        if state is None:
            return
        if self.options.log_pairs and not state["has_pairs"]:
            raise StoreError(
                f"{self.checkpoint.path}: the first {len(state['metrics'])} steps were trained without training.log_pairs, "
                "so their pairs are not recorded; remove the file to train from the start, or turn the option off"
            )
        with torch.no_grad():
            for name, parameter in trained_parameters(self.policy).items():
                parameter.copy_(state["policy"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        if self.annotators is not None:
            self.annotators.load_state_dict(state["annotators"])
        self.state = {k: v.to(self.accelerator.device) for k, v in state["state"].items()}
        self._scaler, self.best = state["scaler"], state["best"]
        self.metrics, self.validations = state["metrics"], state["validations"]
        if self.validation is not None:
            self.validation.restore(state["validation_start"])

    # --- the run ---------------------------------------------------------------------------------------------------

    def train(self) -> Trained:
        """Train to the end; return what was committed."""
        with contextlib.closing(self):
            first = self.start()
            if self.validation is not None:
                if self.validation.needs_start:
                    model = self._whole_policy() if first == 0 else self._start_policy()
                    self.validation.prepare(model, self.accelerator.autocast)
                if first == 0:
                    self._validate(0)
            for step in range(first, self.run.steps):
                self.step(step)
                done = step + 1
                if self.validation is not None and (
                    done % self.options.validation.every == 0 or done == self.run.steps
                ):
                    self._validate(done)
                if self.is_main and done % self.options.checkpoint_every == 0 and done < self.run.steps:
                    self._save()
            return self._finish()

    def start(self) -> int:
        """Make what the steps need; return the number of steps that are done already."""
        run, first = self.run, len(self.metrics)
        self.make_trajectories(first)
        self.say(
            f"{self.recipe.name}: {len(self.pairs)} pairs, steps {first + 1} to {run.steps} of {run.batch_size} pairs "
            f"({self.world} x {self.accumulation} x {self.micro}) in {run.precision} on {self.backbone.device}"
            + (f", resumed after step {first}" if first else "")
        )
        self._prepare()
        if self.is_main:
            self.recorder = Recorder(run.folder, self.recipe.name, run.steps, first, self.report)
            self._closing.callback(self.recorder.close)
        self._ready = self._closing.enter_context(_ahead(self._batches(first)))
        return first

    def step(self, step: int) -> dict[str, Any]:
        """Take the optimiser step with that index, the one after the last; return its row of `training_metrics`."""
        row = self._step(step, self._ready)
        self.metrics.append(row)
        if self.is_main:
            self.recorder.step(row)
        return row

    def close(self) -> None:
        """Close the record, end the preparation of batches, let go of the policy."""
        self._closing.close()
        self.backbone.release()

    def _whole_policy(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def make_trajectories(self, first: int = 0) -> None:
        """Make the trajectories that the steps from `first` on read, where the recipe's noising caches them."""
        rule, where = self.recipe.noising, self.run.trajectories
        if not isinstance(rule, Inversion) or where is None:
            return
        run, backbone = self.run, self.backbone
        assert self.reference is not None
        wanted = data.wanted_trajectories(
            self.pairs.pairs,
            range(first, run.steps),
            run.batch_size,
            self.options.seed,
            self.recipe,
            backbone.timesteps,
        )

        def predict(x: torch.Tensor, labels: torch.Tensor, conditioning: Any) -> torch.Tensor:
            with torch.no_grad(), self.accelerator.autocast():
                return backbone.predict(self.reference, x, labels, conditioning).float()

        # Trajectories belong to the model at the start; a reference that has moved since must not make any.
        if (
            self.recipe.reference.kind != "frozen"
            and first > 0
            and trajectories.missing(run.store, where, wanted).height
        ):
            raise StoreError(f"{where}: trajectories of the run's start are gone; remove {run.folder} to train anew")
        trajectories.ensure(
            run.store,
            wanted,
            where=where,
            inversion=rule,
            x0=self.pairs.start_latents,
            conditioning=self.pairs.conditioning,
            predict=predict,
            alphas_cumprod=backbone.alphas_cumprod,
            predicts_velocity=backbone.predicts_velocity,
            batch_size=2 * self.micro,
            rank=self.rank,
            world=self.world,
            progress=self.say,
        )
        self.accelerator.wait_for_everyone()
        with self._main_first():
            self.pairs.open_trajectories(where)

    def _batches(self, first: int) -> Iterator[data.Batch]:
        """Yield this process's micro-batches of all steps from `first` on."""
        ids = self.pairs.pairs["pair_id"].to_list()
        for step in range(first, self.run.steps):
            for micro in range(self.accumulation):
                rows = self._rows(step, micro)
                drawn = data.draws(
                    self.options.seed,
                    [ids[r] for r, _ in rows],
                    [e for _, e in rows],
                    self.recipe,
                    self.backbone.timesteps,
                )
                batch = self.pairs.batch([r for r, _ in rows], drawn)
                yield batch.pinned() if self.accelerator.device.type == "cuda" else batch

    def _rows(self, step: int, micro: int, rank: int | None = None) -> list[tuple[int, int]]:
        """Return (row, epoch) of a process's micro-batch."""
        rows = data.batch_rows(step, self.run.batch_size, len(self.pairs), self.options.seed)
        start = (micro * self.world + (self.rank if rank is None else rank)) * self.micro
        return rows[start : start + self.micro]

    def _step(self, step: int, batches: Iterator[data.Batch]) -> dict[str, Any]:
        """Take one optimiser step; return its row of `training_metrics`."""
        started, rule = time.monotonic(), self.recipe.optimiser
        rate = learning_rate(rule, step, self.run.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        observed: list[torch.Tensor] = []
        sums: dict[str, torch.Tensor] = {}
        for micro in range(self.accumulation):
            batch = next(batches).to(self.accelerator.device)
            is_last = micro == self.accumulation - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                pairs = self.forward(batch)
                added = {k: self.accelerator.reduce(v, "sum") for k, v in self.bound.sums(pairs, self.state).items()}
                statistics = {**self.state, **added}
                values = self.bound.loss(pairs, statistics)
                self.accelerator.backward(values.mean() / self.accumulation)
            sums = {k: sums[k] + v if k in sums else v for k, v in added.items()}
            observed.append(self._observed(values, pairs, statistics, batch))
        table = self._gathered(observed)
        self._refuse_bad_losses(step, table[0])
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), rule.max_gradient_norm)
        norm = float(norm)
        # Float16 overflows now and then: the scaler leaves the step out and lowers its scale.
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if self._skipped > (0 if self.accelerator.scaler is None else SKIPPED_STEPS):
            self._refuse(step, f"the gradient's norm is {norm}, {self._skipped} steps in a row", table[0])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        policy = self._whole_policy()
        if self.reference is not None:
            self.reference.after_step(step + 1, policy)
        if self.annotators is not None:
            self.annotators.after_step(step + 1, policy)
        self.state = self.bound.update(self.state, sums)
        row = self._row(step, table, norm, rate, time.monotonic() - started)
        if self.is_main and self.options.log_pairs:
            self._log_pairs(step, table)
        return row

    def _observed(self, values: torch.Tensor, pairs: PairBatch, statistics: Any, batch: data.Batch) -> torch.Tensor:
        """Return what is told of a micro-batch's pairs, [len(_OBSERVED), B]; NaN where the objective has no such thing."""
        nothing = torch.full_like(values, float("nan"))
        told = {"loss": values.detach().float(), "timestep": batch.timesteps.float()}
        if pairs.reference is not None:
            change = (pairs.policy_error - pairs.reference_error).detach()
            told |= {
                "margin": pairs.margin.detach(),
                "winner_change": change[0],
                "loser_change": change[1],
                "drift": (pairs.policy.detach().float() - pairs.reference.float()).pow(2).mean((0, 2, 3, 4)),
            }
        told |= self.bound.details(pairs, statistics)
        return torch.stack([told.get(k, nothing).float() for k in _OBSERVED])

    def _gathered(self, observed: list[torch.Tensor]) -> torch.Tensor:
        """Return what all processes observed, float64 [len(_OBSERVED), pairs], in the order of the step's rows."""
        mine = torch.stack(observed)
        everyone = self.accelerator.gather(mine[None]) if self.world > 1 else mine[None]
        # [world, accumulation, columns, micro] -> [columns, accumulation, world, micro]
        return everyone.permute(2, 1, 0, 3).reshape(len(_OBSERVED), -1).double().cpu()

    def _row(self, step: int, table: torch.Tensor, norm: float, rate: float, seconds: float) -> dict[str, Any]:
        means = dict(zip(_OBSERVED, table.mean(1).tolist(), strict=True))
        margin = table[_OBSERVED.index("margin")]
        has_margin = not bool(margin.isnan().any())
        compared = ("margin", "winner_change", "loser_change", "drift")
        return {
            "step": step + 1,
            "loss": means["loss"],
            "implicit_accuracy": float(agreement(margin).mean()) if has_margin else None,
            **{k: means[k] if has_margin else None for k in compared},
            "gradient_norm": norm if math.isfinite(norm) else None,
            "learning_rate": rate,
            "pairs_per_second": round(self.run.batch_size / seconds, 2),
            "peak_memory_mib": round(_peak_memory(self.accelerator.device), 1),
        }

    def _log_pairs(self, step: int, table: torch.Tensor) -> None:
        rows = data.batch_rows(step, self.run.batch_size, len(self.pairs), self.options.seed)
        ids = self.pairs.pairs["pair_id"]
        columns = {k: table[i].tolist() for i, k in enumerate(_OBSERVED)}
        told = ("loss", "margin", "confidence", "stability", "metric", "weight")
        self.recorder.pairs(
            [
                {
                    "step": step + 1,
                    "pair_id": ids[row],
                    "epoch": epoch,
                    "timestep": int(columns["timestep"][i]),
                    **{k: None if columns[k][i] != columns[k][i] else columns[k][i] for k in told},
                }
                for i, (row, epoch) in enumerate(rows)
            ]
        )

    # --- what must not go on ---------------------------------------------------------------------------------------

    def _refuse_bad_losses(self, step: int, values: torch.Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            self._refuse(step, "the loss is not a number", values)
        if (mean := float(values.mean())) > self.options.loss_limit:
            self._refuse(
                step, f"the loss is {mean:.4g}, above training.loss_limit = {self.options.loss_limit:g}", values
            )

    def _refuse(self, step: int, what: str, values: torch.Tensor) -> None:
        """Stop; all processes see the same numbers and so all of them stop."""
        rows = data.batch_rows(step, self.run.batch_size, len(self.pairs), self.options.seed)
        worst = torch.nan_to_num(values, nan=float("inf")).argsort(descending=True)[:NAMED_PAIRS].tolist()
        ids = self.pairs.pairs["pair_id"]
        named = ", ".join(f"{ids[rows[i][0]]} (loss {values[i]:.4g})" for i in worst)
        saved = (
            "no checkpoint" if not self.checkpoint.path.exists() else f"the last checkpoint is {self.checkpoint.path}"
        )
        raise TrainingStopped(
            f"{self.recipe.name}, step {step + 1}: {what}; largest losses: {named}. Lower the learning rate or beta, or look "
            f"at these pairs (`python -m pipelines sql`); {saved}"
        )

    # --- validation and the end ------------------------------------------------------------------------------------

    def _validate(self, step: int) -> None:
        assert self.validation is not None
        values, picture = self.validation.measure(self._whole_policy(), self.accelerator.autocast)
        if not self.is_main:
            return
        self.validations += [{"step": step, "metric": k, "value": v, "count": n} for k, (v, n) in values.items()]
        self.recorder.validation(step, values, picture)
        if picture:
            folder = self.run.folder / "samples"
            folder.mkdir(exist_ok=True)
            (folder / f"{step:09d}.png").write_bytes(picture)
        told = ", ".join(f"{k} {v:.4f}" for k, (v, _) in values.items())
        self.say(f"{self.recipe.name}: validation after step {step}: {told}")
        metric = self.options.validation.best_by
        if metric not in values and self.options.export == "best":
            raise ConfigError(
                f"training.export = 'best' by training.validation.best_by = {metric!r}, which this store does not give; "
                f"found {sorted(values)}"
            )
        best = None if self.best is None else float(self.best["value"])
        if metric in values and step and is_better(metric, values[metric][0], best):
            self.best = {"metric": metric, "value": values[metric][0], "step": step}
            self.backbone.export(self._whole_policy(), self.run.best_folder)
            (self.run.folder / "best.json").write_text(json.dumps(self.best))

    def _finish(self) -> Trained:
        run = self.run
        if self.is_main:
            if self.options.export == "best":
                staged = run.model_folder.with_name("model.writing")
                shutil.rmtree(staged, ignore_errors=True)
                shutil.copytree(run.best_folder, staged)
                shutil.rmtree(run.model_folder, ignore_errors=True)
                staged.rename(run.model_folder)
            else:
                self.backbone.export(self._whole_policy(), run.model_folder)
            self.recorder.save_pairs(run.steps)
            extra = {
                "model": str(run.model_folder),
                "recipe": self.recipe.numbers(),
                "pairs": len(self.pairs),
                "seed": self.options.seed,
                "device": str(self.backbone.device),
                "precision": run.precision,
                "processes": self.world,
                "micro_batch": self.micro,
                "best": self.best,
                "has_pairs": self.options.log_pairs,
            }
            run.keep(self.metrics, self.validations, extra)
            manifest = run.commit(self.started)
            self.checkpoint.remove()
        self.accelerator.wait_for_everyone()
        if not self.is_main:
            manifest = run.store.require("training_metrics", self.recipe.name)
        return Trained(Built(manifest, False), run.model_folder)


_OBSERVED = (
    "loss",
    "timestep",
    "margin",
    "winner_change",
    "loser_change",
    "drift",
    "confidence",
    "stability",
    "metric",
    "weight",
)


def micro_batches(batch_size: int, world: int, micro_batch: int | None) -> tuple[int, int]:
    """Return (pairs per forward of a process, forwards per step).

    Raises:
        ConfigError: the step's pairs cannot be shared out evenly.
    """
    share, rest = divmod(batch_size, world)
    if rest:
        raise ConfigError(
            f"training.batch_size = {batch_size} pairs per step cannot be shared by {world} processes evenly; use a multiple"
        )
    micro = min(micro_batch or share, share)
    if share % micro:
        raise ConfigError(
            f"training.micro_batch = {micro} does not divide the {share} pairs of a process and step; use a divisor"
        )
    return micro, share // micro


def agreement(margin: torch.Tensor) -> torch.Tensor:
    """Return 1 where s > 0, 0.5 where s = 0, else 0."""
    return (margin > 0).double() + 0.5 * (margin == 0).double()


@contextlib.contextmanager
def _ahead(batches: Iterator[data.Batch]) -> Iterator[Iterator[data.Batch]]:
    """Give an iterator whose next batch is made while the last one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        end = object()
        following = pool.submit(next, batches, end)

        def each() -> Iterator[data.Batch]:
            nonlocal following
            while (batch := following.result()) is not end:
                following = pool.submit(next, batches, end)
                yield batch  # type: ignore[misc]

        yield each()


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts kibibytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
