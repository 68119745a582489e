import io
import json
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import identity, images, ingest, schemas
from pipelines.config import SourceConfig, small_world
from pipelines.sources import SourceError, hpd, pickapic
from pipelines.world.raw import PICKAPIC_SCHEMA


@pytest.fixture
def rows(raw_rows):
    """Eight rows that differ in time, annotator and images, to be edited."""
    return [dict(r) for r in raw_rows[:8]]


@pytest.fixture
def ingest_rows(tmp_path, store, write_pickapic):
    """Ingest rows as one Pick-a-Pic shard; return its votes and its images."""

    def run(rows, split="train", schema=PICKAPIC_SCHEMA):
        write_pickapic(tmp_path / "pap", rows, split, schema=schema)
        source = SourceConfig(name="pap", layout="pickapic", location=str(tmp_path / "pap"))
        (shard,) = pickapic.list_shards(source)
        ingest.ingest_shard(store, ingest.plan(source), shard)
        votes, held = store.read(schemas.VOTES, shard.key), store.read(schemas.IMAGES, shard.key)
        assert len(votes) == len(rows), "every row in is a row out"
        return votes, held

    return run


@pytest.fixture
def hpd_folder(tiny_world, tmp_path):
    return shutil.copytree(tiny_world / "hpdv2", tmp_path / "hpdv2")


@pytest.fixture
def ingest_hpd(store, hpd_folder):
    """Ingest all HPD shards; return votes and images."""

    def run():
        source = SourceConfig(name="hpd", layout="hpd", location=str(hpd_folder), records_per_shard=10)
        for shard in hpd.list_shards(source):
            ingest.ingest_shard(store, ingest.plan(source), shard)
        return store.scan(schemas.VOTES).collect(), store.scan(schemas.IMAGES).collect()

    return run


def edit_json(path, edit):
    records = json.loads(path.read_text())
    edit(records)
    path.write_text(json.dumps(records))


def by_row(votes):
    """Votes in the order of the rows they came from."""
    return votes.with_columns(row=pl.col("source_row").str.split(":").list.last().cast(int)).sort("row", "rater")


def jpeg(seed, size=(48, 48)):
    picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG")
    return buffer.getvalue()


# --- what a good row becomes ---------------------------------------------------------------------------------------


def test_a_row_becomes_a_vote_on_the_pair_in_id_order(rows, ingest_rows):
    votes, held = ingest_rows(rows)
    for raw, vote in zip(rows, by_row(votes).iter_rows(named=True), strict=True):
        first, second = (identity.image_id_of_bytes(raw[f"jpg_{i}"])[0] for i in (0, 1))
        prompt = identity.prompt_id(raw["caption"])
        swapped = first > second
        assert vote["was_swapped"] is swapped
        assert (vote["image_0_id"], vote["image_1_id"]) == tuple(sorted((first, second)))
        assert vote["prompt_id"] == prompt
        assert vote["pair_id"] == identity.pair_id(prompt, *sorted((first, second)))
        assert vote["label_0"] == raw["label_1" if swapped else "label_0"]
        assert (vote["model_0"], vote["model_1"]) == (
            (raw["model_1"], raw["model_0"]) if swapped else (raw["model_0"], raw["model_1"])
        )
        assert vote["annotator_id"] == f"pickapic:{raw['user_id']}"
        assert vote["group_id"] == f"pickapic:{raw['ranking_id']}"
        assert vote["created_at"] == raw["created_at"]
        assert (vote["status"], vote["count"], vote["split"]) == ("ok", 1, "train")
    ids = {identity.image_id_of_bytes(r[f"jpg_{i}"])[0] for r in rows for i in (0, 1)}
    assert set(held["image_id"]) == ids
    assert set(held["status"]) == {"ok"}
    assert {(r["width"], r["height"], r["format"]) for r in held.iter_rows(named=True)} == {(32, 32, "JPEG")}


