import polars as pl
import pytest

from pipelines import schemas
from pipelines.labels.consensus import consensus

SCORERS = ["a", "b", "c", "d"]
CASES = {
    # name: differences of a, b, c, d; the human label
    "united": ((1.0, 2.0, 0.1, 5.0), None),
    "three to one": ((-1.0, -2.0, 0.1, -5.0), 1.0),
    "one voice": ((0.0, 0.0, -0.1, None), 1.0),
    "even, human 1": ((9.0, 1.0, -0.1, -0.1), 1.0),
    "even, human 0": ((-9.0, 1.0, -0.1, 0.1), 0.2),
    "even, human even": ((-9.0, 1.0, 0.0, None), 0.5),
    "even, no human": ((-9.0, 1.0, 0.0, 0.0), None),
    "no scores": ((None, None, None, None), 1.0),
}


def frames(sign=1):
    names = list(CASES)
    differences = pl.DataFrame(
        {
            "pair_id": names,
            "prompt_id": ["p"] * len(names),
            "image_0_id": ["x"] * len(names),
            "image_1_id": ["y"] * len(names),
            **{
                f"d_{s}": pl.Series(
                    [None if CASES[n][0][k] is None else sign * CASES[n][0][k] for n in names], dtype=pl.Float64
                )
                for k, s in enumerate(SCORERS)
            },
        }
    )
    human = {n: v if sign == 1 else 1 - v for n, (_, v) in CASES.items() if v is not None}
    return differences, pl.DataFrame({"pair_id": list(human), "human_label_0": list(human.values())})


def result(policy, tie_breaker="", sign=1):
    table = schemas.CONSENSUS.conform(consensus(*frames(sign), SCORERS, policy, tie_breaker))
    assert table["pair_id"].to_list() == list(CASES)
    return {r["pair_id"]: r for r in table.iter_rows(named=True)}


def labels(policy, tie_breaker="", sign=1):
    return {name: (r["consensus_label_0"], r["decided_by"]) for name, r in result(policy, tie_breaker, sign).items()}


def test_votes_voters_and_agreement_are_counted():
    counted = {n: (r["votes_0"], r["votes_1"], r["voters"], r["agreement"]) for n, r in result("drop").items()}
    assert counted == {
        "united": (4, 0, 4, 1.0),
        "three to one": (1, 3, 4, 0.5),
        "one voice": (0, 1, 3, pytest.approx(1 / 3)),
        "even, human 1": (2, 2, 4, 0.0),
        "even, human 0": (2, 2, 4, 0.0),
        "even, human even": (1, 1, 3, 0.0),
        "even, no human": (1, 1, 4, 0.0),
        "no scores": (0, 0, 0, None),
    }


def test_the_majority_decides_whatever_the_policy_and_however_large_a_single_difference():
    for policy in ("drop", "human", "keep_order"):
        found = labels(policy)
        assert found["united"] == (1.0, "majority")
        assert found["three to one"] == (0.0, "majority")
        assert found["one voice"] == (0.0, "majority")


def test_an_even_vote_is_dropped():
    found = labels("drop")
    assert {n: v for n, v in found.items() if n.startswith("even")} == dict.fromkeys(
        [n for n in CASES if n.startswith("even")], (None, "none")
    )


def test_an_even_vote_is_decided_by_the_human_side_where_there_is_one():
    found = labels("human")
    assert found["even, human 1"] == (1.0, "human")
    assert found["even, human 0"] == (0.0, "human")
    assert found["even, human even"] == (None, "none")
    assert found["even, no human"] == (None, "none")


def test_an_even_vote_is_decided_by_the_tie_breaker_unless_it_is_even_itself_or_silent():
    found = labels("tie_breaker", "d")
    assert found["even, human 1"] == (0.0, "tie_breaker")
    assert found["even, human 0"] == (1.0, "tie_breaker")
    assert found["even, human even"] == (None, "none")
    assert found["even, no human"] == (None, "none")


def test_an_even_vote_keeps_the_order_of_the_ids():
    found = labels("keep_order")
    assert {found[n] for n in CASES if n.startswith("even")} == {(1.0, "keep_order")}


def test_a_pair_without_any_score_is_undecided_under_every_policy():
    for policy, breaker in (("drop", ""), ("human", ""), ("keep_order", ""), ("tie_breaker", "a")):
        assert labels(policy, breaker)["no scores"] == (None, "none")


@pytest.mark.parametrize(("policy", "breaker"), [("drop", ""), ("human", ""), ("tie_breaker", "a")])
def test_swapping_the_images_flips_labels_and_nothing_else(policy, breaker):
    here, there = labels(policy, breaker), labels(policy, breaker, sign=-1)
    for name in CASES:
        label, by = here[name]
        assert there[name] == (None if label is None else 1 - label, by)


def test_a_pair_with_human_votes_but_no_place_in_the_human_table_is_kept():
    differences, human = frames()
    assert len(consensus(differences, human.clear(), SCORERS, "human")) == len(CASES)


def test_an_unknown_policy_or_tie_breaker_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="expected drop, human, tie_breaker or keep_order, found 'coin'"):
        consensus(*frames(), SCORERS, "coin")
    with pytest.raises(ValueError, match="tie_breaker: expected one of"):
        consensus(*frames(), SCORERS, "tie_breaker", "e")
