"""The state of a real small store: whole, and after everything that can happen to it."""

import json
import os
import shutil
from pathlib import Path

import botocore.exceptions
import pyarrow.parquet as pq
import pytest
import s3fs

from pipelines import accounting, catalogue, ingest, schemas, status, steps, stored
from pipelines.config import ConfigError, LabelsConfig, ScorerConfig, SourceConfig, small_world
from pipelines.scoring import batches, report, workers
from pipelines.sources import SourceError
from pipelines.tables import Failure, Store

SHARD_TABLES = ("images", "image_names", "prompts", "votes")
LABELS = tuple(steps.LABEL_TABLES)


def configuration(home, world, sources_of):
    config = small_world(home, world)
    scorers = tuple(
        ScorerConfig(name=name, kind=name, checkpoint=str(home / f"{name}-files"), batch_size=64)
        for name in ("pickscore", "clip")
    )
    return config.model_copy(update={"scorers": scorers, "sources": sources_of(home / "world")})


def refresh(config, what=("ingest", "score", "label")):
    """Do what the command line does; return the store."""
    store = Store(config.store_location)
    shards = ingest.list_shards(config)
    if "ingest" in what:
        plans = ingest.plans(config, shards)
        for shard in shards:
            ingest.ingest_shard(store, plans[shard.source], shard)
        keys, _ = ingest.ingested(store, shards)
        catalogue.build(store, keys, config.splits)
        layouts = {name: how.source.layout for name, how in plans.items()}
        accounting.build(store, [s for s in shards if s.key in keys], layouts)
    keys = catalogue.shard_keys(store)
    if "score" in what:
        models = {}
        for key in keys:
            batches.score_shard(store, key, config.scorers, models=models)
        batches.activate(store, config, keys)
        report.build(store, config, keys)
    if "label" in what:
        labels = steps.Labels(store, config, keys)
        for name in LABELS:
            getattr(labels, name)()
        labels.drift()
    return store


@pytest.fixture(scope="module")
def whole(tiny_world, tiny_world_config, sources_of, make_tiny_clip, tmp_path_factory):
    """A configuration all of whose tables are made; read only."""
    home = tmp_path_factory.mktemp("status")
    shutil.copytree(tiny_world, home / "world")
    make_tiny_clip(home / "pickscore-files", seed=0)
    make_tiny_clip(home / "clip-files", seed=1)
    config = configuration(home, tiny_world_config, sources_of)
    refresh(config)
    return config


@pytest.fixture
def copied(whole, tiny_world_config, sources_of, tmp_path):
    """The same, to be written to."""
    shutil.copytree(whole.home, tmp_path / "home")
    return configuration(tmp_path / "home", tiny_world_config, sources_of)


def state(config):
    """Return asset -> line."""
    return {line.asset: line for line in status.lines(Store(config.store_location), config)}


def not_current(config):
    return [asset for asset, line in state(config).items() if not line.is_current]


def due(config):
    return status.due_scores(Store(config.store_location), config)


def inputs(config):
    return status.inputs_current(Store(config.store_location), config)


def first_shard(config):
    """Return the key and the file of a shard in Pick-a-Pic's layout."""
    file = min((Path(config.home) / "world" / "pickapic" / "data").glob("train-*.parquet"))
    return next(s.key for s in ingest.list_shards(config) if s.file.endswith(file.name)), file


