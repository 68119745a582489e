"""What pruning removes and what it never does, on real small stores."""

import json
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl
import pytest

from pipelines import retention, schemas
from pipelines.config import ScorerConfig
from pipelines.scoring import batches, checkpoints
from pipelines.scoring.parts import Parts
from pipelines.tables import Store

DAYS = 86_400.0
OLDEST, OLD, RECENT = "a" * 12, "b" * 12, "c" * 12


def rows(n=3):
    return pl.DataFrame(
        [(f"i{k}", "p", 0.5, "ok", None) for k in range(n)], schema=schemas.SCORES.polars_schema, orient="row"
    )


def write(store, revision, days, *, scorer="clip", shards=("one", "two")):
    """Write a revision's scores as if that many days ago; the commits' time and the files' are those of then."""
    then = time.time() - days * DAYS
    for shard in shards:
        where = batches.partition(scorer, revision, shard)
        manifest = store.write(schemas.SCORES, rows(), partition=where, made_from="x")
        old = replace(manifest, written_at=then)
        store.publish(f"_manifests/scores/{where}.json", json.dumps(asdict(old)).encode())
        set_time(store, days)


def set_time(store, days, below=""):
    for file in Path(store.location, below).rglob("*"):
        if file.is_file() and time.time() - file.stat().st_mtime < DAYS:
            os.utime(file, (time.time() - days * DAYS,) * 2)


def activate(store, **revisions):
    store.publish("scores/current.json", json.dumps({"revisions": revisions}).encode())


def revisions(store, scorer="clip"):
    """Return the revisions of which anything lies anywhere in the store."""
    files = [
        f for place in ("_manifests/", "", "_parts/", "_failures/") for f in store.list_files(f"{place}scores/{scorer}")
    ]
    return {part.removeprefix("revision=") for f in files for part in f.split("/") if part.startswith("revision=")}


@pytest.fixture
def config(tiny_config, tiny_clip, tmp_path):
    """One scorer `clip`, with files of the test's own."""
    folder = shutil.copytree(tiny_clip, tmp_path / "files")
    scorer = ScorerConfig(name="clip", kind="clip", checkpoint=str(folder))
    return tiny_config.model_copy(update={"scorers": (scorer,), "home": str(tmp_path / "home")})


@pytest.fixture
def filled(store, config):
    """Four revisions: the present one is the oldest, then come OLDEST (active), OLD, RECENT."""
    present = checkpoints.revision(config.scorers[0])
    for revision, days in ((present, 50), (OLDEST, 40), (OLD, 30), (RECENT, 20)):
        write(store, revision, days)
    activate(store, clip=OLDEST)
    return present


def test_the_active_and_the_present_revision_stay_however_old_they_are(store, config, filled):
    removed = retention.prune_scores(store, config, 1)
    assert revisions(store) == {filled, OLDEST}
    assert [r.what for r in removed] == [f"scores/clip/revision={RECENT}", f"scores/clip/revision={OLD}"]
    assert {m.partition.split("/")[1] for m in store.manifests("scores")} == {
        f"revision={filled}",
        f"revision={OLDEST}",
    }


def test_the_newest_others_stay_as_far_as_the_number_reaches(store, config, filled):
    assert [r.what for r in retention.prune_scores(store, config, 3)] == [f"scores/clip/revision={OLD}"]
    assert revisions(store) == {filled, OLDEST, RECENT}
    assert retention.prune_scores(store, config, 3) == []


def test_what_was_written_to_within_a_day_stays(store, config, filled):
    write(store, "d" * 12, 0.5)
    # Old commits, and a part of a shard that another machine is scoring.
    Parts(store, batches.partition("clip", OLD, "three"), "mark").flush()
    part = Parts(store, batches.partition("clip", OLD, "three"), "mark")
    part.add(rows(), 0.0)
    removed = retention.prune_scores(store, config, 1)
    assert [r.what for r in removed] == [f"scores/clip/revision={RECENT}"]
    assert revisions(store) == {filled, OLDEST, OLD, "d" * 12}


def test_a_dry_run_tells_the_same_and_removes_nothing(store, config, filled):
    before = {f: f.stat().st_mtime_ns for f in Path(store.location).rglob("*")}
    told = retention.prune_scores(store, config, 1, dry_run=True)
    assert {f: f.stat().st_mtime_ns for f in Path(store.location).rglob("*")} == before
    assert all("would be removed (6 rows, " in r.text for r in told)
    done = retention.prune_scores(store, config, 1)
    assert [(r.what, r.rows, r.bytes) for r in done] == [(r.what, r.rows, r.bytes) for r in told]


