"""A small store with everything but training done, made once by the real steps with the committed tiny models."""

import shutil

import pytest

from pipelines import catalogue, ingest, steps
from pipelines.config import EvaluationConfig, TrainingConfig, small_world
from pipelines.scoring import batches
from pipelines.tables import Store
from pipelines.world.raw import WorldConfig, write_world
from trainers.steps import Training

WORLD = WorldConfig(
    rows_per_shard=80,
    pickapic_shards={"train": 2, "validation": 1, "test": 1},
    pickapic_prompts={"train": 30, "validation": 8, "test": 8},
    hpd_train_prompts=6,
    hpd_test_groups=3,
    hpd_test_groups_of_ten=1,
)


@pytest.fixture(scope="session")
def _cached(tmp_path_factory):
    config = small_world(tmp_path_factory.mktemp("cached"), WORLD).model_copy(
        update={
            "training": TrainingConfig(steps=6, checkpoint_every=2, device="cpu"),
            "evaluation": EvaluationConfig(prompts=6, seeds=2, steps=4, bootstrap=200),
        }
    )
    write_world(config.world_folder, WORLD)
    store = Store(config.store_location)
    shards = ingest.list_shards(config)
    for shard in shards:
        ingest.ingest_shard(store, ingest.plan(config.source(shard.source)), shard)
    keys = [s.key for s in shards]
    catalogue.build(store, keys)
    models = {}
    for key in keys:
        batches.score_shard(store, key, list(config.scorers), models=models)
    batches.activate(store, config, keys)
    labels = steps.Labels(store, config, keys)
    for name in steps.LABEL_TABLES:
        getattr(labels, name)()
    training = Training(store, config, lambda message: None)
    for key in keys:
        training.latents(key)
    training.prompt_embeddings()
    return config


@pytest.fixture
def cached_config(_cached, tmp_path):
    """Return the configuration of a store of the test's own in which preferences and caches lie ready."""
    home = tmp_path / "home"
    shutil.copytree(_cached.home, home)
    location = str(home / "world")
    sources = tuple(
        s.model_copy(update={"location": s.location.replace(str(_cached.world_folder), location)})
        for s in _cached.sources
    )
    return _cached.model_copy(update={"home": str(home), "sources": sources})
