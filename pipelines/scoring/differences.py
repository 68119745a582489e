"""What a new revision of a scorer changes: two revisions' scores side by side, and how many of its votes turn round.

    d = score(image_0) - score(image_1);  a pair is decided where the old d is not 0;  its vote flips where the new d has
    the other sign;  share flipped = (flips + ties made / 2) / decided

Belongs here: queries over `scores`. Does not belong here: scoring, activation of a revision (`batches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import polars as pl

from pipelines import catalogue, schemas
from pipelines.scoring import batches
from pipelines.tables import Store, StoreError

KEYS = ["image_id", "prompt_id"]
LARGEST = 10
"""Differences that the text shows."""


@dataclass(frozen=True)
class ScoreDiff:
    """Two revisions of a scorer compared; what nothing can be said about is None.

    rows_both, rows_old_only, rows_new_only: (image, prompt) with a row, whatever its status, in both or in one revision.
    status_changes: rows in both whose status is another.
    scored: rows in both with two scores; mean, sd (unbiased), max_abs of new - old over them, pearson of old and new, and
    share_identical, bit by bit.
    pairs_scored: pairs of the store with four scores; decided, flips, ties_made (decided, then equal), ties_unmade (equal,
    then decided), share_flipped (a tie made counts half).
    """

    rows_both: int
    rows_old_only: int
    rows_new_only: int
    status_changes: int
    scored: int
    mean: float | None
    sd: float | None
    max_abs: float | None
    pearson: float | None
    share_identical: float | None
    pairs_scored: int
    decided: int
    flips: int
    ties_made: int
    ties_unmade: int
    share_flipped: float | None


def score_diff(store: Store, scorer: str, old: str, new: str, shard_keys: Sequence[str]) -> pl.DataFrame:
    """Return both revisions' rows of these shards, sorted: an (image, prompt) that one of them lacks has nulls there.

    Columns: image_id, prompt_id, score_old, score_new, difference (new - old), status_old, status_new.

    Raises:
        StoreError: there is no such scorer or revision in these shards; the message lists those there are.
    """
    there = revisions(store, scorer, shard_keys)
    if not there:
        raise StoreError(
            f"{store.location}: no scores of scorer {scorer!r}; there are scores of {_scorers(store) or 'none'}"
        )
    if unknown := [r for r in (old, new) if r not in there]:
        raise StoreError(
            f"{store.location}: no scores of {scorer} with revision {unknown[0]!r}; there are\n{_list(there)}"
        )
    sides = []
    for name, revision in (("old", old), ("new", new)):
        wanted = [batches.partition(scorer, revision, key) for key in there[revision].shard_keys]
        rows = store.scan(schemas.SCORES, partitions=wanted).select(
            *KEYS, pl.col("score").alias(f"score_{name}"), pl.col("status").alias(f"status_{name}")
        )
        # Shards that were scored before and after what they own has moved may both hold a row; a score counts most.
        rows = rows.sort(pl.col(f"status_{name}") != "ok", *KEYS, f"score_{name}", f"status_{name}")
        sides.append(rows.unique(KEYS, keep="first", maintain_order=True))
    both = sides[0].join(sides[1], on=KEYS, how="full", coalesce=True)
    gap = pl.col("score_new").cast(pl.Float64) - pl.col("score_old").cast(pl.Float64)
    columns = [*KEYS, "score_old", "score_new", gap.alias("difference"), "status_old", "status_new"]
    return both.select(columns).sort(KEYS).collect()


def summary(diff: pl.DataFrame, pairs: pl.DataFrame | pl.LazyFrame) -> ScoreDiff:
    """Summarise `score_diff`. pairs: prompt_id, image_0_id, image_1_id, each pair once."""
    in_old, in_new = diff["status_old"].is_not_null(), diff["status_new"].is_not_null()
    both = diff.filter(in_old & in_new)
    scored = diff.filter(pl.col("difference").is_not_null())
    gap = scored["difference"].to_numpy()
    d = _pair_differences(scored, pairs.lazy())
    before, after = np.sign(d["old"].to_numpy()), np.sign(d["new"].to_numpy())
    is_decided = before != 0
    decided, flips = int(is_decided.sum()), int((before * after < 0).sum())
    ties_made = int((is_decided & (after == 0)).sum())
    return ScoreDiff(
        rows_both=len(both),
        rows_old_only=int((in_old & ~in_new).sum()),
        rows_new_only=int((~in_old & in_new).sum()),
        status_changes=both.filter(pl.col("status_old") != pl.col("status_new")).height,
        scored=len(scored),
        mean=float(gap.mean()) if len(gap) else None,
        sd=standard_deviation(gap),
        max_abs=float(np.abs(gap).max()) if len(gap) else None,
        pearson=correlation(scored["score_old"].to_numpy(), scored["score_new"].to_numpy()),
        share_identical=float((gap == 0).mean()) if len(gap) else None,
        pairs_scored=len(d),
        decided=decided,
        flips=flips,
        ties_made=ties_made,
        ties_unmade=int((~is_decided & (after != 0)).sum()),
        share_flipped=(flips + ties_made / 2) / decided if decided else None,
    )


def _pair_differences(scored: pl.DataFrame, pairs: pl.LazyFrame) -> pl.DataFrame:
    """Return d of both revisions for the pairs of which both have both scores: old, new."""
    frame = pairs.select("prompt_id", "image_0_id", "image_1_id")
    for i in (0, 1):
        names = {"image_id": f"image_{i}_id", "score_old": f"old_{i}", "score_new": f"new_{i}"}
        side = scored.lazy().select(*KEYS, "score_old", "score_new").rename(names)
        frame = frame.join(side, on=[f"image_{i}_id", "prompt_id"])
    return frame.select(
        **{n: pl.col(f"{n}_0").cast(pl.Float64) - pl.col(f"{n}_1").cast(pl.Float64) for n in ("old", "new")}
    ).collect()


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Pearson's correlation in float64; None below two rows or where one of the two is constant."""
    if len(a) < 2:
        return None
    x, y = (v.astype(np.float64) - v.astype(np.float64).mean() for v in (a, b))
    size = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / size, -1.0, 1.0)) if size > 0 else None


