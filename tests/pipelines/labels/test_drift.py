"""The frozen sample and what is measured on it, by hand."""

import polars as pl
import pytest

from pipelines import schemas
from pipelines.labels import drift


def pairs_of(labels, hexadecimal):
    """Rows of catalogue_pairs with these human labels."""
    n = len(labels)
    return schemas.CATALOGUE_PAIRS.conform(
        pl.DataFrame(
            {
                "pair_id": [hexadecimal(i) for i in range(n)],
                "prompt_id": [hexadecimal("prompt")] * n,
                "image_0_id": [hexadecimal(f"a{i}") for i in range(n)],
                "image_1_id": [hexadecimal(f"b{i}") for i in range(n)],
                "n_votes": pl.Series([0 if v is None else 1 for v in labels], dtype=pl.Int64),
                "human_label_0": pl.Series(labels, dtype=pl.Float64),
                "cycle": pl.Series([None] * n, dtype=pl.Int64),
            }
        )
    )


@pytest.fixture
def sample(hexadecimal):
    return drift.sample(pairs_of([1.0, 1.0, 0.0, 0.25], hexadecimal), 10)


@pytest.fixture
def measured(sample, margins_of, hexadecimal):
    """Measure differences (None: no score; 'gone': the pair left the store) and consensus labels of the four pairs."""

    def measure(number, revision, differences, consensus):
        ids = [hexadecimal(i) for i in range(4)]
        here = [i for i in range(4) if differences[i] != "gone"]
        margins = margins_of({"clip": [differences[i] for i in here]}, pair_id=[ids[i] for i in here])
        labels = pl.DataFrame(
            {"pair_id": [ids[i] for i in here], "consensus_label_0": [consensus[i] for i in here]},
            schema_overrides={"consensus_label_0": pl.Float64},
        )
        frame = schemas.FROZEN_LABELS.conform(drift.measure(number, sample, margins, labels, ["clip"]))
        return drift.Measurement(number, {"clip": revision, "consensus": f"of-{revision}"}, frame)

    return measure


def row(table, measurement, subject):
    return table.row(by_predicate=(pl.col("measurement") == measurement) & (pl.col("subject") == subject), named=True)


def test_pairs_without_a_majority_are_not_drawn(hexadecimal):
    drawn = drift.sample(pairs_of([None, 0.5, 1.0, 0.4], hexadecimal), 10)
    assert set(drawn["pair_id"]) == {hexadecimal(2), hexadecimal(3)}
    assert drawn.equals(schemas.FROZEN_SAMPLE.conform(drawn))


def test_the_draw_depends_on_nothing_but_the_pairs_and_is_not_the_first_ones_by_id(hexadecimal):
    pairs = pairs_of([float(i % 2) for i in range(500)], hexadecimal)
    drawn = drift.sample(pairs, 50)
    assert len(drawn) == 50
    assert drawn.equals(drift.sample(pairs.reverse(), 50))
    assert drift.sample(pairs, 20)["pair_id"].is_in(drawn["pair_id"].implode()).all()
    first = pairs.sort("pair_id")["pair_id"].head(50)
    assert drawn["pair_id"].is_in(first.implode()).sum() < 20


def test_nothing_is_drawn_where_nobody_has_decided(hexadecimal):
    assert drift.sample(pairs_of([None, 0.5], hexadecimal), 10).is_empty()
    assert drift.drift(schemas.FROZEN_SAMPLE.empty(), []).equals(schemas.DRIFT.empty())


def test_the_first_measurement_has_an_accuracy_and_nothing_before(sample, measured):
    # Right, equal, wrong (people chose image_1), right.
    table = drift.drift(sample, [measured(1, "a", [2.0, 0.0, 3.0, -1.0], [1.0, 1.0, None, 0.0])])
    assert table.equals(schemas.DRIFT.conform(table))
    clip = row(table, 1, "clip")
    assert (clip["pairs"], clip["pairs_without_choice"], clip["pairs_gone"]) == (4, 0, 0)
    assert clip["accuracy"] == pytest.approx((1 + 0.5 + 0 + 1) / 4), "equal scores count half"
    consensus = row(table, 1, "consensus")
    assert (consensus["pairs"], consensus["pairs_without_choice"], consensus["accuracy"]) == (3, 1, 1.0)
    assert (
        table.select("before", "revision_before", "accuracy_before", "points", "share_changed").null_count().row(0)
        == (2,) * 5
    )


def test_another_revision_is_compared_on_the_pairs_on_which_both_choose(sample, measured):
    first = measured(1, "a", [2.0, 1.0, 3.0, None], [1.0, 1.0, 1.0, 0.0])
    second = measured(2, "b", [2.0, -1.0, -3.0, -5.0], [1.0, 0.0, None, 0.0])
    table = drift.drift(sample, [first, second])
    clip = row(table, 2, "clip")
    assert (clip["before"], clip["revision_before"], clip["revision"]) == (1, "a", "b")
    assert clip["accuracy"] == pytest.approx(3 / 4)
    # Over the first three: right, right, wrong before; right, wrong, right now.
    assert clip["accuracy_before"] == pytest.approx(2 / 3)
    assert clip["points"] == pytest.approx(0)
    # Two are the other way round, and one has a choice now that had none.
    assert clip["share_changed"] == pytest.approx(3 / 4)
    consensus = row(table, 2, "consensus")
    assert consensus["share_changed"] == pytest.approx(2 / 4), "one turned round, one is undecided now"
    # Both choose on the first, second and fourth: all right before, the second wrong now.
    assert consensus["points"] == pytest.approx(100 * (2 / 3 - 1))


def test_a_pair_that_left_the_store_is_counted_and_is_no_change(sample, measured):
    first = measured(1, "a", [2.0, 1.0, 3.0, -1.0], [1.0, 1.0, 1.0, 0.0])
    second = measured(2, "b", [2.0, "gone", "gone", -1.0], [1.0, None, None, 0.0])
    table = drift.drift(sample, [first, second])
    for subject in ("clip", "consensus"):
        now = row(table, 2, subject)
        assert (now["pairs"], now["pairs_gone"], now["pairs_without_choice"]) == (2, 2, 0)
        assert (now["share_changed"], now["points"]) == (0, 0), "over the pairs that are there both times"
        assert now["accuracy_before"] == 1


def test_a_revision_is_compared_with_the_latest_other_one_whatever_else_was_measured_between(sample, measured):
    wrong, right = [-1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]
    labels = [1.0, 1.0, 0.0, 0.0]
    table = drift.drift(
        sample,
        [
            measured(1, "a", wrong, labels),
            measured(2, "b", right, labels),
            measured(3, "b", right, labels),
            measured(4, "a", wrong, labels),
        ],
    )
    assert [row(table, n, "clip")["before"] for n in (1, 2, 3, 4)] == [None, 1, 1, 3]
    assert [row(table, n, "clip")["points"] for n in (2, 3, 4)] == pytest.approx([100, 100, -100])


def test_a_scorer_that_was_not_there_before_has_nothing_before(sample, measured):
    first = measured(1, "a", [1.0] * 4, [1.0] * 4)
    earlier = drift.Measurement(1, {"consensus": "of-nobody"}, first.labels.filter(pl.col("subject") == "consensus"))
    table = drift.drift(sample, [earlier, measured(2, "a", [1.0] * 4, [1.0] * 4)])
    assert row(table, 2, "clip")["before"] is None
    assert row(table, 2, "consensus")["before"] == 1
