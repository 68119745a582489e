"""The catalogue and the accounting over many votes: `python -m benchmarks.catalogue [--votes 1000000] [--shards 645]`.

Generates ingested shards of random votes in Pick-a-Pic's proportions (about 15 images a prompt, the votes of a prompt on
near images), of which a share knows its images by name only, as the releases without images do, and builds every table.
Prints seconds and rows by table and the largest resident memory of the process.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from pipelines import accounting, catalogue, identity, schemas
from pipelines.sources import Shard
from pipelines.tables import Store

PROMPTS_PER_VOTE, IMAGES_PER_PROMPT, ANNOTATORS = 0.06, 15, 5_000


def _ids(what: str, count: int) -> np.ndarray:
    return np.array([hashlib.sha256(f"{what}{i}".encode()).hexdigest()[: identity.ID_CHARACTERS] for i in range(count)])


def _frame(table: schemas.Table, columns: dict, **constants: object) -> pl.DataFrame:
    """Return rows of a table; what is not given is null."""
    given = pl.DataFrame(columns).with_columns(**{k: pl.lit(v) for k, v in constants.items()})
    rest = [pl.lit(None, dtype=t).alias(c) for c, t in table.polars_schema.items() if c not in given.columns]
    return given.with_columns(rest).select(list(table.polars_schema))


def generate(store: Store, votes: int, shards: int, share_by_name: float) -> list[str]:
    """Write the shards' tables; return their keys."""
    rng = np.random.default_rng(0)
    prompts = _ids("prompt", int(votes * PROMPTS_PER_VOTE))
    images, names = (_ids(what, len(prompts) * IMAGES_PER_PROMPT) for what in ("image", "name"))
    keys = [f"bench.{k:05d}" for k in range(shards)]
    for k, key in enumerate(keys):
        ids = names if k < shards * share_by_name else images
        rows = votes // shards
        prompt = rng.integers(0, len(prompts), rows)
        start = rng.integers(0, IMAGES_PER_PROMPT, rows)
        step = rng.integers(1, IMAGES_PER_PROMPT, rows)
        ends = [prompt * IMAGES_PER_PROMPT + start, prompt * IMAGES_PER_PROMPT + (start + step) % IMAGES_PER_PROMPT]
        first, second = np.where(ids[ends[0]] < ids[ends[1]], ends, ends[::-1])
        columns = {
            "vote_id": [f"{k:08d}{i:024d}" for i in range(rows)],
            "prompt_id": prompts[prompt],
            "image_0_id": ids[first],
            "image_1_id": ids[second],
            "pair_id": [identity.pair_id(*r) for r in zip(prompts[prompt], ids[first], ids[second], strict=True)],
            "source_row": [f"{key}.parquet:{i}" for i in range(rows)],
            "annotator_id": [f"pickapic:{a}" for a in rng.integers(0, ANNOTATORS, rows)],
            "label_0": rng.choice([0.0, 0.5, 1.0], rows, p=[0.45, 0.1, 0.45]),
            "created_at": pl.Series(np.arange(rows) + k * rows).cast(pl.Datetime("us")),
        }
        said = {"source": "bench", "rater": 0, "count": 1, "was_listed_second": False, "split": "train", "status": "ok"}
        facts = {"rows_in": rows, "images_in": 2 * rows}
        store.write(schemas.VOTES, _frame(schemas.VOTES, columns, **said), partition=key, made_from=key, extra=facts)
        held = np.unique(np.concatenate([first, second]))
        status = "no_bytes" if ids is names else "ok"
        frames = {
            schemas.IMAGES: _frame(schemas.IMAGES, {"image_id": ids[held]}, status=status),
            schemas.IMAGE_NAMES: _frame(
                schemas.IMAGE_NAMES,
                {"named_id": names[held], "image_id": ids[held], "uid": names[held]},
                family="pickapic",
            ),
            schemas.PROMPTS: _frame(
                schemas.PROMPTS,
                {"prompt_id": prompts[np.unique(prompt)], "prompt": np.unique(prompt).astype(str)},
            ),
        }
        for table, frame in frames.items():
            store.write(table, frame, partition=key, made_from=key)
    return keys


def main() -> None:
    """Generate, build, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--votes", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=645)
    parser.add_argument("--by-name", type=float, default=0.0, help="share of the shards without image bytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        keys = generate(store, options.votes, options.shards, options.by_name)
        print(
            f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {options.votes} votes, "
            f"{options.shards} shards, {options.by_name:.0%} of them by name",
            flush=True,
        )
        started = time.perf_counter()
        for name, built in catalogue.build(store, keys).items():
            print(f"{name:20s} {built.manifest.rows:9d} rows {built.manifest.seconds:7.1f} s", flush=True)
        print(f"catalogue {time.perf_counter() - started:.1f} s")
        built = accounting.build(store, [Shard(k, "bench", f"{k}.parquet", k) for k in keys], {})
        total = store.read(schemas.ACCOUNTING).row(-1, named=True)
        print(
            f"accounting {built.manifest.seconds:.1f} s: {total['pairs']} pairs, {total['pairs_in_cycles']} in cycles"
        )
        status = Path("/proc/self/status").read_text()
        print(f"peak memory {int(status.split('VmHWM:')[1].split()[0]) / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
