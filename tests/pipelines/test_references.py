"""images.storage = reference: the store keeps where images lie and their sha256; the bytes are read from the source."""

import base64
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from pipelines import catalogue, ingest, schemas, stored
from pipelines.config import ImagesConfig, ScorerConfig, SourceConfig, small_world
from pipelines.scoring import batches, forecast
from pipelines.sources import SourceError
from pipelines.tables import Store

PLACE = ["uri", "row_group", "row", "image_column", "byte_offset", "byte_length"]
ROWS = 24


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# --- the same images in every layout -------------------------------------------------------------------------------


def pickapic(folder, rows, write_pickapic, world):
    write_pickapic(folder, rows)


def all_text(folder, rows, write_pickapic, world):
    """A conversion in which every column is text: images in base64."""
    (folder / "data").mkdir(parents=True)
    listed = [
        {
            k: base64.b64encode(v).decode() if isinstance(v, bytes) else None if v is None else str(v)
            for k, v in r.items()
        }
        for r in rows
    ]
    table = pa.Table.from_pylist(listed)
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet", row_group_size=5)


def hpd(folder, rows, write_pickapic, world):
    shutil.copytree(world / "hpdv2", folder)


def hpd_tar(folder, rows, write_pickapic, world):
    shutil.copytree(world / "hpdv2", folder)
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            tar.add(folder / split, split)
        shutil.rmtree(folder / split)


def hpdv3(folder, rows, write_pickapic, world):
    (folder / "images").mkdir(parents=True)
    records = []
    for i, row in enumerate(rows):
        for k in (0, 1):
            (folder / "images" / f"{i}_{k}.jpg").write_bytes(row[f"jpg_{k}"])
        paths = {"path1": f"images/{i}_0.jpg", "path2": f"images/{i}_1.jpg"}
        records.append({"prompt": row["caption"], **paths, "choice_dist": [3, 1], "confidence": 0.5})
    (folder / "train.json").write_text(json.dumps(records))


def webdataset(folder, rows, write_pickapic, world, mode="w", suffix=".tar"):
    folder.mkdir(parents=True)
    with tarfile.open(folder / f"train-00000{suffix}", mode) as tar:
        for i, row in enumerate(rows):
            add(tar, f"{i:05d}.original_prompt.txt", row["caption"].encode())
            add(tar, f"{i:05d}.jpg_0.jpg", row["jpg_0"])
            add(tar, f"{i:05d}.jpg_1.jpg", row["jpg_1"])
            add(tar, f"{i:05d}.label_0.txt", str(row["label_0"]).encode())


def _pairs(folder, rows, image_of):
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        {
            "prompt": r["caption"],
            "label_0": r["label_0"],
            **{f"image_{k}": image_of(i, k, r[f"jpg_{k}"]) for k in (0, 1)},
        }
        for i, r in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(listed), folder / "train.parquet", row_group_size=6)


def pairs_bytes(folder, rows, write_pickapic, world):
    _pairs(folder, rows, lambda i, k, data: data)


def pairs_structs(folder, rows, write_pickapic, world):
    _pairs(folder, rows, lambda i, k, data: {"bytes": data, "path": f"{i}_{k}.jpg"})


def pairs_paths(folder, rows, write_pickapic, world):
    def image_of(i, k, data):
        file = folder / "pictures" / f"{i}_{k}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return f"pictures/{i}_{k}.jpg"

    _pairs(folder, rows, image_of)


def rapidata(folder, rows, write_pickapic, world):
    folder.mkdir(parents=True)
    listed = [
        {
            "prompt": r["caption"],
            **{f"image{k + 1}": {"bytes": r[f"jpg_{k}"], "path": f"{i}_{k}.jpg"} for k in (0, 1)},
            "votes_image1": 3,
            "votes_image2": 2,
        }
        for i, r in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(listed), folder / "train-00000.parquet", row_group_size=5)


WRITERS = {
    "pickapic": (pickapic, "pickapic"),
    "all_text": (all_text, "pickapic"),
    "hpd": (hpd, "hpd"),
    "hpd_tar": (hpd_tar, "hpd"),
    "hpdv3": (hpdv3, "hpdv3"),
    "webdataset": (webdataset, "pickapic_webdataset"),
    "pairs_bytes": (pairs_bytes, "pairs"),
    "pairs_structs": (pairs_structs, "pairs"),
    "pairs_paths": (pairs_paths, "pairs"),
    "rapidata": (rapidata, "rapidata"),
}


