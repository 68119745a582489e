"""Export in Pick-a-Pic's own layout, so that a DPO script written for Pick-a-Pic trains on curated labels unchanged.

    <folder>/data/<split>-00000.parquet     the policy's pairs with their images, columns of raw.PICKAPIC_SCHEMA
    <folder>/labels.parquet                 every pair of the splits: its label and its place, or why it has none
    <folder>/README.md                      the label card; its YAML header names the data files
    <folder>/export.json                    what was exported; marks the folder as ours

A pair's images mostly lie in one shard together, and rows are written shard by shard: a shard's images are read once, wait in
a pool, and are forgotten. Only images whose partner lies elsewhere (votes that know them by name) wait until the last shard.

Belongs here: files. Does not belong here: who wins (`curation`), what the card says (`label_card`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import schemas
from pipelines.config import ConfigError
from pipelines.curation import Policy, spelled
from pipelines.label_card import reason_kind
from pipelines.stored import StoredImage, read_images
from pipelines.tables import Store, StoreError
from pipelines.world.raw import PICKAPIC_SCHEMA

MARK = "export.json"
POOL_BYTES = 256_000_000
"""Images that wait in memory; more wait in a file."""
GROUP_BYTES = 32_000_000
"""Images of a row group of the written files; a reader holds one at a time."""
GROUP_ROWS = 100
_BATCH = 32
_IMAGES = ("jpg_0", "jpg_1")

NOTES = """\
The files have the columns of Pick-a-Pic v2. Each row is a pair to which the policy gives a target; its images are the bytes
of the source, unchanged, whatever their format. `image_0` is the first in id order, not the one displayed first.

| column | here |
|---|---|
| `label_0`, `label_1` | the policy's label: 1 and 0, or 0 and 1; there are no ties |
| `caption` | the prompt in Unicode NFC without surrounding white space |
| `image_0_uid`, `image_1_uid`, `best_image_uid` | ids of the store |
| `num_example_per_prompt` | pairs of the prompt to which the policy gives a target |
| `__index_level_0__` | row of `labels.parquet`, from 0 |
| `user_id`, `ranking_id`, `created_at`, `image_0_url`, `image_1_url` | null: the label is no one person's vote |

`labels.parquet` has every pair of the splits: `target_label_0` and `target_probability` (that the target's side is
preferred), and the `file` and `row` (from 0) where the pair is, or `excluded_because`. Rows come shard by shard: shuffle.

Diffusion-DPO's script filters ties only where "pickapic" is in the dataset's name (there are none here), its `--sft` mode
needs that name, and `--dreamlike_pairs_only` needs pairs whose generators are known."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote. Every pair of the splits is in `rows` or in `excluded`.

    rows: split -> pairs written. excluded: kind of reason -> pairs. lost: of those, pairs with a target whose images could
    not be read. bytes: of all files but export.json. seconds: wall clock.
    """

    folder: Path
    policy: str
    rows: dict[str, int]
    files: int
    excluded: dict[str, int]
    lost: int
    bytes: int
    seconds: float

    def text(self) -> str:
        """Return what a command line prints."""
        rows, left_out = sum(self.rows.values()), sum(self.excluded.values())
        lines = [
            f"{self.folder}: policy {self.policy}, {rows:,} of {rows + left_out:,} pairs ("
            + ", ".join(f"{n:,} {split}" for split, n in self.rows.items())
            + f") in {self.files} files, {self.bytes / 1e6:,.1f} MB, {self.seconds:.1f} s"
        ]
        lines += [f"  not exported, {n:,}: {why}" for why, n in self.excluded.items()]
        if self.lost:
            lines.append(f"  {self.lost:,} of these have a label, but an image could not be read: see labels.parquet")
        return "\n".join(lines)


def export(
    store: Store,
    policy: Policy,
    folder: Path,
    *,
    shard_keys: Sequence[str],
    splits: Sequence[str] = schemas.SPLITS,
    rows_per_file: int = 1000,
    card: str = "",
    progress: Callable[[str], None] = lambda message: None,
) -> Exported:
    """Write the pairs to which a policy gives a target, with their images; see the module for the layout.

    The folder appears, or takes the place of an earlier export, when everything is written.

    Args:
        folder: a folder of this machine; beside it lies `.<name>.exporting` meanwhile.
        shard_keys: `catalogue.shard_keys`: the shards that hold the images.
        card: Markdown for README.md: `label_card.card`.

    Raises:
        ConfigError: a split is unknown, or rows_per_file below 1.
        FileExistsError: the folder holds something that is not an export.
        tables.StoreError: preferences or images are missing or old, or there is nothing to export.
        sources.SourceError: a file of a source is there but cannot be read now.
    """
    started = time.monotonic()
    if not splits or set(splits) - set(schemas.SPLITS):
        raise ConfigError(f"export: splits: expected some of {list(schemas.SPLITS)}, found {list(splits)}")
    if rows_per_file < 1:
        raise ConfigError(f"export: rows_per_file: expected 1 or more, found {rows_per_file}")
    folder = folder.resolve()
    staging, replaced = (folder.with_name(f".{folder.name}.{end}") for end in ("exporting", "replaced"))
    if replaced.exists() and not folder.exists():
        # An export was killed between the two renames of its end.
        replaced.rename(folder)
    _require_ours(folder)
    commit = store.require_current(schemas.PREFERENCES.name)
    decided = _decided(store, policy, splits)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        (staging / "data").mkdir(parents=True)
        files = {s: _Files(staging / "data", s, rows_per_file) for s in schemas.SPLITS if s in splits}
        labels = _write(store, decided, files, shard_keys, staging, progress)
        why = labels.filter(pl.col("file").is_null()).select(why=reason_kind("excluded_because"))
        counts = why.group_by("why").len().sort("len", "why", descending=[True, False])
        result = Exported(
            folder=folder,
            policy=spelled(policy),
            rows={split: f.rows for split, f in files.items()},
            files=sum(len(f.names) for f in files.values()),
            excluded=dict(counts.iter_rows()),
            lost=labels.filter(pl.col("file").is_null() & pl.col("target_label_0").is_not_null()).height,
            bytes=0,
            seconds=0.0,
        )
        if not result.files:
            found = "; ".join(f"{n} pairs: {reason}" for reason, n in result.excluded.items()) or "there are no pairs"
            raise StoreError(f"export: policy {result.policy} leaves nothing to export in {list(splits)}: {found}")
        labels.write_parquet(staging / "labels.parquet")
        (staging / "README.md").write_text(_readme(result, card))
        size = sum(f.stat().st_size for f in staging.rglob("*") if f.is_file())
        result = replace(result, bytes=size, seconds=round(time.monotonic() - started, 3))
        facts = {**asdict(result), "folder": folder.name, "preferences": commit.content}
        (staging / MARK).write_text(json.dumps(facts, indent=1))
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        staging.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def _require_ours(folder: Path) -> None:
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists but has no {MARK}, so it is no export; name another folder")


# --- what is exported --------------------------------------------------------------------------------------------------


def _decided(store: Store, policy: Policy, splits: Sequence[str]) -> pl.DataFrame:
    """Return every pair of the splits with the policy's decision and what its row will say, in the order of preferences."""
    return (
        policy.apply(store.scan(schemas.PREFERENCES).filter(pl.col("split").is_in(list(splits))))
        .select(
            *("pair_id", "prompt_id", "image_0_id", "image_1_id", "split"),
            *("target_label_0", "target_probability", "excluded_because"),
            # Few texts for many pairs.
            pl.col("prompt", "model_0", "model_1").cast(pl.Categorical),
        )
        .collect()
    )


