"""How well the labels find votes against what most people want, on small worlds whose truth is known.

    python -m benchmarks.labels_truth [--seeds 401 402 403 404 405] [--home FOLDER]

Two settings, never mixed. The worlds' other parameters are the defaults; their seeds are no other world's and no reward
model's.

    flips   one taste, slips; every decided single vote (Pick-a-Pic layout, HPDv2 train) turned round with probability 0.2
            in the raw files; the ten-rater votes and the scorers are clean
    taste   a quarter of the people have the opposite taste, slips; nothing is turned round

A vote is positive if it is against the sign of the population's mean utility. Every method is an AUC for finding such votes:
apart for the votes that are their pair's only one, and for those of the ten-rater rankings. Two bounds, which know the truth,
are cross-fitted by prompt in the same five folds: a logistic on the inputs of minority_probability, and one on everything
that the scorers say. A bound is itself fitted on few votes, so that a method may come out above it by chance.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from pipelines import catalogue, ingest, schemas, steps
from pipelines.config import Config, LabelsConfig, small_world
from pipelines.labels import margins as mar
from pipelines.scoring import batches, workers
from pipelines.tables import Store
from pipelines.world import raw

SEEDS = (401, 402, 403, 404, 405)
GOAL_OF_BOUND, GOAL_ECE = 0.95, 0.05
EVEN = 0.001
"""A difference of AUCs that is said to be none worth having; a goal that misses by less is missed all the same."""
BINS = 10
SINGLE, RANKED = "single votes", "ten raters"


@dataclass(frozen=True)
class Setting:
    """A world with known truth: share of the opposite taste, and how many single votes are turned round."""

    name: str
    minority_share: float
    flip_rate: float


SETTINGS = (Setting("flips", 0.0, 0.2), Setting("taste", 0.25, 0.0))
METHODS = {
    "minority_probability": "minority_probability",
    "minority_score": "minority_score (1 - p)",
    "confidence": "c, confidence",
    "stability": "v, stability",
    "metric": "u = c v, Adaptive-DPO's metric",
    "mean_z": "mean of the scorers' z against the vote",
    "consensus": "against the scorers' majority",
    "scorers_against": "scorers against the vote, counted",
    "not_unanimous": "some scorer against the vote",
    "em_probability": "em_probability (told the others' votes)",
    "share_against": "share of the other raters against",
}
"""Column of `judged` -> what it is; a larger number says more likely against the others."""


# --- numbers ---------------------------------------------------------------------------------------------------------


def auc(is_positive: np.ndarray, score: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return the probability that a positive's score is above a negative's, ties half; NaN without one of the two.

    is_positive, score, weight (1 if absent): [N].
    """
    weight = np.ones(len(score)) if weight is None else weight
    _, level = np.unique(score, return_inverse=True)
    positive, negative = (np.bincount(level, weight * side) for side in (is_positive, ~is_positive))
    below = np.cumsum(negative) - negative / 2
    total = positive.sum() * negative.sum()
    return float(positive @ below / total) if total > 0 else float("nan")


def auc_within(folds: np.ndarray, is_positive: np.ndarray, score: np.ndarray) -> float:
    """Return the mean AUC of the folds, each by itself, weighted with its votes.

    A cross-fitted intercept is low exactly where a fold holds many positives; comparing votes of different folds by it makes
    a good method look worse than it is where prompts are few.
    """
    parts = [(folds == f) for f in np.unique(folds)]
    return float(np.average([auc(is_positive[p], score[p]) for p in parts], weights=[p.sum() for p in parts]))


def calibration_error(probability: np.ndarray, is_positive: np.ndarray, people: np.ndarray) -> float:
    """Return sum_b n_b / n |mean probability - share of positives| over ten equal bins of [0, 1], n counting people."""
    level = np.minimum((probability * BINS).astype(int), BINS - 1)
    gap = np.bincount(level, people * (probability - is_positive))
    return float(np.abs(gap).sum() / people.sum())


def cross_fitted(x: np.ndarray, is_positive: np.ndarray, folds: np.ndarray, ridge: float = 1e-4) -> np.ndarray:
    """Return logits of a logistic regression with intercept, each fitted without the rows of its own fold, [N].

    x: [N, K], standardised here. The fit is this file's own, so that an error of the pipeline's would show.
    """
    scaled = np.column_stack([(x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1), np.ones(len(x))])
    penalty = np.append(np.full(x.shape[1], ridge), 0.0)
    logits = np.zeros(len(x))
    for f in np.unique(folds):
        here, y = scaled[folds != f], is_positive[folds != f]
        w = np.zeros(len(penalty))
        for _ in range(50):
            p = 1 / (1 + np.exp(-here @ w))
            hessian = (here * (p * (1 - p))[:, None]).T @ here / len(here) + np.diag(penalty + 1e-12)
            step = np.linalg.solve(hessian, here.T @ (p - y) / len(here) + penalty * w)
            w = w - step
            if np.abs(step).max() < 1e-8:
                break
        logits[folds == f] = scaled[folds == f] @ w
    return logits


