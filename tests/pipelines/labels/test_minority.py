import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipelines import schemas
from pipelines.labels import margins as mar
from pipelines.labels import minority as mino

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens" / "adaptive_dpo.json"
METRICS = ("confidence", "stability", "metric", "minority_score")


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


# --- c, v, u -------------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics_of(margins_of, calibration_of, prompt_of):
    """Return logit, c of either side and v of a pair whose differences are these, in root mean squares.

    Two more pairs give every scorer the root mean square of its unit: a counts in twos, b in eighths.
    """
    unit = {"a": 2.0, "b": 0.125}

    def run(**d):
        given = {}
        for scorer, value in d.items():
            square = 3 - value**2 if value is not None else 2.0
            given[scorer] = [x if x is None else x * unit[scorer] for x in (value, math.sqrt(square / 2))]
            given[scorer].append(given[scorer][1])
        margins = margins_of(given, ["x", "y", "z"], [prompt_of(2), prompt_of(0), prompt_of(1)])
        weights = {"a": {"weight": 0.5}, "b": {"weight": -0.25}}
        calibration = calibration_of(only=2, **{s: {"slope": 1.0, "rms": unit[s], **weights[s]} for s in d})
        return mino.pair_metrics(margins, calibration, list(d)).row(0, named=True)

    return run


def test_united_annotators_disagree_with_the_other_side_only(metrics_of):
    found = metrics_of(a=1.0, b=1.0)
    assert found["confidence_0"] == pytest.approx(1 - sigmoid(3.75))
    assert found["confidence_1"] == pytest.approx(sigmoid(3.75))
    assert found["stability"] == pytest.approx(0.0, abs=1e-6), "u of a stably wrong vote is 0: the product's weakness"


def test_opposed_annotators_are_undecided_and_maximally_unstable(metrics_of):
    found = metrics_of(a=1.0, b=-1.0)
    assert found["confidence_0"] == pytest.approx(0.5)
    assert found["confidence_1"] == pytest.approx(0.5)
    assert found["stability"] == 1.0, "the standard deviation 5.3 is clamped"


def test_close_annotators_by_hand(metrics_of):
    found = metrics_of(a=0.1, b=0.0)
    # z = 0.375 and 0: unbiased standard deviation 0.375 / sqrt(2).
    assert found["confidence_0"] == pytest.approx(1 - (sigmoid(0.375) + 0.5) / 2)
    assert found["stability"] == pytest.approx(0.375 / math.sqrt(2))


def test_the_logit_has_the_weights_of_the_prompts_fold(metrics_of):
    assert metrics_of(a=1.5, b=1.0)["logit"] == pytest.approx(0.5 * 1.5 - 0.25 * 1.0)


def test_swapping_the_images_swaps_the_sides_and_changes_nothing_else(metrics_of):
    here, there = metrics_of(a=0.3, b=-0.7), metrics_of(a=-0.3, b=0.7)
    assert here["confidence_0"] == pytest.approx(there["confidence_1"])
    assert here["confidence_1"] == pytest.approx(there["confidence_0"])
    assert here["stability"] == pytest.approx(there["stability"])
    assert here["logit"] == pytest.approx(-there["logit"])


def test_a_missing_score_leaves_every_metric_null(metrics_of):
    for found in (metrics_of(a=1.0, b=None), metrics_of(a=None, b=None)):
        assert [v for k, v in found.items() if k != "pair_id"] == [None] * 4


def test_a_single_annotator_has_no_stability(metrics_of):
    found = metrics_of(a=1.0)
    assert found["confidence_0"] == pytest.approx(1 - sigmoid(3.75))
    assert found["stability"] is None


