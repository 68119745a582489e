import json

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from pipelines import identity, schemas
from pipelines.sources import SourceError

MISSING = object()


@pytest.fixture
def pictures(picture):
    """Four pictures' bytes in the order of their ids."""
    return sorted((picture(i) for i in range(4)), key=lambda data: identity.image_id_of_bytes(data)[0])


@pytest.fixture
def write(tmp_path, pictures):
    """Write records as a split's list, with the pictures as images/0.jpg to images/3.jpg; return the folder."""

    def run(records, split="train"):
        folder = tmp_path / "hpdv3"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(pictures):
            (folder / "images" / f"{i}.jpg").write_bytes(data)
        (folder / f"{split}.json").write_text(json.dumps(records))
        return folder

    return run


def record(counts=(1, 0), first=0, second=1, **more):
    made = {
        "prompt": "a red square",
        "choice_dist": None if counts is None else list(counts),
        "confidence": 0.75,
        "path1": f"images/{first}.jpg",
        "path2": f"images/{second}.jpg",
        "model1": "flux",
        "model2": "sdxl",
        **more,
    }
    return {k: v for k, v in made.items() if v is not MISSING}


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0)])
def test_counts_become_a_row_per_side_with_its_count(write, take, pictures, id_of, label_for, first, second):
    taken = take(write([record((12, 7), first, second)]))
    preferred = id_of(pictures[first])
    votes = taken.votes.to_dicts()
    assert [(v["rater"], v["count"], label_for(v, preferred)) for v in votes] == [(0, 12, 1.0), (1, 7, 0.0)]
    for vote in votes:
        assert (vote["image_0_id"], vote["image_1_id"]) == tuple(id_of(d) for d in pictures[:2])
        assert label_for(vote, preferred, "source_label_0") == 1.0
        models = (vote["model_0"], vote["model_1"])
        assert models == (("flux", "sdxl") if first == 0 else ("sdxl", "flux"))
        assert (vote["source_confidence"], vote["status"], vote["split"]) == (0.75, "ok", "train")
        assert (vote["annotator_id"], vote["was_swapped"], vote["source_row"]) == (None, None, "train.json:0")
    assert votes[0]["group_id"] == votes[1]["group_id"] is not None


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0)])
def test_counts_against_the_preferred_image_keep_both_facts(write, take, pictures, id_of, label_for, first, second):
    taken = take(write([record((3, 9), first, second)]))
    preferred = id_of(pictures[first])
    assert [(v["count"], label_for(v, preferred)) for v in taken.votes.to_dicts()] == [(3, 1.0), (9, 0.0)]
    assert [label_for(v, preferred, "source_label_0") for v in taken.votes.to_dicts()] == [1.0, 1.0]
    (pair,) = taken.catalogued(schemas.CATALOGUE_PAIRS).to_dicts()
    assert pair["n_votes"] == 12
    assert label_for(pair, preferred, "human_label_0") == 3 / 12


def test_unknown_counts_are_one_vote_for_the_preferred_image_of_unknown_weight(write, take, pictures, id_of, label_for):
    taken = take(write([record(None, 2, 1), record(None, 3, 1, choice_dist=MISSING)]))
    assert taken.status() == ["ok", "ok"]
    assert taken.votes["count"].to_list() == [None, None]
    for vote, preferred in zip(taken.votes.to_dicts(), (2, 3), strict=True):
        assert label_for(vote, id_of(pictures[preferred])) == 1.0
        assert label_for(vote, id_of(pictures[preferred]), "source_label_0") == 1.0
    assert taken.catalogued(schemas.CATALOGUE_PAIRS)["n_votes"].to_list() == [1, 1]


def test_a_side_without_votes_has_no_row_and_a_pair_without_any_is_unlabelled(write, take, pictures, id_of, label_for):
    taken = take(write([record((5, 0)), record((0, 4), 2, 3), record((0, 0), 0, 3), record((6.0, 2), 1, 2)]))
    found = [(v["source_row"][-1], v["count"], v["status"]) for v in taken.votes.to_dicts()]
    assert found == [("0", 5, "ok"), ("1", 4, "ok"), ("2", None, "unlabelled"), ("3", 6, "ok"), ("3", 2, "ok")]
    assert label_for(taken.votes.row(0, named=True), id_of(pictures[0])) == 1.0
    assert label_for(taken.votes.row(1, named=True), id_of(pictures[2])) == 0.0
    unlabelled = taken.votes.row(2, named=True)
    assert unlabelled["label_0"] is None
    assert label_for(unlabelled, id_of(pictures[0]), "source_label_0") == 1.0
    pairs = taken.catalogued(schemas.CATALOGUE_PAIRS)
    assert sorted(pairs["n_votes"]) == [0, 4, 5, 8]
    assert pairs.filter(n_votes=0)["human_label_0"].to_list() == [None]


def test_records_on_one_pair_are_summed_by_their_counts(write, take, pictures, id_of, label_for):
    # 12 + 2 + 1 for images/0.jpg (the null counts as one), 7 + 8 for images/1.jpg.
    records = [record((12, 7)), record((8, 2), 1, 0), record(None)]
    taken = take(write(records))
    (pair,) = taken.catalogued(schemas.CATALOGUE_PAIRS).to_dicts()
    assert pair["n_votes"] == 30
    assert label_for(pair, id_of(pictures[0]), "human_label_0") == pytest.approx(15 / 30)


