import math

import numpy as np
import polars as pl
import pytest
from scipy.stats import beta

from pipelines import schemas
from pipelines.labels import annotators as ann
from pipelines.labels import minority as mino
from pipelines.labels.intervals import clustered_share, wilson


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def counts_of(*observers):
    """Ratings of every unit with every value, [U, C], of one row per observer; None: no rating."""
    units = list(zip(*observers, strict=True))
    values = sorted({v for unit in units for v in unit if v is not None})
    return np.array([[sum(v == c for v in unit) for c in values] for unit in units])


# --- Krippendorff's alpha ------------------------------------------------------------------------------------------


def test_alpha_of_two_observers_and_a_binary_value_is_krippendorffs():
    """Krippendorff (2011), example A: ten articles, alpha = 0.095."""
    ann_, ben = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    # o_01 = o_10 = 4, n_0 = 14, n_1 = 6, n = 20: 1 - 19 * 4 / (14 * 6).
    alpha = ann.krippendorff_alpha(counts_of(ann_, ben))
    assert alpha == pytest.approx(1 - 19 * 4 / (14 * 6))
    assert round(alpha, 3) == 0.095


def test_alpha_of_two_observers_and_five_values_is_krippendorffs():
    """Krippendorff (2011), example B: twelve units, alpha = 0.692."""
    assert round(ann.krippendorff_alpha(counts_of("aabbdcccedda", "babbbccceddd")), 3) == 0.692


def test_alpha_of_four_observers_with_missing_ratings_is_krippendorffs():
    """Krippendorff (2011), examples C and D: twelve units, 41 ratings of which 40 can be paired, alpha = 0.743."""
    x = None
    observers = (
        (1, 2, 3, 3, 2, 1, 4, 1, 2, x, x, x),
        (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, x, 3),
        (x, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, x),
        (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, x),
    )
    counts = counts_of(*observers)
    assert (counts.sum(), counts[counts.sum(1) > 1].sum()) == (41, 40)
    assert round(ann.krippendorff_alpha(counts), 3) == 0.743


def test_alpha_is_one_of_perfect_agreement_and_negative_where_raters_agree_less_than_by_chance():
    assert ann.krippendorff_alpha(np.array([[3, 0], [0, 2], [4, 0]])) == 1.0
    assert ann.krippendorff_alpha(np.array([[1, 1], [1, 1]])) == pytest.approx(1 - (3 * 4) / 8)


def test_alpha_is_unknown_where_one_value_occurs_or_nothing_can_be_compared():
    assert ann.krippendorff_alpha(np.array([[3, 0], [2, 0]])) is None
    assert ann.krippendorff_alpha(np.array([[1, 0], [0, 1], [0, 0]])) is None
    assert ann.krippendorff_alpha(np.zeros((0, 3))) is None
    # A unit with one rating does not make its value occur.
    assert ann.krippendorff_alpha(np.array([[3, 0], [0, 1]])) is None


def test_alpha_of_people_who_draw_lots_is_zero():
    rng = np.random.default_rng(0)
    k = rng.binomial(5, 0.7, 20_000)
    assert ann.krippendorff_alpha(np.stack([k, 5 - k], 1)) == pytest.approx(0.0, abs=0.01)


# --- empirical Bayes -----------------------------------------------------------------------------------------------


def test_a_known_prior_is_recovered():
    rng = np.random.default_rng(0)
    n = rng.integers(5, 60, 4_000).astype(float)
    k = rng.binomial(n.astype(int), rng.beta(16, 4, 4_000)).astype(float)
    a, b = ann.beta_prior(k, n)
    assert a / (a + b) == pytest.approx(0.8, abs=0.01)
    assert a + b == pytest.approx(20, rel=0.15)


def test_the_prior_stays_within_its_bounds_where_all_are_alike_and_where_all_are_extreme():
    alike = ann.beta_prior(np.full(50, 8.0), np.full(50, 10.0))
    assert sum(alike) == pytest.approx(2_000, rel=1e-6)
    assert alike[0] / sum(alike) == pytest.approx(0.8, abs=0.01)
    extreme = ann.beta_prior(np.array([0.0, 50.0] * 20), np.full(40, 50.0))
    assert sum(extreme) == pytest.approx(2, rel=1e-6)
    for k in (0.0, 3.0):
        a, b = ann.beta_prior(np.array([k]), np.array([3.0]))
        assert min(a, b) > 0
        assert math.isfinite(a + b)


