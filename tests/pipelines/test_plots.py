"""The numbers behind plots, and that every plot is a small PNG, of nothing, of one scorer and of many."""

import io
import itertools

import numpy as np
import polars as pl
import pytest
from PIL import Image

from pipelines import accounting, label_plots, plots, schemas
from pipelines.scoring import report
from pipelines.tables import StoreError

MANY = tuple("abcdefghi")


def assert_small(png, width=plots.PIXELS_WIDE):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.width == width
    assert len(png) < 50_000
    return image


def colours(png):
    return {c for _, c in Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 20)}


def any_rows(table, rows, seed=0, **columns):
    """Return a frame of a table with numbers of [0, 1] in all columns but those given."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, dtype in table.polars_schema.items():
        values = columns.get(name)
        if values is None:
            values = pl.Series(rng.random(rows)) if dtype.is_numeric() else pl.Series(["x"] * rows)
            values = (100 * values if dtype.is_integer() else values).cast(dtype)
        made[name] = values
    return pl.DataFrame(made, schema=table.polars_schema)


# --- scores ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(store):
    """Write scores by shard; return the store and the partitions."""

    def run(scores, scorer="mine"):
        partitions = []
        for shard, values in scores.items():
            ids = [f"{i:032x}" for i in range(len(values))]
            frame = pl.DataFrame({"image_id": ids, "prompt_id": ids, "score": pl.Series(values, dtype=pl.Float32)})
            status = pl.when(pl.col("score").is_null()).then(pl.lit("undecodable")).otherwise(pl.lit("ok"))
            frame = frame.with_columns(status=status, reason=pl.lit(None, pl.String))
            partitions.append(f"{scorer}/revision=0123456789ab/{shard}")
            store.write(schemas.SCORES, frame, partition=partitions[-1], made_from="x")
        return store, partitions

    return run


def test_scores_are_counted_by_source_in_bins_between_the_quantiles(scored):
    rng = np.random.default_rng(0)
    of_a, more_of_a, of_b = (rng.normal(m, 1, 500).astype(np.float32) for m in (0, 0, 2))
    found = plots.score_counts(*scored({"a.train-0": of_a, "a.train-1": more_of_a, "b.test-0": [*of_b, 1e6]}))
    everything = np.concatenate([of_a, more_of_a, of_b, [1e6]]).astype(np.float64)
    low, high = np.quantile(everything, plots.HISTOGRAM_ENDS)
    edges = np.linspace(low, high, plots.BINS + 1)
    for source, values in {"a": [*of_a, *more_of_a], "b": [*of_b, 1e6]}.items():
        rows = found.filter(pl.col("source") == source)
        assert rows["scores"].sum() == len(values)
        expected = np.histogram(np.clip(values, low, high), edges)[0]
        counted = np.zeros(plots.BINS, int)
        counted[rows["bin"].to_numpy()] = rows["scores"].to_numpy()
        # A score that lies on an edge but for rounding may be on either side of it.
        assert np.abs(counted - expected).sum() <= 2
        assert np.allclose(rows["low"], edges[rows["bin"].to_numpy()])
        assert np.allclose(rows["high"], edges[rows["bin"].to_numpy() + 1])


def test_scores_that_are_none_have_a_bin_of_null(scored):
    found = plots.score_counts(*scored({"a.train-0": [None, 1.0, 2.0, None, None]}))
    assert found.filter(pl.col("bin").is_null())["scores"].to_list() == [3]
    assert found["scores"].sum() == 5


def test_scores_that_are_all_one_number_are_in_the_middle(scored):
    found = plots.score_counts(*scored({"a.train-0": [7.0] * 9}))
    assert found["scores"].to_list() == [9]
    assert found["low"][0] <= 7.0 <= found["high"][0]
    assert found.select(pl.col("high") - pl.col("low")).item() == pytest.approx(1 / plots.BINS)


@pytest.mark.parametrize("scores", [{}, {"a.train-0": []}, {"a.train-0": [None, None]}])
def test_a_histogram_of_no_scores_says_so(scored, scores):
    counts = plots.score_counts(*scored(scores))
    assert counts["bin"].null_count() == len(counts)
    empty = plots.score_histogram(counts, "mine")
    assert_small(empty)
    assert empty != plots.score_histogram(plots.score_counts(*scored({"a.train-0": [1.0, 2.0]})), "mine")


def test_a_histogram_of_one_bin_that_is_not_the_first_lies_where_its_scores_are():
    """The edges of all bins are told by those of any."""
    counts = pl.DataFrame({"source": ["a"], "bin": [39], "low": [3.9], "high": [4.0], "scores": [5]})
    first = counts.with_columns(bin=pl.lit(0), low=pl.lit(0.0), high=pl.lit(0.1))
    pictures = [np.asarray(assert_small(plots.score_histogram(c, "mine")).convert("L")) for c in (counts, first)]
    half = pictures[0].shape[1] // 2
    # The legend alone is outside of the half that the scores are in.
    assert (pictures[0][60:, :half] < 255).sum() < (pictures[1][60:, :half] < 255).sum()


def test_every_source_has_its_colour_in_a_histogram(scored):
    rng = np.random.default_rng(0)
    shards = {f"source_{i}.train-0": rng.normal(i, 1, 300) for i in range(4)}
    png = plots.score_histogram(plots.score_counts(*scored(shards)), "mine")
    assert_small(png)
    wanted = {(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)}
    found = np.array(sorted(colours(png)), int)
    for colour in wanted:
        # The palette has neighbours of them; two of these are a hundred apart and more.
        assert np.abs(found - np.array(colour)).sum(1).min() < 40, colour


# --- voters ------------------------------------------------------------------------------------------------------------


def test_voters_agree_on_the_pairs_on_which_both_choose():
    votes = pl.LazyFrame(
        {"a": [1, 1, -1, 0, None, 1], "b": [1, -1, -1, 1, 1, None], "c": [None] * 6},
        schema=dict.fromkeys("abc", pl.Int8),
    )
    assert plots.agreement(votes).rows() == [("a", "b", 3, 2 / 3), ("a", "c", 0, None), ("b", "c", 0, None)]


def test_agreement_is_that_of_every_two_columns_counted_by_hand():
    rng = np.random.default_rng(0)
    votes = pl.DataFrame({v: rng.integers(-1, 2, 500) for v in MANY}, schema=dict.fromkeys(MANY, pl.Int8))
    found = {(a, b): (n, s) for a, b, n, s in plots.agreement(votes.lazy()).iter_rows()}
    assert list(found) == list(itertools.combinations(MANY, 2))
    for (a, b), (pairs, share) in found.items():
        both = [(x, y) for x, y in votes.select(a, b).iter_rows() if x and y]
        assert pairs == len(both)
        assert share == pytest.approx(sum(x == y for x, y in both) / len(both))


@pytest.mark.parametrize("voters", [(), ("a",)])
def test_fewer_than_two_voters_have_no_agreement_and_a_matrix_that_says_so(voters):
    table = plots.agreement(pl.LazyFrame({v: [1] for v in voters}, schema=dict.fromkeys(voters, pl.Int8)))
    assert table.is_empty()
    assert len(plots.agreement_matrix(table)) < 5_000


def put_votes(store, votes, human_label_0):
    ids = [f"{i:032x}" for i in range(len(human_label_0))]
    keys = dict.fromkeys(("pair_id", "prompt_id", "image_0_id", "image_1_id"), pl.Series(ids))
    pairs = pl.DataFrame({**keys, "n_votes": [1] * len(ids), "human_label_0": human_label_0})
    pairs = pairs.with_columns(cycle=pl.lit(None, pl.Int64))
    store.write(schemas.CATALOGUE_PAIRS, pairs, made_from="x")
    of_scorers = [pl.Series(f"vote_{s}", v, pl.Int8) for s, v in votes.items()]
    frame = any_rows(
        schemas.CONSENSUS, len(ids), pair_id=pl.Series(ids), vote_human=pl.Series([None] * len(ids), dtype=pl.Int8)
    )
    frame = frame.with_columns(*of_scorers)
    store.write(schemas.CONSENSUS, frame.select([c.name for c in schemas.CONSENSUS.of(votes).columns]), made_from="x")


def test_votes_are_those_of_the_scorers_and_the_side_of_most_people(store):
    put_votes(store, {"clip": [1, -1, 0, None], "pick": [1, 1, 1, 1]}, [0.9, 0.1, 0.5, None])
    votes = plots.votes_of(store)
    assert votes.collect_schema().names() == ["clip", "pick", plots.HUMANS]
    assert sorted(votes.collect().rows(), key=str) == sorted(
        [(1, 1, 1), (-1, 1, -1), (0, 1, 0), (None, 1, None)], key=str
    )
    assert dict(plots.agreement(votes).select("voter_a", "agreement").filter(pl.col("voter_a") == "pick").rows()) == {
        "pick": 0.5
    }


def test_votes_before_the_consensus_say_what_is_missing(store):
    with pytest.raises(StoreError, match="consensus"):
        plots.votes_of(store)


@pytest.mark.parametrize("scorers", [("clip",), MANY])
def test_a_matrix_of_one_scorer_and_of_many_is_small_and_shows_the_shares(scorers):
    twos = list(itertools.combinations([*scorers, plots.HUMANS], 2))
    table = pl.DataFrame(
        [(a, b, 10, 0.9) for a, b in twos], schema=["voter_a", "voter_b", "pairs", "agreement"], orient="row"
    )
    shown = plots.agreement_matrix(table)
    assert len(shown) < 50_000
    assert Image.open(io.BytesIO(shown)).width <= plots.PIXELS_WIDE
    assert plots.agreement_matrix(table.with_columns(agreement=pl.lit(0.1))) != shown
    assert plots.agreement_matrix(table.with_columns(agreement=pl.lit(None, pl.Float64))) != shown


# --- revisions ---------------------------------------------------------------------------------------------------------


def measured(measurements, subjects):
    rows = [(m, s) for m in range(1, measurements + 1) for s in subjects]
    return any_rows(
        schemas.DRIFT,
        len(rows),
        measurement=pl.Series([m for m, _ in rows], dtype=pl.Int64),
        subject=pl.Series([s for _, s in rows], dtype=pl.String),
    )


@pytest.mark.parametrize(("measurements", "subjects"), [(0, ()), (1, ("clip",)), (12, (*MANY, "consensus"))])
def test_drift_of_nothing_of_one_measurement_and_of_many_is_small(measurements, subjects):
    assert_small(plots.drift(measured(measurements, subjects)))


def test_drift_shows_both_columns_and_no_order_of_rows():
    table = measured(4, ("clip", "consensus"))
    shown = plots.drift(table)
    assert plots.drift(pl.concat([table.filter(pl.col("measurement") == m) for m in (1, 4, 2, 3)])) == shown
    for column in ("accuracy", "share_changed"):
        assert plots.drift(table.with_columns(pl.col(column) / 2)) != shown
        assert_small(plots.drift(table.with_columns(pl.lit(None, pl.Float64).alias(column))))


# --- plots of tables ---------------------------------------------------------------------------------------------------


def reliability_of(scorers):
    rows = [(s, stage, b) for s in (*scorers, "ensemble") for stage in ("raw", "calibrated") for b in range(10)]
    names, stages, bins = (list(column) for column in zip(*rows, strict=True))
    return any_rows(
        schemas.RELIABILITY, len(rows), scorer=pl.Series(names), stage=pl.Series(stages), bin=pl.Series(bins)
    )


def consensus_report_of(scorers):
    levels = ["all", *(f"{k} of {len(scorers)}" for k in range(len(scorers) + 1))]
    ways = ["majority", "random_scorer", "raw_sum", "zscore_sum", *scorers]
    names, of_level = (list(column) for column in zip(*itertools.product(ways, levels), strict=True))
    return any_rows(schemas.CONSENSUS_REPORT, len(names), aggregation=pl.Series(names), level=pl.Series(of_level))


TABLE_PLOTS = {
    "reliability": (label_plots.reliability, reliability_of),
    "consensus_report": (label_plots.consensus, consensus_report_of),
    "minority": (label_plots.minority, lambda scorers: any_rows(schemas.MINORITY, 500 * len(scorers))),
    "annotators": (label_plots.annotators, lambda scorers: any_rows(schemas.ANNOTATORS, 50 * len(scorers))),
    "accounting": (
        accounting.plot,
        lambda scorers: any_rows(schemas.ACCOUNTING, len(scorers), source=pl.Series(list(scorers))),
    ),
}


@pytest.mark.parametrize("table", TABLE_PLOTS)
def test_a_plot_of_an_empty_table_is_a_small_picture(table):
    plot, _ = TABLE_PLOTS[table]
    assert_small(plot(schemas.TABLES[table].empty()))


@pytest.mark.parametrize("scorers", [("clip",), MANY])
@pytest.mark.parametrize("table", TABLE_PLOTS)
def test_a_plot_of_one_scorer_and_of_many_is_as_wide_as_the_pane_and_small(table, scorers):
    plot, make = TABLE_PLOTS[table]
    frame = make(scorers)
    shown = plot(frame)
    assert_small(shown)
    assert plot(schemas.TABLES[table].empty()) != shown


@pytest.mark.parametrize("column", ["reliability", "annotator_score"])
def test_what_is_not_known_of_annotators_leaves_its_panel_empty(column):
    table = any_rows(schemas.ANNOTATORS, 30)
    nothing = [pl.lit(None, pl.Float64).alias(c) for c in table.columns if c.startswith(column)]
    assert_small(label_plots.annotators(table.with_columns(nothing)))


def test_a_picture_of_an_empty_scorer_report_says_so():
    assert_small(report.plot(schemas.SCORER_REPORT.empty(), schemas.SCORER_CORRELATION.empty()))