@pytest.mark.skipif(not GOLDENS.exists(), reason="golden values of the released program are not at hand")
def test_c_v_u_equal_the_released_programs_with_its_three_annotators_as_scorers(
    margins_of, calibration_of, monkeypatch
):
    """Its z is 15 * s / |s| over the batch: RHO * s / rms(s) with RHO = 15 / sqrt(B), which is 3.75 at B = 16."""
    cases = [c for c in json.loads(GOLDENS.read_text()) if "weight" in c and c["args"]["use_logits_normalization"]]
    assert {c["batch"] for c in cases} >= {4, 16}
    names = ("policy", "ema_slow", "ema_fast")
    clamped = set()
    for case in cases:
        gap = {k: np.array(case[f"{k}_w"]) - np.array(case[f"{k}_l"]) for k in (*names, "ref")}
        margin = {k: gap["ref"] - gap[k] for k in names}
        rho = case["args"]["logits_rho"] / math.sqrt(case["batch"])
        if case["batch"] == 16:
            assert rho == mino.RHO
        monkeypatch.setattr(mino, "RHO", rho)
        rms = {k: float(np.sqrt((margin[k] ** 2).mean())) for k in names}
        calibration = calibration_of(**{k: {"slope": 1.0, "weight": 1.0, "rms": rms[k]} for k in names})
        found = mino.pair_metrics(margins_of(margin), calibration, list(names))
        assert found["stability"].to_list() == pytest.approx(case["train_std"], rel=1e-3)
        assert (found["confidence_0"] * found["stability"]).to_list() == pytest.approx(
            case["weight"], rel=2e-3, abs=2e-6
        )
        clamped |= {v == 1 for v in case["train_std"]}
        monkeypatch.undo()
    assert clamped == {True, False}


# --- the other raters ----------------------------------------------------------------------------------------------


def others_of(votes_of, rows):
    """(others, against) of votes of (pair number, annotator, label, people=1)."""
    votes = votes_of([(str(r[0]), *r[1:]) for r in rows])
    those = mino.rated(votes, np.array([r[0] for r in rows]))
    return list(zip(those.others.tolist(), those.against.tolist(), strict=True))


def test_the_other_raters_are_those_of_the_same_pair_and_what_they_chose_is_counted(votes_of):
    rows = [(0, "a", 1.0), (1, "a", 0.0), (0, "b", 0.0), (0, "c", 0.0), (2, "d", 1.0), (1, "c", 0.0)]
    assert others_of(votes_of, rows) == [(2, 2), (1, 0), (2, 1), (2, 1), (0, 0), (1, 0)]


def test_a_person_who_votes_twice_is_not_his_own_other_rater(votes_of):
    rows = [(0, "ann", 1.0), (0, "ann", 0.0), (0, "bob", 0.0), (0, "cid", 1.0)]
    # Against ann's first vote stands bob alone, against her second cid; against bob her first and cid; so with cid.
    assert others_of(votes_of, rows) == [(2, 1), (2, 1), (3, 2), (3, 2)]


def test_a_vote_counts_as_many_people_as_it_stands_for(votes_of):
    rows = [(0, None, 1.0, 7), (0, None, 0.0, 3)]
    # One of the seven has six others with him and three against.
    assert others_of(votes_of, rows) == [(9, 3), (9, 7)]


def test_a_known_annotators_row_of_several_people_is_left_out_as_a_whole(votes_of):
    assert others_of(votes_of, [(0, "team", 1.0, 4), (0, "b", 0.0)]) == [(1, 1), (4, 4)]
    assert others_of(votes_of, [(0, "team", 1.0, 4), (0, "team", 1.0, 2), (0, "b", 0.0)]) == [(1, 1), (1, 1), (6, 6)]


def test_unknown_people_are_all_other_people(votes_of):
    assert others_of(votes_of, [(0, None, 1.0), (0, None, 1.0), (0, None, 0.0)]) == [(2, 1), (2, 1), (2, 2)]


def test_others_equal_a_count_over_all_people_one_by_one(votes_of):
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 30))
        who = rng.choice(["a", "b", "c", ""], n)
        rows = [
            (int(p), w or None, float(s), int(k))
            for p, w, s, k in zip(rng.integers(0, 4, n), who, rng.integers(0, 2, n), rng.integers(1, 4, n), strict=True)
        ]
        # One entry per person: pair, who (an unknown person is somebody of his own), side.
        people = [(p, w or (i, j), s) for i, (p, w, s, k) in enumerate(rows) for j in range(k)]
        expected = []
        for i, (p, w, s, _) in enumerate(rows):
            others = [v for q, x, v in people if q == p and x != (w or (i, 0))]
            expected.append((len(others), sum(v != s for v in others)))
        assert others_of(votes_of, rows) == expected