# --- the table of annotators ---------------------------------------------------------------------------------------


@pytest.fixture
def tables_of(margins_of, votes_of, hexadecimal):
    """Return the annotators table of votes on pairs of these prompts and ensemble logits, and its minority table."""

    def run(pairs, rows, was_swapped=None):
        prompts, logits = zip(*pairs.values(), strict=True)
        margins = margins_of({"s": [0.0] * len(pairs)}, pairs, map(hexadecimal, prompts))
        metrics = pl.DataFrame({"pair_id": margins["pair_id"], "logit": pl.Series(logits, dtype=pl.Float64)})
        metrics = metrics.with_columns(confidence_0=0.5, confidence_1=0.5, stability=0.5)
        votes = votes_of(rows, was_swapped)
        minority = schemas.MINORITY.conform(mino.minority(votes, margins, metrics)[0])
        return schemas.ANNOTATORS.conform(ann.annotators(votes, margins, minority)), minority

    return run


def by_id(table):
    return table.rows_by_key("annotator_id", named=True, unique=True)


def test_votes_ties_and_prompts_of_every_annotator_are_counted_and_unknown_people_are_one_row(tables_of):
    pairs = {"x": ("p", 1.0), "y": ("p", 1.0), "z": ("q", -1.0)}
    rows = [("x", "b", 1.0), ("y", "b", 0.5), ("z", "b", 0.0), ("x", None, 0.0, 4), ("z", None, 0.5), ("y", "a", 0.5)]
    table, _ = tables_of(pairs, rows)
    assert table.select("annotator_id", "votes", "ties", "prompts").rows() == [
        ("a", 0, 1, 1),
        ("b", 2, 1, 2),
        ("unknown", 4, 1, 2),
    ]


def test_who_was_compared_with_a_majority_and_who_agreed_with_it_by_hand(tables_of):
    pairs = {"x": ("p", 1.0), "y": ("q", 1.0), "z": ("r", 1.0)}
    rows = [("x", "a", 1.0), ("x", "b", 1.0), ("x", "c", 0.0)]
    # On x: a and b see one of either side, c sees two against him. On y the three agree. On z nobody else votes.
    rows += [("y", who, 0.0) for who in "abc"] + [("z", "a", 1.0), ("z", "d", 0.5)]
    found = by_id(tables_of(pairs, rows)[0])
    assert {w: (r["compared"], r["agreeing"]) for w, r in found.items()} == {
        "a": (1, 1),
        "b": (1, 1),
        "c": (2, 1),
        "d": (0, 0),
    }


def test_nobody_who_was_not_compared_has_a_reliability(tables_of):
    pairs = {"x": ("p", 1.0), "y": ("q", 1.0)}
    rows = [("x", "a", 1.0), ("x", "b", 1.0), ("y", "alone", 1.0), ("y", None, 0.5)]
    found = by_id(tables_of(pairs, rows)[0])
    columns = ("reliability", "reliability_low", "reliability_high")
    for who in ("alone", "unknown"):
        assert [found[who][c] for c in columns] == [None] * 3
    assert None not in [found["a"][c] for c in columns]
    nobody, _ = tables_of(pairs, [("x", "a", 1.0), ("y", "b", 0.0)])
    assert all(nobody[c].null_count() == 2 for c in columns)


def crowd(n=60, pairs=400, seed=0, raters=7):
    """Pairs of a prompt each, and votes of people of very different diligence and known skill."""
    rng = np.random.default_rng(seed)
    skill = rng.beta(16, 4, n)
    busy = rng.dirichlet(np.full(n, 0.5))
    rows = []
    for k in range(pairs):
        for a in rng.choice(n, raters, replace=False, p=(busy + 1e-3) / (busy + 1e-3).sum()):
            rows.append((f"x{k:04d}", f"a{a:02d}", float(rng.random() < skill[a])))
    return {f"x{k:04d}": (f"prompt {k}", 0.5) for k in range(pairs)}, rows, skill


