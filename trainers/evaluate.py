"""Judging models: scores of their samples, held-out implicit accuracy, and the leaderboard with intervals.

    gain       mean over samples of score(model) - score(base), same prompt and noise
    win rate   share of samples with score(model) > score(base), ties half

95 % intervals: percentile bootstrap over prompts (samples of one prompt are not independent).
Belongs here: comparing models. Does not belong here: making pictures (`sampling`), showing results (`report`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipelines import images, schemas
from pipelines.config import Config
from pipelines.curation import HumanPolicy
from pipelines.scoring import checkpoints
from pipelines.scoring import scorer as scoring
from pipelines.scoring.pictures import Picture
from pipelines.tables import Built, Manifest, Store
from trainers import data, validation, versions
from trainers.caches import Backbone
from trainers.precision import autocast, resolve_precision
from trainers.sampling import BASE

CODE_VERSION = versions.EVALUATION
HELD_OUT_PAIRS = 500
HELD_OUT_DRAWS = 6
HELD_OUT = "held-out pairs"
Progress = Callable[[str], None]


def evaluate(store: Store, config: Config, model: str, device: str, progress: Progress = lambda m: None) -> Built:
    """Score a model's samples with every reward model (in the small world also with its tastes) into `evaluations`.

    Imported scores are of other images: scorers that are imported judge no samples.
    """
    samples = store.require("samples", model)

    def make() -> pl.DataFrame:
        frame = store.read(schemas.SAMPLES, model)
        pictures = [images.decode_rgb(b) for b in frame["bytes"]]
        prompts = frame["prompt"].to_list()
        columns: dict[str, np.ndarray] = {}
        for scorer in config.scorers:
            if scorer.kind == "imported":
                progress(
                    f"evaluation of {model}: {scorer.name} is left out: its scores are imported, samples have none"
                )
                continue
            loaded = scoring.load(scorer, device)
            scores = []
            for start in range(0, len(pictures), scorer.batch_size):
                part = slice(start, start + scorer.batch_size)
                scores.append(loaded.score([loaded.prepare(Picture(p)) for p in pictures[part]], prompts[part]))
            columns[scorer.name] = np.concatenate(scores)
            for message in loaded.messages:
                progress(message)
            progress(f"evaluation of {model}: {scorer.name}")
        # Tastes know the small world's grammar only.
        if config.world is not None and config.suite() is None:
            from pipelines.world import judges

            columns |= judges.judge(np.stack([np.asarray(p) for p in pictures]), prompts)
        judged = [
            frame.select("prompt_id", "seed", scorer=pl.lit(name), score=pl.Series(values, dtype=pl.Float64))
            for name, values in columns.items()
        ]
        return pl.concat([schemas.EVALUATIONS.empty(), *judged])

    return store.build(
        schemas.EVALUATIONS,
        make,
        inputs=[samples],
        code_version=CODE_VERSION,
        parameters=evaluation_parameters(config),
        partition=model,
    )


def evaluation_parameters(config: Config) -> dict[str, Any]:
    """Return what the scores of samples depend on beside the samples.

    Raises:
        hub.CheckpointError: a scorer's files are missing.
    """
    return {
        "scorers": {s.name: checkpoints.revision(s) for s in config.scorers if s.kind != "imported"},
        "world": None if config.world is None else _world_facts(),
    }


PROMISED_GAIN_SD, PROMISED_FIDELITY_LOSS = 0.2, 0.05


def promises(board: pl.DataFrame) -> list[tuple[str, bool]]:
    """Return what Diffusion-DPO must do on the small world as shipped, each with whether the leaderboard shows it."""
    rows = {r["scorer"]: r for r in board.filter(pl.col("model") == "diffusion_dpo").iter_rows(named=True)}
    taste, fidelity, pairs = rows["taste:majority"], rows["fidelity"], rows[HELD_OUT]
    return [
        (
            f"gains >= {PROMISED_GAIN_SD} sd of true majority utility, interval above 0",
            taste["gain_sd"] >= PROMISED_GAIN_SD and taste["gain_sd_low"] > 0,
        ),
        (
            f"prompt fidelity falls by at most {100 * PROMISED_FIDELITY_LOSS:.0f} points",
            fidelity["gain"] >= -PROMISED_FIDELITY_LOSS,
        ),
        ("held-out implicit accuracy above 50 %, with its interval", pairs["win_rate_low"] > 0.5),
    ]


def _world_facts() -> dict[str, Any]:
    from pipelines.world import people, raw

    return {"code_version": raw.CODE_VERSION, **people.facts()}


def held_out(
    store: Store,
    config: Config,
    backbone: Backbone,
    recipe: str,
    model_folder: Path,
    trained: Manifest,
    progress: Progress = lambda m: None,
) -> Built:
    """Measure a tuned model's implicit accuracy on pairs of held-out prompts into `held_out`.

    For the first HELD_OUT_PAIRS decided human pairs of validation and test prompts (by id) the margin s against the
    base model is drawn at HELD_OUT_DRAWS stratified timesteps; a draw is right where s > 0.
    """
    precision = resolve_precision(config.training.precision, backbone.device)
    computing = functools.partial(autocast, precision, backbone.device)
    inputs = held_out_inputs(store, backbone, trained)

    def make() -> pl.DataFrame:
        loaded = backbone.model
        pairs = data.select_pairs(store, HumanPolicy(), ["validation", "test"]).head(HELD_OUT_PAIRS)
        source = data.PairData(store, pairs, backbone, Path(config.home) / "scratch")
        policy, base = loaded.load_unet(model_folder), loaded.unet
        margins: list[np.ndarray] = []
        batch = validation.pairs_at_once(loaded)
        for start in range(0, len(pairs), batch):
            rows = list(range(start, min(start + batch, len(pairs))))
            ids = pairs["pair_id"][rows].to_list()
            drawn = []
            for draw in range(HELD_OUT_DRAWS):
                fixed = validation.fixed_draws("held_out", ids, draw, HELD_OUT_DRAWS, loaded.timesteps)
                before, after = (
                    validation.pair_errors(loaded, m, source, rows, fixed, computing) for m in (base, policy)
                )
                drawn.append(((before[0] - before[1]) - (after[0] - after[1])).numpy())
            margins.append(np.stack(drawn, 1))
            progress(f"held-out pairs of {recipe}: {rows[-1] + 1}/{len(pairs)}")
        margin = np.concatenate(margins)
        return pairs.select("pair_id", "prompt_id").with_columns(
            margin=pl.Series(margin.mean(1)),
            accuracy=pl.Series(((margin > 0) + 0.5 * (margin == 0)).mean(1)),
            draws=pl.lit(HELD_OUT_DRAWS),
        )

    return store.build(
        schemas.HELD_OUT,
        make,
        inputs=inputs,
        code_version=CODE_VERSION,
        parameters=held_out_parameters(trained, precision),
        partition=recipe,
    )


def held_out_inputs(store: Store, backbone: Backbone, trained: Manifest) -> list[Manifest]:
    """Return the commits of what the accuracy on held-out pairs is made from.

    Raises:
        StoreError: there are no preferences.
    """
    return [trained, store.require("preferences"), *store.manifests("latents", backbone.partition())]


def held_out_parameters(trained: Manifest, precision: str) -> dict[str, Any]:
    """Return what the accuracy on held-out pairs depends on beside its tables. precision: resolved."""
    return {
        "pairs": HELD_OUT_PAIRS,
        "draws": HELD_OUT_DRAWS,
        "model": trained.fingerprint,
        "precision": precision,
    }


def bootstrap_by_prompt(values: np.ndarray, prompts: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """Return bootstrap means, [resamples, K], of per-row values [N, K], resampling prompts with all their rows."""
    keys, index = np.unique(prompts, return_inverse=True)
    sums = np.zeros((len(keys), values.shape[1]))
    np.add.at(sums, index, values)
    counts = np.bincount(index, minlength=len(keys)).astype(float)
    drawn = np.random.default_rng(seed).multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=resamples)
    return (drawn @ sums) / (drawn @ counts)[:, None]


def compare(base: pl.DataFrame, model: pl.DataFrame, resamples: int) -> list[dict[str, Any]]:
    """Return one row per scorer comparing a model's evaluations with the base's, paired by prompt and seed.

    Raises:
        ValueError: the two were not sampled on the same prompts and seeds.
    """
    keys = ["prompt_id", "seed", "scorer"]
    joined = base.join(model, on=keys, how="full", suffix="_model", coalesce=True)
    if joined["score"].null_count() or joined["score_model"].null_count():
        raise ValueError("base and model were sampled on different prompts or seeds; sample both again")
    rows = []
    for (scorer,), part in joined.sort(keys).group_by("scorer", maintain_order=True):
        before, after = part["score"].to_numpy(), part["score_model"].to_numpy()
        gain, win = after - before, (after > before) + 0.5 * (after == before)
        sd = float(before.std(ddof=1)) or 1.0
        means = bootstrap_by_prompt(np.stack([gain, win], 1), part["prompt_id"].to_numpy(), resamples)
        (gain_low, win_low), (gain_high, win_high) = np.quantile(means, [0.025, 0.975], axis=0)
        rows.append(
            {
                "scorer": scorer,
                "samples": len(part),
                "prompts": part["prompt_id"].n_unique(),
                "base_mean": before.mean(),
                "model_mean": after.mean(),
                "gain": gain.mean(),
                "gain_low": gain_low,
                "gain_high": gain_high,
                "gain_sd": gain.mean() / sd,
                "gain_sd_low": gain_low / sd,
                "gain_sd_high": gain_high / sd,
                "win_rate": win.mean(),
                "win_rate_low": win_low,
                "win_rate_high": win_high,
            }
        )
    return rows


def leaderboard(store: Store, config: Config, recipes: list[str]) -> Built:
    """Build `leaderboard` from the evaluations of base and recipes and from their held-out pairs."""
    base = store.require_current("evaluations", BASE)
    models = [store.require_current("evaluations", r) for r in recipes]
    pairs = [store.require_current("held_out", r) for r in recipes]
    resamples = config.evaluation.bootstrap

    def make() -> pl.DataFrame:
        reference = store.read(schemas.EVALUATIONS, BASE)
        rows = []
        for name in recipes:
            rows += [{"model": name, **r} for r in compare(reference, store.read(schemas.EVALUATIONS, name), resamples)]
            frame = store.read(schemas.HELD_OUT, name)
            values = frame["accuracy"].to_numpy()
            means = bootstrap_by_prompt(values[:, None], frame["prompt_id"].to_numpy(), resamples)
            low, high = np.quantile(means, [0.025, 0.975])
            rows.append(
                {
                    "model": name,
                    "scorer": HELD_OUT,
                    "samples": len(frame),
                    "prompts": frame["prompt_id"].n_unique(),
                    "model_mean": values.mean(),
                    "win_rate": values.mean(),
                    "win_rate_low": low,
                    "win_rate_high": high,
                }
            )
        return pl.DataFrame(rows, schema=schemas.LEADERBOARD.polars_schema)

    return store.build(
        schemas.LEADERBOARD,
        make,
        inputs=[base, *models, *pairs],
        code_version=CODE_VERSION,
        parameters=leaderboard_parameters(config, recipes),
    )


def leaderboard_parameters(config: Config, recipes: list[str]) -> dict[str, Any]:
    """Return what the leaderboard depends on beside its tables."""
    return {"recipes": recipes, "bootstrap": config.evaluation.bootstrap}
