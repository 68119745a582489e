"""The state of a small trained store, and after what can happen to it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.config import EvaluationConfig, PromptSuiteConfig, TrainingConfig, ValidationConfig
from pipelines.tables import Store
from trainers import status
from trainers.steps import Training

RECIPES = ("diffusion_dpo", "smpo")
QUICK = {
    "training": TrainingConfig(
        recipes=RECIPES, steps=2, batch_size=4, device="cpu", validation=ValidationConfig(every=0)
    ),
    "evaluation": EvaluationConfig(prompts=2, seeds=1, steps=2, bootstrap=100),
}
ALL = [
    *("latents", "prompt_embeddings", "trained/diffusion_dpo", "trajectories/smpo", "trained/smpo"),
    *(f"{table}/{model}" for model in ("base", *RECIPES) for table in ("samples", "evaluations")),
    *("held_out/diffusion_dpo", "held_out/smpo", "leaderboard"),
]


def make(config, recipes=RECIPES):
    """Train and evaluate as the command line does; return what was made anew."""
    training = Training(Store(config.store_location), config, lambda message: None)
    made = {f"trained/{r}": training.train(r).metrics for r in recipes}
    for model in ("base", *recipes):
        made[f"samples/{model}"] = training.samples(model)
        made[f"evaluations/{model}"] = training.evaluations(model)
    made |= {f"held_out/{r}": training.held_out(r) for r in recipes}
    made["leaderboard"] = training.leaderboard()
    return {asset for asset, built in made.items() if not built.is_reused}


def state(config):
    return {line.asset: line for line in status.lines(Store(config.store_location), config)}


def not_current(config):
    return [asset for asset, line in state(config).items() if not line.is_current]


@pytest.fixture
def config(cached_config):
    return cached_config.model_copy(update=QUICK)


@pytest.fixture(scope="module")
def _whole(_cached, tmp_path_factory):
    home = tmp_path_factory.mktemp("trained") / "home"
    shutil.copytree(_cached.home, home)
    config = _cached.model_copy(update={"home": str(home), **QUICK})
    make(config)
    return config


@pytest.fixture
def whole(_whole, tmp_path):
    """A configuration whose caches, models and evaluations all lie there, to be written to."""
    shutil.copytree(_whole.home, tmp_path / "home")
    return _whole.model_copy(update={"home": str(tmp_path / "home")})


def with_options(config, part, **options):
    return config.model_copy(update={part: getattr(config, part).model_copy(update=options)})


def test_a_store_with_caches_alone_misses_models_and_what_is_made_from_them(config):
    found = state(config)
    assert list(found) == ALL
    assert not_current(config) == ALL[2:]
    assert found["latents"].done == found["latents"].expected > 5
    assert found["trained/smpo"].because == "not made yet"
    assert found["trained/smpo"].press == "materialize trained/smpo (`python -m trainers.train train --recipe smpo`)"
    assert found["samples/smpo"].because == "trained/smpo is not current"


def test_everything_is_current_after_everything_was_made(whole):
    assert not_current(whole) == []
    assert make(whole) == set()


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("training", {"seed": 1}),
        ("evaluation", {"guidance": 2.0}),
        ("evaluation", {"bootstrap": 200}),
    ],
)
def test_under_other_options_exactly_what_would_be_made_again_is_not_current(whole, part, options):
    config = with_options(whole, part, **options)
    # Of trajectories the run's end is known, and that of another run's lie there.
    told = set(not_current(config)) - {"trajectories/smpo"}
    assert told == make(config) > set()
    assert not_current(config) == []


def test_a_shard_whose_latents_are_gone_is_missing_and_what_was_trained_on_them_is_old(whole):
    store = Store(whole.store_location)
    gone = store.manifests("latents")[0].partition
    Path(store.data_path("latents", gone)).unlink()
    found = state(whole)
    assert found["latents"].missing == (gone.partition("/")[2],)
    assert "older than latents" in found["trained/diffusion_dpo"].because
    assert found["trained/diffusion_dpo"].stale == ("all",)
    assert found["prompt_embeddings"].is_current


def test_latents_are_old_when_a_recipe_asks_for_mirrored_ones(whole, monkeypatch):
    monkeypatch.setattr(Training, "mirrors", lambda self, recipes=(): True)
    line = state(whole)["latents"]
    assert (line.done, len(line.stale)) == (0, line.expected)


def test_a_model_that_was_removed_is_told_with_its_folder(whole):
    run = Training(Store(whole.store_location), whole, lambda message: None).run("smpo")
    shutil.rmtree(run.folder / "model")
    found = state(whole)
    assert str(run.folder) in found["trained/smpo"].because
    assert found["evaluations/smpo"].stale == ("all",)
    assert found["samples/base"].is_current
    assert found["samples/diffusion_dpo"].is_current


def test_other_weights_of_a_scorer_make_evaluations_old_and_samples_not(whole, tmp_path):
    folder = shutil.copytree(whole.scorers[1].checkpoint, tmp_path / "clip")
    with (folder / "config.json").open("a") as file:
        file.write("\n")
    changed = whole.scorers[1].model_copy(update={"checkpoint": str(folder)})
    config = whole.model_copy(update={"scorers": (whole.scorers[0], changed, *whole.scorers[2:])})
    assert not_current(config) == [*(f"evaluations/{m}" for m in ("base", *RECIPES)), "leaderboard"]


def test_a_suite_that_cannot_be_read_is_told(whole, tmp_path):
    suite = PromptSuiteConfig(name="gone", file=str(tmp_path / "gone.txt"))
    config = with_options(whole.model_copy(update={"prompt_suites": (suite,)}), "evaluation", suite="gone")
    assert "gone.txt" in state(config)["samples/base"].because


def test_a_backbone_whose_files_are_missing_is_told_in_every_line(whole, tmp_path):
    backbone = whole.backbones[0].model_copy(update={"checkpoint": str(tmp_path / "gone")})
    found = state(whole.model_copy(update={"backbones": (backbone,)}))
    assert list(found) == ALL
    assert all("gone" in line.because and not line.is_current for line in found.values())


def test_an_empty_store_has_a_line_for_everything(whole, tmp_path):
    config = whole.model_copy(update={"store": str(tmp_path / "empty")})
    assert not_current(config) == ALL


def test_the_module_is_imported_without_torch():
    code = "import sys, trainers.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
