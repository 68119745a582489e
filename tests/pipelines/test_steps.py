"""The label steps on a real store whose scores were imported, so that no model runs."""

import shutil

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from pipelines import catalogue, schemas, steps
from pipelines.config import Config, ConfigError, LabelsConfig, ScorerConfig, small_world
from pipelines.labels import margins as mar
from pipelines.scoring import batches
from pipelines.tables import Store, StoreError

SCORERS = ("pick", "clip", "aesthetic")
NUMBERS = ("n_votes", "human_label_0")


def write_scores(store, keys, folder):
    """Write a file of scores per scorer: what people say of an image, with noise; the last has no row for some images."""
    pairs = batches.owned_pairs(store, keys).select("image_id", "prompt_id").collect()
    votes = catalogue.counted_votes(store, keys).select("prompt_id", "image_0_id", "image_1_id", "label_0").collect()
    sides = [
        votes.select("prompt_id", image_id=f"image_{i}_id", won=(1 - 2 * i) * (pl.col("label_0") - 0.5)) for i in (0, 1)
    ]
    liked = pl.concat(sides).group_by("image_id", "prompt_id").agg(pl.col("won").mean())
    pairs = pairs.join(liked, on=["image_id", "prompt_id"], how="left").with_columns(pl.col("won").fill_null(0.0))
    rng = np.random.default_rng(0)
    for name, scale, noise in (("pick", 4.0, 0.5), ("clip", 0.05, 0.6), ("aesthetic", 1.0, 1.5)):
        score = scale * (pairs["won"].to_numpy() + noise * rng.normal(size=len(pairs)))
        rows = pairs.select("image_id", "prompt_id").with_columns(score=pl.Series(score).cast(pl.Float32))
        if name == "aesthetic":
            rows = rows.filter(pl.int_range(pl.len()) % 40 > 0)
        rows.write_parquet(folder / f"{name}.parquet")


def score(store, config, keys):
    for key in keys:
        batches.score_shard(store, key, config.scorers)
    batches.activate(store, config, keys)


def build(store, config, keys, tables=tuple(steps.LABEL_TABLES)):
    """Build label tables in order, read by one process; return table -> Built."""
    labels = steps.Labels(store, config, keys)
    return {name: getattr(labels, name)() for name in tables}


def rebuilt(store, config, keys):
    return {name for name, built in build(store, config, keys).items() if not built.is_reused}


def with_labels(config, **options):
    return config.model_copy(update={"labels": LabelsConfig(**options)})


@pytest.fixture(scope="module")
def made(ingested, sources_of, tiny_world, tmp_path_factory):
    """(store, configuration, shard keys) with all label tables; read only."""
    source, keys = ingested
    folder = tmp_path_factory.mktemp("steps")
    shutil.copytree(source.location, folder / "store")
    store = Store(str(folder / "store"))
    write_scores(store, keys, folder)
    options = small_world(folder).model_dump()
    options["sources"] = sources_of(tiny_world)
    options["scorers"] = [
        ScorerConfig(name=s, kind="imported", checkpoint=str(folder / f"{s}.parquet")) for s in SCORERS
    ]
    config = Config.model_validate(options)
    score(store, config, keys)
    assert rebuilt(store, config, keys) == set(steps.LABEL_TABLES)
    return store, config, keys


@pytest.fixture
def made_copy(made, tmp_path):
    """The same, to be written to."""
    store, config, keys = made
    shutil.copytree(store.location, tmp_path / "store")
    return Store(str(tmp_path / "store")), config, keys


# --- what there is -------------------------------------------------------------------------------------------------


def test_every_label_table_is_built_and_fits_its_declaration(made):
    store, _, _ = made
    for name in steps.LABEL_TABLES:
        table = schemas.TABLES[name]
        frame = store.read(table)
        assert len(frame) > 0, name
        assert table.conform(frame).equals(frame)
        assert frame.select(table.key).n_unique() == len(frame)
        assert table.scorers(frame.columns) in ([], list(SCORERS))
        assert store.manifest(name).schema_version == table.version