# --- worlds ----------------------------------------------------------------------------------------------------------


def flip_single_votes(world: Path, rate: float, seed: int) -> int:
    """Turn decided single votes of a world's raw files round, each with this probability; return how many were.

    Pick-a-Pic's rows and HPDv2's train records change, images and the ten-rater file do not. `truth/votes.parquet` then says
    whether a vote as recorded now is against the mean, and has a column is_flipped.
    """
    rng = np.random.default_rng([seed, round(rate * 1000)])
    turned: list[tuple[str, str]] = []
    for file in sorted((world / "pickapic" / "data").glob("*.parquet")):
        table = pq.read_table(file)
        rows = pl.from_arrow(table.select(["label_0", "label_1", "best_image_uid", "image_0_uid", "image_1_uid"]))
        assert isinstance(rows, pl.DataFrame)
        is_decided = (rows["label_0"].is_not_null() & (rows["label_0"] != 0.5)).fill_null(False)
        flip = pl.Series((rng.random(len(rows)) < rate) & is_decided.to_numpy())
        other = pl.when(pl.col("label_0") == 1).then("image_1_uid").otherwise("image_0_uid")
        rows = rows.with_columns(
            label_0=pl.when(flip).then(1 - pl.col("label_0")).otherwise("label_0"),
            label_1=pl.when(flip).then(1 - pl.col("label_1")).otherwise("label_1"),
            best_image_uid=pl.when(flip).then(other).otherwise("best_image_uid"),
        )
        for name in ("label_0", "label_1", "best_image_uid"):
            at = table.schema.get_field_index(name)
            column = rows[name].to_arrow(compat_level=pl.CompatLevel.oldest()).cast(table.schema.field(name).type)
            table = table.set_column(at, table.schema.field(name), pa.chunked_array([column]))
        pq.write_table(table, file, row_group_size=100)
        turned += [("pickapic", f"data/{file.name}:{i}") for i in flip.arg_true()]
    records = json.loads((world / "hpdv2" / "train.json").read_text())
    for i in np.flatnonzero(rng.random(len(records)) < rate):
        records[i]["human_preference"].reverse()
        turned.append(("hpd", f"train.json:{i}"))
    (world / "hpdv2" / "train.json").write_text(json.dumps(records))
    path = world / "truth" / "votes.parquet"
    flips = pl.DataFrame(turned, schema={"source": pl.String, "source_row": pl.String}, orient="row")
    truth = pl.read_parquet(path).drop("is_flipped", strict=False)
    truth = truth.join(flips.with_columns(is_flipped=True), on=["source", "source_row"], how="left")
    truth = truth.with_columns(pl.col("is_flipped").fill_null(False))
    truth.with_columns(is_against_mean=pl.col("is_against_mean") ^ pl.col("is_flipped")).write_parquet(path)
    return len(turned)


def write_labels(config: Config) -> tuple[Store, list[str]]:
    """Ingest, catalogue, score and label a configuration's sources as the command line does; return store and shards."""
    store = Store(config.store_location)
    shards = ingest.list_shards(config)
    plans = ingest.plans(config, shards)
    for shard in shards:
        ingest.ingest_shard(store, plans[shard.source], shard)
    keys = [s.key for s in shards]
    catalogue.build(store, keys, config.splits)
    for _, result in workers.score_shards(store, config, keys, list(config.scorers), device="cpu"):
        if isinstance(result, Exception):
            raise result
    batches.activate_finished(store, config, keys, list(config.scorers))
    labels = steps.Labels(store, config, keys)
    for name in steps.LABEL_TABLES:
        getattr(labels, name)()
    return store, keys


