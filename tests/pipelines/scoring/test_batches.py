import io
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from pipelines import catalogue, identity, images, ingest, schemas, steps
from pipelines.config import ScorerConfig, SourceConfig
from pipelines.scoring import batches, checkpoints
from pipelines.scoring.pictures import Picture
from pipelines.scoring.scorer import load
from pipelines.sources import pickapic
from pipelines.tables import Store, StoreError

CLIP_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


@pytest.fixture(scope="module")
def scored(ingested, tiny_config, tmp_path_factory):
    """(store, keys, what the first pass built, the names of the models it loaded): every shard scored and activated; read only."""
    source, keys = ingested
    store = Store(str(shutil.copytree(source.location, tmp_path_factory.mktemp("scored") / "store")))
    models, loads = {}, []
    real = batches.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "load", lambda scorer, device: loads.append(scorer.name) or real(scorer, device))
        built = {k: batches.score_shard(store, k, list(tiny_config.scorers), models=models) for k in keys}
    batches.activate(store, tiny_config, keys)
    return store, keys, built, loads


@pytest.fixture
def small(tmp_path, store, raw_rows, write_pickapic):
    """Ingest rows as one shard and build the catalogue; return (store, key)."""

    def run(rows):
        write_pickapic(tmp_path / "pap", rows)
        source = SourceConfig(name="pap", layout="pickapic", location=str(tmp_path / "pap"))
        (shard,) = pickapic.list_shards(source)
        ingest.ingest_shard(store, ingest.plan(source), shard)
        catalogue.build(store, [shard.key])
        return store, shard.key

    return run


@pytest.fixture
def clip(tiny_clip):
    return ScorerConfig(name="clip", kind="clip", checkpoint=str(tiny_clip), batch_size=64)


def scores_of(store, built):
    return store.read(schemas.SCORES, built.manifest.partition)


def test_every_image_with_prompt_of_the_store_is_scored_exactly_once(scored, tiny_config):
    store, keys, built, _ = scored
    wanted = set(store.read(schemas.CATALOGUE_SCORABLES).select("image_id", "prompt_id").rows())
    for scorer in tiny_config.scorers:
        found = pl.concat(scores_of(store, built[k][scorer.name]) for k in keys)
        assert len(found) == len(wanted)
        assert set(found.select("image_id", "prompt_id").rows()) == wanted
        assert set(found["status"]) == {"ok"}
        assert found["score"].null_count() == 0


def test_a_score_is_the_one_that_the_scorer_gives_the_image_alone(scored, clip):
    store, keys, built, _ = scored
    scorer = load(clip)
    held = store.read(schemas.IMAGES, keys[0]).select("image_id", "bytes")
    prompts = store.read(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt")
    rows = scores_of(store, built[keys[0]]["clip"]).join(held, on="image_id").join(prompts, on="prompt_id")
    for row in rows.sample(8, seed=0).iter_rows(named=True):
        alone = scorer.score([scorer.prepare(Picture(images.decode(row["bytes"])))], [row["prompt"]])[0]
        assert row["score"] == pytest.approx(float(alone), abs=1e-5)


def test_scores_tell_images_and_prompts_apart(scored, tiny_config):
    store, keys, built, _ = scored
    found = scores_of(store, built[keys[0]]["clip"])
    assert found["score"].n_unique() > 0.9 * len(found)


def test_scores_do_not_depend_on_the_batch_size(small, raw_rows, clip):
    store, key = small(raw_rows[:10])
    found = []
    for size in (64, 3):
        scorer = clip.model_copy(update={"name": f"clip{size}", "batch_size": size})
        found.append(scores_of(store, batches.score_shard(store, key, [scorer])[scorer.name]))
    assert found[0].select("image_id", "prompt_id").equals(found[1].select("image_id", "prompt_id"))
    assert found[0]["score"].to_list() == pytest.approx(found[1]["score"].to_list(), abs=1e-5)


def test_an_image_is_decoded_once_however_many_scorers_and_prompts_want_it(small, raw_rows, clip, monkeypatch):
    rows = [*raw_rows[:6], {**raw_rows[0], "caption": "a blue cross", "user_id": 99}]
    store, key = small(rows)
    decoded = []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda data: decoded.append(data) or real(data))
    scorers = [clip, clip.model_copy(update={"name": "pickscore", "kind": "pickscore"})]
    built = batches.score_shard(store, key, scorers)
    assert sorted(decoded) == sorted({r[f"jpg_{i}"] for r in rows for i in (0, 1)})
    assert built["clip"].manifest.rows == len(decoded) + 2


