"""What is measured while a run trains: held-out pairs at fixed timesteps and noise, samples of fixed prompts.

    s = (L_start^w - L_start^l) - (L_policy^w - L_policy^l)   per pair and draw, `start` the model before the first step

Noise is Gaussian whatever the recipe trains on, and the reference is the run's start whatever the recipe's reference does:
so curves of different recipes can be laid over one another, those of losses where the recipes' beta is the same.
Belongs here: measuring a policy during its run. Does not belong here: judging finished models (`evaluate`).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from pipelines import schemas
from pipelines.config import Config, ConfigError
from pipelines.curation import HumanPolicy
from pipelines.identity import fingerprint
from pipelines.tables import Store
from trainers import data, noising, randomness, sampling
from trainers.caches import Backbone

LABELS = ("human", "consensus", "minority")
METRICS = (*(f"{m}_{label}" for label in LABELS for m in ("implicit_accuracy", "loss")), "median_score")
MINORITY_THRESHOLD = 0.5
Progress = Callable[[str], None]
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


def pairs_at_once(backbone: Any) -> int:
    """Return how many pairs are measured in one forward."""
    return max(1, backbone.pictures_at_once // 2)


def fixed_draws(purpose: str, ids: Sequence[str], draw: int, draws: int, schedule_length: int) -> data.Draws:
    """Return the `draw`-th of `draws` fixed draws of pairs: timesteps in the middle of equal parts of the schedule."""
    timestep = int((draw + 0.5) / draws * schedule_length)
    keys: list[Any] = [(purpose, i, draw) for i in ids]
    return data.Draws(keys, [timestep] * len(ids), [False] * len(ids), [False] * len(ids))


@torch.no_grad()
def pair_errors(
    backbone: Any,
    unet: Callable[..., Any],
    source: data.PairData,
    rows: Sequence[int],
    drawn: data.Draws,
    autocast: Autocast = contextlib.nullcontext,
) -> torch.Tensor:
    """Return L of a model on pairs of `source` at fixed draws, [2, B], winners first."""
    batch = source.batch(rows, drawn).to(backbone.device)
    assert batch.noise is not None
    noisy, target = noising.noised(
        batch.latents,
        batch.noise,
        batch.timesteps,
        backbone.alphas_cumprod,
        predicts_velocity=backbone.predicts_velocity,
    )
    with autocast():
        out = backbone.predict(unet, noisy.flatten(0, 1), batch.timesteps.repeat(2), batch.conditioning.twice())
    return (target - out.view_as(noisy).float()).pow(2).mean((2, 3, 4)).cpu()


def held_out_pairs(store: Store, count: int) -> pl.DataFrame:
    """Return the first `count` pairs of the validation split (without one, of test) that people decided, by id.

    As `data.select_pairs` by the human policy, with `consensus`: 1 where the consensus has the humans' side, -1 where it has
    the other, null where it has none; and `is_minority`: whether the pair's minority value exceeds MINORITY_THRESHOLD.
    """
    for split in ("validation", "test"):
        pairs = data.select_pairs(store, HumanPolicy(), [split]).head(count)
        if len(pairs):
            break
    first = pl.col("winner_id") == pl.col("image_0_id")
    side = 2 * pl.col("consensus_label_0") - 1
    labels = store.scan(schemas.PREFERENCES).select(
        "pair_id", "image_0_id", "consensus_label_0", value=pl.coalesce("minority_probability", "minority_score")
    )
    return (
        pairs.lazy()
        .join(labels, on="pair_id", how="left", maintain_order="left")
        .with_columns(
            consensus=pl.when(side != 0).then(pl.when(first).then(side).otherwise(-side)),
            is_minority=(pl.col("value") > MINORITY_THRESHOLD).fill_null(False),
        )
        .select(*pairs.columns, "consensus", "is_minority")
        .collect()
    )


class Validation:
    """The fixed pairs, prompts and scorer of a run's validations."""

    def __init__(
        self,
        store: Store,
        config: Config,
        backbone: Backbone,
        accelerator: Accelerator,
        beta: float,
        progress: Progress,
        training: data.PairData,
    ) -> None:
        """Choose what is measured; the models before the first step are measured by `start`.

        Args:
            beta: of the loss that is reported, -log sigmoid(0.5 * beta * s).
            training: pairs of the run, whose open caches serve here too.
        """
        self._options, self._config, self._store = config.training.validation, config, store
        self._backbone, self._accelerator, self._beta = backbone.model, accelerator, beta
        self._progress = progress
        pairs = held_out_pairs(store, self._options.pairs)
        self._pairs = pairs
        self._source = training.other(pairs) if len(pairs) else None
        if self._source is None:
            progress("validation: no decided pair of split validation or test, none is measured")
        self._prompts = _prompts(store, self._options.prompts)
        self._scorer: Any = None
        self._chosen = next(
            (s for s in config.scorers if s.kind != "imported" and self._options.scorer in ("", s.name)),
            None,
        )
        if self._options.scorer and self._chosen is None:
            names = [s.name for s in config.scorers if s.kind != "imported"]
            raise ConfigError(f"training.validation.scorer: expected one of {names}, found {self._options.scorer!r}")
        self._start: torch.Tensor | None = None
        self._about = fingerprint(pairs=pairs["pair_id"].to_list(), draws=self._options.draws)

    def start_state(self) -> dict[str, Any] | None:
        """Return the start's errors for a checkpoint."""
        return None if self._start is None else {"about": self._about, "errors": self._start}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Take the start's errors from a checkpoint, unless they are of other pairs or draws."""
        if state is not None and state["about"] == self._about:
            self._start = state["errors"]

    @property
    def needs_start(self) -> bool:
        """Return whether the model that the run starts from has yet to be measured."""
        return self._source is not None and self._start is None

    def _errors(self, unet: Callable[..., Any], autocast: Autocast) -> torch.Tensor:
        """Return L on all pairs and draws, [2, pairs, draws]; every process measures a part."""
        assert self._source is not None
        count, draws, world = len(self._pairs), self._options.draws, self._accelerator.num_processes
        ids = self._pairs["pair_id"].to_list()
        errors = torch.zeros(2, count, draws)
        batch = pairs_at_once(self._backbone)
        for number, start in enumerate(range(0, count, batch)):
            if number % world != self._accelerator.process_index:
                continue
            rows = list(range(start, min(start + batch, count)))
            for draw in range(draws):
                drawn = fixed_draws("validation", [ids[r] for r in rows], draw, draws, self._backbone.timesteps)
                errors[:, rows, draw] = pair_errors(self._backbone, unet, self._source, rows, drawn, autocast)
        return self._accelerator.reduce(errors.to(self._accelerator.device), "sum").cpu()

    def prepare(self, unet: Callable[..., Any], autocast: Autocast) -> None:
        """Measure the model that the run starts from."""
        self._start = self._errors(unet, autocast)

    def measure(self, unet: Any, autocast: Autocast) -> tuple[dict[str, tuple[float, int]], bytes | None]:
        """Return metric -> (value, count) of METRICS, and a PNG of the samples (first process only)."""
        values: dict[str, tuple[float, int]] = {}
        if self._source is not None:
            assert self._start is not None
            errors = self._errors(unet, autocast)
            margin = (self._start[0] - self._start[1]) - (errors[0] - errors[1])
            values |= by_labels(margin, self._pairs, self._beta)
        picture = None
        if len(self._prompts):
            scores, picture = self._samples(unet, autocast)
            if scores:
                values["median_score"] = (float(np.median(scores)), len(scores))
        return values, picture

    @torch.no_grad()
    def _samples(self, unet: Any, autocast: Autocast) -> tuple[list[float], bytes | None]:
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        mine = self._prompts.rows()[rank::world]
        pictures: list[Image.Image] = []
        shape = self._backbone.latent_shape
        options = self._config.evaluation
        for start in range(0, len(mine), 8):
            part = mine[start : start + 8]
            noise = randomness.normal(shape, [("validation", key) for key, _ in part])
            with autocast():
                pictures += sampling.draw(
                    self._backbone,
                    unet,
                    [text for _, text in part],
                    noise,
                    steps=options.steps,
                    guidance=options.guidance,
                )
        found = list(zip(range(rank, len(self._prompts), world), pictures, self._scores(pictures, mine), strict=True))
        everything = sorted(gather_object(found), key=lambda row: row[0])
        if not self._accelerator.is_main_process:
            return [], None
        scores = [s for *_, s in everything if s is not None]
        return scores, grid([p for _, p, _ in everything])

    def _scores(self, pictures: list[Image.Image], rows: Sequence[Any]) -> list[float | None]:
        if self._chosen is None or not pictures:
            return [None] * len(pictures)
        from pipelines.scoring import scorer as scoring
        from pipelines.scoring.pictures import Picture

        if self._scorer is None:
            self._scorer = scoring.load(self._chosen, str(self._accelerator.device))
        prepared = [self._scorer.prepare(Picture(p)) for p in pictures]
        return [float(v) for v in self._scorer.score(prepared, [text for _, text in rows])]


