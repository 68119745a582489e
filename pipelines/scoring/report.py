"""The scorer report: what the active scores look like per source, how right they are, and how alike the scorers are.

    d         = score(image_0) - score(image_1)
    accuracy  = share of people who chose an image whose d points to it, d = 0 half; tied votes are left out
    interval  = 2.5 and 97.5 % quantiles over resamples of the prompts (votes of one prompt are not independent)

Belongs here: numbers and pictures of finished scores. Does not belong here: scoring (`batches`), calibration (`labels`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from pipelines import catalogue, plots, schemas
from pipelines.config import Config
from pipelines.scoring import batches, precision
from pipelines.scoring.differences import correlation, standard_deviation
from pipelines.tables import Built, Manifest, Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CODE_VERSION = "1"
ALL = "all"
RESAMPLES = 1_000
SEED = 0
BINS = 40
HISTOGRAM_ENDS = (0.001, 0.999)
"""Quantiles of all scores between which the bins lie, so that one odd score does not squeeze the others into one bin."""
QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}


def build(store: Store, config: Config, shard_keys: Sequence[str]) -> dict[str, Built]:
    """Build `scorer_report` and `scorer_correlation` from the active scores of these shards; return them by name.

    Raises:
        StoreError: votes, catalogue or scores are missing or old, or a scorer has no active revision.
    """
    scorers = [s.name for s in config.scorers]
    inputs = _inputs(store, config, list(shard_keys))
    revisions = store.current_revisions()
    facts = functools.cache(lambda: _read(store, scorers, list(shard_keys)))
    common = {"scorers": scorers}
    sampling = {"resamples": RESAMPLES, "seed": SEED, "bins": BINS}
    return {
        schemas.SCORER_REPORT.name: store.build(
            schemas.SCORER_REPORT,
            lambda: _report(facts(), revisions),
            inputs=inputs,
            code_version=CODE_VERSION,
            parameters={**common, **sampling},
        ),
        schemas.SCORER_CORRELATION.name: store.build(
            schemas.SCORER_CORRELATION,
            lambda: _correlations(facts()),
            inputs=inputs,
            code_version=CODE_VERSION,
            parameters=common,
        ),
    }


def _inputs(store: Store, config: Config, shard_keys: list[str]) -> list[Manifest]:
    catalogue.require_current(store, shard_keys)
    current = batches.require_active(store, config, shard_keys)
    wanted = [batches.partition(s.name, current[s.name], k) for s in config.scorers for k in shard_keys]
    over_all = [store.require(t) for t in ("catalogue_votes", "catalogue_pairs", "catalogue_scorables")]
    return [*store.require_all("votes", shard_keys), *over_all, *store.require_all("scores", wanted)]


@dataclass(frozen=True)
class _Facts:
    """Everything the report rests on, by place: a place is an (image, prompt), the last place is none.

    scores: [scorers, places + 1], NaN where there is none. statuses: the same shape, indices of STATUSES, -1: no row.
    ends: places of a pair's images, [pairs, 2]. prompts: number of a pair's prompt, [pairs].
    named: source -> pairs that its vote rows name. votes: source -> (pairs, people, people for image_0) of decided votes.
    """

    scorers: list[str]
    scores: np.ndarray
    statuses: np.ndarray
    ends: np.ndarray
    prompts: np.ndarray
    named: dict[str, np.ndarray]
    votes: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]

    def places(self, source: str) -> np.ndarray:
        """Return the places that a source names."""
        if source == ALL:
            return np.arange(self.scores.shape[1] - 1)
        found = np.unique(self.ends[self.named[source]])
        return found[found < self.scores.shape[1] - 1]

    def differences(self, k: int, pairs: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return a scorer's d of these pairs, float64, NaN where one of the images has no score."""
        first, second = (self.scores[k, self.ends[pairs, i]].astype(np.float64) for i in (0, 1))
        return first - second


