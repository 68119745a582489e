"""How well the labels find minority votes of real people: TIFA-160, five raters per image, ten published metrics.

    python -m benchmarks.labels_people [--data FOLDER]

The folder holds `votes.parquet` (prompt, image_0, image_1, worker_id, label_0: ratings of Google's DSG study as pairs) and
`scores.parquet` (prompt, image_id, model and one column per metric, published with TIFA). They take the road of everybody's
own pairs and scores: the layout `pairs` with ids in place of images, imported scorers, and the commands ingest, score, label.

A vote is judged by the majority of the pair's other raters, ties left out. Every method is an AUC for finding votes against
them, beside three baselines that are computed from the raw files: a logistic on all metrics (cross-fitted, ridge 1e-3), the
mean of the metrics' z, and the CLIP score alone. Intervals: 2,000 bootstrap resamples of the prompts, differences paired.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.labels_truth import METHODS, auc_within, calibration_error, judged, remark, shown
from pipelines import __main__ as commands
from pipelines import catalogue, config, identity, schemas
from pipelines.labels import margins as mar
from pipelines.tables import Store

DATA = config.ROOT.parent / "shared" / "data" / "tifa160"
FILES = {
    "votes.parquet": {"prompt", "image_0", "image_1", "worker_id", "label_0"},
    "scores.parquet": {"prompt", "image_id", "model"},
}
NOT_METRICS = ("prompt", "prompt_id", "image_id", "model")
CLIP = "clipscore_vitb32"
RESAMPLES = 2_000
LOGISTIC, MEAN_Z, CLIP_SCORE = "baseline: logistic", "baseline: mean z", "baseline: CLIP score"
OTHERS = ("share_against", "em_probability")
"""Methods that are told what the other raters say, which is the truth here."""
LEAST_DECIDED = (1, 2, 3)
"""Decided votes of the pairs on which ways to one label are compared with the raters' majority."""
_KEY = ["prompt", "image_0", "image_1"]


def read(folder: Path) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
    """Return the votes with their images' generators, the scores, and the names of the metrics.

    Raises:
        SystemExit: a file is missing, or lacks a column; the message says which.
    """
    frames = []
    for name, columns in FILES.items():
        file = folder / name
        if not file.is_file():
            raise SystemExit(f"{file}: no such file; name the folder of {' and '.join(FILES)} with --data")
        frames.append(pl.read_parquet(file))
        if missing := sorted(columns - set(frames[-1].columns)):
            raise SystemExit(f"{file}: lacks the columns {missing}; found {frames[-1].columns}")
    votes, scores = frames
    for i in (0, 1):
        models = scores.select(pl.col("image_id").alias(f"image_{i}"), pl.col("model").alias(f"model_{i}"))
        votes = votes.join(models, on=f"image_{i}", how="left", maintain_order="left", validate="m:1")
    return votes, scores, [c for c in scores.columns if c not in NOT_METRICS]


def write_sources(home: Path, votes: pl.DataFrame, scores: pl.DataFrame, metrics: list[str]) -> Path:
    """Write the pairs, the scores and a configuration as somebody with data of his own would; return the latter's file."""
    (home / "pairs").mkdir(parents=True)
    columns = ["prompt", "image_0", "image_1", "label_0", "model_0", "model_1"]
    votes.select(*columns, annotator="worker_id").write_parquet(home / "pairs" / "votes.parquet")
    scores.select("prompt", *metrics, image_uid="image_id").write_parquet(home / "scores.parquet")

    def table(of: str, **options: str) -> str:
        return "\n".join([f"[[{of}]]", *(f"{k} = {json.dumps(v)}" for k, v in options.items()), ""])

    parts = [f"home = {json.dumps(str(home))}\n"]
    parts.append(table("sources", name="tifa160", layout="pairs", location=str(home / "pairs")))
    of_scores = {"kind": "imported", "checkpoint": str(home / "scores.parquet"), "family": "tifa160"}
    parts += [table("scorers", name=scorer_name(m), score_column=m, **of_scores) for m in metrics]
    parts.append(table("backbones", name="tiny", family="tiny", checkpoint=str(config.WEIGHTS / "tiny-sd")))
    file = home / "people.toml"
    file.write_text("\n".join(parts))
    return file


