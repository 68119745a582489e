"""Fixtures of the layouts' tests: pictures, parquet and tar files, and a whole source ingested at once."""

import io
import itertools
import tarfile
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import catalogue, identity, ingest, schemas
from pipelines.config import LimitsConfig, SourceConfig
from pipelines.sources import Shard
from pipelines.tables import Store


@dataclass(frozen=True)
class Taken:
    """What a source became; votes in the order of its rows."""

    store: Store
    shards: list[Shard]
    votes: pl.DataFrame
    images: pl.DataFrame

    def catalogued(self, table):
        """Build the catalogue over all shards and return one of its tables."""
        catalogue.build(self.store, [s.key for s in self.shards])
        return self.store.read(table)

    def status(self):
        return self.votes["status"].to_list()


@pytest.fixture
def take(tmp_path):
    """Ingest every shard of a source into a store of its own."""
    numbers = itertools.count()

    def run(location, layout="auto", limits=None, **options):
        source = SourceConfig(**{"name": "mine", "layout": layout, "location": str(location), **options})
        store = Store(str(tmp_path / f"store-{next(numbers)}"))
        shards = ingest.list_source(source)
        for shard in shards:
            ingest.ingest_shard(store, ingest.plan(source, limits=LimitsConfig(**(limits or {}))), shard)
        votes = pl.concat(store.read(schemas.VOTES, s.key) for s in shards)
        place = pl.col("source_row").str.split(":").list
        votes = (
            votes.with_columns(file=place.first(), row=place.last().cast(pl.Int64))
            .sort("file", "row", "rater")
            .drop("file", "row")
        )
        return Taken(store, shards, votes, store.scan(schemas.IMAGES).collect())

    return run


@pytest.fixture(scope="session")
def picture():
    """Return the bytes of a JPEG of 16 x 16 pixels drawn from a seed."""

    def draw(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        return buffer.getvalue()

    return draw


@pytest.fixture(scope="session")
def id_of():
    """Return the id of an image by its bytes."""
    return lambda data: identity.image_id_of_bytes(data)[0]


@pytest.fixture(scope="session")
def label_for():
    """Return what a vote (a dictionary) says for one of its images, whichever of the two it is."""

    def label(vote, image_id, column="label_0"):
        assert image_id in (vote["image_0_id"], vote["image_1_id"])
        value = vote[column]
        return value if value is None or image_id == vote["image_0_id"] else 1 - value

    return label


@pytest.fixture(scope="session")
def write_parquet():
    """Write rows (dictionaries) or a table as parquet; return the file."""

    def write(file, rows, schema=None):
        file.parent.mkdir(parents=True, exist_ok=True)
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([dict(r) for r in rows], schema=schema)
        pq.write_table(table, file, row_group_size=5)
        return file

    return write


@pytest.fixture(scope="session")
def write_tar():
    """Write a tar of (name, bytes) members, or of tarfile.TarInfo for links; compressed where the name says so."""

    def write(file, members):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file, "w" if file.name.endswith(".tar") else "w:gz") as tar:
            for member in members:
                if isinstance(member, tarfile.TarInfo):
                    tar.addfile(member)
                    continue
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
        return file

    return write


@pytest.fixture(scope="session")
def link_to():
    """Return a symbolic link as a member of a tar."""

    def link(name, target):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        return info

    return link