def _placed(store: Store, decided: pl.DataFrame, shard_keys: Sequence[str]) -> pl.DataFrame:
    """Return the pairs with a target and where their images are: `home`, the first shard that has both, null: none has.

    at: row of `decided`. place_0, place_1: where home is null, the shards to read the images from; null: none knows it.
    """
    pairs = decided.with_row_index("at").filter(pl.col("target_label_0").is_not_null())
    pairs = pairs.with_columns(num_example_per_prompt=pl.len().over("prompt_id").cast(pl.Int64))
    held = store.scan_shards(schemas.IMAGES, shard_keys)
    held = held.select("image_id", "place", is_bad=pl.col("status") != "ok")
    best = held.sort("is_bad", "place").group_by("image_id").agg(pl.col("place").first())
    images = held.filter(~pl.col("is_bad")).select("image_id", "place")
    homes = (
        pairs.lazy()
        .select("at", "image_0_id", "image_1_id")
        .join(images, left_on="image_0_id", right_on="image_id")
        .join(images, left_on=["image_1_id", "place"], right_on=["image_id", "place"])
        .group_by("at")
        .agg(home=pl.col("place").min())
    )
    frame = pairs.lazy().join(homes, on="at", how="left")
    for i in (0, 1):
        frame = frame.join(best.rename({"image_id": f"image_{i}_id", "place": f"place_{i}"}), f"image_{i}_id", "left")
    return frame.sort("at").collect()


# --- how it is written -------------------------------------------------------------------------------------------------


class _Pool:
    """Images that wait for their rows: in memory, from POOL_BYTES on in a nameless file of a folder."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.SpooledTemporaryFile(POOL_BYTES, dir=str(folder))  # noqa: SIM115
        self._places: dict[str, tuple[int, int]] = {}
        self._problems: dict[str, str] = {}
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, image: StoredImage) -> None:
        """Keep an image's bytes, or why there are none."""
        if image.data is None:
            self._problems[image.image_id] = f"{image.status}: {image.reason or '-'}"
            return
        self._file.seek(self._end)
        self._file.write(image.data)
        self._places[image.image_id] = (self._end, len(image.data))
        self._end += len(image.data)

    def problem(self, image_id: str) -> str | None:
        """Return why an image has no bytes; None where it has."""
        return None if image_id in self._places else self._problems.get(image_id, "no_bytes: no shard holds it")

    def read(self, image_id: str) -> bytes:
        """Return an image's bytes."""
        start, length = self._places[image_id]
        self._file.seek(start)
        return self._file.read(length)


