import base64
import datetime as dt

import polars as pl
import pyarrow as pa
import pytest
from polars.testing import assert_frame_equal

from pipelines import identity
from pipelines.sources import SourceError
from pipelines.world.raw import PICKAPIC_SCHEMA

FILE = "data/train-00000-of-00001-0123456789abcdef.parquet"
NO_IMAGES = pa.schema([f for f in PICKAPIC_SCHEMA if not f.name.startswith("jpg_")])
TEXT = pa.schema([(f.name, pa.string()) for f in PICKAPIC_SCHEMA])


@pytest.fixture
def rows(raw_rows):
    """Eight rows that differ in time and images, the second a tie, the third without a label."""
    rows = [dict(r) for r in raw_rows[:8]]
    rows[1] |= {"label_0": 0.5, "label_1": 0.5}
    rows[2] |= {"has_label": False, "label_0": None, "label_1": None}
    return rows


def as_text(row):
    """A row of a conversion in which every column is text; what is missing is the word None."""
    return {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
        for name, value in row.items()
    }


def without(rows, *names):
    schema = pa.schema([f for f in PICKAPIC_SCHEMA if f.name not in names])
    return [{k: v for k, v in r.items() if k not in names} for r in rows], schema


def broken_text(values):
    """A text column with bytes that are no UTF-8: parquet does not check."""
    return pa.array(values, pa.binary()).view(pa.string())


# --- with and without images -----------------------------------------------------------------------------------------


def test_votes_and_images_of_the_original_columns_are_those_of_the_rows(rows, take, write_parquet, tmp_path, id_of):
    write_parquet(tmp_path / "pap" / FILE, rows, PICKAPIC_SCHEMA)
    taken = take(tmp_path / "pap")
    assert taken.status() == ["ok", "ok", "unlabelled", *["ok"] * 5]
    for raw, vote in zip(rows, taken.votes.iter_rows(named=True), strict=True):
        first, second = id_of(raw["jpg_0"]), id_of(raw["jpg_1"])
        assert (vote["image_0_id"], vote["image_1_id"]) == (min(first, second), max(first, second))
        assert vote["label_0"] == (raw["label_0"] if first < second else raw["label_1"])
        assert vote["was_swapped"] is (first > second)
    assert set(taken.images["image_id"]) == {id_of(r[f"jpg_{i}"]) for r in rows for i in (0, 1)}
    assert set(taken.images["status"]) == {"ok"}


def test_a_release_without_images_gives_the_same_votes_on_the_images_uids(
    rows, take, write_parquet, tmp_path, label_for
):
    write_parquet(tmp_path / "pap" / FILE, rows, NO_IMAGES)
    taken = take(tmp_path / "pap")
    assert taken.status() == ["ok", "ok", "unlabelled", *["ok"] * 5]
    for raw, vote in zip(rows, taken.votes.iter_rows(named=True), strict=True):
        assert label_for(vote, identity.image_id_of_uid("pickapic", raw["image_0_uid"])) == raw["label_0"]
        assert label_for(vote, identity.image_id_of_uid("pickapic", raw["image_1_uid"])) == raw["label_1"]
    uids = {r[f"image_{i}_uid"] for r in rows for i in (0, 1)}
    assert set(taken.images["image_id"]) == {identity.image_id_of_uid("pickapic", u) for u in uids}
    assert set(taken.images["status"]) == {"no_bytes"}
    assert taken.images["bytes"].null_count() == len(taken.images)


def test_an_image_above_the_limit_is_too_large_and_known_by_its_uid(rows, take, write_parquet, tmp_path):
    limit = max(len(r[f"jpg_{i}"]) for r in rows for i in (0, 1))
    rows[4]["jpg_1"] = rows[4]["jpg_1"] + b"\0" * limit
    write_parquet(tmp_path / "pap" / FILE, rows, PICKAPIC_SCHEMA)
    taken = take(tmp_path / "pap", limits={"max_image_bytes": limit})
    (image,) = taken.images.filter(pl.col("status") != "ok").to_dicts()
    assert image["status"] == "too_large"
    assert f"{len(rows[4]['jpg_1'])} bytes, limit limits.max_image_bytes = {limit}" in image["reason"]
    assert image["image_id"] == identity.image_id_of_uid("pickapic", rows[4]["image_1_uid"])
    assert image["bytes"] is None
    assert taken.status()[4] == "ok"


