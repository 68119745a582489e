"""What scoring would do, without doing it: pairs and images left, expected hours, gigabytes.

    hours = max(sum over scorers of pairs left / pairs per second of that scorer,
                images left * seconds to decode and resize one / threads) / workers

Both go on at the same time. Speeds are those of the last scored shards, under any revision, else measured on a few images
that are left.
Belongs here: reading manifests and the catalogue. Does not belong here: scoring a shard (`batches`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from pipelines import images, schemas, stored
from pipelines.config import ScorerConfig
from pipelines.files import Folder
from pipelines.scoring import batches, checkpoints
from pipelines.tables import Manifest, Store

SAMPLE = 64
_LAST = 20
"""Shards of which a scorer's speed is the mean."""


@dataclass(frozen=True)
class Left:
    """What one scorer has left: pairs (image, prompt), the speed it will have and where that was measured."""

    scorer: str
    revision: str
    pairs: int
    left: int
    shards_left: int
    pairs_per_second: float | None
    measured_on: str
    bytes_per_pair: float

    @property
    def hours(self) -> float | None:
        """Return the hours that this model alone works, on one device."""
        if self.left == 0:
            return 0.0
        return self.left / self.pairs_per_second / 3600 if self.pairs_per_second else None


@dataclass(frozen=True)
class Forecast:
    """What is left of all scorers; images_left and read_bytes count an image once for all of them."""

    scorers: tuple[Left, ...]
    images_left: int
    prompts_left: int
    read_bytes: int
    preparing_hours: float | None

    def hours(self, workers: int = 1) -> float | None:
        """Return the hours that all of it takes, None where a speed is not known."""
        each = [s.hours for s in self.scorers]
        if None in each or self.preparing_hours is None:
            return None
        return max(sum(h for h in each if h is not None), self.preparing_hours) / workers

    def text(self, workers: int = 1) -> str:
        """Return the table that a person reads before starting."""
        lines = [
            f"{'scorer':<16}{'revision':<14}{'pairs':>12}{'left':>12}{'shards':>8}{'pairs/s':>10}{'hours':>8}  measured on"
        ]
        for s in self.scorers:
            speed = "" if s.pairs_per_second is None else f"{s.pairs_per_second:.1f}"
            alone = "?" if s.hours is None else f"{s.hours:.2f}"
            counts = f"{s.pairs:>12,}{s.left:>12,}{s.shards_left:>8,}"
            lines.append(f"{s.scorer:<16}{s.revision:<14}{counts}{speed:>10}{alone:>8}  {s.measured_on}")
        hours = self.hours(workers)
        known = "an unknown time" if hours is None else f"about {hours:.2f} hours"
        preparing = "" if self.preparing_hours is None else f"; decoding alone {self.preparing_hours / workers:.2f}"
        written = sum(s.left * s.bytes_per_pair for s in self.scorers)
        lines += [
            f"{self.images_left:,} images to decode, {self.prompts_left:,} distinct prompts",
            f"{known} with {workers} worker{'s' * (workers > 1)}{preparing}",
            f"{self.read_bytes / 1e9:.2f} GB to read, about {written / 1e9:.3f} GB to write",
        ]
        return "\n".join(lines)


def forecast(
    store: Store,
    shard_keys: Sequence[str],
    scorers: Sequence[ScorerConfig],
    *,
    device: str = "cpu",
    threads: int = 1,
    measure: bool = True,
    progress: batches.Progress = lambda message: None,
) -> Forecast:
    """Say what scoring these shards would take.

    Args:
        threads: that decode, of one worker.
        measure: load models whose speed is not known and score a few images with each; nothing of it is kept.

    Raises:
        tables.StoreError: a shard is not ingested or there is no catalogue.
    """
    owned = {k: part for (k,), part in batches.owned_pairs(store, shard_keys).collect().group_by("owner")}
    contents = {m.partition: m.content for m in store.require_all("images", shard_keys)}
    nothing = pl.DataFrame(schema={"image_id": pl.String, "prompt_id": pl.String, "prompt": pl.String})
    due: dict[str, list[str]] = {}
    left_pairs: dict[str, list[pl.DataFrame]] = {k: [] for k in shard_keys}
    found: list[Left] = []
    prepared = _Preparing()
    for scorer in scorers:
        revision = checkpoints.revision(scorer)
        due[scorer.name] = []
        left = 0
        for key in shard_keys:
            pairs = owned.get(key, nothing).sort("image_id", "prompt_id")
            unfinished = batches.unfinished(store, scorer, key, pairs, contents[key])
            if unfinished is not None:
                due[scorer.name].append(key)
                left += len(unfinished)
                left_pairs[key].append(unfinished)
        commits = [m for m in store.manifests("scores", f"{scorer.name}/") if m.rows]
        speed, where = _known_speed(commits)
        prepared.know(commits)
        if speed is None and left and measure and scorer.kind != "imported":
            first = next(k for k in due[scorer.name] if len(owned.get(k, nothing)))
            speed, n = _measured_speed(store, scorer, first, owned[first], device, prepared, progress)
            where = f"{n} pairs just now, on {device}"
        size = sum(m.bytes for m in commits) / rows if (rows := sum(m.rows for m in commits)) else 60.0
        total = sum(map(len, owned.values()))
        found.append(Left(scorer.name, revision, total, left, len(due[scorer.name]), speed, where, size))
    images_left = read = 0
    seen: set[str] = set()
    for key, parts in left_pairs.items():
        if parts:
            wanted = pl.concat(p.select("image_id", "prompt_id") for p in parts).unique()
            images_left += wanted["image_id"].n_unique()
            seen.update(wanted["prompt_id"])
            read += _bytes_of(store, key, wanted["image_id"])
    each = prepared.seconds_per_image()
    preparing = 0.0 if images_left == 0 else None if each is None else images_left * each / threads / 3600
    return Forecast(tuple(found), images_left, len(seen), read, preparing)


