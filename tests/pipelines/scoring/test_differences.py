import datetime as dt
import shutil

import numpy as np
import polars as pl
import pytest

from pipelines import schemas
from pipelines.scoring import batches, differences
from pipelines.tables import Store, StoreError

OLD, NEW = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


@pytest.fixture
def write(store):
    """Commit (image, prompt, score or status) rows as a shard of a revision."""

    def run(revision, rows, shard="mine/one", scorer="clip"):
        table = pl.DataFrame(
            [(i, p, None, s, "why") if isinstance(s, str) else (i, p, s, "ok", None) for i, p, s in rows],
            schema=schemas.SCORES.polars_schema,
            orient="row",
        )
        return store.write(
            schemas.SCORES, table, partition=batches.partition(scorer, revision, shard), made_from=f"{revision}{rows}"
        )

    return run


# Image 5 loses its score, 6 is in the old revision only, 7 in the new one only.
OLD_ROWS = [("1", "p", 1.5), ("2", "p", 0.5), ("3", "p", 1.5), ("4", "p", 3.5), ("5", "p", 2.0), ("6", "p", 9.0)]
NEW_ROWS = [
    ("1", "p", 1.0),
    ("2", "p", 1.5),
    ("3", "p", 0.25),
    ("4", "p", 3.5),
    ("5", "p", "truncated"),
    ("7", "p", 8.0),
]
PAIRS = pl.DataFrame(
    [("p", "1", "2"), ("p", "1", "3"), ("p", "2", "3"), ("p", "3", "4"), ("p", "4", "5"), ("p", "1", "7")],
    schema=["prompt_id", "image_0_id", "image_1_id"],
    orient="row",
)


@pytest.fixture
def diff(store, write):
    write(OLD, OLD_ROWS)
    write(NEW, NEW_ROWS)
    return differences.score_diff(store, "clip", OLD, NEW, ["mine/one"])


def test_both_revisions_stand_side_by_side_with_what_only_one_of_them_has(diff):
    assert diff.columns == [
        *("image_id", "prompt_id", "score_old", "score_new", "difference", "status_old", "status_new"),
    ]
    assert diff["image_id"].to_list() == ["1", "2", "3", "4", "5", "6", "7"]
    assert diff["difference"].to_list() == [-0.5, 1.0, -1.25, 0.0, None, None, None]
    assert diff["status_old"].to_list() == ["ok"] * 6 + [None]
    assert diff["status_new"].to_list() == ["ok"] * 4 + ["truncated", None, "ok"]
    assert diff["score_old"].to_list() == [1.5, 0.5, 1.5, 3.5, 2.0, 9.0, None]


def test_the_summary_counts_rows_statuses_and_differences(diff):
    s = differences.summary(diff, PAIRS)
    assert (s.rows_both, s.rows_old_only, s.rows_new_only, s.status_changes, s.scored) == (5, 1, 1, 1, 4)
    gap = np.array([-0.5, 1.0, -1.25, 0.0])
    assert (s.mean, s.sd) == pytest.approx((gap.mean(), gap.std(ddof=1)))
    assert s.max_abs == 1.25
    assert s.share_identical == 0.25
    assert s.pearson == pytest.approx(np.corrcoef([1.5, 0.5, 1.5, 3.5], [1.0, 1.5, 0.25, 3.5])[0, 1])


def test_votes_flip_where_the_difference_changes_its_sign(diff):
    s = differences.summary(diff, PAIRS.lazy())
    # 1-2: +1 -> -0.5; 1-3: 0 -> +0.75; 2-3: -1 -> +1.25; 3-4: -2 -> -3.25; image 5 has no new score, image 7 no old one.
    assert (s.pairs_scored, s.decided, s.flips, s.ties_made, s.ties_unmade) == (4, 3, 2, 0, 1)
    assert s.share_flipped == pytest.approx(2 / 3)


def test_a_tie_made_counts_as_half_a_flip(store, write):
    write(OLD, [(i, "p", float(i)) for i in "1234"])
    write(NEW, [("1", "p", 2.0), ("2", "p", 2.0), ("3", "p", 4.0), ("4", "p", 3.0)])
    diff = differences.score_diff(store, "clip", OLD, NEW, ["mine/one"])
    s = differences.summary(
        diff, pl.DataFrame([("p", a, b) for a, b in ("12", "34", "13", "14")], schema=PAIRS.schema, orient="row")
    )
    assert (s.decided, s.flips, s.ties_made, s.ties_unmade) == (4, 1, 1, 0)
    assert s.share_flipped == pytest.approx(1.5 / 4)


def test_images_are_compared_under_their_own_prompt(store, write):
    write(OLD, [("1", "p", 1.0), ("2", "p", 0.0), ("1", "q", 0.0), ("2", "q", 5.0)])
    write(NEW, [("1", "p", 1.0), ("2", "p", 0.0), ("1", "q", 6.0), ("2", "q", 5.0)])
    diff = differences.score_diff(store, "clip", OLD, NEW, ["mine/one"])
    pairs = pl.DataFrame([("p", "1", "2"), ("q", "1", "2")], schema=PAIRS.schema, orient="row")
    s = differences.summary(diff, pairs)
    assert (s.decided, s.flips, s.scored, s.share_identical) == (2, 1, 4, 0.75)


def test_a_revision_against_itself_changes_nothing(store, write):
    write(OLD, OLD_ROWS)
    s = differences.summary(differences.score_diff(store, "clip", OLD, OLD, ["mine/one"]), PAIRS)
    assert (s.max_abs, s.share_identical, s.flips, s.share_flipped, s.status_changes) == (0.0, 1.0, 0, 0.0, 0)
    assert s.pearson == pytest.approx(1.0)