def scorer_name(metric: str) -> str:
    """Return a metric's name as a scorer may have it."""
    return metric.replace("-", "_")


def command(*arguments: str) -> None:
    """Run a command of `python -m pipelines`; what it prints is shown only where it fails.

    Raises:
        RuntimeError: it ended with another status than 0.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = commands.main(list(arguments))
    if status:
        raise RuntimeError(f"python -m pipelines {' '.join(arguments)}: status {status}\n{said.getvalue()}")


def from_raw_files(votes: pl.DataFrame, scores: pl.DataFrame, metrics: list[str]) -> pl.DataFrame:
    """Return the decided votes whose other raters have a majority: prompt_id, is_against and the baselines' scores.

    Nothing of the pipeline is used but the folds, which are made from the prompts' ids.
    """
    ids = {p: identity.prompt_id(p) for p in votes["prompt"].unique()}
    votes = votes.with_columns(prompt_id=pl.col("prompt").replace_strict(ids))
    d = []
    for m in metrics:
        of = dict(zip(scores["image_id"], scores[m], strict=True))
        d.append(np.array([of[a] - of[b] for a, b in votes.select("image_0", "image_1").iter_rows()]))
    side = 2 * votes["label_0"].to_numpy() - 1
    difference = np.stack(d, 1)
    # Pairs have four or five raters, so that the mean over votes is not quite the one over pairs.
    of_pairs = votes.select(pl.struct(_KEY).is_first_distinct()).to_series().to_numpy()
    z = difference / np.sqrt((difference[of_pairs] ** 2).mean(0))
    logit = _cross_fitted_preference(z, votes["label_0"].to_numpy(), mar.folds(votes))
    others = votes.select((2 * pl.col("label_0") - 1).sum().over(_KEY)).to_series().to_numpy() - side
    found = votes.select(
        "prompt_id",
        is_against=pl.Series(np.sign(others) == -side),
        is_counted=pl.Series((side != 0) & (others != 0)),
    )
    baselines = {LOGISTIC: -logit * side, MEAN_Z: -z.mean(1) * side, CLIP_SCORE: -z[:, metrics.index(CLIP)] * side}
    return found.with_columns(**{k: pl.Series(v) for k, v in baselines.items()}).filter("is_counted")


def _cross_fitted_preference(z: np.ndarray, label_0: np.ndarray, folds: np.ndarray, ridge: float = 1e-3) -> np.ndarray:
    """Return z w with w of a logistic without intercept, fitted on the votes of other folds, ties as half votes, [N]."""
    logit = np.zeros(len(z))
    for f in np.unique(folds):
        x, y, w = z[folds != f], label_0[folds != f], np.zeros(z.shape[1])
        for _ in range(50):
            p = 1 / (1 + np.exp(-x @ w))
            hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x) + ridge * np.eye(len(w))
            w = w - np.linalg.solve(hessian, x.T @ (p - y) / len(x) + ridge * w)
        logit[folds == f] = z[folds == f] @ w
    return logit


# --- intervals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resamples:
    """Bootstrap resamples of prompts, the same for everything that is compared: how often each is drawn, [P, R + 1].

    The last column is the sample itself, every prompt once.
    """

    prompts: pl.Series
    times: np.ndarray

    @classmethod
    def of(cls, prompts: pl.Series, count: int = RESAMPLES) -> Resamples:
        """Return resamples of these prompts, seed 0."""
        names = prompts.unique().sort()
        drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), count)
        return cls(names, np.vstack([drawn, np.ones(len(names))]).T)

    def rows(self, frame: pl.DataFrame) -> np.ndarray:
        """Return the number of every row's prompt, [N]."""
        return self.prompts.search_sorted(frame["prompt_id"]).to_numpy()

    def auc(self, frame: pl.DataFrame, method: str) -> np.ndarray:
        """Return the AUC of a column of frame for is_against in every resample, ties half, [R + 1]."""
        _, level = np.unique(frame[method].to_numpy(), return_inverse=True)
        against, prompt = frame["is_against"].to_numpy(), self.rows(frame)
        sides = []
        for side in (against, ~against):
            votes = np.zeros((level.max() + 1, len(self.prompts)))
            np.add.at(votes, (level[side], prompt[side]), 1)
            sides.append(votes @ self.times)
        positive, negative = sides
        below = np.cumsum(negative, 0) - negative / 2
        return (positive * below).sum(0) / (positive.sum(0) * negative.sum(0))

    def mean(self, frame: pl.DataFrame, values: np.ndarray) -> np.ndarray:
        """Return the mean of values over frame's rows in every resample, [R + 1]."""
        total, n = (np.bincount(self.rows(frame), v, len(self.prompts)) for v in (values, np.ones(len(values))))
        return (total @ self.times) / (n @ self.times)


