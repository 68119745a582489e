"""Pairs as tensors: what a recipe selects of `preferences`, with cached latents and embeddings, and every random draw.

Belongs here: joining tables into batches; which pair comes when, at which timestep, with which noise. Does not belong
here: losses, models.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch

from pipelines import schemas
from pipelines.curation import Policy
from pipelines.tables import Store, StoreError
from trainers import inversion, randomness, trajectories
from trainers.backbones.conditioning import Conditioning
from trainers.caches import EMPTY_PROMPT, Backbone
from trainers.recipes import Forward, Inversion, Need, Noising, Recipe
from trainers.tensors import TensorFile

UNKNOWN_GROUP = -1
FORWARD = Forward()
_COLUMNS = ("probability", "minority", "group")


def decided(store: Store, recipe: Recipe, splits: Sequence[str]) -> pl.LazyFrame:
    """Return `preferences` of the splits after the recipe's policy, with what its objective needs of a pair.

    That is `probability`, `minority` or `group`; a pair that lacks its value is excluded with that reason.
    """
    store.require("preferences")
    frame = recipe.policy.apply(store.scan(schemas.PREFERENCES).filter(pl.col("split").is_in(list(splits))))
    needs = recipe.objective.needs
    if "probability" in needs:
        frame = frame.with_columns(probability="target_probability")
    if "minority" in needs:
        column, other = recipe.minority_column, "minority_score"
        value = pl.col(column) if column == "metric" else pl.coalesce(column, other)
        frame = _without_unknown(frame.with_columns(minority=value), "minority", f"{column} is not known")
    if "group" in needs:
        store.require("pair_groups")
        groups = store.scan(schemas.PAIR_GROUPS).select("pair_id", pl.col("group").cast(pl.Int64))
        frame = frame.join(groups, on="pair_id", how="left", maintain_order="left").with_columns(
            pl.col("group").fill_null(UNKNOWN_GROUP)
        )
    return frame


def _without_unknown(frame: pl.LazyFrame, column: str, reason: str) -> pl.LazyFrame:
    unknown = pl.col(column).is_null()
    return frame.with_columns(
        target_label_0=pl.when(~unknown).then("target_label_0"),
        excluded_because=pl.when(unknown)
        .then(pl.coalesce("excluded_because", pl.lit(reason)))
        .otherwise("excluded_because"),
    )


def _sides(frame: pl.LazyFrame, *columns: str) -> pl.DataFrame:
    first = pl.col("target_label_0") == 1
    return (
        frame.filter(pl.col("target_label_0").is_not_null())
        .select(
            "pair_id",
            "prompt_id",
            pl.when(first).then("image_0_id").otherwise("image_1_id").alias("winner_id"),
            pl.when(first).then("image_1_id").otherwise("image_0_id").alias("loser_id"),
            *columns,
        )
        .sort("pair_id")
        .collect()
    )


def select_pairs(store: Store, policy: Policy, splits: Sequence[str]) -> pl.DataFrame:
    """Return pair_id, prompt_id, winner_id, loser_id of the policy's pairs in the splits, sorted by pair_id."""
    return _sides(decided(store, Recipe("", "", policy), splits))


def training_pairs(store: Store, recipe: Recipe) -> pl.DataFrame:
    """Return the pairs that a recipe trains on: as `select_pairs`, with the columns that its objective needs."""
    needs: frozenset[Need] = recipe.objective.needs
    return _sides(decided(store, recipe, ["train"]), *(c for c in _COLUMNS if c in needs))


# --- draws -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=randomness.generator(seed, "order", epoch)).tolist()