def test_nothing_in_common_gives_counts_and_no_numbers(store, write):
    write(OLD, [("1", "p", 1.0)])
    write(NEW, [("2", "p", 1.0)])
    s = differences.summary(differences.score_diff(store, "clip", OLD, NEW, ["mine/one"]), PAIRS)
    assert (s.rows_both, s.rows_old_only, s.rows_new_only, s.scored, s.pairs_scored) == (0, 1, 1, 0, 0)
    assert [s.mean, s.sd, s.max_abs, s.pearson, s.share_identical, s.share_flipped] == [None] * 6


def test_shards_are_joined_and_others_left_out(store, write):
    write(OLD, [("1", "p", 1.0)], shard="a/one")
    write(OLD, [("2", "p", 2.0)], shard="a/two")
    write(OLD, [("3", "p", 3.0)], shard="gone/one")
    # In the new revision the first shard has come to own both.
    write(NEW, [("1", "p", 1.0), ("2", "p", 4.0)], shard="a/one")
    diff = differences.score_diff(store, "clip", OLD, NEW, ["a/one", "a/two"])
    assert diff.select("image_id", "difference").rows() == [("1", 0.0), ("2", 2.0)]


def test_of_two_rows_of_one_revision_the_one_with_a_score_counts(store, write):
    write(OLD, [("1", "p", "missing")], shard="a/one")
    write(OLD, [("1", "p", 1.0)], shard="a/two")
    write(NEW, [("1", "p", 2.0)], shard="a/one")
    diff = differences.score_diff(store, "clip", OLD, NEW, ["a/one", "a/two"])
    assert diff.select("image_id", "difference").rows() == [("1", 1.0)]


def test_an_unknown_scorer_is_refused_with_those_there_are(store, write):
    write(OLD, OLD_ROWS)
    write(OLD, OLD_ROWS, scorer="pickscore")
    with pytest.raises(StoreError, match="no scores of scorer 'clap'; there are scores of clip, pickscore"):
        differences.score_diff(store, "clap", OLD, NEW, ["mine/one"])


def test_an_unknown_revision_is_refused_with_those_there_are_and_their_dates(store, write):
    first, second = write(OLD, OLD_ROWS), write(NEW, NEW_ROWS)
    store.publish("scores/current.json", f'{{"revisions": {{"clip": "{NEW}"}}}}'.encode())
    with pytest.raises(StoreError) as error:
        differences.score_diff(store, "clip", OLD, "cccccccccccc", ["mine/one"])
    lines = str(error.value).splitlines()
    assert "no scores of clip with revision 'cccccccccccc'" in lines[0]
    for line, revision, manifest in zip(lines[1:], (OLD, NEW), (first, second), strict=True):
        date = dt.datetime.fromtimestamp(manifest.written_at, dt.UTC)
        assert revision in line
        assert f"{date:%Y-%m-%d %H:%M} UTC" in line
        assert "6 scores of 1 shards" in line
    assert [line.endswith(", active") for line in lines[1:]] == [False, True]


def test_a_revision_with_scores_of_other_shards_only_is_unknown(store, write):
    write(OLD, OLD_ROWS)
    write(NEW, NEW_ROWS, shard="gone/one")
    with pytest.raises(StoreError, match=f"no scores of clip with revision '{NEW}'"):
        differences.score_diff(store, "clip", OLD, NEW, ["mine/one"])


# --- on the tiny world -----------------------------------------------------------------------------------------------


def test_the_text_shows_summary_and_largest_differences_with_their_prompts(ingested, tiny_config, tmp_path):
    source, keys = ingested
    store = Store(str(shutil.copytree(source.location, tmp_path / "store")))
    clip = tiny_config.scorers[1]
    revisions = {}
    models = {}
    for name, kind in (("old", "clip"), ("new", "pickscore")):
        # One name, two kinds on the same weights: the new score is the old one times the logit scale.
        scorer = clip.model_copy(update={"kind": kind})
        models.clear()
        for key in keys:
            batches.score_shard(store, key, [scorer], models=models)
        config = tiny_config.model_copy(update={"scorers": (scorer,)})
        revisions[name] = batches.activate(store, config, keys)["clip"]
    text = differences.main_text(store, "clip", revisions["old"], revisions["new"])
    diff = differences.score_diff(store, "clip", revisions["old"], revisions["new"], keys)
    assert len(diff) == len(store.read(schemas.CATALOGUE_SCORABLES))
    s = differences.summary(diff, store.read(schemas.CATALOGUE_PAIRS))
    assert s.pearson == pytest.approx(1.0, abs=1e-4)
    assert s.decided == len(store.read(schemas.CATALOGUE_PAIRS))
    assert s.share_flipped < 0.02
    assert f"clip: revision {revisions['new']} against {revisions['old']}" in text
    assert f"{s.rows_both} in both, 0 in {revisions['old']} only" in text
    prompts = dict(store.read(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt").iter_rows())
    largest = diff.sort(pl.col("difference").abs(), descending=True).head(differences.LARGEST)
    lines = text.splitlines()[-differences.LARGEST :]
    assert [line.split()[0] for line in lines] == largest["image_id"].to_list()
    for line, row in zip(lines, largest.iter_rows(named=True), strict=True):
        assert line.endswith(prompts[row["prompt_id"]])