# --- file names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("data/validation_unique-00000-of-00002-0123456789abcdef.parquet", "validation"),
        ("data/test_unique-00000-of-00001-0123456789abcdef.parquet", "test"),
        ("data/train-00644-of-00645-b2f85eb0c3d3c3d9.parquet", "train"),
        ("pickapic_train_part3.parquet", "train"),
        ("mirror/val/0001.parquet", "validation"),
        ("Test/part-7.parquet", "test"),
        ("trained/testing-parts.parquet", None),
        ("0001.parquet", None),
    ],
)
def test_the_split_is_read_from_the_files_name_or_its_folders(rows, take, write_parquet, tmp_path, file, split):
    write_parquet(tmp_path / "pap" / file, rows, PICKAPIC_SCHEMA)
    taken = take(tmp_path / "pap")
    assert set(taken.votes["split"]) == {split}
    assert taken.votes["source_row"].to_list() == [f"{file}:{i}" for i in range(8)]


def test_the_sources_split_holds_for_files_whose_names_tell_none(rows, take, write_parquet, tmp_path):
    write_parquet(tmp_path / "pap" / "a.parquet", rows[:3], PICKAPIC_SCHEMA)
    write_parquet(tmp_path / "pap" / "train" / "b.parquet", rows[3:], PICKAPIC_SCHEMA)
    votes = take(tmp_path / "pap", split="test").votes
    assert votes["split"].to_list() == ["test"] * 3 + ["train"] * 5


def test_a_name_in_a_folder_is_more_particular_than_the_folder(rows, take, write_parquet, tmp_path):
    write_parquet(tmp_path / "pap" / "test" / "train-0.parquet", rows, PICKAPIC_SCHEMA)
    assert set(take(tmp_path / "pap").votes["split"]) == {"train"}


def test_files_of_many_names_are_shards_of_different_keys(rows, take, write_parquet, tmp_path):
    names = ["data/a b.parquet", "data/a-b.parquet", "data/a_b.parquet", "c/a-b.parquet", "data/\u00e4.parquet"]
    for i, name in enumerate(names):
        write_parquet(tmp_path / "pap" / name, [rows[i]], PICKAPIC_SCHEMA)
    taken = take(tmp_path / "pap")
    assert len({s.key for s in taken.shards}) == 5
    assert len(taken.votes) == 5


# --- columns in other types ------------------------------------------------------------------------------------------


def test_a_conversion_of_every_column_to_text_gives_the_same_votes_and_images(rows, take, write_parquet, tmp_path):
    write_parquet(tmp_path / "typed" / FILE, rows, PICKAPIC_SCHEMA)
    write_parquet(tmp_path / "text" / FILE, [as_text(r) for r in rows], TEXT)
    typed, text = take(tmp_path / "typed"), take(tmp_path / "text")
    assert text.votes["created_at"].to_list() == [r["created_at"].replace(tzinfo=None) for r in rows]
    assert_frame_equal(text.votes, typed.votes)
    assert_frame_equal(text.images.sort("image_id"), typed.images.sort("image_id"))


def test_a_file_that_polars_wrote_with_categories_gives_the_same_votes(rows, take, write_parquet, tmp_path):
    original = write_parquet(tmp_path / "typed" / FILE, rows, PICKAPIC_SCHEMA)
    again = pl.read_parquet(original).with_columns(pl.col("caption", "model_0", "model_1").cast(pl.Categorical))
    (tmp_path / "polars" / "data").mkdir(parents=True)
    again.write_parquet(tmp_path / "polars" / FILE)
    assert_frame_equal(take(tmp_path / "polars").votes, take(tmp_path / "typed").votes)


def test_a_person_whose_number_was_stored_as_a_float_is_the_same_person(rows, take, write_parquet, tmp_path):
    schema = PICKAPIC_SCHEMA.set(PICKAPIC_SCHEMA.get_field_index("user_id"), pa.field("user_id", pa.float64()))
    edited = [{**r, "user_id": float(r["user_id"])} for r in rows]
    edited[3]["user_id"], edited[4]["user_id"] = float("nan"), None
    write_parquet(tmp_path / "pap" / FILE, edited, schema)
    expected = [f"pickapic:{r['user_id']}" for r in rows]
    expected[3] = expected[4] = None
    assert take(tmp_path / "pap").votes["annotator_id"].to_list() == expected


