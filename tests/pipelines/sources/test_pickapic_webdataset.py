import gzip
import tarfile

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from pipelines import schemas
from pipelines.sources import SourceError
from pipelines.world.raw import PICKAPIC_SCHEMA

SAID = ["prompt_id", "image_0_id", "image_1_id", "pair_id", "label_0", "was_swapped", "status", "count"]


@pytest.fixture
def rows(raw_rows):
    """Six rows, the second a tie, the third without a choice for the first."""
    rows = [dict(r) for r in raw_rows[:6]]
    rows[1] |= {"label_0": 0.5, "label_1": 0.5}
    rows[2] |= {"label_0": 0.0, "label_1": 1.0}
    return rows


def sample(key, row):
    """The members of a row, in the order in which a sorted WebDataset has them."""
    return {
        f"{key}.jpg_0.jpg": row["jpg_0"],
        f"{key}.jpg_1.jpg": row["jpg_1"],
        f"{key}.label_0.txt": str(row["label_0"]).encode(),
        f"{key}.label_1.txt": str(row["label_1"]).encode(),
        f"{key}.original_prompt.txt": row["caption"].encode(),
    }


def members(rows):
    return [m for i, row in enumerate(rows) for m in sample(f"{i:06d}", row).items()]


@pytest.fixture
def with_change(rows, take, write_tar, tmp_path):
    """Ingest the six samples after an edit of the fourth one's members {name: bytes}; '4' stands for its key."""

    def run(edit, name="train.tar"):
        listed = []
        for i, row in enumerate(rows):
            part = sample(str(i + 1), row)
            if i == 3:
                part = edit(part)
            listed += part.items() if isinstance(part, dict) else part
        write_tar(tmp_path / "wds" / name, listed)
        return take(tmp_path / "wds", "pickapic_webdataset")

    return run


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz", "00000.tgz"])
def test_a_tar_gives_the_votes_and_images_of_the_parquet_of_the_same_rows(
    rows, take, write_tar, write_parquet, tmp_path, name
):
    write_parquet(tmp_path / "parquet" / "rows.parquet", rows, PICKAPIC_SCHEMA)
    write_tar(tmp_path / "wds" / name, members(rows))
    tar, parquet = take(tmp_path / "wds"), take(tmp_path / "parquet")
    assert tar.status() == ["ok"] * 6
    assert_frame_equal(tar.votes.select(SAID), parquet.votes.select(SAID))
    assert_frame_equal(tar.images.sort("image_id"), parquet.images.sort("image_id"))
    prompts = [t.store.scan(schemas.PROMPTS).collect() for t in (tar, parquet)]
    assert_frame_equal(*prompts)
    for column in ("annotator_id", "created_at", "group_id", "model_0"):
        assert tar.votes[column].null_count() == 6


def test_a_sample_is_known_by_its_tar_and_its_number(rows, take, write_tar, tmp_path):
    write_tar(tmp_path / "wds" / "a" / "0.tar", members(rows[:4]))
    write_tar(tmp_path / "wds" / "a" / "1.tar", members(rows[4:]))
    taken = take(tmp_path / "wds")
    assert taken.votes["source_row"].to_list() == [*(f"a/0.tar:{i}" for i in range(4)), "a/1.tar:0", "a/1.tar:1"]
    assert [s.key for s in taken.shards] == [*dict.fromkeys(s.key for s in taken.shards)]


@pytest.mark.parametrize(
    ("file", "option", "split"),
    [
        ("pickapic-test-000000.tar", None, "test"),
        ("validation_unique/000.tar.gz", None, "validation"),
        ("000.tar", "validation", "validation"),
        ("train/000.tar", "validation", "train"),
        ("000.tgz", None, None),
    ],
)
def test_the_split_is_that_of_the_name_else_the_folder_else_the_source(
    rows, take, write_tar, tmp_path, file, option, split
):
    write_tar(tmp_path / "wds" / file, members(rows[:2]))
    assert set(take(tmp_path / "wds", split=option).votes["split"]) == {split}