def test_the_shards_rows_are_found_by_file_and_number_across_row_groups(rows, ingest_rows):
    votes, _ = ingest_rows(rows)
    assert by_row(votes)["source_row"].to_list() == [f"train-00000-of-00001-0123456789abcdef:{k}" for k in range(8)]
    assert votes["vote_id"].n_unique() == 8


def test_a_swapped_display_gives_the_same_pair_and_the_same_label_but_flags_the_swap(rows, ingest_rows):
    row = next(r for r in rows if r["label_0"] != 0.5)
    other = {**row, "user_id": 999}
    for name in ("jpg", "label", "model"):
        other[f"{name}_0"], other[f"{name}_1"] = row[f"{name}_1"], row[f"{name}_0"]
    other["image_0_uid"], other["image_1_uid"] = row["image_1_uid"], row["image_0_uid"]
    votes, held = ingest_rows([row, other])
    a, b = by_row(votes).iter_rows(named=True)
    assert len(held) == 2
    for same in ("pair_id", "image_0_id", "image_1_id", "label_0", "model_0", "model_1"):
        assert a[same] == b[same]
    assert {a["was_swapped"], b["was_swapped"]} == {True, False}


def test_the_same_display_with_the_opposite_choice_flips_the_label(rows, ingest_rows):
    row = {**rows[0], "label_0": 1.0, "label_1": 0.0}
    votes, _ = ingest_rows([row, {**row, "label_0": 0.0, "label_1": 1.0, "user_id": 999}])
    a, b = by_row(votes).iter_rows(named=True)
    assert a["pair_id"] == b["pair_id"]
    assert {a["label_0"], b["label_0"]} == {0.0, 1.0}


def test_a_prompt_is_normalised_once_for_all_spellings(rows, ingest_rows, store):
    rows[0]["caption"], rows[1]["caption"] = " a caf\u00e9 ", "a cafe\u0301"
    votes, _ = ingest_rows(rows[:2])
    assert votes["prompt_id"].n_unique() == 1
    assert store.scan(schemas.PROMPTS).collect()["prompt"].to_list() == ["a caf\u00e9"]


# --- bad rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ((0.7, 0.3), "0.7 / 0.3"),
        ((1.0, 1.0), "1.0 / 1.0"),
        ((0.0, 0.0), "0.0 / 0.0"),
        ((2.0, -1.0), "2.0 / -1.0"),
        ((float("nan"), 0.0), "NaN"),
        ((None, 1.0), "null"),
    ],
)
def test_a_label_that_is_no_choice_is_invalid_and_leaves_the_other_rows_alone(rows, ingest_rows, labels, found):
    rows[3]["label_0"], rows[3]["label_1"] = labels
    votes, _ = ingest_rows(rows)
    votes = by_row(votes)
    assert votes["status"].to_list() == ["ok"] * 3 + ["invalid_label"] + ["ok"] * 4
    assert found in votes["reason"][3]
    assert votes["label_0"][3] is None


@pytest.mark.parametrize("has_label", [False, None])
def test_a_row_that_has_no_label_is_unlabelled_whatever_stands_in_the_label_columns(rows, ingest_rows, has_label):
    rows[2] |= {"has_label": has_label, "label_0": 1.0, "label_1": 0.0}
    rows[4] |= {"has_label": has_label, "label_0": None, "label_1": None}
    votes, _ = ingest_rows(rows, "validation")
    votes = by_row(votes)
    assert [k for k, s in enumerate(votes["status"]) if s == "unlabelled"] == [2, 4]
    assert votes["label_0"][2] is None
    assert votes["pair_id"][2] is not None


def test_a_row_without_prompt_is_kept_and_has_no_pair(rows, ingest_rows):
    rows[1]["caption"] = None
    votes, _ = ingest_rows(rows)
    vote = by_row(votes).row(1, named=True)
    assert (vote["status"], vote["pair_id"], vote["prompt_id"]) == ("no_prompt", None, None)
    assert vote["image_0_id"] is not None


