"""Exports in Pick-a-Pic's layout: what other people's loaders and filters make of them, and what happens when things fail."""

import hashlib
import io
import json
import shutil
import subprocess
import sys

import polars as pl
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import catalogue, curation, export, ingest, schemas
from pipelines.config import ConfigError, LimitsConfig, SourceConfig
from pipelines.tables import Store, StoreError
from pipelines.world.raw import PICKAPIC_SCHEMA


def write_preferences(store, excluded=()):
    """Write `preferences` of every pair of the catalogue, with a made-up minority value and reasons of our own."""
    prompts = store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt", "split")
    frame = catalogue.all_pairs(store).join(prompts, on="prompt_id", how="left").collect()
    value = [int(hashlib.sha256(p.encode()).hexdigest()[:4], 16) / 0xFFFF for p in frame["pair_id"]]
    known = {
        "sources": pl.lit("pap"),
        "n_decided": pl.col("n_votes"),
        "is_in_cycle": pl.lit(False),
        "minority_score": pl.Series(value),
        "model_0": pl.lit("renderer"),
        "excluded_because": pl.col("pair_id").replace_strict(dict(excluded), default=None, return_dtype=pl.String),
    }
    table = schemas.PREFERENCES.of(["pickscore"])
    columns = {c: known.get(c, pl.lit(None, t)) for c, t in table.polars_schema.items() if c not in frame.columns}
    frame = frame.with_columns(**columns).select(list(table.polars_schema))
    inputs = {f"{m.table}/{m.partition}": m.content for m in [store.require("catalogue_pairs")]}
    store.write(table, frame, made_from="test", inputs=inputs)
    return store.read(schemas.PREFERENCES)


@pytest.fixture(scope="module")
def labelled(ingested, tmp_path_factory):
    """(store, shard keys) of the tiny world with preferences; read only."""
    store, keys = ingested
    copy = tmp_path_factory.mktemp("labelled") / "store"
    shutil.copytree(store.location, copy)
    write_preferences(Store(str(copy)))
    return Store(str(copy)), keys


@pytest.fixture(scope="module")
def exported(labelled, tmp_path_factory):
    """(folder, what was exported) of the human policy, all splits, in small files."""
    folder = tmp_path_factory.mktemp("exported") / "pairs"
    store, keys = labelled
    result = export.export(
        store, curation.HumanPolicy(), folder, shard_keys=keys, rows_per_file=40, card="## A card\n\nof labels"
    )
    return folder, result


