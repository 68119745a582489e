"""Checks on a small store whose scores were imported, and on copies of it that are damaged in one way each."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipelines import catalogue, checks, orientation, schemas, steps
from pipelines.config import ChecksConfig, Config, LabelsConfig, ScorerConfig, small_world
from pipelines.labels import calibration as cal
from pipelines.scoring import batches
from pipelines.tables import Store

SCORERS = ("pick", "clip")
IMAGE_KEY = ["image_id", "prompt_id"]


def write_scores(store, keys, folder, name, noise, seed=0):
    """Write a file of scores: how often people chose an image under a prompt, with noise."""
    pairs = batches.owned_pairs(store, keys).select(IMAGE_KEY).collect()
    votes = catalogue.counted_votes(store, keys).select("prompt_id", "image_0_id", "image_1_id", "label_0").collect()
    sides = [
        votes.select("prompt_id", image_id=f"image_{i}_id", won=(1 - 2 * i) * (pl.col("label_0") - 0.5)) for i in (0, 1)
    ]
    liked = pl.concat(sides).group_by(IMAGE_KEY).agg(pl.col("won").mean())
    rows = pairs.join(liked, on=IMAGE_KEY, how="left").with_columns(pl.col("won").fill_null(0.0))
    score = rows["won"].to_numpy() + noise * np.random.default_rng(seed).normal(size=len(rows))
    rows.select(*IMAGE_KEY, score=pl.Series(score).cast(pl.Float32)).write_parquet(folder / f"{name}.parquet")


def label(store, config, keys):
    """Score, activate, build every label table and the drift."""
    for key in keys:
        batches.score_shard(store, key, config.scorers)
    batches.activate(store, config, keys)
    labels = steps.Labels(store, config, keys)
    for name in steps.LABEL_TABLES:
        getattr(labels, name)()
    return labels.drift()


@pytest.fixture(scope="module")
def made(ingested, sources_of, tiny_world, tmp_path_factory):
    """(store, configuration, shard keys) with all label tables; read only."""
    source, keys = ingested
    folder = tmp_path_factory.mktemp("checks")
    shutil.copytree(source.location, folder / "store")
    store = Store(str(folder / "store"))
    for name, noise in zip(SCORERS, (0.3, 0.5), strict=True):
        write_scores(store, keys, folder, name, noise)
    options = small_world(folder).model_dump()
    options["sources"] = sources_of(tiny_world)
    options["scorers"] = [
        ScorerConfig(name=s, kind="imported", checkpoint=str(folder / f"{s}.parquet")) for s in SCORERS
    ]
    # The tables are small: with the usual limit the few votes' noise would warn.
    config = Config.model_validate(options | {"checks": ChecksConfig(sample_pairs=200, calibration_error=0.2)})
    label(store, config, keys)
    return store, config, keys


@pytest.fixture
def made_copy(made, tmp_path):
    """The same, to be written to; its files of scores too."""
    store, config, keys = made
    shutil.copytree(store.location, tmp_path / "store")
    scorers = []
    for scorer in config.scorers:
        file = shutil.copy(scorer.checkpoint, tmp_path / f"{scorer.name}.parquet")
        scorers.append(scorer.model_copy(update={"checkpoint": str(file)}))
    return Store(str(tmp_path / "store")), config.model_copy(update={"scorers": tuple(scorers)}), keys


def of(store, config, table, partitions=None):
    return {f.name: f for f in checks.of_table(store, config, table, partitions)}


def failed(store, config, table, partitions=None):
    return {name for name, f in of(store, config, table, partitions).items() if not f.passed}


def overwrite(store, table, change, partition="all"):
    """Change a file and leave its manifest as it is."""
    file = store.data_path(table, partition)
    frame = pl.read_parquet(file)
    change(frame).write_parquet(file)


def commit(store, table, change, partition="all"):
    """Change a file and its manifest, as a writer that checks nothing would."""
    overwrite(store, table, change, partition)
    data = Path(store.data_path(table, partition)).read_bytes()
    frame = pl.read_parquet(store.data_path(table, partition))
    manifest = dataclasses.asdict(store.manifest(table, partition))
    manifest |= {"rows": len(frame), "bytes": len(data), "content": hashlib.sha256(data).hexdigest()}
    if "status" in frame.columns:
        manifest["rows_by_status"] = dict(frame.group_by("status").len().sort("status").iter_rows())
    store.publish(f"_manifests/{table}/{partition}.json", json.dumps(manifest).encode())


def turned(column):
    return (1 - pl.col(column)).alias(column)


def in_half(*changes):
    """Change every second row."""
    names = [c.meta.output_name() for c in changes]
    return lambda f: f.with_columns(
        pl.when(pl.int_range(pl.len()) % 2 == 0).then(c).otherwise(n).alias(n)
        for c, n in zip(changes, names, strict=True)
    )


# --- a sound store ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", schemas.TABLES)
def test_the_names_of_a_tables_checks_are_those_of_its_findings_also_where_it_is_not_there(made, table, tmp_path):
    store, config, _ = made
    named = checks.names(table)
    assert [(f.name, f.blocking) for f in checks.of_table(store, config, table)] == named
    assert [(f.name, f.blocking) for f in checks.of_table(Store(str(tmp_path)), config, table)] == named
    assert {"schema", "unique_key"} <= {name for name, _ in named}


def test_everything_passes_on_a_sound_store(made):
    store, config, _ = made
    there = [table for table in schemas.TABLES if store.manifests(table)]
    assert set(there) >= {"votes", "images", "catalogue_pairs", "scores", *steps.LABEL_TABLES, "frozen_labels", "drift"}
    for table in there:
        found = checks.of_table(store, config, table)
        for finding in found:
            assert finding.passed, (table, finding)
            assert finding.description
            assert all(isinstance(n, int | float) and math.isfinite(n) for n in finding.numbers.values()), finding
        assert found[0].numbers["rows"] == sum(m.rows for m in store.manifests(table))


def test_every_check_looks_at_what_it_says(made):
    store, config, keys = made
    votes = of(store, config, "votes")
    assert votes["rows_accounted"].numbers["rows_in"] == sum(store.require("votes", k).extra["rows_in"] for k in keys)
    scores = of(store, config, "scores")["rows_accounted"].numbers
    assert scores["rows"] == scores["rows_expected"] == 2 * store.require("catalogue_scorables").rows
    pairs = store.require("catalogue_pairs").rows
    assert pairs > 300
    for table in ("margins", "consensus", "smoothed", "preferences"):
        assert of(store, config, table)["orientation_symmetry"].numbers["pairs_exchanged"] == pairs, table
        assert of(store, config, table)["rows_accounted"].numbers["rows_expected"] == pairs
    margins = of(store, config, "margins")["orientation_symmetry"]
    assert 0.3 < margins.numbers["votes_listed_second"] / margins.numbers["votes"] < 0.7
    assert margins.numbers["standard_errors_apart"] < orientation.STANDARD_ERRORS
    assert "bytes" in of(store, config, "images")["schema"].description


@pytest.mark.parametrize(
    "options",
    [
        {"tie_policy": "keep_order"},
        {"tie_policy": "tie_breaker", "tie_breaker": "clip", "human_votes": True},
        {"tie_policy": "drop", "em": True, "generator_term": True, "seed": 3},
    ],
    ids=lambda o: o["tie_policy"],
)
def test_ties_equal_scores_and_every_option_are_symmetric_where_they_are_meant_to_be(made_copy, options):
    store, config, keys = made_copy
    for scorer in config.scorers:
        # Many equal scores, and two scorers that are often even.
        rounded = pl.read_parquet(scorer.checkpoint).with_columns((pl.col("score") * 4).round() / 4)
        rounded.write_parquet(scorer.checkpoint)
    config = config.model_copy(update={"labels": LabelsConfig(**options)})
    label(store, config, keys)
    decided = store.read(schemas.CONSENSUS)["decided_by"].unique()
    assert options["tie_policy"] in decided or options["tie_policy"] == "drop"
    for table in orientation.TABLES:
        assert failed(store, config, table) <= {"calibration_error"}, (table, of(store, config, table))


def test_a_store_in_which_nobody_has_voted_has_nothing_to_complain_of(made_copy):
    store, config, keys = made_copy
    nothing = {"label_0": pl.lit(None, pl.Float64), "count": pl.lit(None, pl.Int64), "status": pl.lit("unlabelled")}
    for key in keys:
        commit(store, "votes", lambda f: f.with_columns(**nothing), key)
    store.remove("frozen_sample")
    store.remove("frozen_labels")
    catalogue.build(store, keys)
    label(store, config, keys)
    assert store.require("frozen_sample").rows == 0
    for table in ("votes", "catalogue_pairs", *steps.LABEL_TABLES, "frozen_sample", "frozen_labels", "drift"):
        assert failed(store, config, table) == set(), of(store, config, table)


# --- files that are not what they were ------------------------------------------------------------------------------


def test_a_file_that_was_cut_off_is_found_and_nothing_else_is_looked_at(made_copy):
    store, config, _ = made_copy
    file = Path(store.data_path("consensus"))
    file.write_bytes(file.read_bytes()[:-100])
    found = of(store, config, "consensus")
    assert not any(f.passed for f in found.values())
    assert "not readable as parquet" in found["schema"].description
    assert "see check schema" in found["rows_accounted"].description


def test_a_byte_that_changed_is_found(made_copy):
    store, config, _ = made_copy
    file = Path(store.data_path("minority"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = of(store, config, "minority")["schema"]
    assert not found.passed
    assert "sha256" in found.description or "cannot be checked" in found.description


def test_a_file_that_is_gone_is_found(made_copy):
    store, config, keys = made_copy
    Path(store.data_path("images", keys[1])).unlink()
    found = of(store, config, "images")["schema"]
    assert not found.passed
    assert f"{keys[1]}: there is no commit, or no file" in found.description
    assert of(store, config, "images", [keys[0]])["schema"].passed


def test_a_file_that_somebody_wrote_over_has_another_size_and_number_of_rows(made_copy):
    store, config, _ = made_copy
    overwrite(store, "preferences", lambda f: f.head(50))
    found = of(store, config, "preferences")
    assert "the file has 50 rows, its manifest says" in found["schema"].description
    assert "bytes" in found["schema"].description
    assert not found["rows_accounted"].passed


def test_columns_in_another_order_or_of_another_type_are_found(made_copy):
    store, config, _ = made_copy
    swapped = {"score_0_pick": "score_1_pick", "score_1_pick": "score_0_pick"}
    commit(store, "margins", lambda f: f.select(pl.col(swapped.get(c, c)) for c in f.columns))
    assert "expected the columns" in of(store, config, "margins")["schema"].description
    commit(store, "consensus", lambda f: f.with_columns(pl.col("votes_0").cast(pl.Int64)))
    assert "column votes_0: expected Int32, found Int64" in of(store, config, "consensus")["schema"].description
    commit(store, "smoothed", lambda f: f.rename({"smpo_pick": "smpo_other"}))
    assert "expected the columns" in of(store, config, "smoothed")["schema"].description


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("preferences", pl.lit(None, pl.String).alias("split"), "column split: 1 values are null"),
        ("preferences", pl.lit("dev").alias("split"), "column split: 1 values are none of"),
        ("smoothed", pl.lit(1.5).alias("p_log"), "column p_log: 1 values are above 1.0"),
        ("minority", pl.lit(0, pl.Int64).alias("people"), "column people: 1 values are below 1"),
    ],
)
def test_a_value_that_is_not_allowed_is_found(made_copy, table, change, said):
    store, config, _ = made_copy
    name = change.meta.output_name()
    commit(
        store,
        table,
        lambda f: f.with_columns(pl.when(pl.int_range(pl.len()) == 7).then(change).otherwise(name).alias(name)),
    )
    found = of(store, config, table)
    assert not found["schema"].passed
    assert said in found["schema"].description
    assert found["unique_key"].passed


def test_a_nan_is_no_value_out_of_range_but_a_nan(made_copy):
    store, config, _ = made_copy
    nan = pl.when(pl.int_range(pl.len()) == 3).then(float("nan"))
    commit(store, "smoothed", lambda f: f.with_columns(nan.otherwise("p_log").alias("p_log")))
    found = of(store, config, "smoothed")
    assert found["schema"].passed
    assert not found["no_nan"].passed
    assert "column p_log: 1 values are NaN" in found["no_nan"].description
    assert found["no_nan"].numbers == {"nan": 1}


@pytest.mark.parametrize("table", ["margins", "consensus", "minority", "frozen_sample", "calibration"])
def test_a_row_that_is_there_twice_is_found(made_copy, table):
    store, config, _ = made_copy
    commit(store, table, lambda f: pl.concat([f, f.slice(5, 1)]))
    assert "unique_key" in failed(store, config, table)
    if "rows_accounted" in dict(checks.names(table)):
        assert "rows_accounted" in failed(store, config, table)


# --- rows that are not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        *("margins", "consensus", "smoothed", "preferences", "pair_groups", "minority", "annotators", "calibration"),
        *("catalogue_pairs", "catalogue_scorables"),
    ],
)
def test_a_row_that_is_missing_is_found(made_copy, table):
    store, config, _ = made_copy
    commit(store, table, lambda f: pl.concat([f.head(4), f.slice(5)]))
    found = of(store, config, table)
    assert not found["rows_accounted"].passed
    assert found["schema"].passed
    assert found["unique_key"].passed


def test_a_missing_score_and_one_of_another_shard_are_found_in_their_file(made_copy):
    store, config, keys = made_copy
    revision = store.current_revisions()["pick"]
    first, second = (batches.partition("pick", revision, k) for k in keys[:2])
    strange = pl.read_parquet(store.data_path("scores", second)).head(1)
    commit(store, "scores", lambda f: f.slice(1), first)
    assert "1 have no row" in of(store, config, "scores", [first])["rows_accounted"].description
    commit(store, "scores", lambda f: pl.concat([f, strange]), first)
    found = of(store, config, "scores", [first, second])["rows_accounted"]
    assert f"{first}: of" in found.description
    assert "1 have no row" in found.description
    assert "1 are of none of them" in found.description
    assert second not in found.description
    assert of(store, config, "scores", [second])["rows_accounted"].passed


def test_votes_of_a_source_row_that_are_missing_are_found(made_copy):
    store, config, keys = made_copy
    commit(store, "votes", lambda f: f.filter(pl.col("source_row") != f["source_row"][3]), keys[0])
    found = of(store, config, "votes", keys)["rows_accounted"]
    assert not found.passed
    assert f"{keys[0]}: the source has 60 rows, 59 are here" in found.description


def test_a_manifest_that_counts_other_statuses_is_found(made_copy):
    store, config, keys = made_copy
    overwrite(store, "votes", lambda f: f.with_columns(status=pl.lit("unlabelled")), keys[0])
    assert "the rows' statuses are {'unlabelled': 60}" in of(store, config, "votes")["rows_accounted"].description


def test_a_pair_of_other_images_under_the_same_id_is_found(made_copy):
    store, config, _ = made_copy
    turned = in_half(pl.col("image_1_id").alias("image_0_id"), pl.col("image_0_id").alias("image_1_id"))
    commit(store, "preferences", turned)
    assert {"rows_accounted", "orientation_symmetry"} <= failed(store, config, "preferences")


# --- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        ("margins", (pl.col("score_1_pick").alias("score_0_pick"), pl.col("score_0_pick").alias("score_1_pick"))),
        ("consensus", (turned("consensus_label_0"),)),
        ("consensus", (-pl.col("vote_clip"),)),
        ("consensus", (turned("random_scorer_label_0"),)),
        ("smoothed", (turned("p_ensemble"),)),
        ("smoothed", (-pl.col("z_mean"),)),
        ("minority", (turned("label_0"),)),
        ("minority", (turned("minority_score"),)),
        ("minority", (pl.col("others") + 1,)),
        ("preferences", (turned("human_label_0"),)),
        ("preferences", (turned("p_smpo"),)),
        ("preferences", (~pl.col("is_unanimous"),)),
        ("preferences", (pl.col("score_1_clip").alias("score_0_clip"), pl.col("score_0_clip").alias("score_1_clip"))),
    ],
    ids=lambda v: v if isinstance(v, str) else v[0].meta.output_name(),
)
def test_a_column_that_is_turned_round_in_half_the_rows_is_found(made_copy, table, changes):
    store, config, _ = made_copy
    commit(store, table, in_half(*changes))
    found = of(store, config, table)
    assert {name for name, f in found.items() if not f.passed} >= {"orientation_symmetry"}
    for change in changes:
        assert f"column {change.meta.output_name()}: " in found["orientation_symmetry"].description
    assert found["schema"].passed


def test_an_accuracy_that_is_not_that_of_the_votes_is_found(made_copy):
    store, config, _ = made_copy
    commit(store, "calibration", lambda f: f.with_columns(turned("accuracy")))
    found = of(store, config, "calibration")["orientation_symmetry"]
    assert not found.passed
    assert "calibration says that pick agrees with 0." in found.description


@pytest.mark.parametrize("source", ["pickapic", "hpd"])
def test_a_reader_that_forgets_to_turn_labels_round_is_found_and_named(made_copy, source):
    store, config, keys = made_copy
    forgotten = pl.when("was_listed_second").then(1 - pl.col("label_0")).otherwise("label_0").alias("label_0")
    for key in keys:
        if key.startswith(source):
            commit(store, "votes", lambda f: f.with_columns(forgotten), key)
    catalogue.build(store, keys)
    label(store, config, keys)
    for table in ("margins", "calibration"):
        found = of(store, config, table)
        assert not found["orientation_symmetry"].passed
        assert f"the reader of {source} does not turn labels round" in found["orientation_symmetry"].description
        assert found["orientation_symmetry"].description.count("the reader of") <= len(SCORERS), "of that source alone"
        assert found["orientation_symmetry"].blocking
    assert of(store, config, "votes")["schema"].passed, "nothing else shows it"
    assert of(store, config, "consensus")["orientation_symmetry"].passed


def test_a_fit_for_which_a_tie_is_half_a_vote_more_for_image_0_is_found(made, monkeypatch):
    store, config, _ = made
    honest = cal.votes_per_pair

    def favouring(margins, votes):
        return honest(margins, votes.with_columns(pl.col("label_0").replace(0.5, 0.75)))

    monkeypatch.setattr(cal, "votes_per_pair", favouring)
    found = of(store, config, "calibration")["orientation_symmetry"]
    assert not found.passed
    assert "column slope: " in found.description


def test_a_table_that_is_older_than_the_options_cannot_be_checked_and_says_what_to_do(made):
    store, config, _ = made
    config = config.model_copy(update={"labels": LabelsConfig(tie_policy="keep_order")})
    found = of(store, config, "consensus")["orientation_symmetry"]
    assert not found.passed
    assert "materialize consensus again" in found.description


# --- what only warns -------------------------------------------------------------------------------------------------


def with_checks(config, **options):
    return config.model_copy(update={"checks": config.checks.model_copy(update=options)})


def test_a_calibration_error_above_the_limit_warns(made):
    store, config, _ = made
    found = of(store, with_checks(config, calibration_error=0.0), "calibration")["calibration_error"]
    assert (found.passed, found.blocking) == (False, False)
    assert "of pick is 0." in found.description
    assert set(found.numbers) == {"ece_pick", "ece_clip", "ece_ensemble"}


def test_excluded_pairs_above_the_limit_warn_with_the_reasons(made_copy):
    store, config, _ = made_copy
    place = pl.int_range(pl.len()) % 4
    why = pl.when(place == 0).then(pl.lit("image_0 truncated: no end"))
    why = why.when(place == 1).then(pl.lit("image_1 not scored"))
    commit(store, "preferences", lambda f: f.head(300).with_columns(excluded_because=why))
    found = of(store, with_checks(config, excluded_share=0.4), "preferences")["excluded_pairs"]
    assert (found.passed, found.blocking) == (False, False)
    assert "150 of 300 pairs (50.0%) are excluded: 75" in found.description
    assert "75 truncated" in found.description
    assert "75 not scored" in found.description
    assert found.numbers == {"excluded": 150, "share_excluded": 0.5}
    assert of(store, with_checks(config, excluded_share=0.5), "preferences")["excluded_pairs"].passed


# --- drift -----------------------------------------------------------------------------------------------------------


def drift_of(store):
    return store.read(schemas.DRIFT).sort("measurement", "subject")


def test_the_first_measurement_has_nothing_to_compare_with_and_a_second_run_changes_nothing(made_copy):
    store, config, keys = made_copy
    found = of(store, config, "drift")
    for name in ("drift_accuracy", "drift_consensus"):
        assert found[name].passed
        assert "nothing to compare with yet" in found[name].description
    assert all(b.is_reused for b in label(store, config, keys).values())
    rows = drift_of(store)
    assert rows["subject"].to_list() == ["clip", "consensus", "pick"]
    assert rows["pairs"].to_list()[::2] == [200, 200]
    assert rows["measurement"].unique().to_list() == [1]


def test_another_revision_of_one_scorer_is_measured_and_warns_beyond_the_limits(made_copy):
    store, config, keys = made_copy
    sample, before = store.read(schemas.FROZEN_SAMPLE), store.read(schemas.CONSENSUS)
    first = store.current_revisions()
    write_scores(store, keys, Path(config.scorers[0].checkpoint).parent, "pick", noise=3.0, seed=1)
    built = label(store, config, keys)
    assert {name for name, b in built.items() if not b.is_reused} == {"frozen_labels", "drift"}
    assert [m.extra["measurement"] for m in store.manifests("frozen_labels")] == [1, 2]
    rows = drift_of(store).filter(pl.col("measurement") == 2)
    clip, consensus, pick = rows.iter_rows(named=True)
    assert (pick["revision_before"], pick["revision"]) == (first["pick"], store.current_revisions()["pick"])
    assert pick["revision"] != pick["revision_before"]
    assert (clip["before"], clip["points"]) == (None, None), "its revision is the same"
    assert pick["points"] < -5

    labels = sample.join(before, on="pair_id").join(store.read(schemas.CONSENSUS), on="pair_id", suffix="_now")
    changed = labels.select(pl.col("consensus_label_0").ne_missing(pl.col("consensus_label_0_now")).mean()).item()
    assert consensus["share_changed"] == pytest.approx(changed)
    assert changed > 0.02
    margins = sample.join(store.read(schemas.MARGINS), on="pair_id")
    d = (margins["score_0_pick"] - margins["score_1_pick"]).to_numpy()
    side = np.sign(margins["human_label_0"].to_numpy() - 0.5)
    assert pick["accuracy"] == pytest.approx(((np.sign(d) * side + 1) / 2).mean())

    found = of(store, config, "drift")
    assert not found["drift_accuracy"].passed
    assert not found["drift_consensus"].passed
    assert not found["drift_accuracy"].blocking
    assert f"pick: {pick['points']:+.1f} points" in found["drift_accuracy"].description
    assert "clip" not in found["drift_accuracy"].description
    generous = with_checks(config, accuracy_points=100, consensus_share=1)
    assert failed(store, generous, "drift") == set()


def test_going_back_to_a_revision_is_a_measurement_of_its_own(made_copy):
    store, config, keys = made_copy
    file = Path(config.scorers[0].checkpoint)
    good = file.read_bytes()
    write_scores(store, keys, file.parent, "pick", noise=3.0, seed=1)
    label(store, config, keys)
    file.write_bytes(good)
    label(store, config, keys)
    rows = drift_of(store).filter(pl.col("subject") == "pick")
    assert rows["before"].to_list() == [None, 1, 2]
    assert rows["points"][2] == pytest.approx(-rows["points"][1])
    assert rows["revision"][0] == rows["revision"][2]
    assert all(b.is_reused for b in label(store, config, keys).values())


def test_the_sample_stays_when_options_and_votes_change_and_pairs_that_leave_are_counted(made_copy):
    store, config, keys = made_copy
    sample = store.read(schemas.FROZEN_SAMPLE)
    config = with_checks(config, sample_pairs=7)
    kept = [k for k in keys if k.startswith("pickapic")]
    catalogue.build(store, kept)
    built = label(store, config, kept)
    assert built["frozen_sample"].is_reused
    assert store.read(schemas.FROZEN_SAMPLE).equals(sample)
    rows, left = drift_of(store), catalogue.all_pairs(store).collect()
    gone = len(sample.join(left, on="pair_id", how="anti"))
    assert 0 < gone < len(sample)
    assert rows["measurement"].unique().to_list() == [1], "the revisions are the same"
    assert rows["pairs_gone"].to_list() == [gone] * 3
    assert (rows["pairs"] + rows["pairs_without_choice"] + rows["pairs_gone"]).to_list() == [len(sample)] * 3
    assert (
        f"{gone} pairs of the frozen sample left the store" in of(store, config, "drift")["drift_accuracy"].description
    )
    assert failed(store, config, "frozen_labels") == set()


def test_a_sample_of_which_every_pair_left_warns_with_what_draws_another_one(made_copy):
    store, config, keys = made_copy
    for table in ("frozen_sample", "frozen_labels"):
        shutil.rmtree(store.path(table))
    first, rest = keys[:1], keys[1:]
    catalogue.build(store, first)
    label(store, config, first)
    assert failed(store, config, "drift") == set()
    catalogue.build(store, rest)
    label(store, config, rest)
    sample = store.read(schemas.FROZEN_SAMPLE)
    assert len(sample.join(catalogue.all_pairs(store).collect(), on="pair_id")) == 0
    found = of(store, config, "drift")["drift_accuracy"]
    assert not found.passed
    assert f"all {len(sample)} pairs of the frozen sample left the store" in found.description
    for table in ("frozen_sample", "frozen_labels"):
        shutil.rmtree(store.path(table))
    label(store, config, rest)
    assert failed(store, config, "drift") == set()
    assert drift_of(store)["pairs"].max() > 0


def test_a_change_of_the_tie_policy_is_drift_of_the_consensus_alone(made_copy):
    store, config, keys = made_copy
    config = config.model_copy(update={"labels": LabelsConfig(tie_policy="drop")})
    label(store, config, keys)
    now = drift_of(store).filter(pl.col("measurement") == 2)
    assert now["points"].null_count() == 2
    assert now.filter(pl.col("subject") == "consensus")["share_changed"].item() > 0
    assert failed(store, config, "drift") == {"drift_consensus"}


def test_a_sample_that_was_replaced_is_refused_with_what_to_do(made_copy):
    store, config, keys = made_copy
    commit(store, "frozen_sample", lambda f: f.head(10))
    with pytest.raises(steps.StoreError, match=r"another frozen_sample.*remove the folders"):
        steps.Labels(store, config, keys).drift()


def test_scores_that_are_made_again_under_the_same_revision_take_the_place_of_the_measurement(made_copy):
    store, config, keys = made_copy
    before = drift_of(store)
    # Votes on other pairs came: the pairs of the sample say the same.
    sample = store.read(schemas.FROZEN_SAMPLE)["pair_id"]
    others = ~pl.col("pair_id").is_in(sample.implode()) & pl.col("pair_id").is_not_null() & (pl.col("status") == "ok")
    for key in keys:
        turned = pl.when(others).then(1 - pl.col("label_0")).otherwise("label_0").alias("label_0")
        commit(store, "votes", lambda f, t=turned: f.with_columns(t), key)
    catalogue.build(store, keys)
    built = label(store, config, keys)
    assert not built["frozen_labels"].is_reused
    assert len(store.manifests("frozen_labels")) == 1
    assert drift_of(store).equals(before)
