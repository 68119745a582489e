"""The catalogue: what crosses shards.

Who owns an image and an (image, prompt), one split per prompt, repeated votes, names resolved to images, pairs with what
humans say, preference cycles. Append-only: what a catalogued shard owns stays its own as long as that shard still holds it.
Belongs here: facts over all shards that need ids only. Does not belong here: bytes, scores, labels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from pipelines import identity, schemas
from pipelines.config import SplitsConfig
from pipelines.ingest import EVENT, RAW
from pipelines.tables import Built, Manifest, Store, StoreError

CODE_VERSION = "3"
TABLES = (
    schemas.CATALOGUE_NAMES,
    schemas.CATALOGUE_VOTES,
    schemas.CATALOGUE_PAIRS,
    schemas.CATALOGUE_IMAGES,
    schemas.CATALOGUE_PROMPTS,
    schemas.CATALOGUE_SCORABLES,
)
"""In the order in which they depend on each other."""
_SPLIT_RANK = {"train": 0, "validation": 1, "test": 2}
_KEYS = ["pair_id", "prompt_id", "image_0_id", "image_1_id"]


def build(store: Store, shard_keys: list[str], splits: SplitsConfig | None = None) -> dict[str, Built]:
    """Build the catalogue's tables over the given ingested shards; return what was built, by table.

    Raises:
        tables.StoreError: a shard is not ingested.
    """
    splits = splits or SplitsConfig()
    inputs = {t: store.require_all(t, shard_keys) for t in ("images", "image_names", "prompts", "votes")}
    parameters = {"shards": shard_keys}
    built: dict[str, Built] = {}

    def table(schema: schemas.Table, make: Callable[[], pl.DataFrame], of: list[str], **more: object) -> None:
        made_of = [m for t in of for m in (inputs[t] if t in inputs else [built[t].manifest])]
        built[schema.name] = store.build(
            schema, make, inputs=made_of, code_version=CODE_VERSION, parameters={**parameters, **more}
        )

    table(schemas.CATALOGUE_NAMES, lambda: _names(store, shard_keys), ["image_names", "images"])
    table(schemas.CATALOGUE_VOTES, lambda: _votes(store, shard_keys), ["votes", "catalogue_names"])
    table(schemas.CATALOGUE_PAIRS, lambda: _pairs(store, shard_keys), ["votes", "catalogue_votes"])
    table(schemas.CATALOGUE_IMAGES, lambda: _images(store, shard_keys), ["images", "catalogue_names"])
    table(
        schemas.CATALOGUE_PROMPTS,
        lambda: _prompts(store, shard_keys, splits),
        ["votes", "prompts"],
        splits=splits.model_dump(),
    )
    table(
        schemas.CATALOGUE_SCORABLES,
        lambda: _scorables(store, shard_keys),
        ["votes", "catalogue_votes", "catalogue_names", "catalogue_images"],
    )
    return built


def _scan(store: Store, table: schemas.Table, shard_keys: list[str], columns: list[str]) -> pl.LazyFrame:
    """Return the columns of all shards, with the shard's key and its place in the order."""
    return store.scan_shards(table, shard_keys).select(*columns, "shard", "place")


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


def _names(store: Store, shard_keys: list[str]) -> pl.DataFrame:
    named = _scan(store, schemas.IMAGE_NAMES, shard_keys, ["named_id", "image_id"])
    status = _scan(store, schemas.IMAGES, shard_keys, ["image_id", "status"]).drop("place")
    return (
        # An image without bytes has the id of its name.
        named.filter(pl.col("image_id") != pl.col("named_id"))
        .join(status, on=["image_id", "shard"], how="left")
        .with_columns(is_bad=(pl.col("status") != "ok").fill_null(True))
        .sort("is_bad", "image_id")
        .group_by("named_id")
        .agg(images=pl.col("image_id").n_unique().cast(pl.Int64), image_id=pl.col("image_id").first())
        .select(list(schemas.CATALOGUE_NAMES.polars_schema))
        .sort("named_id")
        .collect()
    )


def _images(store: Store, shard_keys: list[str]) -> pl.DataFrame:
    held = _scan(store, schemas.IMAGES, shard_keys, ["image_id", "sha256"])
    collisions = held.group_by("image_id").agg(n=pl.col("sha256").n_unique()).filter(pl.col("n") > 1).collect()
    if len(collisions):
        raise RuntimeError(f"image ids of different bytes collide: {collisions['image_id'].to_list()[:5]}")
    names = store.scan(schemas.CATALOGUE_NAMES).select("named_id")
    held = held.join(names, left_on="image_id", right_on="named_id", how="anti")
    return _own(held, store.scan(schemas.CATALOGUE_IMAGES), ["image_id"])


