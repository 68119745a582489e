"""Ingestion that is killed (SIGKILL) at random moments resumes to the tables of one that never was."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from polars.testing import assert_frame_equal

from pipelines import schemas
from pipelines.tables import Store
from pipelines.world.raw import PICKAPIC_SCHEMA

CODE_ROOT = Path(__file__).resolve().parents[2]
KILLS = 10
STARTS = 40
SHARDS = 8
ROWS = 40
IMAGE_BYTES = 90_000


class Maker:
    """Pictures with a real JPEG header and end, random bytes between: ingestion reads no more of them than that."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64)).save(buffer, "JPEG")
        self.header = buffer.getvalue()[:-2]

    def image(self, size=IMAGE_BYTES):
        return self.header + self.random.randbytes(size) + b"\xff\xd9"

    def row(self, number):
        label = self.random.choice([0.0, 0.5, 1.0])
        return {
            "caption": f"prompt {number % 7}",
            "jpg_0": self.image(),
            "jpg_1": self.image(),
            "label_0": label,
            "label_1": 1 - label,
            "image_0_uid": f"a{number}",
            "image_1_uid": f"b{number}",
            "user_id": number % 5,
            "ranking_id": number,
            "created_at": datetime(2024, 1, 1) + timedelta(minutes=number),
            "has_label": True,
            "model_0": "one",
            "model_1": "two",
        }


def write_pickapic(folder, index, seed):
    maker = Maker(seed)
    rows = [maker.row(1000 * index + i) for i in range(ROWS)]
    # A repeated row, one without an image and one with a damaged one: every kind of status resumes too.
    rows += [{**rows[0]}, {**rows[1], "jpg_0": None, "ranking_id": 1}, {**rows[2], "jpg_1": rows[2]["jpg_1"][:500]}]
    table = pa.Table.from_pylist([{n: r.get(n) for n in PICKAPIC_SCHEMA.names} for r in rows], schema=PICKAPIC_SCHEMA)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"train-{index:05d}-of-{SHARDS:05d}.parquet", row_group_size=16)


