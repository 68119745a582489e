"""Plots of the label tables, as PNG: what people would rather look at than read.

Belongs here: drawing tables that are there. Does not belong here: pages of single pairs (`pairs_page`), numbers (`labels`).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pipelines.labels.calibration import ENSEMBLE
from pipelines.labels.consensus import AGGREGATIONS, ALL_LEVELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability(table: pl.DataFrame) -> bytes:
    """Return the reliability curves, raw and calibrated, one panel per scorer; the area of a dot is its share of votes."""
    names = [*sorted(set(table["scorer"]) - {ENSEMBLE}), ENSEMBLE]
    figure = _figure(2.1 * len(names), 2.5)
    for axis, name in zip(np.atleast_1d(figure.subplots(1, len(names), sharey=True)), names, strict=True):
        axis.plot([0.5, 1], [0.5, 1], color="0.7", linewidth=0.8)
        for stage, colour in (("raw", "tab:orange"), ("calibrated", "tab:blue")):
            rows = table.filter(pl.col("scorer") == name, pl.col("stage") == stage).sort("bin")
            axis.plot(rows["probability"], rows["agreement"], color=colour, linewidth=0.8, label=stage)
            size = 80 * rows["votes"] / max(1, rows["votes"].sum())
            axis.scatter(rows["probability"], rows["agreement"], s=size, color=colour)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("probability of the favoured", fontsize=7)
        axis.tick_params(labelsize=7)
    figure.axes[0].set_ylabel("share of people who chose it", fontsize=7)
    figure.axes[0].legend(fontsize=6, frameon=False)
    return _png(figure)


def consensus(table: pl.DataFrame) -> bytes:
    """Return the agreement with decided human votes by aggregation and by the scorers' agreement, with 95 % intervals."""
    levels = [ALL_LEVELS, *sorted(set(table["level"]) - {ALL_LEVELS})]
    figure = _figure(1.6 + 1.1 * len(levels), 2.7)
    axis = figure.subplots()
    for i, way in enumerate(AGGREGATIONS):
        rows = table.filter(pl.col("aggregation") == way, pl.col("accuracy").is_not_null())
        at = [levels.index(v) + 0.18 * (i - 1.5) for v in rows["level"]]
        centre, low, high = (rows[c].to_numpy() for c in ("accuracy", "accuracy_low", "accuracy_high"))
        axis.errorbar(
            at, 100 * centre, yerr=100 * np.abs([centre - low, high - centre]), fmt="o", ms=3, lw=1, label=way
        )
    axis.axhline(50, color="0.7", linewidth=0.8)
    axis.set_xticks(range(len(levels)), levels, fontsize=7)
    axis.set_ylabel("% of decided human votes", fontsize=7)
    axis.set_xlabel("scorers' surplus of votes", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, frameon=False)
    return _png(figure)


def minority(table: pl.DataFrame) -> bytes:
    """Return histograms of what the minority table says of decided votes."""
    columns = ("confidence", "metric", "minority_score", "minority_probability", "share_against")
    figure = _figure(2.0 * len(columns), 2.2)
    for axis, column in zip(figure.subplots(1, len(columns)), columns, strict=True):
        known = table[column].drop_nulls()
        if len(known):
            axis.hist(known, bins=25, range=(0, 1), color="tab:blue")
        else:
            axis.text(0.5, 0.5, "not known", ha="center", va="center", transform=axis.transAxes, fontsize=8)
        axis.set_title(column.replace("_", " "), fontsize=8)
        axis.tick_params(labelsize=6)
    figure.axes[0].set_ylabel("votes", fontsize=7)
    return _png(figure)


def annotators(table: pl.DataFrame) -> bytes:
    """Return every annotator's reliability with interval, and agreement with the ensemble beyond expectation, sorted."""
    figure = _figure(7.0, 2.4)
    left, right = figure.subplots(1, 2)
    known = table.filter(pl.col("reliability").is_not_null()).sort("reliability")
    if len(known):
        at = np.arange(len(known))
        left.fill_between(at, 100 * known["reliability_low"], 100 * known["reliability_high"], alpha=0.25, linewidth=0)
        left.plot(at, 100 * known["reliability"], linewidth=1)
    left.set_title("% with the other raters' majority, 95 % interval", fontsize=8)
    right.plot(np.arange(len(table)), table["annotator_score"].sort(), linewidth=1)
    right.axhline(0, color="0.7", linewidth=0.8)
    right.set_title("annotator_score", fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("annotators, sorted", fontsize=7)
        axis.tick_params(labelsize=7)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
