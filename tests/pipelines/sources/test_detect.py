import json
import os
import shutil

import pyarrow as pa
import pytest

from pipelines.config import SourceConfig
from pipelines.sources import SourceError
from pipelines.sources.detect import resolved
from pipelines.world.raw import PICKAPIC_SCHEMA

PAIR = {"prompt": "a red square", "image_0": "a", "image_1": "b", "label_0": 1.0}
RAPIDATA = {
    "prompt": "a red square",
    "image1": {"bytes": b"1", "path": "1.jpg"},
    "image2": {"bytes": b"2", "path": "2.jpg"},
    "votes_image1": 20,
    "votes_image2": 6,
    "model1": "x",
    "model2": "y",
    "detailed_results": "[]",
}
HPD_V3 = {
    "prompt": "p",
    "choice_dist": [1, 0],
    "confidence": None,
    "path1": "a",
    "path2": "b",
    "model1": "x",
    "model2": "y",
}
MEMBERS = ("jpg_0.jpg", "jpg_1.jpg", "label_0.txt", "label_1.txt", "original_prompt.txt")


def source(location, **options):
    return SourceConfig(**{"name": "mine", "location": str(location), **options})


@pytest.fixture
def write(tmp_path, write_parquet, write_tar, raw_rows, tiny_world):
    """Write a small source of a layout into the folder; return the folder."""

    def run(layout, folder="source"):
        folder = tmp_path / folder
        folder.mkdir(exist_ok=True)
        if layout == "pickapic":
            write_parquet(folder / "data" / "train-00000-of-00001.parquet", raw_rows[:3], PICKAPIC_SCHEMA)
        elif layout == "pickapic_webdataset":
            write_tar(folder / "train" / "00000.tar", [(f"{k}.{m}", b"1") for k in range(3) for m in MEMBERS])
        elif layout == "hpd":
            shutil.copytree(tiny_world / "hpdv2", folder, dirs_exist_ok=True)
        elif layout == "hpdv3":
            (folder / "train.json").write_text(json.dumps([HPD_V3]))
        elif layout == "rapidata":
            write_parquet(folder / "data" / "train_0001.parquet", [RAPIDATA])
        else:
            write_parquet(folder / "mine.parquet", [PAIR])
        return folder

    return run


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ("pickapic", "pickapic"),
        ("pickapic_webdataset", "pickapic"),
        ("hpd", "hpd"),
        ("hpdv3", "hpdv3"),
        ("rapidata", "mine"),
        ("pairs", "mine"),
    ],
)
def test_every_layout_is_found_by_what_stands_in_its_files(write, layout, family):
    found = resolved(source(write(layout)))
    assert (found.layout, found.family) == (layout, family)


def test_a_family_and_a_layout_that_are_given_stay(write):
    given = source(write("pairs"), family="friends")
    assert resolved(given).family == "friends"
    assert resolved(given.model_copy(update={"layout": "hpd"})).layout == "hpd"


def test_pick_a_pic_without_images_and_without_the_lesser_columns_is_found(tmp_path, write_parquet):
    row = {"caption": "x", "image_0_uid": "a", "image_1_uid": "b", "label_0": "1.0"}
    write_parquet(tmp_path / "mirror" / "part3.parquet", [row])
    assert resolved(source(tmp_path / "mirror")).layout == "pickapic"


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "0.tgz"])
def test_compressed_tars_are_looked_into(tmp_path, write_tar, name):
    write_tar(tmp_path / "wds" / name, [(f"0.{m}", b"1") for m in MEMBERS])
    assert resolved(source(tmp_path / "wds")).layout == "pickapic_webdataset"


def test_hpd_is_found_by_either_of_its_lists(write):
    for name in ("train.json", "test.json"):
        folder = write("hpd", folder=name)
        (folder / name).unlink()
        assert resolved(source(folder)).layout == "hpd"