def judged(store: Store, keys: Sequence[str], scorers: Sequence[str]) -> tuple[pl.DataFrame, np.ndarray]:
    """Return the decided votes with the columns of METHODS and of the minority table, and their scorers' z [N, K].

    z is signed: positive where a scorer gives more to the image that the vote is for.
    """
    margins, consensus = store.read(schemas.MARGINS), store.read(schemas.CONSENSUS)
    votes = catalogue.counted_votes(store, list(keys)).select("vote_id", "prompt_id", "source", "source_row", "rater")
    frame = store.read(schemas.MINORITY).join(votes.collect(), on="vote_id", how="left", validate="1:1").sort("vote_id")
    row = mar.rows_of(margins, frame["pair_id"])
    sign = 2 * frame["label_0"].to_numpy() - 1
    d = mar.matrix(margins, scorers)
    z = (d / mar.rms(d))[row] * sign[:, None]
    # A tie policy may ask the humans themselves, and their vote is what is judged here.
    by_majority = pl.when(pl.col("decided_by") == "majority").then("consensus_label_0")
    side = consensus.select(by_majority.fill_null(0.5)).to_series().to_numpy()[row]
    against = (z < 0) + 0.5 * (z == 0)
    frame = frame.with_columns(
        mean_z=pl.Series(-z.mean(1)),
        consensus=pl.Series(np.abs(frame["label_0"].to_numpy() - side)),
        scorers_against=pl.Series(against.sum(1)),
        not_unanimous=pl.Series((against > 0).any(1).astype(float)),
    )
    return frame, z


def world_votes(home: Path, setting: Setting, seed: int) -> tuple[pl.DataFrame, np.ndarray]:
    """Return `judged` of a new world, with `is_against`, the truth of a vote as recorded, and its `group` of votes."""
    config = small_world(home, raw.WorldConfig(seed=seed, minority_share=setting.minority_share))
    config = config.model_copy(update={"labels": LabelsConfig(em=True)})
    # Whether votes of a world that lies there were turned round already cannot be seen.
    shutil.rmtree(config.world_folder, ignore_errors=True)
    raw.write_world(config.world_folder, config.world)
    if setting.flip_rate:
        flip_single_votes(config.world_folder, setting.flip_rate, seed)
    store, keys = write_labels(config)
    frame, z = judged(store, keys, [s.name for s in config.scorers])
    truth = pl.read_parquet(config.world_folder / "truth" / "votes.parquet")
    known = truth.select("source", "source_row", "rater", is_against="is_against_mean")
    frame = frame.join(known, on=["source", "source_row", "rater"], how="left", maintain_order="left", validate="1:1")
    if frame["is_against"].null_count():
        raise RuntimeError(f"seed {seed}: {frame['is_against'].null_count()} decided votes have no truth")
    is_ranked = pl.col("source_row").str.starts_with("test.json")
    return frame.with_columns(group=pl.when(is_ranked).then(pl.lit(RANKED)).otherwise(pl.lit(SINGLE))), z


# --- what is measured ------------------------------------------------------------------------------------------------


