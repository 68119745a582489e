import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import polars as pl
import pytest

from pipelines import schemas
from pipelines.config import ConfigError
from pipelines.curation import HumanPolicy
from pipelines.tables import Store
from trainers import data, loop
from trainers.checkpoints import CheckpointFileError
from trainers.plan import Plan, describe, plan
from trainers.recipes import recipe
from trainers.steps import Training


def configured(config, **training):
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def run_of(config, rule, start=None):
    store = Store(config.store_location)
    rule = recipe(rule) if isinstance(rule, str) else rule
    return loop.Run(store, config, rule, Training(store, config, lambda message: None).backbone, start)


def files(folder):
    """Everything that lies in a folder, and when it was last written."""
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    folders = {root for root, _, _ in os.walk(folder)}
    return {str(f): f.stat().st_mtime_ns for f in found}, folders


@pytest.fixture(scope="module")
def untouched(_cached):
    """The plan of a run of smpo on the shared store, measured; and the store's files before it."""
    before = files(_cached.home)
    return plan(run_of(configured(_cached, micro_batch=16), "smpo")), before, _cached


def test_planning_writes_nothing(untouched):
    _, before, config = untouched
    assert files(config.home) == before
    assert not config.runs_folder.exists()


def test_pairs_and_reasons_add_up_to_the_preferences_of_each_split(untouched):
    found, _, config = untouched
    counted = dict(Store(config.store_location).read(schemas.PREFERENCES).group_by("split").len().iter_rows())
    assert {s.name: s.preferences for s in found.splits} == counted
    for split in found.splits:
        assert split.pairs + sum(count for _, count in split.excluded) == counted[split.name]


def test_reasons_are_those_of_the_policy_the_most_frequent_first(cached_config):
    found = plan(run_of(cached_config, "diffusion_dpo"), measure=False)
    frame = data.decided(Store(cached_config.store_location), recipe("diffusion_dpo"), ["test"]).collect()
    reasons = dict(frame["excluded_because"].drop_nulls().value_counts().iter_rows())
    test = next(s for s in found.splits if s.name == "test")
    assert dict(test.excluded) == reasons
    counts = [count for _, count in test.excluded]
    assert counts == sorted(counts, reverse=True)
    assert f"- {counts[0]}  {test.excluded[0][0]}" in describe(found)


def test_epochs_are_pairs_of_all_steps_over_the_training_pairs(untouched):
    found, _, config = untouched
    pairs = len(data.training_pairs(Store(config.store_location), recipe("smpo")))
    assert found.pairs == pairs
    assert found.epochs == found.steps * found.batch_size / pairs
    assert (found.processes, found.accumulation, found.micro_batch) == (1, 4, 16)


def test_the_configurations_numbers_stand_beside_the_recipes(untouched):
    found, _, config = untouched
    numbers = {n.name: n for n in found.numbers}
    assert config.training.steps == 6
    assert (numbers["steps"].value, numbers["steps"].note) == (6, "training.steps; the recipe has 60")
    assert (numbers["batch_size"].value, numbers["batch_size"].note) == (64, "")
    assert numbers["objective.gamma"].value == 10.0
    assert numbers["noising.mode"].value == "consistent"
    assert (numbers["training.precision"].value, numbers["training.precision"].note) == ("fp32", "auto on cpu")


def test_the_duration_is_measured_and_multiplied_out(untouched):
    found, _, _ = untouched
    assert found.seconds.micro_batch > 0
    parts = {d.what: d for d in found.durations}
    assert set(parts) == {"trajectories", "training", "validation"}
    step = 4 * found.seconds.micro_batch + found.seconds.step
    assert parts["training"].seconds == pytest.approx(6 * step)
    assert min(d.seconds for d in found.durations) > 0


def test_a_plan_is_plain_values_and_its_text_has_every_part(untouched):
    found, _, _ = untouched
    assert isinstance(found, Plan)
    assert json.loads(json.dumps(asdict(found)))["recipe"] == "smpo"
    text = describe(found)
    for title in ("run", "numbers", "pairs", "memory per process", "caches", "cost"):
        assert f"\n\n{title}\n" in text
    numbers = text.split("\n\nnumbers\n")[1].split("\n\n")[0].splitlines()
    # Values stand below each other.
    assert len({len(line) - len(line[2:].split(" ", 1)[1].lstrip()) for line in numbers if len(line.split()) > 1}) == 1
    assert "steps                              6  (training.steps; the recipe has 60)" in text


# --- caches ----------------------------------------------------------------------------------------------------------


def test_wanted_trajectories_are_those_that_the_run_makes_and_then_none_is_missing(cached_config):
    run = run_of(cached_config, "smpo")
    before = {c.name: c for c in plan(run, measure=False).caches}
    assert before["trajectories"].present == 0
    trainer = loop.Trainer(run, lambda message: None)
    trainer.start()
    trainer.close()
    made = run.store.scan(schemas.TRAJECTORIES).select("image_id", "prompt_id", "is_flipped", "level").collect()
    assert before["trajectories"].wanted == len(made.unique()) == len(made)
    after = plan(run, measure=False)
    trajectories = next(c for c in after.caches if c.name == "trajectories")
    assert (trajectories.missing, trajectories.stored) == (0, len(made))
    # Copies are made of whole caches, so that the copy is known to the byte but for its keys.
    copies = after.scratch
    assert copies.present == pytest.approx(copies.wanted, rel=0.25)
    arrays = (f for f in (Path(cached_config.home) / "scratch").rglob("*") if f.is_file() and f.suffix != ".parquet")
    assert sum(f.stat().st_size for f in arrays) == copies.wanted


