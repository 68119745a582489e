"""The one place that turns scores into margins: d_k = score_k(image_0) - score_k(image_1), and prompts into folds."""

from __future__ import annotations

import polars as pl

FOLDS = 5


def difference_column(scorer: str) -> str:
    """Return the name of the column that holds a scorer's difference."""
    return f"d_{scorer}"


def differences(pairs: pl.LazyFrame, scores: pl.LazyFrame, scorers: list[str]) -> pl.DataFrame:
    """Return the pairs with one column d_<scorer> each, null where one of the two images has no score.

    pairs: pair_id, prompt_id, image_0_id, image_1_id. scores: scorer, image_id, prompt_id, score.
    """
    result = pairs
    for scorer in scorers:
        one = scores.filter(pl.col("scorer") == scorer).select("image_id", "prompt_id", "score")
        for i in (0, 1):
            side = one.rename({"image_id": f"image_{i}_id", "score": f"_s{i}"})
            result = result.join(side, on=[f"image_{i}_id", "prompt_id"], how="left")
        gap = pl.col("_s0").cast(pl.Float64) - pl.col("_s1").cast(pl.Float64)
        result = result.with_columns(gap.alias(difference_column(scorer))).drop("_s0", "_s1")
    return result.sort("pair_id").collect()


def fold(prompt_id: str = "prompt_id") -> pl.Expr:
    """Return the fold, 0 .. FOLDS-1, of a prompt, from the first 32 bits of its id."""
    return (pl.col(prompt_id).str.slice(0, 8).str.to_integer(base=16, dtype=pl.Int64) % FOLDS).cast(pl.Int8)
