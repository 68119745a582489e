"""What holds for the labels of any store: swapping, permuting, shifting and duplicating change what they should.

The first half runs raw rows through ingestion, catalogue, imported scores and every label step; the second half calls the
label functions on drawn numbers.
"""

import functools
import itertools
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from pipelines import catalogue, ingest, schemas, steps
from pipelines.config import Config, ScorerConfig, SourceConfig, small_world
from pipelines.labels import annotators as ann
from pipelines.labels import calibration as cal
from pipelines.labels import consensus as con
from pipelines.labels import minority as mino
from pipelines.labels import smoothed as smo
from pipelines.scoring import batches
from pipelines.tables import Store

SCORERS = ("a", "b", "c")
PAIRS, RATERS, PEOPLE = 30, 4, 9
POSITION = ("first_share", "first_low", "first_high")
PROBABILITIES = (
    "p_smpo",
    "p_ensemble",
    "p_linear",
    "p_log",
    *(f"{f}_{s}" for f in ("smpo", "calibrated") for s in SCORERS),
)
LABELS = ("consensus_label_0", "random_scorer_label_0", "raw_sum_label_0", "zscore_sum_label_0")
SWAPPED = {"jpg_0": "jpg_1", "image_0_uid": "image_1_uid", "image_0_url": "image_1_url"}
SWAPPED |= {"label_0": "label_1", "model_0": "model_1"}


