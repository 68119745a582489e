import json
import re
import shutil
from itertools import combinations

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from pipelines import identity, schemas
from pipelines.sources import SourceError

RANKS = [[3, 1, 2], [2, 1, 2], [1, 1, 1]]


@pytest.fixture
def folder(tiny_world, tmp_path):
    """30 train pairs of 5 prompts; 3 test groups of 10 raters, the first of 10 images, the others of 9."""
    return shutil.copytree(tiny_world / "hpdv2", tmp_path / "hpdv2")


@pytest.fixture
def packed(folder, write_tar):
    """Pack the images of both splits into archives; return the folder."""

    def run(suffix, member="{split}/{name}", extra=()):
        for split in ("train", "test"):
            files = sorted((folder / split).iterdir(), reverse=True)
            listed = [(member.format(split=split, name=f.name), f.read_bytes()) for f in files]
            write_tar(folder / f"{split}{suffix}", [*extra, *listed])
            shutil.rmtree(folder / split)
        return folder

    return run


@pytest.fixture
def small(tmp_path, picture):
    """Write a folder of a few records over pictures 0.jpg to 3.jpg in both splits; return it."""

    def write(train=(), test=()):
        folder = tmp_path / "small"
        for split, records in (("train", train), ("test", test)):
            (folder / split).mkdir(parents=True)
            (folder / f"{split}.json").write_text(json.dumps(list(records)))
            for i in range(4):
                (folder / split / f"{i}.jpg").write_bytes(picture((split == "test") * 10 + i))
        return folder

    return write


def pair(first, second, label=(1, 0), prompt="a red square"):
    return {"human_preference": label, "prompt": prompt, "file_path": [f"{first}.jpg", f"{second}.jpg"]}


def group(files, ranks, prompt="a red square"):
    return {
        "prompt": prompt,
        "image_path": [f"{f}.jpg" for f in files],
        "rank": [1] * len(files),
        "raw_annotations": [{"rank": r, "user_hash": f"person-{i}"} for i, r in enumerate(ranks)],
    }


# --- where the images lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "member"),
    [
        (".tar", "{split}/{name}"),
        (".tar", "{name}"),
        (".tar.gz", "./{split}/{name}"),
        (".tar.gz", "./{name}"),
        (".tgz", "{split}/{name}"),
    ],
)
def test_archives_give_the_votes_and_images_of_the_folders(folder, packed, take, suffix, member):
    plain = take(folder, "hpd", records_per_shard=10)
    archived = take(packed(suffix, member), "hpd", records_per_shard=10)
    assert plain.status() == ["ok"] * (30 + 10 * (45 + 36 + 36))
    assert_frame_equal(archived.votes, plain.votes)
    images = [t.images.unique("image_id").sort("image_id") for t in (plain, archived)]
    assert len(images[0]) == 5 * 4 + 10 + 9 + 9
    assert_frame_equal(*images)
    names = [t.store.scan(schemas.IMAGE_NAMES).unique().sort("uid").collect() for t in (plain, archived)]
    assert_frame_equal(*names)


def test_images_are_those_of_the_files_that_the_records_name(folder, take, id_of):
    taken = take(folder, "hpd", records_per_shard=10)
    for number, record in enumerate(json.loads((folder / "train.json").read_text())):
        ids = [id_of((folder / "train" / name).read_bytes()) for name in record["file_path"]]
        (vote,) = taken.votes.filter(source_row=f"train.json:{number}").to_dicts()
        assert [vote["image_0_id"], vote["image_1_id"]] == sorted(ids)
        assert vote["label_0"] == record["human_preference"][0 if ids[0] < ids[1] else 1]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_split_in_a_compressed_archive_is_one_shard_and_a_plain_archive_is_cut(packed, take, suffix):
    shards = take(packed(suffix), "hpd", records_per_shard=10).shards
    found = [(s.file, s.start, s.stop) for s in shards]
    if suffix == ".tar.gz":
        assert found == [("train.json", 0, 30), ("test.json", 0, 3)]
    else:
        train = [("train.json", k, k + 10) for k in (0, 10, 20)]
        assert found == train + [("test.json", k, k + 1) for k in range(3)]
    assert {s.is_seekable for s in shards} == {suffix == ".tar"}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_member_that_is_a_link_is_refused_and_one_that_lacks_is_missing(folder, packed, take, link_to, suffix):
    records = json.loads((folder / "train.json").read_text())
    gone, linked = records[0]["file_path"]
    for name in (gone, linked):
        (folder / "train" / name).unlink()
    taken = take(packed(suffix, extra=[link_to(f"train/{linked}", "/etc/passwd")]), "hpd")
    bad = {r["image_id"]: r for r in taken.images.filter(pl.col("status") != "ok").to_dicts()}
    missing, refused = (bad.pop(identity.image_id_of_uid("hpd", f"train/{n}")) for n in (gone, linked))
    assert not bad
    assert (missing["status"], refused["status"]) == ("missing", "refused")
    assert f"train{suffix} has no member 'train/{gone}'" in missing["reason"]
    assert "it is a link" in refused["reason"]
    assert taken.status() == ["ok"] * (30 + 10 * 117), "the votes on them count"


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "file:///etc/passwd", ""])
def test_a_name_that_leaves_the_folder_is_refused(small, take, tmp_path, picture, name):
    folder = small([{**pair(0, 1), "file_path": ["0.jpg", name]}])
    for place in (folder, tmp_path):
        (place / "secret.jpg").write_bytes(picture(99))
    taken = take(folder, "hpd")
    assert sorted(taken.images["status"]) == ["ok", "refused"]
    assert "only names within the image folder are read" in taken.images.filter(status="refused")["reason"][0]