def _read(store: Store, scorers: list[str], shard_keys: list[str]) -> _Facts:
    """Join ids to numbers once; a million pairs times five scorers are then arrays of 100 MB together."""
    places = store.scan(schemas.CATALOGUE_SCORABLES).select("image_id", "prompt_id").collect().with_row_index("place")
    nowhere = len(places)
    pairs = store.scan(schemas.CATALOGUE_PAIRS).select("pair_id", "prompt_id", "image_0_id", "image_1_id")
    for i in (0, 1):
        side = places.lazy().rename({"image_id": f"image_{i}_id", "place": f"place_{i}"})
        pairs = pairs.join(side, on=[f"image_{i}_id", "prompt_id"], how="left")
    numbered = (
        pairs.sort("pair_id")
        .select(
            "pair_id",
            prompt=pl.col("prompt_id").rank("dense").cast(pl.Int64) - 1,
            place_0=pl.col("place_0").fill_null(nowhere),
            place_1=pl.col("place_1").fill_null(nowhere),
        )
        .collect()
        .with_row_index("pair")
    )
    ids = numbered.lazy().select("pair_id", "pair")
    named = (
        catalogue.resolved_votes(store, shard_keys)
        .select("source", "pair_id")
        .unique()
        .join(ids, on="pair_id")
        .sort("source", "pair")
        .collect()
    )
    decided = (
        catalogue.counted_votes(store, shard_keys)
        .filter(pl.col("label_0") != 0.5)
        .group_by("source", "pair_id")
        .agg(people=catalogue.PEOPLE.sum(), for_0=(pl.col("label_0") * catalogue.PEOPLE).sum())
        .join(ids, on="pair_id")
        .sort("source", "pair")
        .collect()
    )
    by_source = {str(name): part for (name,), part in decided.group_by("source", maintain_order=True)}
    by_source[ALL] = decided.group_by("pair").agg(pl.col("people").sum(), pl.col("for_0").sum()).sort("pair")
    sources = [*named["source"].unique(maintain_order=True), ALL]
    empty = decided.head(0)
    scores = np.full((len(scorers), nowhere + 1), np.nan, np.float32)
    statuses = np.full((len(scorers), nowhere + 1), -1, np.int8)
    codes = {status: i for i, status in enumerate(schemas.SCORE_STATUSES)}
    for k, scorer in enumerate(scorers):
        rows = (
            batches.current_scores(store, [scorer], shard_keys)
            .join(places.lazy(), on=["image_id", "prompt_id"])
            .select("place", "score", status=pl.col("status").replace_strict(codes, return_dtype=pl.Int8))
            .collect()
        )
        at = rows["place"].to_numpy()
        scores[k, at] = rows["score"].fill_null(float("nan")).to_numpy()
        statuses[k, at] = rows["status"].to_numpy()
    return _Facts(
        scorers=scorers,
        scores=scores,
        statuses=statuses,
        ends=numbered.select("place_0", "place_1").to_numpy().astype(np.int64),
        prompts=numbered["prompt"].to_numpy(),
        named={
            **{str(name): part["pair"].to_numpy() for (name,), part in named.group_by("source", maintain_order=True)},
            ALL: np.arange(len(numbered)),
        },
        votes={
            s: tuple(by_source.get(s, empty)[c].to_numpy() for c in ("pair", "people", "for_0"))  # type: ignore[misc]
            for s in sources
        },
    )


def _report(facts: _Facts, revisions: dict[str, str]) -> pl.DataFrame:
    judged = {source: _judge(facts, source) for source in facts.votes}
    rows = []
    for k, scorer in enumerate(facts.scorers):
        known = facts.scores[k][~np.isnan(facts.scores[k])].astype(np.float64)
        low, high = np.quantile(known, HISTOGRAM_ENDS).tolist() if len(known) else (0.0, 0.0)
        # All scores may be one number.
        bins = np.linspace(low, high, BINS + 1) if low < high else np.linspace(low - 0.5, high + 0.5, BINS + 1)
        rows += [
            {
                "scorer": scorer,
                "source": source,
                "revision": revisions[scorer],
                **_distribution(facts, k, source, bins),
                **judged[source][k],
            }
            for source in facts.votes
        ]
    return pl.DataFrame(rows, schema=schemas.SCORER_REPORT.polars_schema)


