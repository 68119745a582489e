import json

import polars as pl
import pyarrow as pa
import pytest

from pipelines import identity, schemas
from pipelines.sources import SourceError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        *(("prompt", pa.string()), ("image1", IMAGE), ("image2", IMAGE)),
        *(("votes_image1", pa.int64()), ("votes_image2", pa.int64()), ("model1", pa.string()), ("model2", pa.string())),
        ("detailed_results", pa.string()),
    ]
)
WEIGHTED = SCHEMA.set(3, pa.field("votes_image1", pa.float64())).set(4, pa.field("votes_image2", pa.float64()))


@pytest.fixture
def pictures(picture):
    """Three pictures' bytes; the first has a larger id than the second, so that pairs of them are swapped."""
    a, b, c = (picture(i) for i in range(3))
    ids = [identity.image_id_of_bytes(d)[0] for d in (a, b)]
    return (a, b, c) if ids[0] > ids[1] else (b, a, c)


@pytest.fixture
def row(pictures):
    """Return a row on the first two pictures."""

    def make(votes, detailed=None, **more):
        return {
            "prompt": "a red square",
            "image1": {"bytes": pictures[0], "path": "flux/1.jpg"},
            "image2": {"bytes": pictures[1], "path": "sdxl/2.jpg"},
            "votes_image1": votes[0],
            "votes_image2": votes[1],
            "model1": "flux",
            "model2": "sdxl",
            "detailed_results": detailed if detailed is None or isinstance(detailed, str) else json.dumps(detailed),
            **more,
        }

    return make


@pytest.fixture
def read(tmp_path, write_parquet, take):
    """Ingest rows as one file."""

    def run(rows, schema=SCHEMA):
        write_parquet(tmp_path / "rapidata" / "data" / "train_0001.parquet", rows, schema)
        return take(tmp_path / "rapidata")

    return run


def voters(*choices, key="votedFor"):
    return [{key: f"image{side}", "userId": f"user-{i}"} for i, side in enumerate(choices)]


def test_image_structs_give_bytes_and_their_paths_are_no_names(row, read, pictures, id_of):
    taken = read([row((20, 6))])
    assert set(taken.images["image_id"]) == {id_of(d) for d in pictures[:2]}
    assert set(taken.images["status"]) == {"ok"}
    # Many writers call every file of a struct the same.
    assert len(taken.store.scan(schemas.IMAGE_NAMES).collect()) == 0


def test_counts_alone_become_a_row_per_side(row, read, pictures, id_of, label_for):
    taken = read([row((20, 6))])
    found = [(v["count"], label_for(v, id_of(pictures[0]))) for v in taken.votes.to_dicts()]
    assert found == [(20, 1.0), (6, 0.0)]
    for vote in taken.votes.to_dicts():
        assert (vote["model_0"], vote["model_1"]) == ("sdxl", "flux"), "the second has the smaller id"
        assert (vote["split"], vote["annotator_id"], vote["was_swapped"]) == ("train", None, None)
    (pair,) = taken.catalogued(schemas.CATALOGUE_PAIRS).to_dicts()
    assert pair["n_votes"] == 26
    assert label_for(pair, id_of(pictures[0]), "human_label_0") == pytest.approx(20 / 26)


def test_voters_in_detail_become_a_vote_each_of_a_known_person(row, read, pictures, id_of, label_for):
    taken = read([row((3, 1), voters(1, 2, 1, 1))])
    votes = taken.votes.to_dicts()
    assert [label_for(v, id_of(pictures[0])) for v in votes] == [1.0, 0.0, 1.0, 1.0]
    assert [v["annotator_id"] for v in votes] == [f"mine:user-{i}" for i in range(4)]
    assert [(v["rater"], v["count"], v["status"]) for v in votes] == [(r, 1, "ok") for r in range(4)]
    assert len({v["group_id"] for v in votes}) == 1
    assert taken.catalogued(schemas.CATALOGUE_PAIRS)["n_votes"].to_list() == [4]


@pytest.mark.parametrize("names", [("flux/1.jpg", "sdxl/2.jpg"), ("1.jpg", "2.jpg"), ("image1", "image2")])
@pytest.mark.parametrize("key", ["votedFor", "selectedImage"])
def test_the_image_voted_for_is_known_by_its_file_or_its_column(row, read, pictures, id_of, label_for, names, key):
    detailed = [{key: names[0], "userId": 7}, {key: names[1]}, {key: names[1], "userId": None}]
    votes = read([row((1, 2), detailed)]).votes.to_dicts()
    assert [label_for(v, id_of(pictures[0])) for v in votes] == [1.0, 0.0, 0.0]
    assert [v["annotator_id"] for v in votes] == ["mine:7", None, None]
    assert [v["status"] for v in votes] == ["ok"] * 3, "unknown people who say the same are several people"


@pytest.mark.parametrize(
    "detailed",
    [
        voters(1, 1, 2, 2),
        voters(1, 1, 1),
        [{"votedFor": "image3"}] * 4,
        [{"userId": "x"}] * 4,
        [1, 1, 1, 2],
        {"image1": 3, "image2": 1},
        "[{",
        "",
        "[" * 100_000,
        None,
    ],
)
def test_detail_that_does_not_say_the_counts_leaves_the_counts(row, read, pictures, id_of, label_for, detailed):
    votes = read([row((3, 1), detailed)]).votes.to_dicts()
    assert [(v["count"], label_for(v, id_of(pictures[0])), v["annotator_id"]) for v in votes] == [
        (3, 1.0, None),
        (1, 0.0, None),
    ]