def test_tables_made_in_small_pieces_are_the_same(made, made_copy, monkeypatch):
    whole, _, _ = made
    store, config, keys = made_copy
    for name in steps.LABEL_TABLES:
        store.remove(f"_manifests/{name}")
    monkeypatch.setattr(mar, "ROWS", 37)
    build(store, config, keys)
    assert len(whole.read(schemas.PREFERENCES)) > 10 * mar.ROWS
    for name in steps.LABEL_TABLES:
        assert_frame_equal(store.read(schemas.TABLES[name]), whole.read(schemas.TABLES[name]), abs_tol=1e-12)


def test_the_steps_are_named_in_an_order_in_which_they_can_run():
    done = set()
    for name, needed in steps.LABEL_TABLES.items():
        assert set(needed) <= done
        assert name in schemas.TABLES
        done.add(name)


def test_what_a_step_reads_is_what_its_commit_names(made):
    store, _, _ = made
    for name, needed in steps.LABEL_TABLES.items():
        named = {n.split("/")[0] for n in store.manifest(name).inputs}
        assert named & set(steps.LABEL_TABLES) == set(needed), name
        assert {"votes", "catalogue_votes", "catalogue_pairs"} <= named


def test_every_pair_is_one_row_of_every_table_of_pairs(made):
    store, _, _ = made
    pairs = catalogue.all_pairs(store).collect()
    assert len(pairs) > 300
    for table in (schemas.MARGINS, schemas.CONSENSUS, schemas.SMOOTHED, schemas.PREFERENCES):
        assert store.read(table)["pair_id"].equals(pairs["pair_id"]), table.name
    preferences = store.read(schemas.PREFERENCES)
    assert preferences.select(NUMBERS).equals(pairs.select(NUMBERS))


def test_every_decided_vote_that_counts_is_one_row_of_minority(made):
    store, _, keys = made
    votes = catalogue.counted_votes(store, keys).filter(pl.col("label_0") != 0.5).collect()
    columns = ["vote_id", "pair_id", "annotator_id", "label_0"]
    assert store.read(schemas.MINORITY).select(columns).sort("vote_id").equals(votes.select(columns).sort("vote_id"))


def test_every_annotator_with_a_vote_that_counts_is_one_row_and_their_votes_add_up(made):
    store, _, keys = made
    votes = catalogue.counted_votes(store, keys).collect()
    people = votes.select(catalogue.PEOPLE).to_series()
    annotators = store.read(schemas.ANNOTATORS)
    assert annotators["annotator_id"].to_list() == sorted(votes["annotator_id"].fill_null("unknown").unique())
    assert annotators["votes"].sum() + annotators["ties"].sum() == people.sum()
    agreement = store.read(schemas.RATER_AGREEMENT)
    assert agreement["source"].to_list() == [*sorted(votes["source"].unique()), "all"]
    assert annotators["placed"].sum() == agreement["placed"][-1]


def test_margins_are_the_active_scores(made):
    store, _, keys = made
    margins = store.read(schemas.MARGINS).join(catalogue.all_pairs(store).collect(), on=["pair_id", "prompt_id"])
    scores = batches.current_scores(store, list(SCORERS), keys).collect()
    of = {(r[0], r[1], r[2]): r[3] for r in scores.select("scorer", "image_id", "prompt_id", "score").iter_rows()}
    for row in margins.iter_rows(named=True):
        for scorer in SCORERS:
            for i in (0, 1):
                assert row[f"score_{i}_{scorer}"] == of[scorer, row[f"image_{i}_id"], row["prompt_id"]]
    missing = margins["score_0_aesthetic"].null_count()
    assert missing > 0, "the file lacks some"
    assert margins["score_0_pick"].null_count() == 0


