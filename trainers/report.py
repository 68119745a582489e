"""What people look at: the leaderboard as a table and a plot, samples side by side.

Belongs here: presentation of finished tables. Does not belong here: computing them.
"""

from __future__ import annotations

import io
from typing import Any

import polars as pl
from PIL import Image, ImageDraw, ImageFont

from pipelines import plots, schemas
from pipelines.tables import Store
from trainers.sampling import BASE


def leaderboard_table(board: pl.DataFrame) -> str:
    """Return the leaderboard as aligned text: gain in standard deviations of the base and win rate, 95 % intervals."""
    header = ("model", "judge", "base", "model", "gain (sd of base)", "win rate %", "n")
    rows = [header]
    for r in board.iter_rows(named=True):
        has_gain = r["gain"] is not None
        rows.append(
            (
                r["model"],
                r["scorer"],
                f"{r['base_mean']:.3f}" if has_gain else "",
                f"{r['model_mean']:.3f}",
                f"{r['gain_sd']:+.2f} [{r['gain_sd_low']:+.2f}, {r['gain_sd_high']:+.2f}]" if has_gain else "",
                f"{100 * r['win_rate']:.1f} [{100 * r['win_rate_low']:.1f}, {100 * r['win_rate_high']:.1f}]",
                f"{r['samples']} on {r['prompts']} prompts",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def leaderboard_markdown(board: pl.DataFrame) -> str:
    """Return the leaderboard as a GitHub-flavoured Markdown table."""
    lines = ["| model | judge | gain (sd of base) | win rate % |", "|---|---|---|---|"]
    for r in board.iter_rows(named=True):
        gain = "" if r["gain"] is None else f"{r['gain_sd']:+.2f} [{r['gain_sd_low']:+.2f}, {r['gain_sd_high']:+.2f}]"
        win = f"{100 * r['win_rate']:.1f} [{100 * r['win_rate_low']:.1f}, {100 * r['win_rate_high']:.1f}]"
        lines.append(f"| {r['model']} | {r['scorer']} | {gain} | {win} |")
    return "\n".join(lines)


GRID_SIDE = 64
"""Pixels of a sample in the grid, at least: smaller ones are shown larger."""


def sample_grid(store: Store, models: list[str], prompts: int = 8, scale: int = 2) -> bytes:
    """Return a PNG: one named row per model (the base first), one column per prompt, the first seed of each."""
    rows = {}
    for model in [BASE, *models]:
        frame = store.read(schemas.SAMPLES, model).filter(pl.col("seed") == 0).sort("prompt_id").head(prompts)
        rows[model] = [Image.open(io.BytesIO(b)).convert("RGB") for b in frame["bytes"]]
    font, gap = ImageFont.load_default(12), 2
    margin = max(int(font.getlength(m)) for m in rows) + 8
    # Of one model the samples may be missing, and of an empty suite all are.
    width, height = next((p.size for row in rows.values() for p in row), (GRID_SIDE // scale,) * 2)
    side = max(width * scale, GRID_SIDE) if width < 128 else 128
    tall = side * height // width
    columns = max(1, *map(len, rows.values()))
    grid = Image.new("RGB", (margin + columns * (side + gap) - gap, len(rows) * (tall + gap) - gap), "white")
    draw = ImageDraw.Draw(grid)
    for y, (model, row) in enumerate(rows.items()):
        draw.text((margin - 6, y * (tall + gap) + tall // 2), model, "black", font, anchor="rm")
        for x, picture in enumerate(row):
            resample = Image.Resampling.NEAREST if side > width else Image.Resampling.LANCZOS
            grid.paste(picture.resize((side, tall), resample), (margin + x * (side + gap), y * (tall + gap)))
        if not row:
            draw.text((margin + 6, y * (tall + gap) + tall // 2), "no samples", "grey", font, anchor="lm")
    return _png(grid)


def leaderboard_plot(board: pl.DataFrame) -> bytes:
    """Return a PNG of every judge's gain with its interval, one colour per model."""
    gains = board.filter(pl.col("gain").is_not_null())
    judges = gains["scorer"].unique(maintain_order=True).to_list()
    models = gains["model"].unique(maintain_order=True).to_list()
    apart = min(0.22, 0.8 / max(1, len(models)))
    drawn = plots.figure(0.9 + max(0.42, 0.11 * len(models)) * max(2, len(judges)))
    axis = drawn.subplots()
    for judge in range(0, len(judges), 2):
        axis.axhspan(judge - 0.5, judge + 0.5, color="0.93")
    for m, model in enumerate(models):
        part = gains.filter(pl.col("model") == model)
        y = [judges.index(s) + (m - (len(models) - 1) / 2) * apart for s in part["scorer"]]
        # A percentile interval of few prompts may lie beside the mean itself.
        low = (part["gain_sd"] - part["gain_sd_low"]).clip(0)
        high = (part["gain_sd_high"] - part["gain_sd"]).clip(0)
        # There are ten colours, and more recipes.
        look: dict[str, Any] = {
            "fmt": "os^D"[m // 10 % 4],
            "color": f"C{m % 10}",
            "markersize": 4,
            "capsize": 2,
            "linewidth": 1,
        }
        axis.errorbar(part["gain_sd"], y, xerr=[low, high], label=model, **look)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set_yticks(range(len(judges)), judges)
    axis.set_ylim(max(1, len(judges)) - 0.5, -0.5)
    axis.tick_params(labelsize=8)
    axis.set_xlabel("paired gain over the base, standard deviations of the base (95 % interval)", fontsize=8)
    if models:
        drawn.legend(fontsize=7, loc="outside upper center", ncols=4, frameon=False)
    else:
        # There is none where all scores are imported: nothing has judged the samples.
        plots.say(axis, "no judge has scored samples of the base and of a model")
    return plots.png(drawn)


def summary_picture(store: Store, board: pl.DataFrame) -> bytes:
    """Return a PNG: samples of base and models above the leaderboard's plot."""
    models = board["model"].unique(maintain_order=True).to_list()
    parts = [Image.open(io.BytesIO(p)).convert("RGB") for p in (sample_grid(store, models), leaderboard_plot(board))]
    width = max(p.width for p in parts)
    parts = [p.resize((width, p.height * width // p.width), Image.Resampling.LANCZOS) for p in parts]
    whole = Image.new("RGB", (width, sum(p.height for p in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return _png(whole)


def training_plot(metrics: pl.DataFrame, title: str, validations: pl.DataFrame | None = None) -> bytes:
    """Return a PNG of loss and implicit accuracy by step, with their running means over a tenth of the steps.

    validations: the run's training_validations, whose values of the same kind are dots, by the labels that they judge by.
    """
    drawn = plots.figure(2.5)
    for axis, column in zip(drawn.subplots(1, 2), ("loss", "implicit_accuracy"), strict=True):
        axis.set_title(f"{title}: {column.replace('_', ' ')}", fontsize=9)
        axis.set_xlabel("optimiser step", fontsize=8)
        axis.tick_params(labelsize=8)
        smooth = metrics[column].rolling_mean(max(1, len(metrics) // 10), min_samples=1)
        axis.plot(metrics["step"], metrics[column], color="C0", linewidth=0.8, alpha=0.35)
        axis.plot(metrics["step"], smooth, color="C0", linewidth=1.5, label="training, running mean")
        judged = _validated(validations, column)
        for k, (labels, rows) in enumerate(judged.items()):
            axis.plot(rows["step"], rows["value"], ".--", color=f"C{k + 1}", linewidth=0.8, label=f"held out, {labels}")
        if not judged and metrics[column].is_null().all():
            # An objective without a reference has no margin.
            plots.say(axis, "not known")
        elif column == "implicit_accuracy":
            axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    # What one panel lacks the other may have.
    handles = {h.get_label(): h for axis in drawn.axes for h in axis.get_legend_handles_labels()[0]}
    drawn.legend(handles=list(handles.values()), fontsize=7, loc="outside lower center", ncols=4, frameon=False)
    return plots.png(drawn)


def _validated(validations: pl.DataFrame | None, column: str) -> dict[str, pl.DataFrame]:
    """Return labels -> (step, value) of a column's validations."""
    if validations is None:
        return {}
    mine = validations.filter(pl.col("metric").str.starts_with(f"{column}_")).sort("step")
    names = mine["metric"].unique(maintain_order=True).sort()
    return {n.removeprefix(f"{column}_"): mine.filter(pl.col("metric") == n) for n in names}


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
