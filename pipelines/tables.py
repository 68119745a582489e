"""The store: parquet files that become visible by one atomic act, and the manifests that commit them.

    <store>/<table>/<partition>.parquet                a file, complete or absent
    <store>/_manifests/<table>/<partition>.json        its commit: readers trust manifests
    <store>/_failures/<table>/<partition>.json         why the last attempt to make it failed, until one succeeds

A partition is a relative path such as 'all', '<shard>' or 'pickscore/revision=0123456789ab/<shard>'.
Belongs here: reading, writing, committing, reusing. Does not belong here: what a table holds (`schemas`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import schemas
from pipelines.files import is_local
from pipelines.identity import fingerprint

STAGED_SECONDS = 86_400
# The mask can only be read by setting it.
_UMASK = os.umask(0)
os.umask(_UMASK)
_REQUESTS = 16
"""Small files read at once from an object store."""
WHOLE = "all"
"""Partition of a table that is not cut."""


class StoreError(RuntimeError):
    """The store lacks something that a step needs; the message says what to run."""


@dataclass(frozen=True)
class Manifest:
    """The commit of one partition. `fingerprint` is of what it was made from, `content` is the file's sha256."""

    table: str
    partition: str
    fingerprint: str
    content: str
    rows: int
    bytes: int
    schema_version: int
    seconds: float
    written_at: float
    rows_by_status: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why the last attempt to make a partition failed: the error's message, when (seconds since 1970), by which process."""

    message: str
    at: float
    by: str


@dataclass(frozen=True)
class Built:
    """What a step returns: the committed partition and whether it lay there already."""

    manifest: Manifest
    is_reused: bool