def test_reliability_is_the_posterior_mean_and_its_quantiles_under_the_fitted_prior(tables_of):
    pairs, rows, _ = crowd()
    table, _ = tables_of(pairs, rows)
    assert (table["compared"] > 0).all()
    k, n = (table[c].to_numpy().astype(float) for c in ("agreeing", "compared"))
    # Every pair is a prompt of its own, with at most one vote per person: no design effect.
    a, b = ann.beta_prior(k, n)
    assert table["reliability"].to_list() == pytest.approx(((a + k) / (a + b + n)).tolist(), abs=1e-5)
    low, high = (beta.ppf(q, a + k, b + n - k) for q in (0.025, 0.975))
    assert table["reliability_low"].to_list() == pytest.approx(low.tolist(), abs=1e-5)
    assert table["reliability_high"].to_list() == pytest.approx(high.tolist(), abs=1e-5)


def test_who_voted_little_is_drawn_to_the_mean_and_has_a_wide_interval(tables_of):
    pairs, rows, _ = crowd()
    table = tables_of(pairs, rows)[0].with_columns(
        share=pl.col("agreeing") / pl.col("compared"), width=pl.col("reliability_high") - pl.col("reliability_low")
    )
    few, many = table.filter(pl.col("compared") <= 15), table.filter(pl.col("compared") >= 60)
    assert len(few) > 5 < len(many)
    mean = table["agreeing"].sum() / table["compared"].sum()

    def drawn(frame):
        return ((frame["reliability"] - mean).abs() / (frame["share"] - mean).abs()).median()

    assert drawn(few) < 0.6 < 0.7 < drawn(many) < 1
    assert few["width"].min() > many["width"].max()


def test_several_votes_on_one_prompt_are_worth_less_than_as_many_on_several(tables_of):
    pairs, rows, _ = crowd(pairs=200)
    # The same votes four times: as independent prompts, and as four pairs of one prompt.
    copies = [(f"{p}/{c}", a, v) for p, a, v in rows for c in range(4)]
    apart = {f"{p}/{c}": (f"{q} {c}", h) for p, (q, h) in pairs.items() for c in range(4)}
    together = {f"{p}/{c}": (q, h) for p, (q, h) in pairs.items() for c in range(4)}
    once, single, grouped = (tables_of(*v)[0] for v in ((pairs, rows), (apart, copies), (together, copies)))

    def width(table):
        return (table["reliability_high"] - table["reliability_low"]).mean()

    assert grouped["compared"].equals(single["compared"])
    assert width(single) < 0.95 * width(once)
    assert width(grouped) == pytest.approx(width(once), rel=0.02)


def test_the_annotators_score_is_that_of_minority_summed_over_all_prompts(tables_of):
    pairs = {"x": ("p", 2.0), "y": ("p", -1.0), "z": ("q", None)}
    rows = [("x", "a", 1.0), ("y", "a", 1.0), ("z", "a", 1.0), ("x", None, 0.0), ("x", "b", 0.5), ("y", "c", 0.0, 3)]
    found = by_id(tables_of(pairs, rows)[0])
    surplus = (1 - sigmoid(2)) - sigmoid(1)
    # The vote on z, whose pair lacks a score, does not count.
    assert found["a"]["annotator_score"] == pytest.approx(surplus / 22)
    assert found["c"]["annotator_score"] == pytest.approx(3 * (1 - sigmoid(1)) / 23)
    assert found["b"]["annotator_score"] == found["unknown"]["annotator_score"] == 0.0


def test_the_score_of_a_vote_on_a_prompt_that_counts_nothing_is_its_annotators(tables_of):
    """On a pair without all scores minority's r leaves nothing out, so it is the annotators table's."""
    pairs, rows, _ = crowd(pairs=60)
    pairs["unscored"] = ("a prompt of its own", None)
    people = sorted({a for _, a, _ in rows})
    table, minority = tables_of(pairs, rows + [("unscored", a, 1.0) for a in people])
    own = minority.filter(pl.col("pair_id") == "unscored").sort("annotator_id")
    assert own["annotator_score"].to_list() == pytest.approx(table["annotator_score"].to_list(), abs=1e-12)


