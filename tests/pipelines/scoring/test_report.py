import io
import json
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.stats import spearmanr

from pipelines import catalogue, identity, ingest, plots, schemas, steps
from pipelines.config import ScorerConfig, SourceConfig
from pipelines.scoring import batches, report
from pipelines.tables import Store, StoreError

FAMILY = "mine"


@pytest.fixture
def world(tmp_path, tiny_config):
    """Ingest votes on images known by name, import scores, activate them; return (store, config, shard keys).

    votes: source -> (prompt, first image, second image, preference for the first, people[, annotator]).
    scores: scorer -> (prompt, image) -> score.
    """

    def run(votes, scores, activate=True):
        store = Store(str(tmp_path / "store"))
        sources, keys = [], []
        for name, rows in votes.items():
            columns = ("prompt", "image_0", "image_1", "label_0", "count")
            table = {c: [r[i] for r in rows] for i, c in enumerate(columns)}
            # Rows of one file that are alike are one vote.
            table["annotator"] = [r[5] if len(r) > 5 else f"{name} {i}" for i, r in enumerate(rows)]
            (tmp_path / name).mkdir(exist_ok=True)
            pq.write_table(pa.table(table), tmp_path / name / "votes.parquet")
            source = SourceConfig(name=name, layout="pairs", location=str(tmp_path / name), family=FAMILY)
            (shard,) = ingest.list_source(source)
            ingest.ingest_shard(store, ingest.plan(source), shard)
            sources.append(source)
            keys.append(shard.key)
        catalogue.build(store, keys)
        scorers = []
        for name, known in scores.items():
            file = tmp_path / f"{name}.parquet"
            rows = [{"prompt": p, "image_uid": i, "score": s} for (p, i), s in known.items()]
            pq.write_table(pa.Table.from_pylist(rows), file)
            scorers.append(ScorerConfig(name=name, kind="imported", checkpoint=str(file), family=FAMILY))
        config = tiny_config.model_copy(update={"sources": tuple(sources), "scorers": tuple(scorers)})
        for key in keys:
            batches.score_shard(store, key, scorers)
        if activate:
            batches.activate(store, config, keys)
        return store, config, keys

    return run


def rows_of(store):
    table = store.read(schemas.SCORER_REPORT)
    return {(r["scorer"], r["source"]): r for r in table.iter_rows(named=True)}


VOTES = {
    "a": [("p", "x1", "x2", 1.0, 3), ("q", "y2", "y1", 1.0, 1), ("r", "z1", "z2", 0.5, 7)],
    "b": [("p", "x1", "x2", 0.0, 1), ("q", "y1", "y3", 1.0, 1)],
}
S = {("p", "x1"): 2.0, ("p", "x2"): 1.0, ("q", "y1"): 5.0, ("q", "y2"): 5.0, ("r", "z1"): 0.0, ("r", "z2"): 1.0}
T = {("p", "x1"): 1.0, ("p", "x2"): 2.0, ("q", "y1"): 1.0, ("q", "y2"): 3.0, ("r", "z1"): 0.0, ("r", "z2"): 9.0}


@pytest.fixture
def small(world):
    store, config, keys = world(VOTES, {"s": S, "t": T})
    report.build(store, config, keys)
    return store, config, keys


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_accuracy_is_of_people_who_choose_and_equal_scores_count_half(small):
    rows = rows_of(small[0])
    # a: 3 of 3 people on x, half of 1 on y, the tie on z left out; b: 0 of 1 on x, y3 has no score.
    expected = {"a": (4, 4, 3.5 / 4), "b": (2, 1, 0.0), "all": (6, 5, 3.5 / 5)}
    for source, (decided, covered, accuracy) in expected.items():
        r = rows["s", source]
        assert (r["votes_decided"], r["votes_covered"]) == (decided, covered)
        assert r["accuracy"] == pytest.approx(accuracy)
    # t: x2 above x1 (b's one person right), y2 above y1.
    assert [rows["t", s]["accuracy"] for s in ("a", "b", "all")] == pytest.approx([1 / 4, 1.0, 2 / 5])


