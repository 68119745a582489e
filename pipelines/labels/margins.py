"""The one place that turns scores into margins: one row per pair with every scorer's two scores, d_k, rms, folds of prompts.

    d_k = score_k(image_0) - score_k(image_1)        in float64, null (NaN in arrays) where one of the two has no score

The functions of `pipelines.labels` that take `margins` take this table: sorted by pair_id, each pair once; arrays over pairs
are aligned with its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from pipelines import schemas

FOLDS = 5
ROWS = 200_000
"""Rows of a piece: what several columns of numbers of them take stays small, and is used again for the next."""


def margins(pairs: pl.DataFrame, scores: pl.DataFrame, models: pl.DataFrame, scorers: Sequence[str]) -> pl.DataFrame:
    """Return the margins table.

    Args:
        pairs: pair_id, prompt_id, image_0_id, image_1_id.
        scores: image_id, prompt_id (each once) and one column per scorer, null where it has no score.
        models: pair_id, model_0, model_1 of the pairs whose generators are known.

    Raises:
        ValueError: a score is NaN or infinite, or an (image, prompt) comes twice.
    """
    for scorer in scorers:
        values = scores[scorer]
        if bad := int((~values.is_finite()).sum()):
            raise ValueError(f"scores of {scorer}: {bad} are NaN or infinite; an unknown score is null, with a status")
    # Ids are hashes themselves; 64 bits of both together are compared in a third of the time that texts need.
    keyed = scores.select(key=_key("image_id"), row=pl.int_range(pl.len(), dtype=pl.UInt32))
    if keyed["key"].n_unique() != len(keyed):
        raise ValueError(
            f"scores: of {len(keyed)} rows, {len(keyed) - keyed['key'].n_unique()} repeat an (image, prompt)"
        )
    result = pairs.select("pair_id", "prompt_id").with_columns(
        pairs.select("pair_id")
        .join(models, on="pair_id", how="left", maintain_order="left")
        .select("model_0", "model_1")
    )
    for i in (0, 1):
        found = pairs.select(key=_key(f"image_{i}_id")).join(keyed, on="key", how="left", maintain_order="left")["row"]
        for scorer in scorers:
            result = result.with_columns(scores[scorer].gather(found).alias(f"score_{i}_{scorer}"))
    return result.select(list(schemas.MARGINS.of(scorers).polars_schema)).sort("pair_id")


def models(votes: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Return pair_id, model_0, model_1 of the pairs whose generators votes name.

    Where votes on a pair name several, the first in the order of names that one vote gives both images; where none names
    both, the first that any gives each.

    votes: model_0, model_1 as Categorical or String, and pair_id or row (see vote_rows).
    """
    row, count = vote_rows(pairs, votes), len(pairs)
    texts = [votes[f"model_{i}"].cast(pl.String) for i in (0, 1)]
    names = pl.concat([t.drop_nulls().unique() for t in texts]).unique().sort()
    none = len(names)
    code = [t.cast(pl.Enum(names)).to_physical().cast(pl.Int64).fill_null(none).to_numpy() for t in texts]

    def smallest(values: np.ndarray, among: np.ndarray) -> np.ndarray:
        found = np.full(count, (none + 1) ** 2)
        np.minimum.at(found, row[among], values[among])
        return found

    together = smallest(code[0] * (none + 1) + code[1], (code[0] < none) & (code[1] < none))
    columns = {}
    for i, part in enumerate((together // (none + 1), together % (none + 1))):
        alone = smallest(code[i], code[i] < none)
        best = np.where(together < (none + 1) ** 2, part, np.minimum(alone, none))
        columns[f"model_{i}"] = names.gather(pl.Series(best).replace(none, None))
    return pairs.select("pair_id").with_columns(**columns).filter(pl.any_horizontal(pl.col(*columns).is_not_null()))


def _key(image: str) -> pl.Expr:
    return pl.col(image).hash(1) ^ pl.col("prompt_id").hash(2)


def starts(rows: int) -> range:
    """Return where pieces of ROWS rows begin; of no rows there is one piece."""
    return range(0, max(1, rows), ROWS)


def difference(scorer: str) -> pl.Expr:
    """Return d of a row of `margins`."""
    return pl.col(f"score_0_{scorer}").cast(pl.Float64) - pl.col(f"score_1_{scorer}").cast(pl.Float64)


def matrix(margins: pl.DataFrame, scorers: Sequence[str]) -> np.ndarray:
    """Return d of all pairs and scorers, float64 [N, K], NaN where unknown; a scorer's numbers lie together."""
    d = margins.select(difference(s).fill_null(np.nan).alias(s) for s in scorers)
    return np.stack([d[s].to_numpy() for s in scorers]).T


def rms(d: np.ndarray) -> np.ndarray:
    """Return sqrt(mean of d^2 over the pairs where d is known), [K]; 1 where every d is 0 or unknown.

    d: [N, K]. There is no centring, so that swapping the images of a pair changes nothing.
    """
    mean = np.array([np.nansum(column**2) / max(1, np.count_nonzero(~np.isnan(column))) for column in d.T])
    return np.where(mean > 0, np.sqrt(mean), 1.0)


def fold(prompt_id: str = "prompt_id") -> pl.Expr:
    """Return the fold, 0 .. FOLDS-1, of a prompt, from the first 32 bits of its id."""
    return (pl.col(prompt_id).str.slice(0, 8).str.to_integer(base=16, dtype=pl.Int64) % FOLDS).cast(pl.Int8)


def folds(frame: pl.DataFrame) -> np.ndarray:
    """Return the fold of every row's prompt, int8 [N]."""
    return frame.select(fold()).to_series().to_numpy()


def codes(values: pl.Series) -> np.ndarray:
    """Return a number 0 .. M-1 per distinct value, int64 [N]: what np.bincount groups by. Null is a value of its own."""
    # Ranking sorts every row; sorting the distinct ones is enough.
    distinct = values.unique().sort().to_frame("value").with_row_index("code")
    found = values.to_frame("value").join(distinct, on="value", how="left", nulls_equal=True, maintain_order="left")
    return found["code"].to_numpy().astype(np.int64)


def together(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct pairs of two codes as the code of `first` of each, [M], and which of them every row has, [N]."""
    width = second.max(initial=0) + 1
    distinct, which = np.unique(first * width + second, return_inverse=True)
    return distinct // width, which


def vote_rows(margins: pl.DataFrame, votes: pl.DataFrame) -> np.ndarray:
    """Return the row of `margins` of every vote, int64 [N]: its column `row` where somebody has looked already.

    Raises:
        ValueError: see rows_of.
    """
    return votes["row"].to_numpy() if "row" in votes.columns else rows_of(margins, votes["pair_id"])


def rows_of(margins: pl.DataFrame, pair_id: pl.Series) -> np.ndarray:
    """Return the row of `margins` of every pair_id, int64 [len(pair_id)].

    Raises:
        ValueError: a pair is not in it.
    """
    rows = margins.select("pair_id").with_row_index("row")
    found = pair_id.to_frame("pair_id").join(rows, on="pair_id", how="left", maintain_order="left")["row"]
    if found.null_count():
        raise ValueError(
            f"{found.null_count()} votes are on pairs that `margins` lacks; build the catalogue and `margins` again"
        )
    return found.to_numpy().astype(np.int64)
