import math

import numpy as np
import polars as pl
import pytest

from pipelines import identity, schemas
from pipelines.labels import margins as mar

PAIRS = pl.DataFrame(
    {
        "pair_id": ["3", "1", "2"],
        "prompt_id": ["q", "p", "p"],
        "image_0_id": ["a", "a", "b"],
        "image_1_id": ["b", "b", "c"],
    }
)
SCORES = pl.DataFrame(
    [
        ("a", "p", 3.0, 0.25),
        ("b", "p", 1.0, 0.75),
        ("c", "p", None, None),
        ("a", "q", -1.0, None),
        ("b", "q", 0.5, None),
    ],
    schema={"image_id": pl.String, "prompt_id": pl.String, "s": pl.Float32, "t": pl.Float32},
    orient="row",
)
MODELS = pl.DataFrame({"pair_id": ["1"], "model_0": ["sd"], "model_1": ["xl"]})


def margins(pairs=PAIRS, scores=SCORES, models=MODELS, scorers=("s", "t")):
    return schemas.MARGINS.conform(mar.margins(pairs, scores, models, list(scorers)))


# --- the table -----------------------------------------------------------------------------------------------------


def test_every_pair_is_one_row_in_the_order_of_the_ids_with_both_images_scores_under_its_own_prompt():
    rows = margins().select("pair_id", "score_0_s", "score_1_s", "score_0_t", "score_1_t").rows()
    assert rows == [("1", 3.0, 1.0, 0.25, 0.75), ("2", 1.0, None, 0.75, None), ("3", -1.0, 0.5, None, None)]


def test_generators_are_those_of_the_pairs_whose_votes_name_them():
    assert margins().select("model_0", "model_1").rows() == [("sd", "xl"), (None, None), (None, None)]


def test_a_margin_is_the_score_of_image_0_minus_that_of_image_1_and_unknown_where_one_is_missing():
    d = mar.matrix(margins(), ["s", "t"])
    np.testing.assert_equal(d, [[2.0, -0.5], [np.nan, np.nan], [-1.5, np.nan]])


def test_the_columns_of_a_margin_are_in_the_order_asked_for():
    np.testing.assert_equal(mar.matrix(margins(), ["t", "s"]), mar.matrix(margins(), ["s", "t"])[:, ::-1])


def test_scores_of_other_scorers_do_not_mix_in():
    alone = margins(scores=SCORES.drop("t"), scorers=["s"])
    assert alone.equals(margins().select(alone.columns))


def test_an_image_that_nobody_scored_has_no_margin():
    d = mar.matrix(margins(scores=SCORES.filter(pl.col("image_id") != "a")), ["s"])
    assert np.isnan(d).all()


def test_swapping_the_images_flips_the_sign_of_every_margin():
    turned = PAIRS.rename({"image_0_id": "image_1_id", "image_1_id": "image_0_id"})
    names = ["s", "t"]
    np.testing.assert_equal(mar.matrix(margins(pairs=turned), names), -mar.matrix(margins(), names))


def test_margins_are_taken_in_double_precision(margins_of):
    # In float32 the difference of these two would be 2^-23 of 0.1, which the rounding of 0.1 already is.
    d = mar.matrix(margins_of({"s": ([0.1], [1e-9])}), ["s"])
    assert d.dtype == np.float64
    assert d[0, 0] == float(np.float32(0.1)) - float(np.float32(1e-9))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_by_name_and_count(value):
    bad = SCORES.with_columns(t=pl.when(pl.col("prompt_id") == "p").then(pl.lit(value, pl.Float32)).otherwise("t"))
    with pytest.raises(ValueError, match="scores of t: 3 are NaN or infinite; an unknown score is null"):
        margins(scores=bad)


def test_an_image_and_prompt_that_comes_twice_is_refused_with_the_number_of_repetitions():
    with pytest.raises(ValueError, match="of 7 rows, 2 repeat an"):
        margins(scores=pl.concat([SCORES, SCORES.head(2)]))