def few(examples):
    """Settings of a property whose examples take long: the same ones every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def equal(here, there, tolerance=0.0):
    assert_frame_equal(here, there, check_exact=tolerance == 0, rel_tol=tolerance, abs_tol=tolerance)


# --- from raw rows to labels ---------------------------------------------------------------------------------------


def swap(row):
    """The row with the other image displayed first: the same judgement."""
    turned = SWAPPED | {v: k for k, v in SWAPPED.items()}
    return {turned.get(c, c): v for c, v in row.items()}


class World:
    """Raw rows, scores by (image's name, prompt), and the label tables that come of them."""

    def __init__(self, raw_rows, write):
        rng = np.random.default_rng(0)
        self.write = write
        self.rows = []
        for k, (row, j) in enumerate(itertools.product(raw_rows[:PAIRS], range(RATERS))):
            label = float(rng.choice([0.0, 0.5, 1.0], p=[0.35, 0.1, 0.55]))
            own = {"user_id": (k + 3 * j) % PEOPLE, "ranking_id": k, "has_label": True, "created_at": 1_000_000 * k}
            self.rows.append({**row, **own, "label_0": label, "label_1": 1 - label})
        keys = {(r[f"image_{i}_uid"], r["caption"]) for r in self.rows for i in (0, 1)}
        numbers = rng.integers(-2_000, 2_000, (len(keys), len(SCORERS))) / 64
        self.scores = {key: list(values) for key, values in zip(sorted(keys), numbers, strict=True)}

    def labels(self, shards, scores=None, scorers=SCORERS, keys_of=list, **options):
        """Return table -> frame, by the keys of its table, and the votes, of shards of rows."""
        with tempfile.TemporaryDirectory() as name:
            return self._labels(Path(name), shards, scores or self.scores, scorers, keys_of, options)

    def _labels(self, folder, shards, scores, scorers, keys_of, options):
        for k, rows in enumerate(shards):
            self.write(folder / "raw", rows, index=k, total=len(shards))
        source = SourceConfig(name="pap", layout="pickapic", location=str(folder / "raw"))
        store = Store(str(folder / "store"))
        found = ingest.LAYOUTS["pickapic"].list_shards(source)
        for shard in found:
            ingest.ingest_shard(store, ingest.plan(source), shard)
        keys = keys_of([s.key for s in found])
        catalogue.build(store, keys)
        config = small_world(folder).model_dump() | {
            "sources": (source,),
            "labels": {"smpo_scorer": "a", "em": True} | options,
        }
        config["scorers"] = []
        for scorer in scorers:
            file = folder / f"{scorer}.parquet"
            k = SCORERS.index(scorer)
            rows = [(uid, prompt, v[k]) for (uid, prompt), v in scores.items() if v[k] != "absent"]
            pl.DataFrame(
                rows, schema={"image_uid": pl.String, "prompt": pl.String, "score": pl.Float64}, orient="row"
            ).write_parquet(file)
            config["scorers"].append(
                ScorerConfig(name=scorer, kind="imported", checkpoint=str(file), family="pickapic")
            )
        config = Config.model_validate(config)
        for key in keys:
            batches.score_shard(store, key, config.scorers)
        batches.activate(store, config, keys)
        labels = steps.Labels(store, config, keys)
        for name in steps.LABEL_TABLES:
            getattr(labels, name)()
        tables = {name: store.read(schemas.TABLES[name]).sort(schemas.TABLES[name].key) for name in steps.LABEL_TABLES}
        tables["votes"] = catalogue.resolved_votes(store, keys).sort("vote_id").collect()
        tables["scores"] = batches.current_scores(store, list(scorers), keys).collect()
        return tables

    def shards(self, rows=None):
        rows = self.rows if rows is None else rows
        return [rows[: len(rows) // 3], rows[len(rows) // 3 :]]

    @functools.cached_property
    def plain(self):
        return self.labels(self.shards())


@pytest.fixture(scope="module")
def world(raw_rows, write_pickapic):
    return World(raw_rows, write_pickapic)


def without(tables, *columns):
    return {name: frame.drop(columns, strict=False) for name, frame in tables.items()}


def test_the_world_of_these_tests_has_something_of_everything(world):
    tables = world.plain
    assert len(tables["preferences"]) == PAIRS
    assert len(tables["minority"]) > PAIRS * RATERS * 0.8
    assert tables["minority"]["minority_probability"].null_count() == 0
    assert tables["annotators"]["reliability"].null_count() == 0
    assert tables["rater_agreement"]["alpha"].null_count() == 0
    assert tables["votes"]["was_swapped"].unique().sort().to_list() == [False, True]
    assert tables["preferences"]["p_ensemble"].std() > 0.01


@few(6)
@given(flips=st.lists(st.booleans(), min_size=PAIRS * RATERS, max_size=PAIRS * RATERS))
def test_the_place_of_an_image_changes_the_place_and_position_bias_and_nothing_else(world, flips):
    rows = [swap(r) if is_swapped else r for r, is_swapped in zip(world.rows, flips, strict=True)]
    here, there = world.plain, world.labels(world.shards(rows))
    # Votes are sorted by id; rows by file and number.
    shard, number = (here["votes"]["source_row"].str.extract(p).cast(pl.Int64) for p in (r"train-(\d+)-", r":(\d+)$"))
    is_flipped = pl.Series(flips).gather(shard * len(world.shards()[0]) + number)
    placed = ("was_swapped", "was_listed_second")
    for column in placed:
        assert there["votes"][column].equals(here["votes"][column] ^ is_flipped)
    equal(here["votes"].drop(placed), there["votes"].drop(placed))
    for name in steps.LABEL_TABLES:
        equal(here[name].drop(POSITION, strict=False), there[name].drop(POSITION, strict=False))
    decided = [r["label_0"] for r in rows if r["label_0"] != 0.5]
    bias = there["rater_agreement"].filter(source="all").row(0, named=True)
    assert (bias["placed"], bias["first_share"]) == (len(decided), pytest.approx(np.mean(decided)))
    for person in there["annotators"].iter_rows(named=True):
        its = [
            r["label_0"] for r in rows if r["label_0"] != 0.5 and person["annotator_id"].endswith(f":{r['user_id']}")
        ]
        assert (person["placed"], person["first_share"]) == (len(its), pytest.approx(np.mean(its)))


@few(6)
@given(
    order=st.permutations(range(PAIRS * RATERS)),
    scorers=st.permutations(SCORERS),
    cut=st.integers(1, PAIRS * RATERS - 1),
    is_reversed=st.booleans(),
)
def test_the_order_of_rows_shards_and_scorers_changes_the_ids_of_votes_and_the_last_bits(
    world, order, scorers, cut, is_reversed
):
    rows = [world.rows[k] for k in order]
    there = world.labels(
        [rows[:cut], rows[cut:]], scorers=scorers, keys_of=lambda k: k[::-1] if is_reversed else list(k)
    )
    here = world.plain
    key = ["pair_id", "annotator_id", "label_0"]
    for name in steps.LABEL_TABLES:
        frames = [t[name].drop("vote_id", strict=False) for t in (here, there)]
        if name == "minority":
            # Several votes of one person for one side of a pair differ in nothing.
            frames = [f.sort(key) for f in frames]
        equal(frames[0], frames[1].select(frames[0].columns), 1e-9)


DEFECTS = ("absent", None, float("nan"), float("inf"), -float("inf"))


@few(6)
@given(data=st.data())
def test_scores_that_are_absent_or_no_numbers_leave_out_what_needs_them_and_no_pair_and_no_vote(world, data):
    keys = sorted(world.scores)
    hit = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(keys) - 1), st.integers(0, len(SCORERS) - 1), st.sampled_from(DEFECTS)),
            max_size=25,
        )
    )
    scores = {k: list(v) for k, v in world.scores.items()}
    for at, k, defect in hit:
        scores[keys[at]][k] = defect
    here, there = world.plain, world.labels(world.shards(), scores)
    # What the file says in place of a number has a status and a reason.
    usual = there["scores"].filter(pl.col("status") == "ok")
    odd = there["scores"].filter(pl.col("status") != "ok")
    bad = {(at, k) for at, k, _ in hit}
    assert (len(odd), set(odd["status"])) == (len(bad), {"not_imported"} if bad else set())
    assert odd["reason"].null_count() == odd["score"].len() - odd["score"].null_count() == 0
    assert len(usual) + len(odd) == len(here["scores"])
    # Every pair and every decided vote stays.
    rows = there["preferences"]
    assert rows["pair_id"].equals(here["preferences"]["pair_id"])
    assert there["minority"]["vote_id"].equals(here["minority"]["vote_id"])
    assert rows["excluded_because"].null_count() == PAIRS, "no score says nothing about the picture"
    for column in ("n_votes", "human_label_0", "minority_share", "sources"):
        assert rows[column].equals(here["preferences"][column])
    # Null is exactly what needs a score that is none.
    lacks = {
        s: rows.select(pl.any_horizontal(pl.col(f"score_0_{s}", f"score_1_{s}").is_null())).to_series() for s in SCORERS
    }
    missing = {s: {keys[at] for at, k in bad if SCORERS[k] == s} for s in SCORERS}
    names = {
        (r["caption"], r["image_0_uid"], r["image_1_uid"]): [
            any((r[f"image_{i}_uid"], r["caption"]) in missing[s] for i in (0, 1)) for s in SCORERS
        ]
        for r in world.rows
    }
    assert sorted(zip(*(lacks[s] for s in SCORERS), strict=True)) == sorted(tuple(v) for v in names.values())
    any_lacks = functools.reduce(pl.Series.__or__, lacks.values())
    for column in ("p_ensemble", "p_linear", "p_log", "z_mean", "z_std"):
        assert rows[column].is_null().equals(any_lacks), column
    assert rows["p_smpo"].is_null().equals(lacks["a"])
    smoothed = there["smoothed"]
    for s in SCORERS:
        assert smoothed[f"calibrated_{s}"].is_null().equals(lacks[s])
        assert there["consensus"][f"vote_{s}"].is_null().equals(lacks[s])
    without_all = any_lacks.filter(rows["pair_id"].is_in(there["minority"]["pair_id"].implode()))
    scored = there["minority"].group_by("pair_id", maintain_order=True).agg(pl.col("minority_score").null_count() > 0)
    assert sorted(scored["minority_score"]) == sorted(without_all)