# --- the annotator's score -----------------------------------------------------------------------------------------


def score_of(votes_of, rows):
    """r of votes of (annotator, signed logit, prompt, people=1)."""
    votes = votes_of([(str(i), r[0], 1.0, *r[3:]) for i, r in enumerate(rows)])
    those = mino.rated(votes, np.arange(len(rows)))
    return mino.annotator_score(those, np.array([r[1] for r in rows]), np.array([r[2] for r in rows])).tolist()


def test_the_surplus_is_agreement_less_what_one_would_expect():
    found = mino.agreement_surplus(np.array([2.0, -2.0, 0.0, np.nan]))
    assert found == pytest.approx([1 - sigmoid(2), -sigmoid(2), 0.0, 0.0])


def test_the_score_is_the_surplus_of_the_votes_on_other_prompts_over_their_number_and_twenty(votes_of):
    rows = [("a", 2.0, 0), ("a", -1.0, 0), ("a", 1.0, 1), ("b", 3.0, 0), (None, 1.0, 2), ("a", -2.0, 2)]
    surplus = [1 - sigmoid(2), -sigmoid(1), 1 - sigmoid(1), 0, 0, -sigmoid(2)]
    on = {0: surplus[0] + surplus[1], 1: surplus[2], 2: surplus[5]}
    assert score_of(votes_of, rows) == pytest.approx(
        [(on[1] + on[2]) / 22] * 2 + [(on[0] + on[2]) / 23, 0.0, 0.0, (on[0] + on[1]) / 23], abs=1e-12
    )


def test_a_vote_of_several_people_counts_so_often(votes_of):
    rows = [("a", 2.0, 0, 3), ("a", 1.0, 1)]
    assert score_of(votes_of, rows) == pytest.approx([(1 - sigmoid(1)) / 21, 3 * (1 - sigmoid(2)) / 23])


def test_a_vote_on_a_pair_without_all_scores_is_not_counted_and_has_a_score_nevertheless(votes_of):
    rows = [("a", math.nan, 0), ("a", 1.0, 1), ("a", 0.0, 2)]
    expected = (1 - sigmoid(1)) / 22, 0.0, (1 - sigmoid(1)) / 21
    assert score_of(votes_of, rows) == pytest.approx(expected, abs=1e-12)


def test_an_unknown_annotator_and_one_with_a_single_prompt_have_score_zero(votes_of):
    rows = [(None, 1.0, 0), (None, 1.0, 1), ("a", 1.0, 0), ("a", -1.0, 0)]
    assert score_of(votes_of, rows) == pytest.approx([0.0] * 4, abs=1e-15)


def test_who_votes_as_the_ensemble_expects_has_a_score_near_zero_and_who_goes_against_it_a_negative_one(votes_of):
    rng = np.random.default_rng(0)
    h = rng.normal(0, 2, 4_000)
    usual = np.where(rng.random(4_000) < sigmoid(h), h, -h)
    rows = [("usual", x, i) for i, x in enumerate(usual)] + [("contrary", -abs(x), i) for i, x in enumerate(h)]
    found = score_of(votes_of, rows)
    assert max(map(abs, found[:4_000])) < 0.03
    assert max(found[4_000:]) < -0.5


# --- the table -----------------------------------------------------------------------------------------------------