def _distribution(facts: _Facts, k: int, source: str, bins: np.ndarray) -> dict[str, Any]:
    """Return the columns of `scorer_report` that need no votes."""
    places = facts.places(source)
    values = facts.scores[k, places].astype(np.float64)
    values = values[~np.isnan(values)]
    found, counts = np.unique(facts.statuses[k, places], return_counts=True)
    names = {-1: "no row", **dict(enumerate(schemas.SCORE_STATUSES))}
    statuses = {names[int(s)]: int(n) for s, n in zip(found, counts, strict=True)}
    ok = statuses.pop("ok", 0)
    pairs = facts.named[source]
    row: dict[str, Any] = {
        "scores": len(places),
        "scores_ok": ok,
        "scores_not_ok": len(places) - ok,
        "statuses_not_ok": json.dumps(dict(sorted(statuses.items()))),
        "sd": standard_deviation(values),
        "pairs": len(pairs),
        "pairs_scored": int((~np.isnan(facts.differences(k, pairs))).sum()),
    }
    if len(values):
        inside = np.clip(values, bins[0], bins[-1])
        row |= {"mean": float(values.mean()), "histogram_low": float(bins[0]), "histogram_high": float(bins[-1])}
        row |= dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True))
        row["histogram"] = json.dumps(np.histogram(inside, bins)[0].tolist())
    return row


def _judge(facts: _Facts, source: str) -> list[dict[str, Any]]:
    """Return, per scorer, the columns of `scorer_report` that compare it with a source's decided votes."""
    pairs, people, for_0 = facts.votes[source]
    keys, prompt = np.unique(facts.prompts[pairs], return_inverse=True)
    rows, sums = [], []
    for k in range(len(facts.scorers)):
        d = facts.differences(k, pairs)
        is_covered = ~np.isnan(d)
        right = np.where(d > 0, for_0, np.where(d < 0, people - for_0, people / 2))
        right, covered = np.where(is_covered, right, 0.0), np.where(is_covered, people, 0)
        sums += [np.bincount(prompt, weights=v, minlength=len(keys)) for v in (right, covered)]
        scored, votes = int(is_covered.sum()), int(covered.sum())
        rows.append(
            {
                "votes_decided": int(people.sum()),
                "votes_covered": votes,
                "accuracy": float(right.sum() / votes) if votes else None,
                "pairs_decided": scored,
                "share_equal": float((d[is_covered] == 0).mean()) if scored else None,
            }
        )
    for row, (low, high) in zip(rows, _intervals(np.stack(sums, 1)), strict=True):
        if row["votes_covered"]:
            row |= {"accuracy_low": low, "accuracy_high": high}
    return rows


