"""Ingestion: one shard of any layout -> votes, images, prompts, with every row accounted for.

Belongs here: identities, order of a pair, statuses. Does not belong here: layouts (`sources`), ownership (`catalogue`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import polars as pl

from pipelines import identity, images, schemas
from pipelines.config import Config, SourceConfig
from pipelines.sources import RawChunk, Shard, SourceError, hpd, pickapic
from pipelines.tables import Built, Store

CODE_VERSION = "1"
LAYOUTS: dict[str, ModuleType] = {"pickapic": pickapic, "hpd": hpd}
_RECOGNISED_LABELS = (0.0, 0.5, 1.0)


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
    shards = [s for source in config.sources for s in LAYOUTS[source.layout].list_shards(source)]
    keys = [s.key for s in shards]
    if repeated := sorted({k for k in keys if keys.count(k) > 1}):
        raise SourceError(f"shard keys repeat: {repeated}; give the sources different names")
    return shards


def ingest_shard(store: Store, source: SourceConfig, shard: Shard) -> dict[str, Built]:
    """Ingest one shard into votes, images and prompts; return what was built, by table.

    Raises:
        SourceError: the file is unreadable or lacks a column; nothing of the shard becomes visible.
        RuntimeError: the rows do not add up (a defect of a layout's reader).
    """
    mark = identity.fingerprint(
        code_version=CODE_VERSION,
        schema_versions=[t.version for t in (schemas.VOTES, schemas.IMAGES, schemas.PROMPTS)],
        shard=LAYOUTS[source.layout].fingerprint(shard),
        source=source.name,
        layout=source.layout,
        family=source.annotator_family,
    )
    tables = (schemas.IMAGES, schemas.PROMPTS, schemas.VOTES)
    existing = {t.name: store.manifest(t.name, shard.key) for t in tables}
    if all(m is not None and m.fingerprint == mark for m in existing.values()):
        return {name: Built(m, True) for name, m in existing.items() if m is not None}

    reader = _ShardReader(source, LAYOUTS[source.layout].read_shard(source, shard))
    built = {"images": store.write(schemas.IMAGES, reader.image_frames(), partition=shard.key, made_from=mark)}
    votes = _mark_duplicates(reader.votes())
    if len(votes) != reader.rows_in:
        raise RuntimeError(f"{shard.key}: {reader.rows_in} raw votes, {len(votes)} accounted for")
    built["prompts"] = store.write(schemas.PROMPTS, reader.prompts(), partition=shard.key, made_from=mark)
    # Votes come last: a shard counts as ingested when they are committed.
    built["votes"] = store.write(
        schemas.VOTES, votes, partition=shard.key, made_from=mark, extra={"rows_in": reader.rows_in, "file": shard.file}
    )
    return {name: Built(manifest, False) for name, manifest in built.items()}


class _ShardReader:
    """Walks a shard's chunks once: yields distinct images, keeps the (small) votes and prompts."""

    def __init__(self, source: SourceConfig, chunks: Iterator[RawChunk]) -> None:
        self._source, self._chunks = source, chunks
        self._seen: set[str] = set()
        self._votes: list[pl.DataFrame] = []
        self._prompts: dict[str, str] = {}
        self.rows_in = 0

    def image_frames(self) -> Iterator[pl.DataFrame]:
        for chunk in self._chunks:
            self.rows_in += len(chunk.votes)
            rows, ids = [], {}
            for key, data, uid, problem in chunk.images.iter_rows():
                row = self._image(data, uid, problem)
                ids[key] = None if row is None else row["image_id"]
                if row is not None and row["image_id"] not in self._seen:
                    self._seen.add(row["image_id"])
                    rows.append(row)
            self._votes.append(self._normalise(chunk.votes, ids))
            yield pl.DataFrame(rows, schema=schemas.IMAGES.polars_schema)

    def _image(self, data: bytes | None, uid: str | None, problem: str | None) -> dict | None:
        if data is None and uid is None:
            return None
        header = images.read_header(data)
        if data is not None:
            key, digest = identity.image_id_of_bytes(data)
        else:
            assert uid is not None
            key, digest = identity.image_id_of_uid(self._source.annotator_family, uid), None
        return {
            "image_id": key,
            "sha256": digest,
            "bytes": data,
            "width": header.width,
            "height": header.height,
            "format": header.format,
            "source_uid": uid,
            "status": header.status,
            "reason": problem or header.reason,
        }

    def _normalise(self, votes: pl.DataFrame, image_ids: dict[str, str | None]) -> pl.DataFrame:
        source = self._source
        prompts = {p: identity.prompt_id(p) for p in votes["prompt"].drop_nulls().unique()}
        self._prompts |= {key: identity.normalise_prompt(p) for p, key in prompts.items()}
        votes = votes.with_columns(
            first=pl.col("first_key").replace_strict(image_ids, return_dtype=pl.String, default=None),
            second=pl.col("second_key").replace_strict(image_ids, return_dtype=pl.String, default=None),
            prompt_id=pl.col("prompt").replace_strict(prompts, return_dtype=pl.String, default=None),
        )
        swapped = pl.col("first") > pl.col("second")
        adds_up = (pl.col("label_first") + pl.col("label_second") - 1).abs() < 1e-9
        is_known = pl.col("label_first").is_in(_RECOGNISED_LABELS)
        found = pl.format("label {} / {}", pl.col("label_first"), pl.col("label_second"))
        cases = [
            (pl.col("prompt_id").is_null(), "no_prompt", pl.lit("the prompt is null")),
            (
                pl.col("first").is_null() | pl.col("second").is_null(),
                "no_image",
                pl.lit("neither bytes nor uid of an image"),
            ),
            (pl.col("first") == pl.col("second"), "same_image", pl.lit("both images have the same bytes")),
            (~pl.col("is_labelled"), "unlabelled", pl.lit("the source says that the row has no label")),
            (
                ~(is_known & adds_up).fill_null(False),
                "invalid_label",
                pl.concat_str(pl.lit("expected 1 / 0, 0.5 / 0.5 or 0 / 1, found "), found.fill_null("null")),
            ),
        ]
        status, reason = pl.lit("ok"), pl.lit(None, pl.String)
        for condition, name, why in reversed(cases):
            status = pl.when(condition).then(pl.lit(name)).otherwise(status)
            reason = pl.when(condition).then(why).otherwise(reason)
        votes = votes.with_columns(status=status, reason=reason, swapped=swapped.fill_null(False))
        is_ok = pl.col("status") == "ok"
        frame = votes.select(
            prompt_id="prompt_id",
            image_0_id=pl.when("swapped").then("second").otherwise("first"),
            image_1_id=pl.when("swapped").then("first").otherwise("second"),
            source=pl.lit(source.name),
            source_row="source_row",
            rater="rater",
            annotator_id=pl.lit(f"{source.annotator_family}:") + pl.col("annotator"),
            label_0=pl.when(is_ok).then(pl.when("swapped").then("label_second").otherwise("label_first")),
            count=pl.lit(1, pl.Int64),
            group_id=pl.lit(f"{source.annotator_family}:") + pl.col("group"),
            was_swapped=pl.when("is_display_order").then("swapped"),
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

    def votes(self) -> pl.DataFrame:
        return pl.concat(self._votes) if self._votes else schemas.VOTES.empty()

    def prompts(self) -> pl.DataFrame:
        rows = sorted(self._prompts.items())
        return pl.DataFrame(rows, schema=schemas.PROMPTS.polars_schema, orient="row")


def _mark_duplicates(votes: pl.DataFrame) -> pl.DataFrame:
    """Mark repeated votes of a shard: same known annotator, pair and time; else the same raw row but for its number."""
    known = pl.col("annotator_id").is_not_null() & pl.col("created_at").is_not_null()
    event = ["annotator_id", "pair_id", "created_at"]
    # Rows of a ranking without times are told apart by their group; single rows without annotator by all they say.
    raw = [
        "prompt_id",
        "image_0_id",
        "image_1_id",
        "label_0",
        "was_swapped",
        "model_0",
        "model_1",
        "annotator_id",
        "group_id",
    ]
    # A vote that does not count (no label, say) is nobody's original.
    counting = pl.col("vote_id").filter(pl.col("status") == "ok")
    first_event = counting.first().over(event)
    first_raw = counting.first().over([*raw, "created_at", "rater"])
    original = pl.when(known).then(first_event).otherwise(first_raw)
    repeated = (pl.col("status") == "ok") & (original != pl.col("vote_id"))
    return votes.with_columns(
        status=pl.when(repeated).then(pl.lit("duplicate_of")).otherwise("status"),
        reason=pl.when(repeated).then(original).otherwise("reason"),
    )
