"""How fast and how small the label steps are, from parquet to parquet: `python -m benchmarks.labels_speed [--pairs 1000000]`.

Writes a store as ingestion, the catalogue and the import of five scores leave it, of random judgements in Pick-a-Pic's
proportions: 6,000 annotators of very different diligence, about 16 votes a prompt, sessions in which the winner stays
for the next pair, 11 % ties, unlabelled and repeated rows; 2 % of the votes are rankings of nine images by ten raters.
Utilities, tastes and scores are drawn, texts and names are made up. Then, each in a process of its own:

    labels  every step of `pipelines.steps.LABEL_TABLES` in order, the label tables removed before; the median of the runs
    rows    `datasets.map` with a Python function per row, as public code has it, over a sample of the pairs: three of the
            columns (consensus by majority, SmPO's p, minority_score); extrapolated linearly to a million pairs

The three columns of both must be equal, or the benchmark fails. With --scaling also a quarter and four times the pairs.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import catalogue, identity, schemas, steps
from pipelines.config import Config, ScorerConfig, SourceConfig, small_world
from pipelines.scoring import batches
from pipelines.tables import Store, StoreError

GOAL_SECONDS, GOAL_MIB = 15.0, 2048
"""Of a million pairs."""
GENERATOR_VERSION = 1
"""Of the stores that are kept."""
VOTES_PER_SHARD, VOTES_PER_PROMPT, VOTES_PER_SESSION, ANNOTATORS = 20_000, 16, 5, 6_000
SHARE_UNLABELLED, SHARE_REPEATED, SHARE_UNKNOWN, SHARE_HELD_OUT, SHARE_RATED = 0.01, 0.005, 0.005, 0.02, 0.02
IMAGES_OF_RANKING, RATERS, RATER_POOL = 9, 10, 57
STEEPNESS, TIE_WIDTH = 0.85, 0.32
"""Of a choice: logit per unit of utility; within this width of zero nobody prefers either image."""
SCORERS = {
    "pickscore": (0.90, 21.0, 1.2),
    "hpsv2": (0.80, 0.27, 0.02),
    "imagereward": (0.55, 0.2, 1.0),
    "clip": (0.45, 0.33, 0.05),
    "aesthetic": (0.25, 5.9, 0.6),
}
"""Correlation with what all people like, mean, standard deviation."""
SHARE_WITHOUT_SCORE, SHARE_TRUNCATED = 0.001, 0.001
GENERATORS = ("dreamlike-photoreal", "openjourney", "sd-1.5", "sd-2.1", "sdxl-alpha", "sdxl-beta")
WORDS = ("a", "the", "with", "small", "red", "misty", "portrait", "castle", "robot", "forest", "light", "detailed")
SAMPLE = 20_000
TOLERANCE = 1e-9


# --- the store -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _World:
    """Votes as numbers of images, prompts and people, and what the images are; rows of `images` are numbered.

    votes: first, second (images in the order shown), annotator (null: unknown), label (of first; null: none), session,
    rater, time (null: unknown), original (row that this one repeats). images: prompt, quality, model.
    split: of every prompt, as its place in schemas.SPLITS.
    """

    votes: pl.DataFrame
    images: pl.DataFrame
    split: np.ndarray


def _singles(pairs: int, rng: np.random.Generator) -> _World:
    """Return one vote per pair: a person writes a prompt, and the image that wins meets a new one."""
    length = rng.geometric(1 / VOTES_PER_SESSION, pairs)
    length = length[: np.searchsorted(np.cumsum(length), pairs) + 1]
    length[-1] -= length.sum() - pairs
    sessions, prompts = len(length), max(1, pairs // VOTES_PER_PROMPT)
    split = np.digitize(np.arange(prompts) / prompts, [1 - 2 * SHARE_HELD_OUT, 1 - SHARE_HELD_OUT])
    prompt = rng.integers(0, prompts, sessions)
    # The releases have files by split.
    prompt = prompt[np.argsort(split[prompt], kind="stable")]
    diligence = rng.lognormal(0, 1.8, ANNOTATORS)
    annotator = rng.choice(ANNOTATORS, sessions, p=diligence / diligence.sum())
    # Everybody wrote a prompt.
    annotator[rng.permutation(sessions)[:ANNOTATORS]] = np.arange(ANNOTATORS)[:sessions]

    image_session = np.repeat(np.arange(sessions), length + 1)
    quality, other = rng.normal(size=(2, len(image_session)))
    taste = rng.normal(0, 0.7, ANNOTATORS)
    utility = quality + taste[annotator][image_session] * other
    first_image, first_vote = np.cumsum(length + 1) - length - 1, np.cumsum(length) - length
    standing, new = np.empty(pairs, np.int64), np.empty(pairs, np.int64)
    label = np.empty(pairs)
    holder = first_image.copy()
    for step in range(length.max()):
        at = np.flatnonzero(length > step)
        rows = first_vote[at] + step
        standing[rows], new[rows] = holder[at], first_image[at] + step + 1
        margin = STEEPNESS * (utility[standing[rows]] - utility[new[rows]]) + rng.logistic(size=len(at))
        label[rows] = np.where(np.abs(margin) < TIE_WIDTH, 0.5, margin > 0)
        holder[at] = np.where(label[rows] == 0, new[rows], standing[rows])
    is_second = rng.random(pairs) < 0.5
    unknown, unlabelled = (rng.random(pairs) < share for share in (SHARE_UNKNOWN, SHARE_UNLABELLED))
    session = np.repeat(np.arange(sessions), length)
    votes = pl.DataFrame(
        {
            "first": np.where(is_second, new, standing),
            "second": np.where(is_second, standing, new),
            "annotator": pl.Series(annotator[session]).set(pl.Series(unknown), None),
            "label": pl.Series(np.where(is_second, 1 - label, label)).set(pl.Series(unlabelled), None),
            "session": session,
            "rater": np.zeros(pairs, np.int32),
            "time": np.arange(pairs),
        }
    )
    models = rng.integers(0, len(GENERATORS), len(image_session))
    images = pl.DataFrame({"prompt": prompt[image_session], "quality": quality, "model": models})
    return _World(_repeated(votes, rng), images, split)


def _repeated(votes: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """Return the votes with repetitions of a few, half of them beside the original, half at the end."""
    again = rng.choice(len(votes), int(len(votes) * SHARE_REPEATED), replace=False)
    again = again[votes["label"].is_not_null().to_numpy()[again]]
    beside, apart = np.array_split(again, 2)
    rows = np.concatenate([np.sort(np.concatenate([np.arange(len(votes)), beside])), apart])
    _, place = np.unique(rows, return_index=True)
    is_repetition = place[rows] != np.arange(len(rows))
    original = pl.Series(place[rows]).set(pl.Series(~is_repetition), None)
    return votes[rows].with_columns(original=original)


def _rankings(votes: int, rng: np.random.Generator) -> _World:
    """Return about so many votes: of each prompt nine images, every two of them judged by each of ten raters."""
    a, b = np.triu_indices(IMAGES_OF_RANKING, 1)
    prompts = max(1, round(votes / (len(a) * RATERS)))
    quality = rng.normal(size=(prompts, IMAGES_OF_RANKING))
    seen = quality[:, None] + rng.logistic(0, 1 / STEEPNESS / math.sqrt(2), (prompts, RATERS, IMAGES_OF_RANKING))
    prompt, rater, pair = (x.ravel() for x in np.indices((prompts, RATERS, len(a))))
    who = rng.random((prompts, RATER_POOL)).argsort(1)[:, :RATERS]
    table = pl.DataFrame(
        {
            "first": prompt * IMAGES_OF_RANKING + a[pair],
            "second": prompt * IMAGES_OF_RANKING + b[pair],
            "annotator": who[prompt, rater],
            "label": (seen[prompt, rater, a[pair]] > seen[prompt, rater, b[pair]]).astype(float),
            "session": prompt * RATERS + rater,
            "rater": (rater * len(a) + pair).astype(np.int32),
        }
    )
    nothing = pl.lit(None, pl.Int64)
    table = table.with_columns(time=nothing, original=nothing)
    models = rng.integers(0, len(GENERATORS), quality.size)
    images = pl.DataFrame({"prompt": np.indices(quality.shape)[0].ravel(), "quality": quality.ravel(), "model": models})
    return _World(table, images, np.full(prompts, schemas.SPLITS.index("test")))


def _hexadecimal(digests: np.ndarray, digits: int) -> pl.Series:
    """Return the first digits of numbers in uint8 [N, B]."""
    binary = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(digits // 2), len(digests), [None, pa.py_buffer(np.ascontiguousarray(digests[:, : digits // 2]))]
    )
    return pl.Series(pa.array(binary).cast(pa.large_binary())).bin.encode("hex")


def _frame(table: schemas.Table, **columns: Any) -> pl.DataFrame:
    """Return rows of a table; what is not given is null."""
    rest = {c: pl.lit(None, t) for c, t in table.polars_schema.items() if c not in columns}
    return pl.select(**columns, **rest).select(list(table.polars_schema))


class _Source:
    """Writes a source's shards as ingestion does."""

    def __init__(self, name: str, world: _World, rng: np.random.Generator) -> None:
        self.name, self.world = name, world
        self._digests = np.frombuffer(rng.bytes(32 * len(world.images)), np.uint8).reshape(-1, 32)
        self._order = self._digests[:, :8].copy().view(">u8").ravel()
        self._image_ids = _hexadecimal(self._digests, identity.ID_CHARACTERS)
        words = np.array(WORDS)[rng.integers(0, len(WORDS), (len(world.split), 18))]
        texts = [f"{name} {i}: {' '.join(row)}" for i, row in enumerate(words)]
        ids = [identity.prompt_id(t) for t in texts]
        self._prompts = pl.DataFrame({"prompt_id": ids, "prompt": texts})
        self._prompt, self._model = (world.images[c].to_numpy() for c in ("prompt", "model"))
        self._is_truncated = rng.random(len(world.images)) < SHARE_TRUNCATED

    def images(self) -> pl.DataFrame:
        """Return image_id, prompt_id and quality of all images."""
        prompt_ids = self._prompts["prompt_id"].gather(self._prompt)
        return self.world.images.select("quality", image_id=self._image_ids, prompt_id=prompt_ids)

    def write(self, store: Store) -> list[str]:
        """Write all shards; return their keys."""
        keys = []
        for start in range(0, len(self.world.votes), VOTES_PER_SHARD):
            key = f"{self.name}.{start // VOTES_PER_SHARD:05d}"
            votes = self.world.votes[start : start + VOTES_PER_SHARD]
            held = np.unique(votes.select("first", "second").to_numpy())
            store.write(schemas.IMAGES, self._images_table(held), partition=key, made_from=key)
            store.write(schemas.IMAGE_NAMES, schemas.IMAGE_NAMES.empty(), partition=key, made_from=key)
            prompts = self._prompts[np.unique(self._prompt[held])]
            store.write(schemas.PROMPTS, prompts, partition=key, made_from=key)
            facts = {"rows_in": len(votes), "images_in": 2 * len(votes)}
            table = self._votes_table(votes, start, key)
            store.write(schemas.VOTES, table, partition=key, made_from=key, extra=facts)
            keys.append(key)
        return keys

    def _images_table(self, held: np.ndarray) -> pl.DataFrame:
        is_truncated = pl.Series(self._is_truncated[held])
        return _frame(
            schemas.IMAGES,
            image_id=self._image_ids.gather(held),
            sha256=_hexadecimal(self._digests[held], 64),
            width=pl.repeat(512, len(held), dtype=pl.Int32),
            height=pl.repeat(512, len(held), dtype=pl.Int32),
            format=pl.repeat("JPEG", len(held)),
            status=pl.when(is_truncated).then(pl.lit("truncated")).otherwise(pl.lit("ok")),
            reason=pl.when(is_truncated).then(pl.lit("the end marker is missing")),
        )

    def _votes_table(self, votes: pl.DataFrame, start: int, key: str) -> pl.DataFrame:
        first, second = votes["first"].to_numpy(), votes["second"].to_numpy()
        is_turned = self._order[first] > self._order[second]
        ends = [np.where(is_turned, second, first), np.where(is_turned, first, second)]
        prompt, turned = self._prompt[first], pl.Series(is_turned)
        ids = [self._prompts["prompt_id"].gather(prompt), *(self._image_ids.gather(e) for e in ends)]
        models = [pl.Series(np.array(GENERATORS)[self._model[e]]) for e in ends]
        rows = [f"{key}.parquet:{i}" for i in range(len(votes))]
        vote_ids = pl.Series([identity.vote_id(self.name, r, k) for r, k in zip(rows, votes["rater"], strict=True)])
        # Ingestion sees repetitions within a shard; the others the catalogue will find.
        original = votes["original"] - start
        original = original.set((original < 0).fill_null(False), None)
        has_label, name = votes["label"].is_not_null(), pl.lit(self.name)
        counted = pl.when(original.is_null()).then(pl.lit("ok")).otherwise(pl.lit("duplicate_of"))
        return _frame(
            schemas.VOTES,
            vote_id=vote_ids,
            pair_id=pl.Series([identity.pair_id(*r) for r in zip(*ids, strict=True)]),
            prompt_id=ids[0],
            image_0_id=ids[1],
            image_1_id=ids[2],
            source=pl.repeat(self.name, len(votes)),
            source_row=pl.Series(rows),
            rater=votes["rater"],
            annotator_id=pl.format("{}:{}", name, votes["annotator"]),
            label_0=pl.when(turned).then(1 - votes["label"]).otherwise(votes["label"]),
            count=pl.when(has_label).then(1),
            group_id=pl.format("{}:{}", name, votes["session"]),
            was_swapped=turned,
            was_listed_second=turned,
            model_0=models[0],
            model_1=models[1],
            created_at=dt.datetime(2023, 2, 1) + pl.duration(seconds=pl.lit(30 * votes["time"])),
            split=pl.Series(np.array(schemas.SPLITS)[self.world.split[prompt]]),
            status=pl.when(has_label).then(counted).otherwise(pl.lit("unlabelled")),
            reason=pl.when(has_label)
            .then(vote_ids.gather(original))
            .otherwise(pl.lit("the source says that the row has no label")),
        )