def test_the_share_of_equal_scores_is_of_scored_pairs_with_a_decided_vote(small):
    rows = rows_of(small[0])
    found = {s: (rows["s", s]["pairs_decided"], rows["s", s]["share_equal"]) for s in ("a", "b", "all")}
    assert found == {"a": (2, 0.5), "b": (1, 0.0), "all": (2, 0.5)}
    assert rows["t", "all"]["share_equal"] == 0.0


def test_a_repeated_vote_counts_once(world):
    votes = [("p", "x1", "x2", 1.0, 1, "twice")] * 2 + [("p", "x1", "x2", 0.0, 1)]
    store, config, keys = world({"a": votes}, {"s": S})
    report.build(store, config, keys)
    r = rows_of(store)["s", "a"]
    assert (r["votes_decided"], r["accuracy"]) == (2, 0.5)


def test_a_source_without_decided_votes_has_no_accuracy_and_no_interval(world):
    store, config, keys = world({"ties": [("p", "x1", "x2", 0.5, 1)]}, {"s": S})
    report.build(store, config, keys)
    r = rows_of(store)["s", "ties"]
    assert [r[c] for c in ("accuracy", "accuracy_low", "accuracy_high", "share_equal")] == [None] * 4
    assert r["votes_decided"] == 0
    assert r["mean"] == 1.5


def test_the_interval_of_one_vote_per_prompt_is_the_binomial_one(world):
    votes = [(f"prompt {i}", "w", "l", 1.0, 1) for i in range(60)]
    scores = {(p, image): float((image == "w") == (i < 45)) for i, (p, *_) in enumerate(votes) for image in ("w", "l")}
    store, config, keys = world({"a": votes}, {"s": scores})
    report.build(store, config, keys)
    r = rows_of(store)["s", "a"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 60)
    assert r["accuracy"] == 0.75
    assert r["accuracy_low"] == pytest.approx(0.75 - half, abs=0.025)
    assert r["accuracy_high"] == pytest.approx(0.75 + half, abs=0.025)


def test_the_interval_resamples_prompts_with_all_their_votes(world):
    # 30 pairs of a prompt that is always right, 30 of one that never is: two prompts say little.
    votes = [(p, f"{p}w{i}", f"{p}l{i}", 1.0, 1) for p in ("p", "q") for i in range(30)]
    scores = {(p, image): float((image == w) == (p == "p")) for p, w, loser, *_ in votes for image in (w, loser)}
    store, config, keys = world({"a": votes}, {"s": scores})
    report.build(store, config, keys)
    r = rows_of(store)["s", "a"]
    assert (r["accuracy"], r["accuracy_low"], r["accuracy_high"]) == (0.5, 0.0, 1.0)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_what_sources_share_counts_in_each_and_once_in_all(small):
    rows = rows_of(small[0])
    counts = ("scores", "scores_ok", "scores_not_ok", "pairs", "pairs_scored")
    assert [rows["s", "a"][c] for c in counts] == [6, 6, 0, 3, 3]
    assert [rows["s", "b"][c] for c in counts] == [4, 3, 1, 2, 1]
    assert [rows["s", "all"][c] for c in counts] == [7, 6, 1, 4, 3]
    assert json.loads(rows["s", "b"]["statuses_not_ok"]) == {"not_imported": 1}
    assert json.loads(rows["s", "a"]["statuses_not_ok"]) == {}


def test_mean_deviation_and_quantiles_are_those_of_the_source_s_scores(small):
    r = rows_of(small[0])["s", "a"]
    values = np.array([2, 1, 5, 5, 0, 1.0])
    assert r["mean"] == pytest.approx(values.mean())
    assert r["sd"] == pytest.approx(values.std(ddof=1))
    assert [r[c] for c in ("min", "q05", "q25", "q50", "q75", "q95", "max")] == pytest.approx(
        np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).tolist()
    )
    assert rows_of(small[0])["s", "b"]["mean"] == pytest.approx((2 + 1 + 5) / 3)