def by_labels(margin: torch.Tensor, pairs: pl.DataFrame, beta: float) -> dict[str, tuple[float, int]]:
    """Return implicit accuracy and loss by the source of the label.

    margin: s with the humans' side as winner, [pairs, draws]. pairs: see `held_out_pairs`. A source that decides no pair is
    left out.
    """
    signs = {
        "human": [1.0] * len(pairs),
        "consensus": pairs["consensus"].fill_null(0.0).to_list(),
        "minority": [float(m) for m in pairs["is_minority"]],
    }
    values = {}
    for label, listed in signs.items():
        sign = torch.tensor(listed, dtype=torch.float64)
        chosen = sign.nonzero().flatten()
        if not len(chosen):
            continue
        signed = margin[chosen] * sign[chosen, None]
        agreed = (signed > 0).double() + 0.5 * (signed == 0).double()
        values[f"implicit_accuracy_{label}"] = (float(agreed.mean()), len(chosen))
        values[f"loss_{label}"] = (float(-F.logsigmoid(0.5 * beta * signed).mean()), len(chosen))
    return values


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Return whether a value of a metric is better than the best so far: losses fall, everything else rises."""
    return best is None or (value < best if metric.startswith("loss") else value > best)


def grid(pictures: list[Image.Image], columns: int = 8, side: int = 128) -> bytes:
    """Return a PNG with the pictures side by side."""
    if not pictures:
        return b""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * side, rows * side), "white")
    for i, picture in enumerate(pictures):
        resample = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
        sheet.paste(picture.resize((side, side), resample), (i % columns * side, i // columns * side))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _prompts(store: Store, count: int) -> pl.DataFrame:
    frame = store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt", "split").sort("prompt_id").collect()
    for split in ("validation", "test"):
        chosen = frame.filter(pl.col("split") == split)
        if len(chosen):
            break
    return chosen.select("prompt_id", "prompt").head(count)