def _with_scores(images: pl.DataFrame, rng: np.random.Generator) -> Iterator[pa.Table]:
    """Yield image_id, prompt_id and a column per scorer, null where it has no score."""
    for start in range(0, len(images), 500_000):
        piece = images[start : start + 500_000]
        quality = piece["quality"].to_numpy()
        columns = {}
        for name, (correlation, mean, deviation) in SCORERS.items():
            value = correlation * quality + math.sqrt(1 - correlation**2) * rng.normal(size=len(piece))
            is_absent = pl.Series(rng.random(len(piece)) < SHARE_WITHOUT_SCORE)
            columns[name] = pl.Series((mean + deviation * value).astype(np.float32)).set(is_absent, None)
        yield piece.select("image_id", "prompt_id").with_columns(**columns).to_arrow()


def configuration(folder: Path) -> Config:
    """Return the configuration of a store in this folder: two sources, five imported scorers."""
    file = str(folder / "scores.parquet")
    return Config(
        home=str(folder),
        sources=tuple(SourceConfig(name=n, layout=n, location=str(folder)) for n in ("pickapic", "hpd")),
        scorers=tuple(ScorerConfig(name=n, kind="imported", checkpoint=file, score_column=n) for n in SCORERS),
        backbones=small_world(folder).backbones,
    )


