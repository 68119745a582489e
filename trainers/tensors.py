"""Cached tensors of a table, flat: training reads random rows of them without holding them in memory.

The parquet tables stay the truth; what lies here is a copy in the layout that random access needs, made once per content of
the table, shared by all runs of a home, and safe to delete.
Belongs here: tables of packed float16 tensors as arrays. Does not belong here: what they mean (`caches`, `trajectories`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from pipelines import schemas
from pipelines.identity import fingerprint
from pipelines.tables import STAGED_SECONDS, Store, StoreError

CODE_VERSION = "1"
_KEYS = "keys.parquet"


class TensorFile:
    """The binary columns of a table's partitions below a path, float16, found by the table's key.

    Every partition is copied once, so that a table that grows costs only what is new.
    """

    def __init__(self, store: Store, table: schemas.Table, below: str, scratch: Path) -> None:
        """Open the arrays, copying them out of the table first if they are not there.

        Args:
            scratch: local folder in which arrays of all tables lie.

        Raises:
            StoreError: the table has no partition there, or its tensors have several shapes.
        """
        manifests = store.manifests(table.name, below)
        if not manifests:
            raise StoreError(f"table {table.name} has nothing below {below}: make it first")
        self.name = f"{table.name}/{below}"
        blobs = [c.name for c in table.columns if c.dtype == pl.Binary]
        keys: list[pl.DataFrame] = []
        files: dict[str, list[Path]] = {b: [] for b in blobs}
        sizes: dict[str, set[int]] = {b: set() for b in blobs}
        for manifest in manifests:
            mark = fingerprint(code_version=CODE_VERSION, content=manifest.content, version=manifest.schema_version)
            folder = scratch / table.name / f"{manifest.partition}@{mark}"
            if not (folder / _KEYS).exists():
                _copy_out(store, table, manifest.partition, blobs, folder)
            part = pl.read_parquet(folder / _KEYS)
            if part.is_empty():
                continue
            keys.append(part)
            for b in blobs:
                if size := (folder / b).stat().st_size:
                    files[b].append(folder / b)
                    sizes[b].add(size // len(part))
        self.keys = pl.concat([table.empty().drop(blobs), *keys])
        columns = [self.keys[k].to_list() for k in table.key]
        rows: Sequence[Hashable] = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        self._row = {key: i for i, key in enumerate(rows)}
        self._starts = np.cumsum([0, *map(len, keys)])
        for b in blobs:
            if len(sizes[b]) > 1 or 0 < len(files[b]) < len(keys):
                raise StoreError(f"{self.name}, column {b}: {_SEVERAL}; found bytes per row {sorted(sizes[b])}")
        self._files = {b: found for b, found in files.items() if found}
        self._sizes = {b: sizes[b].pop() for b in self._files}

    def __len__(self) -> int:
        return len(self.keys)

    def missing(self, keys: Sequence[Hashable]) -> list[Hashable]:
        """Return the keys that are not here."""
        return [k for k in keys if k not in self._row]

    def read(self, column: str, keys: Sequence[Hashable], shape: tuple[int, ...]) -> torch.Tensor:
        """Return the tensors of these keys as float32 [len(keys), *shape].

        Raises:
            KeyError: a key is not here.
            StoreError: the column is empty.
        """
        if column not in self._files:
            raise StoreError(f"{self.name}: column {column} is empty")
        size = self._sizes[column]
        rows = np.fromiter((self._row[k] for k in keys), np.int64, len(keys))
        places = np.searchsorted(self._starts, rows, side="right") - 1
        values = np.empty((len(keys), size), np.uint8)
        for place in np.unique(places):
            # Opened for this read only: a table may have more parts than a process may hold files open.
            with self._files[column][place].open("rb", buffering=0) as file:
                for i in np.flatnonzero(places == place):
                    values[i] = np.frombuffer(
                        os.pread(file.fileno(), size, int(rows[i] - self._starts[place]) * size), np.uint8
                    )
        return torch.from_numpy(values.view(np.float16).astype(np.float32)).view(len(keys), *shape)


_SEVERAL = "tensors of several sizes, or some missing; caches of one backbone have one shape, make them again"


def _copy_out(store: Store, table: schemas.Table, partition: str, blobs: list[str], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name.rpartition('@')[0]}@*"):
        # Of a process that was killed; one that still copies has touched it today.
        if time.time() - left.stat().st_mtime > STAGED_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}")
    staged.mkdir()
    try:
        sizes: dict[str, int] = {}
        keys: list[pl.DataFrame] = []
        with contextlib.ExitStack() as stack:
            files = {b: stack.enter_context((staged / b).open("wb")) for b in blobs}
            parquet = stack.enter_context(store.open_parquet(table, partition))
            for batch in parquet.iter_batches(256):
                for b in blobs:
                    files[b].write(_joined(f"{table.name}/{partition}, column {b}", batch.column(b), b, sizes))
                keys.append(pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch]).drop_columns(blobs))))
        pl.concat([table.empty().drop(blobs), *keys]).write_parquet(staged / _KEYS)
        try:
            staged.rename(folder)
        except OSError:
            # Another process made it meanwhile.
            if not (folder / _KEYS).exists():
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    # Copies of what the partition held before; processes that still read one keep their open files.
    for old in folder.parent.glob(f"{folder.name.rpartition('@')[0]}@*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def _joined(where: str, cells: pa.Array, column: str, sizes: dict[str, int]) -> bytes:
    values = [v for v in cells.to_pylist() if v is not None]
    lengths = {len(v) for v in values} | ({sizes[column]} if column in sizes else set())
    if len(lengths) > 1 or 0 < len(values) < len(cells) or (not values and column in sizes):
        raise StoreError(f"{where}: {_SEVERAL}; found bytes per row {sorted(lengths)}")
    if values:
        sizes[column] = lengths.pop()
    return b"".join(values)


def pack(tensor: torch.Tensor) -> bytes:
    """Return a tensor as float16 bytes, C order.

    Raises:
        ValueError: it overflows float16.
    """
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError("a cached tensor overflows float16; is the autoencoder the fp16-safe one (backbones.vae)?")
    return half.cpu().contiguous().numpy().tobytes()


def unpack(data: list[bytes], shape: tuple[int, ...]) -> torch.Tensor:
    """Return packed tensors as float32 [N, *shape]."""
    flat = np.frombuffer(b"".join(data), dtype=np.float16).reshape(len(data), *shape)
    return torch.from_numpy(flat.astype(np.float32))