def _intervals(sums: np.ndarray) -> list[tuple[float, float]]:
    """Return 95 % bootstrap intervals of ratios of sums over prompts. sums: [prompts, 2 K], numerator and denominator."""
    rng, n = np.random.default_rng(SEED), len(sums)
    drawn = np.empty((RESAMPLES, sums.shape[1]))
    for i in range(RESAMPLES if n else 0):
        times = np.bincount(rng.integers(n, size=n), minlength=n)
        drawn[i] = times.astype(np.float64) @ sums
    result = []
    for k in range(sums.shape[1] // 2):
        right, people = drawn[:, 2 * k], drawn[:, 2 * k + 1]
        # A resample without any of the scorer's votes says nothing.
        shares = (right[people > 0] / people[people > 0]) if n else np.empty(0)
        result.append(tuple(np.quantile(shares, [0.025, 0.975]).tolist()) if len(shares) else (np.nan, np.nan))
    return result


def _correlations(facts: _Facts) -> pl.DataFrame:
    rows = []
    for a in range(len(facts.scorers)):
        for b in range(a + 1, len(facts.scorers)):
            x, y = _common(facts.scores[a], facts.scores[b])
            d, e = _common(facts.differences(a), facts.differences(b))
            is_decided = (d != 0) & (e != 0)
            rows.append(
                {
                    "scorer_a": facts.scorers[a],
                    "scorer_b": facts.scorers[b],
                    "scores": len(x),
                    "pearson": correlation(x, y),
                    "spearman": correlation(_ranks(x), _ranks(y)),
                    "pairs": len(d),
                    "pearson_d": correlation(d, e),
                    "spearman_d": correlation(_ranks(d), _ranks(e)),
                    "pairs_decided": int(is_decided.sum()),
                    "agreement": float(((d > 0) == (e > 0))[is_decided].mean()) if is_decided.any() else None,
                }
            )
    return pl.DataFrame(rows, schema=schemas.SCORER_CORRELATION.polars_schema)


def _common(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = ~(np.isnan(a) | np.isnan(b))
    return a[known], b[known]


def _ranks(values: np.ndarray) -> np.ndarray:
    return pl.Series(values, dtype=pl.Float64).rank("average").to_numpy()


# --- what people look at ---------------------------------------------------------------------------------------------


def table_text(store: Store) -> str:
    """Return the report as GitHub-flavoured Markdown, with what bfloat16 costs the scorers that are active in it.

    Raises:
        StoreError: there is no report yet.
    """
    report = store.read(schemas.SCORER_REPORT)
    revisions = dict(report.select("scorer", "revision").iter_rows())
    return markdown(report, store.read(schemas.SCORER_CORRELATION), precision.rows(store, revisions))


def markdown(report: pl.DataFrame, correlations: pl.DataFrame, in_bfloat16: pl.DataFrame) -> str:
    """Return the tables of the report, of the correlations and of `scorer_precision` as GitHub-flavoured Markdown."""
    lines = [
        "| scorer | source | scores | not ok | mean ± sd | 5 % … 95 % | accuracy % (95 %) | people | equal % |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in report.iter_rows(named=True):
        has, judged = r["mean"] is not None, r["accuracy"] is not None
        cells = [
            r["scorer"],
            r["source"],
            f"{r['scores_ok']}",
            f"{r['scores_not_ok']}",
            f"{r['mean']:.4g} ± {r['sd'] or 0:.2g}" if has else "",
            f"{r['q05']:.4g} … {r['q95']:.4g}" if has else "",
            f"{100 * r['accuracy']:.1f} [{100 * r['accuracy_low']:.1f}, {100 * r['accuracy_high']:.1f}]"
            if judged
            else "",
            f"{r['votes_covered']}",
            f"{100 * r['share_equal']:.1f}" if judged else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Accuracy: against decided human votes, by people; equal scores count half, tied votes not at all."]
    if len(correlations):
        lines += [
            "",
            "| scorers | scores | Pearson | Spearman | pairs | Pearson of d | Spearman of d | agree % |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for r in correlations.iter_rows(named=True):
            numbers = [_two(r[c]) for c in ("pearson", "spearman", "pearson_d", "spearman_d")]
            agree = "" if r["agreement"] is None else f"{100 * r['agreement']:.1f}"
            lines.append(
                f"| {r['scorer_a']}, {r['scorer_b']} | {r['scores']} | {numbers[0]} | {numbers[1]} | {r['pairs']} | "
                f"{numbers[2]} | {numbers[3]} | {agree} |"
            )
    if len(in_bfloat16):
        lines += [
            "",
            "| bfloat16 against float32 | pairs | sd of the difference | sd of the scores | votes that flip |",
        ]
        lines += ["|---|--:|--:|--:|--:|"]
        for r in in_bfloat16.iter_rows(named=True):
            flips = "" if r["share_flipped"] is None else f"{100 * r['share_flipped']:.2f} %"
            met = {True: ", goal met", False: ", GOAL MISSED", None: ""}[r["is_goal_met"]]
            sds = [("" if r[c] is None else f"{r[c]:.2g}") for c in ("difference_sd", "score_sd")]
            lines.append(f"| {r['scorer']} | {r['pairs']} | {sds[0]} | {sds[1]} | {flips}{met} |")
    return "\n".join(lines)


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


_PANELS_IN_A_ROW = 3


def picture(store: Store) -> bytes:
    """Return a PNG of the report: accuracies with intervals, how alike the scorers are, the scores by source.

    Raises:
        StoreError: there is no report yet.
    """
    return plot(store.read(schemas.SCORER_REPORT), store.read(schemas.SCORER_CORRELATION))


def plot(report: pl.DataFrame, correlations: pl.DataFrame) -> bytes:
    """Return the picture of these tables."""
    drawn = plots.figure(2.0)
    if report.is_empty():
        plots.say(drawn.subplots(), "no scorers")
        return plots.png(drawn)
    scorers = report["scorer"].unique(maintain_order=True).to_list()
    sources = report["source"].unique(maintain_order=True).to_list()
    if len(sources) == 2:
        # One source is all there is.
        sources.remove(ALL)
    colours = {s: f"C{i % 10}" for i, s in enumerate(s for s in sources if s != ALL)} | {ALL: "0.35"}
    wide = min(_PANELS_IN_A_ROW, len(scorers))
    deep = -(-len(scorers) // wide)
    top = max(2.6, 0.9 + 0.2 * len(scorers) * len(sources))
    drawn.set_figheight(top + 1.7 * deep)
    upper, lower = drawn.subfigures(2, 1, squeeze=False, height_ratios=[top, 1.7 * deep])[:, 0]
    bars, heat = upper.subplots(1, 2, width_ratios=[1.25, 1])
    _plot_accuracy(bars, report, scorers, sources, colours)
    if len(scorers) > 1:
        _plot_likeness(heat, correlations, scorers)
    else:
        heat.set_axis_off()
    panels = lower.subplots(deep, wide, squeeze=False).ravel()
    for axis, scorer in zip(panels, scorers, strict=False):
        _plot_scores(axis, report.filter(pl.col("scorer") == scorer), scorer, colours)
    for axis in panels[::wide]:
        axis.set_ylabel("% of scores", fontsize=8)
    for axis in panels[len(scorers) :]:
        axis.set_axis_off()
    return plots.png(drawn)


def _plot_accuracy(
    axis: Axes, report: pl.DataFrame, scorers: list[str], sources: list[str], colours: dict[str, str]
) -> None:
    height = 0.8 / len(sources)
    for i, source in enumerate(sources):
        rows = {r["scorer"]: r for r in report.filter(pl.col("source") == source).iter_rows(named=True)}
        for k, scorer in enumerate(scorers):
            r, y = rows[scorer], k + (i - (len(sources) - 1) / 2) * height
            label = source if k == 0 else None
            if r["accuracy"] is None:
                axis.barh(y, 0, height * 0.9, color=colours[source], label=label)
                axis.text(1, y, "no votes", va="center", fontsize=7, color="0.4")
                continue
            value, low, high = (100 * r[c] for c in ("accuracy", "accuracy_low", "accuracy_high"))
            # A percentile interval of few prompts may lie beside the share itself.
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axis.barh(y, value, height * 0.9, color=colours[source], label=label, alpha=0.85)
            axis.errorbar(value, y, xerr=error, color="black", capsize=2, linewidth=1)
            axis.text(1, y, f"{value:.1f}", va="center", fontsize=7.5, color="white")
    axis.axvline(50, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(scorers)), scorers)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of decided human votes, equal scores half;\n95 % interval by prompt", fontsize=8)
    axis.set_title("accuracy", fontsize=9)
    axis.tick_params(labelsize=8)
    # Behind the bars there is room: nobody is right about all votes.
    axis.legend(fontsize=7, loc="lower right", frameon=False)


def _plot_likeness(axis: Axes, correlations: pl.DataFrame, scorers: list[str]) -> None:
    """Draw the correlation of differences below the diagonal, the share of equal choices above it."""
    at = {s: i for i, s in enumerate(scorers)}
    shown = np.full((len(scorers), len(scorers)), np.nan)
    for r in correlations.iter_rows(named=True):
        a, b = sorted((at[r["scorer_a"]], at[r["scorer_b"]]))
        if r["pearson_d"] is not None:
            shown[b, a] = r["pearson_d"]
            axis.text(a, b, f"{r['pearson_d']:.2f}", ha="center", va="center", fontsize=8)
        if r["agreement"] is not None:
            # A share of equal choices of a half is what chance gives: the colour of no correlation.
            shown[a, b] = 2 * r["agreement"] - 1
            axis.text(b, a, f"{100 * r['agreement']:.0f} %", ha="center", va="center", fontsize=8)
    axis.set_facecolor("0.93")
    # The strongest colours are left out, so that black numbers stay readable.
    axis.imshow(shown, cmap="RdBu", vmin=-1.5, vmax=1.5, aspect="auto")
    axis.set_xticks(range(len(scorers)), scorers, fontsize=7, rotation=30, ha="right")
    axis.set_yticks(range(len(scorers)), scorers, fontsize=7)
    axis.set_title("correlation of differences (below),\nshare of equal choices (above)", fontsize=9)


def _plot_scores(axis: Axes, rows: pl.DataFrame, scorer: str, colours: dict[str, str]) -> None:
    for r in rows.iter_rows(named=True):
        if r["histogram"] is None or r["source"] == ALL:
            continue
        counts = np.array(json.loads(r["histogram"]), float)
        edges = np.linspace(r["histogram_low"], r["histogram_high"], len(counts) + 1)
        axis.stairs(100 * counts / counts.sum(), edges, color=colours[r["source"]], linewidth=1.3, label=r["source"])
        axis.stairs(100 * counts / counts.sum(), edges, color=colours[r["source"]], fill=True, alpha=0.12)
    axis.set_title(f"{scorer}: scores", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=8)