@pytest.fixture
def table_of(margins_of, votes_of, prompt_of):
    """Return the minority table and the lesson of votes on pairs with these logits, each pair of a prompt of its own."""

    def run(logits, rows, em=False, stability=0.5):
        margins = margins_of({"s": [0.0] * len(logits)}, logits, [prompt_of(k % 5, k // 5) for k in range(len(logits))])
        values = pl.Series(list(logits.values()), dtype=pl.Float64)
        metrics = pl.DataFrame(
            {
                "pair_id": margins["pair_id"],
                "logit": values,
                "confidence_0": pl.Series([0.25] * len(logits)),
                "confidence_1": pl.Series([0.75] * len(logits)),
                "stability": pl.Series([stability] * len(logits), dtype=pl.Float64),
            }
        ).with_columns(pl.when(values.is_not_null()).then(c) for c in ("confidence_0", "confidence_1", "stability"))
        table, lesson = mino.minority(votes_of(rows), margins, metrics, em=em)
        return schemas.MINORITY.conform(table), lesson

    return run


def test_the_table_has_one_row_per_decided_vote_with_the_metrics_of_its_side(table_of):
    rows = [("y", "b", 0.0), ("x", "a", 1.0), ("x", None, 0.5), ("x", None, 0.0, 2)]
    table, _ = table_of({"x": 2.0, "y": -1.0}, rows)
    keys = ("vote_id", "pair_id", "annotator_id", "label_0", "people")
    assert table.select(keys).rows() == [
        ("v1", "x", "a", 1.0, 1),
        ("v3", "x", None, 0.0, 2),
        ("v0", "y", "b", 0.0, 1),
    ]
    assert table["confidence"].to_list() == [0.25, 0.75, 0.75]
    assert table["stability"].to_list() == [0.5] * 3
    assert table["metric"].to_list() == [0.125, 0.375, 0.375]
    assert table["minority_score"].to_list() == pytest.approx([1 - sigmoid(2), sigmoid(2), 1 - sigmoid(1)])
    assert table["others"].to_list() == [2, 2, 0]
    assert table["share_against"].to_list() == [1.0, 0.5, None]
    assert table["em_probability"].to_list() == [None] * 3


def test_where_all_agree_nobody_is_against(table_of):
    table, _ = table_of({"x": 1.0}, [("x", a, 1.0) for a in "abc"])
    assert table["share_against"].to_list() == [0.0] * 3


def test_ties_alone_and_no_votes_at_all_give_an_empty_table_and_say_so(table_of):
    for rows in ([("x", "a", 0.5), ("x", "b", 0.5)], []):
        for em in (False, True):
            table, lesson = table_of({"x": 1.0}, rows, em)
            assert len(table) == 0
            assert (lesson.calibrated_on, lesson.targets, lesson.share_clamped) == ((), 0, None)
            assert lesson.note.startswith("uncalibrated: 0 votes have other raters with a majority")


def test_a_vote_on_a_pair_without_all_scores_is_a_row_whose_metrics_are_null(table_of):
    table, _ = table_of({"x": None}, [("x", "a", 1.0), ("x", "b", 0.0)])
    for column in (*METRICS, "minority_probability"):
        assert table[column].to_list() == [None, None]
    assert table["share_against"].to_list() == [1.0, 1.0]
    assert table["annotator_score"].to_list() == [0.0, 0.0]


def test_with_one_scorer_there_is_no_stability_and_no_metric(table_of):
    table, lesson = table_of({"x": 1.0}, [("x", "a", 1.0)], stability=None)
    assert table.select("confidence", "stability", "metric").row(0) == (0.25, None, None)
    assert lesson.share_clamped is None


def test_how_often_v_is_clamped_is_a_share_of_the_votes_that_have_one(table_of):
    rows = [("x", "a", 1.0), ("y", "a", 1.0)]
    assert table_of({"x": 1.0, "y": None}, rows, stability=1.0)[1].share_clamped == 1.0
    assert table_of({"x": 1.0, "y": None}, rows)[1].share_clamped == 0.0


def test_a_vote_on_a_pair_that_the_margins_lack_is_refused(table_of):
    with pytest.raises(ValueError, match="1 votes are on pairs that `margins` lacks"):
        table_of({"x": 1.0}, [("x", "a", 1.0), ("z", "a", 1.0)])


def test_swapping_the_images_turns_the_votes_and_nothing_else(table_of):
    rng = np.random.default_rng(1)
    logits = {f"p{k:03d}": float(h) for k, h in enumerate(rng.normal(0, 1.5, 120))}
    rows = [(p, f"a{rng.integers(9)}", float(rng.random() < sigmoid(h))) for p, h in logits.items() for _ in range(5)]
    here, _ = table_of(logits, rows, em=True)
    there, _ = table_of({p: -h for p, h in logits.items()}, [(p, a, 1 - v) for p, a, v in rows], em=True)
    assert here["minority_probability"].null_count() == 0
    assert here["label_0"].equals(1 - there["label_0"])
    for column in ("minority_score", "annotator_score", "minority_probability", "em_probability", "share_against"):
        assert here[column].to_list() == pytest.approx(there[column].to_list(), abs=1e-9)


# --- minority_probability ------------------------------------------------------------------------------------------


def drawn_votes(pairs=2_000, raters=7, minority=0.25, seed=0, known=True):
    """Logits of pairs and votes: most people choose by what the logit is near, a share of people by its opposite."""
    rng = np.random.default_rng(seed)
    h = rng.normal(0, 1.5, pairs)
    is_contrary = rng.random(100) < minority
    logits = {f"{k:06d}": float(x) for k, x in enumerate(0.5 * h + rng.normal(0, 0.75, pairs))}
    rows = []
    for pair, x in zip(logits, h, strict=True):
        for a in rng.choice(100, raters, replace=False):
            p = sigmoid(-x if is_contrary[a] else x)
            rows.append((pair, f"ann{a:02d}" if known else None, float(rng.random() < p)))
    return logits, rows


def test_with_one_vote_per_pair_there_is_no_minority_probability_and_the_note_says_why(table_of):
    logits, rows = drawn_votes(pairs=300, raters=1)
    table, lesson = table_of(logits, rows)
    assert table["minority_probability"].null_count() == len(table) == 300
    assert table["others"].to_list() == [0] * 300
    assert table["share_against"].null_count() == 300
    facts = lesson.facts()
    assert (facts["calibrated_on"], facts["targets"], facts["ece"], facts["weights"]) == ((), 0, None, ())
    assert facts["calibration_note"].startswith("uncalibrated: 0 votes have other raters with a majority")
    assert "needed without any fold of prompts: 50" in facts["calibration_note"]


def test_votes_whose_other_raters_are_even_and_pairs_of_two_teach_nothing(table_of):
    even = [(p, a, v) for p in ("x", "y") for a, v in zip("abc", (1.0, 1.0, 0.0), strict=True)]
    # Of three votes 2 : 1 the two of the majority have others who are even; the third's agree.
    assert table_of({"x": 1.0, "y": 1.0}, even)[1].targets == 2
    assert table_of({"x": 1.0, "y": 1.0}, [r for r in even if r[1] != "c"])[1].targets == 0


def test_nothing_is_learned_where_all_others_always_agree(table_of):
    logits = {f"{k:03d}": 1.0 for k in range(100)}
    table, lesson = table_of(logits, [(p, a, 1.0) for p in logits for a in "abc"])
    assert lesson.targets == 300
    assert lesson.note.startswith("uncalibrated")
    assert table["minority_probability"].null_count() == 300


def test_a_known_logistic_is_recovered(table_of):
    """Of ten unknown people on a pair nine agree; the ensemble's logit g says which side with probability sigmoid(g).

    By Bayes' rule a vote is then against the other nine's majority with log odds log(1 / 9) - g, g signed towards it.
    """
    rng = np.random.default_rng(5)
    logits, rows = {}, []
    for k, g in enumerate(rng.normal(0, 1.5, 6_000)):
        pair, side = f"{k:06d}", float(rng.random() < sigmoid(g))
        logits[pair] = float(g)
        rows += [(pair, None, side, 9), (pair, None, 1 - side, 1)]
    table, lesson = table_of(logits, rows)
    assert (lesson.targets, lesson.share) == (60_000, pytest.approx(0.1))
    weights = np.array(lesson.weights)
    assert weights.shape == (mar.FOLDS + 1, 4)
    expected = np.tile([-1.0, 0.0, 0.0, math.log(1 / 9)], (mar.FOLDS + 1, 1))
    assert weights == pytest.approx(expected, abs=0.12)
    assert lesson.ece < 0.005
    toward = np.log(1 / table["minority_score"] - 1)
    truth = sigmoid(math.log(1 / 9) - toward)
    assert table["minority_probability"].to_list() == pytest.approx(truth.tolist(), abs=0.05)


def test_minority_probability_is_nearer_to_the_others_than_the_score_or_the_share_is(table_of):
    logits, rows = drawn_votes()
    table, lesson = table_of(logits, rows)
    assert lesson.calibrated_on == ("s",)
    assert lesson.ece < 0.05
    known = table.filter(pl.col("share_against") != 0.5)
    p, y = known["minority_probability"].to_numpy(), (known["share_against"] > 0.5).to_numpy()
    assert lesson.targets == len(known)
    assert lesson.share == pytest.approx(y.mean())
    score = known["minority_score"].to_numpy()
    brier = {"learned": ((p - y) ** 2).mean(), "score": ((score - y) ** 2).mean(), "share": y.mean() * (1 - y.mean())}
    assert brier["learned"] < 0.975 * brier["score"] < brier["share"]
    # Who goes against the ensemble is against the others more often: r counts against it.
    weights = np.array(lesson.weights)
    assert (weights[:, [0, 2]] < 0).all()


def test_what_several_raters_teach_is_applied_to_pairs_with_one_vote_and_names_its_source(
    margins_of, votes_of, prompt_of
):
    logits, rows = drawn_votes(pairs=400)
    single = {f"{k:06d}": h for k, h in zip(range(900_000, 900_050), logits.values(), strict=False)}
    rows = [(*r, 1, "many") for r in rows] + [(p, "ann00", 1.0, 1, "one") for p in single]
    both = logits | single
    margins = margins_of({"s": [0.0] * len(both)}, both, [prompt_of(k % 5, k // 5) for k in range(len(both))])
    metrics = pl.DataFrame({"pair_id": margins["pair_id"], "logit": list(both.values())}).with_columns(
        confidence_0=0.5, confidence_1=0.5, stability=0.5
    )
    table, lesson = mino.minority(votes_of(rows), margins, metrics)
    assert lesson.calibrated_on == ("many",)
    assert "sources with one vote per pair cannot be observed" in lesson.note
    assert table["minority_probability"].null_count() == 0
    ones = table.filter(pl.col("others") == 0)
    assert len(ones) == 50
    # What teaches is judged by the weights of its prompt's fold, all else by those of all that teaches.
    weights = np.array(lesson.weights)
    of_pair = pl.Series(np.where(np.arange(len(both)) < 400, mar.folds(margins), -1))
    row = mar.rows_of(margins, table["pair_id"])
    g = np.where(table["label_0"] == 1, 1, -1) * metrics["logit"].to_numpy()[row]
    inputs = np.stack([g, np.abs(g), table["annotator_score"].to_numpy(), np.ones(len(g))], 1)
    expected = sigmoid((inputs * weights[of_pair.to_numpy()[row]]).sum(1))
    assert table["minority_probability"].to_list() == pytest.approx(expected.tolist())


def test_no_vote_on_a_fold_enters_the_weights_that_judge_it(table_of):
    """Of people who are unknown: a known one's score on other prompts is an input, there as everywhere."""
    logits, rows = drawn_votes(pairs=300, known=False)
    before = table_of(logits, rows)[1]
    fold = {p: k % 5 for k, p in enumerate(logits)}
    turned = [(p, a, 1 - v if fold[p] == 2 else v) for p, a, v in rows]
    after = table_of(logits, turned)[1]
    for f in range(mar.FOLDS + 1):
        same = np.allclose(before.weights[f], after.weights[f], rtol=1e-9)
        assert same is (f == 2)


def test_no_vote_on_a_prompt_enters_the_score_of_the_people_who_vote_on_it(table_of):
    logits, rows = drawn_votes(pairs=50)
    before, _ = table_of(logits, rows)
    first = rows[0][0]
    after, _ = table_of(logits, [(p, a, 1 - v if p == first else v) for p, a, v in rows])
    here = pl.col("pair_id") == first
    assert before.filter(here)["annotator_score"].to_list() == pytest.approx(
        after.filter(here)["annotator_score"].to_list(), abs=1e-12
    )
    assert not before.filter(~here)["annotator_score"].equals(after.filter(~here)["annotator_score"])


def test_the_calibration_error_by_hand():
    p, y = np.array([0.05, 0.08, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])
    weight = np.array([1.0, 1.0, 2.0, 4.0])
    # First bin: mean p 0.065, mean y 0.5; last bin: 2 * 0.95 + 4 of 6, all 1.
    expected = (2 * abs(0.065 - 0.5) + 6 * abs(5.9 / 6 - 1)) / 8
    assert mino.calibration_error(p, y, weight) == pytest.approx(expected)


# --- the second opinion --------------------------------------------------------------------------------------------


def test_the_em_probability_equals_a_step_by_step_reimplementation(table_of):
    rng = np.random.default_rng(2)
    logits = {"x": 0.8, "y": -0.3, "z": None, "w": 1.5}
    rows = [(p, a, float(rng.random() < 0.6)) for p in "xyz" for a in ("a", "b", None)] + [("w", "a", 0.0, 2)]
    table, _ = table_of(logits, rows, em=True)

    h = {p: v or 0.0 for p, v in logits.items()}
    accuracy, slope = dict.fromkeys(("a", "b", None), 8 / 12), 1.0
    full = [(*r, 1)[:4] for r in rows]
    for _ in range(mino.EM_STEPS):
        posterior = {}
        for p in h:
            odds = slope * h[p]
            for q, a, v, n in full:
                if q == p:
                    odds += n * (1 if v else -1) * math.log(accuracy[a] / (1 - accuracy[a]))
            posterior[p] = float(sigmoid(odds))
        agree = {(q, a, v): posterior[q] if v else 1 - posterior[q] for q, a, v, _ in full}
        for who in accuracy:
            mine = [(agree[q, a, v], n) for q, a, v, n in full if a == who]
            accuracy[who] = (8 + sum(x * n for x, n in mine)) / (12 + sum(n for _, n in mine))
        for _ in range(50):
            p = {q: float(sigmoid(slope * h[q])) for q in h}
            gradient = sum((p[q] - posterior[q]) * h[q] for q in h) / 4 + mino.cal.RIDGE * slope
            slope -= gradient / (sum(p[q] * (1 - p[q]) * h[q] ** 2 for q in h) / 4 + mino.cal.RIDGE)
    expected = {(q, a, v): 1 - x for (q, a, v), x in agree.items()}
    for row in table.iter_rows(named=True):
        key = row["pair_id"], row["annotator_id"], row["label_0"]
        assert row["em_probability"] == pytest.approx(expected[key], abs=1e-4)


def test_em_finds_wrong_votes_that_the_scorers_alone_do_not(table_of):
    rng = np.random.default_rng(3)
    logits, rows, wrong = {}, [], []
    skill = rng.uniform(0.55, 0.95, 30)
    for k in range(400):
        pair, side = f"{k:04d}", rng.random() < 0.5
        logits[pair] = float((1 if side else -1) * 0.5 + rng.normal())
        for a in rng.choice(30, 6, replace=False):
            is_wrong = rng.random() > skill[a]
            rows.append((pair, f"a{a:02d}", float(side != is_wrong)))
            wrong.append(is_wrong)
    table, _ = table_of(logits, rows, em=True)
    is_wrong = np.array(wrong)[[int(v[1:]) for v in table["vote_id"]]]

    def auc(column):
        score = table[column].to_numpy()
        return (score[is_wrong][:, None] > score[~is_wrong][None]).mean()

    assert auc("em_probability") > 0.9 > auc("minority_score")


def test_without_being_asked_for_there_is_no_second_opinion(table_of):
    logits, rows = drawn_votes(pairs=20)
    assert table_of(logits, rows)[0]["em_probability"].null_count() == len(rows)
    assert table_of(logits, rows, em=True)[0]["em_probability"].null_count() == 0