def test_rows_of_the_caches_are_what_the_pairs_need(cached_config):
    found = {c.name: c for c in plan(run_of(cached_config, "diffusion_dpo"), measure=False).caches}
    pairs = data.training_pairs(Store(cached_config.store_location), recipe("diffusion_dpo"))
    images = pl.concat([pairs["winner_id"], pairs["loser_id"]]).n_unique()
    assert (found["latents"].wanted, found["latents"].missing) == (images, 0)
    # Its prompts, and the empty one for the dropped.
    assert found["prompt_embeddings"].wanted == pairs["prompt_id"].n_unique() + 1
    assert found["prompt_embeddings"].missing == 0
    assert "trajectories" not in found


def test_mirrored_latents_are_missing_until_they_are_cached(cached_config):
    rule = replace(recipe("diffusion_dpo"), flip=True)
    found = plan(run_of(cached_config, rule), measure=False)
    latents = next(c for c in found.caches if c.name == "latents")
    assert latents.wanted == 2 * latents.present
    assert f"to be made: {latents.missing}" in describe(found)


def test_trajectories_of_a_model_that_is_not_trained_yet_are_all_missing(cached_config):
    rule = replace(recipe("smpo"), start="sft")
    found = plan(run_of(cached_config, rule), measure=False)
    trajectories = next(c for c in found.caches if c.name == "trajectories")
    assert trajectories.present == 0 < trajectories.wanted
    assert "sft, not trained yet" in describe(found)


# --- runs that are there ---------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_run_that_was_killed_is_planned_from_its_checkpoint_and_a_finished_one_needs_nothing(cached_config):
    config = configured(
        cached_config, batch_size=8, validation=cached_config.training.validation.model_copy(update={"every": 0})
    )
    run = run_of(config, "diffusion_dpo")

    def kill(row):
        if row.get("step") == 3:
            raise Killed

    with pytest.raises(Killed):
        loop.train(run, lambda message: None, kill)
    found = plan(run)
    assert found.checkpoint.steps_done == 2
    assert [d.because.split(" at ")[0] for d in found.durations] == ["4 steps"]
    assert "continues after step 2" in describe(found)
    assert found.checkpoint.bytes == pytest.approx(found.checkpoint_bytes, rel=0.1)

    loop.train(run, lambda message: None)
    done = plan(run)
    assert done.finished == str(run.model_folder)
    assert (done.checkpoint, done.durations) == (None, ())
    text = describe(done)
    assert "finished, nothing to train" in text
    assert "not measured: nothing to train" in text


def test_a_damaged_checkpoint_is_refused_as_training_would(cached_config):
    run = run_of(cached_config, "diffusion_dpo")
    run.folder.mkdir(parents=True)
    (run.folder / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointFileError, match=r"checkpoint\.pt.*remove it"):
        plan(run, measure=False)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_and_not_tried(cached_config, monkeypatch):
    monkeypatch.setattr("trainers.costs.available_bytes", lambda device: 2**20)
    found = plan(run_of(cached_config, "diffusion_dpo"))
    assert found.seconds is None
    text = describe(found)
    assert "lower training.micro_batch" in text
    assert "that are free on cpu" in text.split("not measured: ")[1]


def test_pairs_that_cannot_be_shared_out_are_refused(cached_config):
    with pytest.raises(ConfigError, match=r"training\.batch_size"):
        plan(run_of(configured(cached_config, processes=3), "diffusion_dpo"), measure=False)


def test_pairs_that_the_objectives_statistics_are_over_are_told(cached_config):
    config = configured(cached_config, processes=2, micro_batch=8)
    found = plan(run_of(config, "adaptive_dpo_online"), measure=False)
    assert (found.accumulation, found.statistics_over) == (4, 16)
    assert "2 processes x 4 forwards x 8, the objective's statistics over 16" in describe(found)
    assert plan(run_of(config, "diffusion_dpo"), measure=False).statistics_over is None


def test_an_inversion_in_every_step_is_counted_in(cached_config):
    rule = recipe("smpo_released")
    online = plan(run_of(cached_config, rule), measure=False)
    # On average over all timesteps, two forwards per level: 1 level below 1, 5 above 600.
    levels = [1 + sum(t > low for low in (1, 201, 401, 601)) if t > 0 else 1 for t in range(1000)]
    assert online.forwards == pytest.approx(2 * sum(levels) / 1000, abs=0.01)
    assert "trajectories" not in {c.name for c in online.caches}
    assert f"{online.forwards:.3g} forwards per latent" in describe(online)


@dataclass(frozen=True)
class NobodyAsked:
    """A policy that excludes every pair."""

    name: str = "nobody_asked"

    def apply(self, preferences):
        nobody = pl.lit("nobody is asked")
        return (
            HumanPolicy()
            .apply(preferences)
            .with_columns(target_label_0=pl.lit(None, pl.Float64), excluded_because=nobody)
        )


def test_a_policy_that_leaves_no_pair_is_planned_and_says_so(cached_config):
    found = plan(run_of(cached_config, replace(recipe("diffusion_dpo"), policy=NobodyAsked())))
    assert (found.pairs, found.epochs) == (0, None)
    assert "there is nothing to train on" in describe(found)
    assert found.not_measured == "no pairs to train on"
