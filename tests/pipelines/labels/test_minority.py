import math

import polars as pl
import pytest

from pipelines import schemas
from pipelines.labels import minority as mino

RMS = {"a": 2.0, "b": 0.1}
WEIGHT = {"a": 0.5, "b": -0.25}
PROMPT = "00000002" + "0" * 24  # fold 2


def calibration(scorers):
    """Weights that depend on the fold: those of fold 2 are WEIGHT, others would give other numbers."""
    rows = [
        {"scorer": s, "fold": f, "slope": 1.0, "weight": WEIGHT[s] if f == 2 else 9.0, "rms": RMS[s], "votes": 10}
        for s in scorers
        for f in range(-1, 5)
    ]
    return pl.DataFrame(rows, schema=schemas.CALIBRATION.polars_schema)


def sides(a, b=None, scorers=("a", "b")):
    """c, v, u and minority_score of both sides of one pair whose differences are a * rms and b * rms."""
    columns = {"d_a": None if a is None else a * RMS["a"], "d_b": None if b is None else b * RMS["b"]}
    frame = pl.DataFrame(
        {"pair_id": ["x"], "prompt_id": [PROMPT], **columns}, schema_overrides=dict.fromkeys(columns, pl.Float64)
    )
    found = mino.side_metrics(frame, calibration(scorers), list(scorers))
    return {r["side"]: r for r in found.iter_rows(named=True)}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_united_annotators_disagree_with_the_other_side_only():
    found = sides(1.0, 1.0)
    assert found[1.0]["confidence"] == pytest.approx(1 - sigmoid(3.75))
    assert found[0.0]["confidence"] == pytest.approx(sigmoid(3.75))
    assert found[1.0]["stability"] == found[0.0]["stability"] == 0.0
    assert found[0.0]["metric"] == 0.0, "a stably wrong vote has metric 0: the product's known weakness"


def test_opposed_annotators_are_undecided_and_maximally_unstable():
    found = sides(1.0, -1.0)
    for side in (0.0, 1.0):
        assert found[side]["confidence"] == pytest.approx(0.5)
        assert found[side]["stability"] == 1.0, "the standard deviation 5.3 is clamped"
        assert found[side]["metric"] == pytest.approx(0.5)


def test_close_annotators_by_hand():
    found = sides(0.1, 0.0)
    # z = 0.375 and 0: unbiased standard deviation 0.375 / sqrt(2).
    confidence, stability = 1 - (sigmoid(0.375) + 0.5) / 2, 0.375 / math.sqrt(2)
    assert found[1.0]["confidence"] == pytest.approx(confidence)
    assert found[1.0]["stability"] == pytest.approx(stability)
    assert found[1.0]["metric"] == pytest.approx(confidence * stability)


def test_the_minority_score_is_the_probability_of_the_other_side_with_the_weights_of_the_prompts_fold():
    found = sides(2.0, 1.0)
    h = 0.5 * 2.0 - 0.25 * 1.0
    assert found[1.0]["minority_score"] == pytest.approx(1 - sigmoid(h))
    assert found[0.0]["minority_score"] == pytest.approx(sigmoid(h))


def test_swapping_the_images_swaps_the_sides_and_changes_nothing_else():
    here, there = sides(0.3, -0.7), sides(-0.3, 0.7)
    for name in ("confidence", "stability", "metric", "minority_score"):
        assert here[1.0][name] == pytest.approx(there[0.0][name])
        assert here[0.0][name] == pytest.approx(there[1.0][name])


def test_a_missing_score_leaves_every_metric_null():
    for found in (sides(1.0, None), sides(None, None)):
        for side in (0.0, 1.0):
            values = {k: v for k, v in found[side].items() if k not in ("pair_id", "side")}
            assert values == dict.fromkeys(("confidence", "stability", "metric", "minority_score"))


def test_a_single_annotator_has_no_stability():
    found = sides(1.0, scorers=("a",))
    assert found[1.0]["confidence"] == pytest.approx(1 - sigmoid(3.75))
    assert found[1.0]["stability"] is None
    assert found[1.0]["metric"] is None


def test_the_table_has_one_row_per_decided_vote_with_the_metrics_of_its_side():
    votes = pl.DataFrame(
        [(f"v{k}", "x", None, label) for k, label in enumerate([1.0, 1.0, 1.0, 0.0, 0.0, 0.5])]
        + [("w", "y", "a", 1.0)],
        schema={"vote_id": pl.String, "pair_id": pl.String, "annotator_id": pl.String, "label_0": pl.Float64},
        orient="row",
    )
    metrics = pl.DataFrame(
        [("x", 1.0, 0.2, 0.5, 0.3, 0.1), ("x", 0.0, 0.8, 0.5, 0.7, 0.4)],
        schema=["pair_id", "side", "confidence", "stability", "minority_score", "metric"],
        orient="row",
    )
    table = schemas.MINORITY.conform(mino.minority(votes.with_columns(count=pl.lit(1)), metrics))
    found = {r["vote_id"]: r for r in table.iter_rows(named=True)}
    assert list(found) == ["v0", "v1", "v2", "v3", "v4", "w"]
    assert [found[f"v{k}"]["minority_score"] for k in range(5)] == [0.3, 0.3, 0.3, 0.7, 0.7]
    assert [found[f"v{k}"]["others"] for k in range(5)] == [4] * 5
    assert [found[f"v{k}"]["share_against"] for k in range(5)] == [0.5, 0.5, 0.5, 0.75, 0.75]
    assert (found["w"]["others"], found["w"]["share_against"], found["w"]["confidence"]) == (0, None, None)


def test_a_person_who_votes_twice_is_not_his_own_other_rater():
    rows = [("v0", "x", "ann", 1.0), ("v1", "x", "ann", 0.0), ("v2", "x", "bob", 0.0), ("v3", "x", "cid", 1.0)]
    votes = pl.DataFrame(rows, schema=["vote_id", "pair_id", "annotator_id", "label_0"], orient="row")
    nothing = pl.DataFrame(
        schema=dict.fromkeys(("side", "confidence", "stability", "minority_score", "metric"), pl.Float64)
        | {"pair_id": pl.String}
    )
    found = mino.minority(votes.with_columns(count=pl.lit(1)), nothing)
    assert found["others"].to_list() == [2, 2, 3, 3]
    # Against v0 stands bob alone; against v1 cid alone; against bob ann's first vote and cid; against cid two likewise.
    assert found["share_against"].to_list() == [1 / 2, 1 / 2, 2 / 3, 2 / 3]