def test_an_image_without_bytes_is_known_by_its_uid_and_its_votes_count(rows, ingest_rows):
    rows[0]["jpg_0"] = None
    votes, held = ingest_rows(rows[:1])
    uid = identity.image_id_of_uid("pickapic", rows[0]["image_0_uid"])
    image = held.row(by_predicate=pl.col("image_id") == uid, named=True)
    assert (image["status"], image["bytes"], image["source_uid"]) == ("no_bytes", None, rows[0]["image_0_uid"])
    assert votes["status"].to_list() == ["ok"]
    assert uid in (votes["image_0_id"][0], votes["image_1_id"][0])


def test_an_image_with_neither_bytes_nor_uid_makes_a_row_without_image(rows, ingest_rows):
    rows[0] |= {"jpg_0": None, "image_0_uid": None}
    votes, held = ingest_rows(rows[:1])
    assert votes["status"].to_list() == ["no_image"]
    assert votes["pair_id"].to_list() == [None]
    assert len(held) == 1


@pytest.mark.parametrize(
    ("damage", "status"),
    [
        (lambda data: b"GIF? no", "unreadable"),
        (lambda data: b"", "unreadable"),
        (lambda data: b"\0" * 20 + data[20:], "unreadable"),
        (lambda data: data[:-300], "truncated"),
    ],
)
def test_a_damaged_image_has_a_status_and_a_reason_and_keeps_its_vote(rows, ingest_rows, damage, status):
    data = damage(jpeg(1))
    rows[0]["jpg_0"] = data
    votes, held = ingest_rows(rows)
    image = held.row(by_predicate=pl.col("image_id") == identity.image_id_of_bytes(data)[0], named=True)
    assert image["status"] == status
    assert image["reason"]
    assert image["bytes"] == data
    assert held["status"].to_list().count("ok") == len(held) - 1
    assert set(votes["status"]) == {"ok"}


def test_a_jpeg_damaged_inside_passes_the_header_and_never_raises_anything_but_undecodable(rows, ingest_rows):
    whole = jpeg(2)
    tables = whole.index(b"\xff\xc4") + 4
    no_huffman = whole[:tables] + b"\xff" * 20 + whole[tables + 20 :]
    middle = len(whole) * 2 // 3
    garbled = whole[:middle] + bytes(range(64)) + whole[middle + 64 :]
    rows[0]["jpg_0"], rows[1]["jpg_0"] = no_huffman, garbled
    _, held = ingest_rows(rows[:2])
    assert set(held["status"]) == {"ok"}
    with pytest.raises(images.UndecodableImage):
        images.decode_rgb(no_huffman)
    try:
        size = images.decode_rgb(garbled).size
    except images.UndecodableImage:
        size = (48, 48)
    assert size == (48, 48)


def test_two_images_of_the_same_bytes_are_no_pair(rows, ingest_rows):
    rows[0]["jpg_1"] = rows[0]["jpg_0"]
    votes, held = ingest_rows(rows[:1])
    assert votes["status"].to_list() == ["same_image"]
    assert votes["pair_id"].to_list() == [None]
    assert len(held) == 1


def test_a_row_that_repeats_another_is_its_duplicate(rows, ingest_rows):
    votes, held = ingest_rows([*rows, dict(rows[2])])
    votes = by_row(votes)
    assert votes["status"].to_list() == ["ok"] * 8 + ["duplicate_of"]
    assert votes["reason"][8] == votes["vote_id"][2]
    assert len(held) == len({r[f"jpg_{i}"] for r in rows for i in (0, 1)})


def test_the_same_person_and_pair_at_another_time_is_another_vote(rows, ingest_rows):
    later = {**rows[2], "created_at": rows[7]["created_at"]}
    votes, _ = ingest_rows([*rows, later])
    assert set(votes["status"]) == {"ok"}