@pytest.fixture
def write_source(tmp_path, raw_rows, write_pickapic, tiny_world):
    """Write a layout's files; return the source."""

    def write(name, **more):
        folder = tmp_path / "raw" / name
        writer, layout = WRITERS[name]
        writer(folder, raw_rows[:ROWS], write_pickapic, tiny_world)
        return SourceConfig(
            name="mine", layout=layout, location=str(folder), records_per_shard=20, split="train", **more
        )

    return write


def ingest_as(store, source, storage, **options):
    """Ingest a source and build the catalogue; return the shard keys."""
    shards = ingest.list_source(source)
    how = ingest.plan(source, shards, ImagesConfig(storage=storage, **options))
    for shard in shards:
        ingest.ingest_shard(store, how, shard)
    keys = [s.key for s in shards]
    catalogue.build(store, keys)
    return keys


@pytest.fixture
def both(tmp_path, write_source):
    """Return (source, store of copies, store of references, shard keys) of a layout."""

    def make(name):
        source = write_source(name)
        stores = [Store(str(tmp_path / s)) for s in ("copy", "reference")]
        copied, referred = (ingest_as(s, source, s.location.rsplit("/", 1)[1]) for s in stores)
        assert copied == referred
        return source, *stores, copied

    return make


@pytest.fixture(scope="session")
def model(tiny_clip):
    scorer = ScorerConfig(name="clip", kind="clip", checkpoint=str(tiny_clip), batch_size=64)
    return scorer, {"clip": batches.load(scorer, "cpu")}


@pytest.fixture
def score(model):
    """Score shards; return the table of scores, sorted."""

    def run(store, keys):
        scorer, models = model
        for key in keys:
            batches.score_shard(store, key, [scorer], models=models)
        return store.scan(schemas.SCORES).collect().sort("image_id", "prompt_id")

    return run


def read_all(store, key, batch=5):
    wanted = store.read(schemas.IMAGES, key)["image_id"].to_list()
    parts = list(stored.read_images(store, key, wanted, batch))
    assert all(0 < len(p) <= batch for p in parts)
    listed = [i for p in parts for i in p]
    assert len({i.image_id for i in listed}) == len(listed) == len(wanted), "every wanted image once"
    return {i.image_id: (i.data, i.status, i.reason) for i in listed}


