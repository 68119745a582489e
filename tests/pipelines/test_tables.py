import json
import os
from pathlib import Path

import duckdb
import fsspec
import polars as pl
import pytest

from pipelines import schemas
from pipelines.tables import Manifest, Store, StoreError


def prompts(*texts):
    return pl.DataFrame({"prompt_id": [t[:3] for t in texts], "prompt": list(texts)})


def scores(*values):
    rows = [(f"i{k}", "p", v, "ok" if v is not None else "no_bytes", None) for k, v in enumerate(values)]
    return pl.DataFrame(rows, schema=schemas.SCORES.polars_schema, orient="row")


def visible_files(store):
    root = Path(store.location)
    return sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file())


def test_a_written_partition_is_read_back_with_its_commit(store):
    manifest = store.write(schemas.PROMPTS, prompts("one", "two"), partition="a", made_from="x", inputs={"i": "1"})
    assert (manifest.rows, manifest.fingerprint, manifest.inputs) == (2, "x", {"i": "1"})
    assert store.manifest("prompts", "a") == manifest
    assert store.read(schemas.PROMPTS, "a")["prompt"].to_list() == ["one", "two"]
    assert manifest.bytes == Path(store.data_path("prompts", "a")).stat().st_size


def test_frames_are_written_one_after_the_other_and_counted_by_status(store):
    frames = (scores(v).with_columns(pl.lit(f"i{k}").alias("image_id")) for k, v in enumerate([1.0, None, 2.0]))
    manifest = store.write(schemas.SCORES, frames, partition="s/revision=r/a", made_from="x")
    assert manifest.rows_by_status == {"no_bytes": 1, "ok": 2}
    assert store.read(schemas.SCORES, "s/revision=r/a")["score"].to_list() == [1.0, None, 2.0]


def test_a_repeated_key_is_refused_and_nothing_becomes_visible(store):
    with pytest.raises(schemas.SchemaError, match="1 rows repeat the key"):
        store.write(schemas.PROMPTS, iter([prompts("one"), prompts("two", "one")]), made_from="x")
    assert visible_files(store) == []
    assert store.manifest("prompts") is None


def test_a_frame_that_raises_midway_leaves_nothing_visible_and_no_staging_file(store):
    def frames():
        yield prompts("one")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        store.write(schemas.PROMPTS, frames(), made_from="x")
    assert visible_files(store) == []


def test_a_write_that_fails_leaves_the_partition_as_it_was(store):
    before = store.write(schemas.PROMPTS, prompts("one"), made_from="x")
    with pytest.raises(schemas.SchemaError):
        store.write(schemas.PROMPTS, iter([prompts("two"), prompts("six").drop("prompt")]), made_from="y")
    assert store.manifest("prompts") == before
    assert store.read(schemas.PROMPTS)["prompt"].to_list() == ["one"]


def test_a_second_write_replaces_the_partition(store):
    store.write(schemas.PROMPTS, prompts("one"), made_from="x")
    store.write(schemas.PROMPTS, prompts("two", "six"), made_from="y")
    assert store.scan(schemas.PROMPTS).collect()["prompt"].to_list() == ["two", "six"]
    assert visible_files(store) == ["_manifests/prompts/all.json", "prompts/all.parquet"]


def test_nan_is_refused(store):
    with pytest.raises(schemas.SchemaError, match="NaN"):
        store.write(schemas.SCORES, scores(float("nan")), made_from="x")
    assert visible_files(store) == []


def test_a_file_without_its_manifest_is_not_read(store):
    store.write(schemas.PROMPTS, prompts("one"), partition="a", made_from="x")
    store.write(schemas.PROMPTS, prompts("two"), partition="b", made_from="x")
    Path(store.location, "_manifests/prompts/b.json").unlink()
    assert Path(store.data_path("prompts", "b")).exists()
    assert store.scan(schemas.PROMPTS).collect()["prompt"].to_list() == ["one"]
    with pytest.raises(StoreError, match=r"table 'prompts' has no partition 'b'; materialize it first"):
        store.read(schemas.PROMPTS, "b")


