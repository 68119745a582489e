"""What people look at: the leaderboard as a table and a plot, samples side by side.

Belongs here: presentation of finished tables. Does not belong here: computing them.
"""

from __future__ import annotations

import io

import polars as pl
from PIL import Image

from pipelines import schemas
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


def sample_grid(store: Store, models: list[str], prompts: int = 12, scale: int = 2) -> bytes:
    """Return a PNG: one row per model (the base first), one column per prompt, the first seed of each."""
    rows = []
    for model in [BASE, *models]:
        frame = store.read(schemas.SAMPLES, model).filter(pl.col("seed") == 0).sort("prompt_id").head(prompts)
        rows.append([Image.open(io.BytesIO(b)).convert("RGB") for b in frame["bytes"]])
    width, height = rows[0][0].size
    side = max(width * scale, 64) if width < 128 else 128
    gap = 2
    grid = Image.new("RGB", (len(rows[0]) * (side + gap) - gap, len(rows) * (side + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            resample = Image.Resampling.NEAREST if side > width else Image.Resampling.LANCZOS
            grid.paste(picture.resize((side, side * height // width), resample), (x * (side + gap), y * (side + gap)))
    return _png(grid)


def leaderboard_plot(board: pl.DataFrame) -> bytes:
    """Return a PNG of every judge's gain with its interval, one colour per model."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    gains = board.filter(pl.col("gain").is_not_null())
    judges = gains["scorer"].unique(maintain_order=True).to_list()
    models = gains["model"].unique(maintain_order=True).to_list()
    # There is none where all scores are imported: nothing has judged the samples.
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.42 * max(2, len(judges))), dpi=90)
    for m, model in enumerate(models):
        part = gains.filter(pl.col("model") == model)
        y = [judges.index(s) + (m - (len(models) - 1) / 2) * 0.22 for s in part["scorer"]]
        low = (part["gain_sd"] - part["gain_sd_low"]).to_list()
        high = (part["gain_sd_high"] - part["gain_sd"]).to_list()
        axis.errorbar(part["gain_sd"].to_list(), y, xerr=[low, high], fmt="o", capsize=3, label=model)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set_yticks(range(len(judges)), judges)
    axis.invert_yaxis()
    axis.set_xlabel("paired gain over the base, standard deviations of the base (95 % interval)")
    if models:
        axis.legend(loc="best", fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


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


def training_plot(metrics: pl.DataFrame, title: str) -> bytes:
    """Return a PNG of loss and implicit accuracy by step."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 2.4), dpi=80)
    for axis, column in zip(axes, ("loss", "implicit_accuracy"), strict=True):
        axis.plot(metrics["step"], metrics[column])
        axis.set_xlabel("optimiser step")
        axis.set_title(f"{title}: {column.replace('_', ' ')}", fontsize=9)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
