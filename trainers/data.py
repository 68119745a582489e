"""Pairs as tensors: what a policy selects of `preferences`, with cached latents and embeddings.

Belongs here: joining tables into batches. Does not belong here: noise, losses, models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch

from pipelines import schemas
from pipelines.curation import Policy
from pipelines.tables import Store, StoreError
from trainers import randomness
from trainers.caches import EMPTY_PROMPT, Backbone, unpack


def select_pairs(store: Store, policy: Policy, splits: Sequence[str]) -> pl.DataFrame:
    """Return pair_id, prompt_id, winner_id, loser_id of the policy's pairs in the splits, sorted by pair_id."""
    store.require("preferences")
    first = pl.col("target_label_0") == 1
    return (
        policy.apply(store.scan(schemas.PREFERENCES).filter(pl.col("split").is_in(list(splits))))
        .filter(pl.col("target_label_0").is_not_null())
        .select(
            "pair_id",
            "prompt_id",
            winner_id=pl.when(first).then("image_0_id").otherwise("image_1_id"),
            loser_id=pl.when(first).then("image_1_id").otherwise("image_0_id"),
        )
        .sort("pair_id")
        .collect()
    )


@dataclass(frozen=True)
class Batch:
    """B pairs: pair ids, scaled latents [2, B, C, H, W] (winners first), prompt embeddings [B, T, D]."""

    pair_ids: list[str]
    latents: torch.Tensor
    embeddings: torch.Tensor


class PairData:
    """The pairs of one run with their latents and embeddings in memory.

    Memory: 4 * C * H * W bytes per image (64 kB at 512 pixels) and 2 * T * D per prompt.
    """

    def __init__(self, store: Store, pairs: pl.DataFrame, backbone: Backbone, latent_scale: float) -> None:
        if pairs.is_empty():
            raise StoreError("no pairs to train on: the policy excluded all of them; see preferences.excluded_because")
        self.pairs, self._scale = pairs, latent_scale
        needed = pl.concat([pairs["winner_id"], pairs["loser_id"]]).unique()
        latents = (
            store.scan(schemas.LATENTS, below=backbone.partition())
            .filter(pl.col("image_id").is_in(needed.implode()))
            .collect()
        )
        self._image_row = {key: i for i, key in enumerate(latents["image_id"])}
        if missing := [i for i in needed if i not in self._image_row]:
            raise StoreError(
                f"latents of backbone {backbone.config.name} lack {len(missing)} images, first {missing[0]}; cache them first"
            )
        shape = (-1, latents["height"][0], latents["width"][0])
        self._mean = unpack(latents["mean"].to_list(), shape)
        self._log_variance = unpack(latents["log_variance"].to_list(), shape)
        embeddings = store.read(schemas.PROMPT_EMBEDDINGS, backbone.partition("all"))
        self._prompt_row = {key: i for i, key in enumerate(embeddings["prompt_id"])}
        size = (embeddings["tokens"][0], embeddings["width"][0])
        self._embeddings = unpack(embeddings["embedding"].to_list(), size)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return [C, H, W]."""
        return tuple(self._mean.shape[1:])

    def batch(self, rows: Sequence[int], keys: Sequence[tuple[str | int, ...]], dropped: Sequence[bool]) -> Batch:
        """Return the pairs at `rows`; latents are drawn from their posteriors with noise keyed by `keys` and image.

        dropped: where true the prompt's embedding is that of the empty prompt.
        """
        part = self.pairs[list(rows)]
        sides = []
        for column in ("winner_id", "loser_id"):
            ids = part[column].to_list()
            index = [self._image_row[i] for i in ids]
            noise = randomness.normal(self.latent_shape, [(*k, "posterior", i) for k, i in zip(keys, ids, strict=True)])
            sides.append(self._mean[index] + (0.5 * self._log_variance[index]).exp() * noise)
        prompts = [EMPTY_PROMPT if d else p for p, d in zip(part["prompt_id"], dropped, strict=True)]
        return Batch(
            part["pair_id"].to_list(),
            torch.stack(sides) * self._scale,
            self._embeddings[[self._prompt_row[p] for p in prompts]],
        )


def batch_rows(step: int, batch_size: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Return (row, epoch) of the batch of an optimiser step: a pure function, so that resuming needs no state.

    Every epoch is a permutation keyed by (seed, epoch); a batch may span two epochs.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: torch.randperm(count, generator=randomness.generator(seed, "order", epoch)).tolist()
        for epoch in {p // count for p in places}
    }
    return [(orders[p // count][p % count], p // count) for p in places]