def test_an_image_above_the_limit_is_too_large(small, take):
    taken = take(small([pair(0, 1)]), "hpd", limits={"max_image_bytes": 100})
    assert set(taken.images["status"]) == {"too_large"}
    assert "limits.max_image_bytes = 100" in taken.images["reason"][0]
    assert taken.status() == ["ok"]


@pytest.mark.parametrize("keep", [0.45, 0.5, 0.61])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_an_archive_that_ends_in_or_between_members_is_named(packed, take, suffix, keep):
    file = packed(suffix) / f"train{suffix}"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(SourceError, match=rf"train{suffix}: .*fetch it again"):
        take(file.parent, "hpd")


# --- ranges of records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_shard", [7, 29, 1000])
def test_other_ranges_of_records_give_the_same_votes_and_vote_ids(folder, take, per_shard):
    whole, cut = take(folder, "hpd", records_per_shard=15), take(folder, "hpd", records_per_shard=per_shard)
    assert len(cut.shards) != len(whole.shards)
    assert_frame_equal(cut.votes, whole.votes)
    assert set(cut.images["image_id"]) == set(whole.images["image_id"])
    for split, count in (("train", 30), ("test", 3)):
        ranges = [(s.start, s.stop) for s in cut.shards if s.file == f"{split}.json"]
        assert [k for start, stop in ranges for k in range(start, stop)] == list(range(count))


def test_a_record_repeated_in_another_range_is_found_by_the_catalogue(small, take):
    records = [pair(0, 1), pair(1, 2), pair(2, 3), pair(0, 1)]
    taken = take(small(records), "hpd", records_per_shard=2)
    assert taken.status() == ["ok"] * 4
    (found,) = taken.catalogued(schemas.CATALOGUE_VOTES).to_dicts()
    ids = {identity.vote_id("mine", f"train.json:{k}", 0) for k in (0, 3)}
    assert {found["vote_id"], found["reason"]} == ids
    assert found["status"] == "duplicate_of"
    assert taken.store.read(schemas.CATALOGUE_PAIRS)["n_votes"].to_list() == [1, 1, 1]


def test_a_record_repeated_in_one_range_is_found_there(small, take):
    taken = take(small([pair(0, 1), pair(1, 2), pair(0, 1)]), "hpd")
    assert taken.status() == ["ok", "ok", "duplicate_of"]
    assert taken.votes["reason"][2] == identity.vote_id("mine", "train.json:0", 0)


def test_the_same_pair_with_the_other_choice_or_the_other_order_is_no_repetition(small, take):
    taken = take(small([pair(0, 1), pair(0, 1, (0, 1)), pair(0, 2)]), "hpd", records_per_shard=1)
    assert len(taken.catalogued(schemas.CATALOGUE_VOTES)) == 0
    assert sorted(taken.store.read(schemas.CATALOGUE_PAIRS)["n_votes"]) == [1, 2]