def test_rows_without_annotator_or_time_are_duplicates_only_if_everything_is_the_same(rows, ingest_rows):
    nobody = {**rows[0], "user_id": None, "label_0": 1.0, "label_1": 0.0}
    other_label = {**nobody, "label_0": 0.0, "label_1": 1.0}
    other_session = {**nobody, "ranking_id": 77}
    votes, _ = ingest_rows([nobody, other_label, other_session, dict(nobody)])
    votes = by_row(votes)
    assert votes["status"].to_list() == ["ok", "ok", "ok", "duplicate_of"]
    assert votes["reason"][3] == votes["vote_id"][0]


@pytest.mark.parametrize("first", [{"label_0": 0.7, "label_1": 0.3}, {"has_label": False}])
def test_a_vote_is_no_duplicate_of_a_row_that_does_not_count(rows, ingest_rows, first):
    votes, _ = ingest_rows([{**rows[0], **first}, rows[0], dict(rows[0])])
    votes = by_row(votes)
    assert votes["status"][0] in ("invalid_label", "unlabelled")
    assert votes["status"].to_list()[1:] == ["ok", "duplicate_of"]
    assert votes["reason"][2] == votes["vote_id"][1]


# --- bad files -----------------------------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_file_expected_and_found(rows, ingest_rows, tmp_path, store):
    with pytest.raises(SourceError) as error:
        ingest_rows(rows, schema=pa.schema([f for f in PICKAPIC_SCHEMA if f.name not in ("jpg_0", "jpg_1")]))
    message = str(error.value)
    assert str(tmp_path / "pap" / "data" / "train-00000-of-00001-0123456789abcdef.parquet") in message
    assert "column 'jpg_0' is missing" in message
    assert "'jpg_1'" in message.split("expected")[0]
    assert "found ['are_different'" in message
    assert store.manifests("votes") == store.manifests("images") == []


def test_a_column_of_an_unusable_type_is_named_with_file_expected_and_found(rows, ingest_rows, store):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([pa.field(f.name, image if f.name == "jpg_0" else f.type) for f in PICKAPIC_SCHEMA])
    wrapped = [{**r, "jpg_0": {"bytes": r["jpg_0"], "path": ""}} for r in rows]
    with pytest.raises(SourceError, match=r"train-00000.*column 'jpg_0': expected Binary, found Struct"):
        ingest_rows(wrapped, schema=schema)
    assert store.manifests("votes") == []


def test_a_label_that_is_no_number_is_named_by_its_column(rows, ingest_rows):
    schema = pa.schema([pa.field(f.name, pa.string() if f.name == "label_1" else f.type) for f in PICKAPIC_SCHEMA])
    with pytest.raises(SourceError, match=r"column 'label_1': expected Float64, found String"):
        ingest_rows([{**r, "label_1": "left"} for r in rows], schema=schema)


def test_labels_stored_as_text_are_read(rows, ingest_rows):
    schema = pa.schema(
        [pa.field(f.name, pa.string() if f.name.startswith("label_") else f.type) for f in PICKAPIC_SCHEMA]
    )
    votes, _ = ingest_rows(
        [{**r, "label_0": str(r["label_0"]), "label_1": str(r["label_1"])} for r in rows], schema=schema
    )
    assert set(votes["status"]) == {"ok"}


def test_columns_beyond_the_layout_do_no_harm(rows, ingest_rows):
    schema = PICKAPIC_SCHEMA.append(pa.field("their_own", pa.string()))
    votes, _ = ingest_rows([{**r, "their_own": "x"} for r in rows], schema=schema)
    assert set(votes["status"]) == {"ok"}


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no parquet"])
def test_an_unreadable_file_is_named_and_the_other_shards_ingest(world_copy, sources_of, store, damage):
    (source, _) = sources_of(world_copy)
    bad, *good = pickapic.list_shards(source)
    file = world_copy / "pickapic" / "data" / f"{bad.key.removeprefix('pickapic.')}.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SourceError, match=f"{file.name}: not a readable parquet file"):
        ingest.ingest_shard(store, source, bad)
    for shard in good:
        ingest.ingest_shard(store, ingest.plan(source), shard)
    assert [m.partition for m in store.manifests("votes")] == sorted(s.key for s in good)
    assert store.manifest("images", bad.key) is None


