import io
import json
import math
import re
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import catalogue, identity, images, ingest, schemas
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


def without(*columns):
    """Pick-a-Pic's schema less some columns."""
    return pa.schema([f for f in PICKAPIC_SCHEMA if f.name not in columns])


def with_type(column, dtype):
    """Pick-a-Pic's schema with one column of another type."""
    return pa.schema([pa.field(f.name, dtype if f.name == column else f.type) for f in PICKAPIC_SCHEMA])


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
    file = "data/train-00000-of-00001-0123456789abcdef.parquet"
    assert by_row(votes)["source_row"].to_list() == [f"{file}:{k}" for k in range(8)]
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


def test_an_image_without_bytes_is_known_by_its_uid_and_its_votes_count(rows, ingest_rows, store):
    rows[0]["jpg_0"] = None
    votes, held = ingest_rows(rows[:1])
    uid = identity.image_id_of_uid("pickapic", rows[0]["image_0_uid"])
    image = held.row(by_predicate=pl.col("image_id") == uid, named=True)
    assert (image["status"], image["bytes"], image["sha256"]) == ("no_bytes", None, None)
    names = store.scan(schemas.IMAGE_NAMES).filter(uid=rows[0]["image_0_uid"]).collect()
    assert names.select("named_id", "image_id", "family").rows() == [(uid, uid, "pickapic")]
    assert votes["status"].to_list() == ["ok"]
    assert uid in (votes["image_0_id"][0], votes["image_1_id"][0])


def test_an_image_with_bytes_keeps_the_name_that_the_source_gives_it(rows, ingest_rows, store):
    ingest_rows(rows)
    expected = {
        (
            identity.image_id_of_uid("pickapic", r[f"image_{i}_uid"]),
            identity.image_id_of_bytes(r[f"jpg_{i}"])[0],
            "pickapic",
            r[f"image_{i}_uid"],
        )
        for r in rows
        for i in (0, 1)
    }
    names = store.scan(schemas.IMAGE_NAMES).collect().rows()
    assert set(names) == expected
    assert len(names) == len(expected)


def test_a_release_without_image_columns_has_votes_on_images_known_by_uid(rows, ingest_rows):
    votes, held = ingest_rows(rows, schema=without("jpg_0", "jpg_1"))
    ids = {identity.image_id_of_uid("pickapic", r[f"image_{i}_uid"]) for r in rows for i in (0, 1)}
    assert set(held["image_id"]) == ids
    assert set(held["status"]) == {"no_bytes"}
    for raw, vote in zip(rows, by_row(votes).iter_rows(named=True), strict=True):
        first, second = (identity.image_id_of_uid("pickapic", raw[f"image_{i}_uid"]) for i in (0, 1))
        assert (vote["image_0_id"], vote["image_1_id"]) == tuple(sorted((first, second)))
        assert vote["label_0"] == raw["label_1" if first > second else "label_0"]
        assert vote["status"] == "ok"


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
        ingest_rows(rows, schema=without("image_1_uid", "label_0"))
    message = str(error.value)
    assert str(tmp_path / "pap" / "data" / "train-00000-of-00001-0123456789abcdef.parquet") in message
    assert "column 'image_1_uid' is missing" in message
    assert "'label_0'" in message.split("expected")[0]
    assert "expected ['caption', 'image_0_uid', 'image_1_uid', 'label_0']" in message
    assert "found ['are_different'" in message
    assert store.manifests("votes") == store.manifests("images") == []


@pytest.mark.parametrize(
    ("column", "dtype", "value", "expected"),
    [
        ("jpg_0", pa.list_(pa.uint8()), [255, 216], r"bytes, an image struct \{bytes, path\} or text, found list"),
        ("jpg_1", pa.float64(), 0.5, r"bytes, an image struct \{bytes, path\} or text, found double"),
        ("jpg_0", pa.struct([("path", pa.string())]), {"path": "a.jpg"}, r"bytes, an image struct .*, found struct"),
        ("label_0", pa.list_(pa.float64()), [1.0], "Float64, found list"),
        ("label_1", pa.timestamp("us"), 0, "Float64, found timestamp"),
        ("caption", pa.binary(), b"a cat", "String, found binary"),
        ("created_at", pa.int64(), 0, "Datetime.*, found int64"),
        ("image_0_uid", pa.list_(pa.string()), ["a"], "String, found list"),
    ],
)
def test_a_column_of_an_unusable_type_is_named_with_file_expected_and_found(
    rows, ingest_rows, store, column, dtype, value, expected
):
    with pytest.raises(SourceError, match=rf"train-00000.*parquet: column '{column}': expected {expected}"):
        ingest_rows([{**r, column: value} for r in rows], schema=with_type(column, dtype))
    assert store.manifests("votes") == store.manifests("images") == []


