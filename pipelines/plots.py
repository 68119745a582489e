"""Plots of scores, of voters and of revisions, as PNG; and what all plots of the project share.

Belongs here: pictures that say in the width of a metadata pane what a table would, and the numbers behind them. Does not
belong here: plots of single label tables (`label_plots`), of a run or a leaderboard (`trainers.report`).
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pipelines import schemas
from pipelines.tables import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PIXELS_WIDE = 630
"""What a metadata pane shows without making it smaller."""
DPI = 90
COLOURS = 128
BINS = 40
HISTOGRAM_ENDS = (0.001, 0.999)
"""Quantiles between which the bins lie, so that one odd score does not squeeze the others into one bin."""
HUMANS = "humans"


# --- what plots share ----------------------------------------------------------------------------------------------------


def figure(height: float, width: float = PIXELS_WIDE / DPI) -> Figure:
    """Return an empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(drawn: Figure) -> bytes:
    """Return a figure as a small PNG."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=DPI)
    # A palette makes the file a third as large; the widest one, as a line of few pixels has to keep its colour.
    picture = Image.open(buffer).convert("RGB")
    picture = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(small, "PNG", optimize=True)
    return small.getvalue()


def say(axis: Axes, text: str) -> None:
    """Write into an empty panel why it is empty."""
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, fontsize=8, color="0.4")
    axis.set(xticks=[], yticks=[])


# --- scores --------------------------------------------------------------------------------------------------------------


def score_counts(store: Store, partitions: Sequence[str]) -> pl.DataFrame:
    """Return how many scores of a scorer lie in which bin, by source: source, bin, low, high, scores; sorted.

    BINS equal bins lie between the HISTOGRAM_ENDS quantiles of all these scores; what lies outside is in the outermost
    ones; a bin of null counts the (image, prompt) without a score. An (image, prompt) is of the source whose shard owns it.

    partitions: of `scores`, one per shard: '<scorer>/revision=<12 hex>/<shard>'.
    """
    sources = {p: p.rsplit("/", 1)[-1].split(".")[0] for p in partitions}
    scores = store.scan_shards(schemas.SCORES, list(partitions)).select(
        source=pl.col("shard").replace_strict(sources, return_dtype=pl.String),
        score=pl.when(pl.col("score").is_finite()).then("score").cast(pl.Float64),
    )
    low, high = (
        scores.select(pl.col("score").quantile(q, interpolation="linear").alias(f"{q}") for q in HISTOGRAM_ENDS)
        .collect(engine="streaming")
        .row(0)
    )
    if low is None or low == high:
        # All scores may be one number, or none.
        low, high = (low or 0.0) - 0.5, (low or 0.0) + 0.5
    width = (high - low) / BINS
    place = ((pl.col("score") - low) / width).floor().clip(0, BINS - 1).cast(pl.Int32)
    return (
        scores.group_by("source", bin=place)
        .agg(scores=pl.len().cast(pl.Int64))
        .collect(engine="streaming")
        .sort("source", "bin")
        .with_columns(low=low + pl.col("bin") * width, high=low + (pl.col("bin") + 1) * width)
        .select("source", "bin", "low", "high", "scores")
    )


def score_histogram(counts: pl.DataFrame, title: str) -> bytes:
    """Return the histograms of a scorer's scores, a line per source, in % of the source's scores. counts: of score_counts."""
    drawn = figure(2.3)
    axis = drawn.subplots()
    found = counts.filter(pl.col("bin").is_not_null())
    for name in found["source"].unique(maintain_order=True):
        rows = found.filter(pl.col("source") == name)
        number, edge = rows["scores"].sum(), rows["low"][0] - rows["bin"][0] * (rows["high"][0] - rows["low"][0])
        edges = edge + np.arange(BINS + 1) * (rows["high"][0] - rows["low"][0])
        share = np.zeros(BINS)
        share[rows["bin"].to_numpy()] = 100 * rows["scores"].to_numpy() / number
        lines = axis.stairs(share, edges, linewidth=1.2, label=f"{name} ({number:,})")
        axis.stairs(share, edges, fill=True, alpha=0.12, color=lines.get_edgecolor())
    if found.is_empty():
        say(axis, "no scores")
    else:
        axis.legend(fontsize=7, frameon=False)
    missing = counts.filter(pl.col("bin").is_null())["scores"].sum()
    axis.set_title(f"{title}: scores" + (f"; {missing:,} (image, prompt) without one" if missing else ""), fontsize=9)
    axis.set_ylabel("% of the source's", fontsize=8)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=8)
    return png(drawn)


# --- voters --------------------------------------------------------------------------------------------------------------


def votes_of(store: Store) -> pl.LazyFrame:
    """Return the votes of `consensus`, a column per scorer, and the side of most people as a last one: 1, -1, 0 or null.

    Raises:
        StoreError: there is no consensus yet.
    """
    store.require(schemas.CONSENSUS.name)
    consensus = store.scan(schemas.CONSENSUS, partitions=["all"])
    scorers = schemas.CONSENSUS.scorers(consensus.collect_schema().names())
    people = store.scan(schemas.CATALOGUE_PAIRS).select(
        "pair_id", (pl.col("human_label_0") - 0.5).sign().cast(pl.Int8).alias(HUMANS)
    )
    votes = consensus.select("pair_id", *(pl.col(f"vote_{s}").alias(s) for s in scorers))
    return votes.join(people, on="pair_id", how="left").drop("pair_id")


def agreement(votes: pl.LazyFrame) -> pl.DataFrame:
    """Return how often two voters choose the same image: voter_a, voter_b, pairs, agreement; each two once.

    pairs: on which both choose one; agreement: the share of those on which it is the same, null where there are none.

    votes: a row per pair and a column per voter: 1 for image_0, -1 for image_1, 0 (even) or null.
    """
    voters = votes.collect_schema().names()
    twos = list(itertools.combinations(voters, 2))
    sums = []
    for k, two in enumerate(twos):
        a, b = (pl.col(v).cast(pl.Int8) for v in two)
        sums.append(pl.struct(pairs=(a * b != 0).sum(), same=(a * b > 0).sum()).alias(f"{k}"))
    found = votes.select(sums).collect(engine="streaming").row(0) if sums else ()
    schema = {"voter_a": pl.String, "voter_b": pl.String, "pairs": pl.Int64, "agreement": pl.Float64}
    rows = [
        (a, b, f["pairs"], f["same"] / f["pairs"] if f["pairs"] else None)
        for (a, b), f in zip(twos, found, strict=True)
    ]
    return pl.DataFrame(rows, schema=schema, orient="row")


def agreement_matrix(table: pl.DataFrame) -> bytes:
    """Return the shares of equal choices of every two voters as a coloured matrix. table: of `agreement`."""
    voters = list(dict.fromkeys([*table["voter_a"], *table["voter_b"]]))
    drawn = figure(1.0 + 0.42 * max(2, len(voters)), min(PIXELS_WIDE / DPI, 2.2 + 0.75 * max(2, len(voters))))
    axis = drawn.subplots()
    if not voters:
        say(axis, "fewer than two voters")
        axis.set_axis_off()
        return png(drawn)
    shown = np.full((len(voters), len(voters)), np.nan)
    for a, b, _, share in table.iter_rows():
        for y, x in ((voters.index(a), voters.index(b)), (voters.index(b), voters.index(a))):
            shown[y, x] = np.nan if share is None else share
            axis.text(x, y, "-" if share is None else f"{100 * share:.0f}", ha="center", va="center", fontsize=9)
    axis.set_facecolor("0.93")
    # White is what chance gives; the strongest colours are left out, so that black numbers stay readable.
    axis.imshow(shown, cmap="RdBu", vmin=-0.25, vmax=1.25, aspect="auto")
    axis.set_xticks(range(len(voters)), voters, fontsize=8)
    axis.set_yticks(range(len(voters)), voters, fontsize=8)
    axis.set_title("% of pairs on which both choose the same image", fontsize=9)
    return png(drawn)


# --- revisions -----------------------------------------------------------------------------------------------------------


def drift(table: pl.DataFrame) -> bytes:
    """Return accuracy, and the share of choices that changed, by measurement: a line per subject. table: `drift`."""
    from matplotlib.ticker import MaxNLocator

    drawn = figure(2.6)
    panels = {"accuracy": "accuracy, % of frozen pairs", "share_changed": "% of choices that changed"}
    subjects = table["subject"].unique(maintain_order=True).to_list()
    for axis, (column, title) in zip(drawn.subplots(1, 2), panels.items(), strict=True):
        known = table.filter(pl.col(column).is_not_null()).sort("measurement")
        for k, subject in enumerate(subjects):
            rows = known.filter(pl.col("subject") == subject)
            axis.plot(rows["measurement"], 100 * rows[column], ".-", color=f"C{k % 10}", linewidth=1, label=subject)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("measurement", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.set_xlim(0.5, (table["measurement"].max() or 1) + 0.5)  # type: ignore[operator]
        if known.is_empty():
            say(axis, "nothing to compare yet" if subjects else "nothing measured yet")
    if subjects:
        drawn.legend(*drawn.axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center", frameon=False)
    return png(drawn)
