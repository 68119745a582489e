"""One image, one pair, one prompt across shards and sources: what is one thing is counted once, whatever came first."""

import json

import polars as pl
import pytest

from pipelines import accounting, catalogue, identity, ingest, schemas, steps
from pipelines.config import Config, SourceConfig
from pipelines.scoring import batches
from pipelines.tables import Store, StoreError
from pipelines.world.raw import PICKAPIC_SCHEMA


@pytest.fixture
def write_hpd():
    """Write records as train.json with their images in HPDv2's layout."""

    def write(folder, records, files):
        (folder / "train").mkdir(parents=True)
        for name, data in files.items():
            (folder / "train" / name).write_bytes(data)
        (folder / "train.json").write_text(json.dumps(records))

    return write


@pytest.fixture
def overlapping(tmp_path, raw_rows, write_pickapic, write_hpd):
    """Two Pick-a-Pic shards of two splits and one HPD source that share images, a pair, a vote and a prompt."""
    rows = [dict(r) for r in raw_rows[:24]]
    write_pickapic(tmp_path / "pap", rows[:14], "train", 0)
    # Rows 10 to 13 again (the same votes), and their prompts thereby in two splits.
    write_pickapic(tmp_path / "pap", rows[10:], "validation", 1)
    pair = rows[12]
    records = [
        {"human_preference": [1, 0], "prompt": pair["caption"], "file_path": ["a.jpg", "b.jpg"]},
        {"human_preference": [0, 1], "prompt": "a prompt of its own", "file_path": ["b.jpg", "c.jpg"]},
    ]
    files = {"a.jpg": pair["jpg_1"], "b.jpg": pair["jpg_0"], "c.jpg": rows[3]["jpg_0"]}
    write_hpd(tmp_path / "hpd", records, files)
    return [
        SourceConfig(name="pap", location=str(tmp_path / "pap")),
        SourceConfig(name="hpd", location=str(tmp_path / "hpd")),
    ]


def run_all(store, config, shards):
    """Ingest in the given order, then score and label."""
    plans = ingest.plans(config, shards)
    for shard in shards:
        ingest.ingest_shard(store, plans[shard.source], shard)
    keys = [s.key for s in shards]
    catalogue.build(store, keys)
    for key in keys:
        batches.score_shard(store, key, list(config.scorers))
    batches.activate(store, config, keys)
    labels = steps.Labels(store, config, keys)
    for name in steps.LABEL_TABLES:
        getattr(labels, name)()
    return keys


def test_shards_and_sources_in_either_order_give_the_same_votes_splits_scores_labels_and_preferences(
    tmp_path, overlapping, tiny_config
):
    config = Config.model_validate(
        {**tiny_config.model_dump(), "world": None, "sources": [s.model_dump() for s in overlapping]}
    )
    shards = [s for source in overlapping for s in ingest.list_source(source)]
    assert len(shards) == 3
    stores = {}
    for name, order in (("forward", shards), ("backward", shards[::-1])):
        stores[name] = (Store(str(tmp_path / name)), [])
        stores[name] = (stores[name][0], run_all(stores[name][0], config, order))
    (forward, keys), (backward, reversed_keys) = stores["forward"], stores["backward"]
    assert keys == reversed_keys[::-1]

    def votes(store, keys):
        return catalogue.resolved_votes(store, keys).sort("vote_id").collect()

    assert votes(forward, keys).equals(votes(backward, reversed_keys))
    assert votes(forward, keys)["status"].to_list().count("duplicate_of") == 4
    for table in (schemas.CATALOGUE_PROMPTS, schemas.CATALOGUE_PAIRS, schemas.CATALOGUE_VOTES, schemas.CATALOGUE_NAMES):
        assert forward.read(table).equals(backward.read(table)), table.name
    scores = [
        batches.current_scores(s, ["pickscore", "clip"], k).sort("scorer", "image_id", "prompt_id").collect()
        for s, k in stores.values()
    ]
    assert scores[0].drop("score").equals(scores[1].drop("score"))
    assert (scores[0]["score"] - scores[1]["score"]).abs().max() < 1e-5
    for table in (schemas.CONSENSUS, schemas.SMOOTHED, schemas.MINORITY, schemas.PREFERENCES):
        a, b = forward.read(table), backward.read(table)
        assert a.columns == b.columns
        for column in a.columns:
            if a[column].dtype.is_float():
                assert a[column].is_null().equals(b[column].is_null()), column
                assert (a[column] - b[column]).abs().max() in (None, pytest.approx(0, abs=1e-4)), column
            else:
                assert a[column].equals(b[column]), column
    for store in (forward, backward):
        for table, key in (
            (schemas.CATALOGUE_IMAGES, ["image_id"]),
            (schemas.CATALOGUE_SCORABLES, ["image_id", "prompt_id"]),
        ):
            owned = store.read(table)
            assert owned.select(key).n_unique() == len(owned), "nothing is owned twice"
            assert set(owned["owner"]) <= set(keys)
    scored = [
        s.scan(schemas.SCORES, below="clip/").select("image_id", "prompt_id").collect() for s in (forward, backward)
    ]
    assert len(scored[0]) == scored[0].n_unique() == len(scored[1])


