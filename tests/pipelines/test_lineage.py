"""The declared lineage against the tables' schemas, the steps' dependencies, and what changes when a column changes."""

import shutil
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest

from pipelines import catalogue, ingest, lineage, schemas, steps
from pipelines.config import Config, LabelsConfig, ScorerConfig, small_world
from pipelines.scoring import batches, report
from pipelines.tables import Store

SCORERS = ("pick", "clip", "aesthetic")
SHARD_TABLES = {t.name for t in ingest.TABLES}
CATALOGUE_TABLES = {t.name for t in catalogue.TABLES}
REPORTS = ("scorer_report", "scorer_correlation")
LABELS = LabelsConfig(human_votes=True, generator_term=True, em=True)
"""Options under which everything is computed that can be."""


def of(table):
    return lineage.lineage(table, SCORERS)


def declared(upstream):
    """Return the schema of an upstream table, by its asset key."""
    return schemas.SCORES if upstream.startswith("scores/") else schemas.TABLES[upstream].of(SCORERS)


# --- against schemas and dependencies ------------------------------------------------------------------------------------


def test_every_label_table_and_the_scorer_report_have_a_lineage():
    assert set(lineage.TABLES) == {*steps.LABEL_TABLES, *REPORTS}


@pytest.mark.parametrize("table", lineage.TABLES)
def test_every_column_has_an_entry_in_the_order_of_the_table(table):
    assert list(of(table)) == [c.name for c in schemas.TABLES[table].of(SCORERS).columns]


@pytest.mark.parametrize("table", lineage.TABLES)
def test_no_declaration_is_of_a_column_that_the_table_lacks(table):
    assert set(lineage._LINEAGE[table]) == {c.name for c in schemas.TABLES[table].columns}


@pytest.mark.parametrize("table", lineage.TABLES)
def test_every_upstream_column_is_a_column_of_its_table(table):
    for column, sources in of(table).items():
        assert len(set(sources)) == len(sources)
        for upstream, name in sources:
            assert name in [c.name for c in declared(upstream).columns], (column, upstream, name)


def test_columns_from_nothing_are_names_of_the_configuration_and_numbers_of_the_program():
    empty = {f"{t}.{c}" for t in lineage.TABLES for c, sources in of(t).items() if not sources}
    assert empty == {
        "calibration.fold",
        "calibration.logit_scale",
        "reliability.scorer",
        "reliability.stage",
        "consensus_report.aggregation",
        "scorer_report.scorer",
        "scorer_report.revision",
        "scorer_correlation.scorer_a",
        "scorer_correlation.scorer_b",
    }


@pytest.mark.parametrize("table", lineage.TABLES)
def test_every_upstream_table_is_a_dependency_and_every_label_table_that_is_one_is_used(table):
    upstream = {t for sources in of(table).values() for t, _ in sources}
    scores = {f"scores/{s}" for s in SCORERS} if table in ("margins", "preferences", *REPORTS) else set()
    needed = set(steps.LABEL_TABLES.get(table, ()))
    images = {"images"} if table == "preferences" else set()
    assert upstream <= {"votes", *images, *CATALOGUE_TABLES, *scores, *needed}
    assert upstream >= {*needed, *images, *scores}


def test_a_column_of_one_scorer_is_from_that_scorer_alone():
    assert of("consensus")["vote_clip"] == [("margins", "score_0_clip"), ("margins", "score_1_clip")]
    assert of("margins")["score_1_clip"] == [
        ("catalogue_pairs", "image_1_id"),
        ("catalogue_pairs", "prompt_id"),
        ("scores/clip", "score"),
    ]


def test_a_table_of_no_scorers_has_the_lineage_that_is_left():
    found = lineage.lineage("consensus", [])
    assert found["votes_0"] == [("catalogue_pairs", "human_label_0")]
    assert not any(c.startswith("vote_") for c in found if c != "vote_human")


def test_a_table_without_a_lineage_is_refused_with_those_that_have_one():
    with pytest.raises(KeyError, match="'votes' is not declared; declared are"):
        lineage.lineage("votes", SCORERS)


# --- against what changes ----------------------------------------------------------------------------------------------


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


def build(store, config, keys):
    labels = steps.Labels(store, config, keys)
    for name in steps.LABEL_TABLES:
        getattr(labels, name)()
    report.build(store, config, keys)


def frames(store):
    return {t: store.read(schemas.TABLES[t]) for t in lineage.TABLES}


@dataclass(frozen=True)
class Made:
    """A store with everything that has a lineage, its configuration and shards, and what its tables hold."""

    location: str
    config: Config
    keys: list[str]
    tables: dict[str, pl.DataFrame]