def test_generators_are_those_that_the_votes_name(made):
    store, _, keys = made
    votes = catalogue.resolved_votes(store, keys).collect()
    named = votes.filter(pl.col("model_0").is_not_null()).select("pair_id", "model_0", "model_1").unique()
    margins = store.read(schemas.MARGINS).drop_nulls("model_0")
    assert margins.select(named.columns).sort(named.columns).equals(named.sort(named.columns))


def test_a_pair_that_one_scorer_lacks_is_kept_with_what_the_others_say(made):
    store, _, _ = made
    rows = store.read(schemas.PREFERENCES)
    lacking = rows.filter(pl.any_horizontal(pl.col("score_0_aesthetic", "score_1_aesthetic").is_null()))
    assert len(lacking) > 5
    assert lacking["excluded_because"].null_count() == len(lacking), "no score says nothing about the picture"
    for column in ("p_ensemble", "p_linear", "p_log", "z_mean", "minority_score", "is_unanimous", "raw_sum_label_0"):
        assert lacking[column].null_count() == len(lacking), column
    assert lacking["p_smpo"].null_count() == 0
    assert store.read(schemas.CONSENSUS).join(lacking, on="pair_id", how="semi")["voters"].unique().to_list() == [2]


def test_the_commit_of_minority_says_what_it_was_learned_from(made):
    store, _, _ = made
    facts = store.manifest("minority").extra
    assert facts["calibrated_on"] == ["hpd"], "where several people voted on a pair"
    assert facts["targets"] > 500
    assert 0 < facts["share"] < 0.5
    assert np.array(facts["weights"]).shape == (6, 4)
    minority = store.read(schemas.MINORITY)
    assert minority["minority_probability"].null_count() == minority["minority_score"].null_count() > 0


# --- reuse ---------------------------------------------------------------------------------------------------------


def test_a_second_call_reuses_every_table(made):
    store, config, keys = made
    assert rebuilt(store, config, keys) == set()