def test_weighted_votes_are_the_sources_verdict_and_no_votes(row, read, pictures, id_of, label_for):
    taken = read([row((7.5, 2.5)), row((0.25, 0.0)), row((3.0, 1.0))], WEIGHTED)
    assert taken.status() == ["unlabelled", "unlabelled", "ok", "ok"]
    weighted = taken.votes.row(0, named=True)
    assert weighted["label_0"] is None
    assert label_for(weighted, id_of(pictures[0]), "source_label_0") == 0.75
    assert label_for(taken.votes.row(1, named=True), id_of(pictures[0]), "source_label_0") == 1.0
    assert taken.votes["count"].to_list() == [None, None, 3, 1]
    assert taken.votes["source_label_0"].to_list()[2:] == [None, None]


def test_one_side_without_votes_has_no_row_and_none_at_all_is_unlabelled(row, read):
    taken = read([row((4, 0)), row((0, 0)), row((None, 3)), row((0, 5))])
    found = taken.votes.select(pl.col("source_row").str.slice(-1), "count", "status").rows()
    assert found == [("0", 4, "ok"), ("1", None, "unlabelled"), ("2", None, "unlabelled"), ("3", 5, "ok")]


def test_counts_that_cannot_be_cost_their_row_alone(row, read):
    taken = read([row((1, 0)), row((-1, 4)), row((float("nan"), 1)), row((float("inf"), 1)), row((0, 2))], WEIGHTED)
    assert taken.status() == ["ok", "unreadable", "unreadable", "unreadable", "ok"]
    assert taken.votes["reason"][1] == "votes_image1, votes_image2: expected counts, found [-1.0, 4.0]"


def test_counts_as_text_are_read_and_other_text_costs_its_row(row, read):
    schema = SCHEMA.set(3, pa.field("votes_image1", pa.string())).set(4, pa.field("votes_image2", pa.string()))
    taken = read([row(("20", "6.0")), row(("many", "6"))], schema)
    assert taken.votes["count"].to_list() == [20, 6, None]
    assert taken.votes["reason"][2] == "column 'votes_image1': expected a number, found 'many'"


def test_a_repeated_row_counts_once_and_another_row_on_the_pair_counts_too(row, read):
    again = row((5, 2), prompt="a red square")
    taken = read([row((5, 2)), again, row((5, 3))])
    assert taken.status() == ["ok", "ok", "duplicate_of", "duplicate_of", "ok", "ok"]
    assert taken.catalogued(schemas.CATALOGUE_PAIRS)["n_votes"].to_list() == [5 + 2 + 5 + 3]


def test_the_same_people_on_the_other_images_of_a_prompt_are_no_repetition(row, read, pictures):
    other = row((2, 0), voters(1, 1), image2={"bytes": pictures[2], "path": "x/3.jpg"})
    taken = read([row((2, 0), voters(1, 1)), other])
    assert taken.status() == ["ok"] * 4
    assert taken.catalogued(schemas.CATALOGUE_PAIRS)["n_votes"].to_list() == [2, 2]


def test_structs_without_paths_and_without_bytes_are_told_apart(row, read, pictures):
    rows = [
        row((2, 1), image1={"bytes": pictures[0], "path": None}),
        row((2, 1), image1={"bytes": None, "path": "flux/9.jpg"}),
        row((2, 1), image1=None),
    ]
    taken = read(rows)
    assert taken.status() == ["ok"] * 4 + ["no_image"] * 2
    named = taken.images.filter(status="no_bytes")
    assert named["image_id"].to_list() == [identity.image_id_of_uid("mine", "flux/9.jpg")]


def test_without_models_and_detail_the_votes_are_read(row, read):
    kept = ["prompt", "image1", "image2", "votes_image1", "votes_image2"]
    taken = read([{k: v for k, v in row((2, 1)).items() if k in kept}], pa.schema([SCHEMA.field(k) for k in kept]))
    assert taken.votes["count"].to_list() == [2, 1]
    assert taken.votes["model_0"].null_count() == 2


def test_a_prompt_that_is_missing_and_one_that_is_no_text_keep_their_rows(row, read):
    table = pa.Table.from_pylist([row((2, 0)), row((2, 0)), row((2, 0))], SCHEMA)
    prompts = pa.array([b"a red square", None, b"\xff"], pa.binary()).view(pa.string())
    taken = read(table.set_column(0, "prompt", prompts), None)
    assert taken.status() == ["ok", "no_prompt", "unreadable"]
    assert taken.votes["reason"][2] == r"column 'prompt': not valid UTF-8: b'\xff'"


def test_an_image_column_of_another_type_is_named(row, read):
    table = pa.Table.from_pylist([row((2, 0))], SCHEMA).set_column(1, "image1", pa.array([1.5]))
    with pytest.raises(SourceError, match=r"train_0001\.parquet: column 'image1': expected bytes.*found double"):
        read(table, None)
