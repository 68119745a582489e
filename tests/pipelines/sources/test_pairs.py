import datetime as dt

import polars as pl
import pyarrow as pa
import pytest
from polars.testing import assert_frame_equal

from pipelines import identity, schemas
from pipelines.sources import SourceError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VOTE = ["prompt_id", "image_0_id", "image_1_id", "pair_id", "label_0", "was_swapped", "status", "count"]


@pytest.fixture
def pictures(picture):
    return [picture(i) for i in range(4)]


@pytest.fixture
def read(tmp_path, write_parquet, take):
    """Ingest rows as one file of one's own pairs."""

    def run(rows, schema=None, file="votes.parquet", **options):
        write_parquet(tmp_path / "mine" / file, rows, schema)
        return take(tmp_path / "mine", **options)

    return run


@pytest.fixture
def rows(pictures):
    """Three votes on the first three pictures, the images as bytes."""
    pairs = [(0, 1, 1.0), (1, 2, 0.0), (2, 0, 0.5)]
    return [
        {"prompt": f"prompt {k}", "image_0": pictures[a], "image_1": pictures[b], "label_0": label}
        for k, (a, b, label) in enumerate(pairs)
    ]


def named(label_0=1.0, image_0="a", image_1="b", prompt="a red square", **more):
    return {"prompt": prompt, "image_0": image_0, "image_1": image_1, "label_0": label_0, **more}


# --- images ----------------------------------------------------------------------------------------------------------


def test_bytes_become_votes_in_the_order_shown(rows, read, id_of, label_for):
    taken = read(rows)
    assert taken.status() == ["ok"] * 3
    for raw, vote in zip(rows, taken.votes.to_dicts(), strict=True):
        first, second = id_of(raw["image_0"]), id_of(raw["image_1"])
        assert (vote["image_0_id"], vote["image_1_id"]) == (min(first, second), max(first, second))
        assert label_for(vote, first) == raw["label_0"]
        assert vote["was_swapped"] is (first > second)
        assert vote["count"] == 1
    assert set(taken.images["status"]) == {"ok"}
    assert len(taken.images) == 3


def test_structs_and_paths_and_large_types_give_the_votes_of_bytes(rows, pictures, tmp_path, write_parquet, take):
    forms = {"bytes": rows, "struct": [], "path": [], "large": rows}
    for raw in rows:
        indices = {c: pictures.index(raw[c]) for c in ("image_0", "image_1")}
        forms["struct"].append({**raw, **{c: {"bytes": raw[c], "path": f"{i}.jpg"} for c, i in indices.items()}})
        forms["path"].append({**raw, **{c: f"./pictures//{i}.jpg" for c, i in indices.items()}})
    taken = {}
    for form, listed in forms.items():
        folder = tmp_path / form
        table = pa.Table.from_pylist(listed)
        if form == "large":
            wide = {"string": pa.large_string(), "binary": pa.large_binary()}
            table = table.cast(pa.schema([(f.name, wide.get(str(f.type), f.type)) for f in table.schema]))
        write_parquet(folder / "data" / "votes.parquet", table)
        (folder / "data" / "pictures").mkdir()
        for i, data in enumerate(pictures):
            (folder / "data" / "pictures" / f"{i}.jpg").write_bytes(data)
        taken[form] = take(folder)
    assert taken["bytes"].status() == ["ok"] * 3
    for form in ("struct", "path", "large"):
        assert_frame_equal(taken[form].votes, taken["bytes"].votes)
        images = [
            taken[f].images.select("image_id", "sha256", "bytes", "status").sort("image_id") for f in (form, "bytes")
        ]
        assert_frame_equal(*images)
    assert set(taken["path"].store.scan(schemas.IMAGE_NAMES).collect()["uid"]) == {
        f"file:data/pictures/{i}.jpg" for i in range(3)
    }


def test_names_without_files_are_ids_whose_votes_count(read):
    taken = read([named(), named(0.0, "b", "c")])
    assert taken.status() == ["ok", "ok"]
    assert set(taken.images["image_id"]) == {identity.image_id_of_uid("mine", n) for n in "abc"}
    assert set(taken.images["status"]) == {"missing"}
    assert taken.images["bytes"].null_count() == 3
    assert taken.catalogued(schemas.CATALOGUE_PAIRS)["n_votes"].to_list() == [1, 1]


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.string()])
def test_numbers_are_ids_as_their_texts_are(read, kind):
    table = pa.table(
        {
            "prompt": ["a red square"],
            "image_0": pa.array([12], pa.int64()).cast(kind),
            "image_1": pa.array([7], pa.int64()).cast(kind),
            "label_0": [1.0],
        }
    )
    taken = read(table)
    assert taken.status() == ["ok"]
    assert set(taken.images["image_id"]) == {identity.image_id_of_uid("mine", n) for n in ("12", "7")}