def _scorables(store: Store, shard_keys: list[str]) -> pl.DataFrame:
    votes = _resolved(store, store.scan_shards(schemas.VOTES, shard_keys)).filter(pl.col("pair_id").is_not_null())
    named = pl.concat(votes.select("prompt_id", "shard", "place", image_id=f"image_{i}_id") for i in (0, 1))
    # Only a shard that holds the bytes can score them.
    held = _scan(store, schemas.IMAGES, shard_keys, ["image_id"]).drop("place")
    here = named.unique(["image_id", "prompt_id", "shard"]).join(held, on=["image_id", "shard"], how="semi")
    elsewhere = (
        named.unique(["image_id", "prompt_id"])
        .join(here, on=["image_id", "prompt_id"], how="anti")
        .drop("shard", "place")
        .join(_scan(store, schemas.IMAGES, shard_keys, ["image_id"]), on="image_id")
    )
    columns = ["image_id", "prompt_id", "shard", "place"]
    held_pairs = pl.concat([here.select(columns), elsewhere.select(columns)])
    return _own(held_pairs, store.scan(schemas.CATALOGUE_SCORABLES), ["image_id", "prompt_id"])


def _prompts(store: Store, shard_keys: list[str], splits: SplitsConfig) -> pl.DataFrame:
    rank = pl.col("split").replace_strict(_SPLIT_RANK, return_dtype=pl.Int8)
    named = (
        store.scan(schemas.VOTES, partitions=shard_keys)
        .filter(pl.col("prompt_id").is_not_null())
        .group_by("prompt_id")
        .agg(rank=rank.max(), is_conflict=pl.col("split").drop_nulls().n_unique() > 1)
    )
    names = {v: k for k, v in _SPLIT_RANK.items()}
    # The id is a hash, so its first 8 digits are a uniform draw that never changes.
    draw = pl.col("prompt_id").str.slice(0, 8).str.to_integer(base=16, dtype=pl.Int64) / 2**32
    drawn = (
        pl.when(draw < splits.test)
        .then(pl.lit("test"))
        .when(draw < splits.test + splits.validation)
        .then(pl.lit("validation"))
        .otherwise(pl.lit("train"))
    )
    return (
        store.scan(schemas.PROMPTS, partitions=shard_keys)
        .unique("prompt_id")
        .join(named, on="prompt_id")
        .with_columns(
            split=pl.coalesce(pl.col("rank").replace_strict(names, return_dtype=pl.String), drawn),
            is_drawn=pl.col("rank").is_null(),
        )
        .select(list(schemas.CATALOGUE_PROMPTS.polars_schema))
        .sort("prompt_id")
        .collect()
    )


def _votes(store: Store, shard_keys: list[str]) -> pl.DataFrame:
    """Return the votes that stand otherwise than their shard says: names resolved to images, repetitions found."""
    votes = store.scan(schemas.VOTES, partitions=shard_keys)
    moved = _moved(votes, store.scan(schemas.CATALOGUE_NAMES))
    facts = votes.select(
        "vote_id", "source", "source_row", "status", "reason", *_KEYS, *(c for c in RAW if c not in _KEYS)
    )
    facts = facts.join(moved.lazy(), on="vote_id", how="left", suffix="_now")
    is_moved = pl.col("status_now").is_not_null()
    for column in (*_KEYS, "status", "reason"):
        facts = facts.with_columns(pl.when(is_moved).then(f"{column}_now").otherwise(column).alias(column))
    flip = pl.col("is_flipped").fill_null(False)
    facts = facts.with_columns(
        **_turned(flip),
        is_flipped=flip,
        is_moved=is_moved,
        # Rows of unknown people are one only within one file, whatever shards it is cut into.
        file=pl.col("source_row").str.replace(r":\d+$", ""),
    )
    # Repetitions within a shard come along: what they repeat may itself repeat a vote of another shard.
    ok = facts.filter(pl.col("status").is_in(["ok", "duplicate_of"]))
    known = pl.all_horizontal(pl.col(c).is_not_null() for c in EVENT)
    # The smallest id counts, not the first shard's, so that the order of ingestion decides nothing.
    smallest = pl.col("vote_id").filter(pl.col("status") == "ok").min()
    by_event = ok.filter(known).with_columns(original=smallest.over(EVENT))
    by_row = ok.filter(~known).with_columns(original=smallest.over("source", "file", *RAW))
    is_known_already = (pl.col("status") == "duplicate_of") & (pl.col("original") == pl.col("reason"))
    repeated = (
        pl.concat([by_event, by_row])
        .filter(pl.col("original") != pl.col("vote_id"), ~is_known_already)
        .select("vote_id", "original")
    )
    return (
        facts.join(repeated, on="vote_id", how="left")
        .filter(pl.col("is_moved") | pl.col("original").is_not_null())
        .with_columns(
            status=pl.when(pl.col("original").is_not_null()).then(pl.lit("duplicate_of")).otherwise("status"),
            reason=pl.coalesce("original", "reason"),
        )
        .select(list(schemas.CATALOGUE_VOTES.polars_schema))
        .sort("vote_id")
        .collect()
    )


