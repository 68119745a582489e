import re

import polars as pl
import pytest

from pipelines import __main__ as command
from pipelines import curation, schemas
from pipelines.errors import run_command
from pipelines.tables import Store


@pytest.fixture
def configured(world_copy, tmp_path, tiny_clip):
    """A TOML file over a copy of the tiny world."""
    file = tmp_path / "polyphony.toml"
    file.write_text(
        f"""
home = "{tmp_path / "home"}"
[[sources]]
name = "pickapic"
layout = "pickapic"
location = "{world_copy / "pickapic"}"
[[sources]]
name = "hpd"
layout = "hpd"
location = "{world_copy / "hpdv2"}"
records_per_shard = 10
[[scorers]]
name = "clip"
kind = "clip"
checkpoint = "{tiny_clip}"
[[backbones]]
name = "tiny"
family = "tiny"
checkpoint = "{tmp_path / "no-backbone"}"
resolution = 32
"""
    )
    return file


def run(*arguments):
    return run_command(lambda: command.main([str(a) for a in arguments]))


def test_one_command_goes_from_raw_files_to_preferences_and_a_second_run_changes_nothing(configured, tmp_path, capsys):
    assert run("run", "--config", configured) == 0
    assert "preferences:" in capsys.readouterr().out
    store = Store(str(tmp_path / "home" / "store"))
    assert store.require("preferences").rows > 100
    assert run("run", "--config", configured) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if " rows" in line]
    assert len(steps) > 20
    assert [line for line in steps if not line.endswith("unchanged")] == []


def test_one_unreadable_file_costs_one_file_and_status_2(configured, world_copy, tmp_path, capsys):
    bad = min((world_copy / "pickapic" / "data").glob("train-*.parquet"))
    bad.write_bytes(b"no parquet")
    assert run("ingest", "--config", configured) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: 1 shards failed, the others are ingested")
    assert str(bad) in errors[0]
    assert len(Store(str(tmp_path / "home" / "store")).manifests("votes")) == 9


def test_labels_without_scores_say_what_to_do_first(configured, capsys):
    assert run("ingest", "--config", configured) == 0
    assert run("label", "--config", configured) == 2
    error = capsys.readouterr().err
    assert "are missing; score it" in error
    assert "python -m pipelines score" in error


def test_show_prints_rows_without_the_bytes_of_images(configured, capsys):
    assert run("ingest", "--config", configured) == 0
    capsys.readouterr()
    assert run("show", "images", "--rows", "3", "--config", configured) == 0
    shown = capsys.readouterr().out
    assert "JPEG" in shown
    assert "bytes" not in shown
    assert "shape: (3, " in shown


def test_an_unknown_table_and_a_missing_configuration_end_with_status_2_and_one_line(configured, tmp_path, capsys):
    assert run("show", "voters", "--config", configured) == 2
    assert "'voters'" in capsys.readouterr().err
    assert run("run", "--config", tmp_path / "absent.toml") == 2
    assert "absent.toml" in capsys.readouterr().err


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_the_manifest_of_an_ingested_shard_names_its_file(configured, world_copy, tmp_path):
    assert run("ingest", "--config", configured) == 0
    store = Store(str(tmp_path / "home" / "store"))
    manifests = store.manifests("votes")
    folders = {"pickapic": world_copy / "pickapic", "hpd": world_copy / "hpdv2"}
    files = {m.partition: store.read_json(f"_manifests/votes/{m.partition}.json")["extra"]["file"] for m in manifests}
    assert len(files) == 10
    assert all((folders[key.split(".")[0]] / file).is_file() for key, file in files.items())
    assert files["hpd.test-0000001"] == "test.json"
    parquet = {file for key, file in files.items() if key.startswith("pickapic.")}
    assert parquet == {f"data/{p.name}" for p in (world_copy / "pickapic" / "data").iterdir()}
    for key, file in files.items():
        rows = store.read(schemas.VOTES, key)["source_row"]
        assert rows.str.contains(rf"^{re.escape(file)}:\d+$").all()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, tiny_world, tiny_clip):
    """A TOML file over the tiny world, labelled by the command, and its store."""
    home = tmp_path_factory.mktemp("labelled")
    file = home / "polyphony.toml"
    sources = "".join(
        f'[[sources]]\nname = "{name}"\nlocation = "{tiny_world / folder}"\n'
        for name, folder in (("pickapic", "pickapic"), ("hpd", "hpdv2"))
    )
    scorers = "".join(
        f'[[scorers]]\nname = "{kind}"\nkind = "{kind}"\ncheckpoint = "{tiny_clip}"\n' for kind in ("pickscore", "clip")
    )
    backbone = f'[[backbones]]\nname = "tiny"\nfamily = "tiny"\ncheckpoint = "{home}"\nresolution = 32\n'
    file.write_text(f'home = "{home}"\n{sources}{scorers}{backbone}')
    assert run("run", "--config", file) == 0
    return file, Store(str(home / "store"))


