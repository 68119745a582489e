"""The only training loop: one recipe on one store, resumable at every checkpoint, streaming its metrics.

Belongs here: steps, checkpoints, metrics. Does not belong here: losses, data selection, backbones.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator

from pipelines import schemas
from pipelines.config import Config
from pipelines.identity import fingerprint
from pipelines.tables import Built, Store, StoreError
from trainers import data, losses, noising, randomness
from trainers.caches import Backbone
from trainers.recipes import Objective, Recipe
from trainers.references import Reference

CODE_VERSION = "1"
Progress = Callable[[str], None]


class NotTrained(StoreError):
    """A trained model is needed that is not there; the message says what to run."""


@dataclass(frozen=True)
class Trained:
    """A finished run: its metrics' commit, the exported model's folder, and whether it lay there already."""

    metrics: Built
    model: Path


def objective(rule: Objective, batch: losses.PairBatch) -> torch.Tensor:
    """Return the objective's loss per pair, [B]."""
    match rule.name:
        case "diffusion_dpo":
            return losses.diffusion_dpo(batch, beta=rule.beta)


class Run:
    """One recipe on one store: its identity, folder and files."""

    def __init__(self, store: Store, config: Config, recipe: Recipe, backbone: Backbone) -> None:
        self.store, self.config, self.recipe, self.backbone = store, config, recipe, backbone
        self.steps = config.training.steps or recipe.steps
        self.inputs = [
            store.require("preferences"),
            store.require("prompt_embeddings", backbone.partition("all")),
            *store.manifests("latents", backbone.partition()),
        ]
        self.mark = fingerprint(
            code_version=CODE_VERSION,
            recipe=recipe.numbers(),
            steps=self.steps,
            seed=config.training.seed,
            backbone=backbone.digest,
            inputs={m.table + "/" + m.partition: m.content for m in self.inputs},
        )
        # A folder per identity: another configuration never overwrites a finished model.
        self.folder = config.runs_folder / recipe.name / self.mark
        self.model_folder = self.folder / "model"

    def finished(self) -> Trained | None:
        """Return the run if its metrics are committed and its model lies there."""
        manifest = self.store.manifest("training_metrics", self.recipe.name)
        if manifest is None or manifest.fingerprint != self.mark or not (self.model_folder / "unet").exists():
            return None
        return Trained(Built(manifest, True), self.model_folder)


def train(run: Run, progress: Progress = print) -> Trained:
    """Train the run's recipe, or resume it, or return it if it is finished.

    Progress lines that start with '{' are JSON metrics of a step.
    """
    if (done := run.finished()) is not None:
        progress(f"{run.recipe.name}: unchanged, nothing to train")
        return done
    started = time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)
    recipe, backbone = run.recipe, run.backbone.model
    accelerator = Accelerator(cpu=backbone.device.type == "cpu")
    if accelerator.num_processes > 1:
        raise NotImplementedError(f"training in one process only so far, found {accelerator.num_processes}; start one")
    pairs = data.PairData(
        run.store, data.select_pairs(run.store, recipe.policy, ["train"]), run.backbone, backbone.latent_scale
    )
    policy = backbone.load_unet(backbone.folder).train().requires_grad_(True)
    reference = Reference(policy, recipe.reference)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=recipe.optimiser.learning_rate, weight_decay=recipe.optimiser.weight_decay
    )
    checkpoint = _Checkpoint(run.folder / "checkpoint.pt")
    metrics = checkpoint.restore(policy, optimizer, reference)
    first = len(metrics)
    progress(
        f"{recipe.name}: {len(pairs)} pairs, steps {first + 1} to {run.steps} of {recipe.batch_size} pairs on "
        f"{backbone.device}" + (f", resumed after step {first}" if first else "")
    )
    model, optimizer = accelerator.prepare(policy, optimizer)
    for step in range(first, run.steps):
        row = _step(run, accelerator, model, reference, optimizer, pairs, step)
        metrics.append(row)
        progress(json.dumps({"recipe": recipe.name, "of": run.steps, **row}))
        if (step + 1) % run.config.training.checkpoint_every == 0 and step + 1 < run.steps:
            checkpoint.save(accelerator.unwrap_model(model), optimizer, reference, metrics)
    backbone.export(accelerator.unwrap_model(model).eval(), run.model_folder)
    manifest = run.store.write(
        schemas.TRAINING_METRICS,
        pl.DataFrame(metrics, schema=schemas.TRAINING_METRICS.polars_schema),
        partition=recipe.name,
        made_from=run.mark,
        inputs={f"{m.table}/{m.partition}": m.content for m in run.inputs},
        extra={
            "model": str(run.model_folder),
            "recipe": recipe.numbers(),
            "pairs": len(pairs),
            "seed": run.config.training.seed,
            "device": str(backbone.device),
        },
        started=started,
    )
    checkpoint.remove()
    return Trained(Built(manifest, False), run.model_folder)