def test_position_bias_counts_decided_votes_whose_display_order_is_known(tables_of):
    pairs = {"x": ("p", 1.0), "y": ("q", 1.0), "z": ("r", 1.0)}
    rows = [("x", "a", 1.0), ("y", "a", 1.0), ("z", "a", 0.0), ("x", "a", 0.5), ("y", "a", 0.0), ("x", "b", 1.0, 4)]
    # Displayed first: image_0, image_1, image_1, image_0, not known, image_0.
    table, _ = tables_of(pairs, rows, [False, True, True, False, None, False])
    a, b = (by_id(table)[w] for w in "ab")
    assert (a["placed"], a["first_share"]) == (3, pytest.approx(2 / 3))
    low, high = wilson(2 / 3, 3)
    assert (a["first_low"], a["first_high"]) == pytest.approx((float(low), float(high)))
    assert (b["placed"], b["first_share"]) == (4, 1.0)


def test_where_no_display_order_is_known_there_is_no_position_bias(tables_of):
    row = by_id(tables_of({"x": ("p", 1.0)}, [("x", "a", 1.0)])[0])["a"]
    assert (row["placed"], row["first_share"], row["first_low"], row["first_high"]) == (0, None, None, None)


def test_no_votes_and_ties_alone_give_a_table(tables_of):
    assert len(tables_of({"x": ("p", 1.0)}, [])[0]) == 0
    row = by_id(tables_of({"x": ("p", 1.0)}, [("x", "a", 0.5)], [True])[0])["a"]
    assert (row["votes"], row["ties"], row["placed"], row["annotator_score"]) == (0, 1, 0, 0.0)


# --- the table of agreement ----------------------------------------------------------------------------------------


@pytest.fixture
def agreement_of(margins_of, votes_of, hexadecimal):
    """Return source -> row of rater_agreement of votes on pairs of these prompts."""

    def run(prompts, rows, was_swapped=None):
        margins = margins_of({"s": [0.0] * len(prompts)}, prompts, map(hexadecimal, prompts.values()))
        table = schemas.RATER_AGREEMENT.conform(ann.rater_agreement(votes_of(rows, was_swapped), margins))
        return table.rows_by_key("source", named=True, unique=True)

    return run


ROWS = [
    # pair, annotator, label, people, source
    ("x", "a", 1.0, 1, "one"),
    ("x", "b", 1.0, 1, "one"),
    ("x", "c", 0.0, 1, "one"),
    ("x", None, 0.5, 1, "two"),
    ("y", "a", 0.0, 1, "one"),
    ("y", None, 0.0, 2, "two"),
    ("z", "d", 1.0, 1, "one"),
]


def test_agreement_is_counted_by_hand_per_source_and_for_all(agreement_of):
    found = agreement_of({"x": "p", "y": "q", "z": "r"}, ROWS)
    assert list(found) == ["one", "two", "all"]
    counts = ("pairs", "ratings", "raters", "minority_share")
    assert [found["one"][c] for c in counts] == [1, 3, 3, pytest.approx(1 / 3)]
    # y: two unknown people; x and z have one rating or none in this source.
    assert [found["two"][c] for c in counts] == [1, 2, 0, None]
    # x: 2 : 1 decided; y: 3 : 0.
    assert [found["all"][c] for c in counts] == [2, 7, 3, pytest.approx(1 / 6)]


def test_alpha_takes_a_tie_as_a_third_value_and_that_of_decided_votes_leaves_it_out(agreement_of):
    found = agreement_of({"x": "p", "y": "q", "z": "r"}, ROWS)
    assert found["all"]["alpha"] == pytest.approx(ann.krippendorff_alpha(np.array([[1, 1, 2], [3, 0, 0]])))
    assert found["all"]["alpha_decided"] == pytest.approx(ann.krippendorff_alpha(np.array([[1, 2], [3, 0]])))
    assert found["two"]["alpha"] is None, "one value occurs"