def test_a_step_can_be_built_by_a_process_of_its_own(made_copy):
    store, config, keys = made_copy
    before = {name: store.manifest(name).content for name in steps.LABEL_TABLES}
    for name in steps.LABEL_TABLES:
        shutil.rmtree(f"{store.location}/_manifests/{name}")
    for name in steps.LABEL_TABLES:
        assert not build(store, config, keys, [name])[name].is_reused
        assert store.manifest(name).content == before[name], "the same bytes"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tie_policy": "drop"}, {"consensus", "consensus_report", "preferences"}),
        ({"tie_policy": "tie_breaker", "tie_breaker": "clip"}, {"consensus", "consensus_report", "preferences"}),
        ({"human_votes": True}, {"consensus", "consensus_report", "preferences"}),
        ({"seed": 1}, {"consensus", "consensus_report", "preferences"}),
        ({"smpo_scorer": "clip"}, {"smoothed", "preferences"}),
        ({"em": True}, {"minority", "annotators", "preferences"}),
        (
            {"generator_term": True},
            {"calibration", "reliability", "smoothed", "minority", "annotators", "preferences"},
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_a_changed_option_rebuilds_what_depends_on_it_and_nothing_else(made_copy, options, expected):
    store, config, keys = made_copy
    assert rebuilt(store, with_labels(config, **options), keys) == expected
    assert rebuilt(store, with_labels(config, **options), keys) == set()


def test_options_reach_the_tables(made_copy):
    store, config, keys = made_copy
    build(store, with_labels(config, human_votes=True, smpo_scorer="clip", em=True, generator_term=True), keys)
    assert store.read(schemas.CONSENSUS)["vote_human"].null_count() < 400
    smoothed = store.read(schemas.SMOOTHED)
    assert smoothed["p_smpo"].equals(smoothed["smpo_clip"])
    assert store.read(schemas.MINORITY)["em_probability"].null_count() == 0
    assert sum(s.startswith("generator:") for s in store.read(schemas.CALIBRATION)["scorer"].unique()) == 4


def test_one_scorer_less_rebuilds_everything_without_its_columns(made_copy):
    store, config, keys = made_copy
    config = config.model_copy(update={"scorers": config.scorers[:2]})
    assert rebuilt(store, config, keys) == set(steps.LABEL_TABLES)
    assert "score_0_aesthetic" not in store.read(schemas.PREFERENCES).columns
    assert store.read(schemas.PREFERENCES)["p_ensemble"].null_count() == 0


def test_one_scorer_alone_gives_every_table(made_copy):
    store, config, keys = made_copy
    build(store, config.model_copy(update={"scorers": config.scorers[:1]}), keys)
    minority = store.read(schemas.MINORITY)
    assert minority["confidence"].null_count() == 0
    assert minority["stability"].null_count() == minority["metric"].null_count() == len(minority)
    assert store.read(schemas.SMOOTHED)["z_std"].null_count() == len(store.read(schemas.SMOOTHED))


def test_another_reason_for_a_missing_score_is_read_by_preferences_and_changes_no_label(made_copy):
    store, config, keys = made_copy
    file = f"{store.location}/aesthetic.parquet"
    given, every = pl.read_parquet(config.scorers[2].checkpoint), pl.read_parquet(config.scorers[0].checkpoint)
    every.drop("score").join(given, on=["image_id", "prompt_id"], how="left").write_parquet(file)
    last = config.scorers[2].model_copy(update={"checkpoint": file})
    config = config.model_copy(update={"scorers": (*config.scorers[:2], last)})
    score(store, config, keys)
    before = store.read(schemas.MARGINS)
    assert rebuilt(store, config, keys) == {"margins", "preferences"}
    assert store.read(schemas.MARGINS).equals(before)


# --- refusals ------------------------------------------------------------------------------------------------------


def changed_scores(store, config, keys):
    """Another file of scores of the first scorer: scored and active, and no label table has seen it."""
    file = f"{store.location}/pick.parquet"
    pl.read_parquet(config.scorers[0].checkpoint).with_columns(pl.col("score") * 2).write_parquet(file)
    first = config.scorers[0].model_copy(update={"checkpoint": file})
    config = config.model_copy(update={"scorers": (first, *config.scorers[1:])})
    score(store, config, keys)
    return config


def test_margins_of_other_scores_are_refused_with_what_to_do(made_copy):
    store, config, keys = made_copy
    config = changed_scores(store, config, keys)
    for name in set(steps.LABEL_TABLES) - {"margins"}:
        with pytest.raises(
            StoreError, match=r"margins/all was made from another scores/pick.*materialize margins again"
        ):
            build(store, config, keys, [name])
    build(store, config, keys)
    assert rebuilt(store, config, keys) == set()


def test_a_table_made_from_other_margins_is_refused_by_those_that_read_it(made_copy):
    store, config, keys = made_copy
    config = changed_scores(store, config, keys)
    build(store, config, keys, ["margins"])
    for name, needed in steps.LABEL_TABLES.items():
        if set(needed) > {"margins"}:
            with pytest.raises(
                StoreError, match=r"was made from another margins/all than the present one; materialize"
            ):
                build(store, config, keys, [name])
    assert not build(store, config, keys, ["consensus"])["consensus"].is_reused


def test_a_step_without_its_inputs_says_what_to_run(made_copy):
    store, config, keys = made_copy
    shutil.rmtree(f"{store.location}/_manifests/calibration")
    with pytest.raises(StoreError, match=r"'calibration' has no partition 'all'; materialize it first"):
        build(store, config, keys, ["smoothed"])


def test_scores_that_are_not_the_active_ones_are_refused(made_copy):
    store, config, keys = made_copy
    other = config.scorers[0].model_copy(update={"revision": "2"})
    config = config.model_copy(update={"scorers": (other, *config.scorers[1:])})
    with pytest.raises(StoreError, match="pick"):
        build(store, config, keys, ["margins"])


def test_a_catalogue_that_has_not_seen_every_shard_is_refused(made_copy):
    store, config, keys = made_copy
    with pytest.raises(StoreError, match="catalogue"):
        build(store, config, keys[:-1], ["margins"])


def test_the_published_constants_are_refused_where_no_cosine_is_known(made_copy):
    store, config, keys = made_copy
    with pytest.raises(
        ConfigError, match=r"'pick' is of kind 'imported'.*set labels.smpo_scorer to one of kind 'pickscore'"
    ):
        build(store, with_labels(config, smpo_constants="published"), keys)


@pytest.mark.parametrize(
    ("options", "table", "why"),
    [
        ({"tie_policy": "drop"}, "preferences", "consensus was made under other options"),
        ({"generator_term": True}, "minority", "calibration was made under other options"),
        ({"em": True}, "annotators", "minority was made under other options"),
    ],
)
def test_a_table_made_under_other_options_is_refused_by_those_that_read_it(made_copy, options, table, why):
    store, config, keys = made_copy
    before = store.read(schemas.TABLES[table])
    with pytest.raises(StoreError, match=f"{why}.*materialize {why.split()[0]} again"):
        build(store, with_labels(config, **options), keys, [table])
    assert store.read(schemas.TABLES[table]).equals(before)


def test_a_table_of_other_scorers_or_older_code_is_refused_by_those_that_read_it(made_copy, monkeypatch):
    store, config, keys = made_copy
    fewer = config.model_copy(update={"scorers": config.scorers[:2]})
    with pytest.raises(StoreError, match=r"margins was made (from another|under other)"):
        build(store, fewer, keys, ["preferences"])
    monkeypatch.setattr(steps, "CODE_VERSION", "another")
    with pytest.raises(StoreError, match="another version of the program; materialize margins again"):
        build(store, config, keys, ["calibration"])


def test_a_store_without_any_pair_has_every_table_without_rows_of_pairs(
    tmp_path, write_pickapic, raw_rows, ingest_all, made, sources_of
):
    _, config, _ = made
    write_pickapic(tmp_path / "pickapic", [{**r, "caption": None} for r in raw_rows[:3]])
    store = Store(str(tmp_path / "store"))
    keys = ingest_all(store, sources_of(tmp_path)[:1])
    config = config.model_copy(update={"sources": sources_of(tmp_path)[:1]})
    score(store, config, keys)
    built = build(store, config, keys)
    of_pairs = ("margins", "consensus", "smoothed", "minority", "preferences")
    assert [built[n].manifest.rows for n in of_pairs] == [0] * len(of_pairs)


# --- real models ---------------------------------------------------------------------------------------------------


def test_the_scale_of_a_pickscore_comes_from_its_manifest_and_a_clip_scores_cosine_is_itself(
    ingested_copy, tiny_config
):
    store, keys = ingested_copy
    score(store, tiny_config, keys)
    config = with_labels(tiny_config, smpo_constants="published")
    build(store, config, keys)
    calibration = store.read(schemas.CALIBRATION).filter(fold=-1)
    scales = dict(calibration.select("scorer", "logit_scale").rows())
    extra = next(m.extra for m in store.manifests("scores") if m.partition.startswith("pickscore/"))
    assert scales == {"pickscore": extra["logit_scale"], "clip": 1.0, "ensemble": None}
    assert scales["pickscore"] > 5
    d = store.read(schemas.MARGINS)
    low, high = 0.11543526500463486, 0.28201571106910706
    cosine = (d["score_0_pickscore"] - d["score_1_pickscore"]).to_numpy() / scales["pickscore"]
    expected = 1 / (1 + np.exp(-cosine / (high - low)))
    assert store.read(schemas.SMOOTHED)["p_smpo"].to_list() == pytest.approx(expected.tolist(), abs=1e-5)
    clip = config.model_copy(update={"labels": LabelsConfig(smpo_constants="published", smpo_scorer="clip")})
    with pytest.raises(ConfigError, match="'clip' is of kind 'clip'"):
        build(store, clip, keys)
