import polars as pl
import pytest

from pipelines import identity
from pipelines.labels import margins

PAIRS = pl.LazyFrame(
    {
        "pair_id": ["1", "2", "3"],
        "prompt_id": ["p", "p", "q"],
        "image_0_id": ["a", "b", "a"],
        "image_1_id": ["b", "c", "b"],
    }
)
SCORES = pl.LazyFrame(
    {
        "scorer": ["s"] * 5 + ["t"] * 2,
        "image_id": ["a", "b", "c", "a", "b", "a", "b"],
        "prompt_id": ["p", "p", "p", "q", "q", "p", "p"],
        "score": [3.0, 1.0, None, -1.0, 0.5, 0.25, 0.75],
    },
    schema_overrides={"score": pl.Float32},
)


def test_a_margin_is_the_score_of_image_0_minus_that_of_image_1_under_the_pairs_own_prompt():
    frame = margins.differences(PAIRS, SCORES, ["s"])
    assert frame["d_s"].to_list() == [2.0, None, -1.5]


def test_a_margin_is_null_where_a_scorer_has_no_score_for_one_of_the_images():
    frame = margins.differences(PAIRS, SCORES, ["s", "t"])
    assert frame["pair_id"].to_list() == ["1", "2", "3"]
    assert frame["d_t"].to_list() == [-0.5, None, None]


def test_scores_of_other_scorers_do_not_mix_in():
    alone = margins.differences(PAIRS, SCORES.filter(pl.col("scorer") == "s"), ["s"])
    together = margins.differences(PAIRS, SCORES, ["s", "t"])
    assert together["d_s"].equals(alone["d_s"])


def test_swapping_the_images_flips_the_sign_of_every_margin():
    swapped = PAIRS.rename({"image_0_id": "image_1_id", "image_1_id": "image_0_id"})
    a = margins.differences(PAIRS, SCORES, ["s", "t"])
    b = margins.differences(swapped, SCORES, ["s", "t"])
    for name in ("d_s", "d_t"):
        assert a[name].equals(-b[name])


def test_margins_are_taken_in_double_precision():
    scores = SCORES.with_columns(score=pl.lit(0.1, pl.Float32))
    assert margins.differences(PAIRS, scores, ["s"])["d_s"].dtype == pl.Float64


@pytest.mark.parametrize(("start", "expected"), [("0000000a", 0), ("0000000d", 3), ("ffffffff", 0), ("00000001", 1)])
def test_a_fold_is_the_first_32_bits_of_the_prompts_id_modulo_five(start, expected):
    frame = pl.DataFrame({"prompt_id": [start + "9" * 24]})
    assert frame.select(f=margins.fold())["f"].to_list() == [expected]


def test_folds_are_of_similar_size():
    ids = pl.DataFrame({"prompt_id": [identity.prompt_id(f"prompt {i}") for i in range(2_000)]})
    sizes = ids.group_by(margins.fold().alias("f")).len()
    assert sorted(sizes["f"]) == [0, 1, 2, 3, 4]
    assert sizes["len"].min() > 320