def estimate(resampled: np.ndarray) -> tuple[float, float, float]:
    """Return the sample's value and the 2.5 and 97.5 % quantiles of its resamples."""
    low, high = np.quantile(resampled[:-1], [0.025, 0.975])
    return float(resampled[-1]), float(low), float(high)


# --- what is measured ------------------------------------------------------------------------------------------------


def labelled(file: Path, **labels: bool) -> tuple[Store, pl.DataFrame]:
    """Label under a configuration with these options; return store and `judged` votes with is_against, ties left out."""
    options = file.read_text() + "\n[labels]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in labels.items())
    variant = file.with_name("variant.toml")
    variant.write_text(options)
    command("label", "--config", str(variant))
    read_back = config.load(variant)
    store = Store(read_back.store_location)
    frame, _ = judged(store, catalogue.shard_keys(store), [s.name for s in read_back.scorers])
    is_counted = (pl.col("others") > 0) & (pl.col("share_against") != 0.5)
    return store, frame.filter(is_counted).with_columns(is_against=pl.col("share_against") > 0.5)


def votes_text(frame: pl.DataFrame, baselines: pl.DataFrame, resamples: Resamples, variant: str) -> list[str]:
    """Return a line per method: AUC, within folds, and its differences to the three baselines."""
    names = (LOGISTIC, MEAN_Z, CLIP_SCORE)
    of_baselines = {n: resamples.auc(baselines, n) for n in names}
    lines = [
        f"  {'AUC [95 %] for votes against the others':44s} {variant:26s} {'in folds':9s} "
        + " ".join(f"{'- ' + n.removeprefix('baseline: '):24s}" for n in names)
    ]
    for method, what in [*((n, n) for n in names), *METHODS.items()]:
        is_baseline = method in of_baselines
        source = baselines if is_baseline else frame
        if method in OTHERS or source[method].null_count():
            continue
        found = resamples.auc(source, method)
        within = auc_within(mar.folds(source), source["is_against"].to_numpy(), source[method].to_numpy())
        against = [shown(estimate(found - b), 3) if method != n else "" for n, b in of_baselines.items()]
        line = f"    {what:42s} {shown(estimate(found)):26s} {within:<9.4f} " + " ".join(f"{a:24s}" for a in against)
        lines.append(f"{line} {remark(estimate(found))}".rstrip())
    p, is_against = frame["minority_probability"], frame["is_against"].to_numpy()
    if p.null_count():
        return [*lines, "    minority_probability is null: nothing teaches it"]
    error = calibration_error(p.to_numpy(), is_against, frame["people"].to_numpy())
    lines.append(
        f"    minority_probability: mean {p.to_numpy().mean():.4f}, truly against {is_against.mean():.4f}, ECE {error:.4f}"
    )
    return lines