class _Preparing:
    """Seconds that one thread decodes and resizes an image: as the last shards took, else as measured."""

    def __init__(self) -> None:
        self._known: list[Manifest] = []
        self._measured: list[float] = []

    def know(self, commits: list[Manifest]) -> None:
        """Add what was scored earlier."""
        self._known += [m for m in commits if m.extra.get("images_prepared") and m.extra.get("preparing_seconds")]

    def measure(self, seconds_per_image: float) -> None:
        """Add one scorer's own: decoding, and its resize."""
        self._measured.append(seconds_per_image)

    def seconds_per_image(self) -> float | None:
        """Return the seconds, None where nothing is known."""
        last = sorted(self._known, key=lambda m: m.written_at)[-_LAST:]
        if last:
            seconds, count = (sum(m.extra[k] for m in last) for k in ("preparing_seconds", "images_prepared"))
            return seconds / count
        return max(self._measured, default=None)


def _known_speed(commits: list[Manifest]) -> tuple[float | None, str]:
    timed = [m for m in commits if m.extra.get("pairs_scored") and m.extra.get("model_seconds")]
    last = sorted(timed, key=lambda m: m.written_at)[-_LAST:]
    if not last:
        return None, "not known: nothing is scored yet"
    pairs, seconds = (sum(m.extra[k] for m in last) for k in ("pairs_scored", "model_seconds"))
    return pairs / seconds, f"the last {len(last)} shards scored"


def _measured_speed(
    store: Store,
    scorer: ScorerConfig,
    key: str,
    pairs: pl.DataFrame,
    device: str,
    preparing: _Preparing,
    progress: batches.Progress,
) -> tuple[float | None, int]:
    from pipelines.scoring.pictures import Picture

    progress(f"measuring {scorer.name} on {device}")
    model = batches.load(scorer, device)
    wanted = dict(pairs.select("image_id", "prompt").unique("image_id", maintain_order=True).head(SAMPLE).iter_rows())
    prepared, prompts = [], []
    began = time.perf_counter()
    for rows in stored.read_images(store, key, wanted.keys(), SAMPLE):
        for row in rows:
            try:
                if row.data is not None:
                    prepared.append(model.prepare(Picture(images.decode(row.data), row.data)))
                    prompts.append(wanted[row.image_id])
            except images.UndecodableImage:
                continue
    if not prepared:
        return None, 0
    preparing.measure((time.perf_counter() - began) / len(prepared))
    # The first call of a model allocates and compiles.
    model.score(prepared[:1], prompts[:1])
    start = time.perf_counter()
    model.score(prepared, prompts)
    return len(prepared) / (time.perf_counter() - start), len(prepared)


def _bytes_of(store: Store, key: str, wanted: pl.Series) -> int:
    """Return the encoded bytes of these images of a shard.

    Where the store only knows the file that holds an image, its share of the file: all images of one parquet file, or a
    file of its own, of which the first few stand for all.
    """
    held = (
        store.scan(schemas.IMAGES, partitions=[key])
        .select(
            "uri",
            is_wanted=pl.col("image_id").is_in(wanted.implode()),
            size=pl.coalesce(pl.col("bytes").bin.size(), pl.col("byte_length")).cast(pl.Int64),
        )
        .collect()
    )
    total = int(held.filter("is_wanted")["size"].sum())
    files = held.filter(pl.col("size").is_null(), pl.col("uri").is_not_null())
    files = files.group_by("uri").agg(share=pl.col("is_wanted").mean()).filter(pl.col("share") > 0).sort("uri")
    sizes = []
    for uri, share in files.head(SAMPLE).iter_rows():
        stat = Folder(uri).stat("")
        sizes.append(share * stat.size if stat is not None else 0.0)
    return total + (round(sum(sizes) / len(sizes) * len(files)) if sizes else 0)
