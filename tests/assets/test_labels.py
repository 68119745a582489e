import shutil

import dagster as dg
import polars as pl
import pytest

from assets import metadata as meta
from assets.labels import build_labels
from assets.metadata import REUSED
from assets.resources import Polyphony
from pipelines import schemas, steps
from pipelines.config import AutomationConfig
from pipelines.scoring import batches
from pipelines.tables import Store


@pytest.fixture(scope="module")
def config(ingested, tiny_config, tmp_path_factory):
    """A scored tiny world."""
    source, keys = ingested
    home = tmp_path_factory.mktemp("labelled")
    store = Store(str(shutil.copytree(source.location, home / "store")))
    config = tiny_config.model_copy(update={"home": str(home), "store": store.location})
    models = {}
    for key in keys:
        batches.score_shard(store, key, list(config.scorers), models=models)
    batches.activate(store, config, keys)
    return config


def materialize(config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Polyphony, "config", property(lambda self: config))
        result = dg.materialize(
            build_labels(config), resources={"polyphony": Polyphony()}, instance=dg.DagsterInstance.ephemeral()
        )
    assert result.success
    events = result.get_asset_materialization_events()
    return {e.asset_key.to_user_string(): e.materialization.metadata for e in events}


@pytest.fixture(scope="module")
def metadata(config):
    return materialize(config)


def test_every_label_table_is_an_asset_that_says_its_rows(metadata, config):
    store = Store(config.store_location)
    assert {name: metadata[name]["dagster/row_count"].value for name in steps.LABEL_TABLES} == {
        name: store.require(name).rows for name in steps.LABEL_TABLES
    }


def test_columns_of_every_scorer_are_in_the_column_tab(config):
    specs = {s.key.to_user_string(): s for a in build_labels(config) for s in a.specs}
    names = [c.name for c in specs["consensus"].metadata["dagster/column_schema"].columns]
    assert {"vote_pickscore", "vote_clip", "consensus_label_0"} <= set(names)
    assert names == Store(config.store_location).read(schemas.CONSENSUS).columns


def test_pages_of_pairs_are_linked_from_the_labels_and_are_there(metadata, config):
    store = Store(config.store_location)
    for table, page in (("minority", "highest_minority"), ("rater_agreement", "split_votes"), ("preferences", "index")):
        link = metadata[table]["pairs"]
        assert isinstance(link, dg.UrlMetadataValue)
        assert link.value == f"{config.automation.pages_url}/{page}.html"
        assert store.read_text(f"pairs/{page}.html").startswith("<!doctype html>")
    assert metadata["pair_pages"]["split_votes"] == metadata["rater_agreement"]["pairs"]


def test_where_nobody_serves_the_pages_their_path_is_shown(config):
    store = Store(config.store_location)
    unserved = config.model_copy(update={"automation": AutomationConfig()})
    assert meta.page(store, unserved, "index.html") == dg.MetadataValue.path(store.path("pairs", "index.html"))


def test_the_drift_of_one_revision_has_nothing_to_compare_with(metadata, config):
    table = Store(config.store_location).read(schemas.DRIFT)
    assert metadata["frozen_sample"]["dagster/row_count"].value > 0
    assert dict(table.select("subject", "points").rows()) == {"pickscore": None, "clip": None, "consensus": None}
    of_clip = table.filter(subject="clip")["accuracy"][0]
    assert metadata["drift"]["accuracy_clip"].value == pytest.approx(of_clip)
    assert "share_consensus_changed" not in metadata["drift"]


PLOTS = [
    *((t, "plot") for t in ("reliability", "consensus_report", "minority", "annotators", "drift")),
    ("consensus", "matrix"),
]


@pytest.mark.parametrize(("table", "name"), PLOTS)
def test_a_plot_lies_in_the_metadata(metadata, table, name):
    shown = metadata[table][name].value
    assert "](data:image/" in shown
    assert len(shown) < 70_000, "base64 of 50 kB"


def test_numbers_that_plot_over_time_are_those_of_the_tables(metadata, config):
    store = Store(config.store_location)
    minority = store.read(schemas.MINORITY)
    assert metadata["minority"]["mean_minority_score"].value == pytest.approx(minority["minority_score"].mean())
    assert metadata["minority"]["lesson_targets"].value == store.require("minority").extra["targets"]
    assert metadata["minority"]["calibration"].value.startswith("calibrated on")
    alpha = store.read(schemas.RATER_AGREEMENT).filter(pl.col("source") == "all")["alpha"][0]
    assert metadata["rater_agreement"]["alpha"].value == pytest.approx(alpha)
    accuracy = store.read(schemas.CALIBRATION).filter(pl.col("fold") == -1, pl.col("scorer") == "clip")["accuracy"][0]
    assert metadata["calibration"]["accuracy_clip"].value == pytest.approx(accuracy)


def test_the_label_card_is_shown_and_lies_in_the_store(metadata, config):
    text = metadata["label_card"]["card"].value
    assert text.startswith("# Label card")
    assert Store(config.store_location).read_text("label_card.md") == text


def test_a_second_materialization_finds_the_tables_unchanged(metadata, config):
    again = materialize(config)
    assert [n for n in steps.LABEL_TABLES if not again[n][REUSED].value] == []


def test_a_damaged_table_fails_its_check_and_what_comes_after_it_is_not_made(metadata, config, tmp_path):
    store = Store(str(shutil.copytree(config.store, tmp_path / "store")))
    with open(store.data_path("consensus"), "wb") as file:
        file.write(b"no parquet")
    chosen = [a for a in build_labels(config) if {k.path[-1] for k in a.keys} & {"consensus", "preferences"}]
    with pytest.MonkeyPatch.context() as patch:
        copied = config.model_copy(update={"store": store.location})
        patch.setattr(Polyphony, "config", property(lambda self: copied))
        result = dg.materialize(
            chosen, resources={"polyphony": Polyphony()}, instance=dg.DagsterInstance.ephemeral(), raise_on_error=False
        )
    assert {e.step_key for e in result.all_events if e.is_step_start} == {"consensus"}
    failed = {c.check_name for c in result.get_asset_check_evaluations() if not c.passed}
    assert "schema" in failed
