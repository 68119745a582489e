"""Ingestion against a bare read-and-rewrite of the same bytes: `python -m benchmarks.ingest [--megabytes 500]`.

Generates one Pick-a-Pic shard (two images of about 168 KB a row, all different), then in alternating runs, each in a
process of its own:

    bare    pyarrow reads the shard in pieces, sha256 of every image, pyarrow writes the same columns again
    lean    the same with the options that suit images: columns not buffered ahead, no dictionary, no compression
    ours    ingest_shard into a fresh store: the same bytes, plus ids, headers, statuses, prompts, votes, manifests

Prints the medians of seconds and MB/s, the largest resident memory, and the throughput relative to bare and to lean.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOAL_RATIO, GOAL_MEMORY_MIB = 0.60, 1024
IMAGE_BYTES = 168_000


def generate(file: Path, megabytes: int, rows_per_group: int) -> int:
    """Write the shard; return its rows."""
    import datetime as dt
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from pipelines.world.raw import PICKAPIC_SCHEMA

    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(buffer, "JPEG")
    head = buffer.getvalue()
    head = head[: head.index(b"\xff\xda") + 14]

    def image() -> bytes:
        # A real header, then noise without markers: as long and as incompressible as a photograph's scan.
        return head + rng.integers(0, 255, IMAGE_BYTES - len(head) - 2, dtype=np.uint8).tobytes() + b"\xff\xd9"

    rows = megabytes * 1_000_000 // (2 * IMAGE_BYTES)
    start = dt.datetime(2023, 2, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(file, PICKAPIC_SCHEMA) as writer:
        for first in range(0, rows, rows_per_group):
            part = [
                {
                    **dict.fromkeys(PICKAPIC_SCHEMA.names),
                    "caption": f"prompt number {i // 4}",
                    "created_at": start + dt.timedelta(seconds=i),
                    "has_label": True,
                    "image_0_uid": f"uid-{i}-0",
                    "image_1_uid": f"uid-{i}-1",
                    "jpg_0": image(),
                    "jpg_1": image(),
                    "label_0": float(i % 2),
                    "label_1": float(1 - i % 2),
                    "ranking_id": i // 4,
                    "user_id": i % 97,
                }
                for i in range(first, min(first + rows_per_group, rows))
            ]
            writer.write_table(pa.Table.from_pylist(part, schema=PICKAPIC_SCHEMA))
    return rows


def bare(source: Path, target: Path, is_lean: bool = False) -> None:
    """Read, hash and rewrite with pyarrow alone."""
    import hashlib

    import pyarrow.parquet as pq

    reading = {"pre_buffer": False} if is_lean else {}
    writing = {"compression": "none", "use_dictionary": False, "write_statistics": False} if is_lean else {}
    with pq.ParquetFile(source, **reading) as file:
        writer = None
        for batch in file.iter_batches(64):
            for column in ("jpg_0", "jpg_1"):
                for value in batch.column(column):
                    hashlib.sha256(value.as_buffer()).hexdigest()
            writer = writer or pq.ParquetWriter(target / "bare.parquet", batch.schema, **writing)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()


def ours(source: Path, target: Path) -> None:
    """Ingest the shard into a fresh store."""
    from pipelines import ingest
    from pipelines.config import SourceConfig
    from pipelines.tables import Store

    config = SourceConfig(name="bench", layout="pickapic", location=str(source.parent.parent), storage="copy")
    (shard,) = ingest.list_source(config)
    ingest.ingest_shard(Store(str(target / "store")), ingest.plan(config, [shard]), shard)


def run_once(what: str, source: Path, target: Path) -> None:
    """Run one side in this process and print its figures as JSON."""
    import pyarrow.parquet  # noqa: F401 (imports are not what is measured)

    import pipelines.ingest  # noqa: F401

    before = time.perf_counter()
    ours(source, target) if what == "ours" else bare(source, target, is_lean=what == "lean")
    seconds = time.perf_counter() - before
    print(json.dumps({"seconds": seconds, "mib": _peak_mib()}))


def _peak_mib() -> float:
    """Return this process's largest resident memory (getrusage would count the parent's before exec too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> int:
    """Generate, measure in alternation, print the table; exit 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument(
        "--rows-per-group", type=int, default=100, help="rows of a row group; as many as rows: one group"
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--once", nargs=3, metavar=("WHAT", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        run_once(options.once[0], Path(options.once[1]), Path(options.once[2]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "raw" / "data" / "train-00000-of-00001-0123456789abcdef.parquet"
        rows = generate(source, options.megabytes, options.rows_per_group)
        size = source.stat().st_size / 1e6
        print(
            f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {size:.0f} MB, {rows} rows, "
            f"row groups of {options.rows_per_group}, {options.runs} alternating runs after one of each",
            flush=True,
        )
        found: dict[str, list[dict[str, float]]] = {"bare": [], "lean": [], "ours": []}
        for k in range(options.runs + 1):
            for what in found:
                target = Path(folder) / what
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                command = [sys.executable, "-m", "benchmarks.ingest", "--once", what, str(source), str(target)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                if k:
                    found[what].append(json.loads(out))
    median = {}
    for what, results in found.items():
        seconds = sorted(r["seconds"] for r in results)
        median[what] = statistics.median(seconds)
        memory = max(r["mib"] for r in results)
        print(
            f"{what:5s} median {median[what]:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), {size / median[what]:.0f} MB/s, "
            f"peak memory {memory:.0f} MiB"
        )
    memory = max(r["mib"] for r in found["ours"])
    ratios = {what: median[what] / median["ours"] for what in ("bare", "lean")}
    print(
        f"throughput of ours relative to bare {ratios['bare']:.0%} (goal {GOAL_RATIO:.0%}), to lean {ratios['lean']:.0%}; "
        f"peak memory {memory:.0f} MiB (goal {GOAL_MEMORY_MIB})"
    )
    return 0 if ratios["bare"] >= GOAL_RATIO and memory <= GOAL_MEMORY_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