def test_names_that_are_stored_as_categories_are_names(read, tmp_path, pictures):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_bytes(pictures[0])
    frame = pl.DataFrame([named(), named(0.0, "b", "c")]).with_columns(
        pl.col("image_0", "image_1").cast(pl.Categorical)
    )
    frame.write_parquet(tmp_path / "mine" / "votes.parquet")
    taken = read(frame.to_arrow())
    assert taken.status() == ["ok", "ok"]
    assert sorted(taken.images["status"]) == ["missing", "missing", "ok"]


def test_an_image_that_arrives_later_is_seen(read, tmp_path, pictures, id_of, take):
    first = read([named(image_0="a.jpg", image_1="b.jpg")])
    assert set(first.images["status"]) == {"missing"}
    (tmp_path / "mine" / "a.jpg").write_bytes(pictures[0])
    again = take(tmp_path / "mine")
    assert dict(again.images.select("image_id", "status").rows()) == {
        id_of(pictures[0]): "ok",
        identity.image_id_of_uid("mine", "b.jpg"): "missing",
    }


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_the_fingerprint_changes_when_a_named_image_comes(tmp_path, write_parquet, pictures, kind):
    from pipelines import ingest
    from pipelines.config import SourceConfig
    from pipelines.sources import pairs

    table = pa.Table.from_pylist([named(image_0="a.jpg", image_1="b.jpg")])
    write_parquet(tmp_path / "mine" / "votes.parquet", table.set_column(1, "image_0", table["image_0"].cast(kind)))
    source = SourceConfig(name="mine", location=str(tmp_path / "mine"))
    how = ingest.plan(source)
    (shard,) = ingest.list_source(source)
    before = pairs.fingerprint(how.source, shard)
    assert pairs.fingerprint(how.source, shard) == before
    (tmp_path / "mine" / "a.jpg").write_bytes(pictures[0])
    assert pairs.fingerprint(how.source, shard) != before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../secret.jpg", "a path with '..'"),
        ("/etc/passwd", "an absolute path"),
        ("C:\\secret.jpg", "an absolute path"),
        ("a\\..\\..\\secret.jpg", "a path with '..'"),
        ("s3://bucket/secret.jpg", "an address"),
    ],
)
def test_a_path_outside_the_folder_is_refused(read, tmp_path, pictures, name, why):
    (tmp_path / "secret.jpg").write_bytes(pictures[0])
    taken = read([named(image_0=name)])
    image = taken.images.row(by_predicate=pl.col("image_id") == identity.image_id_of_uid("mine", name), named=True)
    assert (image["status"], image["bytes"]) == ("refused", None)
    assert image["reason"].startswith(why)


def test_paths_are_below_the_folder_of_their_file(tmp_path, write_parquet, take, pictures, id_of):
    for k, folder in enumerate(("a", "b")):
        write_parquet(tmp_path / "mine" / folder / "votes.parquet", [named(image_0="0.jpg", image_1="1.jpg")])
        for i in (0, 1):
            (tmp_path / "mine" / folder / f"{i}.jpg").write_bytes(pictures[2 * k + i])
    taken = take(tmp_path / "mine")
    pairs = [tuple(sorted(id_of(p) for p in pictures[k : k + 2])) for k in (0, 2)]
    assert taken.votes.select("image_0_id", "image_1_id").rows() == pairs


def test_uids_of_ones_own_name_the_images(rows, read, id_of):
    edited = [{**r, "image_0_uid": f"first-{k}", "image_1_uid": None} for k, r in enumerate(rows)]
    edited[1]["image_0"] = None
    taken = read(edited)
    assert taken.status() == ["ok"] * 3
    names = dict(taken.store.scan(schemas.IMAGE_NAMES).collect().select("uid", "image_id").rows())
    assert names == {
        "first-0": id_of(rows[0]["image_0"]),
        "first-1": identity.image_id_of_uid("mine", "first-1"),
        "first-2": id_of(rows[2]["image_0"]),
    }