def test_the_position_bias_of_a_source_is_counted_with_its_interval(agreement_of):
    swaps = [False, True, None, False, True, True, None]
    row = agreement_of({"x": "p", "y": "q", "z": "r"}, ROWS, swaps)["all"]
    # Decided with a known order: x a (first), x b (second), y a (first: image_1 stood first), y two people (first).
    expected = clustered_share(np.array([1.0, 3.0]), np.array([2.0, 3.0]), np.arange(2))
    low, high = expected[1:]
    assert [row[c] for c in ("placed", "first_share", "first_low", "first_high")] == [5, 0.8, low, high]


def rated_by_many(prompts=60, per_prompt=3, raters=5, seed=0):
    rng = np.random.default_rng(seed)
    pairs, rows = {}, []
    for k in range(prompts):
        for j in range(per_prompt):
            pair = f"{k:03d}/{j}"
            pairs[pair] = f"prompt {k}"
            share = rng.beta(0.7, 0.7)
            rows += [(pair, None, float(rng.random() < share)) for _ in range(raters)]
    return pairs, rows


def test_the_interval_of_alpha_is_the_same_every_time_and_holds_alpha(agreement_of):
    first, second = (agreement_of(*rated_by_many())["all"] for _ in range(2))
    assert first == second
    assert first["alpha_low"] < first["alpha"] < first["alpha_high"]
    assert first["alpha_high"] - first["alpha_low"] < 0.3
    wide = agreement_of(*rated_by_many(prompts=10))["all"]
    assert wide["alpha_high"] - wide["alpha_low"] > 1.3 * (first["alpha_high"] - first["alpha_low"])


def test_the_interval_of_alpha_covers_the_truth(agreement_of):
    """Alpha of endless raters whose shares are Beta(a, a) is 1 / (2 a + 1)."""
    truth = 1 / (2 * 0.7 + 1)
    inside = 0
    for seed in range(20):
        row = agreement_of(*rated_by_many(prompts=40, per_prompt=1, seed=seed))["all"]
        inside += row["alpha_low"] <= truth <= row["alpha_high"]
    assert inside >= 16


def test_the_interval_resamples_prompts_and_not_pairs(agreement_of):
    """Every pair four times: as pairs of one prompt they say nothing more, as prompts of their own they would."""
    pairs, rows = rated_by_many(per_prompt=1)
    copies = [(f"{p}/{c}", a, v) for p, a, v in rows for c in range(4)]
    together = {f"{p}/{c}": q for p, q in pairs.items() for c in range(4)}
    apart = {f"{p}/{c}": f"{q} {c}" for p, q in pairs.items() for c in range(4)}

    def width(*given):
        row = agreement_of(*given)["all"]
        return row["alpha_high"] - row["alpha_low"]

    once = width(pairs, rows)
    assert width(together, copies) == pytest.approx(once, rel=0.05)
    assert width(apart, copies) < 0.65 * once


def test_one_prompt_alone_has_an_alpha_without_an_interval(agreement_of):
    row = agreement_of({"x": "p"}, [("x", None, 1.0, 3), ("x", None, 0.0)])["all"]
    assert row["alpha"] is not None
    assert (row["alpha_low"], row["alpha_high"]) == (None, None)


def test_one_vote_per_pair_and_no_votes_have_no_agreement(agreement_of):
    unknown = ("alpha", "alpha_low", "alpha_high", "alpha_decided", "minority_share", "first_share")
    for rows in ([("x", "a", 1.0), ("y", "a", 0.0)], []):
        row = agreement_of({"x": "p", "y": "q"}, rows)["all"]
        assert (row["pairs"], row["ratings"], row["raters"], row["placed"]) == (0, 0, 0, 0)
        assert [row[c] for c in unknown] == [None] * 6


def test_whoever_always_chooses_the_first_picture_has_a_share_within_the_scale(tables_of):
    # Wilson's upper end of 11 of 11 is above 1 by rounding.
    pairs = {f"x{k}": (f"p{k}", 0.5) for k in range(11)}
    table, _ = tables_of(pairs, [(p, "a", 1.0) for p in pairs], was_swapped=[False] * 11)
    assert schemas.ANNOTATORS.conform(table)["first_high"].to_list() == [1.0]