def test_times_of_a_zone_and_of_every_spelling_are_stored_in_utc(rows, take, write_parquet, tmp_path):
    texts = {
        "2023-02-01 10:00:05": dt.datetime(2023, 2, 1, 10, 0, 5),
        "2023-02-01 10:00:05.250000": dt.datetime(2023, 2, 1, 10, 0, 5, 250000),
        "2023-02-01T10:00:05": dt.datetime(2023, 2, 1, 10, 0, 5),
        "2023-02-01T10:00:05.250Z": dt.datetime(2023, 2, 1, 10, 0, 5, 250000),
        "2023-02-01 10:00:05+00:00": dt.datetime(2023, 2, 1, 10, 0, 5),
        "2023-02-01T10:00:05.5+02:00": dt.datetime(2023, 2, 1, 8, 0, 5, 500000),
        "2023-02-01": dt.datetime(2023, 2, 1),
        "NaT": None,
    }
    edited = [{**as_text(r), "created_at": t} for r, t in zip(rows, texts, strict=True)]
    write_parquet(tmp_path / "text" / FILE, edited, TEXT)
    assert take(tmp_path / "text").votes["created_at"].to_list() == list(texts.values())

    zone = pa.field("created_at", pa.timestamp("ms", "Europe/Berlin"))
    schema = PICKAPIC_SCHEMA.set(PICKAPIC_SCHEMA.get_field_index("created_at"), zone)
    noon = dt.datetime(2023, 7, 1, 12, tzinfo=dt.UTC)
    write_parquet(tmp_path / "zone" / FILE, [{**rows[0], "created_at": noon}], schema)
    assert take(tmp_path / "zone").votes["created_at"].to_list() == [dt.datetime(2023, 7, 1, 12)]


def test_has_label_may_be_any_spelling_of_true_and_false(rows, take, write_parquet, tmp_path):
    words = ["True", "true", "1", "1.0", "False", "0", "0.0", "None"]
    edited = [{**as_text(r), "label_0": "1", "label_1": "0", "has_label": w} for r, w in zip(rows, words, strict=True)]
    write_parquet(tmp_path / "text" / FILE, edited, TEXT)
    assert take(tmp_path / "text").status() == ["ok"] * 4 + ["unlabelled"] * 4
    for kind, values in ((pa.int64(), (1, 0)), (pa.float64(), (1.0, 0.0))):
        schema = PICKAPIC_SCHEMA.set(PICKAPIC_SCHEMA.get_field_index("has_label"), pa.field("has_label", kind))
        edited = [{**r, "has_label": v} for r, v in zip(rows, values, strict=False)]
        write_parquet(tmp_path / "numbers" / FILE, edited, schema)
        assert take(tmp_path / "numbers").status() == ["ok", "unlabelled"]


def test_without_label_1_the_second_label_is_what_the_first_leaves(rows, take, write_parquet, tmp_path):
    write_parquet(tmp_path / "both" / FILE, rows, PICKAPIC_SCHEMA)
    write_parquet(tmp_path / "one" / FILE, *without(rows, "label_1"))
    assert_frame_equal(take(tmp_path / "one").votes, take(tmp_path / "both").votes)


def test_without_has_label_a_row_is_labelled_where_label_0_is(rows, take, write_parquet, tmp_path):
    write_parquet(tmp_path / "with" / FILE, rows, PICKAPIC_SCHEMA)
    write_parquet(tmp_path / "less" / FILE, *without(rows, "has_label"))
    assert_frame_equal(take(tmp_path / "less").votes, take(tmp_path / "with").votes)


def test_the_few_required_columns_are_enough(rows, take, write_parquet, tmp_path):
    kept = ("caption", "image_0_uid", "image_1_uid", "label_0")
    write_parquet(tmp_path / "pap" / "rows.parquet", [{k: r[k] for k in kept} for r in rows])
    taken = take(tmp_path / "pap")
    assert taken.status() == ["ok", "ok", "unlabelled", *["ok"] * 5]
    for column in ("annotator_id", "group_id", "created_at", "model_0", "model_1", "split"):
        assert taken.votes[column].null_count() == 8


# --- values that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("label_0", "first", "column 'label_0': expected a number, found 'first'"),
        ("label_1", "0,0", "column 'label_1': expected a number, found '0,0'"),
        ("has_label", "perhaps", "column 'has_label': expected true or false, found 'perhaps'"),
        ("created_at", "yesterday", "column 'created_at': expected a time, found 'yesterday'"),
        ("created_at", "2023-02-30 10:00:00", "column 'created_at': expected a time, found '2023-02-30 10:00:00'"),
    ],
)
def test_a_value_that_cannot_be_read_costs_its_row_alone(rows, take, write_parquet, tmp_path, column, value, reason):
    write_parquet(tmp_path / "whole" / FILE, [as_text(r) for r in rows], TEXT)
    edited = [as_text(r) for r in rows]
    edited[5][column] = value
    write_parquet(tmp_path / "bad" / FILE, edited, TEXT)
    whole, bad = take(tmp_path / "whole").votes, take(tmp_path / "bad").votes
    assert (bad["status"][5], bad["reason"][5], bad["label_0"][5]) == ("unreadable", reason, None)
    others = [0, 1, 2, 3, 4, 6, 7]
    assert_frame_equal(bad[others], whole[others])