def test_the_commit_of_scores_states_kind_revision_and_logit_scale(scored, tiny_config):
    _, keys, built, _ = scored
    for scorer in tiny_config.scorers:
        extra = built[keys[0]][scorer.name].manifest.extra
        assert extra["kind"] == scorer.kind
        assert extra["revision"] == checkpoints.revision(scorer)
        assert extra["logit_scale"] > 1


def test_pickscore_is_the_clip_score_times_the_logit_scale(scored):
    store, keys, built, _ = scored
    a, b = (scores_of(store, built[keys[0]][name])["score"].to_numpy() for name in ("pickscore", "clip"))
    scale = built[keys[0]]["pickscore"].manifest.extra["logit_scale"]
    np.testing.assert_allclose(a, b * scale, rtol=1e-4, atol=1e-5)


def test_scoring_again_reuses_every_shard_and_loads_no_model(scored, tiny_config):
    store, keys, built, _ = scored
    models = {}
    again = {k: batches.score_shard(store, k, list(tiny_config.scorers), models=models) for k in keys}
    assert models == {}
    for key in keys:
        for name, b in again[key].items():
            assert b.is_reused
            assert b.manifest == built[key][name].manifest


def test_a_model_is_loaded_once_for_all_shards(scored, tiny_config):
    _, keys, _, loads = scored
    assert len(keys) > 1
    assert loads == [s.name for s in tiny_config.scorers]


def test_a_new_scorer_is_scored_without_touching_the_others(small, raw_rows, clip):
    store, key = small(raw_rows[:6])
    batches.score_shard(store, key, [clip])
    models = {}
    built = batches.score_shard(store, key, [clip, clip.model_copy(update={"name": "second"})], models=models)
    assert {n: b.is_reused for n, b in built.items()} == {"clip": True, "second": False}
    assert set(models) == {"second"}


def test_a_new_shard_elsewhere_leaves_scores_as_they_are(tmp_path, store, raw_rows, write_pickapic, clip):
    keys = []
    for name, rows in (("a", raw_rows[:6]), ("b", raw_rows[4:12])):
        write_pickapic(tmp_path / name, rows)
        source = SourceConfig(name=name, layout="pickapic", location=str(tmp_path / name))
        (shard,) = pickapic.list_shards(source)
        ingest.ingest_shard(store, ingest.plan(source), shard)
        keys.insert(0, shard.key)
        catalogue.build(store, keys)
        built = {k: batches.score_shard(store, k, [clip])["clip"] for k in keys}
    a, b = sorted(keys)
    assert (built[a].is_reused, built[b].is_reused) == (True, False)
    found = [set(scores_of(store, built[k]).select("image_id", "prompt_id").rows()) for k in (a, b)]
    assert not found[0] & found[1]