def write_raw(folder):
    """Write three sources: Pick-a-Pic parquet, HPD with image files, Pick-a-Pic as WebDataset."""
    for index in range(SHARDS):
        write_pickapic(folder / "pickapic" / "data", index, index)
    maker = Maker(100)
    records = []
    (folder / "hpd" / "train").mkdir(parents=True)
    for number in range(90):
        names = [f"{number}_{k}.jpg" for k in (0, 1)]
        for name in names[: 1 + (number % 9 != 0)]:
            (folder / "hpd" / "train" / name).write_bytes(maker.image(20_000))
        records.append({"prompt": f"prompt {number % 9}", "file_path": names, "human_preference": [1, 0]})
    (folder / "hpd" / "train.json").write_text(json.dumps(records))
    (folder / "wds").mkdir()
    for index in range(3):
        with tarfile.open(folder / "wds" / f"train-{index:05d}.tar", "w") as tar:
            for number in range(20):
                members = {"original_prompt.txt": b"a prompt", "label_0.txt": b"1.0"}
                members |= {f"jpg_{k}.jpg": maker.image(40_000) for k in (0, 1)}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{index}-{number:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_config(file, raw, store):
    layouts = {"pickapic": "pickapic", "hpd": "hpd", "wds": "pickapic_webdataset"}
    sources = "".join(
        f'[[sources]]\nname = "{n}"\nlayout = "{layout}"\nlocation = "{raw / n}"\nrecords_per_shard = 30\n'
        for n, layout in layouts.items()
    )
    file.write_text(
        f'home = "{file.parent / "home"}"\nstore = "{store}"\n{sources}'
        f'[[scorers]]\nname = "clip"\nkind = "clip"\ncheckpoint = "none"\n'
        f'[[backbones]]\nname = "tiny"\nfamily = "tiny"\ncheckpoint = "none"\n'
    )
    return file


def start(config):
    # Its own session: whatever it started dies with it.
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", "ingest", "--config", str(config)],
        cwd=CODE_ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(config):
    """Run ingestion to its end; return how long it took, in seconds."""
    began = time.monotonic()
    process = start(config)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0, told
    return time.monotonic() - began


def committed(store):
    """Return (table, partition) -> manifest of everything that is committed."""
    found = {}
    for file in sorted(Path(store.location, "_manifests").rglob("*.json")):
        table, partition = file.relative_to(Path(store.location, "_manifests")).with_suffix("").as_posix().split("/", 1)
        manifest = store.manifest(table, partition)
        assert manifest is not None, f"{table}/{partition} is committed and its file is not there"
        found[table, partition] = manifest
    return found


def check_readable(store):
    """Read every committed partition whole and compare it with its commit; return how many there are."""
    manifests = committed(store)
    for (table, partition), manifest in manifests.items():
        file = Path(store.data_path(table, partition))
        data = file.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (manifest.bytes, manifest.content)
        assert pq.read_table(pa.BufferReader(data)).num_rows == manifest.rows
    for table in {t for t, _ in manifests}:
        rows = sum(m.rows for (t, _), m in manifests.items() if t == table)
        assert store.scan(schemas.TABLES[table]).select(pl.len()).collect().item() == rows, (
            "a scan sees what is committed and no more"
        )
    for file in Path(store.location).rglob("*.parquet"):
        pq.read_metadata(file)
    return len(manifests)


def facts(manifest):
    """What a commit says but for when it was made and how long that took."""
    return {k: v for k, v in vars(manifest).items() if k not in ("seconds", "written_at")}


def assert_same(store, reference):
    here, there = committed(store), committed(reference)
    assert here.keys() == there.keys()
    for key in here:
        assert facts(here[key]) == facts(there[key]), key
    for name in {table for table, _ in here}:
        table = schemas.TABLES[name]
        assert_frame_equal(store.scan(table).collect(), reference.scan(table).collect())
    files = {f.relative_to(store.location).as_posix() for f in Path(store.location).rglob("*") if f.is_file()}
    tables = {f for f in files if not f.startswith(("_staging/", "_manifests/", "views.sql", "data_dictionary.md"))}
    assert tables == {f"{table}/{partition}.parquet" for table, partition in here}, "no file but the committed ones"


def test_ingestion_killed_at_random_moments_resumes_to_the_tables_of_an_uninterrupted_run(tmp_path):
    draw = random.Random(20240229)
    raw = tmp_path / "raw"
    write_raw(raw)
    before = Store(str(tmp_path / "before"))
    finish(write_config(tmp_path / "before.toml", raw, before.location))
    # Half of the stores start anew, half with the tables of older files: rewriting is interrupted too.
    for index in range(0, SHARDS, 2):
        write_pickapic(raw / "pickapic" / "data", index, 1000 + index)
    reference = Store(str(tmp_path / "reference"))
    duration = finish(write_config(tmp_path / "reference.toml", raw, reference.location))
    start_up = finish(tmp_path / "reference.toml")
    complete = check_readable(reference)
    assert complete > 50
    assert any(facts(m) != facts(committed(before)[k]) for k, m in committed(reference).items())

    wanted = {key: facts(manifest) for key, manifest in committed(reference).items()}
    kills = in_the_middle = rounds = starts = 0
    # Those count that hit a process which had written something, not one that was still importing.
    while in_the_middle < KILLS:
        store = Store(str(tmp_path / f"killed-{rounds}"))
        if rounds % 2:
            shutil.copytree(before.location, store.location)
        config = write_config(tmp_path / f"killed-{rounds}.toml", raw, store.location)
        rounds += 1
        done = {key: facts(manifest) for key, manifest in committed(store).items()}
        for _ in range(5):
            starts += 1
            assert starts <= STARTS, f"{kills} kills, {in_the_middle} of them in the middle of work"
            # A run that has less left to do takes less time: most kills must hit one that is at work.
            left = sum(key not in done or done[key] != wanted[key] for key in wanted) / len(wanted)
            at_start = state(store)
            process = start(config)
            time.sleep(draw.uniform(start_up / 2, start_up + (duration - start_up) * left))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                # It may have ended between the look and the signal.
                kills += process.returncode == -signal.SIGKILL
                in_the_middle += process.returncode == -signal.SIGKILL and at_start != state(store)
            else:
                told, _ = process.communicate()
                assert process.returncode == 0, told
            check_readable(store)
            done = {key: facts(manifest) for key, manifest in committed(store).items()}
        finish(config)
        assert_same(store, reference)
        assert check_readable(store) == complete
        leave_staged_files_behind_for_a_day(store)
        shutil.rmtree(store.location)
    assert rounds >= 2
    assert kills >= in_the_middle >= KILLS


def state(store):
    """What has been written so far: every file with its time."""
    files = (f for f in Path(store.location).rglob("*") if f.is_file())
    return frozenset((str(f.relative_to(store.location)), f.stat().st_mtime_ns) for f in files)


def leave_staged_files_behind_for_a_day(store):
    """What killed writes staged is no table; it is cleared when it is old, and nothing else is."""
    left = list(Path(store.location, "_staging").glob("*"))
    kept = committed(store)
    old = time.time() - 2 * 86_400
    for file in left:
        os.utime(file, (old, old))
    store.clear_staging()
    assert list(Path(store.location, "_staging").glob("*")) == []
    assert committed(store) == kept


@pytest.mark.parametrize("kept", ["_staging/x.staged", "votes/uncommitted.parquet"])
def test_what_a_killed_write_left_is_no_partition(kept, tmp_path):
    store = Store(str(tmp_path / "store"))
    store.write(schemas.PROMPTS, pl.DataFrame({"prompt_id": ["a"], "prompt": ["a"]}), partition="a", made_from="1")
    left = tmp_path / "store" / kept
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half a fi")
    for table in (schemas.VOTES, schemas.PROMPTS):
        assert [m.partition for m in store.manifests(table.name)] == (["a"] if table is schemas.PROMPTS else [])
        assert len(store.scan(table).collect()) == (table is schemas.PROMPTS)
    assert "half" not in store.read_text("views.sql" if store.write_views() else "")
    assert "uncommitted" not in store.read_text("views.sql")
