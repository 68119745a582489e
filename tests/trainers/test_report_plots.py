"""Pictures of a run and of a leaderboard: small, also of nothing, and of what they say that they show."""

import io

import numpy as np
import polars as pl
import pytest
from PIL import Image

from pipelines import plots, schemas
from trainers import report


def assert_small(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.width == plots.PIXELS_WIDE
    assert len(png) < 50_000


# --- a run -------------------------------------------------------------------------------------------------------------


def metrics_of(steps):
    rng = np.random.default_rng(0)
    numbers = {c: rng.random(steps) for c in schemas.TRAINING_METRICS.polars_schema}
    frame = pl.DataFrame({**numbers, "step": np.arange(1, steps + 1)})
    return frame.select(pl.col(c).cast(t) for c, t in schemas.TRAINING_METRICS.polars_schema.items())


def validations_of(*metrics):
    rows = [(step, metric, 0.1 * step + 0.05 * k, 8) for step in (0, 5) for k, metric in enumerate(metrics)]
    return pl.DataFrame(rows, schema=schemas.TRAINING_VALIDATIONS.polars_schema, orient="row")


@pytest.mark.parametrize("steps", [0, 1, 2_000])
def test_curves_of_no_step_of_one_and_of_many_are_small(steps):
    assert_small(report.training_plot(metrics_of(steps), "diffusion_dpo"))


@pytest.mark.parametrize("steps", [0, 20])
def test_curves_of_an_objective_without_implicit_accuracy_are_small(steps):
    metrics = metrics_of(steps).with_columns(implicit_accuracy=pl.lit(None, pl.Float64))
    assert_small(report.training_plot(metrics, "sft"))


def test_curves_show_loss_and_implicit_accuracy_alone():
    metrics = metrics_of(20)
    shown = report.training_plot(metrics, "smpo")
    for column in metrics.columns:
        other = report.training_plot(metrics.with_columns(pl.col(column) * 0.5), "smpo")
        assert (other != shown) == (column in ("step", "loss", "implicit_accuracy")), column


def test_validations_of_loss_and_accuracy_are_shown_beside_them():
    metrics = metrics_of(20)
    shown = report.training_plot(metrics, "smpo")
    for none in (validations_of(), validations_of("median_score")):
        assert report.training_plot(metrics, "smpo", none) == shown
    judged = validations_of("loss_human", "implicit_accuracy_human", "implicit_accuracy_minority")
    with_them = report.training_plot(metrics, "smpo", judged)
    assert_small(with_them)
    assert with_them != shown
    assert report.training_plot(metrics, "smpo", judged.reverse()) == with_them


# --- a leaderboard -----------------------------------------------------------------------------------------------------


def board_of(models, judges):
    rows = [(m, j) for m in models for j in judges]
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({c: rng.random(len(rows)) for c in schemas.LEADERBOARD.polars_schema})
    frame = frame.with_columns(
        model=pl.Series([m for m, _ in rows], dtype=pl.String),
        scorer=pl.Series([j for _, j in rows], dtype=pl.String),
        gain_sd_low=pl.col("gain_sd") - 0.1,
        gain_sd_high=pl.col("gain_sd") + 0.1,
    )
    return frame.select(pl.col(c).cast(t) for c, t in schemas.LEADERBOARD.polars_schema.items())


@pytest.mark.parametrize(("models", "judges"), [(0, 0), (1, 1), (4, 8), (13, 8)])
def test_gains_of_nothing_of_one_model_and_of_many_are_small(models, judges):
    board = board_of([f"a_recipe_{i}" for i in range(models)], [f"judge_{i}" for i in range(judges)])
    assert_small(report.leaderboard_plot(board))


def test_an_interval_beside_its_mean_is_drawn():
    board = board_of(["smpo"], ["clip"]).with_columns(gain_sd_low=pl.col("gain_sd") + 0.1)
    assert_small(report.leaderboard_plot(board))


def test_a_leaderboard_of_held_out_pairs_alone_has_no_gains_to_show():
    board = board_of(["smpo"], ["held-out pairs"]).with_columns(gain=pl.lit(None, pl.Float64))
    assert report.leaderboard_plot(board) == report.leaderboard_plot(schemas.LEADERBOARD.empty())


# --- samples -----------------------------------------------------------------------------------------------------------


def put_samples(store, model, colours, size=(32, 32)):
    rows = []
    for i, colour in enumerate(colours):
        for seed in (0, 1):
            buffer = io.BytesIO()
            # The second seed is not shown.
            Image.new("RGB", size, colour if seed == 0 else "black").save(buffer, "PNG")
            rows.append((f"{i:032x}", f"prompt {i}", seed, f"{i}", buffer.getvalue()))
    frame = pl.DataFrame(rows, schema=schemas.SAMPLES.polars_schema, orient="row")
    store.write(schemas.SAMPLES, frame, partition=model, made_from="x")


def test_samples_stand_in_a_row_per_model_and_a_column_per_prompt(store):
    put_samples(store, "base", ["red", "lime"])
    put_samples(store, "smpo", ["blue", "yellow"])
    grid = Image.open(io.BytesIO(report.sample_grid(store, ["smpo"]))).convert("RGB")
    side = report.GRID_SIDE
    left = grid.width - 2 * side - 2
    # Names stand to the left of the pictures.
    assert 0 < left < 100
    assert len(grid.crop((0, 0, left, side)).getcolors()) > 2
    shown = [
        grid.getpixel((left + x * (side + 2) + side // 2, y * (side + 2) + side // 2)) for y in (0, 1) for x in (0, 1)
    ]
    assert shown == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def test_more_prompts_than_fit_the_pane_are_left_out(store):
    put_samples(store, "base", ["red"] * 40)
    grid = Image.open(io.BytesIO(report.sample_grid(store, [])))
    assert grid.width <= plots.PIXELS_WIDE


def test_samples_that_are_no_squares_keep_their_proportions(store):
    put_samples(store, "base", ["red"], size=(64, 32))
    grid = Image.open(io.BytesIO(report.sample_grid(store, [])))
    assert grid.height == 64


def test_a_model_without_samples_has_a_row_that_says_so(store):
    put_samples(store, "base", ["red", "lime"])
    put_samples(store, "smpo", [])
    grid = Image.open(io.BytesIO(report.sample_grid(store, ["smpo"])))
    assert grid.height == 2 * report.GRID_SIDE + 2
    put_samples(store, "base", [])
    assert Image.open(io.BytesIO(report.sample_grid(store, ["smpo"]))).size[1] == 2 * report.GRID_SIDE + 2


def test_the_summary_has_samples_and_gains(store):
    put_samples(store, "base", ["red"])
    put_samples(store, "smpo", ["blue"])
    board = board_of(["smpo"], ["fidelity", "clip"])
    shown = report.summary_picture(store, board)
    assert shown != report.summary_picture(store, board.with_columns(pl.col("gain_sd") * 0.5))
    put_samples(store, "smpo", ["lime"])
    assert shown != report.summary_picture(store, board)
