"""What a killed run has scored of a shard already: small files beside the tables, gone when the shard is committed.

    <store>/_parts/scores/<scorer>/revision=<12 hex>/<shard>/<mark>/<n>-<process>.parquet

The mark is the fingerprint of what the shard's scores are made from: parts of other inputs are never taken.
Belongs here: keeping and finding finished rows. Does not belong here: scoring.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
import uuid

import polars as pl

from pipelines import schemas
from pipelines.tables import Store

_KEY = ["image_id", "prompt_id"]


class Parts:
    """Finished rows of one scorer's scores of one shard."""

    def __init__(self, store: Store, partition: str, mark: str) -> None:
        self._store = store
        self._all = f"_parts/scores/{partition}"
        self._folder = f"{self._all}/{mark}"
        # Two processes may work on one shard by mistake: neither overwrites the other's.
        self._process = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._written = 0
        self._waiting: list[pl.DataFrame] = []
        self._since = time.monotonic()

    def read(self) -> pl.DataFrame:
        """Return the rows that earlier runs have finished, each once."""
        names = [n for n in self._store.list_files(self._folder) if n.endswith(".parquet")]
        frames = []
        for name in names:
            # Another run may have committed the shard meanwhile and removed its parts.
            with contextlib.suppress(FileNotFoundError):
                frames.append(pl.read_parquet(io.BytesIO(self._store.read_bytes(name))))
        return pl.concat([schemas.SCORES.empty(), *frames]).unique(_KEY, keep="first", maintain_order=True)

    def add(self, rows: pl.DataFrame, seconds: float) -> None:
        """Keep finished rows; they are written when the oldest has waited for `seconds`."""
        self._waiting.append(rows)
        if time.monotonic() - self._since >= seconds:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        rows = pl.concat(self._waiting) if self._waiting else schemas.SCORES.empty()
        if len(rows):
            buffer = io.BytesIO()
            rows.write_parquet(buffer)
            self._store.publish(f"{self._folder}/{self._written:05d}-{self._process}.parquet", buffer.getvalue())
            self._written += 1
        self._waiting, self._since = [], time.monotonic()

    def clear(self) -> None:
        """Remove the parts of this shard, also those of earlier inputs: the shard is committed."""
        self._store.remove(self._all)
