import polars as pl
import pytest
import torch

from pipelines import schemas
from pipelines.tables import Store, StoreError
from trainers import tensors
from trainers.tensors import TensorFile

SHAPE = (4, 2, 2)


def rows(ids, seed=0, shape=SHAPE, **change):
    values = torch.randn(len(ids), *shape, generator=torch.Generator().manual_seed(seed))
    frame = {
        "image_id": ids,
        "is_flipped": False,
        "mean": [tensors.pack(v) for v in values],
        "log_variance": [tensors.pack(-v) for v in values],
        "height": 2,
        "width": 2,
    }
    return pl.DataFrame(frame | change), values


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def write(store, partition, frame):
    store.write(schemas.LATENTS, frame, partition=partition, made_from="test")


def keys(ids):
    return [(i, False) for i in ids]


def test_tensors_of_several_partitions_are_read_by_key_in_the_order_asked_for(store, tmp_path):
    first, a = rows(["a", "b", "c"], 1)
    second, b = rows(["d", "e"], 2)
    write(store, "tiny/one", first)
    write(store, "tiny/two", second)
    file = TensorFile(store, schemas.LATENTS, "tiny/", tmp_path / "scratch")
    assert len(file) == 5
    found = file.read("mean", keys(["e", "a", "e", "c"]), SHAPE)
    expected = torch.stack([b[1], a[0], b[1], a[2]]).half().float()
    assert torch.equal(found, expected)
    assert torch.equal(file.read("log_variance", keys(["d"]), SHAPE), -b[:1].half().float())
    assert file.missing(keys(["a", "z"])) == [("z", False)]
    with pytest.raises(KeyError):
        file.read("mean", keys(["z"]), SHAPE)


def test_a_partition_is_copied_once_and_again_only_when_its_content_changes(store, tmp_path):
    scratch = tmp_path / "scratch"

    def copies():
        return {f: f.stat().st_mtime_ns for f in (scratch / "latents" / "tiny").glob("*/mean")}

    write(store, "tiny/one", rows(["a", "b"], 1)[0])
    TensorFile(store, schemas.LATENTS, "tiny/", scratch)
    before = copies()
    write(store, "tiny/two", rows(["c"], 2)[0])
    TensorFile(store, schemas.LATENTS, "tiny/", scratch)
    grown = copies()
    assert len(grown) == 2
    assert before.items() <= grown.items()
    changed, values = rows(["a", "b"], 3)
    write(store, "tiny/one", changed)
    file = TensorFile(store, schemas.LATENTS, "tiny/", scratch)
    assert torch.equal(file.read("mean", keys(["b"]), SHAPE)[0], values[1].half().float())
    assert len(copies()) == 2
    assert not before.items() & copies().items()


def test_half_written_copies_are_not_read(store, tmp_path):
    write(store, "tiny/one", rows(["a"], 1)[0])
    scratch = tmp_path / "scratch"
    TensorFile(store, schemas.LATENTS, "tiny/", scratch)
    (folder,) = (scratch / "latents" / "tiny").iterdir()
    folder.rename(folder.with_name(f".{folder.name}.1-abcdef"))
    assert len(TensorFile(store, schemas.LATENTS, "tiny/", scratch)) == 1


def test_tensors_of_two_sizes_are_refused_with_the_sizes(store, tmp_path):
    write(store, "tiny/one", rows(["a"], 1)[0])
    write(store, "tiny/two", rows(["b"], 1, shape=(4, 4, 4))[0])
    with pytest.raises(StoreError, match=r"several sizes.*\[32, 128\]"):
        TensorFile(store, schemas.LATENTS, "tiny/", tmp_path / "scratch")


def test_a_cache_that_is_not_there_is_named(store, tmp_path):
    with pytest.raises(StoreError, match="latents has nothing below tiny/"):
        TensorFile(store, schemas.LATENTS, "tiny/", tmp_path / "scratch")


def test_packing_keeps_half_precision_and_refuses_what_overflows_it():
    value = torch.tensor([[1.0, -2.5], [65504.0, 1e-3]])
    assert torch.equal(tensors.unpack([tensors.pack(value)], (2, 2))[0], value.half().float())
    with pytest.raises(ValueError, match="fp16-safe"):
        tensors.pack(torch.tensor([7e4]))