def test_a_scorer_without_a_row_for_a_shards_images_leaves_the_others_and_says_why(world):
    first = {(r[f"image_{i}_uid"], r["caption"]) for r in world.shards()[0] for i in (0, 1)}
    scores = {k: [v[0], v[1], "absent" if k in first else v[2]] for k, v in world.scores.items()}
    there = world.labels(world.shards(), scores)
    rows = there["preferences"]
    assert len(rows) == PAIRS
    assert 0 < rows["score_0_c"].null_count() < PAIRS
    for column in ("score_0_a", "score_1_b", "p_smpo", "human_label_0"):
        assert rows[column].null_count() == world.plain["preferences"][column].null_count(), column
    odd = there["scores"].filter(pl.col("status") != "ok")
    assert set(odd["scorer"]) == {"c"}
    assert set(odd["reason"]) == {"no row of c.parquet has this image and prompt"}


def test_pairs_without_votes_are_labelled_by_the_scorers_alone(world):
    silent = {"has_label": False, "label_0": None, "label_1": None}
    rows = [{**r, **silent} if k < RATERS * 10 else r for k, r in enumerate(world.rows)]
    tables = world.labels(world.shards(rows))
    unlabelled = tables["preferences"].filter(pl.col("n_votes") == 0)
    assert (len(tables["preferences"]), len(unlabelled)) == (PAIRS, 10)
    columns = (
        "human_label_0",
        "minority_share",
        "confidence",
        "minority_score",
        "minority_probability",
        "is_unanimous",
    )
    for column in columns:
        assert unlabelled[column].null_count() == 10
    for column in ("p_smpo", "p_ensemble", "p_linear", "raw_sum_label_0", "z_mean"):
        assert unlabelled[column].null_count() == 0
    assert unlabelled["sources"].unique().to_list() == ["pap"]
    assert unlabelled["excluded_because"].null_count() == 10


