import shutil

import dagster as dg
import pytest

from assets import metadata as meta
from assets.resources import Polyphony
from assets.scorer_report import build_scorer_report
from pipelines import schemas
from pipelines.scoring import batches, checkpoints
from pipelines.tables import Store


@pytest.fixture(scope="module")
def config(ingested, tiny_config, tmp_path_factory):
    """A scored and activated tiny world whose second scorer runs in bfloat16."""
    source, keys = ingested
    home = tmp_path_factory.mktemp("reported")
    store = Store(str(shutil.copytree(source.location, home / "store")))
    pick, clip = tiny_config.scorers
    scorers = (pick, clip.model_copy(update={"precision": "bfloat16"}))
    config = tiny_config.model_copy(
        update={
            "home": str(home),
            "store": store.location,
            "scorers": scorers,
            "scoring": tiny_config.scoring.model_copy(update={"device": "cpu"}),
        }
    )
    models = {}
    for key in keys:
        batches.score_shard(store, key, list(scorers), models=models)
    batches.activate(store, config, keys)
    return config


def materialize(config, monkeypatch):
    monkeypatch.setattr(Polyphony, "config", property(lambda self: config))
    result = dg.materialize(
        build_scorer_report(config), resources={"polyphony": Polyphony()}, instance=dg.DagsterInstance.ephemeral()
    )
    assert result.success
    events = result.get_asset_materialization_events()
    return {e.asset_key.to_user_string(): e.materialization.metadata for e in events}


@pytest.fixture(scope="module")
def metadata(config):
    with pytest.MonkeyPatch.context() as patch:
        return materialize(config, patch)


def test_the_report_shows_numbers_that_plot_over_time_a_table_and_a_picture(metadata, config):
    found = metadata["scorer_report"]
    table = Store(config.store_location).read(schemas.SCORER_REPORT)
    for scorer in ("pickscore", "clip"):
        (row,) = table.filter(scorer=scorer, source="all").to_dicts()
        assert isinstance(found[f"accuracy_{scorer}"], dg.FloatMetadataValue)
        assert found[f"accuracy_{scorer}"].value == pytest.approx(row["accuracy"])
    assert "| pickscore | all |" in found["report"].value
    assert found["picture"].value.startswith("![accuracy, likeness, scores by source](data:image/png;base64,")
    assert found["dagster/row_count"].value == len(table)
    assert metadata["scorer_correlation"]["dagster/row_count"].value == 1


def test_what_bfloat16_costs_is_measured_where_it_is_configured_and_shown_in_the_report(metadata, config):
    found = metadata["scorer_precision"]
    assert found["dagster/row_count"].value == 1
    (row,) = Store(config.store_location).read(schemas.SCORER_PRECISION, "clip").to_dicts()
    assert row["revision_bfloat16"] == checkpoints.revision(config.scorers[1])
    assert found["share_flipped_clip"].value == pytest.approx(row["share_flipped"])
    assert f"| clip | {row['pairs']} |" in metadata["scorer_report"]["report"].value


def test_materializing_again_recomputes_nothing(metadata, config, monkeypatch):
    again = materialize(config, monkeypatch)
    assert {name: m[meta.REUSED].value for name, m in again.items()} == dict.fromkeys(again, True)
    assert {name: m[meta.REUSED].value for name, m in metadata.items()} == dict.fromkeys(again, False)
    assert set(again) == {"scorer_report", "scorer_correlation", "scorer_precision"}


def test_without_a_scorer_in_bfloat16_nothing_is_loaded_or_measured(config, monkeypatch):
    from pipelines.scoring import precision

    monkeypatch.setattr(precision, "measure", lambda *a, **k: pytest.fail("nothing is configured in bfloat16"))
    exact = config.model_copy(update={"scorers": config.scorers[:1]})
    found = materialize(exact, monkeypatch)
    assert found["scorer_precision"]["dagster/row_count"].value == 0
    assert "bfloat16" not in found["scorer_report"]["report"].value


def test_the_report_comes_after_votes_catalogue_scores_activation_and_precision(config):
    precision, report = build_scorer_report(config)
    upstream = {k.to_user_string() for k in report.asset_deps[dg.AssetKey("scorer_report")]}
    assert {
        *("votes", "catalogue_votes", "catalogue_pairs", "catalogue_scorables", "active_scores", "scorer_precision"),
        *("scores/pickscore", "scores/clip"),
    } <= upstream
    assert {k.to_user_string() for k in precision.keys | report.keys} == {
        "scorer_report",
        "scorer_correlation",
        "scorer_precision",
    }