def test_a_pair_of_two_sources_meets_with_all_its_votes(tmp_path, overlapping, raw_rows):
    store = Store(str(tmp_path / "store"))
    keys = []
    for source in overlapping:
        for shard in ingest.list_source(source):
            ingest.ingest_shard(store, ingest.plan(source), shard)
            keys.append(shard.key)
    catalogue.build(store, keys)
    row = raw_rows[12]
    ids = sorted(identity.image_id_of_bytes(row[f"jpg_{i}"])[0] for i in (0, 1))
    pair = identity.pair_id(identity.prompt_id(row["caption"]), *ids)
    votes = catalogue.counted_votes(store, keys).filter(pl.col("pair_id") == pair).collect()
    # One vote of Pick-a-Pic, although it stands in two shards, and one of HPD.
    assert sorted(votes["source"]) == ["hpd", "pap"]
    prompt = store.read(schemas.CATALOGUE_PROMPTS).row(
        by_predicate=pl.col("prompt") == row["caption"].strip(), named=True
    )
    assert (prompt["split"], prompt["is_conflict"]) == ("validation", True)


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_and_without(tmp_path, raw_rows, write_pickapic):
    """The same rows as a release with images and as one without, plus a row that only the latter has."""
    import pyarrow as pa

    write_pickapic(tmp_path / "with", raw_rows[:10])
    bare = pa.schema([f for f in PICKAPIC_SCHEMA if f.name not in ("jpg_0", "jpg_1")])
    extra = {**raw_rows[4], "user_id": 777, "label_0": 1.0, "label_1": 0.0}
    rows = [{k: v for k, v in r.items() if k in bare.names} for r in [*raw_rows[:10], extra]]
    write_pickapic(tmp_path / "without", rows, schema=bare)
    return {n: SourceConfig(name=n, layout="pickapic", location=str(tmp_path / n)) for n in ("with", "without")}


@pytest.mark.parametrize("order", [("with", "without"), ("without", "with")])
def test_votes_of_a_release_without_images_meet_those_of_the_release_with_them(
    store, with_and_without, raw_rows, order
):
    keys = []
    for name in order:
        (shard,) = ingest.list_source(with_and_without[name])
        ingest.ingest_shard(store, ingest.plan(with_and_without[name]), shard)
        keys.append(shard.key)
    catalogue.build(store, keys)
    votes = catalogue.counted_votes(store, keys).collect()
    # Ten votes, each in both releases, and the additional one.
    assert len(votes) == 11
    assert len(store.read(schemas.CATALOGUE_PAIRS)) == len(
        {(r["caption"], r["jpg_0"], r["jpg_1"]) for r in raw_rows[:10]}
    )
    byte_ids = {identity.image_id_of_bytes(r[f"jpg_{i}"])[0] for r in raw_rows[:10] for i in (0, 1)}
    assert {*votes["image_0_id"], *votes["image_1_id"]} <= byte_ids
    assert set(store.read(schemas.CATALOGUE_IMAGES)["image_id"]) == byte_ids, "a name is no image beside its bytes"
    row = raw_rows[4]
    extra = votes.row(by_predicate=pl.col("annotator_id") == "pickapic:777", named=True)
    first = identity.image_id_of_bytes(row["jpg_0"])[0]
    assert extra["label_0"] == (1.0 if extra["image_0_id"] == first else 0.0), "the label follows its image"
    assert extra["was_swapped"] == (extra["image_1_id"] == first)
    assert extra["model_0"] == row["model_0" if extra["image_0_id"] == first else "model_1"]