def test_the_benchmark_prompts_of_hpd_and_its_image_archives_do_not_hide_it(write, write_tar):
    folder = write("hpd")
    (folder / "benchmark").mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / "benchmark" / f"{style}.json").write_text(json.dumps(["a red square"]))
    write_tar(folder / "train.tar.gz", [(f"train/{i}.jpg", b"1") for i in range(20)])
    assert resolved(source(folder)).layout == "hpd"


def test_files_that_cannot_be_read_do_not_hide_the_others(write, tmp_path):
    folder = write("pairs")
    for name in ("broken.parquet", "broken.json", "broken.tar", "broken.tar.gz"):
        (folder / name).write_bytes(b"no such thing")
    assert resolved(source(folder)).layout == "pairs"


def test_files_below_hidden_folders_are_not_looked_at(write):
    folder = write("pairs")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "train.json").write_text(json.dumps([HPD_V3]))
    assert resolved(source(folder)).layout == "pairs"


def test_links_to_files_are_followed(write, tmp_path):
    file = write("pairs") / "mine.parquet"
    (tmp_path / "snapshot").mkdir()
    os.symlink(file, tmp_path / "snapshot" / "0001.parquet")
    assert resolved(source(tmp_path / "snapshot")).layout == "pairs"


def test_a_folder_that_fits_nothing_names_what_was_found_and_what_was_expected(tmp_path, write_parquet, write_tar):
    write_parquet(tmp_path / "odd" / "rows.parquet", pa.table({"text": ["x"], "picture": [b"1"]}))
    (tmp_path / "odd" / "rows.json").write_text('[{"question": 1, "answer": 2}]')
    write_tar(tmp_path / "odd" / "rows.tar", [("0.json", b"{}")])
    with pytest.raises(SourceError) as error:
        resolved(source(tmp_path / "odd"))
    text = str(error.value)
    assert text.startswith(f"source 'mine': {tmp_path / 'odd'} fits no layout. Found ")
    for found in ("rows.parquet: parquet with ['text', 'picture']", "rows.json: json with ['question', 'answer']"):
        assert found in text
    assert "rows.tar: tar with ['0.json']" in text
    for layout, expected in {
        "pickapic": "'caption', 'image_0_uid', 'image_1_uid', 'label_0'",
        "pickapic_webdataset": "original_prompt.txt",
        "hpd": "'human_preference', 'prompt', 'file_path'",
        "hpdv3": "'prompt', 'path1', 'path2'",
        "rapidata": "'votes_image1', 'votes_image2'",
        "pairs": "'prompt', 'image_0', 'image_1', 'label_0'",
    }.items():
        assert f"{layout}: " in text
        assert expected in text


def test_an_empty_folder_and_a_missing_one_are_told_apart(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"fits no layout\. Found no parquet, JSON or tar file\. Expected"):
        resolved(source(tmp_path / "empty"))
    with pytest.raises(SourceError, match=r"source 'mine': .*nowhere: no such folder"):
        resolved(source(tmp_path / "nowhere"))
    (tmp_path / "file.parquet").write_bytes(b"")
    with pytest.raises(SourceError, match=r"source 'mine': .*file\.parquet: no such folder"):
        resolved(source(tmp_path / "file.parquet"))


@pytest.mark.parametrize(
    ("one", "other"), [("pairs", "pickapic"), ("hpd", "pickapic_webdataset"), ("rapidata", "hpdv3")]
)
def test_two_layouts_in_one_folder_are_named_and_the_configuration_decides(write, one, other):
    write(one)
    folder = write(other)
    with pytest.raises(SourceError, match=r"fits several layouts, \[.*\]: set its layout") as error:
        resolved(source(folder))
    assert repr(one) in str(error.value)
    assert repr(other) in str(error.value)
    assert resolved(source(folder, layout=other)).layout == other


def test_a_folder_that_is_filled_later_is_looked_at_again(tmp_path, write_parquet):
    (tmp_path / "later").mkdir()
    with pytest.raises(SourceError, match="fits no layout"):
        resolved(source(tmp_path / "later"))
    write_parquet(tmp_path / "later" / "rows.parquet", [PAIR])
    assert resolved(source(tmp_path / "later")).layout == "pairs"
