"""The catalogue: what crosses shards. Who owns an image and an (image, prompt), one split per prompt, repeated votes.

Append-only: what a catalogued shard owns stays its own as long as that shard still holds it.
Belongs here: facts over all shards that need ids only. Does not belong here: bytes, scores, labels.
"""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from pipelines import schemas
from pipelines.tables import Built, Manifest, Store

CODE_VERSION = "2"
_SPLIT_RANK = {"train": 0, "validation": 1, "test": 2}


def build(store: Store, shard_keys: list[str]) -> dict[str, Built]:
    """Build the four catalogue tables over the given ingested shards; return what was built, by table.

    Raises:
        tables.StoreError: a shard is not ingested.
    """
    images = [store.require("images", k) for k in shard_keys]
    votes = [store.require("votes", k) for k in shard_keys]
    prompts = [store.require("prompts", k) for k in shard_keys]
    parameters = {"shards": shard_keys}

    def table(schema: schemas.Table, make: Callable[[], pl.DataFrame], inputs: list[Manifest]) -> Built:
        return store.build(schema, make, inputs=inputs, code_version=CODE_VERSION, parameters=parameters)

    built = {
        "catalogue_images": table(schemas.CATALOGUE_IMAGES, lambda: _images(store, shard_keys), images),
        "catalogue_prompts": table(schemas.CATALOGUE_PROMPTS, lambda: _prompts(store, shard_keys), [*votes, *prompts]),
        "catalogue_duplicates": table(schemas.CATALOGUE_DUPLICATES, lambda: _duplicates(store, shard_keys), votes),
    }
    built["catalogue_scorables"] = table(
        schemas.CATALOGUE_SCORABLES,
        lambda: _scorables(store, shard_keys),
        [*votes, built["catalogue_images"].manifest],
    )
    return built


def _scan(store: Store, table: schemas.Table, shard_keys: list[str], columns: list[str]) -> pl.LazyFrame:
    """Return the columns of all shards, with the shard's key and its place in the order."""
    return pl.concat(
        store.scan(table, partitions=[key]).select(*columns, shard=pl.lit(key), place=pl.lit(i, pl.Int32))
        for i, key in enumerate(shard_keys)
    )


def _own(held: pl.LazyFrame, previous: pl.LazyFrame, key: list[str]) -> pl.DataFrame:
    """Return one owner per key: the previous owner if it still holds it, else the first shard that does."""
    return (
        held.join(previous.select(*key, before="owner"), on=key, how="left")
        .with_columns(is_new=(pl.col("before") != pl.col("shard")).fill_null(True))
        .sort("is_new", "place")
        .group_by(key)
        .agg(owner=pl.col("shard").first())
        .sort(key)
        .collect()
    )


def _images(store: Store, shard_keys: list[str]) -> pl.DataFrame:
    held = _scan(store, schemas.IMAGES, shard_keys, ["image_id", "sha256"])
    collisions = held.group_by("image_id").agg(n=pl.col("sha256").n_unique()).filter(pl.col("n") > 1).collect()
    if len(collisions):
        raise RuntimeError(f"image ids of different bytes collide: {collisions['image_id'].to_list()[:5]}")
    return _own(held, store.scan(schemas.CATALOGUE_IMAGES), ["image_id"])


def _scorables(store: Store, shard_keys: list[str]) -> pl.DataFrame:
    votes = _scan(store, schemas.VOTES, shard_keys, ["pair_id", "prompt_id", "image_0_id", "image_1_id"])
    votes = votes.filter(pl.col("pair_id").is_not_null())
    held = pl.concat(votes.select("prompt_id", "shard", "place", image_id=f"image_{i}_id") for i in (0, 1)).unique(
        ["image_id", "prompt_id", "shard"]
    )
    return _own(held, store.scan(schemas.CATALOGUE_SCORABLES), ["image_id", "prompt_id"])


def _prompts(store: Store, shard_keys: list[str]) -> pl.DataFrame:
    rank = pl.col("split").replace_strict(_SPLIT_RANK, return_dtype=pl.Int8)
    splits = (
        store.scan(schemas.VOTES, partitions=shard_keys)
        .filter(pl.col("prompt_id").is_not_null())
        .group_by("prompt_id")
        .agg(rank=rank.max(), is_conflict=pl.col("split").n_unique() > 1)
    )
    names = {v: k for k, v in _SPLIT_RANK.items()}
    return (
        store.scan(schemas.PROMPTS, partitions=shard_keys)
        .unique("prompt_id")
        .join(splits, on="prompt_id")
        .with_columns(split=pl.col("rank").replace_strict(names, return_dtype=pl.String))
        .select(list(schemas.CATALOGUE_PROMPTS.polars_schema))
        .sort("prompt_id")
        .collect()
    )


def _duplicates(store: Store, shard_keys: list[str]) -> pl.DataFrame:
    event = ["annotator_id", "pair_id", "created_at"]
    votes = _scan(store, schemas.VOTES, shard_keys, ["vote_id", "status", *event])
    return (
        votes.filter(pl.col("status") == "ok", *(pl.col(c).is_not_null() for c in event))
        # The smallest id counts, not the first shard's, so that the order of ingestion decides nothing.
        .with_columns(duplicate_of=pl.col("vote_id").min().over(event))
        .filter(pl.col("duplicate_of") != pl.col("vote_id"))
        .select("vote_id", "duplicate_of")
        .sort("vote_id")
        .collect()
    )


def require_current(store: Store, shard_keys: list[str]) -> list[Manifest]:
    """Return the commits of the catalogue's tables, made from the votes, images and prompts of these shards as they are.

    Raises:
        tables.StoreError: a table is missing or older than a shard.
    """
    votes, images, prompts = ([store.require(t, k) for k in shard_keys] for t in ("votes", "images", "prompts"))
    return [
        store.require_current("catalogue_images", made_from=images),
        store.require_current("catalogue_prompts", made_from=[*votes, *prompts]),
        store.require_current("catalogue_scorables", made_from=votes),
        store.require_current("catalogue_duplicates", made_from=votes),
    ]


def require_images_and_scorables(store: Store, shard_key: str) -> None:
    """Refuse a catalogue that has not seen a shard's present images and votes.

    Raises:
        tables.StoreError: the shard is not ingested, or the catalogue is missing or older than it.
    """
    store.require_current("catalogue_images", made_from=[store.require("images", shard_key)])
    store.require_current("catalogue_scorables", made_from=[store.require("votes", shard_key)])
    store.require_current("catalogue_prompts", made_from=[store.require("prompts", shard_key)])


def counted_votes(store: Store, shard_keys: list[str]) -> pl.LazyFrame:
    """Return the votes that count: status ok, and no repetition of a vote of another shard."""
    votes = store.scan(schemas.VOTES, partitions=shard_keys).filter(pl.col("status") == "ok")
    return votes.join(store.scan(schemas.CATALOGUE_DUPLICATES), on="vote_id", how="anti")


def all_pairs(store: Store, shard_keys: list[str]) -> pl.LazyFrame:
    """Return every pair of the shards once: pair_id, prompt_id, image_0_id, image_1_id."""
    keys = ["pair_id", "prompt_id", "image_0_id", "image_1_id"]
    votes = store.scan(schemas.VOTES, partitions=shard_keys).filter(pl.col("pair_id").is_not_null())
    return votes.select(keys).unique("pair_id").sort("pair_id")