def test_images_wrapped_in_structs_are_read_as_plain_ones_are(rows, ingest_rows):
    schema = with_type("jpg_0", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    votes, held = ingest_rows([{**r, "jpg_0": {"bytes": r["jpg_0"], "path": "x.jpg"}} for r in rows], schema=schema)
    assert set(held["image_id"]) == {identity.image_id_of_bytes(r[f"jpg_{i}"])[0] for r in rows for i in (0, 1)}
    assert set(held["status"]) == {"ok"}
    assert set(votes["status"]) == {"ok"}


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("label_1", "left", "column 'label_1': expected a number, found 'left'"),
        ("has_label", "perhaps", "column 'has_label': expected true or false, found 'perhaps'"),
        ("created_at", "yesterday", "column 'created_at': expected a time, found 'yesterday'"),
    ],
)
def test_a_value_that_cannot_be_read_costs_its_row_alone(rows, ingest_rows, store, column, value, reason):
    texts = [{**r, column: value if k == 3 else str(r[column])} for k, r in enumerate(rows)]
    votes, held = ingest_rows(texts, schema=with_type(column, pa.string()))
    votes = by_row(votes)
    assert votes["status"].to_list() == ["ok"] * 3 + ["unreadable"] + ["ok"] * 4
    assert votes["reason"][3] == reason
    assert (votes["label_0"][3], votes["count"][3], votes["pair_id"][3]) == (None, None, None)
    assert votes["label_0"].drop_nulls().len() == 7
    assert set(held["status"]) == {"ok"}
    assert store.manifests("votes")[0].rows_by_status == {"ok": 7, "unreadable": 1}


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
        ingest.ingest_shard(store, ingest.plan(source), bad)
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
    for layout, expected in (("pickapic", "pickapic: parquet with columns .*image_0_uid"), ("hpd", r"train\.json")):
        source = SourceConfig(name="mine", layout=layout, location=str(tmp_path))
        with pytest.raises(SourceError, match=rf"source 'mine'.*{expected}.*") as error:
            ingest.LAYOUTS[layout].list_shards(source)
        assert str(tmp_path) in str(error.value)


def test_a_folder_that_fits_no_layout_is_named_with_what_it_holds_and_every_layout(tmp_path):
    pq.write_table(pa.table({"mine": [1]}), tmp_path / "some.parquet")
    (tmp_path / "more.json").write_text('[{"theirs": 1}]')
    with pytest.raises(SourceError, match=r"source 'mine': .* fits no layout") as error:
        ingest.list_source(SourceConfig(name="mine", location=str(tmp_path)))
    message = str(error.value)
    assert "some.parquet: parquet with ['mine']" in message
    assert "more.json: json with ['theirs']" in message
    assert [m.EXPECTED for m in ingest.LAYOUTS.values() if m.EXPECTED not in message] == []


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


