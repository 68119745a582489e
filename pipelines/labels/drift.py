"""Drift: do scorers and consensus still say the same of pairs that were chosen once and kept?

A sample of pairs is frozen with what people said of it. Every set of revisions is measured on it once:

    accuracy = share of pairs on which the higher score is the humans' side, equal scores half
    points   = 100 * (accuracy now - accuracy of the subject's previous revision), over the pairs on which both choose
    changed  = share of the pairs in the store both times on which the choice is another now

The frozen labels are compared with, not the present ones, and both revisions on the same pairs: so that new votes and
removed sources do not look like drift.

Belongs here: the draw, a measurement, the comparison of measurements. Does not belong here: when to warn (`checks`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from pipelines import schemas
from pipelines.labels.margins import difference

CONSENSUS = "consensus"
_SALT = "frozen_sample"
"""Apart from every other choice by id: held-out pairs of a validation are the first ones by id."""
_CHOICE, _BEFORE = pl.col("label_0"), pl.col("label_0_before")


@dataclass(frozen=True)
class Measurement:
    """One set of revisions on the frozen sample: its number, subject -> revision, and its rows of frozen_labels."""

    number: int
    revisions: Mapping[str, str]
    labels: pl.DataFrame


def sample(pairs: pl.DataFrame, count: int) -> pl.DataFrame:
    """Return `count` pairs on which people have a majority (all of them, if there are fewer), as frozen_sample.

    The pairs with the smallest hashes: the order of ingestion decides nothing.

    pairs: the columns of catalogue_pairs.
    """
    decided = pairs.filter(pl.col("human_label_0") != 0.5)
    drawn = pl.Series([hashlib.sha256(f"{_SALT}/{p}".encode()).digest() for p in decided["pair_id"]], dtype=pl.Binary)
    chosen = decided[drawn.arg_sort()[:count]] if len(decided) else decided
    return chosen.select(list(schemas.FROZEN_SAMPLE.polars_schema)).sort("pair_id")


def measure(
    number: int, sample: pl.DataFrame, margins: pl.DataFrame, consensus: pl.DataFrame, scorers: Sequence[str]
) -> pl.DataFrame:
    """Return the rows of frozen_labels of one measurement.

    Args:
        number: of the measurement. sample: frozen_sample.
        margins, consensus: those rows of the tables that are of pairs of the sample; the others are gone.
    """
    choices = {s: (difference(s).alias("difference"), (difference(s).sign() + 1) / 2) for s in scorers}
    frames = [margins.select("pair_id", d, label_0=choice) for d, choice in choices.values()]
    nothing = pl.lit(None, pl.Float64)
    frames.append(consensus.select("pair_id", difference=nothing, label_0="consensus_label_0"))
    ids = sample.select("pair_id")
    return pl.concat(
        ids.join(frame.with_columns(is_in_store=True), on="pair_id", how="left", maintain_order="left")
        .with_columns(
            pl.col("is_in_store").fill_null(False), measurement=pl.lit(number, pl.Int64), subject=pl.lit(name)
        )
        .select(list(schemas.FROZEN_LABELS.polars_schema))
        for name, frame in zip([*scorers, CONSENSUS], frames, strict=True)
    )


def drift(sample: pl.DataFrame, measurements: Sequence[Measurement]) -> pl.DataFrame:
    """Return the drift table: every subject of every measurement, against its previous revision.

    measurements: in the order of their numbers.
    """
    rows = []
    for i, now in enumerate(measurements):
        for subject, revision in now.revisions.items():
            earlier = [m for m in measurements[:i] if m.revisions.get(subject, revision) != revision]
            before = earlier[-1] if earlier else None
            rows.append(
                {"measurement": now.number, "subject": subject, "revision": revision}
                | _facts(_with_side(sample, now, subject))
                | ({} if before is None else _change(sample, now, before, subject))
            )
    return pl.DataFrame(rows, schema=schemas.DRIFT.polars_schema)


def _with_side(sample: pl.DataFrame, measurement: Measurement, subject: str) -> pl.DataFrame:
    """Return pair_id, is_in_store, label_0 of a subject, and how right the choice is: 1, 0.5 or 0; null without one."""
    side = (pl.col("human_label_0") > 0.5).cast(pl.Float64)
    return (
        sample.select("pair_id", side=side)
        .join(measurement.labels.filter(pl.col("subject") == subject), on="pair_id", maintain_order="left")
        .select("pair_id", "is_in_store", "label_0", right=1 - (_CHOICE - pl.col("side")).abs())
    )


def _facts(rows: pl.DataFrame) -> dict[str, object]:
    present = rows.filter("is_in_store")
    return {
        "pairs": present["label_0"].count(),
        "pairs_without_choice": present["label_0"].null_count(),
        "pairs_gone": len(rows) - len(present),
        "accuracy": present["right"].mean(),
    }


def _change(sample: pl.DataFrame, now: Measurement, before: Measurement, subject: str) -> dict[str, object]:
    both = _with_side(sample, now, subject).join(_with_side(sample, before, subject), on="pair_id", suffix="_before")
    both = both.filter("is_in_store", "is_in_store_before")
    right = both.filter(_CHOICE.is_not_null(), _BEFORE.is_not_null()).select(pl.col("right", "right_before").mean())
    accuracy, accuracy_before = right.row(0)
    return {
        "before": before.number,
        "revision_before": before.revisions[subject],
        "accuracy_before": accuracy_before,
        "points": None if accuracy is None else 100 * (accuracy - accuracy_before),
        "share_changed": both.select(_CHOICE.ne_missing(_BEFORE).mean()).item(),
    }