def test_a_histogram_counts_every_score_in_bins_that_all_sources_share(small):
    rows = rows_of(small[0])
    ends = {(r["histogram_low"], r["histogram_high"]) for (scorer, _), r in rows.items() if scorer == "s"}
    assert len(ends) == 1
    for source in ("a", "b", "all"):
        counts = json.loads(rows["s", source]["histogram"])
        assert len(counts) == report.BINS
        assert sum(counts) == rows["s", source]["scores_ok"]
    counts = json.loads(rows["s", "a"]["histogram"])
    assert (counts[0], counts[-1]) == (1, 2)


def test_scores_that_are_all_one_number_make_a_report_and_a_picture(world):
    store, config, keys = world(VOTES, {"s": dict.fromkeys(S, 3.0), "t": T})
    report.build(store, config, keys)
    r = rows_of(store)["s", "all"]
    assert (r["sd"], r["accuracy"], r["share_equal"]) == (0.0, 0.5, 1.0)
    assert sum(json.loads(r["histogram"])) == 6
    assert store.read(schemas.SCORER_CORRELATION).row(0, named=True)["pearson"] is None
    report.picture(store)


def test_a_scorer_without_any_score_makes_a_report_and_a_picture(world):
    store, config, keys = world(VOTES, {"s": {("p", "elsewhere"): 1.0}, "t": T})
    report.build(store, config, keys)
    r = rows_of(store)["s", "all"]
    assert (r["scores_ok"], r["scores_not_ok"], r["pairs_scored"], r["votes_covered"]) == (0, 7, 0, 0)
    assert [r[c] for c in ("mean", "min", "q50", "histogram", "accuracy", "accuracy_low", "share_equal")] == [None] * 7
    assert store.read(schemas.SCORER_CORRELATION).row(0, named=True)["scores"] == 0
    report.picture(store)
    assert "| s | all | 0 | 7 |" in report.table_text(store)


# --- correlations ----------------------------------------------------------------------------------------------------


def test_correlations_are_pearson_s_and_spearman_s_over_common_scores_and_differences(small):
    found = small[0].read(schemas.SCORER_CORRELATION)
    assert found.select("scorer_a", "scorer_b").rows() == [("s", "t")]
    row = found.row(0, named=True)
    s, t = (np.array([known[k] for k in S]) for known in (S, T))
    assert (row["scores"], row["pairs"]) == (6, 3)
    assert row["pearson"] == pytest.approx(np.corrcoef(s, t)[0, 1])
    assert row["spearman"] == pytest.approx(spearmanr(s, t).statistic)
    d = []
    for prompt, *images in (("p", "x1", "x2"), ("q", "y1", "y2"), ("r", "z1", "z2")):
        first, second = sorted(images, key=lambda uid: identity.image_id_of_uid(FAMILY, uid))
        d.append([known[prompt, first] - known[prompt, second] for known in (S, T)])
    d = np.array(d)
    assert row["pearson_d"] == pytest.approx(np.corrcoef(d.T)[0, 1])
    assert row["spearman_d"] == pytest.approx(spearmanr(d).statistic)


def test_scorers_agree_on_pairs_where_neither_has_equal_scores(small):
    row = small[0].read(schemas.SCORER_CORRELATION).row(0, named=True)
    # x: they differ; y: s has equal scores; z: both choose z2.
    assert (row["pairs_decided"], row["agreement"]) == (2, 0.5)