def test_a_uid_is_the_name_of_an_image_that_a_path_leads_to(read, tmp_path, pictures, id_of):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jpg").write_bytes(pictures[0])
    taken = read([named(image_0="a.jpg", image_1="b.jpg", image_0_uid="first", image_1_uid="second")])
    names = dict(taken.store.scan(schemas.IMAGE_NAMES).collect().select("uid", "image_id").rows())
    assert names == {"first": id_of(pictures[0]), "second": identity.image_id_of_uid("mine", "second")}


def test_a_row_that_lacks_an_image_has_no_pair(rows, read):
    rows[1]["image_1"] = None
    taken = read(rows)
    assert taken.status() == ["ok", "no_image", "ok"]
    assert taken.votes["pair_id"][1] is None


# --- columns ---------------------------------------------------------------------------------------------------------


def test_the_optional_columns_are_read(rows, read, id_of):
    rows[0] |= {
        "annotator": "ann",
        "created_at": dt.datetime(2024, 5, 1, 12),
        "split": "validation",
        "group": "session-1",
        "count": 3,
        "model_0": "flux",
        "model_1": "sdxl",
    }
    taken = read(rows)
    vote, other = taken.votes.row(0, named=True), taken.votes.row(1, named=True)
    assert vote["annotator_id"] == "mine:ann"
    assert vote["created_at"] == dt.datetime(2024, 5, 1, 12)
    assert (vote["split"], vote["group_id"], vote["count"]) == ("validation", "mine:session-1", 3)
    swapped = id_of(rows[0]["image_0"]) > id_of(rows[0]["image_1"])
    assert (vote["model_0"], vote["model_1"]) == (("sdxl", "flux") if swapped else ("flux", "sdxl"))
    for column in ("annotator_id", "created_at", "split", "group_id", "count", "model_0", "model_1"):
        assert other[column] is None, column
    assert other["status"] == "ok", "a null count is an unknown count"


def test_numbers_of_annotators_and_groups_and_days_as_times_are_read(rows, read):
    edited = [{**r, "annotator": 7, "group": 1.0, "created_at": dt.date(2024, 5, 1)} for r in rows]
    votes = read(edited).votes
    assert set(votes["annotator_id"]) == {"mine:7"}
    assert set(votes["group_id"]) == {"mine:1"}
    assert set(votes["created_at"]) == {dt.datetime(2024, 5, 1)}


def test_the_family_of_the_source_names_its_people(rows, read):
    votes = read([{**r, "annotator": "ann"} for r in rows], family="friends").votes
    assert set(votes["annotator_id"]) == {"friends:ann"}


@pytest.mark.parametrize(
    ("label", "status", "reason"),
    [
        (None, "unlabelled", "the source says that the row has no label"),
        (0.7, "invalid_label", "expected 1 / 0, 0.5 / 0.5 or 0 / 1, found 0.7 / 0.3"),
        (2.0, "invalid_label", "expected 1 / 0, 0.5 / 0.5 or 0 / 1, found 2.0 / -1.0"),
        (float("nan"), "invalid_label", "expected 1 / 0, 0.5 / 0.5 or 0 / 1, found NaN / NaN"),
        (float("inf"), "invalid_label", "expected 1 / 0, 0.5 / 0.5 or 0 / 1, found inf / -inf"),
    ],
)
def test_a_label_that_is_missing_or_no_choice_keeps_its_pair(rows, read, label, status, reason):
    rows[1]["label_0"] = label
    taken = read(rows)
    assert taken.status() == ["ok", status, "ok"]
    vote = taken.votes.row(1, named=True)
    assert vote["reason"][: len(reason)] == reason
    assert (vote["label_0"], vote["count"]) == (None, None)
    assert vote["pair_id"] is not None


@pytest.mark.parametrize("label", [True, 1, "1", "1.0", " 1 "])
def test_a_label_of_another_type_is_a_label(read, label_for, label):
    taken = read([named(label)])
    assert label_for(taken.votes.row(0, named=True), identity.image_id_of_uid("mine", "a")) == 1.0