def of_rater(votes, record, number, images):
    """The votes that one rater's ranking in a record of test.json became."""
    pairs = images * (images - 1) // 2
    return votes.filter(pl.col("source_row") == f"test.json:{record}", pl.col("rater") // pairs == number)


def test_a_lower_rank_wins_every_pair_of_a_ranking(ingest_hpd, hpd_folder):
    votes, _ = ingest_hpd()
    for index, record in enumerate(json.loads((hpd_folder / "test.json").read_text())):
        ids = [identity.image_id_of_bytes((hpd_folder / "test" / n).read_bytes())[0] for n in record["image_path"]]
        for number, annotation in enumerate(record["raw_annotations"]):
            rank = dict(zip(ids, annotation["rank"], strict=True))
            group = of_rater(votes, index, number, len(ids))
            assert len(group) == len(ids) * (len(ids) - 1) // 2
            assert group["group_id"].n_unique() == 1
            assert set(group["annotator_id"]) == {f"hpd:{annotation['user_hash']}"}
            for a, b, label in group.select("image_0_id", "image_1_id", "label_0").iter_rows():
                assert label == float(rank[a] < rank[b])
    groups = votes.filter(split="test")["group_id"]
    assert groups.str.starts_with("hpd:test:").all()
    assert groups.n_unique() == 3 * 10, "each rater's ranking of a group is one"


def test_the_pairs_of_one_train_prompt_are_one_group(ingest_hpd):
    votes, _ = ingest_hpd()
    train = votes.filter(split="train")
    assert train["group_id"].to_list() == [f"hpd:train:{p}" for p in train["prompt_id"]]
    assert train["group_id"].n_unique() == 5


def test_equal_ranks_are_a_tie(ingest_hpd, hpd_folder):
    edit_json(hpd_folder / "test.json", lambda r: r[0]["raw_annotations"][0].update(rank=[1] * len(r[0]["image_path"])))
    votes, _ = ingest_hpd()
    size = len(json.loads((hpd_folder / "test.json").read_text())[0]["image_path"])
    tied = of_rater(votes, 0, 0, size)
    assert len(tied) == size * (size - 1) // 2
    assert set(tied["label_0"]) == {0.5}
    assert set(tied["status"]) == {"ok"}
    assert len(votes.filter(label_0=0.5)) == len(tied)


def test_a_missing_image_file_is_missing_and_its_reason_names_the_path(ingest_hpd, hpd_folder):
    name = json.loads((hpd_folder / "train.json").read_text())[0]["file_path"][0]
    (hpd_folder / "train" / name).unlink()
    votes, held = ingest_hpd()
    (image,) = held.filter(pl.col("status") != "ok").unique("image_id").to_dicts()
    assert (image["status"], image["bytes"]) == ("missing", None)
    assert str(hpd_folder / "train" / name) in image["reason"]
    assert image["image_id"] == identity.image_id_of_uid("hpd", f"train/{name}")
    assert len(votes) == 30 + 10 * 117
    assert set(votes["status"]) == {"ok"}


@pytest.mark.parametrize("name", ["../secret.jpg", "x/../../secret.jpg", "{folder}/secret.jpg"])
def test_a_name_that_leaves_the_image_folder_is_refused_and_never_read(ingest_hpd, hpd_folder, name):
    (hpd_folder / "secret.jpg").write_bytes(jpeg(5))
    name = name.format(folder=hpd_folder)
    edit_json(hpd_folder / "train.json", lambda r: r[0]["file_path"].__setitem__(0, name))
    votes, held = ingest_hpd()
    (image,) = held.filter(pl.col("status") != "ok").to_dicts()
    assert (image["status"], image["bytes"], image["sha256"]) == ("refused", None, None)
    assert ("an absolute path" if name.startswith("/") else "a path with '..'") in image["reason"]
    assert identity.image_id_of_bytes(jpeg(5))[0] not in held["image_id"]
    assert image["image_id"] in votes.filter(source_row="train.json:0").select("image_0_id", "image_1_id").row(0)


def test_a_repeated_record_counts_once_within_a_shard_and_across_shards(ingest_hpd, hpd_folder, store):
    edit_json(hpd_folder / "train.json", lambda r: r.__setitem__(slice(28, None), [r[28], r[28], r[0]]))
    edit_json(hpd_folder / "test.json", lambda r: r.append(r[0]))
    votes, _ = ingest_hpd()
    keys = [m.partition for m in store.manifests("votes")]
    catalogue.build(store, keys)
    counted = catalogue.counted_votes(store, keys).collect()
    group = 10 * math.comb(len(json.loads((hpd_folder / "test.json").read_text())[0]["image_path"]), 2)
    assert len(votes) == 31 + 10 * 117 + group
    assert len(counted) == 29 + 10 * 117
    now = catalogue.resolved_votes(store, keys).filter(status="duplicate_of").collect()
    content = [c for c in votes.columns if c not in ("vote_id", "source_row", "status", "reason")]
    original = counted.join(now, left_on="vote_id", right_on="reason", suffix="_repeated")
    assert len(original) == len(now) == 2 + group
    for column in content:
        assert original[column].equals(original[f"{column}_repeated"], null_equal=True)
    rows = {frozenset(r) for r in original.select("source_row", "source_row_repeated").rows()}
    assert rows == {
        frozenset(pair)
        for pair in (
            ("train.json:0", "train.json:30"),
            ("train.json:28", "train.json:29"),
            ("test.json:0", "test.json:3"),
        )
    }


def test_every_repetition_names_a_vote_that_counts_however_often_and_wherever_it_is_repeated(
    ingest_hpd, hpd_folder, store
):
    edit_json(hpd_folder / "train.json", lambda records: records.extend([*records[:5], *records[:5]]))
    ingest_hpd()
    keys = [m.partition for m in store.manifests("votes")]
    catalogue.build(store, keys)
    votes = catalogue.resolved_votes(store, keys).filter(split="train").collect()
    repeated = votes.filter(status="duplicate_of")
    assert len(repeated) == 10
    assert set(repeated["reason"]) <= set(votes.filter(status="ok")["vote_id"])


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("train", lambda r: r[3].pop("prompt"), r"prompt: expected a field of \[.*'prompt'.*\], found \['file_path', "),
        ("train", lambda r: r.__setitem__(3, [1]), r"record: expected an object, found \[1\]"),
        ("train", lambda r: r[3].update(file_path=["a.jpg"]), r"file_path: expected 2 file names, found \['a.jpg'\]"),
        ("train", lambda r: r[3].update(file_path=[1, 2]), r"file_path: expected file names, found \[1, 2\]"),
        (
            "train",
            lambda r: r[3].update(file_path=["\ud800.jpg", "a.jpg"]),
            r"file_path: not valid UTF-8: '\\ud800.jpg'",
        ),
        (
            "train",
            lambda r: r[3].update(human_preference=[1]),
            r"human_preference: expected \[1, 0\] or \[0, 1\], found \[1\]",
        ),
        (
            "train",
            lambda r: r[3].update(human_preference=["1", "0"]),
            r"human_preference: expected \[1, 0\] or \[0, 1\], found \['1', '0'\]",
        ),
        ("train", lambda r: r[3].update(human_preference=[True, False]), r"human_preference: expected .*found \[True"),
        ("train", lambda r: r[3].update(human_preference=[float("nan"), 1]), "human_preference: expected .*found .nan"),
        ("train", lambda r: r[3].update(prompt=7), "prompt: expected text, found 7"),
        ("train", lambda r: r[3].update(prompt="a \udfff"), "prompt: not valid UTF-8: 'a .udfff'"),
        ("test", lambda r: r[1].update(image_path=None), "image_path: expected a list of file names, found None"),
        ("test", lambda r: r[1].update(image_path=["a.jpg"]), "image_path: expected at least two images, found"),
        ("test", lambda r: r[1].update(raw_annotations=None), "raw_annotations: expected a list of .*, found None"),
        ("test", lambda r: r[1].update(raw_annotations=[]), r"raw_annotations: expected a list of .*, found \[\]"),
        ("test", lambda r: r[1]["raw_annotations"][2].pop("rank"), "rank of rater 2: expected a list .*, found None"),
        (
            "test",
            lambda r: r[1]["raw_annotations"][2]["rank"].__setitem__(0, None),
            r"rank of rater 2: expected a list of finite numbers, found \[None, ",
        ),
        (
            "test",
            lambda r: r[1]["raw_annotations"][3]["rank"].pop(),
            r"rank of rater 3: expected 9 numbers, one per image, found \[\d",
        ),
    ],
)
def test_a_record_of_another_shape_is_kept_as_unreadable_with_field_expected_and_found(
    ingest_hpd, hpd_folder, store, file, edit, message
):
    record = 3 if file == "train" else 1
    edit_json(hpd_folder / f"{file}.json", edit)
    votes, _ = ingest_hpd()
    (bad,) = votes.filter(status="unreadable").to_dicts()
    assert re.match(message, bad["reason"])
    assert (bad["source_row"], bad["split"]) == (f"{file}.json:{record}", file)
    assert [bad[c] for c in ("pair_id", "prompt_id", "label_0", "count")] == [None] * 4
    others = votes.filter(pl.col("vote_id") != bad["vote_id"])
    assert set(others["status"]) == {"ok"}
    assert len(others) == (29 + 10 * 117 if file == "train" else 30 + 10 * (117 - 36))
    shard = "hpd.train-0000000" if file == "train" else "hpd.test-0000001"
    assert store.require("votes", shard).extra["rows_in"] == (10 if file == "train" else 1)