def test_a_repeated_record_counts_once_and_one_with_other_counts_counts_too(write, take):
    records = [record((12, 7)), record((1, 0), 2, 3), record((12, 7)), record((12, 8))]
    taken = take(write(records), records_per_shard=2)
    assert len(taken.shards) == 2
    found = taken.catalogued(schemas.CATALOGUE_VOTES)
    assert found["status"].to_list() == ["duplicate_of"] * 2
    assert sorted(taken.store.read(schemas.CATALOGUE_PAIRS)["n_votes"]) == [1, 12 + 7 + 12 + 8]


@pytest.mark.parametrize("per_shard", [1, 3, 50_000])
def test_other_ranges_of_records_give_the_same_votes(write, take, per_shard):
    folder = write([record((k, 2), k % 4, (k + 1) % 4) for k in range(5)])
    assert_frame_equal(take(folder, records_per_shard=per_shard).votes, take(folder, records_per_shard=2).votes)


def test_the_split_is_that_of_the_list(write, take):
    write([record()])
    taken = take(write([record((3, 4), 1, 2), record(None, 2, 3)], "test"))
    found = taken.votes.select("source_row", "split").unique(maintain_order=True).rows()
    assert found == [("test.json:0", "test"), ("test.json:1", "test"), ("train.json:0", "train")]


# --- records that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"choice_dist": [-1, 3]}, "choice_dist: expected two counts or null, found [-1, 3]"),
        ({"choice_dist": [1.5, 3]}, "choice_dist: expected two counts or null, found [1.5, 3]"),
        ({"choice_dist": [1, 2, 3]}, "choice_dist: expected two counts or null, found [1, 2, 3]"),
        ({"choice_dist": "12,7"}, "choice_dist: expected two counts or null, found '12,7'"),
        ({"choice_dist": [True, False]}, "choice_dist: expected two counts or null, found [True, False]"),
        ({"choice_dist": [float("inf"), 1]}, "choice_dist: expected two counts or null, found [inf, 1]"),
        ({"choice_dist": [10**400, 1]}, "choice_dist: expected two counts or null, found [1000"),
        ({"confidence": "high"}, "confidence: expected a number or null, found 'high'"),
        ({"path1": None}, "path1: expected a file name, found None"),
        ({"path2": ["a.jpg"]}, "path2: expected a file name, found ['a.jpg']"),
        ({"path2": "\ud800.jpg"}, "path2: expected a file name"),
        ({"model1": 7}, "model1: expected text, found 7"),
        ({"prompt": ["a"]}, "prompt: expected text, found ['a']"),
        ({"prompt": MISSING}, "prompt: expected a field of ['prompt', 'path1', 'path2']"),
    ],
)
def test_a_record_of_another_shape_costs_its_row_alone(write, take, change, reason):
    taken = take(write([record((2, 1)), record(**change), record((2, 1), 2, 3)]), "hpdv3")
    assert taken.status() == ["ok", "ok", "unreadable", "ok", "ok"]
    assert taken.votes["reason"][2].startswith(reason)
    assert taken.votes["source_row"][2] == "train.json:1"


# --- where the images lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz", "images.tgz"])
@pytest.mark.parametrize("inner", ["images/", "./images/"])
def test_archives_give_the_votes_images_and_names_of_the_folder(write, take, write_tar, pictures, id_of, name, inner):
    folder = write([record((12, 7)), record((1, 2), 1, 2), record((1, 0), 0, 9)])
    plain = take(folder)
    assert set(plain.images.filter(status="ok")["image_id"]) == {id_of(d) for d in pictures[:3]}
    for file in (folder / "images").iterdir():
        file.unlink()
    (folder / "images").rmdir()
    write_tar(folder / name, [(f"{inner}{i}.jpg", data) for i, data in enumerate(pictures)])
    archived = take(folder)
    assert_frame_equal(archived.votes, plain.votes)
    columns = ["image_id", "sha256", "bytes", "width", "height", "status"]
    assert_frame_equal(*(t.images.select(columns).sort("image_id") for t in (archived, plain)))
    assert_frame_equal(*(t.store.scan(schemas.IMAGE_NAMES).collect() for t in (archived, plain)))
    missing = archived.images.filter(pl.col("status") != "ok").row(0, named=True)
    assert missing["status"] == "missing"
    assert missing["image_id"] == identity.image_id_of_uid("hpdv3", "images/9.jpg")


def test_train_and_test_share_their_images_and_prompts(write, take):
    write([record((12, 7))])
    taken = take(write([record((3, 4), 1, 2)], "test"))
    prompts = taken.catalogued(schemas.CATALOGUE_PROMPTS)
    assert prompts.select("split", "is_conflict").rows() == [("test", True)]
    assert taken.store.read(schemas.CATALOGUE_IMAGES)["image_id"].n_unique() == 3


def test_the_parts_of_a_split_archive_are_refused_with_how_to_join_them(write, take):
    folder = write([record()])
    (folder / "images").rename(folder / "away")
    for k in range(2):
        (folder / f"images.tar.gz.0{k}").write_bytes(b"part")
    with pytest.raises(
        SourceError, match=r"images\.tar\.gz\.00, \.\.\. are parts of one archive.*cat images\.tar\.gz\.\* \| tar xz"
    ):
        take(folder)
    (folder / "away").rename(folder / "images")
    assert take(folder).status() == ["ok"], "once unpacked the parts do no harm"


def test_a_path_that_leaves_the_folder_is_refused(write, take, tmp_path, picture):
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    taken = take(write([record(path2="images/../../secret.jpg")]))
    assert sorted(taken.images["status"]) == ["ok", "refused"]