def test_every_two_scorers_stand_once_and_what_only_one_scored_is_left_out(world):
    scores = {
        "s": S,
        "same": {k: 2 * v + 1 for k, v in S.items()},
        "opposite": {k: -v for k, v in S.items() if k[0] != "r"},
    }
    store, config, keys = world(VOTES, scores)
    report.build(store, config, keys)
    found = store.read(schemas.SCORER_CORRELATION)
    assert found.select("scorer_a", "scorer_b").rows() == [("s", "same"), ("s", "opposite"), ("same", "opposite")]
    same, opposite, _ = found.to_dicts()
    assert [same[c] for c in ("pearson", "spearman", "pearson_d", "spearman_d", "agreement")] == pytest.approx(
        [1.0] * 5
    )
    assert [opposite[c] for c in ("scores", "pairs", "pairs_decided")] == [4, 2, 1]
    assert [opposite[c] for c in ("pearson", "spearman", "agreement")] == pytest.approx([-1.0, -1.0, 0.0])


def test_one_scorer_alone_has_no_correlations(world):
    store, config, keys = world(VOTES, {"s": S})
    report.build(store, config, keys)
    assert len(store.read(schemas.SCORER_CORRELATION)) == 0
    report.picture(store)


# --- reuse and errors ------------------------------------------------------------------------------------------------


def test_the_report_is_reused_until_scores_or_scorers_change(small, world):
    store, config, keys = small
    assert all(b.is_reused for b in report.build(store, config, keys).values())
    fewer = config.model_copy(update={"scorers": config.scorers[:1]})
    assert not any(b.is_reused for b in report.build(store, fewer, keys).values())
    turned = config.model_copy(update={"scorers": config.scorers[::-1]})
    report.build(store, config, keys)
    assert not any(b.is_reused for b in report.build(store, turned, keys).values())
    store, config, keys = world(VOTES, {"s": {**S, ("p", "x2"): 9.0}, "t": T})
    assert not any(b.is_reused for b in report.build(store, config, keys).values())
    assert rows_of(store)["s", "b"]["accuracy"] == 1.0


def test_another_number_of_resamples_makes_the_report_again_and_leaves_correlations(small, monkeypatch):
    store, config, keys = small
    monkeypatch.setattr(report, "RESAMPLES", 500)
    built = report.build(store, config, keys)
    assert {name: b.is_reused for name, b in built.items()} == {"scorer_report": False, "scorer_correlation": True}


def test_scores_that_are_not_active_are_refused_by_name(world):
    store, config, keys = world(VOTES, {"s": S, "t": T}, activate=False)
    with pytest.raises(StoreError, match="the active revision of s is none"):
        report.build(store, config, keys)


def test_scores_that_are_missing_are_refused_with_what_to_do(world, tmp_path):
    store, config, keys = world(VOTES, {"s": S})
    more = config.scorers[0].model_copy(update={"name": "more"})
    with pytest.raises(StoreError, match=r"scores of more .* are missing; score it"):
        report.build(store, config.model_copy(update={"scorers": (*config.scorers, more)}), keys)


def test_a_picture_before_the_report_says_what_is_missing(store):
    with pytest.raises(StoreError, match="'scorer_report'"):
        report.picture(store)


# --- what people look at ---------------------------------------------------------------------------------------------


def test_the_picture_is_small_wide_and_shows_the_numbers(small):
    store, *_ = small
    png = report.picture(store)
    assert len(png) < 50_000
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.width == plots.PIXELS_WIDE
    table, correlations = store.read(schemas.SCORER_REPORT), store.read(schemas.SCORER_CORRELATION)
    for other in (
        (table.with_columns(accuracy=pl.lit(0.9), accuracy_high=pl.lit(0.9)), correlations),
        (table, correlations.with_columns(agreement=pl.lit(1.0))),
        (table.with_columns(histogram=pl.lit(json.dumps([1] * report.BINS))), correlations),
    ):
        assert report.plot(*other) != png


def test_the_text_is_a_table_with_a_row_per_scorer_and_source_and_states_the_tie_rule(small):
    store, *_ = small
    text = report.table_text(store)
    first, rule, second = text.split("\n\n")
    assert "equal scores count half" in rule
    for block in (first, second):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert len(first.splitlines()) == 2 + 6
    assert "70.0 [" in first
    assert "| s, t | 6 |" in second