def batch_rows(step: int, batch_size: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Return (row, epoch) of the batch of an optimiser step: a pure function, so that resuming needs no state.

    Every epoch is a permutation keyed by (seed, epoch); a batch may span epochs.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    return [(_order(seed, p // count, count)[p % count], p // count) for p in places]


@dataclass(frozen=True)
class Draws:
    """What is drawn for B pairs: timestep, whether the prompt is dropped, whether both pictures are mirrored.

    Every draw is keyed by (seed, pair_id, epoch, purpose), so that neither step nor rank nor batch size changes it.
    """

    keys: list[tuple[int, str, int]]
    timesteps: list[int]
    is_dropped: list[bool]
    is_flipped: list[bool]


def draws(seed: int, ids: Sequence[str], epochs: Sequence[int], recipe: Recipe, schedule_length: int) -> Draws:
    """Return the draws of these (pair, epoch).

    Timesteps are uniform over the schedule's, or over the inversion's levels where its latents end on them.
    """
    keys = [(seed, i, e) for i, e in zip(ids, epochs, strict=True)]

    def purpose(name: str) -> list[tuple[str | int, ...]]:
        return [(*k, name) for k in keys]

    allowed = timesteps_of(recipe.noising, schedule_length)
    chosen = randomness.integers(len(allowed), purpose("timestep")).tolist()
    return Draws(
        keys,
        [allowed[i] for i in chosen],
        (randomness.uniform(purpose("dropout")) < recipe.prompt_dropout).tolist(),
        (randomness.uniform(purpose("flip")) < 0.5).tolist() if recipe.flip else [False] * len(keys),
    )


def timesteps_of(noising: Noising, schedule_length: int) -> Sequence[int]:
    """Return the timesteps that are drawn from."""
    if isinstance(noising, Inversion):
        return inversion.drawable(schedule_length, noising.steps, noising.mode).tolist()
    return range(schedule_length)


def levels_of(noising: Inversion, timesteps: Sequence[int], schedule_length: int) -> list[int]:
    """Return the levels at which the latents for these timesteps end."""
    return inversion.level_of(torch.tensor(timesteps), schedule_length, noising.steps, noising.mode).tolist()


def wanted_trajectories(
    pairs: pl.DataFrame, steps: range, batch_size: int, seed: int, recipe: Recipe, schedule_length: int
) -> pl.DataFrame:
    """Return image_id, prompt_id, is_flipped, level of all trajectories that these optimiser steps on the pairs read."""
    assert isinstance(recipe.noising, Inversion)
    rows = list(dict.fromkeys(r for s in steps for r in batch_rows(s, batch_size, len(pairs), seed)))
    part = pairs[[row for row, _ in rows]]
    drawn = draws(seed, part["pair_id"].to_list(), [epoch for _, epoch in rows], recipe, schedule_length)
    prompts = [EMPTY_PROMPT if d else p for p, d in zip(part["prompt_id"], drawn.is_dropped, strict=True)]
    levels = levels_of(recipe.noising, drawn.timesteps, schedule_length)
    frame = pl.DataFrame(
        {"prompt_id": prompts, "is_flipped": drawn.is_flipped, "level": levels}, schema_overrides={"level": pl.Int32}
    )
    return pl.concat(
        frame.with_columns(image_id=part[side]).select("image_id", "prompt_id", "is_flipped", "level")
        for side in ("winner_id", "loser_id")
    ).unique(maintain_order=True)


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """B pairs, winners first: scaled latents [2, B, C, H, W], conditioning of B prompts, timesteps [B].

    keys: of the pairs' draws.
    noise: [B, C, H, W], of forward noising. inverted: [2, B, C, H, W], latents at the timesteps from cached trajectories;
    `latents` are the trajectories' starts then. probability, minority, group: [B] where the objective needs them.
    """

    keys: list[tuple[int, str, int]]
    latents: torch.Tensor
    conditioning: Conditioning
    timesteps: torch.Tensor
    noise: torch.Tensor | None = None
    inverted: torch.Tensor | None = None
    probability: torch.Tensor | None = None
    minority: torch.Tensor | None = None
    group: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return the batch in page-locked memory, from which a GPU copies while it computes."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors: dict[str, Any] = {k: change(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        c = self.conditioning
        pooled = None if c.pooled is None else change(c.pooled)
        return replace(self, conditioning=Conditioning(change(c.hidden), pooled), **tensors)


class PairData:
    """The pairs of one run with their cached latents and embeddings, read from flat files."""

    def __init__(
        self,
        store: Store,
        pairs: pl.DataFrame,
        backbone: Backbone,
        scratch: Path,
        noising: Noising = FORWARD,
        *,
        with_flips: bool = False,
    ) -> None:
        """Open the caches.

        Raises:
            StoreError: there is no pair, or a cache lacks an image or a prompt of them.
        """
        if pairs.is_empty():
            raise StoreError("no pairs to train on: the policy excluded all of them; see preferences.excluded_because")
        self.pairs, self.noising = pairs, noising
        self._store, self._scratch, self._backbone = store, scratch, backbone
        self._latents = TensorFile(store, schemas.LATENTS, backbone.partition(), scratch)
        self._prompts = TensorFile(store, schemas.PROMPT_EMBEDDINGS, backbone.partition(), scratch)
        self._require(pairs, with_flips)
        self._schedule_length = backbone.model.timesteps
        self._scale = backbone.model.latent_scale
        self.latent_shape: tuple[int, ...] = backbone.model.latent_shape
        embedding = self._prompts.keys.row(0, named=True)
        self._hidden_shape = (embedding["tokens"], embedding["width"])
        self._pooled_shape = None if embedding["pooled_width"] is None else (embedding["pooled_width"],)
        self._trajectories: TensorFile | None = None

    def _require(self, pairs: pl.DataFrame, with_flips: bool) -> None:
        name = self._backbone.config.name
        needed = pl.concat([pairs["winner_id"], pairs["loser_id"]]).unique().to_list()
        sides = (False, True) if with_flips else (False,)
        for is_flipped in sides:
            if missing := self._latents.missing([(i, is_flipped) for i in needed]):
                mirrored = "mirrored " if is_flipped else ""
                raise StoreError(
                    f"latents of backbone {name} lack {len(missing)} {mirrored}images, first {missing[0]}; run "
                    "`python -m trainers.train cache --recipe NAME`, or materialize latents with the recipe configured"
                )
        if missing := self._prompts.missing([*pairs["prompt_id"].unique().to_list(), EMPTY_PROMPT]):
            raise StoreError(
                f"prompt_embeddings of backbone {name} lack {len(missing)} prompts, first {missing[0]}; run "
                "`python -m trainers.train cache`, or materialize prompt_embeddings"
            )

    def other(self, pairs: pl.DataFrame) -> PairData:
        """Return other pairs by the same open caches, with forward noising.

        Raises:
            StoreError: see __init__.
        """
        self._require(pairs, with_flips=False)
        found = copy.copy(self)
        found.pairs, found.noising, found._trajectories = pairs, FORWARD, None
        return found

    def __len__(self) -> int:
        return len(self.pairs)

    # --- trajectories ----------------------------------------------------------------------------------------------

    def open_trajectories(self, where: str) -> None:
        """Read latents at their timesteps from the trajectories that lie there."""
        self._trajectories = TensorFile(self._store, schemas.TRAJECTORIES, where, self._scratch)

    def start_latents(self, keys: Sequence[tuple[str, bool]]) -> torch.Tensor:
        """Return the scaled means of the posteriors of (image_id, is_flipped), [N, C, H, W]: where trajectories start."""
        return self._latents.read("mean", keys, self.latent_shape) * self._scale

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Return the embeddings of prompt ids."""
        pooled = None if self._pooled_shape is None else self._prompts.read("pooled", prompts, self._pooled_shape)
        return Conditioning(self._prompts.read("embedding", prompts, self._hidden_shape), pooled)

    # --- batches ---------------------------------------------------------------------------------------------------

    def batch(self, rows: Sequence[int], drawn: Draws) -> Batch:
        """Return the pairs at `rows` with their draws.

        Forward noising draws latents from their posteriors with noise keyed by draw and image; inversion starts from the
        posteriors' means.
        """
        part = self.pairs[list(rows)]
        prompts = [EMPTY_PROMPT if d else p for p, d in zip(part["prompt_id"], drawn.is_dropped, strict=True)]
        sides = [list(zip(part[c], drawn.is_flipped, strict=True)) for c in ("winner_id", "loser_id")]
        noise = inverted = None
        if isinstance(self.noising, Forward):
            noise = randomness.normal(self.latent_shape, [(*k, "noise") for k in drawn.keys])
            latents = torch.stack([self._drawn_latents(keys, drawn) for keys in sides])
        else:
            latents = torch.stack([self.start_latents(keys) for keys in sides])
            if self._trajectories is not None:
                inverted = torch.stack(
                    [
                        trajectories.read(
                            self._trajectories,
                            [i for i, _ in keys],
                            prompts,
                            drawn.is_flipped,
                            levels_of(self.noising, drawn.timesteps, self._schedule_length),
                            self.latent_shape,
                        )
                        for keys in sides
                    ]
                )
        columns = {
            c: torch.tensor(part[c].to_list(), dtype=torch.int64 if c == "group" else torch.float32)
            for c in _COLUMNS
            if c in part.columns
        }
        return Batch(
            drawn.keys,
            latents,
            self.conditioning(prompts),
            torch.tensor(drawn.timesteps),
            noise,
            inverted,
            **columns,
        )

    def _drawn_latents(self, keys: list[tuple[str, bool]], drawn: Draws) -> torch.Tensor:
        mean = self._latents.read("mean", keys, self.latent_shape)
        deviation = (0.5 * self._latents.read("log_variance", keys, self.latent_shape)).exp()
        named = [(*k, "posterior", i) for k, (i, _) in zip(drawn.keys, keys, strict=True)]
        return (mean + deviation * randomness.normal(self.latent_shape, named)) * self._scale