@pytest.fixture(autouse=True)
def no_cache_of_datasets(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def rows_of(folder):
    """Every row of the data files by the pair it is of, through labels.parquet."""
    found = {}
    files = {f.name: pq.read_table(f).to_pylist() for f in (folder / "data").iterdir()}
    labels = pl.read_parquet(folder / "labels.parquet")
    for pair, file, row in labels.select("pair_id", "file", "row").drop_nulls().iter_rows():
        found[pair] = files[file.removeprefix("data/")][row]
    assert len(found) == sum(len(rows) for rows in files.values()), "a row has no label or two"
    return found


def bytes_by_image(store, keys):
    images = store.scan(schemas.IMAGES, partitions=keys).select("image_id", "bytes").unique("image_id").collect()
    return dict(images.iter_rows())


def test_load_dataset_reads_the_folder_by_its_readme_and_the_files_by_their_names(exported):
    from datasets import load_dataset

    folder, result = exported
    by_readme = load_dataset(str(folder))
    assert {split: len(rows) for split, rows in by_readme.items()} == result.rows
    assert list(result.rows) == ["train", "validation", "test"]
    assert min(result.rows.values()) > 0
    assert set(by_readme["train"].column_names) == set(PICKAPIC_SCHEMA.names)
    files = {"train": str(folder / "data" / "train-*.parquet")}
    assert load_dataset("parquet", data_files=files)["train"][:] == by_readme["train"][:]


def test_diffusion_dpos_row_filter_and_order_give_every_exported_pair_its_winner(exported, labelled):
    from datasets import load_dataset

    folder, _ = exported
    store, keys = labelled
    images = bytes_by_image(store, keys)
    preferences = {r["pair_id"]: r for r in store.read(schemas.PREFERENCES).iter_rows(named=True)}
    labels = pl.read_parquet(folder / "labels.parquet").with_row_index("at")
    pair_of = dict(labels.select("at", "pair_id").iter_rows())
    dataset = load_dataset("parquet", data_files={"train": str(folder / "data" / "train-*.parquet")})["train"]
    # As its script has it: keep label_0 in (0, 1), decode both, and put the winner first.
    kept = [i for i, label_0 in enumerate(dataset["label_0"]) if label_0 in (0, 1)]
    assert len(kept) == len(dataset) > 50
    for row in dataset.select(kept):
        pictures = [Image.open(io.BytesIO(row[c])).convert("RGB") for c in ("jpg_0", "jpg_1")]
        assert {p.size for p in pictures} == {(32, 32)}
        winner, loser = (row["jpg_0"], row["jpg_1"]) if row["label_0"] else (row["jpg_1"], row["jpg_0"])
        pair = preferences[pair_of[row["__index_level_0__"]]]
        side = 0 if pair["human_label_0"] > 0.5 else 1
        assert winner == images[pair[f"image_{side}_id"]]
        assert loser == images[pair[f"image_{1 - side}_id"]]
        assert row["best_image_uid"] == pair[f"image_{side}_id"]
        assert row["label_0"] + row["label_1"] == 1
        assert row["caption"] == pair["prompt"]


def test_the_exported_bytes_are_those_of_the_raw_files(exported, tiny_world):
    folder, _ = exported
    raw = set()
    for file in (tiny_world / "pickapic" / "data").iterdir():
        table = pq.read_table(file, columns=["jpg_0", "jpg_1"])
        raw |= {data for column in table.columns for data in column.to_pylist()}
    raw |= {f.read_bytes() for f in (tiny_world / "hpdv2").rglob("*.jpg")}
    rows = rows_of(folder).values()
    assert {r[c] for r in rows for c in ("jpg_0", "jpg_1")} <= raw


def test_every_pair_of_the_splits_has_its_place_or_its_reason(exported, labelled):
    folder, result = exported
    labels = pl.read_parquet(folder / "labels.parquet")
    decided = curation.HumanPolicy().apply(labelled[0].scan(schemas.PREFERENCES)).collect()
    columns = ["pair_id", "target_label_0", "target_probability", "excluded_because"]
    assert labels.select(columns).equals(decided.select(columns))
    placed = labels.filter(pl.col("file").is_not_null())
    assert (labels["file"].is_null() == labels["excluded_because"].is_not_null()).all()
    assert (labels["file"].is_null() == labels["row"].is_null()).all()
    assert len(placed) == sum(result.rows.values()) == decided["target_label_0"].count()
    assert sum(result.excluded.values()) == len(labels) - len(placed) > 0
    rows = rows_of(folder)
    assert all(rows[p]["label_0"] == label for p, label in placed.select("pair_id", "target_label_0").iter_rows())
    assert all(s in f for f, s in placed.select("file", "split").iter_rows()), "a pair lies in its split's files"
    assert max(pq.read_metadata(f).num_rows for f in (folder / "data").iterdir()) == 40


def test_the_export_can_be_ingested_again_and_gives_the_same_pairs(exported, tmp_path):
    folder, _ = exported
    store = Store(str(tmp_path / "again"))
    source = SourceConfig(name="curated", layout="pickapic", location=str(folder / "data"), family="curated")
    shards = ingest.LAYOUTS["pickapic"].list_shards(source)
    for shard in shards:
        ingest.ingest_shard(store, ingest.plan(source), shard)
    catalogue.build(store, [s.key for s in shards])
    again = catalogue.all_pairs(store).select("pair_id", "human_label_0").collect()
    placed = pl.read_parquet(folder / "labels.parquet").filter(pl.col("file").is_not_null())
    assert again.equals(placed.select("pair_id", human_label_0="target_label_0").sort("pair_id"))


def test_the_readme_and_the_mark_say_what_was_exported(exported):
    folder, result = exported
    readme = (folder / "README.md").read_text()
    assert "# Preference pairs: policy `human`" in readme
    assert readme.endswith("## A card\n\nof labels\n")
    assert f"| train | {result.rows['train']:,} |" in readme
    mark = json.loads((folder / "export.json").read_text())
    assert (mark["policy"], mark["rows"]) == ("human", result.rows)
    assert result.bytes < sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < result.bytes + 2_000
    assert f"{sum(result.rows.values()):,} of" in result.text()
    assert "human votes are even" in result.text()
    assert not list(folder.parent.glob(".*")), "nothing is left beside the export"


def test_a_policy_that_excludes_by_a_number_has_one_reason_of_its_kind(labelled, tmp_path):
    store, keys = labelled
    policy = curation.parse("without_minority:threshold=0.4")
    result = export.export(store, policy, tmp_path / "out", shard_keys=keys, splits=["train"])
    assert result.policy == "without_minority:threshold=0.4"
    labels = pl.read_parquet(tmp_path / "out" / "labels.parquet")
    left_out = labels.filter(pl.col("excluded_because").str.contains("minority_score .* > threshold"))
    assert left_out["excluded_because"].n_unique() > 5
    assert result.excluded["minority_score > threshold 0.4"] == len(left_out)
    assert set(labels["split"]) == {"train"}
    assert {f.name[:6] for f in (tmp_path / "out" / "data").iterdir()} == {"train-"}


def test_pairs_and_images_are_the_same_where_the_pool_and_the_row_groups_are_small(
    exported, labelled, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "POOL_BYTES", 2_000)
    monkeypatch.setattr(export, "GROUP_BYTES", 5_000)
    store, keys = labelled
    export.export(store, curation.HumanPolicy(), tmp_path / "out", shard_keys=keys, rows_per_file=40)
    assert rows_of(tmp_path / "out") == rows_of(exported[0])
    groups = pq.read_metadata(tmp_path / "out" / "data" / "train-00000.parquet").num_row_groups
    assert groups > pq.read_metadata(exported[0] / "data" / "train-00000.parquet").num_row_groups


def ingest_pickapic(store, folders, limits=None):
    """Ingest folders in Pick-a-Pic's layout as sources of one family; return the shard keys. limits: by source."""
    keys = []
    for name, (folder, storage) in folders.items():
        source = SourceConfig(
            name=name, layout="pickapic", location=str(folder), family="pickapic", split="train", storage=storage
        )
        for shard in ingest.LAYOUTS["pickapic"].list_shards(source):
            ingest.ingest_shard(store, ingest.plan(source, limits=(limits or {}).get(name)), shard)
            keys.append(shard.key)
    catalogue.build(store, keys)
    return keys


def distinct_rows(raw_rows, count):
    """Decided rows no two of which share an image or a prompt."""
    found, seen = [], set()
    for row in raw_rows:
        names = {row["image_0_uid"], row["image_1_uid"], row["caption"]}
        if row["label_0"] in (0, 1) and not names & seen and len(found) < count:
            found.append(dict(row))
            seen |= names
    assert len(found) == count
    return found


def test_a_pair_known_by_name_takes_its_images_from_the_shards_that_can_give_them(
    store, raw_rows, write_pickapic, tmp_path
):
    first, second = distinct_rows(raw_rows, 2)
    write_pickapic(tmp_path / "a", [first])
    write_pickapic(tmp_path / "b", [second])
    across = {**first, "image_1_uid": second["image_1_uid"], "label_0": 0.0, "label_1": 1.0, "user_id": 999}
    bare = PICKAPIC_SCHEMA
    for column in ("jpg_0", "jpg_1"):
        bare = bare.remove(bare.get_field_index(column))
        across.pop(column)
    write_pickapic(tmp_path / "c", [across], schema=bare)
    folders = {n: (tmp_path / n, "copy") for n in "abc"}
    # The first shard has the images of the second, but its limits refuse them.
    keys = ingest_pickapic(store, {"refused": folders["a"], **folders}, {"refused": LimitsConfig(max_image_side=31)})
    statuses = store.read(schemas.IMAGES, keys[0])["status"]
    assert statuses.to_list() == ["too_large", "too_large"]
    write_preferences(store)
    result = export.export(store, curation.HumanPolicy(), tmp_path / "out", shard_keys=keys)
    assert result.rows["train"] == 3
    rows = rows_of(tmp_path / "out").values()
    found = [r for r in rows if {r["jpg_0"], r["jpg_1"]} == {first["jpg_0"], second["jpg_1"]}]
    assert len(found) == 1
    assert found[0]["jpg_0" if found[0]["label_0"] else "jpg_1"] == second["jpg_1"]
    assert sorted(r["num_example_per_prompt"] for r in rows) == [1, 2, 2]


def test_a_pair_whose_image_cannot_be_read_is_in_the_labels_with_its_reason(store, raw_rows, write_pickapic, tmp_path):
    rows = distinct_rows(raw_rows, 3)
    file = write_pickapic(tmp_path / "a", rows)
    keys = ingest_pickapic(store, {"a": (tmp_path / "a", "reference")})
    write_preferences(store)
    rows[1]["jpg_1"] = rows[0]["jpg_1"]
    assert write_pickapic(tmp_path / "a", rows) == file
    result = export.export(store, curation.HumanPolicy(), tmp_path / "out", shard_keys=keys)
    assert result.rows["train"] == 2
    assert result.lost == 1
    labels = pl.read_parquet(tmp_path / "out" / "labels.parquet")
    (lost,) = labels.filter(pl.col("file").is_null()).iter_rows(named=True)
    assert "changed: " in lost["excluded_because"]
    assert lost["target_label_0"] in (0, 1), "what the policy said stays"
    assert result.excluded == {"image changed": 1}
    assert "an image could not be read" in result.text()
    assert len(rows_of(tmp_path / "out")) == 2


def test_pairs_that_are_excluded_already_keep_their_reason(ingested_copy, tmp_path):
    store, keys = ingested_copy
    some = catalogue.all_pairs(store).filter(pl.col("human_label_0") == 1).collect()["pair_id"].head(3)
    write_preferences(store, {p: f"image_{i % 2} undecodable: broken at byte {i}" for i, p in enumerate(some)})
    result = export.export(store, curation.HumanPolicy(), tmp_path / "out", shard_keys=keys)
    assert result.excluded["image undecodable"] == 3
    assert result.lost == 0
    assert not set(some) & rows_of(tmp_path / "out").keys()


KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines import catalogue, curation, export
from pipelines.tables import Store

store = Store(sys.argv[1])
def die(message):
    if message.startswith("3/"):
        os.kill(os.getpid(), signal.SIGKILL)
export.export(store, curation.policy("human"), Path(sys.argv[2]), shard_keys=catalogue.shard_keys(store),
              rows_per_file=5, progress=die)
"""


def content(folder):
    return {f.name: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_an_export_that_is_killed_leaves_the_earlier_one_and_the_next_one_replaces_it(labelled, tmp_path):
    store, keys = labelled
    folder = tmp_path / "out"
    policy = curation.parse("without_minority:threshold=0.4")
    export.export(store, policy, folder, shard_keys=keys)
    before = content(folder)
    killed = subprocess.run([sys.executable, "-c", KILLED, store.location, str(folder)], check=False)
    assert killed.returncode == -9
    assert content(folder) == before
    assert list((tmp_path / ".out.exporting").rglob("*.parquet")), "it was killed in the middle"
    result = export.export(store, curation.HumanPolicy(), folder, shard_keys=keys)
    assert len(rows_of(folder)) == sum(result.rows.values())
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith((".out", "out"))] == ["out"]


def test_an_export_that_fails_leaves_the_earlier_one_even_if_another_was_killed_while_changing_places(
    labelled, tmp_path
):
    store, keys = labelled
    folder = tmp_path / "out"
    export.export(store, curation.HumanPolicy(), folder, shard_keys=keys, splits=["test"])
    before = content(folder)
    folder.rename(tmp_path / ".out.replaced")
    with pytest.raises(StoreError, match="leaves nothing to export"):
        export.export(store, curation.ConsensusPolicy(), folder, shard_keys=keys)
    assert content(folder) == before
    assert [f.name for f in tmp_path.iterdir() if "out" in f.name] == ["out"]


def test_a_policy_without_targets_is_refused_and_says_why(labelled, tmp_path):
    store, keys = labelled
    with pytest.raises(StoreError, match=r"consensus leaves nothing .*: the consensus is undecided"):
        export.export(store, curation.ConsensusPolicy(), tmp_path / "out", shard_keys=keys)
    assert not [f for f in tmp_path.iterdir() if "out" in f.name]


def test_a_folder_that_is_no_export_is_refused_and_left_alone(labelled, tmp_path):
    store, keys = labelled
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"mine: exists but has no export\.json"):
        export.export(store, curation.HumanPolicy(), tmp_path / "mine", shard_keys=keys)
    with pytest.raises(FileExistsError, match=r"thesis\.txt: exists but"):
        export.export(store, curation.HumanPolicy(), tmp_path / "mine" / "thesis.txt", shard_keys=keys)
    assert content(tmp_path / "mine") == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ["dev"]}, r"splits: expected some of .*train.*, found \['dev'\]"),
        ({"splits": []}, r"splits: expected some of .*, found \[\]"),
        ({"rows_per_file": 0}, "rows_per_file: expected 1 or more, found 0"),
    ],
)
def test_options_that_cannot_be_are_refused(labelled, tmp_path, options, message):
    store, keys = labelled
    with pytest.raises(ConfigError, match=message):
        export.export(store, curation.HumanPolicy(), tmp_path / "out", shard_keys=keys, **options)


def test_preferences_of_another_catalogue_are_refused(ingested_copy, tmp_path):
    store, keys = ingested_copy
    write_preferences(store)
    catalogue.build(store, keys[:2])
    with pytest.raises(StoreError, match="was made from another catalogue_pairs"):
        export.export(store, curation.HumanPolicy(), tmp_path / "out", shard_keys=keys[:2])