def test_a_parquet_file_damaged_in_a_later_row_group_leaves_nothing_visible(tmp_path, store, rows, write_pickapic):
    file = write_pickapic(tmp_path / "pap", rows)
    offset = pq.ParquetFile(file).metadata.row_group(1).column(9).data_page_offset
    data = bytearray(file.read_bytes())
    data[offset : offset + 40] = b"\xff" * 40
    file.write_bytes(bytes(data))
    source = SourceConfig(name="pap", layout="pickapic", location=str(tmp_path / "pap"))
    (shard,) = pickapic.list_shards(source)
    with pytest.raises(SourceError, match=file.name):
        ingest.ingest_shard(store, ingest.plan(source), shard)
    assert [store.manifest(t, shard.key) for t in ("images", "prompts", "votes")] == [None] * 3
    assert not list((tmp_path / "store").rglob("*.parquet"))


def test_a_folder_without_files_of_the_layout_is_named_with_what_was_expected(tmp_path):
    for layout, expected in (("pickapic", "data/"), ("hpd", r"train\.json")):
        source = SourceConfig(name="mine", layout=layout, location=str(tmp_path))
        with pytest.raises(SourceError, match=rf"source 'mine'.*{expected}.*") as error:
            ingest.LAYOUTS[layout].list_shards(source)
        assert str(tmp_path) in str(error.value)


# --- HPD -----------------------------------------------------------------------------------------------------------


def test_hpd_is_cut_into_several_shards_that_cover_every_record_once(tiny_world, sources_of):
    _, source = sources_of(tiny_world)
    shards = hpd.list_shards(source)
    ranges = [(s.key, s.start, s.stop) for s in shards]
    assert ranges == [
        ("hpd.train-0000000", 0, 10),
        ("hpd.train-0000010", 10, 20),
        ("hpd.train-0000020", 20, 30),
        ("hpd.test-0000000", 0, 1),
        ("hpd.test-0000001", 1, 2),
        ("hpd.test-0000002", 2, 3),
    ]


def test_hpd_pairs_and_rankings_become_votes(ingest_hpd, hpd_folder):
    votes, held = ingest_hpd()
    assert votes.group_by("split").len().sort("split").rows() == [("test", 10 * (36 + 36 + 45)), ("train", 30)]
    assert set(votes["status"]) == {"ok"}
    assert votes["was_swapped"].null_count() == len(votes), "the source does not say what was displayed first"
    assert votes.filter(split="train")["annotator_id"].null_count() == 30
    assert held["image_id"].n_unique() == 5 * 4 + 9 + 9 + 10
    assert set(held["status"]) == {"ok"}


def test_a_lower_rank_wins_every_pair_of_a_ranking(ingest_hpd, hpd_folder):
    votes, _ = ingest_hpd()
    for index, record in enumerate(json.loads((hpd_folder / "test.json").read_text())):
        ids = [identity.image_id_of_bytes((hpd_folder / "test" / n).read_bytes())[0] for n in record["image_path"]]
        for number, annotation in enumerate(record["raw_annotations"]):
            rank = dict(zip(ids, annotation["rank"], strict=True))
            group = votes.filter(group_id=f"hpd:test:{index}:{number}")
            assert len(group) == len(ids) * (len(ids) - 1) // 2
            assert set(group["annotator_id"]) == {f"hpd:{annotation['user_hash']}"}
            for a, b, label in group.select("image_0_id", "image_1_id", "label_0").iter_rows():
                assert label == float(rank[a] < rank[b])