def test_a_manifest_whose_file_is_gone_commits_nothing(store):
    store.write(schemas.PROMPTS, prompts("one"), made_from="x")
    Path(store.data_path("prompts")).unlink()
    assert store.manifest("prompts") is None
    assert store.manifests("prompts") == []


@pytest.mark.parametrize("frames", [[], [schemas.PROMPTS.empty()]], ids=["no frame", "empty frame"])
def test_an_empty_table_is_committed_with_its_columns(store, frames):
    manifest = store.write(schemas.PROMPTS, iter(frames), made_from="x")
    assert manifest.rows == 0
    found = store.scan(schemas.PROMPTS).collect()
    assert found.schema == pl.Schema(schemas.PROMPTS.polars_schema)
    assert len(found) == 0


def test_a_table_that_was_never_written_scans_as_empty(store):
    assert store.scan(schemas.VOTES).collect().schema == pl.Schema(schemas.VOTES.polars_schema)
    assert store.manifests("votes") == []


def test_a_scan_takes_all_partitions_those_below_a_path_or_those_named(store):
    for k, partition in enumerate(["s/revision=r/a", "s/revision=r/b", "s/revision=q/a", "t/revision=r/a"]):
        store.write(schemas.SCORES, scores(float(k)), partition=partition, made_from="x")
    assert sorted(store.scan(schemas.SCORES).collect()["score"]) == [0, 1, 2, 3]
    assert sorted(store.scan(schemas.SCORES, below="s/revision=r/").collect()["score"]) == [0, 1]
    assert store.scan(schemas.SCORES, partitions=["t/revision=r/a"]).collect()["score"].to_list() == [3]


