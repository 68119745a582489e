import hashlib

import numpy as np
import polars as pl
import pytest

from pipelines import schemas
from pipelines.labels import calibration as cal
from pipelines.labels import consensus as con
from pipelines.labels.intervals import clustered_share

SCORERS = ["a", "b", "c", "d"]
CASES = {
    # name: differences of a, b, c, d; the human label
    "united": ((1.0, 2.0, 0.125, 5.0), None),
    "three to one": ((-1.0, -2.0, 0.125, -5.0), 1.0),
    "one voice": ((0.0, 0.0, -0.125, None), 1.0),
    "even, human 1": ((9.0, 1.0, -0.125, -0.125), 1.0),
    "even, human 0": ((-9.0, 1.0, -0.125, 0.125), 0.25),
    "even, human even": ((-9.0, 1.0, 0.0, None), 0.5),
    "even, no human": ((-9.0, 1.0, 0.0, 0.0), None),
    "no scores": ((None, None, None, None), 1.0),
}
EVEN = [n for n in CASES if n.startswith("even")]
OPTIONS = [
    *({"tie_policy": p} for p in ("drop", "human", "keep_order")),
    {"tie_policy": "tie_breaker", "tie_breaker": "d"},
    {"tie_policy": "human", "human_votes": True},
]
LABELS = ("consensus_label_0", "random_scorer_label_0", "raw_sum_label_0", "zscore_sum_label_0")


@pytest.fixture
def result(margins_of, swapped, hexadecimal):
    """Return name -> row of the consensus of CASES, or of the same with the images swapped."""

    def run(tie_policy="drop", tie_breaker="", is_swapped=False, scorers=SCORERS, **options):
        given = {s: [CASES[n][0][k] for n in CASES] for k, s in enumerate(SCORERS)}
        margins = margins_of({s: given[s] for s in scorers}, map(hexadecimal, CASES))
        human = pl.Series([h for _, h in CASES.values()], dtype=pl.Float64)
        if is_swapped:
            margins, human = swapped(margins), 1 - human
        table = con.consensus(margins, human, scorers, tie_policy, tie_breaker, **options)
        assert table["pair_id"].equals(margins["pair_id"])
        table = schemas.CONSENSUS.conform(table)
        return dict(zip(CASES, table.iter_rows(named=True), strict=True))

    return run


def labels(rows):
    return {name: (r["consensus_label_0"], r["decided_by"]) for name, r in rows.items()}


# --- the majority --------------------------------------------------------------------------------------------------


def test_votes_voters_and_agreement_are_counted(result):
    counted = {n: (r["votes_0"], r["votes_1"], r["voters"], r["agreement"]) for n, r in result().items()}
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


def test_every_scorers_vote_is_the_sign_of_its_difference_and_null_where_it_has_none(result):
    rows = result()
    assert [rows["one voice"][f"vote_{s}"] for s in SCORERS] == [0, 0, -1, None]
    assert [rows["three to one"][f"vote_{s}"] for s in SCORERS] == [-1, -1, 1, -1]
    assert [rows["no scores"][f"vote_{s}"] for s in SCORERS] == [None] * 4
    assert {r["vote_human"] for r in rows.values()} == {None}


def test_the_majority_decides_whatever_the_policy_and_however_large_a_single_difference(result):
    for options in OPTIONS[:4]:
        found = labels(result(**options))
        assert found["united"] == (1.0, "majority")
        assert found["three to one"] == (0.0, "majority")
        assert found["one voice"] == (0.0, "majority")


def test_an_even_vote_is_dropped(result):
    found = labels(result("drop"))
    assert {n: found[n] for n in EVEN} == dict.fromkeys(EVEN, (None, "none"))


def test_an_even_vote_is_decided_by_the_human_side_where_there_is_one(result):
    found = labels(result("human"))
    assert found["even, human 1"] == (1.0, "human")
    assert found["even, human 0"] == (0.0, "human")
    assert found["even, human even"] == (None, "none")
    assert found["even, no human"] == (None, "none")


def test_an_even_vote_is_decided_by_the_tie_breaker_unless_it_is_even_itself_or_silent(result):
    found = labels(result("tie_breaker", "d"))
    assert found["even, human 1"] == (0.0, "tie_breaker")
    assert found["even, human 0"] == (1.0, "tie_breaker")
    assert found["even, human even"] == (None, "none")
    assert found["even, no human"] == (None, "none")