@pytest.fixture(scope="module")
def made(ingested, sources_of, tiny_world, tmp_path_factory):
    source, keys = ingested
    folder = tmp_path_factory.mktemp("lineage")
    shutil.copytree(source.location, folder / "store")
    store = Store(str(folder / "store"))
    write_scores(store, keys, folder)
    options = small_world(folder).model_dump()
    options["sources"] = sources_of(tiny_world)
    options["labels"] = LABELS
    options["scorers"] = [
        ScorerConfig(name=s, kind="imported", checkpoint=str(folder / f"{s}.parquet")) for s in SCORERS
    ]
    config = Config.model_validate(options)
    for key in keys:
        batches.score_shard(store, key, config.scorers)
    batches.activate(store, config, keys)
    build(store, config, keys)
    return Made(store.location, config, keys, frames(store))


def partitions(store, upstream, keys):
    if upstream.startswith("scores/"):
        scorer = upstream.removeprefix("scores/")
        return [batches.partition(scorer, store.current_revisions()[scorer], k) for k in keys]
    return keys if upstream in SHARD_TABLES else ["all"]


def put(store, table, partition, frame, inputs=None):
    """Write rows under the commit that is there, so that the step which made them does not make them again."""
    old = store.manifest(table.name, partition)
    assert old is not None
    inputs = old.inputs if inputs is None else old.inputs | {n: c for n, c in inputs.items() if n in old.inputs}
    return store.write(table, frame, partition=partition, made_from=old.fingerprint, inputs=inputs, extra=old.extra)


def change(store, keys, upstream, column, how):
    """Change one column of a table, nothing else; the catalogue is taken to be of it."""
    table, contents, is_changed = declared(upstream), {}, False
    for partition in partitions(store, upstream, keys):
        before = store.read(table, partition)
        after = before.with_columns(how.alias(column))
        is_changed |= not after.equals(before)
        # Types and rules of the templates come from the frame's own columns.
        plain = schemas.SCORES if upstream.startswith("scores/") else schemas.TABLES[upstream]
        manifest = put(store, plain, partition, after)
        contents[f"{plain.name}/{partition}"] = manifest.content
    assert is_changed, f"{upstream}.{column} did not change"
    if upstream in SHARD_TABLES:
        adopt(store, contents)


def adopt(store, contents):
    """Have the catalogue be made from these contents, as it is."""
    for table in catalogue.TABLES:
        put(store, table, "all", store.read(table), contents)


def changed(before, after, key):
    """Return the columns with another value in a row that both have; the key, if one has a row that the other has not."""
    names = list(key)
    both = before.join(after, on=names, how="inner", nulls_equal=True, suffix="_after")
    found = set(names) if len(both) < max(len(before), len(after)) else set()
    for column in (c for c in before.columns if c not in names):
        old, new = both[column], both[f"{column}_after"]
        is_same = old.eq_missing(new)
        if old.dtype.is_float():
            is_same |= ((old - new).abs() < 1e-9).fill_null(False)
        if not is_same.all():
            found.add(column)
    return found


def reachable(start):
    """Return (table, column) of all that has a column in its lineage, directly or through other tables."""
    found = {start}
    for table in lineage.TABLES:
        found |= {(table, c) for c, sources in of(table).items() if found & set(sources)}
    return found


def every(n, then, otherwise):
    """Return an expression that is `then` in every n-th row."""
    return pl.when(pl.int_range(pl.len()) % n == 0).then(then).otherwise(otherwise)


