"""Ingestion: one shard of any layout -> votes, images, image names, prompts, with every row accounted for.

Belongs here: identities, order of a pair, statuses. Does not belong here: layouts (`sources`), ownership (`catalogue`).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import polars as pl
import pyarrow as pa

from pipelines import identity, images, schemas
from pipelines.config import Config, ImagesConfig, LimitsConfig, SourceConfig
from pipelines.files import services_as_oserror
from pipelines.sources import RawChunk, Shard, SourceError, detect
from pipelines.sources.detect import LAYOUTS, resolved
from pipelines.tables import Built, Store

CODE_VERSION = "2"
TABLES = (schemas.IMAGES, schemas.IMAGE_NAMES, schemas.PROMPTS, schemas.VOTES)
"""Tables of a shard in the order in which they are committed: with its votes a shard counts as ingested."""
MAX_COUNT = 1_000_000_000
"""More people than this behind one vote are a mistake, and their sums could overflow."""
PROGRESS_SECONDS = 10.0
_RECOGNISED_LABELS = (0.0, 0.5, 1.0)
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How a shard is ingested: its source with the layout resolved, how image bytes are kept, the limits."""

    source: SourceConfig
    storage: str
    limits: LimitsConfig
    is_storage_fixed: bool = True

    def fingerprint(self, files: str, storage: str) -> str:
        """Return the fingerprint of what ingestion makes of a shard. files: the layout's fingerprint of it."""
        return identity.fingerprint(
            code_version=CODE_VERSION,
            schema_versions=[t.version for t in TABLES],
            shard=files,
            source=self.source.name,
            location=self.source.location if storage == "reference" else None,
            layout=self.source.layout,
            family=self.source.family,
            split=self.source.split,
            storage=storage,
            limits=self.limits.model_dump(),
        )

    def marks(self, files: str) -> set[str]:
        """Return the fingerprints under which a shard counts as ingested. files: the layout's fingerprint of it."""
        # What auto chose for a source when it was smaller stays: nothing is read again only because a source grew.
        kept = (self.storage,) if self.is_storage_fixed else ("copy", "reference")
        return {self.fingerprint(files, storage) for storage in kept}


def plan(
    source: SourceConfig,
    shards: Sequence[Shard] = (),
    images_config: ImagesConfig | None = None,
    limits: LimitsConfig | None = None,
) -> Plan:
    """Return how the shards of a source (all of them: their size decides) are ingested.

    `auto` refers to the images of sources larger than `images.reference_above_gb`, and copies those of smaller ones and
    of compressed archives, from which no single image can be read.

    Raises:
        SourceError: storage = reference is asked for images in a compressed archive.
    """
    source, images_config = resolved(source), images_config or ImagesConfig()
    wanted = source.storage or images_config.storage
    is_seekable = all(s.is_seekable for s in shards)
    if wanted == "reference" and not is_seekable:
        raise SourceError(
            f"source {source.name!r}: storage = 'reference' needs images that can be read one by one, but they lie in a "
            f"compressed archive; unpack it, or set storage = 'copy'"
        )
    is_large = sum(s.bytes for s in shards) > images_config.reference_above_gb * 1e9
    storage = ("reference" if is_large and is_seekable else "copy") if wanted == "auto" else wanted
    return Plan(source, storage, limits or LimitsConfig(), is_storage_fixed=wanted != "auto")


def plans(config: Config, shards: Sequence[Shard]) -> dict[str, Plan]:
    """Return the plan of every source of a configuration by its name; shards: of all sources."""
    return {
        source.name: plan(source, [s for s in shards if s.source == source.name], config.images, config.limits)
        for source in config.sources
    }


def list_shards(config: Config) -> list[Shard]:
    """Return the shards of all sources in a fixed order.

    Raises:
        SourceError: a source holds nothing of its layout, or two shards have one key.
    """
    if config.world is not None and not (config.world_folder / "world.json").exists():
        raise SourceError(
            f"the small world is not written yet in {config.world_folder}; run `python -m pipelines world` (or `run`), or "
            f"materialize raw_sources"
        )
    detect.forget()
    shards = [s for source in config.sources for s in list_source(source)]
    if repeated := sorted(k for k, n in Counter(s.key for s in shards).items() if n > 1):
        raise SourceError(f"shard keys repeat: {repeated}; give the sources different names")
    return shards


