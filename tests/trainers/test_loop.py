import dataclasses
import json
import math
import shutil

import polars as pl
import pytest
import torch

from pipelines import schemas
from pipelines.tables import Store, StoreError
from trainers import data, loop
from trainers.recipes import RECIPES, recipe
from trainers.steps import Training


class StopHere(Exception):
    """Stands for a kill between two steps."""


def training_of(config, progress=lambda message: None):
    return Training(Store(config.store_location), config, progress)


def unet_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def stop_after(step):
    def progress(message):
        if message.startswith("{") and json.loads(message)["step"] == step:
            raise StopHere

    return progress


def test_the_first_loss_is_log_two_and_training_lowers_it(cached_config):
    training = training_of(cached_config)
    training.train("diffusion_dpo")
    metrics = training.store.read(schemas.TRAINING_METRICS, "diffusion_dpo")
    assert metrics["step"].to_list() == [1, 2, 3, 4, 5, 6]
    assert metrics["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"][0] == 0
    assert metrics["implicit_accuracy"][0] == 0.5
    assert metrics["margin"][-2:].mean() > 0
    assert metrics["loss"][-2:].mean() < math.log(2)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_killed_run_resumes_to_exactly_the_weights_and_metrics_of_an_unbroken_one(cached_config, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(cached_config.home, elsewhere)
    whole = training_of(cached_config).train(name)
    expected, curve = (
        unet_weights(whole.model),
        Store(cached_config.store_location).read(schemas.TRAINING_METRICS, name),
    )
    broken = training_of(cached_config.model_copy(update={"home": str(elsewhere)}))
    run = broken.run(name)
    with pytest.raises(StopHere):
        loop.train(run, stop_after(5))
    said = []
    resumed = loop.train(broken.run(name), said.append)
    assert "resumed after step 4" in said[0]
    found = unet_weights(resumed.model)
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    speedless = pl.exclude("pairs_per_second")
    assert broken.store.read(schemas.TRAINING_METRICS, name).select(speedless).equals(curve.select(speedless))


def test_a_finished_run_is_found_and_another_seed_is_another_run(cached_config):
    first = training_of(cached_config).train("diffusion_dpo")
    again = training_of(cached_config).train("diffusion_dpo")
    assert not first.metrics.is_reused
    assert again.metrics.is_reused
    assert again.model == first.model
    other = cached_config.model_copy(
        update={"training": cached_config.training.model_copy(update={"seed": 1, "steps": 2})}
    )
    second = training_of(other).train("diffusion_dpo")
    assert second.model != first.model
    assert (first.model / "unet").exists()


def test_the_export_is_a_plain_diffusers_folder_with_the_base_models_other_parts(cached_config):
    from diffusers import StableDiffusionPipeline

    training = training_of(cached_config)
    trained = training.train("diffusion_dpo")
    base = training.backbone.model.folder
    for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
        names = sorted(p.name for p in (base / part).iterdir())
        assert sorted(p.name for p in (trained.model / part).iterdir()) == names
        assert all((base / part / n).read_bytes() == (trained.model / part / n).read_bytes() for n in names)
    pipeline = StableDiffusionPipeline.from_pretrained(trained.model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a small red circle", num_inference_steps=2, guidance_scale=3.0).images[0]
    assert picture.size == (32, 32)
    start, end = unet_weights(base), unet_weights(trained.model)
    assert any(not torch.equal(start[k].float(), end[k].float()) for k in start)


def test_a_policy_that_excludes_everything_is_an_error_that_says_so(cached_config):
    @dataclasses.dataclass(frozen=True)
    class Nobody:
        name: str = "nobody"

        def apply(self, preferences):
            return preferences.with_columns(target_label_0=pl.lit(None, pl.Float64))

    training = training_of(cached_config)
    empty = dataclasses.replace(recipe("diffusion_dpo"), policy=Nobody())
    run = loop.Run(training.store, cached_config, empty, training.backbone)
    with pytest.raises(StoreError, match="excluded all"):
        loop.train(run, lambda message: None)


def test_training_pairs_are_train_pairs_with_the_side_that_people_chose_as_winner(cached_config):
    store = Store(cached_config.store_location)
    pairs = data.select_pairs(store, recipe("diffusion_dpo").policy, ["train"])
    joined = pairs.join(store.read(schemas.PREFERENCES), on="pair_id")
    assert len(joined) == len(pairs) > 50
    assert set(joined["split"]) == {"train"}
    first = joined["winner_id"] == joined["image_0_id"]
    assert (first == (joined["human_label_0"] > 0.5)).all()
    assert (joined["human_label_0"] != 0.5).all()


def test_samples_of_a_model_wait_for_its_training(cached_config):
    with pytest.raises(loop.NotTrained, match="--recipe diffusion_dpo"):
        training_of(cached_config).samples("diffusion_dpo")


def test_a_backbone_that_predicts_epsilon_trains_from_log_two_as_well(cached_config, tmp_path):
    folder = tmp_path / "epsilon"
    shutil.copytree(cached_config.backbone.checkpoint, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "epsilon"}))
    config = cached_config.model_copy(
        update={
            "backbones": (cached_config.backbone.model_copy(update={"name": "epsilon", "checkpoint": str(folder)}),),
            "training": cached_config.training.model_copy(update={"steps": 2}),
        }
    )
    training = training_of(config)
    assert not training.backbone.model.predicts_velocity
    for key in training.shard_keys():
        training.latents(key)
    training.prompt_embeddings()
    training.train("diffusion_dpo")
    metrics = training.store.read(schemas.TRAINING_METRICS, "diffusion_dpo")
    assert metrics["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"][1] != 0


def test_a_missing_backbone_is_named_with_what_to_do(cached_config, tmp_path):
    from pipelines.hub import CheckpointError

    missing = cached_config.backbone.model_copy(update={"checkpoint": str(tmp_path)})
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing.*world_models"):
        training_of(cached_config.model_copy(update={"backbones": (missing,)}))