class Store:
    """A folder of tables: a local path or an fsspec URL."""

    def __init__(self, location: str) -> None:
        self.location = location
        # A listing that is kept would hide what other processes commit.
        options = {"use_listings_cache": False} if "://" in location and not location.startswith("file:") else {}
        self._fs, self._root = fsspec.core.url_to_fs(location, **options)
        self.is_local = is_local(self._fs)

    def __repr__(self) -> str:
        return f"Store({self.location!r})"

    def path(self, *parts: str) -> str:
        """Return the path of a file of the store, as polars and DuckDB read it."""
        path = "/".join([self._root, *parts])
        return path if self.is_local else self._fs.unstrip_protocol(path)

    def data_path(self, table: str, partition: str = WHOLE) -> str:
        """Return the path of a partition's parquet file."""
        return self.path(table, f"{partition}.parquet")

    # --- small files -------------------------------------------------------------------------------------------

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON file of the store, or None if it is not there.

        Raises:
            StoreError: it is damaged; or, elsewhere than on a local disk, it was refused or its service failed.
        """
        try:
            # From its first byte: s3fs then asks once, not for the size before.
            return json.loads(self._fs.cat_file(f"{self._root}/{name}", start=0))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(
                f"{self.location}: {name} is damaged ({error}); remove it, and what it commits is made again"
            ) from error
        except Exception as error:
            # Every service has errors of its own kinds.
            if self.is_local:
                raise
            raise StoreError(f"{self.location}: {name} could not be read: {error}") from error

    def read_text(self, name: str) -> str:
        """Return a text file of the store."""
        return self._fs.cat_file(f"{self._root}/{name}").decode()

    def publish(self, name: str, content: bytes | Path) -> None:
        """Make one file visible at once: fsync and rename on a local disk, one completed upload elsewhere.

        Raises:
            StoreError: an upload failed, for whatever reason its service gives. Nothing of it becomes visible.
        """
        target = f"{self._root}/{name}"
        if not self.is_local:
            try:
                self._fs.pipe_file(target, content) if isinstance(content, bytes) else self._fs.put_file(
                    str(content), target
                )
            except Exception as error:
                raise StoreError(f"{self.location}: {name} could not be uploaded: {error}") from error
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            staged = self._staging_file()
            staged.write_bytes(content)
        else:
            staged = content
        with staged.open("rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(staged, target)
        folder = os.open(Path(target).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def list_files(self, folder: str) -> list[str]:
        """Return the names of all files below a folder of the store, sorted; none where it is not there."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(f"{self._root}/{folder}")
        except FileNotFoundError:
            return []
        root = self._fs._strip_protocol(self._root)
        return sorted(f[len(root) + 1 :] for f in found)

    def read_bytes(self, name: str) -> bytes:
        """Return a small file of the store."""
        return self._fs.cat_file(f"{self._root}/{name}")

    def remove(self, folder: str) -> None:
        """Remove a folder that no manifest commits, with everything below it; nothing where it is not there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{folder}", recursive=True)

    @property
    def _staging(self) -> Path:
        return (
            Path(self._root) / "_staging"
            if self.is_local
            else Path(tempfile.gettempdir()) / f"polyphony-staging-{os.getuid()}"
        )

    def _staging_file(self) -> Path:
        self._staging.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._staging, suffix=".staged")
        # A temporary file is its owner's alone; a table is for whoever may read the store.
        os.fchmod(handle, 0o666 & ~_UMASK)
        os.close(handle)
        return Path(name)

    # --- failures ----------------------------------------------------------------------------------------------

    def record_failure(self, table: str, partition: str, message: str) -> None:
        """Remember why making a partition failed, until it is written or found unchanged; never raises."""
        failure = Failure(message, round(time.time(), 3), f"{socket.gethostname()}:{os.getpid()}")
        # Whoever calls this has an error to tell already, and perhaps because the store cannot be written to.
        with contextlib.suppress(Exception):
            self.publish(_failure_file(table, partition), json.dumps(asdict(failure), indent=1).encode())

    def forget_failure(self, table: str, partition: str) -> None:
        """Remove the record of a failure: the partition is there. Never raises."""
        # An old record that stays is less harm than work that is thrown away because of it.
        with contextlib.suppress(Exception):
            self._fs.rm_file(f"{self._root}/{_failure_file(table, partition)}")

    def failures(self, table: str, below: str = "") -> dict[str, Failure]:
        """Return partition -> why the last attempt to make it failed, of those whose path starts with `below`.

        A record that cannot be read says so in its message.
        """
        head, found = f"_failures/{table}/", {}
        for name in self.list_files(head.rstrip("/")):
            partition = name.removeprefix(head).removesuffix(".json")
            if not name.endswith(".json") or not partition.startswith(below):
                continue
            try:
                kept = self.read_json(name)
                if kept is not None:
                    found[partition] = Failure(str(kept["message"]), float(kept["at"]), str(kept["by"]))
            except (StoreError, OSError, ValueError, LookupError, TypeError) as error:
                found[partition] = Failure(f"it failed, but {name} cannot be read: {error}", 0.0, "")
        return found

    # --- tables ------------------------------------------------------------------------------------------------

    def write(
        self,
        table: schemas.Table,
        frames: pl.DataFrame | Iterable[pl.DataFrame | pa.Table],
        *,
        partition: str = WHOLE,
        made_from: str,
        inputs: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
        started: float | None = None,
    ) -> Manifest:
        """Write one partition and commit it.

        `frames` may be an iterator: each frame is checked, written and forgotten, so that memory does not grow.

        Raises:
            schemas.SchemaError: a frame does not fit the table, or a key repeats. Nothing becomes visible.
        """
        started = time.monotonic() if started is None else started
        staged = self._staging_file()
        statuses: dict[str, int] = {}
        keys: list[pl.DataFrame] = []
        try:
            with _HashedFile(staged) as file:
                writer = None
                try:
                    for frame in [frames] if isinstance(frames, pl.DataFrame) else frames:
                        arrow = _checked(table, frame)
                        keys.append(pl.DataFrame(pl.from_arrow(arrow.select(list(table.key)))))
                        if "status" in arrow.column_names:
                            for pair in pc.value_counts(arrow["status"]).to_pylist():
                                statuses[pair["values"]] = statuses.get(pair["values"], 0) + pair["counts"]
                        writer = writer or _writer(file.sink, arrow.schema)
                        writer.write_table(arrow, row_group_size=_row_group_size(arrow))
                        file.advance()
                    if writer is None:
                        arrow = _checked(table, table.empty())
                        writer = _writer(file.sink, arrow.schema)
                        writer.write_table(arrow)
                finally:
                    if writer is not None:
                        writer.close()
            rows = sum(len(k) for k in keys)
            if keys and (repeated := _repeated(pl.concat(keys))):
                raise schemas.SchemaError(
                    f"table {table.name}, partition {partition}: {repeated} rows repeat the key {list(table.key)}"
                )
            content, size = file.content, file.size
            # Uncommitted first: a crash between the two files must not leave new rows under an old commit.
            self._uncommit(table.name, partition)
            self.publish(f"{table.name}/{partition}.parquet", staged)
        finally:
            staged.unlink(missing_ok=True)
        manifest = Manifest(
            table=table.name,
            partition=partition,
            fingerprint=made_from,
            content=content,
            rows=rows,
            bytes=size,
            schema_version=table.version,
            seconds=round(time.monotonic() - started, 3),
            written_at=round(time.time(), 3),
            rows_by_status=dict(sorted(statuses.items())),
            inputs=dict(inputs or {}),
            extra=dict(extra or {}),
        )
        self.publish(f"_manifests/{table.name}/{partition}.json", json.dumps(asdict(manifest), indent=1).encode())
        self.forget_failure(table.name, partition)
        return manifest

    def manifest(self, table: str, partition: str = WHOLE) -> Manifest | None:
        """Return the commit of a partition, or None if it is not committed or its file is gone."""
        found = self.read_json(f"_manifests/{table}/{partition}.json")
        if found is None or not self._fs.exists(f"{self._root}/{table}/{partition}.parquet"):
            return None
        return Manifest(**found)

    def require(self, table: str, partition: str = WHOLE) -> Manifest:
        """Return the commit of a partition.

        Raises:
            StoreError: it is not there; the message says so and how partitions of that table come to be.
        """
        manifest = self.manifest(table, partition)
        if manifest is None:
            raise StoreError(
                f"{self.location}: table {table!r} has no partition {partition!r}; materialize it first "
                f"(`python -m pipelines run`, or the asset in Dagster)"
            )
        return manifest

    def require_all(self, table: str, partitions: Sequence[str]) -> list[Manifest]:
        """Return the commits of several partitions in this order, elsewhere than on a local disk many at once.

        Raises:
            StoreError: one is not there.
        """
        if self.is_local:
            return [self.require(table, p) for p in partitions]
        found = self._read_commits([f"{table}/{p}" for p in partitions])
        return [m if m is not None else self.require(table, p) for m, p in zip(found, partitions, strict=True)]

    def catalogued_shards(self) -> list[str] | None:
        """Return the shards that the catalogue was made of, None before there is one."""
        manifest = self.manifest(schemas.CATALOGUE_VOTES.name)
        if manifest is None:
            return None
        return [n.removeprefix("votes/") for n in manifest.inputs if n.startswith("votes/")]

    def _uncommit(self, table: str, partition: str) -> None:
        name = f"{self._root}/_manifests/{table}/{partition}.json"
        if self._fs.exists(name):
            self._fs.rm_file(name)

    def require_current(self, table: str, partition: str = WHOLE, made_from: Iterable[Manifest] = ()) -> Manifest:
        """Return the commit of a partition that was made from its inputs as they are now.

        made_from: inputs that it must have seen.

        Raises:
            StoreError: it is not there, or older than one of its inputs; the message names both and what to do.
        """
        manifest = self.require(table, partition)
        present = {f"{m.table}/{m.partition}": m.content for m in made_from}
        others = sorted(manifest.inputs.keys() - present.keys())
        for name, found in zip(others, self._read_commits(others), strict=True):
            if found is not None:
                present[name] = found.content
        for name, content in sorted(present.items()):
            if manifest.inputs.get(name) != content:
                raise StoreError(self._made_from_another(table, partition, name))
        return manifest

    def _made_from_another(self, table: str, partition: str, name: str) -> str:
        return (
            f"{self.location}: {table}/{partition} was made from another {name} than the present one; materialize "
            f"{table} again (`python -m pipelines run`, or the asset in Dagster)"
        )

    def require_seen(self, table: str, made_from: Manifest) -> Manifest:
        """Return the commit of a whole table that was made from this input as it is now (others are not looked at).

        Raises:
            StoreError: it is not there, or was made from another state of the input.
        """
        manifest, name = self.require(table), f"{made_from.table}/{made_from.partition}"
        if manifest.inputs.get(name) != made_from.content:
            raise StoreError(self._made_from_another(table, WHOLE, name))
        return manifest

    def manifests(self, table: str, below: str = "") -> list[Manifest]:
        """Return the commits of all partitions of a table (of those whose path starts with `below`), sorted."""
        folder = f"{self._root}/_manifests/{table}"
        try:
            # A listing may be cached by fsspec; commits of other processes must be seen.
            self._fs.invalidate_cache()
            names, files = self._fs.find(folder), set(self._fs.find(f"{self._root}/{table}"))
        except FileNotFoundError:
            return []
        prefix, data = (self._fs._strip_protocol(f) for f in (folder, f"{self._root}/{table}"))
        partitions = sorted(n[len(prefix) + 1 : -len(".json")] for n in names if n.endswith(".json"))
        named = [p for p in partitions if p.startswith(below) and f"{data}/{p}.parquet" in files]
        return [m for m in self._read_commits([f"{table}/{p}" for p in named]) if m is not None]

    def _read_commits(self, names: Sequence[str]) -> list[Manifest | None]:
        """Return the manifests of '<table>/<partition>' in this order; of many at once where each costs a request."""
        read = [f"_manifests/{name}.json" for name in names]
        if self.is_local or len(read) < 2:
            found = [self.read_json(name) for name in read]
        else:
            with ThreadPoolExecutor(min(_REQUESTS, len(read))) as pool:
                found = list(pool.map(self.read_json, read))
        return [None if f is None else Manifest(**f) for f in found]

    def scan(self, table: schemas.Table, below: str = "", partitions: Iterable[str] | None = None) -> pl.LazyFrame:
        """Return all committed rows of a table (of the partitions named, or of those below a path) as a LazyFrame."""
        names = [m.partition for m in self.manifests(table.name, below)] if partitions is None else list(partitions)
        if not names:
            return table.empty().lazy()
        paths = [self.data_path(table.name, p) for p in names]
        if self.is_local:
            return pl.scan_parquet(paths)
        # It imports pandas where there is one, which takes longer than all of Dagster.
        import pyarrow.dataset as pads

        # One filesystem reads and writes everything, with the credentials that fsspec has.
        files = [self._fs._strip_protocol(p) for p in paths]
        return pl.scan_pyarrow_dataset(pads.dataset(files, filesystem=self._fs, format="parquet"))

    def scan_shards(self, table: schemas.Table, shard_keys: Sequence[str]) -> pl.LazyFrame:
        """Return all rows of these shards with the columns `shard` and `place` (of the shard in this order)."""
        if not self.is_local or not shard_keys:
            parts = [self.scan(table, partitions=[k]).with_columns(shard=pl.lit(k)) for k in shard_keys]
            frame = pl.concat(parts) if parts else table.empty().lazy().with_columns(shard=pl.lit(None, pl.String))
        else:
            # One scan of many files: a scan each would take a thread each.
            files = {self.data_path(table.name, k): k for k in shard_keys}
            frame = pl.scan_parquet(list(files), include_file_paths="shard")
            frame = frame.with_columns(pl.col("shard").replace_strict(files, return_dtype=pl.String))
        places = {k: i for i, k in enumerate(shard_keys)}
        return frame.with_columns(place=pl.col("shard").replace_strict(places, return_dtype=pl.Int32))

    def read(self, table: schemas.Table, partition: str = WHOLE) -> pl.DataFrame:
        """Return one committed partition.

        Raises:
            StoreError: it is not there.
        """
        self.require(table.name, partition)
        return self.scan(table, partitions=[partition]).collect()

    @contextlib.contextmanager
    def open_parquet(self, table: schemas.Table, partition: str = WHOLE) -> Iterator[pq.ParquetFile]:
        """Open one committed partition for reading in pieces.

        Raises:
            StoreError: it is not there.
        """
        self.require(table.name, partition)
        path = f"{self._root}/{table.name}/{partition}.parquet"
        with self._fs.open(path, "rb") as handle, pq.ParquetFile(handle) as file:
            yield file

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """Return the filesystem of the store."""
        return self._fs

    def build(
        self,
        table: schemas.Table,
        make: Callable[[], pl.DataFrame | Iterable[pl.DataFrame]],
        *,
        inputs: Iterable[Manifest] = (),
        code_version: str,
        parameters: Mapping[str, Any] | None = None,
        partition: str = WHOLE,
        extra: Callable[[], Mapping[str, Any]] | None = None,
    ) -> Built:
        """Make a partition unless it lies there, made from the same inputs by the same code and parameters."""
        sources = {f"{m.table}/{m.partition}": m.content for m in inputs}
        made_from = made_of(table, sources, code_version, parameters)
        existing = self.manifest(table.name, partition)
        if existing is not None and existing.fingerprint == made_from:
            return Built(existing, True)
        started = time.monotonic()
        frames = make()
        manifest = self.write(
            table,
            frames,
            partition=partition,
            made_from=made_from,
            inputs=sources,
            extra=None if extra is None else extra(),
            started=started,
        )
        return Built(manifest, False)

    def clear_staging(self) -> None:
        """Remove what interrupted writes left behind: staged files that nobody has touched for a day."""
        for file in self._staging.glob("*.staged"):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if time.time() - file.stat().st_mtime > STAGED_SECONDS:
                    file.unlink()

    def write_views(self) -> str:
        """Write `views.sql` (DuckDB views over the committed, current partitions) and the data dictionary."""
        lines = ["-- DuckDB: .read views.sql, or duckdb.sql(open(...).read())"]
        catalogued = self.catalogued_shards()
        shards = None if catalogued is None else set(catalogued)
        for table in schemas.TABLES.values():
            partitions = [m.partition for m in self.manifests(table.name)]
            if "shard" in table.cut_by and shards is not None:
                # Tables of shards that are no source's any more stay until they are removed, but count no more.
                partitions = [p for p in partitions if p.split("/")[-1] in shards]
            if table is schemas.SCORES:
                current = self.current_revisions()
                partitions = [
                    p for p in partitions if current.get(p.split("/")[0]) == p.split("/")[1].removeprefix("revision=")
                ]
            if not partitions:
                continue
            files = ", ".join("'" + self.data_path(table.name, p).replace("'", "''") + "'" for p in partitions)
            columns = "*"
            if table is schemas.SCORES:
                name = "regexp_extract(filename, '/scores/([^/]+)/revision=([^/]+)/', {})"
                columns = f"*, {name.format(2)} AS revision, {name.format(1)} AS scorer"
            if table.cut_by in ("model", "recipe"):
                columns = f"*, regexp_extract(filename, '/{table.name}/([^/]+)\\.parquet$', 1) AS {table.cut_by}"
            # A folder above the store may be called 'split=test'; that says nothing about the column.
            options = "filename = true, union_by_name = true, hive_partitioning = false"
            lines.append(
                f"CREATE OR REPLACE VIEW {table.name} AS SELECT {columns} FROM read_parquet([{files}], {options});"
            )
        self.publish("views.sql", ("\n".join(lines) + "\n").encode())
        self.publish("data_dictionary.md", schemas.data_dictionary().encode())
        return self.path("views.sql")

    def current_revisions(self) -> dict[str, str]:
        """Return scorer -> active revision."""
        return (self.read_json("scores/current.json") or {}).get("revisions", {})


def made_of(
    table: schemas.Table, contents: Mapping[str, str], code_version: str, parameters: Mapping[str, Any] | None
) -> str:
    """Return the fingerprint of what a partition is made from. contents: '<table>/<partition>' -> content of the inputs."""
    return fingerprint(
        table=table.name,
        schema_version=table.version,
        code_version=code_version,
        parameters=dict(parameters or {}),
        inputs=dict(contents),
    )


def _failure_file(table: str, partition: str) -> str:
    return f"_failures/{table}/{partition}.json"


def _checked(table: schemas.Table, frame: pl.DataFrame | pa.Table) -> pa.Table:
    if isinstance(frame, pa.Table):
        return table.conform_arrow(frame)
    return table.conform(frame).to_arrow(compat_level=pl.CompatLevel.oldest())


def _repeated(keys: pl.DataFrame) -> int:
    """Return how many rows repeat the key of another."""
    if keys.width == 1:
        # Most tables are sorted by their key: looking at neighbours is a tenth of the work.
        key = keys.to_series()
        if bool((key.head(max(0, len(key) - 1)) < key.slice(1)).all()):
            return 0
    return len(keys) - keys.n_unique()


def _writer(sink: pa.NativeFile, schema: pa.Schema) -> pq.ParquetWriter:
    # Encoded images and tensors are all different: a dictionary or the smallest of them helps nobody.
    plain = [f.name for f in schema if not pa.types.is_large_binary(f.type)]
    codecs = {f.name: "zstd" if f.name in plain else "none" for f in schema}
    # Numbers are nearly all different too: a dictionary of them is built for nothing.
    texts = [f.name for f in schema if pa.types.is_large_string(f.type) or pa.types.is_string(f.type)]
    return pq.ParquetWriter(sink, schema, compression=codecs, use_dictionary=texts, write_statistics=plain)


class _HashedFile:
    """A new file that arrow writes and a thread hashes behind it; `content` (sha256) and `size` after closing."""

    def __init__(self, path: Path) -> None:
        self.sink = pa.OSFile(str(path), "wb")
        self._behind = path.open("rb", buffering=0)
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._jobs: list[Future[None]] = []
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.sink.closed:
            self.sink.close()
        self._jobs.append(self._thread.submit(self._hash, None))
        self._thread.shutdown()
        self._behind.close()
        for job in self._jobs:
            job.result()

    def advance(self) -> None:
        """Hash what is written so far."""
        self._jobs.append(self._thread.submit(self._hash, self.sink.tell()))

    def _hash(self, stop: int | None) -> None:
        block = memoryview(bytearray(1 << 20))
        while stop is None or self.size < stop:
            wanted = len(block) if stop is None else min(len(block), stop - self.size)
            if not (found := self._behind.readinto(block[:wanted])):
                return
            self._digest.update(block[:found])
            self.size += found

    @property
    def content(self) -> str:
        """Return the sha256 of the closed file."""
        return self._digest.hexdigest()


def _row_group_size(arrow: pa.Table) -> int:
    """Return rows per row group so that a group stays near 16 MB."""
    return int(max(1, min(100_000, 16_000_000 // max(1, arrow.nbytes // max(1, len(arrow))))))