def test_bytes_are_those_of_all_files_that_go(store, config, filled):
    where = [f"{p}scores/clip/revision={OLD}" for p in ("_manifests/", "")]
    size = sum(f.stat().st_size for w in where for f in Path(store.location, w).rglob("*") if f.is_file())
    freed = {r.what: r.bytes for r in retention.prune_scores(store, config, 1)}
    assert freed[f"scores/clip/revision={OLD}"] == size > 0


def test_parts_and_failures_of_a_removed_revision_go_with_it(store, config, filled):
    Parts(store, batches.partition("clip", OLD, "three"), "mark").add(rows(), 0.0)
    store.record_failure("scores", batches.partition("clip", OLD, "three"), "why")
    set_time(store, 25)
    retention.prune_scores(store, config, 1)
    assert store.list_files("_parts/scores") == store.list_files("_failures/scores") == []


def test_an_interrupted_removal_leaves_nothing_to_readers_and_is_finished_by_the_next(
    store, config, filled, monkeypatch
):
    remove = Store.remove

    def interrupted(self, folder):
        if folder == f"scores/clip/revision={RECENT}":
            raise KeyboardInterrupt
        remove(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retention.prune_scores(store, config, 1)
    assert store.manifests("scores", f"clip/revision={RECENT}") == []
    assert RECENT in revisions(store)
    # Files that nobody committed do not take the place of a revision that is kept.
    removed = retention.prune_scores(store, config, 3)
    assert [r.what for r in removed] == [f"scores/clip/revision={RECENT}"]
    assert revisions(store) == {filled, OLDEST, OLD}


def test_half_removed_commits_are_finished_too(store, config, filled):
    os.remove(Path(store.location, f"_manifests/scores/clip/revision={OLD}/one.json"))
    retention.prune_scores(store, config, 1)
    assert revisions(store) == {filled, OLDEST}


def test_of_a_scorer_whose_present_revision_cannot_be_known_nothing_is_removed(store, config, filled):
    before = revisions(store)
    shutil.rmtree(config.scorers[0].checkpoint)
    assert retention.prune_scores(store, config, 1) == []
    assert revisions(store) == before


def test_a_scorer_that_is_configured_no_more_keeps_its_active_revision(store, config, filled):
    for revision, days in ((OLDEST, 9), (OLD, 8), (RECENT, 7)):
        write(store, revision, days, scorer="gone")
    activate(store, clip=OLDEST, gone=OLDEST)
    retention.prune_scores(store, config, 1)
    assert revisions(store, "gone") == {OLDEST}
    activate(store, clip=OLDEST)
    write(store, OLD, 8, scorer="gone")
    retention.prune_scores(store, config, 1)
    assert revisions(store, "gone") == {OLD}


def test_an_empty_store_has_nothing_to_remove(store, config):
    assert retention.prune(store, config) == []
    assert retention.main_text(store, config, dry_run=True) == "nothing to remove"


def test_launches_go_when_nothing_in_them_was_written_for_so_long(tmp_path):
    for name in ("old", "used", "new"):
        folder = tmp_path / "launches" / name
        folder.mkdir(parents=True)
        (folder / "step.json").write_text("{}")
        (folder / "log.txt").write_text("line")
    (tmp_path / "launches" / "note.txt").write_text("not a launch")
    (tmp_path / "kept").mkdir()
    (tmp_path / "launches" / "link").symlink_to(tmp_path / "kept")
    then = time.time() - 100 * DAYS
    for name in ("old", "used"):
        for file in (tmp_path / "launches" / name / "step.json", tmp_path / "launches" / name / "log.txt"):
            os.utime(file, (then, then))
        os.utime(tmp_path / "launches" / name, (then, then))
    os.utime(tmp_path / "launches" / "used" / "log.txt")
    told = retention.prune_launches(tmp_path, 90, dry_run=True)
    assert sorted(f.name for f in (tmp_path / "launches").iterdir()) == ["link", "new", "note.txt", "old", "used"]
    assert retention.prune_launches(tmp_path, 90) == [replace(r, is_dry=False) for r in told]
    assert [(r.what, r.bytes) for r in told] == [("launches/old", 6)]
    assert sorted(f.name for f in (tmp_path / "launches").iterdir()) == ["link", "new", "note.txt", "used"]
    assert retention.prune_launches(tmp_path / "nowhere", 90) == []
