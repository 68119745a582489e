import dataclasses
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import pipelines
import trainers
from pipelines import schemas
from pipelines.world import people, raw, scene

# Written out here from the published files, so that the module's own schema cannot vouch for itself.
PICKAPIC = {
    "are_different": pa.bool_(),
    "best_image_uid": pa.string(),
    "caption": pa.string(),
    "created_at": pa.timestamp("ns"),
    "has_label": pa.bool_(),
    "image_0_uid": pa.string(),
    "image_0_url": pa.string(),
    "image_1_uid": pa.string(),
    "image_1_url": pa.string(),
    "jpg_0": pa.binary(),
    "jpg_1": pa.binary(),
    "label_0": pa.float64(),
    "label_1": pa.float64(),
    "model_0": pa.string(),
    "model_1": pa.string(),
    "ranking_id": pa.int64(),
    "user_id": pa.int64(),
    "num_example_per_prompt": pa.int64(),
    "__index_level_0__": pa.int64(),
}


def shards(world, split):
    return sorted((world / "pickapic" / "data").glob(f"{split}-*.parquet"))


def rows(world, split):
    return pl.concat([pl.read_parquet(f) for f in shards(world, split)])


def picture(data):
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
    return np.asarray(image)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A world with many single votes: 2,000 rows in Pick-a-Pic's layout."""
    folder = tmp_path_factory.mktemp("crowd") / "world"
    config = raw.WorldConfig(
        pickapic_shards={"train": 4},
        pickapic_prompts={"train": 150},
        rows_per_shard=500,
        hpd_train_prompts=2,
        hpd_test_groups=1,
        hpd_test_groups_of_ten=0,
    )
    raw.write_world(folder, config)
    return folder


def truth_of(world):
    return pl.read_parquet(world / "truth" / "votes.parquet")


def test_pickapic_files_have_exactly_the_published_columns_and_types(tiny_world):
    files = [f for split in ("train", "validation", "test") for f in shards(tiny_world, split)]
    assert len(files) == 4
    for file in files:
        schema = pq.read_schema(file)
        assert dict(zip(schema.names, schema.types, strict=True)) == PICKAPIC
        assert schema.names == list(PICKAPIC)
        assert re.fullmatch(r"(train|validation|test)-\d{5}-of-\d{5}-[0-9a-f]{16}\.parquet", file.name)


def test_every_image_of_pickapic_is_a_jpeg_of_the_worlds_size(tiny_world):
    frame = rows(tiny_world, "test")
    for data in [*frame["jpg_0"], *frame["jpg_1"]]:
        picture(data)


def test_labels_add_up_and_ties_occur(tiny_world):
    frame = pl.concat([rows(tiny_world, s) for s in ("train", "validation", "test")]).filter("has_label")
    assert set(zip(frame["label_0"], frame["label_1"], strict=True)) == {(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)}
    best = frame.select(
        pl.when(pl.col("label_0") == 1)
        .then("image_0_uid")
        .when(pl.col("label_1") == 1)
        .then("image_1_uid")
        .otherwise(pl.lit("tie"))
    ).to_series()
    assert best.to_list() == frame["best_image_uid"].to_list()


def test_rows_without_label_stand_in_validation_and_test_only(tiny_world):
    assert rows(tiny_world, "train")["has_label"].all()
    for split in ("validation", "test"):
        without = rows(tiny_world, split).filter(~pl.col("has_label"))
        assert 0 < len(without) < 20
        assert without["label_0"].null_count() == without["label_1"].null_count() == len(without)


def test_the_winner_stays_and_images_chain_along_a_session(tiny_world):
    frame = rows(tiny_world, "train")
    chained = 0
    for before, after in itertools.pairwise(frame.iter_rows(named=True)):
        if before["ranking_id"] != after["ranking_id"]:
            continue
        chained += 1
        assert (before["user_id"], before["caption"]) == (after["user_id"], after["caption"])
        shared = {before["image_0_uid"], before["image_1_uid"]} & {after["image_0_uid"], after["image_1_uid"]}
        winner = {1.0: before["image_0_uid"], 0.0: before["image_1_uid"]}.get(before["label_0"])
        assert len(shared) == 1
        assert winner is None or shared == {winner}
    assert chained > len(frame) // 2


def test_a_session_and_its_images_cross_two_neighbouring_shards(tiny_world):
    first, second = (pl.read_parquet(f) for f in shards(tiny_world, "train"))
    assert first["ranking_id"][-1] == second["ranking_id"][0]
    uids = [{frame["image_0_uid"][k], frame["image_1_uid"][k]} for frame, k in ((first, -1), (second, 0))]
    assert len(uids[0] & uids[1]) == 1