def test_an_even_vote_keeps_the_order_of_the_ids(result):
    found = labels(result("keep_order"))
    assert {found[n] for n in EVEN} == {(1.0, "keep_order")}


def test_a_pair_without_any_score_is_undecided_under_every_policy(result):
    for options in OPTIONS[:4]:
        row = result(**options)["no scores"]
        assert (row["decided_by"], *(row[c] for c in LABELS)) == ("none", None, None, None, None)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o["tie_policy"] != "keep_order"], ids=str)
def test_swapping_the_images_flips_labels_and_votes_and_nothing_else(result, options):
    here, there = result(**options), result(is_swapped=True, **options)
    for name in CASES:
        for column, value in here[name].items():
            other = there[name][column]
            if column in ("votes_0", "votes_1"):
                assert other == here[name]["votes_1" if column == "votes_0" else "votes_0"]
            elif value is not None and column in LABELS:
                assert other == 1 - value
            elif value is not None and column.startswith("vote_"):
                assert other == -value
            else:
                assert other == value


def test_a_single_scorer_is_its_own_consensus(result):
    rows = result(scorers=["a"])
    for name, row in rows.items():
        d = CASES[name][0][0]
        expected = None if d is None or d == 0 else float(d > 0)
        assert [row[c] for c in LABELS] == [expected] * 4, name


def test_an_unknown_policy_or_tie_breaker_is_refused_with_the_choices(result):
    with pytest.raises(ValueError, match=r"expected one of \['drop', 'human', 'tie_breaker', 'keep_order'\], found 'c"):
        result("coin")
    with pytest.raises(ValueError, match=r"tie_breaker: expected one of \['a', 'b', 'c', 'd'\], found 'e'"):
        result("tie_breaker", "e")


# --- the humans as a voter -----------------------------------------------------------------------------------------


def test_the_humans_majority_is_one_voter_more(result):
    rows = result("drop", human_votes=True)
    counted = {
        n: (r["vote_human"], r["votes_0"], r["votes_1"], r["voters"], r["consensus_label_0"]) for n, r in rows.items()
    }
    assert counted == {
        "united": (None, 4, 0, 4, 1.0),
        "three to one": (1, 2, 3, 5, 0.0),
        "one voice": (1, 1, 1, 4, None),
        "even, human 1": (1, 3, 2, 5, 1.0),
        "even, human 0": (-1, 2, 3, 5, 0.0),
        "even, human even": (0, 1, 1, 4, None),
        "even, no human": (None, 1, 1, 4, None),
        "no scores": (1, 1, 0, 1, 1.0),
    }
    assert rows["three to one"]["agreement"] == pytest.approx(1 / 5)
    assert rows["even, human 1"]["decided_by"] == "majority"


def test_the_humans_vote_changes_none_of_the_baselines(result):
    with_humans, without = result(human_votes=True), result()
    for column in (*LABELS[1:], *(f"vote_{s}" for s in SCORERS)):
        assert {n: r[column] for n, r in with_humans.items()} == {n: r[column] for n, r in without.items()}


# --- the baselines of the ablation ---------------------------------------------------------------------------------


def test_the_raw_sum_follows_the_largest_difference_and_the_zscore_sum_the_largest_in_its_own_unit(margins_of):
    # a counts in hundreds, b in units: rms 250 and sqrt(12.5) = 3.54.
    margins = margins_of({"a": [50.0, -350.0, 0.0, None], "b": [-3.5, 3.5, -0.5, 1.0]})
    table = con.consensus(margins, pl.Series([None] * 4, dtype=pl.Float64), ["a", "b"], "drop")
    assert table["raw_sum_label_0"].to_list() == [1.0, 0.0, 0.0, None]
    # 50 / 250 - 3.5 / 3.54 < 0; -350 / 250 + 3.5 / 3.54 < 0.
    rms = [np.sqrt((50**2 + 350**2) / 3), np.sqrt((2 * 3.5**2 + 0.5**2 + 1) / 4)]
    z = [50 / rms[0] - 3.5 / rms[1], -350 / rms[0] + 3.5 / rms[1]]
    assert table["zscore_sum_label_0"].to_list() == [float(z[0] > 0), float(z[1] > 0), 0.0, None]
    assert z[0] < 0, "the two sums differ here"


def test_sums_that_are_zero_decide_nothing(margins_of):
    table = con.consensus(
        margins_of({"a": [1.0], "b": [-1.0]}), pl.Series([1.0]), ["a", "b"], "human", human_votes=False
    )
    row = table.row(0, named=True)
    assert (row["raw_sum_label_0"], row["zscore_sum_label_0"], row["consensus_label_0"]) == (None, None, 1.0)