def _moved(votes: pl.LazyFrame, names: pl.LazyFrame) -> pl.DataFrame:
    """Return the votes on images known by name whose bytes another shard has: their pair by the bytes' ids."""
    frame = votes.select("vote_id", "prompt_id", "image_0_id", "image_1_id", "status", "reason")
    for i in (0, 1):
        now = names.select(pl.col("named_id").alias(f"image_{i}_id"), pl.col("image_id").alias(f"now_{i}"))
        frame = frame.join(now, on=f"image_{i}_id", how="left")
    found = frame.filter(pl.col("now_0").is_not_null() | pl.col("now_1").is_not_null()).collect()
    first, second = (pl.coalesce(f"now_{i}", f"image_{i}_id") for i in (0, 1))
    counts = pl.col("status").is_in(["ok", "duplicate_of"])
    is_flipped, is_same = (first > second).fill_null(False), (first == second).fill_null(False)
    found = found.with_columns(
        image_0_id=pl.when(is_flipped).then(second).otherwise(first),
        image_1_id=pl.when(is_flipped).then(first).otherwise(second),
        is_flipped=is_flipped,
        status=pl.when(is_same & counts).then(pl.lit("same_image")).otherwise("status"),
        reason=pl.when(is_same & counts).then(pl.lit("both names are of the same bytes")).otherwise("reason"),
    )
    pairs = [
        identity.pair_id(p, a, b) if None not in (p, a, b) and a < b else None
        for p, a, b in found.select("prompt_id", "image_0_id", "image_1_id").iter_rows()
    ]
    return found.with_columns(pl.Series("pair_id", pairs, pl.String)).select(
        "vote_id", *_KEYS, "status", "reason", "is_flipped"
    )


def _turned(flip: pl.Expr) -> dict[str, pl.Expr]:
    """Return what a vote says of image_0 and image_1 when these change places."""
    return {
        **{c: pl.when(flip).then(1 - pl.col(c)).otherwise(c) for c in ("label_0", "source_label_0")},
        "was_listed_second": pl.col("was_listed_second") ^ flip,
        "model_0": pl.when(flip).then("model_1").otherwise("model_0"),
        "model_1": pl.when(flip).then("model_0").otherwise("model_1"),
    }


def _resolved(store: Store, votes: pl.LazyFrame) -> pl.LazyFrame:
    """Return these votes with their columns as they stand over all shards."""
    columns = votes.collect_schema().names()
    frame = votes.join(
        store.scan(schemas.CATALOGUE_VOTES), on="vote_id", how="left", suffix="_now", maintain_order="left"
    )
    is_changed, flip = pl.col("status_now").is_not_null(), pl.col("is_flipped").fill_null(False)
    return frame.with_columns(
        *(pl.when(is_changed).then(f"{c}_now").otherwise(c).alias(c) for c in (*_KEYS, "status", "reason")),
        **_turned(flip),
        was_swapped=pl.col("was_swapped") ^ flip,
    ).select(columns)


def resolved_votes(store: Store, shard_keys: list[str]) -> pl.LazyFrame:
    """Return every vote as it stands over all shards: images known by name resolved to bytes, repetitions marked."""
    return _resolved(store, store.scan(schemas.VOTES, partitions=shard_keys))


def counted_votes(store: Store, shard_keys: list[str]) -> pl.LazyFrame:
    """Return the votes that count: status ok, over all shards."""
    return resolved_votes(store, shard_keys).filter(pl.col("status") == "ok")


PEOPLE = pl.col("count").fill_null(1)
"""How many people a vote stands for; an unknown count is one."""


def _pairs(store: Store, shard_keys: list[str]) -> pl.DataFrame:
    is_ok = pl.col("status") == "ok"
    people = pl.when(is_ok).then(PEOPLE).otherwise(0)
    votes = resolved_votes(store, shard_keys).filter(pl.col("pair_id").is_not_null())
    pairs = (
        votes.group_by(_KEYS)
        .agg(
            n_votes=people.sum().cast(pl.Int64),
            human_label_0=(pl.col("label_0") * people).filter(is_ok).sum() / people.sum(),
        )
        .with_columns(human_label_0=pl.when(pl.col("n_votes") > 0).then("human_label_0"))
        .sort("pair_id")
        .collect()
    )
    return pairs.with_columns(cycle=_cycles(pairs)).select(list(schemas.CATALOGUE_PAIRS.polars_schema))