def test_one_uid_always_has_the_same_bytes(tiny_world):
    frame = rows(tiny_world, "train")
    held = pl.concat(frame.select(uid=f"image_{i}_uid", data=f"jpg_{i}") for i in (0, 1))
    assert held.group_by("uid").agg(pl.col("data").n_unique())["data"].max() == 1
    assert held["uid"].n_unique() < len(held)


def test_no_prompt_is_in_two_splits_or_two_sources(tiny_world):
    used = [set(rows(tiny_world, s)["caption"]) for s in ("train", "validation", "test")]
    used += [
        {r["prompt"] for r in json.loads((tiny_world / "hpdv2" / f"{s}.json").read_text())} for s in ("train", "test")
    ]
    assert sum(len(u) for u in used) == len(set.union(*used))


def test_the_hpd_train_file_has_pairs_of_groups_of_four(tiny_world, tiny_world_config):
    records = json.loads((tiny_world / "hpdv2" / "train.json").read_text())
    assert len(records) == 6 * tiny_world_config.hpd_train_prompts
    for record in records:
        assert list(record) == ["human_preference", "prompt", "file_path"]
        assert record["human_preference"] in ([1, 0], [0, 1])
        for name in record["file_path"]:
            picture((tiny_world / "hpdv2" / "train" / name).read_bytes())
    for start in range(0, len(records), 6):
        group = records[start : start + 6]
        assert len({r["prompt"] for r in group}) == 1
        assert len({tuple(r["file_path"]) for r in group}) == 6
        assert len({name for r in group for name in r["file_path"]}) == 4


def test_the_hpd_test_file_has_groups_of_nine_and_ten_ranked_by_ten_raters(tiny_world):
    records = json.loads((tiny_world / "hpdv2" / "test.json").read_text())
    assert sorted(len(r["image_path"]) for r in records) == [9, 9, 10]
    for record in records:
        assert list(record) == ["prompt", "image_path", "rank", "raw_annotations"]
        count = len(record["image_path"])
        assert len(record["raw_annotations"]) == 10
        assert len({a["user_hash"] for a in record["raw_annotations"]}) == 10
        for annotation in record["raw_annotations"]:
            assert set(annotation) == {"rank", "user_hash"}
            assert sorted(annotation["rank"]) == list(range(1, count + 1))
        mean = np.mean([a["rank"] for a in record["raw_annotations"]], axis=0)
        assert (np.diff(mean[np.argsort(record["rank"])]) >= 0).all()
        for name in record["image_path"]:
            picture((tiny_world / "hpdv2" / "test" / name).read_bytes())


def test_a_lower_rank_is_better(tiny_world):
    """The rank of the ten raters' majority grows while the population's mean utility of the pictures falls."""
    records = json.loads((tiny_world / "hpdv2" / "test.json").read_text())
    correlations = []
    for record in records:
        pictures = np.stack([picture((tiny_world / "hpdv2" / "test" / n).read_bytes()) for n in record["image_path"]])
        wanted = [scene.parse_prompt(record["prompt"])] * len(pictures)
        utility = people.mean_taste(0.25).utility(scene.read_attributes(pictures), wanted)
        correlations.append(np.corrcoef(utility, record["rank"])[0, 1])
    assert max(correlations) < -0.5


def test_the_default_world_has_the_groups_and_raters_it_promises():
    config = raw.WorldConfig()
    assert config.hpd_test_groups >= 60
    assert config.hpd_test_groups_of_ten >= 1
    assert config.test_raters == 10
    assert config.hpd_annotators >= 40
    assert all(n >= 1 for n in config.pickapic_shards.values())
    assert config.pickapic_shards["train"] >= 2
    assert 0.03 <= config.slip_rate <= 0.10


def test_majority_annotators_follow_their_own_utility_on_75_to_85_percent_of_decided_pairs(crowd):
    frame, truth = rows(crowd, "train"), truth_of(crowd).filter(pl.col("source") == "pickapic")
    assert len(frame) == len(truth)
    wanted = [scene.parse_prompt(p) for p in frame["caption"]]
    first, second = (
        people.MAJORITY.utility(scene.read_attributes(np.stack([picture(b) for b in frame[c]])), wanted)
        for c in ("jpg_0", "jpg_1")
    )
    use = ((truth["taste"] == "majority") & (frame["label_0"] != 0.5)).to_numpy()
    follows = (first > second) == (frame["label_0"].to_numpy() == 1.0)
    assert use.sum() > 1_000
    assert 0.75 <= follows[use].mean() <= 0.85