def list_source(source: SourceConfig) -> list[Shard]:
    """Return the shards of one source."""
    try:
        with services_as_oserror(source.location):
            source = resolved(source)
            return LAYOUTS[source.layout].list_shards(source)
    except OSError as error:
        raise SourceError(f"source {source.name!r}: {source.location}: {error.strerror or error}") from error


def ingested(store: Store, shards: Sequence[Shard]) -> tuple[list[str], list[str]]:
    """Return the keys of the shards that are ingested, and of those that are not (a file may be damaged).

    Raises:
        SourceError: none is.
    """
    committed = {m.partition for m in store.manifests(schemas.VOTES.name)}
    present = [s.key for s in shards if s.key in committed]
    if not present:
        raise SourceError(
            f"{store.location}: no shard of the configured sources is ingested; run `python -m pipelines ingest`"
        )
    return present, [s.key for s in shards if s.key not in committed]


def ingest_shard(
    store: Store, how: Plan, shard: Shard, progress: Callable[[str], None] = lambda message: None
) -> dict[str, Built]:
    """Ingest one shard into its tables; return what was built, by table. `progress` is told every ten seconds.

    Why it failed is remembered under the shard's votes until it succeeds.

    Raises:
        SourceError: the file is unreadable or lacks a column; nothing of the shard becomes visible.
        RuntimeError: the rows do not add up (a defect of a layout's reader).
    """
    try:
        with _reading(how, shard):
            built = _ingest(store, how, shard, progress)
    except Exception as error:
        store.record_failure(schemas.VOTES.name, shard.key, str(error))
        raise
    if built[schemas.VOTES.name].is_reused:
        # What could not be read for a while is what it was.
        store.forget_failure(schemas.VOTES.name, shard.key)
    return built


def present_marks(how: Plan, shard: Shard) -> set[str]:
    """Return the fingerprints under which the shard counts as ingested as its files are now; no image is read.

    Layouts whose rows name image files read these names, and ask when the files changed.

    Raises:
        SourceError: a file is unreadable.
    """
    with _reading(how, shard):
        return how.marks(LAYOUTS[how.source.layout].fingerprint(how.source, shard))


def is_ingested(store: Store, how: Plan, shard: Shard) -> bool:
    """Return whether the shard's tables are there, made from its files as they are now.

    Raises:
        SourceError: see present_marks.
    """
    found = {None if m is None else m.fingerprint for m in (store.manifest(t.name, shard.key) for t in TABLES)}
    return len(found) == 1 and found <= present_marks(how, shard)


@contextlib.contextmanager
def _reading(how: Plan, shard: Shard) -> Iterator[None]:
    try:
        with services_as_oserror(how.source.location):
            yield
    except OSError as error:
        if not _is_of_source(error, how):
            raise
        raise SourceError(f"{how.source.location}, {shard.file}: cannot be read: {error.strerror or error}") from error


def _is_of_source(error: OSError, how: Plan) -> bool:
    return str(error.filename or "").startswith(how.source.location.rstrip("/"))


def _ingest(store: Store, how: Plan, shard: Shard, progress: Callable[[str], None]) -> dict[str, Built]:
    files = LAYOUTS[how.source.layout].fingerprint(how.source, shard)
    mark = how.fingerprint(files, how.storage)
    existing = {t.name: store.manifest(t.name, shard.key) for t in TABLES}
    found = {None if m is None else m.fingerprint for m in existing.values()}
    if len(found) == 1 and found <= how.marks(files):
        return {name: Built(m, True) for name, m in existing.items() if m is not None}

    chunks = LAYOUTS[how.source.layout].read_shard(how.source, shard, how.limits)
    reader = _ShardReader(how, chunks, lambda message: progress(f"{shard.key}: {message}"))
    built = {}
    for table, rows in (
        (schemas.IMAGES, reader.image_tables),
        (schemas.IMAGE_NAMES, reader.names),
        (schemas.PROMPTS, reader.prompts),
    ):
        built[table.name] = Built(store.write(table, rows(), partition=shard.key, made_from=mark), False)
    votes = reader.votes()
    facts = {**reader.accounted(votes), "file": shard.file, "storage": how.storage}
    manifest = store.write(schemas.VOTES, votes, partition=shard.key, made_from=mark, extra=facts)
    return {**built, schemas.VOTES.name: Built(manifest, False)}