def test_keys_with_folders_and_dots_in_them_are_cut_at_the_names_first_dot(rows, take, write_tar, tmp_path):
    named = [(f"./part.v2/{name}", data) for name, data in members(rows)]
    folder = tarfile.TarInfo("./part.v2")
    folder.type = tarfile.DIRTYPE
    write_tar(tmp_path / "wds" / "0.tar", [folder, *named])
    taken = take(tmp_path / "wds")
    assert taken.status() == ["ok"] * 6


def test_other_members_of_a_sample_do_no_harm(with_change):
    taken = with_change(lambda part: {**part, "4.json": b"{}", "4.clip.npy": b"\0" * 600})
    assert taken.status() == ["ok"] * 6


@pytest.mark.parametrize("name", ["original_prompt.txt", "label_0.txt", "jpg_0.jpg", "jpg_1.jpg"])
@pytest.mark.parametrize("tar", ["train.tar", "train.tar.gz"])
def test_a_sample_that_lacks_a_member_is_unreadable_and_says_which(with_change, tar, name):
    taken = with_change(lambda part: {k: v for k, v in part.items() if k != f"4.{name}"}, tar)
    assert taken.status() == ["ok", "ok", "ok", "unreadable", "ok", "ok"]
    assert f"sample '4': no member '{name}'; found [" in taken.votes["reason"][3]


def test_a_sample_without_label_1_has_what_label_0_leaves(with_change, rows, id_of, label_for):
    taken = with_change(lambda part: {k: v for k, v in part.items() if k != "4.label_1.txt"})
    assert taken.status() == ["ok"] * 6
    assert label_for(taken.votes.row(3, named=True), id_of(rows[3]["jpg_0"])) == rows[3]["label_0"]


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        (b"first", "unreadable", "sample '4': label_0.txt: expected a number, found 'first'"),
        (b"", "unreadable", "sample '4': label_0.txt: expected a number, found ''"),
        (b"\xff", "unreadable", r"sample '4': label_0.txt: not valid UTF-8: b'\xff'"),
        (b"nan", "invalid_label", "expected 1 / 0, 0.5 / 0.5 or 0 / 1, found NaN / "),
        (b"0.7\n", "invalid_label", "expected 1 / 0, 0.5 / 0.5 or 0 / 1, found 0.7 / "),
    ],
)
def test_a_label_that_is_no_number_or_no_choice_costs_its_sample_alone(with_change, text, status, reason):
    taken = with_change(lambda part: {**part, "4.label_0.txt": text})
    assert taken.status() == ["ok", "ok", "ok", status, "ok", "ok"]
    assert taken.votes["reason"][3].startswith(reason)
    assert taken.votes["label_0"][3] is None


def test_labels_with_white_space_and_without_point_are_numbers(with_change, rows, id_of, label_for):
    taken = with_change(lambda part: {**part, "4.label_0.txt": b" 1\n", "4.label_1.txt": b"0\r\n"})
    assert taken.status() == ["ok"] * 6
    assert label_for(taken.votes.row(3, named=True), id_of(rows[3]["jpg_0"])) == 1.0


def test_a_prompt_that_is_no_utf8_costs_its_sample_alone(with_change):
    taken = with_change(lambda part: {**part, "4.original_prompt.txt": b"caf\xe9"})
    assert taken.status() == ["ok", "ok", "ok", "unreadable", "ok", "ok"]
    assert taken.votes["reason"][3] == r"sample '4': original_prompt.txt: not valid UTF-8: b'caf\xe9'"


@pytest.mark.parametrize("tar", ["train.tar", "train.tar.gz"])
def test_an_image_that_is_a_link_is_refused_and_its_row_says_so(with_change, link_to, tar, rows, id_of):
    def edit(part):
        return [
            link_to("4.jpg_0.jpg", "/etc/passwd"),
            *((name, data) for name, data in part.items() if name != "4.jpg_0.jpg"),
        ]

    taken = with_change(edit, tar)
    assert taken.status() == ["ok", "ok", "ok", "unreadable", "ok", "ok"]
    assert "member '4.jpg_0.jpg': it is a link" in taken.votes["reason"][3]
    assert set(taken.images["status"]) == {"ok"}