def pairs_text(store: Store, resamples: Resamples) -> list[str]:
    """Return how often ways to one label per pair agree with the raters' majority; where a way is undecided it is half."""
    pairs = store.read(schemas.CATALOGUE_PAIRS).sort("pair_id")
    consensus, smoothed = store.read(schemas.CONSENSUS), store.read(schemas.SMOOTHED)
    by_majority = pl.when(pl.col("decided_by") == "majority").then("consensus_label_0")
    ways = {
        "consensus: majority of the metrics": consensus.select(by_majority).to_series(),
        "random_scorer": consensus["random_scorer_label_0"],
        "raw_sum": consensus["raw_sum_label_0"],
        "zscore_sum (sign of the mean z)": consensus["zscore_sum_label_0"],
        "CLIP score": (consensus[f"vote_{CLIP}"] + 1) / 2,
        "p_ensemble (cross-fitted logistic)": smoothed["p_ensemble"],
        "p_log": smoothed["p_log"],
        "p_linear": smoothed["p_linear"],
    }
    human = np.sign(pairs["human_label_0"].to_numpy() - 0.5)
    levels = {n: (human != 0) & (_decided(store, pairs) >= n) for n in LEAST_DECIDED}
    counts = "".join(f"{f'{n}+ decided: {is_in.sum()} pairs':27s}" for n, is_in in levels.items())
    lines = [f"  {'as the majority of the raters, undecided: half':44s} {counts}undecided"]
    for what, label in ways.items():
        says = np.sign(label.fill_null(0.5).to_numpy() - 0.5)
        right = (1 + human * says) / 2
        shares = (estimate(resamples.mean(pairs.filter(pl.Series(rows)), right[rows])) for rows in levels.values())
        undecided = int((says[human != 0] == 0).sum())
        lines.append(f"    {what:42s} {''.join(f'{shown(s):27s}' for s in shares)}{undecided}")
    return lines


def _decided(store: Store, pairs: pl.DataFrame) -> np.ndarray:
    """Return the number of decided votes of every pair, [N]."""
    count = store.read(schemas.MINORITY).group_by("pair_id").agg(n=pl.col("people").sum())
    return pairs.join(count, on="pair_id", how="left", maintain_order="left")["n"].fill_null(0).to_numpy()


def raters_text(store: Store) -> list[str]:
    """Return the raters' agreement with each other and with the ensemble."""
    lines = ["  raters: agreement with the others' majority, shrunk [95 %]; r_a; votes compared"]
    for row in store.read(schemas.ANNOTATORS).sort("annotator_id").iter_rows(named=True):
        reliability = tuple(row[c] for c in ("reliability", "reliability_low", "reliability_high"))
        known = shown(reliability, 3) if None not in reliability else "not compared"
        lines.append(f"    {row['annotator_id']:42s} {known:26s} {row['annotator_score']:+.4f}  {row['compared']}")
    for row in store.read(schemas.RATER_AGREEMENT).iter_rows(named=True):
        alpha = shown((row["alpha"], row["alpha_low"], row["alpha_high"]), 3)
        lines.append(
            f"    Krippendorff's alpha, {row['source']}: {alpha} (ties a third value), {row['alpha_decided']:.3f} of decided "
            f"votes; {row['minority_share']:.1%} on the smaller side"
        )
    return lines


def main(data: Path = DATA) -> None:
    """Print what the labels are worth on real votes; every number with its baseline, good or bad."""
    votes, scores, metrics = read(data)
    baselines = from_raw_files(votes, scores, metrics)
    resamples = Resamples.of(pl.Series([identity.prompt_id(p) for p in votes["prompt"].unique()]))
    print(
        f"TIFA-160: {len(votes)} votes of {votes['worker_id'].n_unique()} raters on "
        f"{votes.select(_KEY).n_unique()} pairs of {len(resamples.prompts)} prompts; {len(metrics)} metrics; "
        f"{len(baselines)} votes judged, {baselines['is_against'].to_numpy().mean():.1%} against the others' majority",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = write_sources(Path(folder) / "home", votes, scores, metrics)
        command("ingest", "--config", str(file))
        command("score", "--config", str(file))
        for variant, options in {"": {"em": True}, "with generator_term": {"em": True, "generator_term": True}}.items():
            store, frame = labelled(file, **options)
            if len(frame) != len(baselines) or frame["is_against"].sum() != baselines["is_against"].sum():
                raise RuntimeError(
                    f"the store judges {len(frame)} votes ({frame['is_against'].sum()} against), the raw files "
                    f"{len(baselines)} ({baselines['is_against'].sum()})"
                )
            print("\n".join(votes_text(frame, baselines, resamples, variant)))
            print("\n".join(pairs_text(store, resamples)), flush=True)
        print("\n".join(raters_text(store)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of votes.parquet and scores.parquet")
    main(parser.parse_args().data)