class Counter:
    """Makes a table and counts how often it was asked to."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return prompts("one")


def test_a_partition_is_rebuilt_when_input_code_or_parameters_change_and_reused_otherwise(store):
    make = Counter()
    first = store.write(schemas.IMAGES, schemas.IMAGES.empty(), made_from="x")

    def build(inputs, code_version="1", **parameters):
        return store.build(
            schemas.PROMPTS, make, inputs=inputs, code_version=code_version, parameters=parameters
        ).is_reused

    changed = Manifest(**{**vars(first), "content": "f" * 64})
    rewritten = Manifest(**{**vars(first), "written_at": 0.0, "seconds": 9.0, "fingerprint": "other"})
    assert build([first], k=1) is False
    assert build([first], k=1) is True
    assert build([rewritten], k=1) is True, "an input of the same content is the same input"
    assert build([changed], k=1) is False
    assert build([changed], k=2) is False
    assert build([changed], code_version="2", k=2) is False
    assert build([], code_version="2", k=2) is False
    assert build([], code_version="2", k=2) is True
    assert make.calls == 5


def test_the_manifest_of_a_built_partition_names_the_content_of_its_inputs(store):
    source = store.write(schemas.IMAGES, schemas.IMAGES.empty(), partition="a", made_from="x")
    built = store.build(schemas.PROMPTS, lambda: prompts("one"), inputs=[source], code_version="1")
    assert built.manifest.inputs == {"images/a": source.content}


def test_the_same_rows_have_the_same_content_digest(store):
    a = store.write(schemas.PROMPTS, prompts("one"), partition="a", made_from="x")
    b = store.write(schemas.PROMPTS, prompts("one"), partition="b", made_from="y")
    c = store.write(schemas.PROMPTS, prompts("two"), partition="c", made_from="x")
    assert a.content == b.content != c.content


def test_what_an_interrupted_write_left_behind_is_cleared_and_never_read(store):
    store.write(schemas.PROMPTS, prompts("one"), made_from="x")
    left = Path(store.location, "_staging", "x.staged")
    left.write_bytes(b"half a file")
    of_a_writer = Path(store.location, "_staging", "y.staged")
    of_a_writer.write_bytes(b"being written")
    os.utime(left, (0, 0))
    assert len(store.scan(schemas.PROMPTS).collect()) == 1
    store.clear_staging()
    assert not left.exists()
    assert of_a_writer.exists()
    assert len(store.scan(schemas.PROMPTS).collect()) == 1


def test_a_store_at_a_url_commits_the_same_way():
    store = Store("memory://somewhere/store")
    store.write(schemas.PROMPTS, prompts("one"), partition="a", made_from="x")
    assert [m.partition for m in store.manifests("prompts")] == ["a"]
    assert store.data_path("prompts", "a").startswith("memory://")
    with fsspec.open(store.data_path("prompts", "a")) as file:
        assert pl.read_parquet(file.read())["prompt"].to_list() == ["one"]
    with pytest.raises(schemas.SchemaError):
        store.write(schemas.PROMPTS, prompts("one", "one"), partition="b", made_from="x")
    assert [m.partition for m in store.manifests("prompts")] == ["a"]


def views(store):
    connection = duckdb.connect()
    connection.execute(Path(store.write_views()).read_text())
    return connection


def test_views_work_in_duckdb_and_show_committed_partitions_only(store):
    store.write(schemas.PROMPTS, prompts("one"), partition="a", made_from="x")
    store.write(schemas.PROMPTS, prompts("two"), partition="it's", made_from="x")
    store.write(schemas.PROMPTS, prompts("six"), partition="c", made_from="x")
    Path(store.location, "_manifests/prompts/c.json").unlink()
    found = views(store).sql("SELECT prompt FROM prompts ORDER BY prompt").fetchall()
    assert found == [("one",), ("two",)]


@pytest.mark.parametrize("folder", ["store", "scores/store"])
def test_the_view_of_scores_names_the_scorer_and_shows_the_active_revision_only(tmp_path, folder):
    store = Store(str(tmp_path / folder))
    store.write(schemas.SCORES, scores(1.0), partition="pick/revision=aa/s1", made_from="x")
    store.write(schemas.SCORES, scores(2.0), partition="pick/revision=bb/s1", made_from="x")
    store.write(schemas.SCORES, scores(3.0), partition="clip/revision=aa/s1", made_from="x")
    store.write(schemas.SCORES, scores(4.0), partition="idle/revision=aa/s1", made_from="x")
    store.publish("scores/current.json", json.dumps({"revisions": {"pick": "bb", "clip": "aa"}}).encode())
    found = views(store).sql("SELECT scorer, score FROM scores ORDER BY scorer").fetchall()
    assert found == [("clip", 3.0), ("pick", 2.0)]


def test_the_data_dictionary_lies_beside_the_views(store):
    store.write_views()
    assert Path(store.location, "data_dictionary.md").read_text() == schemas.data_dictionary()


def test_a_crash_between_file_and_commit_leaves_no_old_commit_over_new_rows(store, monkeypatch):
    store.write(schemas.PROMPTS, prompts("one"), made_from="x")
    publish = store.publish

    def crash(name, content):
        if name.startswith("_manifests"):
            raise KeyboardInterrupt
        publish(name, content)

    monkeypatch.setattr(store, "publish", crash)
    with pytest.raises(KeyboardInterrupt):
        store.write(schemas.PROMPTS, prompts("two"), made_from="y")
    assert store.manifest("prompts") is None
    assert len(store.scan(schemas.PROMPTS).collect()) == 0


def test_a_partition_older_than_its_input_is_refused_with_both_names(store):
    first = store.write(schemas.PROMPTS, prompts("one"), partition="a", made_from="x")
    store.write(schemas.PROMPTS, prompts("one"), partition="b", made_from="x", inputs={"prompts/a": first.content})
    assert store.require_current("prompts", "b", made_from=[first]).partition == "b"
    store.write(schemas.PROMPTS, prompts("two"), partition="a", made_from="y")
    with pytest.raises(StoreError, match=r"prompts/b was made from another prompts/a"):
        store.require_current("prompts", "b")


def test_a_file_of_the_store_is_readable_by_whoever_the_system_lets_read(store, tmp_path):
    store.publish("a.json", b"{}")
    (tmp_path / "plain").touch()
    assert Path(store.path("a.json")).stat().st_mode == (tmp_path / "plain").stat().st_mode