def test_the_images_of_an_unreadable_record_are_not_ingested_for_it(ingest_hpd, hpd_folder):
    edit_json(hpd_folder / "test.json", lambda records: records[1].pop("prompt"))
    _, held = ingest_hpd()
    for index, record in enumerate(json.loads((hpd_folder / "test.json").read_text())):
        ids = {identity.image_id_of_bytes((hpd_folder / "test" / n).read_bytes())[0] for n in record["image_path"]}
        assert (ids <= set(held["image_id"])) is (index != 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "record 0 is not readable JSON"),
        ('[{"a": 1}, {"b" 2}]', "record 1 is not readable JSON"),
        ('[{"a": 1}', "ends after 1 records without the closing bracket"),
        ("", "is empty"),
        ('"text"', "not a JSON list of records"),
    ],
)
def test_a_json_file_that_is_no_whole_list_of_records_is_refused_by_name(ingest_hpd, hpd_folder, content, message):
    (hpd_folder / "train.json").write_text(content)
    with pytest.raises(SourceError, match=rf"{re.escape(str(hpd_folder))}/train\.json: {message}"):
        ingest_hpd()


@pytest.mark.parametrize("behind", ['[{"prompt": "more"}]', '{"prompt": "more"}', "garbage"])
def test_a_json_list_with_more_behind_it_is_refused_by_name_and_nothing_is_dropped(ingest_hpd, hpd_folder, behind):
    path = hpd_folder / "train.json"
    path.write_text(path.read_text() + behind)
    with pytest.raises(SourceError, match=re.escape(str(path))):
        ingest_hpd()