def test_equal_ranks_are_a_tie(ingest_hpd, hpd_folder):
    edit_json(hpd_folder / "test.json", lambda r: r[0]["raw_annotations"][0].update(rank=[1] * len(r[0]["image_path"])))
    votes, _ = ingest_hpd()
    tied = votes.filter(group_id="hpd:test:0:0")
    assert set(tied["label_0"]) == {0.5}
    assert set(tied["status"]) == {"ok"}


def test_a_missing_image_file_is_an_image_without_bytes_whose_reason_names_the_path(ingest_hpd, hpd_folder):
    name = json.loads((hpd_folder / "train.json").read_text())[0]["file_path"][0]
    (hpd_folder / "train" / name).unlink()
    votes, held = ingest_hpd()
    (image,) = held.filter(status="no_bytes").to_dicts()
    assert str(hpd_folder / "train" / name) in image["reason"]
    assert image["image_id"] == identity.image_id_of_uid("hpd", f"train/{name}")
    assert len(votes) == 30 + 10 * 117


def test_a_ranking_of_another_length_than_its_group_is_refused_by_file_and_record(ingest_hpd, hpd_folder, store):
    edit_json(hpd_folder / "test.json", lambda records: records[1]["raw_annotations"][3]["rank"].pop())
    with pytest.raises(SourceError, match=r"test\.json: record 1: rater 3 ranks 8 images, the group has 9"):
        ingest_hpd()
    assert "hpd.test-0000001" not in [m.partition for t in ("votes", "images") for m in store.manifests(t)]


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("train", lambda r: r[3].pop("prompt"), r"record 3: field 'prompt' is missing"),
        ("train", lambda r: r[3].update(file_path=["a.jpg"]), "record 3: file_path: expected two file names"),
        ("train", lambda r: r[3].update(file_path=[1, 2]), "record 3: file_path: expected two file names"),
        ("train", lambda r: r[3].update(human_preference=[1]), r"record 3: human_preference: expected \[1, 0\]"),
        ("train", lambda r: r[3].update(human_preference=["1", "0"]), r"record 3: human_preference: expected \[1, 0\]"),
        ("train", lambda r: r[3].update(prompt=7), "record 3: prompt: expected text, found 7"),
        ("test", lambda r: r[0].update(image_path=None), "record 0: image_path: expected a list"),
        ("test", lambda r: r[0].update(raw_annotations=None), "record 0: raw_annotations: expected"),
        ("test", lambda r: r[0]["raw_annotations"][2].pop("rank"), "record 0: rank of rater 2: expected"),
        (
            "test",
            lambda r: r[0]["raw_annotations"][2]["rank"].__setitem__(0, None),
            "record 0: rank of rater 2: expected",
        ),
    ],
)
def test_a_record_of_another_shape_is_refused_by_file_record_and_field(ingest_hpd, hpd_folder, file, edit, message):
    edit_json(hpd_folder / f"{file}.json", edit)
    with pytest.raises(SourceError, match=rf"{file}\.json: {message}"):
        ingest_hpd()


@pytest.mark.parametrize("content", ["[{", '{"a": 1}', "[1, 2]"])
def test_a_json_file_that_is_no_list_of_objects_is_refused_by_name(ingest_hpd, hpd_folder, content):
    (hpd_folder / "train.json").write_text(content)
    with pytest.raises(SourceError, match=r"train\.json: (not a readable JSON file|expected a list of objects)"):
        ingest_hpd()


def test_an_hpd_label_that_is_no_choice_and_one_that_is_null_keep_their_rows(ingest_hpd, hpd_folder):
    def edit(records):
        records[0]["human_preference"] = [1, 1]
        records[1]["human_preference"] = None
        records[2]["prompt"] = None

    edit_json(hpd_folder / "train.json", edit)
    votes, _ = ingest_hpd()
    status = dict(votes.filter(split="train").select("source_row", "status").iter_rows())
    assert [status[f"train:{k}"] for k in range(4)] == ["invalid_label", "unlabelled", "no_prompt", "ok"]


