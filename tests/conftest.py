"""Shared fixtures: a very small world as raw files, a store over it, and a tiny reward model with random weights.

Session fixtures are read only; a test that damages files takes `world_copy` or writes shards of its own.
"""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import catalogue, ingest
from pipelines.config import Config, ScorerConfig, SourceConfig, small_world
from pipelines.tables import Store
from pipelines.world import raw

TINY_WORLD = raw.WorldConfig(
    seed=11,
    pickapic_annotators=12,
    hpd_annotators=12,
    pickapic_shards={"train": 2, "validation": 1, "test": 1},
    pickapic_prompts={"train": 10, "validation": 3, "test": 4},
    rows_per_shard=60,
    unlabelled_rate=0.1,
    hpd_train_prompts=5,
    hpd_test_groups=3,
    hpd_test_groups_of_ten=1,
)


@pytest.fixture(scope="session")
def tiny_world_config():
    return TINY_WORLD


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """The raw files of the tiny world: pickapic/, hpdv2/, truth/."""
    folder = tmp_path_factory.mktemp("tiny") / "world"
    assert raw.write_world(folder, TINY_WORLD)
    return folder


@pytest.fixture
def world_copy(tiny_world, tmp_path):
    return shutil.copytree(tiny_world, tmp_path / "world")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="session")
def sources_of():
    """Return the two sources over a folder of raw files; HPD is cut into three train and three test shards."""

    def sources(folder):
        return (
            SourceConfig(name="pickapic", layout="pickapic", location=str(folder / "pickapic")),
            SourceConfig(name="hpd", layout="hpd", location=str(folder / "hpdv2"), records_per_shard=10),
        )

    return sources


@pytest.fixture(scope="session")
def ingest_all():
    """Ingest every shard of some sources (in their order) and build the catalogue; return the shard keys."""

    def run(store, sources):
        shards = [s for source in sources for s in ingest.LAYOUTS[source.layout].list_shards(source)]
        by_name = {s.name: s for s in sources}
        for shard in shards:
            ingest.ingest_shard(store, ingest.plan(by_name[shard.source]), shard)
        keys = [s.key for s in shards]
        catalogue.build(store, keys)
        return keys

    return run


@pytest.fixture(scope="session")
def ingested(tiny_world, tmp_path_factory, sources_of, ingest_all):
    """(store, shard keys) of the ingested tiny world; read only."""
    store = Store(str(tmp_path_factory.mktemp("ingested") / "store"))
    return store, ingest_all(store, sources_of(tiny_world))


@pytest.fixture
def ingested_copy(ingested, tmp_path):
    """(store, shard keys): a copy that a test may write to."""
    store, keys = ingested
    shutil.copytree(store.location, tmp_path / "ingested")
    return Store(str(tmp_path / "ingested")), keys


@pytest.fixture(scope="session")
def raw_rows(tiny_world):
    """The rows of the first train shard in Pick-a-Pic's layout, as dictionaries (copy before editing)."""
    file = min((tiny_world / "pickapic" / "data").glob("train-*.parquet"))
    return tuple(pq.read_table(file).to_pylist())


@pytest.fixture(scope="session")
def write_pickapic():
    """Write rows as one shard in Pick-a-Pic's layout below a folder; return the file."""

    def write(folder, rows, split="train", index=0, total=1, schema=raw.PICKAPIC_SCHEMA):
        file = folder / "data" / f"{split}-{index:05d}-of-{total:05d}-0123456789abcdef.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([dict(r) for r in rows], schema=schema), file, row_group_size=7)
        return file

    return write


@pytest.fixture(scope="session")
def make_tiny_clip():
    """Save a CLIP folder of the small world's shape with random weights drawn from a seed."""

    def make(folder, seed):
        import torch

        from trainers.world_models import rewards, tokenizer

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            words = tokenizer.build()
            folder.mkdir(parents=True)
            rewards.save_half(rewards.build_clip(words), words, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory, make_tiny_clip):
    return make_tiny_clip(tmp_path_factory.mktemp("clip") / "random-clip", seed=0)


@pytest.fixture(scope="session")
def tiny_config(tiny_clip, tiny_world, sources_of):
    """A configuration over the tiny world whose two scorers share one random checkpoint; its home is not written to."""
    options = small_world(tiny_world.parent, TINY_WORLD).model_dump()
    options["sources"] = sources_of(tiny_world)
    options["scorers"] = (
        ScorerConfig(name="pickscore", kind="pickscore", checkpoint=str(tiny_clip), batch_size=64),
        ScorerConfig(name="clip", kind="clip", checkpoint=str(tiny_clip), batch_size=64),
    )
    return Config.model_validate(options)