def test_a_store_without_any_counted_vote_has_every_table(world):
    silent = {"has_label": False, "label_0": None, "label_1": None}
    tables = world.labels(world.shards([{**r, **silent} for r in world.rows]))
    assert len(tables["preferences"]) == PAIRS
    assert set(tables["preferences"]["p_ensemble"]) == {0.5}, "nothing is known of whom to believe"
    assert len(tables["minority"]) == len(tables["annotators"]) == 0
    assert tables["rater_agreement"].select("source", "pairs", "alpha").rows() == [("all", 0, None)]
    assert tables["calibration"]["accuracy"].null_count() == len(tables["calibration"])


# --- from drawn numbers to labels ----------------------------------------------------------------------------------

PROMPTS = 12
DYADIC = st.integers(-(2**11), 2**11).map(lambda k: k / 64)
"""Scores that float32 holds exactly, also when an integer up to 2^11 is added."""


@st.composite
def stores(draw, least_pairs=3):
    """Draw margins, some scores missing, and votes of a few people on them."""
    n = draw(st.integers(least_pairs, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    some = draw(st.lists(DYADIC, min_size=2, max_size=12))
    # Equal and extreme scores are among the drawn ones; most are spread.
    values = np.where(rng.random((2, len(SCORERS), n)) < 0.3, rng.choice(some, (2, len(SCORERS), n)), 0.0)
    values = np.where(values == 0, rng.integers(-(2**11), 2**11, values.shape) / 64, values)
    is_missing = rng.random(values.shape) < draw(st.sampled_from([0.0, 0.05, 0.5]))
    generators = np.array(["x", "y", "z"])
    models = [generators[rng.integers(0, 3, n)] for _ in range(2)]
    margins = pl.DataFrame(
        {
            "pair_id": [f"{k:032x}" for k in sorted(rng.choice(10**6, n, replace=False).tolist())],
            "prompt_id": [f"{int(k):08x}" + "0" * 24 for k in rng.integers(0, PROMPTS, n)],
            **{f"model_{i}": pl.Series(models[i], dtype=pl.String) for i in (0, 1)},
            **{
                f"score_{i}_{s}": pl.Series(np.where(is_missing[i, k], np.nan, values[i, k])).fill_nan(None)
                for i in (0, 1)
                for k, s in enumerate(SCORERS)
            },
        }
    )
    m = draw(st.sampled_from([0, 1, 200]))
    row = rng.integers(0, n, m)
    d = margins.select(pl.col("score_0_a") - pl.col("score_1_a")).to_series().fill_null(0.0).to_numpy()[row]
    label = (d / 20 + rng.logistic(size=m) > 0).astype(float)
    label[rng.random(m) < 0.1] = 0.5
    who = rng.integers(-1, 8, m)
    votes = pl.DataFrame(
        {
            "vote_id": pl.Series([f"v{k:04d}" for k in range(m)], dtype=pl.String),
            "pair_id": margins["pair_id"].gather(row),
            "annotator_id": pl.Series([None if w < 0 else f"s:{w}" for w in who], dtype=pl.String),
            "label_0": pl.Series(label, dtype=pl.Float64),
            "people": pl.Series(rng.integers(1, 4, m), dtype=pl.Int64),
            "source": pl.Series(rng.choice(["s", "t"], m).astype(object), dtype=pl.String),
            "was_swapped": pl.Series([None if w == 7 else bool(w % 2) for w in who], dtype=pl.Boolean),
        }
    )
    return schemas.MARGINS.conform(margins), votes


def human(margins, votes):
    mean = (pl.col("label_0") * pl.col("people")).sum() / pl.col("people").sum()
    labels = votes.group_by("pair_id").agg(mean.alias("label"))
    return margins.select("pair_id").join(labels, on="pair_id", how="left", maintain_order="left")["label"]


def labels_of(margins, votes, scorers=SCORERS):
    """Return every table that the label functions make of margins and votes, conforming."""
    scorers = list(scorers)
    calibration = cal.calibrate(margins, votes, scorers, logit_scales={"a": 2.0}, generator_term=True)
    metrics = mino.pair_metrics(margins, calibration, scorers)
    minority, lesson = mino.minority(votes, margins, metrics, em=True)
    label = human(margins, votes)
    consensus = con.consensus(margins, label, scorers, "human", human_votes=True, seed=3)
    tables = {
        "calibration": calibration,
        "reliability": cal.reliability(margins, calibration, votes, scorers),
        "consensus": consensus,
        "consensus_report": con.report(consensus, margins, cal.votes_per_pair(margins, votes), scorers),
        "smoothed": smo.smoothed(margins, calibration, scorers, "a"),
        "minority": minority,
        "annotators": ann.annotators(votes, margins, minority),
        "rater_agreement": ann.rater_agreement(votes, margins),
    }
    tables = {name: schemas.TABLES[name].conform(frame) for name, frame in tables.items()}
    facts = {k: v for k, v in lesson.facts().items() if isinstance(v, int | float | str)}
    return tables | {"lesson": pl.DataFrame([facts]) if facts else pl.DataFrame()}


def complements(columns):
    return [(1 - pl.col(c)).alias(c) for c in columns]


def swapped(margins, votes):
    turned = {c: c.replace("_0", "_1", 1) for c in margins.columns if "_0" in c}
    there = margins.rename(turned | {v: k for k, v in turned.items()}).select(margins.columns)
    return there, votes.with_columns(*complements(["label_0"]), ~pl.col("was_swapped"))


@few(15)
@given(drawn=stores())
def test_under_other_images_order_probabilities_are_complements_labels_flip_and_all_else_stays(drawn):
    here, there = labels_of(*drawn), labels_of(*swapped(*drawn))
    smoothed = there["smoothed"].with_columns(*complements(PROBABILITIES), z_mean=-pl.col("z_mean"))
    equal(here["smoothed"], smoothed, 1e-9)
    consensus = there["consensus"].with_columns(
        *complements(LABELS),
        *(-pl.col(f"vote_{s}") for s in (*SCORERS, "human")),
        votes_0="votes_1",
        votes_1="votes_0",
    )
    equal(here["consensus"], consensus)
    equal(here["minority"], there["minority"].with_columns(*complements(["label_0"])), 1e-9)
    for name in ("calibration", "reliability", "consensus_report", "annotators", "rater_agreement", "lesson"):
        equal(here[name], there[name], 1e-9)


@few(15)
@given(drawn=stores(), data=st.data())
def test_the_order_of_pairs_votes_and_scorers_changes_the_last_bits_only(drawn, data):
    margins, votes = drawn
    seed = data.draw(st.integers(0, 1_000))
    there = labels_of(
        margins.sample(fraction=1, shuffle=True, seed=seed),
        votes.sample(fraction=1, shuffle=True, seed=seed),
        data.draw(st.permutations(SCORERS)),
    )
    for name, frame in labels_of(margins, votes).items():
        key = list(schemas.TABLES[name].key) if name in schemas.TABLES else []
        frames = [f.sort(key) if key else f for f in (frame, there[name].select(frame.columns))]
        equal(*frames, 1e-9)


@few(15)
@given(drawn=stores(), scorer=st.sampled_from(SCORERS), constant=st.integers(-(2**11), 2**11))
def test_a_constant_added_to_a_scorer_moves_its_range_and_nothing_else(drawn, scorer, constant):
    margins, votes = drawn
    both = [f"score_{i}_{scorer}" for i in (0, 1)]
    moved = margins.with_columns((pl.col(both).cast(pl.Float64) + constant).cast(pl.Float32))
    here, there = labels_of(margins, votes), labels_of(moved, votes)
    back = pl.when(pl.col("scorer") == scorer).then(constant).otherwise(0)
    there["calibration"] = there["calibration"].with_columns(pl.col("min", "max") - back)
    for name, frame in here.items():
        equal(frame, there[name])


@few(15)
@given(drawn=stores(), copies=st.integers(2, 3))
def test_pairs_that_come_again_under_new_ids_of_the_same_prompts_change_no_probability(drawn, copies):
    margins, votes = drawn

    def again(frame, copy):
        changed = {c: pl.lit(str(copy)) + pl.col(c).str.slice(1) for c in ("pair_id", "vote_id") if c in frame.columns}
        return frame.with_columns(**changed)

    many = [pl.concat([again(f, c) for c in range(copies)]) for f in (margins, votes)]
    here, there = labels_of(margins, votes), labels_of(*many)
    for copy in range(copies):
        its = there["smoothed"].slice(copy * len(margins), len(margins))
        equal(again(here["smoothed"], copy), its, 1e-9)
    columns = ["scorer", "fold", "slope", "weight", "rms", "accuracy", "ece_raw", "ece_calibrated"]
    equal(here["calibration"].select(columns), there["calibration"].select(columns), 1e-9)


@few(15)
@given(drawn=stores())
def test_no_vote_is_lost_and_none_is_counted_twice(drawn):
    margins, votes = drawn
    tables = labels_of(margins, votes)
    decided = votes.filter(pl.col("label_0") != 0.5)
    assert sorted(tables["minority"]["vote_id"]) == sorted(decided["vote_id"])
    people = votes["people"].sum()
    annotators = tables["annotators"]
    assert annotators["votes"].sum() + annotators["ties"].sum() == people
    for scorer in SCORERS:
        d = margins.select(pl.col(f"score_0_{scorer}") - pl.col(f"score_1_{scorer}")).to_series()
        scored = votes.join(margins.filter(d.is_not_null()), on="pair_id", how="semi")
        for stage in ("raw", "calibrated"):
            assert tables["reliability"].filter(scorer=scorer, stage=stage)["votes"].sum() == scored["people"].sum()
        row = tables["calibration"].filter(scorer=scorer, fold=-1).row(0, named=True)
        assert row["votes"] == scored.filter(pl.col("label_0") != 0.5)["people"].sum()
    report = tables["consensus_report"]
    for way in report["aggregation"].unique():
        mine = report.filter(aggregation=way)
        whole, parts = mine.filter(level="all"), mine.filter(pl.col("level") != "all")
        for column in ("pairs", "pairs_labelled", "votes"):
            assert whole[column].item() == parts[column].sum()
        assert whole["pairs"].item() == len(margins)


@few(15)
@given(drawn=stores())
def test_every_number_is_finite_and_null_is_what_is_unknown(drawn):
    for name, frame in labels_of(*drawn).items():
        for column in frame.select(pl.selectors.float()).columns:
            assert frame[column].is_finite().fill_null(True).all(), (name, column)