def splitmix(x):
    """Finaliser of splitmix64 on Python integers (Steele, Lea and Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def drawn(margins, seed, scorers):
    """The scorer that each pair's random label comes from: every scorer has a value of its own to be seen by."""
    result = {}
    for k, name in enumerate(scorers):
        columns = {f"score_0_{s}": pl.lit(1.0 if s == name else -1.0, pl.Float32) for s in scorers}
        table = con.consensus(
            margins.with_columns(**columns),
            pl.Series([None] * len(margins), dtype=pl.Float64),
            scorers,
            "drop",
            seed=seed,
        )
        result[k] = table["random_scorer_label_0"].to_numpy() == 1
    found = np.stack(list(result.values()), 1)
    assert (found.sum(1) == 1).all(), "exactly one scorer is drawn"
    return np.array(scorers)[found.argmax(1)]


@pytest.fixture(scope="module")
def many(margins_of):
    return margins_of({s: [0.0] * 3_000 for s in SCORERS})


def test_the_random_scorer_is_the_one_with_the_smallest_hash(many):
    keys = {s: int.from_bytes(hashlib.sha256(f"7/{s}".encode()).digest()[:8], "big") for s in SCORERS}
    expected = [min(SCORERS, key=lambda s, p=pair: splitmix(int(p[:15], 16) ^ keys[s])) for pair in many["pair_id"]]
    assert drawn(many, 7, SCORERS).tolist() == expected


def test_the_draw_is_uniform_and_another_with_another_seed(many):
    first, second = drawn(many, 0, SCORERS), drawn(many, 1, SCORERS)
    for found in (first, second):
        counts = np.array([(found == s).sum() for s in SCORERS])
        # 3,000 pairs, four scorers: 750 each, standard deviation 24.
        assert np.abs(counts - 750).max() < 100
    # Independent draws are equal in a quarter of the pairs.
    assert (first == second).mean() == pytest.approx(0.25, abs=0.04)
    assert (first == drawn(many, 0, SCORERS)).all()


def test_the_draw_knows_a_scorer_by_its_name_and_a_pair_by_its_id(many):
    here = drawn(many, 0, SCORERS)
    assert (drawn(many, 0, SCORERS[::-1]) == here).all()
    shuffled = many.with_row_index("at").sample(fraction=1, shuffle=True, seed=3)
    assert (drawn(shuffled.drop("at"), 0, SCORERS) == here[shuffled["at"].to_numpy()]).all()
    # Without a scorer, the pairs that had drawn another one keep it.
    fewer = drawn(many, 0, SCORERS[:3])
    assert (fewer == here)[here != "d"].all()


def test_the_random_label_is_null_where_the_drawn_scorer_says_nothing(margins_of, many):
    ids = many["pair_id"][:200].to_list()
    names = drawn(many.head(200), 0, SCORERS)
    margins = margins_of(dict.fromkeys(SCORERS, [1.0] * 200) | {"a": [0.0] * 200, "b": [None] * 200}, ids)
    table = con.consensus(margins, pl.Series([None] * 200, dtype=pl.Float64), SCORERS, "drop")
    expected = [None if n in ("a", "b") else 1.0 for n in names]
    assert table["random_scorer_label_0"].to_list() == expected


# --- the report ----------------------------------------------------------------------------------------------------


@pytest.fixture
def reported(margins_of, votes_of, hexadecimal):
    """Five pairs of three prompts, two scorers; people's votes by hand."""
    # pair: differences of a and b; prompt; votes
    pairs = {
        "united right": ((1.0, 2.0), "p", [1.0, 1.0, 0.0]),
        "united wrong": ((-1.0, -2.0), "p", [1.0]),
        "split": ((1.0, -2.0), "q", [0.0, 0.0, 0.5]),
        "alone": ((1.0, None), "r", [1.0]),
        "without votes": ((1.0, 1.0), "r", []),
        "without scores": ((None, None), "r", [0.0]),
    }
    margins = margins_of(
        {s: [d[k] for d, _, _ in pairs.values()] for k, s in enumerate("ab")},
        map(hexadecimal, pairs),
        [hexadecimal(p) for _, p, _ in pairs.values()],
    )
    votes = votes_of([(hexadecimal(n), None, v) for n, (_, _, labels) in pairs.items() for v in labels])
    human = pl.Series([np.mean(v) if v else None for _, _, v in pairs.values()], dtype=pl.Float64)
    table = con.consensus(margins, human, ["a", "b"], "human")
    report = con.report(table, margins, cal.votes_per_pair(margins, votes), ["a", "b"])
    return {r[:2]: r[2:] for r in schemas.CONSENSUS_REPORT.conform(report).iter_rows()}