def test_an_image_that_has_the_name_of_another_prompt_is_another_one():
    """Were the two parts of the key mixed alike, ('x', 'y') and ('y', 'x') would be the same."""
    crossed = pl.DataFrame({"image_id": ["x", "y"], "prompt_id": ["y", "x"], "s": [1.0, 2.0]})
    pairs = pl.DataFrame({"pair_id": ["1"], "prompt_id": ["y"], "image_0_id": ["x"], "image_1_id": ["y"]})
    table = mar.margins(pairs, crossed.cast({"s": pl.Float32}), MODELS, ["s"])
    assert table.select("score_0_s", "score_1_s").row(0) == (1.0, None)


def test_no_pairs_at_all_give_an_empty_table():
    assert len(margins(pairs=PAIRS.clear())) == 0


# --- what others compute with it -----------------------------------------------------------------------------------


def test_the_rms_is_not_centred_and_of_known_differences_alone():
    d = np.array([[3.0, np.nan, 0.0, np.nan], [4.0, 2.0, 0.0, np.nan]])
    assert mar.rms(d) == pytest.approx([math.sqrt(12.5), 2.0, 1.0, 1.0])
    assert mar.rms(-d) == pytest.approx(mar.rms(d), rel=0)
    assert mar.rms(d[:0]).tolist() == [1.0] * 4


def test_rows_are_found_for_pairs_in_any_order_and_more_than_once():
    assert mar.rows_of(margins(), pl.Series(["3", "1", "3"])).tolist() == [2, 0, 2]


def test_a_pair_that_the_margins_lack_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match="2 votes are on pairs that `margins` lacks; build the catalogue and `margins` again"
    ):
        mar.rows_of(margins(), pl.Series(["1", "7", "8"]))


def test_the_rows_of_votes_are_looked_up_once():
    votes = pl.DataFrame({"pair_id": ["3", "1"]})
    assert mar.vote_rows(margins(), votes).tolist() == [2, 0]
    assert mar.vote_rows(margins(), votes.with_columns(row=pl.Series([7, 8]))).tolist() == [7, 8]


def test_codes_number_distinct_values_without_gaps_and_null_is_a_value_of_its_own():
    without = mar.codes(pl.Series(["b", "a", "b", "c"]))
    assert without.tolist() == [1, 0, 1, 2]
    with_null = mar.codes(pl.Series(["b", None, "a", None]))
    assert sorted(set(with_null)) == [0, 1, 2]
    assert with_null[1] == with_null[3] != with_null[0]
    assert mar.codes(pl.Series([], dtype=pl.String)).tolist() == []


@pytest.mark.parametrize(("start", "expected"), [("0000000a", 0), ("0000000d", 3), ("ffffffff", 0), ("00000001", 1)])
def test_a_fold_is_the_first_32_bits_of_the_prompts_id_modulo_five(start, expected):
    frame = pl.DataFrame({"prompt_id": [start + "9" * 24]})
    assert mar.folds(frame).tolist() == [expected]


def test_folds_are_of_similar_size():
    ids = pl.DataFrame({"prompt_id": [identity.prompt_id(f"prompt {i}") for i in range(2_000)]})
    sizes = ids.group_by(mar.fold().alias("f")).len()
    assert sorted(sizes["f"]) == [0, 1, 2, 3, 4]
    assert sizes["len"].min() > 320


def test_generators_are_those_that_one_vote_names_together(hexadecimal):
    pairs = pl.DataFrame({"pair_id": ["x", "y", "z", "w"]})
    rows = [
        ("x", "A", "Z"),
        ("x", "B", "C"),
        ("y", None, "D"),
        ("y", "E", None),
        ("z", None, None),
        ("w", "B", None),
        ("w", "C", "A"),
    ]
    votes = pl.DataFrame(rows, schema=["pair_id", "model_0", "model_1"], orient="row")
    expected = [("x", "A", "Z"), ("y", "E", "D"), ("w", "C", "A")]
    for order in (votes, votes.reverse(), votes.with_columns(pl.col("model_0", "model_1").cast(pl.Categorical))):
        assert mar.models(order, pairs).rows() == expected
    nobody = votes.with_columns(model_0=pl.lit(None, pl.String), model_1=pl.lit(None, pl.String))
    assert mar.models(nobody, pairs).rows() == []
    assert mar.models(votes.clear(), pairs.clear()).rows() == []