def generate(folder: Path, pairs: int) -> None:
    """Write the store and the file of scores that it imports; the same for the same number of pairs."""
    rng = np.random.default_rng(0)
    config = configuration(folder)
    store = Store(config.store_location)
    rated = _rankings(int(pairs * SHARE_RATED), rng)
    single = _singles(pairs - len(rated.votes) // RATERS, rng)
    sources = [_Source("pickapic", single, rng), _Source("hpd", rated, rng)]
    keys = [key for source in sources for key in source.write(store)]
    catalogue.build(store, keys)
    writer = None
    for piece in _with_scores(pl.concat(source.images() for source in sources), rng):
        writer = writer or pq.ParquetWriter(folder / "scores.parquet", piece.schema, compression="zstd")
        writer.write_table(piece)
    if writer is not None:
        writer.close()
    for key in keys:
        batches.score_shard(store, key, config.scorers)
    batches.activate(store, config, keys)


# --- what is measured ------------------------------------------------------------------------------------------------

_WRITTEN_BEFORE = (
    *("votes", "images", "image_names", "prompts", "scores"),
    *(t.name for t in catalogue.TABLES),
)


def _clear_labels(store: Store) -> None:
    for table in schemas.TABLES.keys() - set(_WRITTEN_BEFORE):
        # The commits first: what they name must be there.
        store.remove(f"_manifests/{table}")
        store.remove(table)


def label(folder: Path) -> dict[str, Any]:
    """Build every label table in this process; return seconds by step, rows and bytes by table, peak memory in MiB."""
    config = configuration(folder)
    store = Store(config.store_location)
    _clear_labels(store)
    started, cpu = time.perf_counter(), time.process_time()
    labels = steps.Labels(store, config, catalogue.shard_keys(store))
    seconds = {}
    for name in steps.LABEL_TABLES:
        before = time.perf_counter()
        getattr(labels, name)()
        seconds[name] = time.perf_counter() - before
    total, cpu = time.perf_counter() - started, time.process_time() - cpu
    commits = {t: store.manifests(t) for t in schemas.TABLES}
    sizes = {t: (sum(m.rows for m in found), sum(m.bytes for m in found)) for t, found in commits.items() if found}
    return {"seconds": seconds, "total": total, "cpu": cpu, "mib": _peak_mib(), "sizes": sizes}


def _peak_mib() -> float:
    """Return this process's largest resident memory (getrusage would count the parent's before exec too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _row_function(calibration: pl.DataFrame) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function of a row that computes three columns of a pair in plain Python."""
    every = calibration.filter(pl.col("fold") == -1, pl.col("scorer").is_in(list(SCORERS)))
    rms = dict(every.select("scorer", "rms").iter_rows())
    low, high = every.filter(pl.col("scorer") == next(iter(SCORERS))).select("min", "max").row(0)
    weights = {(s, f): w for s, f, w in calibration.select("scorer", "fold", "weight").iter_rows()}

    def judge(row: dict[str, Any]) -> dict[str, Any]:
        d = {}
        for s in SCORERS:
            a, b = row[f"score_0_{s}"], row[f"score_1_{s}"]
            d[s] = None if a is None or b is None else a - b
        known = [x for x in d.values() if x is not None]
        total = sum((x > 0) - (x < 0) for x in known)
        first = next(iter(d.values()))
        human, minority = row["human_label_0"], None
        if len(known) == len(d) and human is not None and human != 0.5:
            fold = int(row["prompt_id"][:8], 16) % 5
            logit = sum(weights[s, fold] * x / rms[s] for s, x in d.items())
            minority = 1 / (1 + math.exp(logit if human > 0.5 else -logit))
        return {
            "majority": None if total == 0 else float(total > 0),
            "p_smpo": None if first is None else 1 / (1 + math.exp(-first / (high - low))),
            "minority_score": minority,
        }

    return judge


def map_rows(folder: Path) -> dict[str, Any]:
    """Compute three columns of some pairs row by row; return rows, seconds and the largest difference to the tables.

    Raises:
        SystemExit: the values are others than those of the label steps.
    """
    import datasets

    store = Store(configuration(folder).store_location)
    judge = _row_function(store.read(schemas.CALIBRATION))
    pairs = store.read(schemas.PREFERENCES).head(SAMPLE)
    scores = [f"score_{i}_{s}" for i in (0, 1) for s in SCORERS]
    with tempfile.TemporaryDirectory() as cache:
        file = str(Path(cache) / "pairs.parquet")
        pairs.select("pair_id", "prompt_id", "human_label_0", *scores).write_parquet(file)
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_parquet(file, cache_dir=cache)
        before = time.perf_counter()
        mapped = table.map(judge)
        seconds = time.perf_counter() - before
        found = pl.DataFrame(mapped.select_columns(["majority", "p_smpo", "minority_score"]).to_dict())
    majority = pl.when(pl.col("decided_by") == "majority").then("consensus_label_0").alias("majority")
    expected = pairs.select(majority, "p_smpo", "minority_score")
    for column in expected.columns:
        ours, theirs = expected[column], found[column].cast(pl.Float64)
        if not (ours.is_null() == theirs.is_null()).all() or ((ours - theirs).abs() > TOLERANCE).any():
            raise SystemExit(f"{column}: the row-wise values are others than those of the label steps")
    return {"rows": len(pairs), "seconds": seconds}


def _in_a_process(what: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.labels_speed", "--once", what, str(folder)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"`{' '.join(command)}` failed with exit status {run.returncode}; its error is above")
    return json.loads(run.stdout.splitlines()[-1])


def _generated(folder: Path, pairs: int) -> Path:
    """Return the folder of a store of so many pairs, made unless it lies there and its scores still hold."""
    place = folder / f"pairs-{pairs}-generator-{GENERATOR_VERSION}"
    config = configuration(place)
    store = Store(config.store_location)
    try:
        batches.require_active(store, config, catalogue.shard_keys(store))
    except StoreError:
        before = time.perf_counter()
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        generate(place, pairs)
        print(f"{pairs} pairs generated in {time.perf_counter() - before:.0f} s", flush=True)
    return place


def machine() -> str:
    """Return what the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{model}, {batches.cores()} cores, {memory:.0f} GiB, Python {platform.python_version()}, polars {pl.__version__} "
        f"({pl.thread_pool_size()} threads), load {psutil.getloadavg()[0]:.1f}"
    )


def measure(place: Path, pairs: int, repeats: int, is_detailed: bool) -> float:
    """Run the label steps so many times and print what they took; return the median of the seconds."""
    runs = [_in_a_process("labels", place) for _ in range(repeats)]
    totals = sorted(r["total"] for r in runs)
    total, peak = statistics.median(totals), max(r["mib"] for r in runs)
    sizes = runs[0]["sizes"]
    read = sum(b for t, (_, b) in sizes.items() if t in _WRITTEN_BEFORE)
    written = sum(b for t, (_, b) in sizes.items() if t not in _WRITTEN_BEFORE)
    if is_detailed:
        print(f"{'step':18s} {'seconds':>8s} {'rows':>10s} {'MB':>8s}")
        for name in runs[0]["seconds"]:
            rows, size = sizes.get(name, (0, 0))
            seconds = statistics.median(r["seconds"][name] for r in runs)
            print(f"{name:18s} {seconds:8.2f} {rows:10d} {size / 1e6:8.1f}")
    cpu = statistics.median(r["cpu"] for r in runs)
    print(
        f"{pairs} pairs: median {total:.1f} s ({totals[0]:.1f} to {totals[-1]:.1f}, {repeats} runs; {cpu:.1f} s of processor "
        f"time), {1e6 * total / pairs:.1f} s per million pairs, peak memory {peak:.0f} MiB, {read / 1e6:.0f} MB of parquet "
        f"in, {written / 1e6:.0f} MB out, {(read + written) / total / 1e9:.3f} GB/s",
        flush=True,
    )
    if pairs == 1_000_000:
        print(f"goal of a million pairs: {GOAL_SECONDS:.0f} s, {GOAL_MIB} MiB")
    return total


def main(
    pairs: int = 1_000_000, *, repeats: int = 3, is_scaling_measured: bool = False, folder: Path | None = None
) -> None:
    """Generate, measure, print. folder: where the stores are kept for the next time; None: nowhere."""
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        kept = (folder or Path(temporary)).resolve()
        sizes = [pairs // 4, pairs, 4 * pairs] if is_scaling_measured else [pairs]
        seconds = {}
        for size in sizes:
            place = _generated(kept, size)
            seconds[size] = measure(place, size, repeats, is_detailed=size == pairs)
            if size == pairs:
                rows = _in_a_process("rows", place)
                per_million = 1e6 * rows["seconds"] / rows["rows"]
                ours = 1e6 * seconds[size] / size
                print(
                    f"datasets.map, one process, three columns: {rows['seconds']:.2f} s for {rows['rows']} pairs, "
                    f"extrapolated {per_million:.0f} s per million, {per_million / ours:.1f} times what all label tables "
                    f"take; same values"
                )
        for size in sizes[1:]:
            ratio = (seconds[size] / size) / (seconds[sizes[0]] / sizes[0])
            print(f"seconds per pair, {size} against {sizes[0]} pairs: {ratio:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scaling", action="store_true", help="also a quarter and four times the pairs")
    parser.add_argument("--folder", type=Path, help="keep the generated stores here (default: a temporary folder)")
    parser.add_argument("--once", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        measured = {"labels": label, "rows": map_rows}[options.once[0]](Path(options.once[1]))
        print(json.dumps(measured))
    else:
        main(options.pairs, repeats=options.repeats, is_scaling_measured=options.scaling, folder=options.folder)