@pytest.mark.parametrize("name", WRITERS)
def test_references_are_kept_without_bytes_and_give_the_bytes_and_scores_of_copies(name, both, score):
    _, copied, referred, keys = both(name)
    for key in keys:
        here, there = (s.read(schemas.IMAGES, key) for s in (copied, referred))
        assert set(here["status"]) == {"ok"}
        assert here["bytes"].null_count() == 0
        assert all(here[p].null_count() == len(here) for p in PLACE)
        assert there["bytes"].null_count() == len(there)
        assert there["uri"].null_count() == 0
        if there["image_column"].null_count() == 0:
            assert there["row_group"].null_count() == there["row"].null_count() == 0
        elif name in ("hpd_tar", "webdataset"):
            assert there["byte_offset"].null_count() == there["byte_length"].null_count() == 0
        assert_frame_equal(here.drop("bytes", *PLACE), there.drop("bytes", *PLACE))
        for table in (schemas.VOTES, schemas.PROMPTS, schemas.IMAGE_NAMES):
            assert copied.require(table.name, key).content == referred.require(table.name, key).content
        assert read_all(referred, key) == read_all(copied, key)
        assert {referred.require("votes", key).extra["storage"], copied.require("votes", key).extra["storage"]} == {
            "copy",
            "reference",
        }
    scores = score(copied, keys)
    assert set(scores["status"]) == {"ok"}
    assert scores["score"].n_unique() > len(scores) // 2, "scores tell images apart"
    # Batches are composed in another order, which moves the last bits.
    assert_frame_equal(score(referred, keys), scores, abs_tol=1e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_a_forecast_counts_the_bytes_of_referred_images_too(name, both, model):
    _, copied, referred, keys = both(name)
    exact, about = (forecast.forecast(s, keys, [model[0]], measure=False).read_bytes for s in (copied, referred))
    owners = copied.read(schemas.CATALOGUE_SCORABLES).unique("image_id").select("image_id", "owner")
    held = pl.concat(copied.read(schemas.IMAGES, k).with_columns(owner=pl.lit(k)) for k in keys)
    assert exact == held.join(owners, on=["image_id", "owner"])["bytes"].bin.size().sum()
    if name in ("hpd_tar", "webdataset", "hpd", "hpdv3", "pairs_paths"):
        assert about == pytest.approx(exact, rel=0.02)
    else:
        # The parquet file that holds them: its other columns weigh much beside these small pictures, base64 a third more.
        assert exact < about < 5 * exact


def test_a_parquet_reference_names_row_group_row_and_column(both):
    source, _, referred, (key,) = both("pickapic")
    held = referred.read(schemas.IMAGES, key)
    assert held["row_group"].max() == (ROWS - 1) // 7
    with pq.ParquetFile(held["uri"][0]) as file:
        for row in held.iter_rows(named=True):
            cell = file.read_row_group(row["row_group"], [row["image_column"]]).column(0)[row["row"]].as_py()
            assert row["sha256"].startswith(row["image_id"])
            assert hashlib.sha256(cell).hexdigest() == row["sha256"]
    assert source.location in held["uri"][0]


def test_only_the_wanted_images_are_read(both):
    _, copied, referred, keys = both("pickapic")
    wanted = copied.read(schemas.IMAGES, keys[0])["image_id"].to_list()[3::7]
    for store in (copied, referred):
        listed = [i.image_id for part in stored.read_images(store, keys[0], wanted, 4) for i in part]
        assert sorted(listed) == sorted(wanted)
        assert list(stored.read_images(store, keys[0], [], 4)) == []


def test_images_that_are_not_ok_keep_their_status_in_both_storages(tmp_path, raw_rows, write_pickapic, score):
    rows = [dict(r) for r in raw_rows[:6]]
    rows[0]["jpg_0"], rows[1]["jpg_1"], rows[2]["jpg_0"] = None, b"no image", rows[2]["jpg_0"][:-40]
    rows[3]["jpg_1"] = b""
    write_pickapic(tmp_path / "raw", rows)
    source = SourceConfig(name="mine", layout="pickapic", location=str(tmp_path / "raw"))
    tables = []
    for storage in ("copy", "reference"):
        store = Store(str(tmp_path / storage))
        (key,) = ingest_as(store, source, storage)
        tables.append((read_all(store, key), score(store, [key])))
    assert tables[0][0] == tables[1][0]
    assert {status for _, status, _ in tables[0][0].values()} == {"ok", "no_bytes", "unreadable", "truncated"}
    assert_frame_equal(tables[0][1], tables[1][1], abs_tol=1e-6)


# --- sources that change after ingestion ---------------------------------------------------------------------------


def files_of(source, *patterns):
    return sorted(f for p in patterns for f in stored_path(source).glob(p))


def stored_path(source):
    return Path(source.location)


def parquet_of(source):
    (file,) = files_of(source, "**/*.parquet")
    return file


def rewrite(source, change):
    file = parquet_of(source)
    table = pq.read_table(file)
    rows = pq.ParquetFile(file).metadata.row_group(0).num_rows
    pq.write_table(change(table), file, row_group_size=rows)


def rotated(table):
    """Return the table with every row's pictures one row further down."""
    return pa.concat_tables([table.slice(len(table) - 1), table.slice(0, len(table) - 1)])


def renamed(table):
    return table.rename_columns([f"old_{c}" for c in table.column_names])


def as_type(kind):
    def change(table):
        for column in ("jpg_0", "jpg_1"):
            at = table.column_names.index(column)
            values = {
                "numbers": pa.array(range(10**12, 10**12 + len(table))),
                "fractions": pa.array([0.5] * len(table)),
                "lists": pa.array([[1, 2]] * len(table)),
                "text": pa.array(["no base64!"] * len(table)),
                "structs": pa.array([{"path": "x"}] * len(table)),
                "empty structs": pa.array([{"bytes": None}] * len(table), pa.struct([("bytes", pa.binary())])),
                "nulls": pa.array([None] * len(table), pa.binary()),
            }[kind]
            table = table.set_column(at, column, values)
        return table

    return change


def cut(file, share=0.5):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def swap(files):
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def reversed_tar(file):
    with tarfile.open(file) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]
    with tarfile.open(file, "w") as tar:
        for name, data in reversed(members):
            add(tar, name, data)


def pictures_of(source):
    return files_of(source, "train/*.jpg", "images/*.jpg", "pictures/*.jpg")