def test_an_image_that_nobody_has_bytes_for_takes_votes_and_is_never_trained_on(store, with_and_without, tiny_config):
    source = with_and_without["without"]
    (shard,) = ingest.list_source(source)
    config = Config.model_validate({**tiny_config.model_dump(), "world": None, "sources": [source.model_dump()]})
    run_all(store, config, [shard])
    preferences = store.read(schemas.PREFERENCES)
    assert preferences["n_votes"].sum() == 11
    assert all("no_bytes" in why for why in preferences["excluded_because"])


def test_two_names_of_the_same_bytes_are_one_image_and_two_names(store, tmp_path, raw_rows, write_pickapic):
    again = {**raw_rows[0], "image_0_uid": "another-name", "user_id": 5}
    write_pickapic(tmp_path / "pap", [raw_rows[0], again])
    source = SourceConfig(name="pap", location=str(tmp_path / "pap"))
    (shard,) = ingest.list_source(source)
    ingest.ingest_shard(store, ingest.plan(source), shard)
    assert len(store.read(schemas.IMAGES, shard.key)) == 2
    names = store.read(schemas.IMAGE_NAMES, shard.key)
    assert set(names["uid"]) == {raw_rows[0]["image_0_uid"], raw_rows[0]["image_1_uid"], "another-name"}
    votes = store.read(schemas.VOTES, shard.key)
    assert votes["pair_id"].n_unique() == 1
    assert votes["status"].to_list() == ["ok", "ok"]


# --- cycles --------------------------------------------------------------------------------------------------------


def cycles(choices, ties=()):
    """{pair: cycle} of choices (prompt, winner, loser) with single-letter images."""
    rows = []
    for prompt, winner, loser in choices:
        a, b = sorted((winner, loser))
        label = 0.5 if (prompt, winner, loser) in ties else float(winner == a)
        rows.append((f"{prompt}{a}{b}", prompt, a, b, label))
    schema = ["pair_id", "prompt_id", "image_0_id", "image_1_id", "human_label_0"]
    pairs = pl.DataFrame(rows, schema=schema, orient="row").sort("pair_id")
    return dict(zip(pairs["pair_id"], catalogue._cycles(pairs), strict=True))


def test_pairs_of_a_cycle_are_flagged_and_a_pair_that_only_leads_to_it_is_not():
    found = cycles([("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a"), ("p", "d", "a"), ("p", "c", "e")])
    assert found == {"pab": 0, "pbc": 0, "pac": 0, "pad": None, "pce": None}


def test_the_same_images_under_two_prompts_make_no_cycle():
    assert set(cycles([("p", "a", "b"), ("p", "b", "c"), ("q", "c", "a")]).values()) == {None}


def test_a_tie_breaks_a_cycle():
    choices = [("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a")]
    assert set(cycles(choices, ties=[("p", "c", "a")]).values()) == {None}


def test_two_cycles_have_two_numbers_in_the_order_of_their_pairs():
    found = cycles([(p, *e) for p in "qp" for e in (("a", "b"), ("b", "c"), ("c", "a"))])
    assert {k: v for k, v in found.items() if k.startswith("p")} == {"pab": 0, "pbc": 0, "pac": 0}
    assert {k: v for k, v in found.items() if k.startswith("q")} == {"qab": 1, "qbc": 1, "qac": 1}


# --- splits and accounting -----------------------------------------------------------------------------------------


def test_a_prompt_without_any_named_split_is_drawn_by_its_id_and_stays_where_it_is(tmp_path, raw_rows, write_pickapic):
    import pyarrow.parquet as pq

    rows = [{**raw_rows[k % 8], "caption": f"prompt {k}", "user_id": k} for k in range(400)]
    write_pickapic(tmp_path / "raw", rows)
    (file,) = (tmp_path / "raw" / "data").iterdir()
    file.rename(file.with_name("mirror.parquet"))
    source = SourceConfig(name="pap", location=str(tmp_path / "raw"))
    splits = {}
    for name, size in (("all", 400), ("half", 200)):
        store = Store(str(tmp_path / name))
        pq.write_table(pq.read_table(file.with_name("mirror.parquet")).slice(0, size), file.with_name("mirror.parquet"))
        (shard,) = ingest.list_source(source)
        ingest.ingest_shard(store, ingest.plan(source), shard)
        catalogue.build(store, [shard.key])
        prompts = store.read(schemas.CATALOGUE_PROMPTS)
        assert prompts["is_drawn"].all()
        splits[name] = dict(zip(prompts["prompt_id"], prompts["split"], strict=True))
    # 5 % each of 400: 20, with a standard deviation of 4.4.
    for split in ("validation", "test"):
        assert 5 <= list(splits["all"].values()).count(split) <= 40
    assert {k: splits["all"][k] for k in splits["half"]} == splits["half"]


