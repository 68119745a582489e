import numpy as np
import polars as pl
import pytest

from pipelines import images, schemas
from pipelines.config import ConfigError, SourceConfig, small_world
from pipelines.scoring import checkpoints, precision
from pipelines.scoring import scorer as models
from pipelines.scoring.pictures import Picture
from pipelines.tables import StoreError

PAIRS = 24


@pytest.fixture
def tiny(ingested_copy, tiny_config):
    """(store, config, shard keys): ingested; its second scorer is configured in bfloat16."""
    store, keys = ingested_copy
    pick, clip = tiny_config.scorers
    rough = clip.model_copy(update={"precision": "bfloat16"})
    return store, tiny_config.model_copy(update={"scorers": (pick, rough)}), keys


def bytes_of(store):
    return dict(store.scan(schemas.IMAGES).select("image_id", "bytes").collect().iter_rows())


def test_the_report_is_of_the_very_scores_that_the_two_precisions_give(tiny):
    store, config, _ = tiny
    scorer = config.scorers[0]
    report = precision.compare(store, scorer, "cpu", PAIRS)
    chosen = precision._choose(store, PAIRS)
    data = bytes_of(store)
    prompts = dict(store.read(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt").iter_rows())
    votes, gaps, exact = [], {}, {}
    loaded = [models.load(scorer.model_copy(update={"precision": p})) for p in ("float32", "bfloat16")]
    for row in chosen.iter_rows(named=True):
        sides = []
        for image in (row["image_0_id"], row["image_1_id"]):
            prompt = prompts[row["prompt_id"]]
            one = [float(m.score([m.prepare(Picture(images.decode(data[image])))], [prompt])[0]) for m in loaded]
            exact[image, prompt], gaps[image, prompt] = one[0], one[1] - one[0]
            sides.append(one)
        signs = [sides[0][i] > sides[1][i] for i in (0, 1)]
        votes.append(signs[0] != signs[1])
    assert report.pairs == report.pairs_decided == PAIRS
    assert report.scores == len(gaps)
    assert report.flips == sum(votes)
    values = pl.Series(list(gaps.values()))
    # Batches pad prompts and group pictures otherwise, which bfloat16 feels.
    assert report.difference_sd == pytest.approx(values.std(), rel=0.2)
    assert report.score_sd == pytest.approx(pl.Series(list(exact.values())).std(), rel=1e-3)
    assert 0 < report.difference_max < 50 * report.difference_sd
    assert report.images_left_out == 0
    assert report.seconds_float32 > 0
    assert report.seconds_bfloat16 > 0
    assert (report.revision, report.revision_bfloat16) == tuple(
        checkpoints.revision(scorer.model_copy(update={"precision": p})) for p in ("float32", "bfloat16")
    )


def test_the_share_and_the_goal_follow_from_the_scores(tiny, monkeypatch):
    store, config, _ = tiny
    chosen = precision._choose(store, PAIRS)
    turned = set(chosen.head(3)["prompt_id"])

    class Known:
        """Scores by the image's place in id order; in bfloat16 the other way round for some prompts."""

        def __init__(self, of):
            self.is_rough = of.precision == "bfloat16"

        def prepare(self, picture):
            return picture

        def score_pairs(self, prepared, pairs):
            ids = {t: i for i, t in prompts.items()}
            values = [float(i) * (-1 if self.is_rough and ids[t] in turned else 1) for i, t in pairs]
            return np.array(values, np.float32)

    prompts = dict(store.read(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt").iter_rows())
    monkeypatch.setattr(models, "load", lambda of, device: Known(of))
    report = precision.compare(store, config.scorers[0], "cpu", PAIRS)
    flipped = chosen.filter(pl.col("prompt_id").is_in(list(turned))).height
    assert flipped >= 3
    assert report.flips == flipped
    assert report.share_flipped == pytest.approx(flipped / PAIRS)
    assert report.is_goal_met is False
    turned.clear()
    report = precision.compare(store, config.scorers[0], "cpu", PAIRS)
    assert (report.flips, report.share_flipped, report.is_goal_met) == (0, 0.0, True)


def test_the_pairs_are_decided_human_ones_with_bytes_and_the_same_every_time(tiny):
    store, _, keys = tiny
    chosen = precision._choose(store, PAIRS)
    assert len(chosen) == chosen["pair_id"].n_unique() == PAIRS
    assert chosen.equals(precision._choose(store, PAIRS))
    human = dict(store.read(schemas.CATALOGUE_PAIRS).select("pair_id", "human_label_0").iter_rows())
    assert all(human[p] not in (None, 0.5) for p in chosen["pair_id"])
    for (shard,), part in chosen.group_by("shard"):
        held = store.read(schemas.IMAGES, shard).filter(pl.col("status") == "ok")["image_id"]
        assert set(part["image_0_id"]) | set(part["image_1_id"]) <= set(held)
    assert chosen["shard"].n_unique() == precision.SHARDS < len(keys)


def test_a_store_with_fewer_pairs_gives_all_of_them(tiny):
    store, *_ = tiny
    decided = store.read(schemas.CATALOGUE_PAIRS).filter(
        pl.col("human_label_0").is_not_null(), pl.col("human_label_0") != 0.5
    )
    chosen = precision._choose(store, 10_000)
    assert set(chosen["pair_id"]) == set(decided["pair_id"])


def test_a_pair_of_two_shards_is_chosen_once_and_one_with_a_bad_image_never(
    tmp_path, store, raw_rows, write_pickapic, ingest_all
):
    rows = [dict(r) for r in raw_rows if r["has_label"] and r["label_0"] != 0.5][:6]
    rows[0]["jpg_0"] = rows[0]["jpg_0"][:100]
    for name in ("a", "b"):
        write_pickapic(tmp_path / name, rows)
    ingest_all(
        store, [SourceConfig(name=n, layout="pickapic", location=str(tmp_path / n), family=n) for n in ("a", "b")]
    )
    chosen = precision._choose(store, 100)
    pairs = store.read(schemas.CATALOGUE_PAIRS)
    assert len(chosen) == chosen["pair_id"].n_unique() == len(pairs) - 1


def test_a_store_without_a_decided_pair_says_so(tmp_path, store, raw_rows, write_pickapic, ingest_all, tiny_config):
    rows = [{**r, "label_0": 0.5, "label_1": 0.5, "has_label": True} for r in raw_rows[:4]]
    write_pickapic(tmp_path / "pap", rows)
    ingest_all(store, [SourceConfig(name="pap", layout="pickapic", location=str(tmp_path / "pap"))])
    with pytest.raises(StoreError, match="no pair with a decided human label"):
        precision.compare(store, tiny_config.scorers[0], "cpu")


def test_an_image_that_cannot_be_decoded_is_left_out_with_its_pairs(tiny, monkeypatch):
    store, config, _ = tiny
    chosen = precision._choose(store, PAIRS)
    bad_id = chosen["image_0_id"][0]
    bad = bytes_of(store)[bad_id]
    real = images.decode

    def decode(data):
        if data == bad:
            raise images.UndecodableImage("bits are missing")
        return real(data)

    monkeypatch.setattr(images, "decode", decode)
    report = precision.compare(store, config.scorers[0], "cpu", PAIRS)
    without = chosen.filter((pl.col("image_0_id") != bad_id) & (pl.col("image_1_id") != bad_id))
    assert report.images_left_out == 1
    assert report.pairs == len(without) < PAIRS


def test_a_measurement_is_a_row_that_is_reused_until_weights_or_pairs_change(tiny, tmp_path, make_tiny_clip):
    store, config, _ = tiny
    scorer = config.scorers[1]
    first = precision.measure(store, scorer, "cpu", PAIRS)
    assert not first.is_reused
    assert precision.measure(store, scorer, "cpu", PAIRS).is_reused
    # The precision that is configured is no part of it: both are measured.
    exact = scorer.model_copy(update={"precision": "float32"})
    assert precision.measure(store, exact, "cpu", PAIRS).is_reused
    assert not precision.measure(store, scorer, "cpu", PAIRS - 4).is_reused
    other = scorer.model_copy(update={"checkpoint": str(make_tiny_clip(tmp_path / "other", seed=1))})
    assert not precision.measure(store, other, "cpu", PAIRS - 4).is_reused
    row = store.read(schemas.SCORER_PRECISION, "clip").row(0, named=True)
    assert row["revision_bfloat16"] == checkpoints.revision(other)
    assert row["pairs"] == PAIRS - 4


def test_rows_are_those_of_the_scorers_whose_revision_is_the_one_in_bfloat16(tiny):
    store, config, _ = tiny
    for scorer in config.scorers:
        precision.measure(store, scorer, "cpu", 8)
    present = {s.name: checkpoints.revision(s) for s in config.scorers}
    assert precision.rows(store, present)["scorer"].to_list() == ["clip"]
    assert precision.rows(store, {"clip": "another", "absent": "x"}).is_empty()


def test_only_scorers_configured_in_bfloat16_and_with_a_model_are_measured_unasked(tiny):
    _, config, _ = tiny
    assert [s.name for s in precision.configured(config)] == ["clip"]
    imported = config.scorers[1].model_copy(update={"kind": "imported"})
    assert precision.configured(config.model_copy(update={"scorers": (imported,)})) == []


@pytest.mark.parametrize("change", [{"kind": "imported"}, {"kind": "hpsv2", "backend": "reference"}])
def test_a_scorer_without_a_model_of_ours_is_refused(tiny, change):
    store, config, _ = tiny
    scorer = config.scorers[0].model_copy(update=change)
    with pytest.raises(ConfigError, match=r"scorer 'pickscore': kind .* has no model"):
        precision.compare(store, scorer, "cpu")


def test_an_unknown_name_is_refused_with_those_there_are(tiny):
    store, config, _ = tiny
    with pytest.raises(ConfigError, match=r"'clap' is none of the scorers \['clip', 'pickscore'\]"):
        precision.main_text(store, config, ["clap"])


def test_the_text_is_of_the_scorers_in_bfloat16_unless_others_are_named(tiny):
    store, config, _ = tiny
    text = precision.main_text(store, config, device="cpu", pairs=8)
    assert text.startswith("clip: bfloat16")
    assert "\npickscore" not in text
    assert "below 0.5 %:" in text
    both = precision.main_text(store, config, ["pickscore", "clip"], device="cpu", pairs=8)
    assert [part.split(":")[0] for part in both.split("\n\n")] == ["pickscore", "clip"]


@pytest.mark.parametrize(("share", "met", "said"), [(0.0, True, "yes"), (0.005, False, "NO"), (None, None, "unknown")])
def test_the_text_says_whether_the_goal_is_met(share, met, said):
    row = dict.fromkeys(schemas.SCORER_PRECISION.polars_schema, 0) | {"share_flipped": share, "is_goal_met": met}
    (line,) = [line for line in precision.text(row).splitlines() if line.lstrip().startswith("goal")]
    assert line.endswith(f"below 0.5 %: {said}")


def test_bfloat16_flips_few_votes_of_the_small_world_s_reward_models(tiny):
    store, _, _ = tiny
    for scorer in small_world().scorers:
        report = precision.compare(store, scorer, "cpu", 150)
        assert report.pairs == 150
        assert 0 < report.difference_sd < 0.02 * report.score_sd
        assert report.share_flipped < 0.02