def test_a_repeated_test_group_counts_its_raters_once(small, take):
    record = group("012", RANKS)
    taken = take(small(test=[record, group("123", RANKS), record]), "hpd", records_per_shard=10)
    assert len(taken.shards) == 4, "one empty train shard, three of one test group each"
    found = taken.catalogued(schemas.CATALOGUE_VOTES)
    assert set(found["status"]) == {"duplicate_of"}
    rows = {v["vote_id"]: v["source_row"] for v in taken.votes.iter_rows(named=True)}
    assert {frozenset((rows[v], rows[o])) for v, o in found.select("vote_id", "reason").iter_rows()} == {
        frozenset(("test.json:0", "test.json:2"))
    }
    assert len(found) == 9
    # {1, 2} is in both groups: 3 raters each; the four other pairs are in one.
    assert sorted(taken.store.read(schemas.CATALOGUE_PAIRS)["n_votes"]) == [3, 3, 3, 3, 6]


# --- rankings --------------------------------------------------------------------------------------------------------


def test_a_lower_rank_is_better_and_equal_ranks_are_a_tie(small, take, picture, id_of, label_for):
    votes = take(small(test=[group("012", RANKS)]), "hpd").votes
    ids = [id_of(picture(10 + i)) for i in range(3)]
    # Per rater, for the pairs (0, 1), (0, 2), (1, 2): is the first ranked lower?
    expected = {"person-0": [0.0, 0.0, 1.0], "person-1": [0.0, 0.5, 1.0], "person-2": [0.5, 0.5, 0.5]}
    for person, labels in expected.items():
        of_person = votes.filter(annotator_id=f"hpd:{person}")
        found = {frozenset((v["image_0_id"], v["image_1_id"])): v for v in of_person.iter_rows(named=True)}
        pairs = list(combinations(range(3), 2))
        assert [label_for(found[frozenset((ids[i], ids[j]))], ids[i]) for i, j in pairs] == labels
    assert set(votes["status"]) == {"ok"}
    assert set(votes["count"]) == {1}


def test_a_group_of_nine_images_and_ten_raters_gives_360_votes(folder, take, id_of, label_for):
    taken = take(folder, "hpd")
    record = json.loads((folder / "test.json").read_text())[1]
    votes = taken.votes.filter(source_row="test.json:1")
    assert len(votes) == 36 * 10
    assert votes["pair_id"].n_unique() == 36
    assert sorted(votes["rater"]) == list(range(360))
    ids = [id_of((folder / "test" / name).read_bytes()) for name in record["image_path"]]
    for annotation in record["raw_annotations"]:
        rank = dict(zip(ids, annotation["rank"], strict=True))
        of_person = votes.filter(annotator_id=f"hpd:{annotation['user_hash']}")
        assert len(of_person) == 36
        for a, b, label in of_person.select("image_0_id", "image_1_id", "label_0").iter_rows():
            assert label == {True: 1.0, False: 0.0}[rank[a] < rank[b]]


def test_the_six_pairs_of_a_train_prompt_and_the_pairs_of_a_rater_are_groups(folder, take):
    votes = take(folder, "hpd", records_per_shard=7).votes
    train, test = votes.filter(split="train"), votes.filter(split="test")
    assert sorted(train.group_by("group_id").len()["len"]) == [6] * 5
    assert train.group_by("group_id").agg(pl.col("prompt_id").n_unique())["prompt_id"].to_list() == [1] * 5
    assert sorted(test.group_by("group_id").len()["len"]) == [36] * 20 + [45] * 10
    assert test.group_by("group_id").agg(pl.col("annotator_id").n_unique())["annotator_id"].to_list() == [1] * 30
    assert train["annotator_id"].null_count() == 30
    assert votes["was_swapped"].null_count() == len(votes), "the source does not say what was displayed first"


