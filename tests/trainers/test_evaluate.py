import io

import numpy as np
import polars as pl
import pytest
from PIL import Image

from pipelines import identity, images, schemas
from pipelines.config import ScorerConfig, small_world
from pipelines.scoring import scorer as scoring
from pipelines.scoring.pictures import Picture
from pipelines.tables import Store
from trainers import report
from trainers.evaluate import HELD_OUT, bootstrap_by_prompt, compare, evaluate, leaderboard, promises


def evaluations(scores, scorer="pickscore"):
    rows = [(f"p{i}", s, scorer, float(v)) for i, row in enumerate(scores) for s, v in enumerate(row)]
    return pl.DataFrame(rows, schema=["prompt_id", "seed", "scorer", "score"], orient="row")


def test_gain_and_win_rate_are_the_ones_worked_out_by_hand():
    base, model = evaluations([[0, 2], [4, 6]]), evaluations([[1, 2], [3, 9]])
    (row,) = compare(base, model, resamples=200)
    assert row["gain"] == pytest.approx((1 + 0 - 1 + 3) / 4)
    assert row["win_rate"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert row["gain_sd"] == pytest.approx(0.75 / np.std([0, 2, 4, 6], ddof=1))
    assert (row["samples"], row["prompts"]) == (4, 2)
    assert row["gain_low"] <= row["gain"] <= row["gain_high"]


def test_a_model_equal_to_the_base_gains_nothing_and_wins_half():
    base = evaluations(np.arange(12).reshape(6, 2))
    (row,) = compare(base, base, resamples=200)
    assert (row["gain"], row["gain_low"], row["gain_high"], row["win_rate"]) == (0, 0, 0, 0.5)


def test_models_sampled_on_other_prompts_are_not_compared():
    with pytest.raises(ValueError, match="sample both again"):
        compare(evaluations([[1, 2]]), evaluations([[1, 2], [3, 4]]), resamples=200)


def test_the_bootstrap_resamples_prompts_with_all_their_rows():
    # Rows of a prompt are equal: with prompts as units the mean's standard error is that of 40 values, not of 400.
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=40), 10)
    means = bootstrap_by_prompt(values[:, None], np.repeat(np.arange(40), 10), resamples=4000)[:, 0]
    assert means.std() == pytest.approx(values.std() / np.sqrt(40), rel=0.1)


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        values = rng.normal(size=(60, 1))
        low, high = np.quantile(bootstrap_by_prompt(values, np.arange(60), 400, seed=trial), [0.025, 0.975])
        covered += low <= 0 <= high
    assert 180 <= covered <= 198


def board(gain_sd=0.3, gain_sd_low=0.1, fidelity=-0.01, accuracy_low=0.6):
    rows = [
        ("diffusion_dpo", "taste:majority", 0.2, gain_sd, gain_sd_low, 0.9),
        ("diffusion_dpo", "fidelity", fidelity, 0.0, 0.0, 0.5),
        ("diffusion_dpo", HELD_OUT, None, None, None, accuracy_low),
    ]
    return pl.DataFrame(
        rows, schema=["model", "scorer", "gain", "gain_sd", "gain_sd_low", "win_rate_low"], orient="row"
    )


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"gain_sd": 0.19}, [0]),
        ({"gain_sd_low": -0.01}, [0]),
        ({"fidelity": -0.06}, [1]),
        ({"accuracy_low": 0.5}, [2]),
    ],
)
def test_a_leaderboard_that_does_not_show_what_the_small_world_promises_is_told_so(change, broken):
    assert [i for i, (_, holds) in enumerate(promises(board(**change))) if not holds] == broken


# --- imported scores -------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(tmp_path):
    """A store with samples of the base and of a model, held-out pairs of the model, and a file of imported scores."""
    rng = np.random.default_rng(0)
    store = Store(str(tmp_path / "store"))
    for model in ("base", "diffusion_dpo"):
        rows = []
        for prompt in ("a red square", "a blue circle"):
            for seed in (0, 1):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
                data = buffer.getvalue()
                rows.append((identity.prompt_id(prompt), prompt, seed, identity.image_id_of_bytes(data)[0], data))
        frame = pl.DataFrame(rows, schema=schemas.SAMPLES.polars_schema, orient="row")
        store.write(schemas.SAMPLES, frame, partition=model, made_from="test")
    held_out = {
        "pair_id": ["a", "b"],
        "prompt_id": ["p", "q"],
        "margin": [1.0, -1.0],
        "accuracy": [1.0, 0.0],
        "draws": 1,
    }
    store.write(schemas.HELD_OUT, pl.DataFrame(held_out), partition="diffusion_dpo", made_from="test")
    pl.DataFrame({"prompt": ["p"], "image_id": ["0" * 32], "score": [1.0]}).write_parquet(tmp_path / "lab.parquet")
    return store


@pytest.fixture
def imported(tmp_path):
    return ScorerConfig(name="lab", kind="imported", checkpoint=str(tmp_path / "lab.parquet"))


def config_of(tmp_path, *scorers):
    return small_world(tmp_path).model_copy(update={"world": None, "scorers": scorers})


def test_imported_scorers_judge_no_samples_and_leave_the_evaluation_as_it_is(sampled, imported, tmp_path):
    clip = small_world(tmp_path).scorers[1].model_copy(update={"batch_size": 3})
    messages = []
    built = evaluate(sampled, config_of(tmp_path, imported, clip), "base", "cpu", messages.append)
    table = sampled.read(schemas.EVALUATIONS, "base")
    assert table["scorer"].unique().to_list() == ["clip"]
    assert messages[0] == "evaluation of base: lab is left out: its scores are imported, samples have none"
    assert evaluate(sampled, config_of(tmp_path, clip), "base", "cpu").is_reused
    assert not built.is_reused
    loaded = scoring.load(clip)
    samples = sampled.read(schemas.SAMPLES, "base").join(table, on=["prompt_id", "seed"])
    for row in samples.iter_rows(named=True):
        alone = loaded.score([loaded.prepare(Picture(images.decode(row["bytes"])))], [row["prompt"]])[0]
        assert row["score"] == pytest.approx(float(alone), abs=1e-5)


def test_without_any_judge_of_samples_the_leaderboard_has_the_held_out_pairs(sampled, imported, tmp_path):
    config = config_of(tmp_path, imported)
    for model in ("base", "diffusion_dpo"):
        assert evaluate(sampled, config, model, "cpu").manifest.rows == 0
    leaderboard(sampled, config, ["diffusion_dpo"])
    board = sampled.read(schemas.LEADERBOARD)
    assert board["scorer"].to_list() == [HELD_OUT]
    assert HELD_OUT in report.leaderboard_table(board)
    assert HELD_OUT in report.leaderboard_markdown(board)
    picture = Image.open(io.BytesIO(report.summary_picture(sampled, board)))
    assert picture.width > 100