def test_slips_are_3_to_10_percent_of_decided_votes(crowd):
    frame, truth = rows(crowd, "train"), truth_of(crowd).filter(pl.col("source") == "pickapic")
    decided = (frame["label_0"] != 0.5).to_numpy()
    slips = truth["is_slip"].to_numpy().astype(bool)
    assert 0.03 <= slips[decided].mean() <= 0.10
    assert not slips[~decided].any()


def test_the_minority_has_its_share_of_votes_and_is_more_often_against_the_mean(crowd):
    truth = truth_of(crowd).filter(pl.col("source") == "pickapic")
    share = (truth["taste"] == "minority").mean()
    assert share == pytest.approx(0.25, abs=0.05)
    against = dict(truth.group_by("taste").agg(pl.col("is_against_mean").mean()).iter_rows())
    assert against["minority"] > against["majority"] + 0.1


def test_pictures_come_from_at_least_four_models(crowd):
    frame = rows(crowd, "train")
    assert set(frame["model_0"]) | set(frame["model_1"]) == {r.name for r in people.RENDERERS}
    assert len(people.RENDERERS) >= 4


def test_the_truth_has_one_row_per_vote_and_joins_every_vote(tiny_world, ingested):
    store, keys = ingested
    truth = truth_of(tiny_world)
    key = ["source", "source_row", "rater"]
    votes = store.scan(schemas.VOTES, partitions=keys).collect()
    assert truth.select(key).is_duplicated().sum() == 0
    joined = votes.join(truth.with_columns(pl.col("rater").cast(pl.Int32)), on=key)
    assert len(joined) == len(votes) == len(truth)


def test_the_truth_agrees_with_the_votes_it_joins(tiny_world, ingested):
    """One person has one taste, and an unlabelled row has no facts about its vote."""
    store, keys = ingested
    votes = store.scan(schemas.VOTES, partitions=keys).collect()
    truth = truth_of(tiny_world).with_columns(pl.col("rater").cast(pl.Int32))
    joined = votes.join(truth, on=["source", "source_row", "rater"])
    known = joined.filter(pl.col("annotator_id").is_not_null())
    assert known.group_by("annotator_id").agg(pl.col("taste").n_unique())["taste"].max() == 1
    without = joined.filter(pl.col("status") == "unlabelled")
    assert len(without) > 0
    assert without["is_against_mean"].null_count() == len(without)
    ranked = joined.filter(pl.col("source_row").str.starts_with("test.json:"))
    assert ranked["is_slip"].null_count() == len(ranked) > 0


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_world, tiny_world_config, tmp_path):
    raw.write_world(tmp_path / "again", tiny_world_config)
    assert files_of(tmp_path / "again") == files_of(tiny_world)
    raw.write_world(tmp_path / "other", dataclasses.replace(tiny_world_config, seed=12))
    assert files_of(tmp_path / "other")["hpdv2/test.json"] != files_of(tiny_world)["hpdv2/test.json"]


def test_a_world_that_lies_there_unchanged_is_not_written_again(world_copy, tiny_world_config):
    marker = world_copy / "untouched"
    marker.write_text("still here")
    assert raw.write_world(world_copy, tiny_world_config) is False
    assert marker.exists()


def test_other_parameters_replace_the_world(world_copy, tiny_world_config):
    before = (world_copy / "world.json").read_text()
    assert raw.write_world(world_copy, dataclasses.replace(tiny_world_config, slip_rate=0.1)) is True
    assert (world_copy / "world.json").read_text() != before


def test_a_folder_with_other_files_is_never_overwritten(tmp_path, tiny_world_config):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no world\.json"):
        raw.write_world(tmp_path, tiny_world_config)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_more_prompts_than_the_pool_has_are_refused(tmp_path, tiny_world_config):
    config = dataclasses.replace(tiny_world_config, hpd_train_prompts=100_000)
    with pytest.raises(ValueError, match="the pool 'store' has"):
        raw.write_world(tmp_path / "world", config)
    assert not (tmp_path / "world").exists()


def test_the_two_prompt_pools_are_disjoint_and_together_the_grammar():
    store, rewards = set(raw.prompt_pool("store")), set(raw.prompt_pool("rewards"))
    assert not store & rewards
    assert store | rewards == set(scene.all_prompts())
    assert len(rewards) / len(store | rewards) == pytest.approx(1 / 3, abs=0.05)
    with pytest.raises(ValueError, match="'store' or 'rewards'"):
        raw.prompt_pool("all")


def test_no_code_but_the_writer_names_the_truth_file():
    readers = []
    for package in (pipelines, trainers):
        root = Path(package.__file__).parent
        for file in root.rglob("*.py"):
            if file == root / "world" / "raw.py":
                continue
            text = file.read_text()
            readers += [str(file) for word in ("truth/", "'truth'", '"truth"') if word in text]
    assert readers == []