# --- idempotence and accounting ------------------------------------------------------------------------------------


def test_ingesting_again_reuses_everything_until_the_file_changes(tmp_path, store, rows, write_pickapic):
    write_pickapic(tmp_path / "pap", rows)
    source = SourceConfig(name="pap", layout="pickapic", location=str(tmp_path / "pap"))

    def reused():
        (shard,) = pickapic.list_shards(source)
        return {name: b.is_reused for name, b in ingest.ingest_shard(store, ingest.plan(source), shard).items()}

    assert reused() == dict.fromkeys(("images", "prompts", "votes"), False)
    assert reused() == dict.fromkeys(("images", "prompts", "votes"), True)
    write_pickapic(tmp_path / "pap", rows[:5])
    assert reused() == dict.fromkeys(("images", "prompts", "votes"), False)
    assert len(store.scan(schemas.VOTES).collect()) == 5


def test_the_manifest_accounts_for_every_row_by_status(tmp_path, store, rows, write_pickapic):
    rows[0]["label_0"] = 0.3
    rows[1]["caption"] = None
    write_pickapic(tmp_path / "pap", [*rows, dict(rows[5])])
    source = SourceConfig(name="pap", layout="pickapic", location=str(tmp_path / "pap"))
    (shard,) = pickapic.list_shards(source)
    manifest = ingest.ingest_shard(store, ingest.plan(source), shard)["votes"].manifest
    assert manifest.rows_by_status == {"duplicate_of": 1, "invalid_label": 1, "no_prompt": 1, "ok": 6}
    assert sum(manifest.rows_by_status.values()) == manifest.rows == manifest.extra["rows_in"] == 9


def test_ingestion_is_the_same_where_the_truth_is_not_there(world_copy, sources_of, store, ingest_all, ingested):
    shutil.rmtree(world_copy / "truth")
    ingest_all(store, sources_of(world_copy))
    with_truth, _ = ingested
    assert [m.content for m in store.manifests("votes")] == [m.content for m in with_truth.manifests("votes")]


def test_two_shards_of_one_key_are_refused(tiny_world, sources_of):
    config = small_world(tiny_world.parent)
    source = sources_of(tiny_world)[0]
    twice = config.model_copy(update={"sources": (source, source)})
    with pytest.raises(SourceError, match="shard keys repeat"):
        ingest.list_shards(twice)


def test_image_files_that_arrive_after_the_lists_are_ingested_by_the_next_run(world_copy, sources_of, store, tmp_path):
    _, source = sources_of(world_copy)
    shard = hpd.list_shards(source)[0]
    images, away = world_copy / "hpdv2" / "train", tmp_path / "away"
    images.rename(away)
    first = ingest.ingest_shard(store, ingest.plan(source), shard)
    assert set(first["images"].manifest.rows_by_status) == {"no_bytes"}
    away.rename(images)
    second = ingest.ingest_shard(store, source, hpd.list_shards(source)[0])
    assert not second["images"].is_reused
    assert set(second["images"].manifest.rows_by_status) == {"ok"}
    assert ingest.ingest_shard(store, ingest.plan(source), shard)["images"].is_reused


def test_a_bad_record_costs_its_own_shard_and_no_other(world_copy, sources_of, store):
    _, source = sources_of(world_copy)
    path = world_copy / "hpdv2" / "train.json"
    records = json.loads(path.read_text())
    del records[0]["prompt"]
    path.write_text(json.dumps(records))
    first, second, *_ = hpd.list_shards(source)
    with pytest.raises(SourceError, match=r"record 0: field 'prompt' is missing"):
        ingest.ingest_shard(store, source, first)
    assert ingest.ingest_shard(store, source, second)["votes"].manifest.rows == 10