def standard_deviation(values: np.ndarray) -> float | None:
    """Return the unbiased standard deviation in float64; None below two values."""
    return float(values.astype(np.float64).std(ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Revision:
    """A revision that the store has scores of: which shards, how many rows, when the last of them was committed."""

    revision: str
    shard_keys: tuple[str, ...]
    rows: int
    written_at: float
    is_active: bool


def revisions(store: Store, scorer: str, shard_keys: Sequence[str]) -> dict[str, Revision]:
    """Return the revisions of a scorer with scores of these shards, the oldest first."""
    found: dict[str, list] = {}
    # Shard keys may hold slashes; what stands before them never does.
    for manifest in store.manifests(schemas.SCORES.name, f"{scorer}/revision="):
        found.setdefault(manifest.partition.split("/")[1].removeprefix("revision="), []).append(manifest)
    active = store.current_revisions().get(scorer)
    result = []
    for revision, manifests in found.items():
        by_key = {m.partition.split("/", 2)[2]: m for m in manifests}
        keys = tuple(k for k in shard_keys if k in by_key)
        if keys:
            last = max(by_key[k].written_at for k in keys)
            rows = sum(by_key[k].rows for k in keys)
            result.append(Revision(revision, keys, rows, last, revision == active))
    return {r.revision: r for r in sorted(result, key=lambda r: (r.written_at, r.revision))}


def _scorers(store: Store) -> str:
    return ", ".join(sorted({m.partition.split("/")[0] for m in store.manifests(schemas.SCORES.name)}))


def _list(there: dict[str, Revision]) -> str:
    return "\n".join(
        f"  {r.revision}  {datetime.fromtimestamp(r.written_at, UTC):%Y-%m-%d %H:%M} UTC  {r.rows} scores of "
        f"{len(r.shard_keys)} shards{', active' if r.is_active else ''}"
        for r in there.values()
    )


def main_text(store: Store, scorer: str, old: str, new: str) -> str:
    """Return what changes from one revision to another as text: the summary, and the largest differences by prompt.

    Raises:
        StoreError: there is no catalogue, or no such scorer or revision; the message lists those there are.
    """
    diff = score_diff(store, scorer, old, new, catalogue.shard_keys(store))
    s = summary(diff, store.scan(schemas.CATALOGUE_PAIRS))
    lines = [
        f"{scorer}: revision {new} against {old}",
        f"  rows                 {s.rows_both} in both, {s.rows_old_only} in {old} only, {s.rows_new_only} in {new} only",
        f"  status changes       {s.status_changes}",
        f"  scored in both       {s.scored}, identical {_percent(s.share_identical)}",
        f"  difference           mean {_number(s.mean)}, sd {_number(s.sd)}, largest {_number(s.max_abs)}",
        f"  correlation          {_number(s.pearson)} (Pearson)",
        f"  pairs scored in both {s.pairs_scored}, decided before {s.decided}",
        f"  votes that flip      {s.flips}; ties made {s.ties_made}, unmade {s.ties_unmade}; "
        f"share flipped {_percent(s.share_flipped)} (ties made count half)",
    ]
    largest = (
        diff.filter(pl.col("difference").is_not_null(), pl.col("difference") != 0)
        .sort(pl.col("difference").abs(), *KEYS, descending=[True, False, False])
        .head(LARGEST)
        .lazy()
        .join(store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt"), on="prompt_id", how="left")
        .sort(pl.col("difference").abs(), *KEYS, descending=[True, False, False])
        .collect()
    )
    if len(largest):
        lines += [
            "",
            f"largest {len(largest)} differences",
            "  image                             old        new        new - old",
        ]
        lines += [
            f"  {r['image_id']}  {r['score_old']:<9.6g}  {r['score_new']:<9.6g}  {r['difference']:<+9.3g}  "
            f"{_short(r['prompt'])}"
            for r in largest.iter_rows(named=True)
        ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.2f} %"


def _short(prompt: str | None, length: int = 80) -> str:
    text = "(prompt no longer in the catalogue)" if prompt is None else " ".join(prompt.split())
    return text if len(text) <= length else text[: length - 3] + "..."
