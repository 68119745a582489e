"""Plots of the label tables, as PNG: what people would rather look at than read.

Belongs here: drawing tables that are there. Does not belong here: pages of single pairs (`pairs_page`), numbers (`labels`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pipelines.labels.calibration import ENSEMBLE
from pipelines.labels.consensus import AGGREGATIONS, ALL_LEVELS
from pipelines.plots import figure, png, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS_IN_A_ROW = 3


def reliability(table: pl.DataFrame) -> bytes:
    """Return the reliability curves, raw and calibrated, one panel per scorer; the area of a dot is its share of votes."""
    names = [*sorted(set(table["scorer"]) - {ENSEMBLE}), ENSEMBLE]
    drawn, panels = _panels(len(names), 1.9)
    for axis, name in zip(panels, names, strict=True):
        axis.plot([0.5, 1], [0.5, 1], color="0.7", linewidth=0.8)
        for stage, colour in (("raw", "tab:orange"), ("calibrated", "tab:blue")):
            rows = table.filter(pl.col("scorer") == name, pl.col("stage") == stage).sort("bin")
            axis.plot(rows["probability"], rows["agreement"], color=colour, linewidth=0.8, label=stage)
            size = 80 * rows["votes"] / max(1, rows["votes"].sum())
            axis.scatter(rows["probability"], rows["agreement"], s=size, color=colour)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        if not (table["scorer"] == name).any():
            say(axis, "no votes on scored pairs")
    drawn.supxlabel("probability of the favoured image", fontsize=8)
    drawn.supylabel("share of people who chose it", fontsize=8)
    panels[0].legend(fontsize=7, frameon=False)
    return png(drawn)


def consensus(table: pl.DataFrame) -> bytes:
    """Return the agreement with decided human votes by aggregation and by the scorers' agreement, with 95 % intervals."""
    levels = [ALL_LEVELS, *sorted(set(table["level"]) - {ALL_LEVELS})]
    drawn = figure(2.7)
    axis = drawn.subplots()
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
    if table["accuracy"].is_not_null().any():
        axis.legend(fontsize=7, frameon=False)
    else:
        say(axis, "no decided votes on labelled pairs")
    return png(drawn)


def minority(table: pl.DataFrame) -> bytes:
    """Return histograms of what the minority table says of decided votes."""
    columns = ("confidence", "metric", "minority_score", "minority_probability", "share_against")
    drawn, panels = _panels(len(columns), 1.6, sharey=False)
    for axis, column in zip(panels, columns, strict=True):
        known = table[column].drop_nulls()
        axis.set_title(column.replace("_", " "), fontsize=8)
        axis.tick_params(labelsize=7)
        if len(known):
            axis.hist(known, bins=25, range=(0, 1), color="tab:blue")
        else:
            say(axis, "not known")
    drawn.supylabel("votes", fontsize=8)
    return png(drawn)


def annotators(table: pl.DataFrame) -> bytes:
    """Return every annotator's reliability with interval, and agreement with the ensemble beyond expectation, sorted."""
    drawn = figure(2.4)
    left, right = drawn.subplots(1, 2)
    for axis in (left, right):
        axis.set_xlabel("annotators, sorted", fontsize=7)
        axis.tick_params(labelsize=7)
    known = table.filter(pl.col("reliability").is_not_null()).sort("reliability")
    if len(known):
        at = np.arange(len(known))
        left.fill_between(at, 100 * known["reliability_low"], 100 * known["reliability_high"], alpha=0.25, linewidth=0)
        left.plot(at, 100 * known["reliability"], linewidth=1)
    else:
        say(left, "no vote has other raters to compare it with")
    left.set_title("% with the other raters' majority, 95 % interval", fontsize=8)
    right.plot(np.arange(len(table)), table["annotator_score"].sort(), linewidth=1)
    right.axhline(0, color="0.7", linewidth=0.8)
    right.set_title("annotator_score", fontsize=8)
    return png(drawn)


def _panels(count: int, height: float, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels in rows, each row so high, in inches."""
    wide = min(_PANELS_IN_A_ROW, count)
    deep = -(-count // wide)
    drawn = figure(0.4 + height * deep)
    panels = drawn.subplots(deep, wide, sharex=sharey, sharey=sharey, squeeze=False).ravel()
    for axis in panels[count:]:
        axis.set_axis_off()
    return drawn, list(panels[:count])