def _ahead(items: Iterator[T], depth: int = 1) -> Iterator[T]:
    """Yield the items while another thread makes the next ones."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    is_stopped = threading.Event()

    def put(item: tuple[bool, Any]) -> bool:
        while not is_stopped.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            is_item, item = made.get()
            if is_item:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        is_stopped.set()
        thread.join()


def _hashed(chunk: RawChunk) -> tuple[RawChunk, list[tuple[pa.Buffer | None, str | None]]]:
    """Return the chunk and, per image, its bytes without a copy and their sha256."""
    data = chunk.images["bytes"].combine_chunks()
    buffers = [v.as_buffer() if v.is_valid else None for v in data]
    return chunk, [(b, None if b is None else identity.image_id_of_bytes(memoryview(b))[1]) for b in buffers]


class _ShardReader:
    """Walks a shard's chunks once: yields distinct images, keeps the (small) votes, names and prompts."""

    def __init__(self, how: Plan, chunks: Iterator[RawChunk], progress: Callable[[str], None]) -> None:
        self._how, self._chunks, self._progress = how, chunks, progress
        self._ids: dict[str, str | None] = {}
        self._unknown: dict[str, str] = {}
        self._seen: set[str] = set()
        self._names: dict[tuple[str, str], str] = {}
        self._raw_votes: list[pl.DataFrame] = []
        self._rows = self._images = 0

    def image_tables(self) -> Iterator[pa.Table]:
        """Yield the distinct images; reading and hashing, a thread each, run ahead of whoever writes."""
        told, size = time.monotonic(), 0
        for chunk, found in _ahead(_hashed(c) for c in _ahead(self._chunks)):
            yield self._distinct(chunk, found)
            size += chunk.images.nbytes
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                self._progress(f"{self._rows} rows, {self._images} images, {size / 1e9:.1f} GB")

    def _distinct(self, chunk: RawChunk, found: list[tuple[pa.Buffer | None, str | None]]) -> pa.Table:
        self._rows += chunk.rows
        self._raw_votes.append(chunk.votes)
        raw, family = chunk.images, self._how.source.family
        self._images += len(raw)
        columns: dict[str, list[Any]] = {
            c: [] for c in ("image_id", "sha256", "width", "height", "format", "status", "reason")
        }
        kept: list[int] = []
        details = raw.select(["image_key", "uid", "status", "reason"]).to_pylist()
        for i, (detail, (data, digest)) in enumerate(zip(details, found, strict=True)):
            uid = detail["uid"]
            if digest is None and uid is None:
                self._ids[detail["image_key"]] = None
                if detail["reason"] is not None:
                    self._unknown[detail["image_key"]] = f"{detail['status']}: {detail['reason']}"
                continue
            named = None if uid is None else identity.image_id_of_uid(family, uid)
            image_id = digest[: identity.ID_CHARACTERS] if digest is not None else named
            assert image_id is not None
            self._ids[detail["image_key"]] = image_id
            if named is not None and uid is not None:
                self._names[named, image_id] = uid
            if image_id in self._seen:
                continue
            self._seen.add(image_id)
            kept.append(i)
            header = images.read_header(data, self._how.limits)
            row = (image_id, digest, header.width, header.height, header.format)
            told = (detail["status"] or header.status, detail["reason"] or header.reason)
            for column, value in zip(columns.values(), (*row, *told), strict=True):
                column.append(value)
        if len(kept) < len(raw):
            raw = raw.take(pa.array(kept, pa.int64()))
        return self._table(raw, columns)

    def _table(self, raw: pa.Table, columns: dict[str, list[Any]]) -> pa.Table:
        is_copied = self._how.storage == "copy"
        places = ("uri", "row_group", "row", "image_column", "byte_offset", "byte_length")
        values: dict[str, Any] = {**columns}
        values["bytes"] = raw["bytes"] if is_copied else pa.nulls(len(raw), pa.large_binary())
        values |= {p: pa.nulls(len(raw), raw[p].type) if is_copied else raw[p] for p in places}
        return pa.table({c: values[c] for c in schemas.IMAGES.polars_schema})

    def names(self) -> pl.DataFrame:
        """Return the names that the source gives to its images."""
        family = self._how.source.family
        rows = [(named, image, family, uid) for (named, image), uid in sorted(self._names.items())]
        return pl.DataFrame(rows, schema=schemas.IMAGE_NAMES.polars_schema, orient="row")

    def votes(self) -> pl.DataFrame:
        """Return all votes with ids and statuses."""
        if not self._raw_votes:
            return schemas.VOTES.empty()
        return _mark_duplicates(self._normalise(pl.concat(self._raw_votes)))

    def prompts(self) -> pl.DataFrame:
        """Return the distinct prompts."""
        prompts: dict[str, str] = {}
        for frame in self._raw_votes:
            known = frame.filter(pl.col("problem").is_null())["prompt"].drop_nulls().unique()
            prompts |= {identity.prompt_id(p): identity.normalise_prompt(p) for p in known}
        return pl.DataFrame(sorted(prompts.items()), schema=schemas.PROMPTS.polars_schema, orient="row")

    def accounted(self, votes: pl.DataFrame) -> dict[str, int]:
        """Return the sums of what went in and came out.

        Raises:
            RuntimeError: they do not agree.
        """
        rows_out = votes["source_row"].n_unique()
        if rows_out != self._rows:
            raise RuntimeError(f"{self._rows} rows of the source, {rows_out} accounted for")
        unknown = sum(v is None for v in self._ids.values())
        known = {v for v in self._ids.values() if v is not None}
        if len(self._ids) != self._images or known != self._seen:
            raise RuntimeError(f"{self._images} images of the source, {len(self._ids)} accounted for")
        return {
            "rows_in": self._rows,
            "images_in": self._images,
            "images_distinct": len(known),
            "images_unknown": unknown,
        }

    def _normalise(self, votes: pl.DataFrame) -> pl.DataFrame:
        source = self._how.source
        prompts = {p: identity.prompt_id(p) for p in votes["prompt"].drop_nulls().unique()}
        votes = votes.with_columns(
            first=pl.col("first_key").replace_strict(self._ids, return_dtype=pl.String, default=None),
            second=pl.col("second_key").replace_strict(self._ids, return_dtype=pl.String, default=None),
            **{
                f"{side}_unknown": pl.col(f"{side}_key").replace_strict(
                    self._unknown, return_dtype=pl.String, default=None
                )
                for side in ("first", "second")
            },
            prompt_id=pl.when(pl.col("problem").is_null()).then(
                pl.col("prompt").replace_strict(prompts, return_dtype=pl.String, default=None)
            ),
        )
        votes = _with_status(votes).with_columns(swapped=(pl.col("first") > pl.col("second")).fill_null(False))
        is_ok = pl.col("status") == "ok"
        verdict = pl.col("source_label_first")
        frame = votes.select(
            prompt_id="prompt_id",
            image_0_id=pl.when("swapped").then("second").otherwise("first"),
            image_1_id=pl.when("swapped").then("first").otherwise("second"),
            source=pl.lit(source.name),
            source_row="source_row",
            rater="rater",
            annotator_id=pl.lit(f"{source.family}:") + pl.col("annotator"),
            label_0=pl.when(is_ok).then(pl.when("swapped").then("label_second").otherwise("label_first")),
            count=pl.when(is_ok).then("count"),
            source_label_0=pl.when("swapped").then(1 - verdict).otherwise(verdict),
            source_confidence="source_confidence",
            group_id=pl.lit(f"{source.family}:") + pl.col("group"),
            was_swapped=pl.when("is_display_order").then("swapped"),
            was_listed_second="swapped",
            model_0=pl.when("swapped").then("model_second").otherwise("model_first"),
            model_1=pl.when("swapped").then("model_first").otherwise("model_second"),
            created_at="created_at",
            split="split",
            status="status",
            reason="reason",
        )
        pairs = [
            identity.pair_id(p, a, b) if p is not None and a is not None and b is not None and a < b else None
            for p, a, b in frame.select("prompt_id", "image_0_id", "image_1_id").iter_rows()
        ]
        keys = [identity.vote_id(s, r, k) for s, r, k in frame.select("source", "source_row", "rater").iter_rows()]
        return frame.with_columns(pl.Series("pair_id", pairs, pl.String), pl.Series("vote_id", keys, pl.String)).select(
            list(schemas.VOTES.polars_schema)
        )