def test_a_text_that_is_a_link_is_not_followed_either(with_change, link_to):
    def edit(part):
        rest = [(name, data) for name, data in part.items() if name != "4.original_prompt.txt"]
        return [*rest, link_to("4.original_prompt.txt", "3.original_prompt.txt")]

    taken = with_change(edit)
    assert taken.status() == ["ok", "ok", "ok", "unreadable", "ok", "ok"]
    assert "original_prompt.txt" in taken.votes["reason"][3]
    assert "it is a link" in taken.votes["reason"][3]


@pytest.mark.parametrize("folder", ["../", "/tmp/"])
def test_members_whose_names_leave_the_archive_are_refused(with_change, folder):
    taken = with_change(lambda part: {folder + k: v for k, v in part.items()})
    assert taken.status() == ["ok", "ok", "ok", "unreadable", "ok", "ok"]
    assert "its name is a" in taken.votes["reason"][3]


def test_an_image_above_the_limit_costs_its_sample_and_names_the_limit(rows, take, write_tar, tmp_path):
    limit = max(len(r[f"jpg_{i}"]) for r in rows for i in (0, 1))
    rows[2]["jpg_1"] = rows[2]["jpg_1"] + b"\0" * limit
    write_tar(tmp_path / "wds" / "0.tar", members(rows))
    taken = take(tmp_path / "wds", limits={"max_image_bytes": limit})
    assert taken.status() == ["ok", "ok", "unreadable", "ok", "ok", "ok"]
    assert f"limits.max_image_bytes = {limit}" in taken.votes["reason"][2]


def test_a_damaged_image_has_its_own_status_and_keeps_its_vote(with_change, rows, id_of):
    cut = rows[3]["jpg_1"][:-200]
    taken = with_change(lambda part: {**part, "4.jpg_1.jpg": cut})
    assert taken.status() == ["ok"] * 6
    image = taken.images.row(by_predicate=pl.col("image_id") == id_of(cut), named=True)
    assert image["status"] == "truncated"


def test_a_key_that_comes_again_is_another_sample(rows, take, write_tar, tmp_path):
    write_tar(tmp_path / "wds" / "0.tar", [*sample("1", rows[0]).items(), *sample("1", rows[3]).items()])
    assert take(tmp_path / "wds").status() == ["ok", "ok"]


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_a_tar_that_ends_in_the_middle_leaves_nothing_and_is_named(rows, take, write_tar, tmp_path, name, keep):
    file = write_tar(tmp_path / "wds" / name, members(rows))
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data.rstrip(b"\0")) * keep)])
    with pytest.raises(SourceError, match=rf"{name}: .*fetch it again"):
        take(tmp_path / "wds", "pickapic_webdataset")
    assert not list(tmp_path.rglob("store-*/**/*.parquet"))


def test_a_tar_cut_between_two_members_is_seen_by_its_missing_end(rows, take, write_tar, tmp_path):
    file = write_tar(tmp_path / "wds" / "0.tar", members(rows))
    with tarfile.open(file) as tar:
        end = tar.getmembers()[10].offset
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(SourceError, match=r"0\.tar: .*the archive ends without its end marker"):
        take(tmp_path / "wds", "pickapic_webdataset")


@pytest.mark.parametrize(
    ("name", "content"),
    [("0.tar", b"no tar" * 500), ("0.tar.gz", gzip.compress(b"no tar" * 500)), ("0.tgz", b"no gzip" * 100)],
)
def test_a_file_that_is_no_tar_is_named(take, tmp_path, name, content):
    (tmp_path / "wds").mkdir()
    (tmp_path / "wds" / name).write_bytes(content)
    with pytest.raises(SourceError, match=rf"{name}: not a readable tar archive .*fetch it again"):
        take(tmp_path / "wds", "pickapic_webdataset")


def test_without_a_tar_the_folder_and_what_was_expected_are_named(take, tmp_path):
    with pytest.raises(SourceError, match=r"source 'mine': no tar file below .*original_prompt\.txt"):
        take(tmp_path, "pickapic_webdataset")