def test_the_accounting_report_adds_up_to_the_raw_files(store, overlapping, raw_rows):
    shards = [s for source in overlapping for s in ingest.list_source(source)]
    for shard in shards:
        source = next(s for s in overlapping if s.name == shard.source)
        ingest.ingest_shard(store, ingest.plan(source), shard)
    catalogue.build(store, [s.key for s in shards])
    accounting.build(store, shards, {"pap": "pickapic", "hpd": "hpd"})
    report = {r["source"]: r for r in store.read(schemas.ACCOUNTING).iter_rows(named=True)}
    rows = raw_rows[:24]
    pap, hpd, everything = report["pap"], report["hpd"], report["all"]
    assert (pap["rows"], pap["votes"], pap["duplicates"], pap["votes_ok"]) == (28, 28, 4, 24)
    assert pap["ties"] == sum(r["label_0"] == 0.5 for r in rows)
    assert pap["annotators"] == len({r["user_id"] for r in rows})
    assert pap["prompts"] == len({r["caption"] for r in rows})
    assert pap["images"] == len({r[f"jpg_{i}"] for r in rows for i in (0, 1)})
    assert pap["image_references"] == 56
    assert pap["image_reuse"] == pytest.approx(48 / pap["images"])
    assert (hpd["rows"], hpd["votes_ok"], hpd["pairs"], hpd["images"], hpd["annotators"]) == (2, 2, 2, 3, 0)
    # The shared pair counts once, with the votes of both.
    assert everything["pairs"] == pap["pairs"] + 1
    assert everything["people"] == 26
    assert everything["images"] == pap["images"]
    for row in report.values():
        assert row["votes"] == sum(
            row[c] for c in ("votes_ok", "unlabelled", "unreadable", "duplicates", "other_rejected")
        )
        assert row["prompts"] == sum(row[f"prompts_{s}"] for s in schemas.SPLITS)
    assert everything["split_conflicts"] == len({r["caption"] for r in rows[:14]} & {r["caption"] for r in rows[10:]})
    assert "| votes per pair |" in accounting.as_markdown(store.read(schemas.ACCOUNTING))
    assert accounting.plot(store.read(schemas.ACCOUNTING)).startswith(b"\x89PNG")


# --- what a large store and a careless one need --------------------------------------------------------------------


def test_the_same_pair_listed_the_other_way_round_is_another_row(store, tmp_path, raw_rows, write_hpd):
    a, b = raw_rows[0]["jpg_0"], raw_rows[0]["jpg_1"]
    records = [
        {"human_preference": [1, 0], "prompt": "p", "file_path": ["a.jpg", "b.jpg"]},
        {"human_preference": [0, 1], "prompt": "p", "file_path": ["b.jpg", "a.jpg"]},
        {"human_preference": [1, 0], "prompt": "p", "file_path": ["a.jpg", "b.jpg"]},
    ]
    write_hpd(tmp_path / "hpd", records, {"a.jpg": a, "b.jpg": b})
    source = SourceConfig(name="hpd", location=str(tmp_path / "hpd"))
    (shard,) = ingest.list_source(source)
    ingest.ingest_shard(store, ingest.plan(source), shard)
    votes = store.read(schemas.VOTES, shard.key).sort("source_row")
    assert votes["status"].to_list() == ["ok", "ok", "duplicate_of"]
    assert votes["label_0"].n_unique() == 1


def test_a_name_with_a_damaged_and_a_whole_image_stands_for_the_whole_one(store, tmp_path, raw_rows, write_pickapic):
    import pyarrow as pa

    row = raw_rows[0]
    cut = row["jpg_0"][:-40]
    write_pickapic(tmp_path / "v1", [{**row, "jpg_0": cut}])
    write_pickapic(tmp_path / "v2", [row])
    bare = pa.schema([f for f in PICKAPIC_SCHEMA if f.name not in ("jpg_0", "jpg_1")])
    write_pickapic(tmp_path / "names", [{k: v for k, v in row.items() if k in bare.names}], schema=bare)
    keys = []
    for name in ("v1", "v2", "names"):
        source = SourceConfig(name=name, layout="pickapic", location=str(tmp_path / name))
        (shard,) = ingest.list_source(source)
        ingest.ingest_shard(store, ingest.plan(source), shard)
        keys.append(shard.key)
    catalogue.build(store, keys)
    names = store.read(schemas.CATALOGUE_NAMES)
    found = names.row(by_predicate=pl.col("images") == 2, named=True)
    assert found["image_id"] == identity.image_id_of_bytes(row["jpg_0"])[0]