def test_the_report_has_every_way_at_every_level_of_agreement(reported):
    ways = ("majority", "random_scorer", "raw_sum", "zscore_sum", "a", "b")
    levels = ("all", "0 of 0", "1 of 1", "0 of 2", "2 of 2")
    assert set(reported) == {(w, n) for w in ways for n in levels}


def test_the_report_by_hand(reported):
    def counts(way, level):
        pairs, labelled, votes, accuracy, *_ = reported[way, level]
        return pairs, labelled, votes, accuracy

    assert counts("majority", "2 of 2") == (3, 3, 4, 2 / 4)
    # The humans decide the even pair, and would agree with themselves.
    assert counts("majority", "0 of 2") == (1, 0, 0, None)
    assert counts("majority", "1 of 1") == (1, 1, 1, 1.0)
    assert counts("majority", "0 of 0") == (1, 0, 0, None)
    assert counts("majority", "all") == (6, 4, 5, pytest.approx(3 / 5))
    assert counts("a", "all") == (6, 5, 7, pytest.approx(3 / 7))
    assert counts("b", "all") == (6, 4, 6, pytest.approx(4 / 6))
    assert counts("raw_sum", "0 of 2") == (1, 1, 2, 1.0)
    assert counts("raw_sum", "1 of 1") == (1, 0, 0, None)


def test_the_intervals_of_the_report_take_prompts_as_clusters(reported):
    # Right of all by prompt: p 2 of 4, r 1 of 1.
    expected = clustered_share(np.array([2.0, 1.0]), np.array([4.0, 1.0]), np.arange(2))
    assert reported["majority", "all"][3:] == pytest.approx(expected)
    assert reported["majority", "0 of 0"][3:] == (None, None, None)
    assert reported["majority", "2 of 2"][3:] == (0.5, None, None), "one prompt does not tell how prompts differ"


@pytest.mark.parametrize("options", [{"tie_policy": "human"}, {"tie_policy": "drop", "human_votes": True}], ids=str)
def test_scorers_that_know_nothing_agree_with_half_of_the_votes_whatever_the_humans_decide(
    margins_of, votes_of, hexadecimal, options
):
    rng = np.random.default_rng(5)
    names = [hexadecimal(k) for k in range(3_000)]
    margins = margins_of(
        {s: rng.normal(size=3_000) for s in "abcd"}, names, [hexadecimal(f"p{k}") for k in range(3_000)]
    )
    label = rng.integers(0, 2, 3_000).astype(float)
    votes = votes_of([(n, None, v) for n, v in zip(names, label, strict=True)])
    table = con.consensus(margins, pl.Series(label), list("abcd"), **options)
    report = con.report(table, margins, cal.votes_per_pair(margins, votes), list("abcd"))
    found = report.filter(pl.col("aggregation") == "majority", pl.col("accuracy").is_not_null())
    assert set(found["level"]) == {"all", "2 of 4", "4 of 4"}
    assert all(abs(a - 0.5) < 0.06 for a in found["accuracy"])


def test_the_levels_of_the_report_add_up_to_all(reported):
    for way in ("majority", "random_scorer", "raw_sum", "zscore_sum", "a", "b"):
        parts = [v for (w, level), v in reported.items() if w == way and level != "all"]
        assert [sum(p[k] for p in parts) for k in range(3)] == list(reported[way, "all"][:3])


def test_a_store_without_pairs_has_a_report_without_numbers(margins_of):
    margins = margins_of({"a": [1.0]}).clear()
    table = con.consensus(margins, pl.Series([], dtype=pl.Float64), ["a"], "drop")
    nobody = cal.votes_per_pair(
        margins, pl.DataFrame(schema={"pair_id": pl.String, "label_0": pl.Float64, "people": pl.Int64})
    )
    report = schemas.CONSENSUS_REPORT.conform(con.report(table, margins, nobody, ["a"]))
    assert set(report["level"]) == {"all"}
    assert set(report["pairs"]) == set(report["votes"]) == {0}
    assert report["accuracy"].null_count() == len(report)