def test_bytes_that_are_no_utf8_in_a_text_column_cost_their_row_alone(rows, take, write_parquet, tmp_path):
    table = pa.Table.from_pylist(rows, PICKAPIC_SCHEMA)
    captions = [r["caption"].encode() for r in rows]
    captions[3] = b"caf\xe9"
    table = table.set_column(table.column_names.index("caption"), "caption", broken_text(captions))
    write_parquet(tmp_path / "pap" / FILE, table)
    taken = take(tmp_path / "pap")
    assert taken.status() == ["ok", "ok", "unlabelled", "unreadable", *["ok"] * 4]
    assert taken.votes["reason"][3] == r"column 'caption': not valid UTF-8: b'caf\xe9'"
    assert taken.votes["prompt_id"][3] is None
    assert [taken.votes["prompt_id"][i] for i in (4, 5)] == [identity.prompt_id(rows[i]["caption"]) for i in (4, 5)]


def test_base64_with_line_breaks_is_read(rows, take, write_parquet, tmp_path, id_of):
    edited = {**as_text(rows[0]), "jpg_0": base64.encodebytes(rows[0]["jpg_0"]).decode()}
    write_parquet(tmp_path / "pap" / FILE, [edited], TEXT)
    taken = take(tmp_path / "pap")
    assert edited["jpg_0"].count("\n") > 2
    assert set(taken.images["image_id"]) == {id_of(rows[0][f"jpg_{i}"]) for i in (0, 1)}


@pytest.mark.parametrize("text", ["b'\\xff\\xd8'", "****", "/9j/!", "caf\u00e9"])
def test_an_image_text_that_is_no_base64_is_unreadable_and_known_by_its_uid(rows, take, write_parquet, tmp_path, text):
    edited = [as_text(r) for r in rows]
    edited[3]["jpg_0"] = text
    write_parquet(tmp_path / "pap" / FILE, edited, TEXT)
    taken = take(tmp_path / "pap")
    uid = identity.image_id_of_uid("pickapic", rows[3]["image_0_uid"])
    image = taken.images.row(by_predicate=pl.col("image_id") == uid, named=True)
    assert image["status"] == "unreadable"
    assert image["reason"].startswith("column 'jpg_0': expected bytes or base64, found text")
    assert taken.status()[3] == "ok"


@pytest.mark.parametrize(
    ("column", "kind", "values", "message"),
    [
        ("label_0", pa.list_(pa.float64()), [1.0], "column 'label_0': expected Float64, found list"),
        ("label_0", pa.timestamp("us"), dt.datetime(2023, 1, 1), "column 'label_0': expected Float64, found timestamp"),
        ("caption", pa.binary(), b"a red square", "column 'caption': expected String, found binary"),
        ("created_at", pa.int64(), 1675209600, "column 'created_at': expected Datetime.*, found int64"),
        ("jpg_0", pa.float64(), 1.0, "column 'jpg_0': expected bytes.*, found double"),
        ("jpg_1", pa.list_(pa.uint8()), [255, 216], "column 'jpg_1': expected bytes.*, found list"),
    ],
)
def test_a_column_of_a_hopeless_type_is_refused_by_file_and_column(
    rows, take, write_parquet, tmp_path, column, kind, values, message
):
    schema = PICKAPIC_SCHEMA.set(PICKAPIC_SCHEMA.get_field_index(column), pa.field(column, kind))
    write_parquet(tmp_path / "pap" / FILE, [{**r, column: values} for r in rows], schema)
    with pytest.raises(SourceError, match=rf"{FILE}: {message}"):
        take(tmp_path / "pap", "pickapic")


@pytest.mark.parametrize("column", ["caption", "image_0_uid", "label_0"])
def test_a_missing_column_is_named_with_those_that_were_found(rows, take, write_parquet, tmp_path, column):
    write_parquet(tmp_path / "pap" / FILE, *without(rows, column))
    with pytest.raises(SourceError, match=rf"{FILE}: column '{column}' is missing.*found \["):
        take(tmp_path / "pap", "pickapic")


def test_a_file_without_rows_is_a_shard_without_votes(take, write_parquet, tmp_path):
    write_parquet(tmp_path / "pap" / FILE, [], PICKAPIC_SCHEMA)
    taken = take(tmp_path / "pap")
    assert (len(taken.shards), len(taken.votes), len(taken.images)) == (1, 0, 0)