DAMAGES = {
    # case: layout, what happens, statuses of the images that are concerned, whether all of them are
    "parquet, rows moved": ("pickapic", lambda s: rewrite(s, rotated), {"changed"}, True),
    "parquet, gone": ("pickapic", lambda s: parquet_of(s).unlink(), {"missing"}, True),
    "parquet, cut": ("pickapic", lambda s: cut(parquet_of(s)), {"missing"}, True),
    "parquet, empty": ("pickapic", lambda s: parquet_of(s).write_bytes(b""), {"missing"}, True),
    "parquet, a folder": (
        "pickapic",
        lambda s: (f := parquet_of(s)) and (f.unlink() or f.mkdir()),
        {"missing"},
        True,
    ),
    "parquet, fewer row groups": ("pickapic", lambda s: rewrite(s, lambda t: t.slice(0, 7)), {"missing"}, False),
    "parquet, no rows": ("pickapic", lambda s: rewrite(s, lambda t: t.slice(0, 0)), {"missing"}, True),
    "parquet, no column": ("pickapic", lambda s: rewrite(s, renamed), {"missing"}, True),
    "parquet, numbers": ("pickapic", lambda s: rewrite(s, as_type("numbers")), {"missing", "changed"}, True),
    "parquet, fractions": ("pickapic", lambda s: rewrite(s, as_type("fractions")), {"missing", "changed"}, True),
    "parquet, lists": ("pickapic", lambda s: rewrite(s, as_type("lists")), {"missing", "changed"}, True),
    "parquet, text": ("pickapic", lambda s: rewrite(s, as_type("text")), {"missing", "changed"}, True),
    "parquet, structs": ("pickapic", lambda s: rewrite(s, as_type("structs")), {"missing", "changed"}, True),
    "parquet, no bytes": ("pickapic", lambda s: rewrite(s, as_type("empty structs")), {"missing"}, True),
    "parquet, nulls": ("pickapic", lambda s: rewrite(s, as_type("nulls")), {"missing"}, True),
    "base64, rows moved": ("all_text", lambda s: rewrite(s, rotated), {"changed"}, True),
    "structs, rows moved": ("pairs_structs", lambda s: rewrite(s, rotated), {"changed"}, True),
    "structs, gone": ("rapidata", lambda s: parquet_of(s).unlink(), {"missing"}, True),
    "files, swapped": ("hpd", lambda s: swap(pictures_of(s)), {"changed"}, False),
    "files, gone": ("hpd", lambda s: pictures_of(s)[0].unlink(), {"missing"}, False),
    "files, cut": ("hpd", lambda s: cut(pictures_of(s)[1]), {"changed"}, False),
    "files, folder gone": ("hpdv3", lambda s: shutil.rmtree(stored_path(s) / "images"), {"missing"}, True),
    "named files, swapped": ("pairs_paths", lambda s: swap(pictures_of(s)), {"changed"}, False),
    "tar, in another order": ("hpd_tar", lambda s: reversed_tar(stored_path(s) / "train.tar"), {"changed"}, False),
    "tar, gone": ("hpd_tar", lambda s: (stored_path(s) / "train.tar").unlink(), {"missing"}, False),
    "tar, cut": ("hpd_tar", lambda s: cut(stored_path(s) / "train.tar"), {"changed", "missing"}, False),
    "webdataset, in another order": (
        "webdataset",
        lambda s: reversed_tar(stored_path(s) / "train-00000.tar"),
        {"changed"},
        True,
    ),
    "webdataset, gone": ("webdataset", lambda s: (stored_path(s) / "train-00000.tar").unlink(), {"missing"}, True),
    "webdataset, cut": ("webdataset", lambda s: cut(stored_path(s) / "train-00000.tar"), {"changed", "missing"}, False),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_source_that_is_not_what_it_was_costs_a_status_and_never_gives_another_pictures_score(case, both, score):
    layout, damage, statuses, is_all = DAMAGES[case]
    source, copied, referred, keys = both(layout)
    right = {(i, p): s for i, p, s in score(copied, keys).select("image_id", "prompt_id", "score").iter_rows()}
    damage(source)
    found = score(referred, keys)
    assert len(found) == len(right)
    bad = found.filter(pl.col("status") != "ok")
    assert len(bad) == len(found) if is_all else 0 < len(bad) < len(found)
    assert set(bad["status"]) <= statuses
    assert bad["score"].null_count() == len(bad)
    assert bad["reason"].null_count() == 0
    # An image can lie in several places.
    uris = referred.scan(schemas.IMAGES).group_by("image_id").agg("uri").collect()
    uris = {image: tuple(named) for image, named in uris.iter_rows()}
    for row in bad.iter_rows(named=True):
        assert row["reason"].startswith(uris[row["image_id"]]), "the reason names the file"
        assert max(len(row["reason"]) - len(u) for u in uris[row["image_id"]]) > 10, "and says what is wrong with it"
    for row in found.filter(pl.col("status") == "ok").iter_rows(named=True):
        assert row["score"] == pytest.approx(right[row["image_id"], row["prompt_id"]], abs=1e-6)


def test_ingesting_again_after_a_change_heals_the_references(both, score):
    source, _, referred, keys = both("pickapic")
    rewrite(source, rotated)
    assert set(score(referred, keys)["status"]) == {"changed"}
    assert ingest_as(referred, source, "reference") == keys
    assert set(score(referred, keys)["status"]) == {"ok"}


def test_a_file_that_may_not_be_read_for_now_fails_the_step_instead_of_giving_a_status(both, monkeypatch):
    _, _, referred, keys = both("webdataset")

    def refuse(uri):
        raise PermissionError(13, "Permission denied", uri)

    good = read_all(referred, keys[0])
    with monkeypatch.context() as patch:
        patch.setattr(stored, "open_uri", refuse)
        with pytest.raises(SourceError, match=r"train-00000\.tar: cannot be read"):
            read_all(referred, keys[0])
    assert read_all(referred, keys[0]) == good


# --- which storage is chosen ---------------------------------------------------------------------------------------


def gigabytes(shards):
    return sum(s.bytes for s in shards) / 1e9


@pytest.mark.parametrize("name", ["pickapic", "hpd", "hpd_tar", "hpdv3", "webdataset", "pairs_structs", "rapidata"])
def test_auto_refers_to_sources_that_are_larger_than_the_limit_and_copies_the_others(name, write_source):
    source = write_source(name)
    shards = ingest.list_source(source)
    pictures = sum(f.stat().st_size for f in stored_path(source).rglob("*") if f.suffix in (".jpg", ".tar", ".parquet"))
    assert gigabytes(shards) == pytest.approx(pictures / 1e9, rel=0.2), (
        "the images' bytes, not those of a list of names"
    )

    def chosen(limit):
        return ingest.plan(source, shards, ImagesConfig(storage="auto", reference_above_gb=limit)).storage

    assert chosen(gigabytes(shards) * 0.9) == "reference"
    assert chosen(gigabytes(shards) * 1.1) == "copy"
    assert chosen(10.0) == "copy"
    assert ingest.plan(source, shards).storage == "copy"


def test_the_size_of_the_whole_source_decides_not_that_of_a_shard_or_of_another_source(
    tmp_path, raw_rows, write_pickapic
):
    for name, count in (("large", 3), ("small", 1)):
        for index in range(count):
            write_pickapic(tmp_path / name, raw_rows[20 * index : 20 * index + 20], index=index, total=count)
    sources = tuple(
        SourceConfig(name=n, layout="pickapic", location=str(tmp_path / n), storage=None) for n in ("large", "small")
    )
    largest = max(s.bytes for source in sources for s in ingest.list_source(source))
    settings = small_world(tmp_path).model_copy(
        update={
            "sources": sources,
            "world": None,
            "images": ImagesConfig(reference_above_gb=largest * 1.5 / 1e9),
        }
    )
    shards = ingest.list_shards(settings)
    assert {n: p.storage for n, p in ingest.plans(settings, shards).items()} == {"large": "reference", "small": "copy"}


def test_a_source_that_grows_past_the_limit_keeps_its_old_shards_and_refers_to_the_new_ones(
    tmp_path, raw_rows, write_pickapic, store, score
):
    folder = tmp_path / "raw"
    source = SourceConfig(name="mine", layout="pickapic", location=str(folder))
    write_pickapic(folder, raw_rows[:20], index=0, total=3)
    limit = gigabytes(ingest.list_source(source)) * 1.5

    def grown():
        shards = ingest.list_source(source)
        how = ingest.plan(source, shards, ImagesConfig(reference_above_gb=limit))
        built = {s.key: ingest.ingest_shard(store, how, s) for s in shards}
        catalogue.build(store, list(built))
        return how.storage, built

    storage, first = grown()
    assert (storage, [b["votes"].is_reused for b in first.values()]) == ("copy", [False])
    old = next(iter(first))
    before = {t: store.require(t, old) for t in first[old]}
    for index in (1, 2):
        write_pickapic(folder, raw_rows[20 * index : 20 * index + 20], index=index, total=3)
        storage, built = grown()
        assert storage == "reference"
        assert [all(b.is_reused for b in tables.values()) for tables in built.values()] == [True] * index + [False]
        assert {t: store.require(t, old) for t in before} == before, "the old shard was not touched"
    nulls = [store.read(schemas.IMAGES, k)["bytes"].null_count() for k in built]
    assert nulls[0] == 0
    assert min(nulls[1:]) > 0
    assert set(score(store, list(built))["status"]) == {"ok"}
    # A shard whose file changes is read again and then follows what is chosen now.
    write_pickapic(folder, raw_rows[1:20], index=0, total=3)
    _, built = grown()
    assert [b["votes"].is_reused for b in built.values()] == [False, True, True]
    assert store.read(schemas.IMAGES, old)["bytes"].null_count() > 0
    # And a source that shrinks below the limit keeps what it has.
    for index in (1, 2):
        next((folder / "data").glob(f"train-{index:05d}-*")).unlink()
    storage, built = grown()
    assert (storage, [b["votes"].is_reused for b in built.values()]) == ("copy", [True])


def test_a_storage_that_a_person_names_is_what_all_shards_get(both):
    source, copied, _, keys = both("pickapic")
    before = copied.read(schemas.IMAGES, keys[0])
    assert ingest_as(copied, source, "reference") == keys
    after = copied.read(schemas.IMAGES, keys[0])
    assert after["bytes"].null_count() == len(after)
    assert_frame_equal(after.drop("bytes", *PLACE), before.drop("bytes", *PLACE))
    ingest_as(copied, source, "copy")
    assert copied.read(schemas.IMAGES, keys[0]).equals(before)


def test_files_that_move_are_ingested_again_where_they_are_referred_to_and_not_where_they_were_copied(both, tmp_path):
    source, copied, referred, keys = both("webdataset")
    shutil.move(source.location, tmp_path / "elsewhere")
    moved = source.model_copy(update={"location": str(tmp_path / "elsewhere")})
    contents = {s: s.require("images", keys[0]).content for s in (copied, referred)}
    ingest_as(copied, moved, "copy")
    ingest_as(referred, moved, "reference")
    assert copied.require("images", keys[0]).content == contents[copied]
    assert referred.require("images", keys[0]).content != contents[referred]
    assert read_all(referred, keys[0]) == read_all(copied, keys[0])


def packed_hpd(folder, world):
    shutil.copytree(world / "hpdv2", folder)
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}.tar.gz", "w:gz") as tar:
            tar.add(folder / split, split)
        shutil.rmtree(folder / split)
    return SourceConfig(name="packed", layout="hpd", location=str(folder))