def test_an_image_that_cannot_be_scored_has_a_row_with_its_status_and_no_score(small, raw_rows, clip):
    rows = [dict(r) for r in raw_rows[:8:2]]
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    whole = buffer.getvalue()
    tables = whole.index(b"\xff\xc4") + 4
    bad = {
        "undecodable": whole[:tables] + b"\xff" * 20 + whole[tables + 20 :],
        "truncated": whole[: len(whole) // 2],
        "unreadable": b"no image",
    }
    for row, data in zip(rows, bad.values(), strict=False):
        row["jpg_0"] = data
    rows[3]["jpg_0"] = None
    store, key = small(rows)
    table = scores_of(store, batches.score_shard(store, key, [clip])["clip"])
    expected = {identity.image_id_of_bytes(data)[0]: status for status, data in bad.items()}
    expected[identity.image_id_of_uid("pickapic", rows[3]["image_0_uid"])] = "no_bytes"
    found = table.filter(pl.col("status") != "ok")
    assert dict(found.select("image_id", "status").iter_rows()) == expected
    assert found["score"].null_count() == 4
    assert found["reason"].null_count() == 0
    good = table.filter(status="ok")
    assert len(good) == 4
    assert good["score"].null_count() == 0


def test_a_shard_that_owns_nothing_has_an_empty_table(tmp_path, store, raw_rows, write_pickapic, clip):
    keys = []
    for name in ("a", "b"):
        write_pickapic(tmp_path / name, raw_rows[:4])
        source = SourceConfig(name=name, layout="pickapic", location=str(tmp_path / name))
        (shard,) = pickapic.list_shards(source)
        ingest.ingest_shard(store, ingest.plan(source), shard)
        keys.append(shard.key)
    catalogue.build(store, keys)
    rows = [batches.score_shard(store, k, [clip])["clip"].manifest.rows for k in keys]
    assert rows[0] > 0
    assert rows[1] == 0


# --- revisions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_shards(tmp_path, raw_rows, write_pickapic, store):
    for k, rows in enumerate((raw_rows[:4], raw_rows[30:34])):
        write_pickapic(tmp_path / "pap", rows, index=k, total=2)
    source = SourceConfig(name="pap", layout="pickapic", location=str(tmp_path / "pap"))
    shards = pickapic.list_shards(source)
    for shard in shards:
        ingest.ingest_shard(store, ingest.plan(source), shard)
    keys = [s.key for s in shards]
    catalogue.build(store, keys)
    return keys


def test_a_revision_becomes_active_only_when_every_shard_is_scored(
    store, two_shards, clip, tiny_config, tmp_path, make_tiny_clip
):
    def config(scorer):
        return tiny_config.model_copy(update={"scorers": (scorer,)})

    def active():
        return batches.current_scores(store, ["clip"], two_shards).sort("image_id").collect()

    with pytest.raises(StoreError, match=r"no active scores of \['clip'\]"):
        batches.current_scores(store, ["clip"], two_shards)
    for key in two_shards:
        batches.score_shard(store, key, [clip])
    first = batches.activate(store, config(clip), two_shards)
    before = active()
    newer = clip.model_copy(update={"checkpoint": str(make_tiny_clip(tmp_path / "newer", seed=1))})
    batches.score_shard(store, two_shards[0], [newer])
    with pytest.raises(StoreError, match=two_shards[1]):
        batches.activate(store, config(newer), two_shards)
    assert store.current_revisions() == first
    assert active().equals(before)
    batches.score_shard(store, two_shards[1], [newer])
    second = batches.activate(store, config(newer), two_shards)
    assert second != first
    assert not active().equals(before)
    assert len(store.manifests("scores", f"clip/revision={first['clip']}/")) == 2, "the old revision stays"
    assert batches.activate(store, config(clip), two_shards) == first
    assert active().equals(before)


def test_the_revision_changes_with_each_file_of_the_checkpoint_and_with_the_kind(clip, tmp_path):
    seen = {checkpoints.revision(clip), checkpoints.revision(clip.model_copy(update={"kind": "pickscore"}))}
    for name in CLIP_FILES:
        folder = shutil.copytree(clip.checkpoint, tmp_path / name.replace(".", "_"))
        moved = clip.model_copy(update={"checkpoint": str(folder)})
        assert checkpoints.revision(moved) == checkpoints.revision(clip), "the place is no part of it"
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        seen.add(checkpoints.revision(moved))
    assert len(seen) == 2 + len(CLIP_FILES)
    assert {len(r) for r in seen} == {12}


@pytest.mark.parametrize("absent", CLIP_FILES)
def test_a_missing_file_of_a_checkpoint_is_named_with_the_scorer_and_what_makes_it(clip, tmp_path, absent):
    folder = shutil.copytree(clip.checkpoint, tmp_path / "partial")
    (folder / absent).unlink()
    with pytest.raises(checkpoints.CheckpointError) as error:
        checkpoints.resolve(clip.model_copy(update={"checkpoint": str(folder)}))
    message = str(error.value)
    assert str(folder / absent) in message
    assert "scorer 'clip'" in message
    assert "python -m trainers.world_models" in message


def test_an_absent_local_folder_is_never_looked_for_on_the_hub(clip, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match=r"absent/config\.json is missing"):
        checkpoints.resolve(clip.model_copy(update={"checkpoint": str(tmp_path / "absent")}))


def test_scoring_without_catalogue_says_what_is_missing(store, clip):
    with pytest.raises(StoreError, match="table 'images' has no partition 'nowhere'"):
        batches.score_shard(store, "nowhere", [clip])


# --- labels from a scored store ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(scored, tiny_config):
    """(store, keys): the scored store with every label table."""
    store, keys, _, _ = scored
    labels = steps.Labels(store, tiny_config, keys)
    first = {name: getattr(labels, name)() for name in steps.LABEL_TABLES}
    assert not any(b.is_reused for b in first.values())
    return store, keys


def test_the_label_tables_account_for_every_pair_and_every_decided_vote(labelled):
    store, keys = labelled
    pairs = set(catalogue.all_pairs(store).collect()["pair_id"])
    for table in (schemas.CONSENSUS, schemas.SMOOTHED, schemas.PREFERENCES):
        found = store.read(table)["pair_id"]
        assert len(found) == len(pairs)
        assert set(found) == pairs
    votes = catalogue.counted_votes(store, keys).filter(pl.col("label_0") != 0.5).collect()
    assert set(store.read(schemas.MINORITY)["vote_id"]) == set(votes["vote_id"])
    assert store.read(schemas.PREFERENCES)["n_votes"].sum() == len(catalogue.counted_votes(store, keys).collect())


def test_ten_raters_of_a_pair_meet_in_one_row(labelled):
    store, _ = labelled
    many = store.read(schemas.PREFERENCES).filter(pl.col("n_votes") == 10)
    assert len(many) == 36 + 36 + 45
    assert many["minority_share"].null_count() == 0


def test_labelling_again_reuses_every_table_and_other_choices_rebuild_theirs(labelled, tiny_config):
    store, keys = labelled
    labels = steps.Labels(store, tiny_config, keys)
    assert [getattr(labels, name)().is_reused for name in steps.LABEL_TABLES] == [True] * len(steps.LABEL_TABLES)
    other = tiny_config.model_copy(
        update={"labels": tiny_config.labels.model_copy(update={"tie_policy": "keep_order"})}
    )
    labels = steps.Labels(store, other, keys)
    assert labels.calibration().is_reused
    assert not labels.consensus().is_reused
    labels = steps.Labels(store, tiny_config, keys)
    assert not labels.consensus().is_reused


def test_scores_in_preferences_are_those_of_the_active_revision(labelled):
    store, keys = labelled
    current = batches.current_scores(store, ["pickscore", "clip"], keys).collect()
    lookup = {(r["scorer"], r["image_id"], r["prompt_id"]): r["score"] for r in current.iter_rows(named=True)}
    for row in store.read(schemas.PREFERENCES).sample(20, seed=0).iter_rows(named=True):
        for side in (0, 1):
            for scorer in ("pickscore", "clip"):
                assert row[f"score_{side}_{scorer}"] == lookup[scorer, row[f"image_{side}_id"], row["prompt_id"]]


def test_scoring_leaves_the_random_state_of_the_caller_alone(small, raw_rows, clip):
    store, key = small(raw_rows[:2])
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    batches.score_shard(store, key, [clip])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_a_shard_owns_has_the_fingerprint_of_its_rows():
    owned = pl.DataFrame({"image_id": ["0a" * 16, "ff" * 16], "prompt_id": ["1b" * 16, "00" * 16], "owner": "s"})
    for frame in (owned, owned.head(1), owned.clear()):
        rows = frame.select("image_id", "prompt_id").rows()
        assert batches._wanted(frame, "c" * 64) == identity.fingerprint(rows=rows, images="c" * 64)