def _with_status(votes: pl.DataFrame) -> pl.DataFrame:
    """Return raw votes, their images and prompts known by ids, with status and reason: the first case that fits."""
    adds_up = (pl.col("label_first") + pl.col("label_second") - 1).abs() < 1e-9
    is_known = pl.col("label_first").is_in(_RECOGNISED_LABELS)
    found = pl.concat_str(
        *(pl.col(f"label_{i}").cast(pl.String).fill_null("null") for i in ("first", "second")), separator=" / "
    )
    cases = [
        (pl.col("problem").is_not_null(), "unreadable", pl.col("problem")),
        (pl.col("prompt_id").is_null(), "no_prompt", pl.lit("the prompt is null")),
        (
            pl.col("first").is_null() | pl.col("second").is_null(),
            "no_image",
            pl.coalesce("first_unknown", "second_unknown", pl.lit("neither bytes nor uid of an image")),
        ),
        (pl.col("first") == pl.col("second"), "same_image", pl.lit("both images have the same bytes")),
        (~pl.col("is_labelled"), "unlabelled", pl.lit("the source says that the row has no label")),
        (
            ~(is_known & adds_up).fill_null(False),
            "invalid_label",
            pl.concat_str(pl.lit("expected 1 / 0, 0.5 / 0.5 or 0 / 1, found "), found),
        ),
        (
            ((pl.col("count") < 1) | (pl.col("count") > MAX_COUNT)).fill_null(False),
            "invalid_label",
            pl.concat_str(pl.lit(f"expected a count between 1 and {MAX_COUNT}, found "), pl.col("count")),
        ),
    ]
    status, reason = pl.lit("ok"), pl.lit(None, pl.String)
    for condition, name, why in reversed(cases):
        status = pl.when(condition).then(pl.lit(name)).otherwise(status)
        reason = pl.when(condition).then(why).otherwise(reason)
    return votes.with_columns(status=status, reason=reason)