def _cycles(pairs: pl.DataFrame) -> pl.Series:
    """Return per pair the number of its preference cycle, else null.

    Choices make a graph from preferred to other image, per prompt; a choice lies on a cycle exactly if both ends are in
    one strongly connected component. Cycles are numbered by their smallest pair_id.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    decided = pairs.with_row_index("at").filter(pl.col("human_label_0").is_not_null(), pl.col("human_label_0") != 0.5)
    if decided.is_empty():
        return pl.Series("cycle", [None] * len(pairs), pl.Int64)
    ends = pl.concat(decided.select("at", "prompt_id", image=f"image_{i}_id", end=pl.lit(i)) for i in (0, 1))
    ends = ends.with_columns(node=pl.struct("prompt_id", "image").rank("dense").cast(pl.Int64) - 1)
    nodes = [ends.filter(pl.col("end") == i).sort("at")["node"].to_numpy() for i in (0, 1)]
    is_first = (decided["human_label_0"] > 0.5).to_numpy()
    winner, loser = np.where(is_first, nodes[0], nodes[1]), np.where(is_first, nodes[1], nodes[0])
    size = int(ends["node"].max()) + 1  # type: ignore[arg-type]
    graph = coo_matrix((np.ones(len(winner), bool), (winner, loser)), shape=(size, size)).tocsr()
    _, component = connected_components(graph, directed=True, connection="strong")
    is_cyclic = component[winner] == component[loser]
    found = decided.select("at", component=pl.Series(component[winner])).filter(pl.Series(is_cyclic))
    # Pairs are sorted by id, so components are numbered in the order of their first pair.
    numbers = found.group_by("component").agg(pl.col("at").min()).sort("at").with_row_index("cycle")
    numbered = found.join(numbers.select("component", pl.col("cycle").cast(pl.Int64)), on="component")
    return pairs.with_row_index("at").join(numbered, on="at", how="left").sort("at")["cycle"]


def require_current(store: Store, shard_keys: list[str]) -> list[Manifest]:
    """Return the commits of the catalogue's tables, made from the votes, images and prompts of these shards as they are.

    Raises:
        tables.StoreError: a table is missing or older than a shard.
    """
    shards = {t: store.require_all(t, shard_keys) for t in ("votes", "images", "prompts", "image_names")}
    needed = {
        "catalogue_names": ("image_names",),
        "catalogue_votes": ("votes",),
        "catalogue_pairs": ("votes",),
        "catalogue_images": ("images",),
        "catalogue_prompts": ("votes", "prompts"),
        "catalogue_scorables": ("votes",),
    }
    commits = []
    for name, of in needed.items():
        manifest = store.require_current(name, made_from=[m for t in of for m in shards[t]])
        seen = {n.removeprefix(f"{of[0]}/") for n in manifest.inputs if n.startswith(f"{of[0]}/")}
        if more := sorted(seen - set(shard_keys)):
            raise StoreError(
                f"{store.location}: {name} also holds shards that are no source's any more ({len(more)}: {more[:3]} ...); "
                f"materialize the catalogue again (`python -m pipelines ingest`, or the asset in Dagster)"
            )
        commits.append(manifest)
    return commits


def shard_keys(store: Store) -> list[str]:
    """Return the shards that the catalogue was made of, in its order: what every later step works on.

    Raises:
        tables.StoreError: there is no catalogue.
    """
    store.require(schemas.CATALOGUE_VOTES.name)
    return store.catalogued_shards() or []


def require_images_and_scorables(store: Store, shard_key: str) -> None:
    """Refuse a catalogue that has not seen a shard's present images and votes.

    Raises:
        tables.StoreError: the shard is not ingested, or the catalogue is missing or older than it.
    """
    for name, of in (
        ("catalogue_images", "images"),
        ("catalogue_scorables", "votes"),
        ("catalogue_prompts", "prompts"),
    ):
        # Of this shard alone: asking after all of them for each of them would be quadratic.
        store.require_seen(name, store.require(of, shard_key))


def all_pairs(store: Store) -> pl.LazyFrame:
    """Return every pair once, sorted: pair_id, prompt_id, image_0_id, image_1_id, n_votes, human_label_0, cycle."""
    return store.scan(schemas.CATALOGUE_PAIRS).sort("pair_id")