@pytest.mark.parametrize(
    ("content", "rows", "reason"),
    [
        ('{"a": 1}', 1, r"human_preference: expected a field of \[.*\], found \['a'\]"),
        ('{"a": 1}\n{"a": 2}\n', 2, r"human_preference: expected a field of \[.*\], found \['a'\]"),
        ("[1, 2]", 2, r"record: expected an object, found \d"),
    ],
)
def test_records_of_something_else_are_rows_that_cannot_be_read(ingest_hpd, hpd_folder, content, rows, reason):
    (hpd_folder / "train.json").write_text(content)
    votes, _ = ingest_hpd()
    train = votes.filter(split="train")
    assert train["source_row"].to_list() == [f"train.json:{k}" for k in range(rows)]
    assert set(train["status"]) == {"unreadable"}
    assert all(re.match(reason, r) for r in train["reason"])


def test_records_one_per_line_are_read_as_a_list_is(ingest_hpd, hpd_folder):
    path = hpd_folder / "train.json"
    path.write_text("\n".join(json.dumps(r) for r in json.loads(path.read_text())))
    votes, _ = ingest_hpd()
    train = votes.filter(split="train")
    assert set(train["source_row"]) == {f"train.json:{k}" for k in range(30)}
    assert set(train["status"]) == {"ok"}


def test_an_hpd_label_that_is_no_choice_and_one_that_is_null_keep_their_rows(ingest_hpd, hpd_folder):
    def edit(records):
        records[0]["human_preference"] = [1, 1]
        records[1]["human_preference"] = None
        records[2]["prompt"] = None

    edit_json(hpd_folder / "train.json", edit)
    votes, _ = ingest_hpd()
    status = dict(votes.filter(split="train").select("source_row", "status").iter_rows())
    assert [status[f"train.json:{k}"] for k in range(4)] == ["invalid_label", "unlabelled", "no_prompt", "ok"]


# --- idempotence and accounting ------------------------------------------------------------------------------------


def test_ingesting_again_reuses_everything_until_the_file_changes(tmp_path, store, rows, write_pickapic):
    write_pickapic(tmp_path / "pap", rows)
    source = SourceConfig(name="pap", layout="pickapic", location=str(tmp_path / "pap"))

    def reused():
        (shard,) = pickapic.list_shards(source)
        return {name: b.is_reused for name, b in ingest.ingest_shard(store, ingest.plan(source), shard).items()}

    tables = ("images", "image_names", "prompts", "votes")
    assert reused() == dict.fromkeys(tables, False)
    assert reused() == dict.fromkeys(tables, True)
    write_pickapic(tmp_path / "pap", rows[:5])
    assert reused() == dict.fromkeys(tables, False)
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
    assert set(first["images"].manifest.rows_by_status) == {"missing"}
    away.rename(images)
    second = ingest.ingest_shard(store, ingest.plan(source), hpd.list_shards(source)[0])
    assert not second["images"].is_reused
    assert set(second["images"].manifest.rows_by_status) == {"ok"}
    assert ingest.ingest_shard(store, ingest.plan(source), shard)["images"].is_reused


def test_a_bad_record_costs_its_own_row_and_no_other(world_copy, sources_of, store):
    _, source = sources_of(world_copy)
    edit_json(world_copy / "hpdv2" / "train.json", lambda records: records[0].pop("prompt"))
    first, second, *_ = hpd.list_shards(source)
    damaged = ingest.ingest_shard(store, ingest.plan(source), first)["votes"].manifest
    assert damaged.rows_by_status == {"ok": 9, "unreadable": 1}
    assert damaged.extra["rows_in"] == 10
    whole = ingest.ingest_shard(store, ingest.plan(source), second)["votes"].manifest
    assert whole.rows_by_status == {"ok": 10}