def _step(
    run: Run,
    accelerator: Accelerator,
    model: torch.nn.Module,
    reference: Reference,
    optimizer: Any,
    pairs: data.PairData,
    step: int,
) -> dict[str, float]:
    """Take one optimiser step; return its row of `training_metrics`."""
    started = time.monotonic()
    recipe, backbone, seed = run.recipe, run.backbone.model, run.config.training.seed
    drawn = data.batch_rows(step, recipe.batch_size, len(pairs), seed)
    ids = pairs.pairs["pair_id"]
    keys = [(seed, ids[row], epoch) for row, epoch in drawn]
    dropped = randomness.uniform([(*k, "dropout") for k in keys]) < recipe.prompt_dropout
    batch = pairs.batch([row for row, _ in drawn], keys, dropped.tolist())
    device = accelerator.device
    noise = randomness.normal(pairs.latent_shape, [(*k, "noise") for k in keys]).to(device)
    timesteps = randomness.integers(backbone.timesteps, [(*k, "timestep") for k in keys]).to(device)
    pair_batch = predict_pairs(backbone, model, reference.model, batch, noise, timesteps, device)
    loss = objective(recipe.objective, pair_batch).mean()
    for group in optimizer.param_groups:
        group["lr"] = recipe.optimiser.learning_rate * min(1.0, (step + 1) / max(1, recipe.optimiser.warmup_steps))
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optimiser.max_gradient_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"{recipe.name}, step {step + 1}: the gradient's norm is {norm}; lower the learning rate or beta"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    reference.after_step(step + 1, accelerator.unwrap_model(model))
    margin = pair_batch.margin.detach()
    return {
        "step": step + 1,
        "loss": float(loss.detach()),
        "implicit_accuracy": float(agreement(margin).mean()),
        "margin": float(margin.mean()),
        "gradient_norm": float(norm),
        "pairs_per_second": round(recipe.batch_size / (time.monotonic() - started), 2),
    }


def predict_pairs(
    backbone: Any,
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    batch: data.Batch,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    device: torch.device,
) -> losses.PairBatch:
    """Noise a batch and predict with both models, the reference without gradient.

    noise: [B, C, H, W]; timesteps: [B]; both on `device`.
    """
    noisy, target = noising.noised(
        batch.latents.to(device),
        noise,
        timesteps,
        backbone.alphas_cumprod,
        predicts_velocity=backbone.predicts_velocity,
    )
    flat = noisy.flatten(0, 1)
    steps = timesteps.repeat(2)
    embeddings = batch.embeddings.to(device).repeat(2, 1, 1)
    policy_out = backbone.predict(policy, flat, steps, embeddings).view_as(noisy)
    with torch.no_grad():
        reference_out = backbone.predict(reference, flat, steps, embeddings).view_as(noisy)
    return losses.PairBatch(target.contiguous(), policy_out, reference_out)


def agreement(margin: torch.Tensor) -> torch.Tensor:
    """Return 1 where s > 0, 0.5 where s = 0, else 0."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


class _Checkpoint:
    """One file that is complete or absent: policy, optimiser, reference, metrics so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(
        self, policy: torch.nn.Module, optimizer: Any, reference: Reference, metrics: list[dict[str, float]]
    ) -> None:
        staged = self.path.with_suffix(".writing")
        state = {
            "policy": policy.state_dict(),
            "optimizer": optimizer.state_dict(),
            "reference": reference.state_dict(),
            "metrics": metrics,
        }
        with staged.open("wb") as handle:
            torch.save(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(staged, self.path)

    def restore(self, policy: torch.nn.Module, optimizer: Any, reference: Reference) -> list[dict[str, float]]:
        if not self.path.exists():
            return []
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        reference.load_state_dict(state["reference"])
        return state["metrics"]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".writing").unlink(missing_ok=True)