def test_the_card_counts_what_the_tables_hold(labelled, capsys):
    file, store = labelled
    assert run("card", "--config", file) == 0
    card = capsys.readouterr().out
    assert store.read_text("label_card.md") in card
    pairs = store.read(schemas.PREFERENCES)
    votes = store.read(schemas.MINORITY)
    assert f"{len(pairs):,} pairs of {pairs['prompt_id'].n_unique():,} prompts" in card
    assert f"| all | {votes['people'].sum():,} |" in card
    assert "fitted where several people voted (hpd)" in card


def test_pages_show_pairs_of_the_real_labels(labelled, tmp_path, capsys):
    file, store = labelled
    assert run("pairs", "--config", file, "--limit", "5") == 0
    assert "index: " in capsys.readouterr().out
    page = store.read_text("pairs/highest_minority.html")
    best = (
        store.read(schemas.PREFERENCES)
        .filter(pl.col("human_label_0") != 0.5)
        .with_columns(value=pl.coalesce("minority_probability", "minority_score"))
        .sort("value", "pair_id", descending=[True, False])
    )
    places = [page.find(pair_id[:12]) for pair_id in best["pair_id"][:5]]
    assert -1 not in places
    assert places == sorted(places)
    out = tmp_path / "mine.html"
    assert run("pairs", "--config", file, "--where", "n_votes >= 3", "--policy", "human", "--out", out) == 0
    several = store.read(schemas.PREFERENCES).filter(pl.col("n_votes") >= 3)
    assert f"{len(several):,} pairs match" in out.read_text()


def test_an_export_has_exactly_the_pairs_and_labels_of_the_policy(labelled, tmp_path, capsys):
    file, store = labelled
    text = "without_minority:threshold=0.4"
    assert run("export", tmp_path / "curated", "--config", file, "--policy", text, "--splits", "train") == 0
    assert "not exported" in capsys.readouterr().out
    decided = curation.parse(text).apply(store.scan(schemas.PREFERENCES).filter(pl.col("split") == "train")).collect()
    kept = decided.filter(pl.col("target_label_0").is_not_null())
    rows = pl.read_parquet(str(tmp_path / "curated" / "data" / "train-*.parquet"))
    ids = ["image_0_id", "image_1_id", "target_label_0"]
    found = rows.select("image_0_uid", "image_1_uid", "label_0").sort(pl.all()).rows()
    assert found == kept.select(ids).sort(pl.all()).rows()
    assert 0 < len(kept) < len(decided)
    labels = pl.read_parquet(tmp_path / "curated" / "labels.parquet")
    assert len(labels) == len(decided)
    assert "Label card" in (tmp_path / "curated" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export", "folder"), "expected FOLDER and --policy"),
        (("export", "folder", "--policy", "humans"), "expected one of .*'human'"),
        (("export", "folder", "--policy", "human", "--splits", "dev"), "splits: expected some of"),
        (("pairs", "nonsense"), "highest_minority"),
        (("pairs", "--where", "n_votes >"), "where"),
    ],
)
def test_a_wrong_request_says_what_is_expected(labelled, tmp_path, capsys, arguments, said):
    file, _ = labelled
    arguments = [str(tmp_path / a) if a == "folder" else a for a in arguments]
    assert run(*arguments, "--config", file) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "folder").exists()


def test_listed_shards_are_scored_and_nothing_is_activated_if_so_asked(configured, tmp_path, capsys):
    assert run("ingest", "--config", configured) == 0
    store = Store(str(tmp_path / "home" / "store"))
    keys = sorted(m.partition for m in store.manifests("votes"))
    listed = tmp_path / "shards"
    listed.write_text(f"{keys[1]}\n{keys[0]}\n")
    capsys.readouterr()
    assert run("score", "--config", configured, "--shards-file", listed, "--no-activate") == 0
    assert "active" not in capsys.readouterr().out
    assert sorted(m.partition.rsplit("/", 1)[1] for m in store.manifests("scores")) == keys[:2]
    listed.write_text("\n".join(keys))
    assert run("score", "--config", configured, "--shards-file", listed, "--no-activate") == 0
    assert store.current_revisions() == {}
    assert run("score", "--config", configured, "--shards-file", listed) == 0
    assert set(store.current_revisions()) == {"clip"}


def test_a_listed_shard_that_is_not_there_is_named(configured, tmp_path, capsys):
    assert run("ingest", "--config", configured) == 0
    listed = tmp_path / "shards"
    listed.write_text("pickapic.nonsense\n")
    assert run("score", "--config", configured, "--shards-file", listed) == 2
    assert "['pickapic.nonsense'] are no shards" in capsys.readouterr().err