@pytest.mark.parametrize(
    ("counts", "status", "reason"),
    [
        ([2, 0, None], ["ok", "invalid_label", "ok"], "expected a count between 1 and 1000000000, found 0"),
        ([2, -3, None], ["ok", "invalid_label", "ok"], "expected a count between 1 and 1000000000, found -3"),
        ([2.0, 2.5, None], ["ok", "unreadable", "ok"], "column 'count': expected a whole number, found 2.5"),
        ([2.0, 1e300, None], ["ok", "unreadable", "ok"], "column 'count': expected a whole number, found 1e+300"),
        (["2", "2.5", ""], ["ok", "unreadable", "ok"], "column 'count': expected a whole number, found '2.5'"),
        (["2", "two", "None"], ["ok", "unreadable", "ok"], "column 'count': expected a whole number, found 'two'"),
        ([2.0, float("nan"), None], ["ok", "ok", "ok"], None),
    ],
)
def test_a_count_that_is_no_number_of_people_costs_its_row_alone(rows, read, counts, status, reason):
    taken = read([{**r, "count": c} for r, c in zip(rows, counts, strict=True)])
    assert taken.status() == status
    assert taken.votes["reason"].to_list() == [None, reason, None]
    assert taken.votes["count"].to_list() == [2, None, None]


def test_a_split_of_another_name_costs_its_row_alone(rows, read):
    splits = ("train", "Holdout", None)
    taken = read([{**r, "split": s} for r, s in zip(rows, splits, strict=True)], split="test")
    assert taken.status() == ["ok", "unreadable", "ok"]
    assert (taken.votes["split"][0], taken.votes["split"][2]) == ("train", "test")
    assert taken.votes["reason"][1] == (
        "column 'split': expected one of ['train', 'validation', 'test'], found Holdout"
    )


def test_votes_of_one_person_at_one_time_are_one_and_of_unknown_people_only_if_all_is_equal(rows, read):
    known = {"annotator": "ann", "created_at": dt.datetime(2024, 5, 1)}
    nobody = {"annotator": None, "created_at": None}
    first = rows[0]
    listed = [
        {**first, **known},
        {**first, **known, "label_0": 0.0},
        {**first, **nobody},
        {**first, **nobody},
        {**first, **nobody, "label_0": 0.0},
    ]
    assert read(listed).status() == ["ok", "duplicate_of", "ok", "duplicate_of", "ok"]


@pytest.mark.parametrize("column", ["prompt", "image_0", "image_1", "label_0"])
def test_a_missing_column_is_named(rows, read, column):
    with pytest.raises(SourceError, match=rf"votes\.parquet: column '{column}' is missing"):
        read([{k: v for k, v in r.items() if k != column} for r in rows], layout="pairs")


def test_columns_that_are_not_of_the_layout_do_no_harm(rows, read):
    plain = read(rows)
    more = read([{**r, "comment": {"text": [1, 2]}, "score": 1.0} for r in rows])
    assert_frame_equal(more.votes.select(VOTE), plain.votes.select(VOTE))


# --- splits ----------------------------------------------------------------------------------------------------------


def test_prompts_for_which_no_source_names_a_split_get_one_that_never_moves(read, take, tmp_path, write_parquet):
    listed = [named(prompt=f"prompt {k}") for k in range(150)]
    first = read(listed).catalogued(schemas.CATALOGUE_PROMPTS)
    assert first["is_drawn"].all()
    # 5 % each by default: of 150 prompts 7.5 each, 2.7 the standard deviation.
    shares = dict(first.group_by("split").len().rows())
    assert 1 <= shares["validation"] <= 18
    assert 1 <= shares["test"] <= 18
    assert sum(shares.values()) == 150
    by_prompt = dict(first.select("prompt", "split").rows())

    more = [named(prompt=f"prompt {k}") for k in reversed(range(200))]
    write_parquet(tmp_path / "other" / "b.parquet", more[:100])
    write_parquet(tmp_path / "other" / "a.parquet", more[100:])
    second = take(tmp_path / "other", name="other").catalogued(schemas.CATALOGUE_PROMPTS)
    assert len(second) == 200
    assert {p: s for p, s in second.select("prompt", "split").iter_rows() if p in by_prompt} == by_prompt


def test_a_split_that_any_vote_names_is_not_drawn(read):
    listed = [
        named(prompt="named", split="test"),
        named(0.0, "c", "d", prompt="named", split=None),
        named(prompt="twice", split="train"),
        named(0.0, "c", "d", prompt="twice", split="validation"),
        named(prompt="open", split=None),
    ]
    prompts = read(listed).catalogued(schemas.CATALOGUE_PROMPTS).rows_by_key("prompt", named=True, unique=True)
    assert (prompts["named"]["split"], prompts["named"]["is_drawn"]) == ("test", False)
    assert (prompts["twice"]["split"], prompts["twice"]["is_conflict"]) == ("validation", True)
    assert prompts["open"]["is_drawn"] is True