# --- records that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "x", "file_path": ["0.jpg", "1.jpg"]}, "human_preference: expected a field of"),
        ({**pair(0, 1), "file_path": ["0.jpg"]}, "file_path: expected 2 file names, found"),
        ({**pair(0, 1), "file_path": ["0.jpg", 1]}, "file_path: expected file names, found"),
        ({**pair(0, 1), "human_preference": [1]}, r"human_preference: expected \[1, 0\] or \[0, 1\], found \[1\]"),
        ({**pair(0, 1), "human_preference": [True, False]}, r"human_preference: expected \[1, 0\]"),
        ({**pair(0, 1), "human_preference": [10**400, 0]}, r"human_preference: expected \[1, 0\]"),
        ({**pair(0, 1), "prompt": 7}, "prompt: expected text, found 7"),
        ({**pair(0, 1), "prompt": "\ud800"}, "prompt: not valid UTF-8"),
        (7, "record: expected an object, found 7"),
    ],
)
def test_a_train_record_of_another_shape_costs_its_row_alone(small, take, record, reason):
    taken = take(small([pair(0, 1), record, pair(1, 2)]), "hpd")
    assert taken.status() == ["ok", "unreadable", "ok"]
    assert re.search(reason, taken.votes["reason"][1])
    assert taken.votes["pair_id"][1] is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_path": None}, "image_path: expected a list of file names, found None"),
        ({"image_path": ["0.jpg"]}, "image_path: expected at least two images"),
        ({"raw_annotations": None}, "raw_annotations: expected a list of objects with a rank, found None"),
        ({"raw_annotations": [{"rank": [1, 2]}]}, "rank of rater 0: expected 3 numbers, one per image, found [1, 2]"),
        ({"raw_annotations": [{"user_hash": "x"}]}, "rank of rater 0: expected a list of finite numbers, found None"),
        (
            {"raw_annotations": [{"rank": [1, 2, 3]}, {"rank": [1, None, 2]}]},
            "rank of rater 1: expected a list of finite numbers, found [1, None, 2]",
        ),
        (
            {"raw_annotations": [{"rank": [1, 2, float("nan")]}]},
            "rank of rater 0: expected a list of finite numbers, found [1, 2, nan]",
        ),
    ],
)
def test_a_test_group_of_another_shape_costs_its_row_alone(small, take, change, reason):
    taken = take(small(test=[{**group("012", RANKS), **change}, group("012", RANKS)]), "hpd")
    assert taken.status() == ["unreadable", *["ok"] * 9]
    assert taken.votes["reason"][0].startswith(reason)


def test_labels_that_are_no_choice_and_missing_ones_keep_their_pairs(small, take):
    records = [pair(0, 1, (1, 1)), pair(0, 1, None), pair(0, 1, (0.5, 0.5)), pair(0, 1, prompt=None), pair(1, 1)]
    taken = take(small(records), "hpd")
    assert taken.status() == ["invalid_label", "unlabelled", "ok", "no_prompt", "same_image"]
    assert taken.votes["label_0"].to_list() == [None, None, 0.5, None, None]
    assert taken.votes["pair_id"][0] == taken.votes["pair_id"][1] == taken.votes["pair_id"][2]


def test_raters_without_a_name_are_unknown_people_who_all_count(small, take):
    record = group("01", [[1, 2], [1, 2], [2, 1]])
    for annotation in record["raw_annotations"]:
        del annotation["user_hash"]
    taken = take(small(test=[record]), "hpd")
    assert taken.status() == ["ok"] * 3
    assert taken.votes["annotator_id"].to_list() == [None] * 3
    assert taken.catalogued(schemas.CATALOGUE_PAIRS)["n_votes"].to_list() == [3]


def test_one_list_alone_is_read_and_none_is_refused_with_what_was_found(small, take):
    folder = small([pair(0, 1)], [group("012", RANKS)])
    (folder / "train.json").unlink()
    assert len(take(folder).votes) == 9
    (folder / "test.json").rename(folder / "tests.json")
    with pytest.raises(SourceError, match=r"expected hpd: train\.json.*found \['tests\.json'\]"):
        take(folder, "hpd")


def test_a_missing_folder_is_named_whatever_the_layout(take, tmp_path):
    for layout in ("auto", "pickapic", "pickapic_webdataset", "hpd", "hpdv3", "rapidata", "pairs"):
        with pytest.raises(SourceError, match=r"source 'mine': .*nowhere"):
            take(tmp_path / "nowhere", layout)


def test_a_list_that_lost_records_after_it_was_listed_is_refused_and_nothing_of_it_is_visible(
    store, tiny_world, tmp_path
):
    import json
    import shutil

    from pipelines import ingest
    from pipelines.config import SourceConfig
    from pipelines.sources import SourceError

    folder = shutil.copytree(tiny_world / "hpdv2", tmp_path / "hpdv2")
    source = SourceConfig(name="hpd", location=str(folder))
    shard = next(s for s in ingest.list_source(source) if s.file == "train.json")
    records = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(records[:-1]))
    with pytest.raises(SourceError, match=r"train\.json: expected records .* changed since it was listed"):
        ingest.ingest_shard(store, ingest.plan(source), shard)
    assert store.manifests("votes") == []