def packed_webdataset(folder, world):
    rows = pq.read_table(min((world / "pickapic" / "data").glob("train-*"))).to_pylist()[:6]
    webdataset(folder, rows, None, world, "w:gz", ".tar.gz")
    return SourceConfig(name="packed", layout="pickapic_webdataset", location=str(folder))


@pytest.mark.parametrize("pack", [packed_hpd, packed_webdataset])
def test_references_into_a_compressed_archive_are_refused_and_auto_copies_whatever_its_size(
    pack, tiny_world, tmp_path, store
):
    source = pack(tmp_path / "packed", tiny_world)
    shards = ingest.list_source(source)
    for asked, images in ((None, ImagesConfig(storage="reference")), ("reference", ImagesConfig())):
        with pytest.raises(SourceError) as error:
            ingest.plan(source.model_copy(update={"storage": asked}), shards, images)
        for word in ("'packed'", "reference", "compressed archive", "unpack", "'copy'"):
            assert word in str(error.value)
    keys = ingest_as(store, source, "auto", reference_above_gb=0.0)
    for key in keys:
        held = store.read(schemas.IMAGES, key)
        assert len(held) > 0
        assert held["bytes"].null_count() == 0
        assert held["uri"].null_count() == len(held)


@pytest.mark.parametrize("own", ["copy", "reference", "auto"])
def test_a_sources_own_storage_overrides_the_one_of_all(own, write_source):
    source = write_source("pickapic", storage=own)
    shards = ingest.list_source(source)
    for overall in ("copy", "reference", "auto"):
        images = ImagesConfig(storage=overall, reference_above_gb=gigabytes(shards) / 2)
        expected = "reference" if own == "auto" else own
        assert ingest.plan(source, shards, images).storage == expected
        unset = source.model_copy(update={"storage": None})
        assert ingest.plan(unset, shards, images).storage == ("reference" if overall == "auto" else overall)