class _Files:
    """The files of a split, each of `rows_per_file` rows."""

    def __init__(self, folder: Path, split: str, rows_per_file: int) -> None:
        self.rows, self.names = 0, list[str]()
        self._folder, self._split, self._rows_per_file = folder, split, rows_per_file
        self._group: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> tuple[str, int]:
        """Take a row; return the name of its file and its row there."""
        at = self.rows % self._rows_per_file
        if at == 0:
            self.close()
            self.names.append(f"{self._split}-{len(self.names):05d}.parquet")
            # Encoded images are all different and compressed already; beside them nothing weighs.
            repeated = [n for n in PICKAPIC_SCHEMA.names if n not in _IMAGES]
            path = self._folder / self.names[-1]
            self._writer = pq.ParquetWriter(path, PICKAPIC_SCHEMA, compression="none", use_dictionary=repeated)
        self._group.append(row)
        self.rows += 1
        if len(self._group) == GROUP_ROWS or sum(len(r[c]) for r in self._group for c in _IMAGES) >= GROUP_BYTES:
            self._flush()
        return self.names[-1], at

    def _flush(self) -> None:
        if self._writer is not None and self._group:
            self._writer.write_table(pa.Table.from_pylist(self._group, schema=PICKAPIC_SCHEMA))
        self._group = []

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        if self._writer is not None:
            self._writer.close()


def _write(
    store: Store,
    decided: pl.DataFrame,
    files: dict[str, _Files],
    shard_keys: Sequence[str],
    staging: Path,
    progress: Callable[[str], None],
) -> pl.DataFrame:
    """Write the data files; return the labels: every pair with its file and row, or why it has none."""
    pairs = _placed(store, decided, shard_keys)
    places: list[tuple[str | None, int | None, str | None]] = [(None, None, None)] * len(decided)

    def write(rows: pl.DataFrame, pool: _Pool) -> None:
        for r in rows.iter_rows(named=True):
            problems = [(i, pool.problem(r[f"image_{i}_id"])) for i in (0, 1)]
            if why := [f"image_{i} {problem}" for i, problem in problems if problem]:
                places[r["at"]] = (None, None, why[0])
            else:
                name, row = files[r["split"]].add(_row(r, pool))
                places[r["at"]] = (f"data/{name}", row, None)

    apart = pairs.filter(pl.col("home").is_null())
    with _Pool(staging) as waiting:
        for place, key in enumerate(shard_keys):
            own = pairs.filter(pl.col("home") == place)
            wanted = _ids(own[f"image_{i}_id"] for i in (0, 1))
            later = _ids(apart.filter(pl.col(f"place_{i}") == place)[f"image_{i}_id"] for i in (0, 1))
            with _Pool(staging) as here:
                for batch in read_images(store, key, wanted | later, _BATCH) if wanted | later else ():
                    for image in batch:
                        for pool, ids in ((here, wanted), (waiting, later)):
                            if image.image_id in ids:
                                pool.add(image)
                write(own, here)
            progress(f"{place + 1}/{len(shard_keys)} shards, {sum(f.rows for f in files.values()):,} pairs written")
        write(apart, waiting)
    for f in files.values():
        f.close()
    found = pl.DataFrame(places, {"file": pl.String, "row": pl.Int64, "why": pl.String}, orient="row")
    labels = decided.drop("prompt", "model_0", "model_1").hstack(found)
    return labels.with_columns(excluded_because=pl.coalesce("excluded_because", "why")).drop("why")


def _ids(columns: Iterable[pl.Series]) -> set[str]:
    return {i for column in columns for i in column}


def _row(r: dict[str, Any], pool: _Pool) -> dict[str, Any]:
    """Return a row of the layout; columns that are not named are null."""
    return {
        "are_different": True,
        "best_image_uid": r["image_0_id"] if r["target_label_0"] == 1 else r["image_1_id"],
        "caption": r["prompt"],
        "has_label": True,
        **{f"image_{i}_uid": r[f"image_{i}_id"] for i in (0, 1)},
        **{f"jpg_{i}": pool.read(r[f"image_{i}_id"]) for i in (0, 1)},
        "label_0": r["target_label_0"],
        "label_1": 1 - r["target_label_0"],
        **{c: r[c] for c in ("model_0", "model_1", "num_example_per_prompt")},
        "__index_level_0__": r["at"],
    }


def _readme(result: Exported, card: str) -> str:
    header = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in (s for s, n in result.rows.items() if n):
        header += [f"  - split: {split}", f"    path: data/{split}-*.parquet"]
    counts = {**result.rows, **{f"not exported: {why}": n for why, n in result.excluded.items()}}
    table = ["| split | pairs |", "|---|--:|", *(f"| {k.replace('|', '&#124;')} | {n:,} |" for k, n in counts.items())]
    title = f"# Preference pairs: policy `{result.policy}`"
    return "\n\n".join(["\n".join([*header, "---"]), title, "\n".join(table), NOTES, card]).rstrip() + "\n"