def test_the_text_shows_what_bfloat16_costs_the_scorers_that_are_active_in_it(small):
    store, *_ = small
    assert "bfloat16" not in report.table_text(store)
    measured = {
        "revision": "exact",
        "device": "cpu",
        **dict.fromkeys(("images_left_out", "scores", "pairs_decided", "flips", "ties_made"), 3),
        **dict.fromkeys(("difference_mean", "difference_max", "seconds_float32", "seconds_bfloat16"), 0.0),
    }
    active = store.current_revisions()
    for scorer, revision, of in (
        ("s", active["s"], (500, 0.01, 1.0, 0.002, True)),
        ("t", "another", (400, 0.02, 2.0, 0.02, False)),
    ):
        facts = dict(zip(("pairs", "difference_sd", "score_sd", "share_flipped", "is_goal_met"), of, strict=True))
        row = {**measured, **facts, "scorer": scorer, "revision_bfloat16": revision}
        store.write(schemas.SCORER_PRECISION, pl.DataFrame([row]), partition=scorer, made_from="hand")
    text = report.table_text(store)
    assert "| s | 500 | 0.01 | 1 | 0.20 %, goal met |" in text
    assert "| t | 400" not in text, "that is of other weights"
    missed = {**row, "revision_bfloat16": active["t"]}
    store.write(schemas.SCORER_PRECISION, pl.DataFrame([missed]), partition="t", made_from="hand")
    assert "| t | 400 | 0.02 | 2 | 2.00 %, GOAL MISSED |" in report.table_text(store)


# --- on the tiny world -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(ingested, tiny_config, tmp_path_factory):
    """(store, keys) of the tiny world, scored, activated and reported on."""
    source, keys = ingested
    store = Store(str(shutil.copytree(source.location, tmp_path_factory.mktemp("reported") / "store")))
    models = {}
    for key in keys:
        batches.score_shard(store, key, list(tiny_config.scorers), models=models)
    batches.activate(store, tiny_config, keys)
    report.build(store, tiny_config, keys)
    return store, keys


def test_accuracy_over_everything_is_the_calibration_s(scored, tiny_config):
    store, keys = scored
    labels = steps.Labels(store, tiny_config, keys)
    labels.margins()
    labels.calibration()
    expected = {
        r["scorer"]: (r["accuracy"], r["votes"])
        for r in store.read(schemas.CALIBRATION).filter(pl.col("fold") == -1).iter_rows(named=True)
        if r["scorer"] != "ensemble"
    }
    rows = rows_of(store)
    found = {s: (pytest.approx(rows[s, "all"]["accuracy"]), rows[s, "all"]["votes_covered"]) for s in expected}
    assert expected == found


def test_the_report_accounts_for_every_scorable_pair_and_vote_of_the_store(scored, tiny_config):
    store, keys = scored
    rows = rows_of(store)
    assert set(rows) == {(s.name, n) for s in tiny_config.scorers for n in ("pickapic", "hpd", "all")}
    decided = catalogue.counted_votes(store, keys).filter(pl.col("label_0") != 0.5).collect()
    for scorer in tiny_config.scorers:
        whole = rows[scorer.name, "all"]
        assert whole["scores"] == len(store.read(schemas.CATALOGUE_SCORABLES))
        assert whole["pairs"] == len(store.read(schemas.CATALOGUE_PAIRS))
        for source in ("pickapic", "hpd"):
            assert rows[scorer.name, source]["votes_decided"] == len(decided.filter(pl.col("source") == source))
        assert whole["revision"] == store.current_revisions()[scorer.name]
        assert whole["accuracy_low"] <= whole["accuracy"] <= whole["accuracy_high"]


def test_two_scorers_of_one_cosine_are_found_to_be_alike(scored):
    row = scored[0].read(schemas.SCORER_CORRELATION).row(0, named=True)
    assert [row[c] for c in ("pearson", "spearman", "pearson_d", "agreement")] == pytest.approx([1.0] * 4, abs=2e-3)


def test_the_picture_of_the_tiny_world_is_small(scored):
    assert 5_000 < len(report.picture(scored[0])) < 50_000