def measures(frame: pl.DataFrame, z: np.ndarray) -> dict[str, float]:
    """Return the AUCs 'group/method' of one world, of the bounds too, and shares and calibration errors."""
    found: dict[str, float] = {}
    for group in (SINGLE, RANKED):
        rows = (frame["group"] == group).to_numpy()
        part, folds = frame.filter(pl.Series(rows)), mar.folds(frame.filter(pl.Series(rows)))
        truth = part["is_against"].to_numpy()
        for method in METHODS:
            if not part[method].null_count():
                found[f"{group}/{method}"] = auc(truth, part[method].to_numpy())
                found[f"{group}/{method} within folds"] = auc_within(folds, truth, part[method].to_numpy())
        toward = np.log((1 - part["minority_score"].to_numpy()) / part["minority_score"].to_numpy())
        same = np.column_stack([toward, np.abs(toward), part["annotator_score"].to_numpy()])
        found[f"{group}/bound"] = auc(truth, cross_fitted(same, truth, folds))
        everything = np.column_stack([z[rows], np.abs(z[rows]), z[rows] ** 2, same])
        found[f"{group}/rich bound"] = auc(truth, cross_fitted(everything, truth, folds))
        found[f"{group}/share"] = float(truth.mean())
        p = part["minority_probability"].to_numpy()
        found[f"{group}/mean probability"] = float(p.mean())
        found[f"{group}/ece of truth"] = calibration_error(p, truth, part["people"].to_numpy())
    others = frame.filter(pl.col("others") >= 2, pl.col("share_against") != 0.5)
    is_against = (others["share_against"] > 0.5).to_numpy()
    probability, people = others["minority_probability"].to_numpy(), others["people"].to_numpy()
    found["ece"] = calibration_error(probability, is_against, people)
    found["targets"] = float(people.sum())
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, lower and upper end of its 95 % interval (Student's t over the seeds)."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def shown(estimate: tuple[float, float, float], digits: int = 4) -> str:
    """Return 'mean [low, high]'."""
    mean, low, high = (f"{v:.{digits}f}" for v in estimate)
    return f"{mean} [{low}, {high}]"


def remark(estimate: tuple[float, float, float]) -> str:
    """Return what an AUC's interval says where the method is no good: at chance, or worse."""
    _, low, high = estimate
    return "at chance" if low <= 0.5 <= high else "worse than chance" if high < 0.5 else ""


def table_text(results: Sequence[dict[str, float]], group: str) -> list[str]:
    """Return one line per method with AUC, its mean over folds taken by themselves, and intervals over the seeds."""
    lines = [f"  {group:44s} {'AUC':26s} {'within folds':26s}"]
    for method, what in {**METHODS, "bound": "bound: same inputs", "rich bound": "bound: all that scorers say"}.items():
        if any(f"{group}/{method}" not in r for r in results):
            continue
        estimate = interval([r[f"{group}/{method}"] for r in results])
        within = [r.get(f"{group}/{method} within folds", float("nan")) for r in results]
        inner = "" if np.isnan(within).any() else shown(interval(within))
        lines.append(f"    {what:42s} {shown(estimate):26s} {inner:26s} {remark(estimate)}".rstrip())
    return lines


def goals(results: Sequence[dict[str, float]]) -> list[tuple[str, tuple[float, float, float], bool]]:
    """Return every goal with its estimate over the seeds, and whether the mean reaches it (single votes)."""

    def over(what: Callable[[dict[str, float]], float]) -> tuple[float, float, float]:
        return interval([what(r) for r in results])

    def less(method: str, how: str = "") -> tuple[float, float, float]:
        return over(lambda r: r[f"{SINGLE}/minority_probability{how}"] - r[f"{SINGLE}/{method}{how}"])

    share = over(lambda r: (r[f"{SINGLE}/minority_probability"] - 0.5) / (r[f"{SINGLE}/bound"] - 0.5))
    c, p, p_within = less("confidence"), less("minority_score"), less("minority_score", " within folds")
    ece = over(lambda r: r["ece"])
    return [
        (f"AUC above chance, share of the bound's >= {GOAL_OF_BOUND}", share, share[0] >= GOAL_OF_BOUND),
        ("AUC - AUC of c >= 0", c, c[0] >= 0),
        ("AUC - AUC of 1-p >= 0", p, p[0] >= 0),
        ("AUC - AUC of 1-p >= 0, within folds", p_within, p_within[0] >= 0),
        (f"ECE against the other raters, held out <= {GOAL_ECE}", ece, ece[0] <= GOAL_ECE),
    ]


def report(setting: Setting, results: Sequence[dict[str, float]]) -> str:
    """Return the tables of a setting as text."""
    lines = [
        f"{setting.name}: minority_share {setting.minority_share}, flipped single votes {setting.flip_rate:.0%}; "
        f"{len(results)} seeds, mean [95 % interval over seeds]"
    ]
    for group in (SINGLE, RANKED):
        lines += table_text(results, group)
    lines.append("  calibration of minority_probability")
    for group in (SINGLE, RANKED):
        share, mean, error = (
            shown(interval([r[f"{group}/{k}"] for r in results])) for k in ("share", "mean probability", "ece of truth")
        )
        lines.append(f"    {group}: mean {mean}, truly against the mean {share}, ECE of the truth {error}")
    targets = np.mean([r["targets"] for r in results])
    lines.append(f"  goals of minority_probability (ECE: {targets:,.0f} held-out votes a seed)")
    for what, estimate, is_reached in goals(results):
        is_even = what.startswith("AUC -") and max(map(abs, estimate)) < EVEN
        note = f"  the interval lies within {EVEN} of 0" if is_even else ""
        lines.append(f"    {'yes' if is_reached else 'NO':3s} {what:54s} {shown(estimate, 5)}{note}")
    return "\n".join(lines)


def main(seeds: Sequence[int] = SEEDS, home: Path | None = None) -> bool:
    """Print both settings' tables; return whether every goal is reached.

    home: where worlds and stores are kept; absent: a temporary folder.
    """
    print(f"defaults of the world: {raw.WorldConfig()}", flush=True)
    is_reached = True
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[dict[str, float]]] = {s.name: [] for s in SETTINGS}
        for seed in seeds:
            for setting in SETTINGS:
                start = time.perf_counter()
                # Pictures are the same in both settings, so that most scores are there already.
                frame, z = world_votes((home or Path(folder)) / str(seed), setting, seed)
                found[setting.name].append(measures(frame, z))
                print(f"seed {seed}, {setting.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    for setting in SETTINGS:
        print(f"\n{report(setting, found[setting.name])}", flush=True)
        is_reached &= all(ok for _, _, ok in goals(found[setting.name]))
    return is_reached


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the worlds")
    parser.add_argument("--home", type=Path, help="folder in which worlds and stores are kept")
    options = parser.parse_args()
    main(options.seeds, options.home)
