import os
import subprocess
import sys

import pytest
import tomlkit

from pipelines import schemas
from pipelines.config import ConfigError, ValidationConfig
from pipelines.tables import Store
from trainers import train


@pytest.fixture
def written(cached_config, tmp_path):
    """Return a function that writes the configuration with other options of training, and its file."""

    def write(**options):
        chosen = {"steps": 2, "batch_size": 8, "validation": ValidationConfig(every=0), **options}
        config = cached_config.model_copy(update={"training": cached_config.training.model_copy(update=chosen)})
        file = tmp_path / "polyphony.toml"
        file.write_text(tomlkit.dumps(config.model_dump(mode="json", exclude_none=True)))
        return str(file)

    return write


def test_recipes_are_listed_without_a_store(capsys):
    assert train.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("smpo_sdxl") for line in lines)


def test_naming_a_recipe_trains_it(written, cached_config, capsys):
    assert train.main(["--recipe", "ipo", "--config", written()]) == 0
    assert "trained ipo: 2 rows" in capsys.readouterr().out
    store = Store(cached_config.store_location)
    assert len(store.read(schemas.TRAINING_METRICS, "ipo")) == 2


def test_a_dry_run_trains_nothing(written, cached_config, capsys):
    file = written()
    assert train.main(["train", "--recipe", "smpo", "--dry-run", "--config", file]) == 0
    assert "smoothed labels" in capsys.readouterr().out
    assert Store(cached_config.store_location).manifest("training_metrics", "smpo") is None


def test_trajectories_can_be_made_beforehand(written, cached_config, capsys):
    file = written()
    assert train.main(["trajectories", "--recipe", "smpo", "--config", file]) == 0
    made = Store(cached_config.store_location).manifests("trajectories")
    assert sum(m.rows for m in made) > 0
    assert train.main(["--recipe", "smpo", "--config", file]) == 0
    after = Store(cached_config.store_location).manifests("trajectories")
    assert [m.content for m in after] == [m.content for m in made]


def test_a_recipe_of_another_family_is_refused_before_anything_is_trained(written, cached_config):
    file = written(recipes=("diffusion_dpo", "smpo_sdxl"))
    with pytest.raises(ConfigError, match=r"smpo_sdxl.*sdxl"):
        train.main(["train", "--config", file])
    assert Store(cached_config.store_location).manifest("training_metrics", "diffusion_dpo") is None


def test_a_recipe_that_mirrors_finds_its_latents_after_caching_for_it(written, cached_config, monkeypatch):
    import dataclasses

    from trainers import recipes

    mirroring = dataclasses.replace(recipes.recipe("diffusion_dpo"), name="mirroring", flip=True)
    monkeypatch.setitem(recipes.RECIPES, "mirroring", lambda: mirroring)
    file = written()
    assert train.main(["cache", "--recipe", "mirroring", "--config", file]) == 0
    assert train.main(["--recipe", "mirroring", "--config", file]) == 0
    before = {m.partition: m.content for m in Store(cached_config.store_location).manifests("latents")}
    # What lies there serves recipes that do not mirror as well.
    assert train.main(["cache", "--recipe", "diffusion_dpo", "--config", file]) == 0
    after = {m.partition: m.content for m in Store(cached_config.store_location).manifests("latents")}
    assert after == before


def test_with_several_processes_the_command_becomes_them(written, cached_config):
    file = written(processes=2)
    command = [sys.executable, "-m", "trainers.train", "--recipe", "diffusion_dpo", "--config", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = Store(cached_config.store_location).manifest("training_metrics", "diffusion_dpo")
    assert manifest.extra["processes"] == 2
    assert done.stdout.count("trained diffusion_dpo") == 1