def test_shards_that_are_no_sources_any_more_leave_the_views_and_make_the_catalogue_old(
    store, tmp_path, raw_rows, write_hpd
):
    records = [{"human_preference": [1, 0], "prompt": f"p{k}", "file_path": ["a.jpg", "b.jpg"]} for k in range(8)]
    write_hpd(tmp_path / "hpd", records, {"a.jpg": raw_rows[0]["jpg_0"], "b.jpg": raw_rows[0]["jpg_1"]})
    import duckdb

    for size in (4, 3):
        source = SourceConfig(name="hpd", location=str(tmp_path / "hpd"), records_per_shard=size)
        shards = ingest.list_source(source)
        for shard in shards:
            ingest.ingest_shard(store, ingest.plan(source), shard)
        catalogue.build(store, [s.key for s in shards])
    assert len(store.manifests("votes")) > len(shards)
    store.write_views()
    with duckdb.connect() as connection:
        connection.execute(store.read_text("views.sql"))
        assert connection.execute("SELECT count(*) FROM votes").fetchone() == (8,)
    keys = [s.key for s in shards]
    assert catalogue.shard_keys(store) == keys
    catalogue.require_current(store, keys)
    with pytest.raises(StoreError, match="no source's any more"):
        catalogue.require_current(store, keys[:-1])


def test_the_file_of_another_folder_is_never_taken_for_a_missing_one(store, tmp_path, raw_rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    a, b = raw_rows[0]["jpg_0"], raw_rows[0]["jpg_1"]
    for folder, files in (("x", {"2.jpg": b}), ("y", {"1.jpg": a, "2.jpg": b})):
        (tmp_path / "own" / folder).mkdir(parents=True)
        rows = [{"prompt": "p", "image_0": "1.jpg", "image_1": "2.jpg", "label_0": 1.0}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own" / folder / "pairs.parquet")
        for name, data in files.items():
            (tmp_path / "own" / folder / name).write_bytes(data)
    source = SourceConfig(name="own", location=str(tmp_path / "own"))
    shards = ingest.list_source(source)
    for shard in shards:
        ingest.ingest_shard(store, ingest.plan(source), shard)
    catalogue.build(store, [s.key for s in shards])
    votes = catalogue.resolved_votes(store, [s.key for s in shards]).collect()
    assert votes["pair_id"].n_unique() == 2
    whole = identity.image_id_of_bytes(a)[0]
    with_whole = votes.filter((pl.col("image_0_id") == whole) | (pl.col("image_1_id") == whole))
    assert with_whole["source_row"].to_list() == ["y/pairs.parquet:0"]


def test_scores_of_images_that_were_away_are_made_when_they_are_back(store, tmp_path, raw_rows, write_hpd, tiny_config):
    records = [{"human_preference": [1, 0], "prompt": "p", "file_path": ["a.jpg", "b.jpg"]}]
    write_hpd(tmp_path / "hpd", records, {"a.jpg": raw_rows[0]["jpg_0"], "b.jpg": raw_rows[0]["jpg_1"]})
    source = SourceConfig(name="hpd", location=str(tmp_path / "hpd"), storage="reference")
    (shard,) = ingest.list_source(source)
    ingest.ingest_shard(store, ingest.plan(source), shard)
    catalogue.build(store, [shard.key])
    scorers = [tiny_config.scorers[1]]
    statuses = []
    for is_there in (False, True, True):
        here, away = tmp_path / "hpd" / "train", tmp_path / "away"
        if is_there != here.exists():
            away.rename(here) if is_there else here.rename(away)
        built = batches.score_shard(store, shard.key, scorers)["clip"]
        statuses.append((built.manifest.rows_by_status, built.is_reused))
    assert statuses == [({"missing": 2}, False), ({"ok": 2}, False), ({"ok": 2}, True)]


def test_files_in_any_depth_of_folders_are_found_and_a_link_that_leads_back_ends(tmp_path, raw_rows, write_pickapic):
    write_pickapic(tmp_path / "raw" / "a" / "b" / "c" / "d", raw_rows[:2])
    (tmp_path / "raw" / "a" / "again").symlink_to(tmp_path / "raw")
    (shard,) = ingest.list_source(SourceConfig(name="pap", location=str(tmp_path / "raw")))
    assert shard.file.startswith("a/b/c/d/data/")