_WEIGHTED = ("preferences.p_ensemble", "smoothed.p_ensemble", "minority.minority_score", "preferences.minority_score")
CHANGES = {
    "votes.label_0": (
        every(2, 1 - pl.col("label_0"), pl.col("label_0")),
        ("calibration.slope", "minority.label_0", "minority.share_against", "rater_agreement.alpha", *_WEIGHTED),
    ),
    "votes.status": (
        pl.when(pl.col("status") == "ok").then(every(7, pl.lit("invalid_label"), pl.col("status"))).otherwise("status"),
        ("minority.vote_id", "minority.others", "calibration.votes", "preferences.n_decided", "annotators.votes"),
    ),
    "votes.count": (
        every(2, pl.col("count").fill_null(1) + 2, pl.col("count")),
        ("minority.people", "reliability.votes", "rater_agreement.ratings", "scorer_report.votes_decided"),
    ),
    "votes.was_swapped": (
        ~pl.col("was_swapped"),
        ("annotators.first_share", "rater_agreement.first_low"),
    ),
    "votes.annotator_id": (
        pl.col("annotator_id").shuffle(1),
        ("minority.annotator_id", "minority.annotator_score", "annotators.prompts", "annotator_groups.weight_clip"),
    ),
    "votes.source": (
        every(2, pl.lit("other"), pl.col("source")),
        ("rater_agreement.source", "scorer_report.source", "preferences.sources"),
    ),
    "votes.model_0": (pl.col("model_0").shuffle(2), ("margins.model_0", "preferences.model_0", *_WEIGHTED)),
    "catalogue_pairs.human_label_0": (
        every(2, 1 - pl.col("human_label_0"), pl.col("human_label_0")),
        ("consensus.vote_human", "preferences.human_label_0", "preferences.is_unanimous", "pair_groups.group"),
    ),
    "catalogue_pairs.cycle": (
        pl.when(pl.col("cycle").is_null()).then(pl.lit(0, pl.Int64)),
        ("preferences.is_in_cycle",),
    ),
    "catalogue_prompts.split": (pl.lit("test"), ("preferences.split",)),
    "scores/clip.score": (
        (pl.col("score") * 1.3).shuffle(3),
        ("margins.score_0_clip", "consensus.vote_clip", "smoothed.smpo_clip", "scorer_report.q50", *_WEIGHTED),
    ),
    "scores/aesthetic.status": (
        pl.lit("undecodable"),
        ("preferences.excluded_because", "scorer_report.scores_ok"),
    ),
    "margins.model_1": (pl.col("model_1").shuffle(4), ("calibration.weight", "preferences.model_1", *_WEIGHTED)),
    "calibration.slope": (pl.col("slope") * 2, ("smoothed.calibrated_pick", "smoothed.p_log", "reliability.agreement")),
    "calibration.rms": (
        pl.col("rms") * 2,
        ("minority.confidence", "smoothed.z_std", "preferences.stability", *_WEIGHTED),
    ),
    "calibration.min": (pl.col("min") - 1, ("smoothed.smpo_clip", "preferences.p_smpo")),
    "minority.share_against": (
        every(2, 1 - pl.col("share_against"), pl.col("share_against")),
        ("annotators.agreeing",),
    ),
    "minority.minority_score": (1 - pl.col("minority_score"), ("annotators.annotator_score",)),
    "consensus.vote_pick": (-pl.col("vote_pick"), ("consensus_report.accuracy",)),
    "annotator_groups.group": (every(2, pl.col("group") + 1, pl.col("group")), ("pair_groups.group",)),
}
"""Upstream column -> what it is changed to, and columns that must change by that."""


def after(made, store):
    """Build again; return (table, column) of all that is not as it was made."""
    build(store, made.config, made.keys)
    found = set()
    for name, frame in frames(store).items():
        found |= {(name, c) for c in changed(made.tables[name], frame, schemas.TABLES[name].key)}
    return found


def not_explained(found, reach):
    """Return what changed without lineage; that there are other rows is explained by one column of a key."""
    odd = found - reach
    for name in lineage.TABLES:
        keys = {(name, c) for c in schemas.TABLES[name].key}
        # All columns of a key are reported where there are other rows.
        odd -= keys if keys & reach else set()
    return odd


@pytest.mark.parametrize("upstream", CHANGES)
def test_only_what_has_a_column_in_its_lineage_changes_with_it(made, tmp_path, upstream):
    table, column = upstream.rsplit(".", 1)
    shutil.copytree(made.location, tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    how, expected = CHANGES[upstream]
    change(store, made.keys, table, column, how)
    found, reach = after(made, store), reachable((table, column))
    assert not not_explained(found, reach)
    assert {tuple(e.split(".")) for e in expected} <= found
    every_column = sum(len(of(t)) for t in lineage.TABLES)
    assert len(reach) < every_column, "a lineage that leads everywhere says nothing"


def test_votes_that_stand_otherwise_over_all_shards_change_what_has_them_in_its_lineage(made, tmp_path):
    shutil.copytree(made.location, tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    votes = catalogue.counted_votes(store, made.keys).filter(pl.col("label_0") != 0.5).collect()
    moved = votes.gather_every(5).with_columns(is_flipped=pl.lit(True))
    manifest = put(store, schemas.CATALOGUE_VOTES, "all", moved.select(list(schemas.CATALOGUE_VOTES.polars_schema)))
    adopt(store, {"catalogue_votes/all": manifest.content})
    found, reach = after(made, store), reachable(("catalogue_votes", "is_flipped"))
    assert {("minority", "label_0"), ("calibration", "slope"), ("annotators", "annotator_score")} <= found
    assert not not_explained(found, reach | reachable(("catalogue_votes", "status")))


def test_an_image_that_becomes_unreadable_changes_only_why_pairs_are_left_out(made, tmp_path):
    shutil.copytree(made.location, tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    change(store, made.keys, "images", "status", every(3, pl.lit("unreadable"), pl.col("status")))
    for key in made.keys:
        batches.score_shard(store, key, made.config.scorers)
    assert after(made, store) == {("preferences", "excluded_because")}


def test_a_step_that_reads_nothing_new_makes_nothing_new(made, tmp_path):
    """Otherwise the tests above would compare a table with what chance makes of it."""
    shutil.copytree(made.location, tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    for name in lineage.TABLES:
        store.remove(f"_manifests/{name}")
    assert not after(made, store)
