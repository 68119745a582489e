"""The accounting report: per source what came in, what counts, and what does not, over all shards.

    reuse = uses of images in counting votes / distinct images so used

Belongs here: sums over the catalogue and the shards. Does not belong here: deciding what counts (`ingest`, `catalogue`).
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from pipelines import catalogue, plots, schemas
from pipelines.sources import Shard
from pipelines.tables import Built, Store

CODE_VERSION = "1"
ALL = "all"


def build(store: Store, shards: list[Shard], layouts: Mapping[str, str]) -> Built:
    """Build `accounting` over ingested shards with a current catalogue. layouts: source -> layout.

    Raises:
        tables.StoreError: a shard is not ingested, or the catalogue is missing or old.
    """
    keys = [s.key for s in shards]
    inputs = [
        *(m for t in ("votes", "images", "image_names") for m in store.require_all(t, keys)),
        *catalogue.require_current(store, keys),
    ]
    return store.build(
        schemas.ACCOUNTING,
        lambda: report(store, shards, layouts),
        inputs=inputs,
        code_version=CODE_VERSION,
        parameters={"layouts": dict(layouts)},
    )


def report(store: Store, shards: list[Shard], layouts: Mapping[str, str]) -> pl.DataFrame:
    """Return the accounting table: one row per source, and one over all."""
    by_source: dict[str, list[str]] = {}
    for shard in shards:
        by_source.setdefault(shard.source, []).append(shard.key)
    rows = [_row(store, name, keys, layouts.get(name)) for name, keys in sorted(by_source.items())]
    rows.append(_row(store, ALL, [s.key for s in shards], None))
    return pl.DataFrame(rows, schema=schemas.ACCOUNTING.polars_schema)


def _row(store: Store, source: str, keys: list[str], layout: str | None) -> dict[str, object]:
    facts = [m.extra for m in store.require_all("votes", keys)]
    return {
        "source": source,
        "layout": layout,
        "shards": len(keys),
        "rows": sum(f["rows_in"] for f in facts),
        "image_references": sum(f["images_in"] for f in facts),
        **_vote_sums(store, keys),
        **_image_sums(store, keys),
        **_prompt_sums(store, keys),
    }


def _vote_sums(store: Store, keys: list[str]) -> dict[str, object]:
    votes = catalogue.resolved_votes(store, keys)
    status, ok = pl.col("status"), pl.col("status") == "ok"
    named = ("ok", "unlabelled", "unreadable", "duplicate_of")
    sums = votes.select(
        votes=pl.len(),
        votes_ok=ok.sum(),
        people=catalogue.PEOPLE.filter(ok).sum(),
        ties=(ok & (pl.col("label_0") == 0.5)).sum(),
        unlabelled=(status == "unlabelled").sum(),
        unreadable=(status == "unreadable").sum(),
        duplicates=(status == "duplicate_of").sum(),
        other_rejected=(~status.is_in(named)).sum(),
        pairs=pl.col("pair_id").filter(ok).n_unique(),
        annotators=pl.col("annotator_id").drop_nulls().n_unique(),
    ).collect()
    counted = votes.filter(ok)
    cycles = (
        store.scan(schemas.CATALOGUE_PAIRS)
        .filter(pl.col("cycle").is_not_null())
        .join(counted.select("pair_id").unique(), on="pair_id", how="semi")
        .select(pairs_in_cycles=pl.len(), cycles=pl.col("cycle").n_unique())
        .collect()
    )
    used = pl.concat(counted.select(image_id=f"image_{i}_id") for i in (0, 1))
    uses, images = used.select(pl.len(), pl.col("image_id").n_unique()).collect().row(0)
    pairs, people = sums["pairs"][0], sums["people"][0]
    return {
        **sums.row(0, named=True),
        **cycles.row(0, named=True),
        "votes_per_pair": people / pairs if pairs else None,
        "image_reuse": uses / images if images else None,
    }


def _image_sums(store: Store, keys: list[str]) -> dict[str, object]:
    names = store.scan(schemas.CATALOGUE_NAMES)
    images = (
        # One image may be readable in one shard and known by name only in another.
        store.scan(schemas.IMAGES, partitions=keys)
        .select("image_id", "status")
        .join(names.select("named_id", now="image_id"), left_on="image_id", right_on="named_id", how="left")
        .group_by(pl.coalesce("now", "image_id"))
        .agg(is_ok=(pl.col("status") == "ok").any())
        .select(images=pl.len(), images_unusable=(~pl.col("is_ok")).sum())
        .collect()
    )
    ambiguous = (
        names.filter(pl.col("images") > 1)
        .join(store.scan(schemas.IMAGE_NAMES, partitions=keys), on="named_id", how="semi")
        .select(ambiguous_names=pl.len())
        .collect()
    )
    return {**images.row(0, named=True), **ambiguous.row(0, named=True)}


def _prompt_sums(store: Store, keys: list[str]) -> dict[str, object]:
    prompts = (
        store.scan(schemas.CATALOGUE_PROMPTS)
        .join(store.scan(schemas.PROMPTS, partitions=keys).select("prompt_id").unique(), on="prompt_id", how="semi")
        .select(
            prompts=pl.len(),
            **{f"prompts_{s}": (pl.col("split") == s).sum() for s in schemas.SPLITS},
            split_conflicts=pl.col("is_conflict").sum(),
        )
    )
    return prompts.collect().row(0, named=True)


def as_markdown(report: pl.DataFrame) -> str:
    """Return the report as a table with a column per source."""
    sources = report["source"].to_list()
    lines = ["| | " + " | ".join(sources) + " |", "|---" * (len(sources) + 1) + "|"]
    for column in report.columns[1:]:
        values = ["" if v is None else f"{v:.2f}" if isinstance(v, float) else f"{v}" for v in report[column]]
        lines.append(f"| {column.replace('_', ' ')} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def plot(report: pl.DataFrame) -> bytes:
    """Return a PNG: per source the shares of vote rows by what became of them, and of prompts by split."""
    parts = {
        "vote rows": ("votes_ok", "unlabelled", "unreadable", "duplicates", "other_rejected"),
        "prompts": ("prompts_train", "prompts_validation", "prompts_test"),
    }
    drawn = plots.figure(1.2 + 0.4 * len(report))
    for axis, (title, columns) in zip(drawn.subplots(1, 2, sharey=True), parts.items(), strict=True):
        totals = report.select(pl.sum_horizontal(columns).alias("total"))["total"]
        left = [0.0] * len(report)
        for column in columns:
            share = [100 * n / t if t else 0.0 for n, t in zip(report[column], totals, strict=True)]
            axis.barh(
                report["source"].to_list(), share, left=left, label=column.removeprefix("prompts_").replace("_", " ")
            )
            left = [a + b for a, b in zip(left, share, strict=True)]
        axis.set_xlabel(f"% of {title}", fontsize=8)
        axis.set_xlim(0, 100)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    # The axes share it, so it is turned once.
    drawn.axes[0].invert_yaxis()
    return plots.png(drawn)