EVENT = ("annotator_id", "pair_id", "created_at")
"""What makes two votes of a known person at a known time one vote."""
RAW = (
    *(
        "prompt_id",
        "image_0_id",
        "image_1_id",
        "label_0",
        "count",
        "source_label_0",
        "source_confidence",
        "was_listed_second",
    ),
    *("model_0", "model_1", "annotator_id", "group_id", "created_at", "rater"),
)
"""What a raw row says but for its place: rows without person or time are repeated only if all of it is equal."""


def _mark_duplicates(votes: pl.DataFrame) -> pl.DataFrame:
    """Mark repeated votes of a shard: same known annotator, pair and time; else the same raw row but for its number."""
    known = pl.col("annotator_id").is_not_null() & pl.col("created_at").is_not_null()
    # A vote that does not count (no label, say) is nobody's original.
    counting = pl.col("vote_id").filter(pl.col("status") == "ok")
    original = pl.when(known).then(counting.first().over(EVENT)).otherwise(counting.first().over(RAW))
    repeated = (pl.col("status") == "ok") & (original != pl.col("vote_id"))
    return votes.with_columns(
        status=pl.when(repeated).then(pl.lit("duplicate_of")).otherwise("status"),
        reason=pl.when(repeated).then(original).otherwise("reason"),
    )
