"""Margins and votes made by hand: tables as `pipelines.labels` reads them, of a few numbers."""

import hashlib

import numpy as np
import polars as pl
import pytest

from pipelines import schemas


@pytest.fixture(scope="session")
def hexadecimal():
    """Return an id like those of the store, the same for the same name."""

    def make(name):
        return hashlib.sha256(str(name).encode()).hexdigest()[:32]

    return make


@pytest.fixture(scope="session")
def prompt_of():
    """Return a prompt's id that lies in a fold; others of the fold by their number."""

    def make(fold, number=0):
        # 5 is the number of folds: 0, 5, 10, ... more stay in it.
        return f"{fold + 5 * number:08x}" + "0" * 24

    return make


@pytest.fixture(scope="session")
def margins_of(hexadecimal):
    """Make the margins table, in the order given, of differences (image_1's score is 0) or of two scores per scorer.

    given: scorer -> numbers, or (scores of image_0, scores of image_1); None: no score.
    """

    def make(given, pair_id=None, prompt_id=None, model_0=None, model_1=None):
        scores = {}
        for scorer, values in given.items():
            both = values if isinstance(values, tuple) else (values, [None if v is None else 0.0 for v in values])
            for i in (0, 1):
                numbers = [None if v is None or np.isnan(v) else float(v) for v in both[i]]
                scores[f"score_{i}_{scorer}"] = pl.Series(numbers, dtype=pl.Float32)
        n = len(next(iter(scores.values())))
        frame = pl.DataFrame(
            {
                "pair_id": pl.Series(list(pair_id or map(hexadecimal, range(n))), dtype=pl.String),
                "prompt_id": pl.Series(list(prompt_id or [hexadecimal("prompt")] * n), dtype=pl.String),
                "model_0": pl.Series(model_0 or [None] * n, dtype=pl.String),
                "model_1": pl.Series(model_1 or [None] * n, dtype=pl.String),
                **scores,
            }
        )
        return schemas.MARGINS.conform(frame)

    return make


@pytest.fixture(scope="session")
def swapped():
    """Return margins whose images have changed places."""

    def turn(margins):
        names = [c for c in margins.columns if "_0" in c]
        turned = {n: n.replace("_0", "_1", 1) for n in names}
        return margins.rename(turned | {v: k for k, v in turned.items()}).select(margins.columns)

    return turn


@pytest.fixture(scope="session")
def votes_of():
    """Make votes of (pair_id, annotator or None, label_0, people=1, source='s') in the order given."""

    def make(rows, was_swapped=None):
        full = [(*r, *(1, "s")[len(r) - 3 :]) for r in rows]
        columns = {"pair_id": pl.String, "annotator_id": pl.String, "label_0": pl.Float64}
        frame = pl.DataFrame(full, schema=columns | {"people": pl.Int64, "source": pl.String}, orient="row")
        swaps = pl.Series([None] * len(full) if was_swapped is None else was_swapped, dtype=pl.Boolean)
        return frame.with_columns(
            vote_id=pl.Series([f"v{k}" for k in range(len(full))], dtype=pl.String), was_swapped=swaps
        )

    return make


@pytest.fixture(scope="session")
def calibration_of():
    """Make a calibration by hand: scorer -> {slope, weight, ...}; the same for every fold, or only for one.

    only: the fold that has these numbers; the others have numbers that would give other results.
    """

    def make(only=None, **scorers):
        rows = []
        for scorer, numbers in scorers.items():
            for fold in range(-1, 5):
                wrong = {"slope": 77.0, "weight": 77.0} if only is not None and fold not in (only, -1) else {}
                rows.append({"scorer": scorer, "fold": fold, "votes": 1, **numbers, **wrong})
        return pl.DataFrame(rows, schema=schemas.CALIBRATION.polars_schema)

    return make