def changed_shard(config):
    """Drop half of the rows of a shard's file; return the shard's key."""
    key, file = first_shard(config)
    table = pq.read_table(file)
    pq.write_table(table.slice(0, len(table) // 2), file)
    return key


def referring(config):
    """Return the configuration of another store, ingested, that refers to the images."""
    sources = tuple(s.model_copy(update={"storage": "reference"}) for s in config.sources)
    config = config.model_copy(update={"sources": sources, "store": str(Path(config.home) / "referring")})
    refresh(config, ["ingest"])
    return config


def new_weights(config, make_tiny_clip, name):
    """Put other weights where a scorer's lie."""
    folder = Path(config.home) / f"{name}-files"
    shutil.rmtree(folder)
    make_tiny_clip(folder, seed=7)


# --- whole and fresh ------------------------------------------------------------------------------------------------


def test_everything_is_current_after_everything_was_made(whole):
    found = state(whole)
    assert [asset for asset, line in found.items() if not line.is_current or line.press or line.because] == []
    shards = len(ingest.list_shards(whole))
    assert [found[a].done for a in (*SHARD_TABLES, "scores/pickscore", "scores/clip")] == [shards] * 6
    assert set(found) >= {t.name for t in catalogue.TABLES} | set(LABELS) | {"accounting", "scorer_report"}
    assert inputs(whole) == dict.fromkeys(LABELS)
    assert due(whole) == {"pickscore": [], "clip": []}


def test_a_fresh_store_misses_everything_and_the_first_thing_to_press_is_ingestion(whole, tmp_path):
    config = whole.model_copy(update={"store": str(tmp_path / "fresh")})
    found = [line for line in state(config).values() if not line.is_current]
    assert found[0].asset == "images"
    assert (
        found[0].press
        == "materialize raw_sources, then materialize images, all partitions (`python -m pipelines ingest`)"
    )
    assert all(line.missing and not line.stale and line.press for line in found)
    assert len(found) == len(state(config)) - 1, "all but the sources"
    assert all("is not made yet" in why for why in inputs(config).values())
    assert due(config) == {"pickscore": [], "clip": []}, "nothing is catalogued"


def test_a_world_that_is_not_written_is_the_first_thing_to_press(whole, tmp_path):
    config = whole.model_copy(update={"home": str(tmp_path), "store": str(tmp_path / "fresh")})
    first = status.lines(Store(config.store_location), config)[0]
    assert (first.asset, first.missing) == ("raw_sources", ("pickapic", "hpd"))
    assert first.press == "materialize raw_sources, all partitions (`python -m pipelines world`)"
    assert "the small world is not written yet" in first.because


# --- sources and ingestion ------------------------------------------------------------------------------------------


def test_a_shard_whose_file_changed_is_stale_in_every_table_of_ingestion(copied):
    key = changed_shard(copied)
    found = state(copied)
    for table in SHARD_TABLES:
        assert found[table].stale == (key,)
        assert found[table].missing == ()
        assert "its file changed" in found[table].because
        assert found[table].press == f"materialize {table}, partition {key} (`python -m pipelines ingest`)"
    assert not_current(copied) == list(SHARD_TABLES), "later tables are what their inputs in the store say"


def test_a_deleted_file_is_missing_and_what_was_made_from_it_is_old(copied):
    store, key = Store(copied.store_location), ingest.list_shards(copied)[1].key
    os.remove(store.data_path("votes", key))
    found = state(copied)
    assert (found["votes"].missing, found["votes"].done) == ((key,), found["votes"].expected - 1)
    assert found["images"].is_current
    assert found["catalogue_votes"].stale == ("all",)
    assert "older than votes" in found["catalogue_votes"].because


def test_a_source_that_cannot_be_listed_is_told_and_its_shards_count_as_they_lie_there(copied):
    before = state(copied)["votes"].expected
    shutil.move(copied.sources[1].location, Path(copied.home) / "elsewhere")
    found = state(copied)
    assert found["raw_sources"].missing == ("hpd",)
    assert str(copied.sources[1].location) in found["raw_sources"].because
    assert "make the source readable" in found["raw_sources"].press
    assert (found["votes"].expected, found["votes"].done) == (before, before)
    assert not_current(copied) == ["raw_sources"]


@pytest.mark.parametrize("layout", ["auto", "pickapic"])
def test_a_source_in_a_bucket_whose_service_refuses_is_told_and_the_others_are_looked_at(copied, layout, monkeypatch):
    def refuse(self, path, *arguments, **options):
        raise botocore.exceptions.NoCredentialsError

    for name in ("find", "info", "ls", "isdir", "isfile", "exists"):
        monkeypatch.setattr(s3fs.S3FileSystem, name, refuse)
    away = SourceConfig(name="away", layout=layout, location="s3://bucket/away")
    found = state(copied.model_copy(update={"sources": (*copied.sources, away)}))
    assert found["raw_sources"].missing == ("away",)
    assert "s3://bucket/away" in found["raw_sources"].because
    assert "Unable to locate credentials" in found["raw_sources"].because
    assert found["votes"].is_current


def test_a_shard_that_cannot_be_read_is_remembered_as_failed_until_it_is_ingested(copied):
    key, file = first_shard(copied)
    good, times = file.read_bytes(), file.stat()
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(SourceError) as told:
        refresh(copied, ["ingest"])
    store = Store(copied.store_location)
    assert {k: f.message for k, f in store.failures("votes").items()} == {key: str(told.value)}
    line = state(copied)["votes"]
    assert list(line.failed) == [key]
    assert line.stale == (key,), "what was ingested before still lies there"
    assert str(file) in status.text([line])
    file.write_bytes(good)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    refresh(copied, ["ingest"])
    assert store.failures("votes") == {}
    assert not_current(copied) == []


# --- scores ---------------------------------------------------------------------------------------------------------


def test_other_weights_make_that_scorers_shards_due_and_no_others(copied, make_tiny_clip):
    old = Store(copied.store_location).current_revisions()["clip"]
    new_weights(copied, make_tiny_clip, "clip")
    keys = [s.key for s in ingest.list_shards(copied)]
    assert due(copied) == {"pickscore": [], "clip": keys}
    found = state(copied)
    assert found["scores/pickscore"].is_current
    assert found["scores/clip"].stale == tuple(keys)
    assert f"of revision {old}, the present one is" in found["scores/clip"].because
    assert "python -m pipelines score --scorers clip" in found["scores/clip"].press
    assert found["active_scores"].stale == ("clip",)
    for name, why in inputs(copied).items():
        assert why.startswith(f"{name} is old: scores/clip ({len(keys)} of {len(keys)} shards)")
        assert "materialize scores/clip, then active_scores" in why
        assert "pickscore" not in why


def test_labels_of_earlier_scores_are_old_until_they_are_made_again(copied, make_tiny_clip):
    new_weights(copied, make_tiny_clip, "clip")
    refresh(copied, ["score"])
    assert due(copied)["clip"] == []
    why = inputs(copied)
    assert why["margins"].startswith("margins is older than scores/clip")
    assert why["margins"].endswith("materialize margins (`python -m pipelines label`)")
    assert why["consensus"].startswith("consensus is old: margins is older than scores/clip")
    assert "materialize margins, then consensus (" in why["consensus"]
    assert "margins, then annotator_groups, then pair_groups (" in why["pair_groups"]
    assert not_current(copied) == [*LABELS, "drift"]
    refresh(copied, ["label"])
    assert not_current(copied) == []


def test_a_shard_that_was_ingested_with_other_images_is_due_for_every_scorer_once_it_is_catalogued(copied):
    key = changed_shard(copied)
    shard = next(s for s in ingest.list_shards(copied) if s.key == key)
    ingest.ingest_shard(Store(copied.store_location), ingest.plan(copied.sources[0]), shard)
    assert due(copied) == {"pickscore": [], "clip": []}, "what it owns is not known yet"
    found = state(copied)
    assert found["scores/clip"].stale == (key,)
    assert "materialize the catalogue first" in found["scores/clip"].because
    assert all("catalogue_" in why for why in inputs(copied).values())
    refresh(copied, ["ingest"])
    made = due(copied)
    assert made["pickscore"] == made["clip"]
    assert key in made["clip"]
    assert len(made["clip"]) < len(ingest.list_shards(copied))
    before = {m.partition: m.content for m in Store(copied.store_location).manifests("scores")}
    after = {m.partition: m.content for m in refresh(copied, ["score"]).manifests("scores")}
    assert {p.split("/")[-1] for p in after if after[p] != before[p]} <= set(made["clip"])


def test_due_shards_are_exactly_those_that_scoring_does_not_find_unchanged(copied):
    store, keys = Store(copied.store_location), [s.key for s in ingest.list_shards(copied)]
    revision = store.current_revisions()["clip"]
    for key in keys[2:4]:
        os.remove(store.data_path("scores", batches.partition("clip", revision, key)))
    asked = due(copied)
    models = {}
    made = {k: batches.score_shard(store, k, copied.scorers, models=models) for k in keys}
    assert asked == {n: [k for k in keys if not made[k][n].is_reused] for n in ("pickscore", "clip")}
    assert asked["clip"] == keys[2:4]


def test_a_scorer_whose_files_are_missing_has_a_line_that_says_so(copied):
    shutil.rmtree(Path(copied.home) / "clip-files")
    line = state(copied)["scores/clip"]
    assert "clip-files" in line.because
    assert (line.done, line.failed) == (0, {})
    assert line.press.startswith("make its files readable")
    assert list(due(copied)) == ["pickscore"]
    assert "clip-files" in inputs(copied)["margins"]


def test_a_shard_that_cannot_be_scored_is_remembered_as_failed_until_it_is_scored(copied, monkeypatch):
    config = referring(copied)
    (key, file), store = first_shard(config), Store(config.store_location)
    opens = stored.open_uri

    def refuse(uri):
        if str(file) in uri:
            raise PermissionError(13, "Permission denied", uri)
        return opens(uri)

    with monkeypatch.context() as patch:
        # Root may read whatever lies on a disk.
        patch.setattr(stored, "open_uri", refuse)
        keys = catalogue.shard_keys(store)
        results = dict(workers.score_shards(store, config, keys, config.scorers, device="cpu"))
    assert [k for k, result in results.items() if isinstance(result, SourceError)] == [key]
    found = state(config)
    for scorer in ("pickscore", "clip"):
        line = found[f"scores/{scorer}"]
        assert {k: f.message for k, f in line.failed.items()} == {key: str(results[key])}
        assert line.missing == (key,)
    refresh(config, ["score"])
    assert store.failures("scores") == {}
    assert state(config)["scores/clip"].is_current


def test_images_that_were_lost_when_they_were_scored_are_told_though_the_scores_are_current(copied):
    config = referring(copied)
    key, file = first_shard(config)
    kept = file.rename(file.with_suffix(".kept"))
    refresh(config, ["score"])
    kept.rename(file)
    line = state(config)["scores/clip"]
    assert line.is_current
    assert f"images of 1 shards ({key}) could not be read" in line.because
    assert due(config)["clip"] == []


# --- labels ---------------------------------------------------------------------------------------------------------


def test_other_options_make_the_tables_that_depend_on_them_old(copied):
    config = copied.model_copy(update={"labels": LabelsConfig(tie_policy="drop")})
    why = inputs(config)
    assert [name for name, told in why.items() if told] == ["consensus", "consensus_report", "preferences"]
    assert "made under other options" in why["consensus"]
    assert "consensus is made under other options" in why["preferences"]
    assert "materialize consensus, then preferences (" in why["preferences"]
    line = state(config)["consensus"]
    assert line.stale == ("all",)
    assert line.press == "materialize consensus (`python -m pipelines label`)"
    refresh(config, ["label"])
    assert inputs(config) == dict.fromkeys(LABELS)


def test_options_that_every_label_step_refuses_are_told_for_every_label(copied):
    file = str(Path(copied.home) / "none.parquet")
    config = copied.model_copy(update={"labels": LabelsConfig(groups_file=file)})
    with pytest.raises(ConfigError):
        refresh(config, ["label"])
    why = inputs(config)
    assert all(f"margins cannot be made: labels.groups_file: {file}" in told for told in why.values())


def test_another_version_of_the_program_makes_labels_old(copied, monkeypatch):
    monkeypatch.setattr(steps, "CODE_VERSION", "another")
    assert all(why is not None for why in inputs(copied).values())


def test_a_step_is_reused_exactly_where_its_inputs_are_told_to_be_current(copied):
    config = copied.model_copy(update={"labels": LabelsConfig(em=True, generator_term=True)})
    store, keys = Store(config.store_location), [s.key for s in ingest.list_shards(config)]
    for name in LABELS:
        told = inputs(config)[name]
        built = getattr(steps.Labels(store, config, keys), name)()
        assert built.is_reused == (told is None), name


# --- what people see ------------------------------------------------------------------------------------------------


def test_the_table_for_people_says_counts_reasons_and_what_to_press(copied, make_tiny_clip):
    new_weights(copied, make_tiny_clip, "clip")
    told = status.main_text(Store(copied.store_location), copied)
    row = next(line for line in told.splitlines() if line.startswith("scores/clip "))
    shards = len(ingest.list_shards(copied))
    assert f"0/{shards}" in row
    assert row.endswith("(`python -m pipelines score --scorers clip`)")
    assert "scores/clip: of revision" in told


def test_messages_cannot_break_the_table_of_the_ui():
    failed = {"a": Failure("column | 'x'\nexpected <int>", 0.0, "host:1")}
    line = status.line("votes", "votes", {"a": "not | ingested"}, (), "make", failed=failed)
    told = status.markdown([line])
    head, rule, row = told.splitlines()[:3]
    assert head.count("|") == rule.count("|") == row.count("|") == 7
    assert "- votes: not \\| ingested" in told
    assert "column \\| 'x' expected &lt;int>" in told


# --- records of failures --------------------------------------------------------------------------------------------


def test_a_record_of_a_failure_says_what_when_and_by_whom_and_a_write_removes_it(store):
    store.record_failure("prompts", "deep/er", "the disk is full")
    found = store.failures("prompts")["deep/er"]
    assert found.message == "the disk is full"
    assert found.by.endswith(f":{os.getpid()}")
    assert found.at > 1.6e9
    assert store.failures("prompts", "shallow/") == store.failures("votes") == {}
    store.write(schemas.PROMPTS, schemas.PROMPTS.empty(), partition="deep/er", made_from="x")
    assert store.failures("prompts") == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", json.dumps({"message": "m"}).encode()])
def test_a_record_that_cannot_be_read_says_so_and_breaks_nothing(store, content):
    store.publish("_failures/prompts/a.json", content)
    assert "_failures/prompts/a.json cannot be read" in store.failures("prompts")["a"].message


def test_a_failure_that_cannot_be_recorded_hides_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    unwritable = Store(str(tmp_path / "file"))
    unwritable.record_failure("votes", "a", "the original error")
    unwritable.forget_failure("votes", "a")
    assert unwritable.failures("votes") == {}
