import json

import polars as pl
import pytest

from pipelines import curation, schemas

# pair: labels of its votes (empty: none that counts)
VOTES = {
    "agreed": [1.0, 1.0, 1.0, 0.0],
    "lost": [0.0],
    "tied": [0.5],
    "split": [1.0, 0.0],
    "with a tie": [1.0, 0.0, 0.0, 0.5],
    "no votes": [],
    "unscored": [1.0],
    "broken": [0.0],
}
CONSENSUS = {"agreed": 0.0, "lost": 0.0, "tied": 1.0, "split": 1.0, "no votes": 1.0}


def pairs():
    names = list(VOTES)
    return pl.LazyFrame(
        {
            "pair_id": names,
            "prompt_id": ["p"] * len(names),
            "image_0_id": [f"{n}/0" for n in names],
            "image_1_id": [f"{n}/1" for n in names],
        }
    )


def pairs_with_humans():
    labels = list(VOTES.values())
    return pairs().with_columns(
        pl.Series("n_votes", [len(v) for v in labels]),
        pl.Series("human_label_0", [sum(v) / len(v) if v else None for v in labels]),
        pl.Series("cycle", [3 if n == "lost" else None for n in VOTES], pl.Int64),
    )


def scores():
    rows = []
    for name in VOTES:
        for side in (0, 1):
            for scorer, value in (("pick", 20.0 + side), ("clip", 0.25)):
                if name == "unscored" and side == 1:
                    continue
                bad = name == "broken" and side == 0
                row = (None, "undecodable", "broken data stream") if bad else (value, "ok", None)
                rows.append((scorer, f"{name}/{side}", "p", *row))
    return pl.LazyFrame(rows, schema=["scorer", "image_id", "prompt_id", "score", "status", "reason"], orient="row")


@pytest.fixture(scope="module")
def table():
    votes = [(n, label) for n, labels in VOTES.items() for label in labels]
    metrics = [
        (n, s, 0.2 + 0.6 * (1 - s), 0.5, 0.1 + 0.4 * (1 - s), 0.3 + 0.4 * (1 - s)) for n in VOTES for s in (0.0, 1.0)
    ]
    consensus = schemas.CONSENSUS.conform(
        pairs()
        .collect()
        .with_columns(
            votes_0=1,
            votes_1=1,
            voters=2,
            agreement=pl.lit(0.5),
            consensus_label_0=pl.col("pair_id").replace_strict(CONSENSUS, default=None, return_dtype=pl.Float64),
            decided_by=pl.lit("majority"),
        )
    )
    smoothed = schemas.SMOOTHED.conform(
        pairs()
        .collect()
        .with_columns(p_smpo=pl.lit(0.6), p_ensemble=pl.lit(0.7), p_linear=0.5, p_log=0.5, z_mean=0.0, z_std=0.0)
    )
    result = curation.preferences(
        pairs=pairs_with_humans(),
        prompts=pl.LazyFrame({"prompt_id": ["p", "q"], "prompt": ["a cat", "a dog"], "split": ["train", "test"]}),
        votes=pl.LazyFrame(votes, schema={"pair_id": pl.String, "label_0": pl.Float64}, orient="row").with_columns(
            count=1
        ),
        vote_sources=pl.LazyFrame(
            [(n, s) for n in VOTES for s in (("pap", "hpd", "pap") if n == "agreed" else ("pap",))],
            schema=["pair_id", "source"],
            orient="row",
        ),
        scores=scores(),
        sides=pl.DataFrame(
            metrics,
            schema=["pair_id", "side", "confidence", "stability", "metric", "minority_score"],
            orient="row",
        ),
        consensus=consensus.lazy(),
        smoothed=smoothed.lazy(),
        images=pl.LazyFrame(
            {"image_id": [], "status": [], "reason": []},
            schema=dict.fromkeys(("image_id", "status", "reason"), pl.String),
        ),
    )
    return schemas.PREFERENCES.conform(result)


@pytest.fixture(scope="module")
def rows(table):
    return {r["pair_id"]: r for r in table.iter_rows(named=True)}


def test_every_pair_is_one_row(table):
    assert table["pair_id"].to_list() == sorted(VOTES)


def test_the_human_label_is_the_mean_of_the_votes_that_count(rows):
    found = {n: (r["n_votes"], r["human_label_0"]) for n, r in rows.items()}
    assert found == {
        "agreed": (4, 0.75),
        "lost": (1, 0.0),
        "tied": (1, 0.5),
        "split": (2, 0.5),
        "with a tie": (4, 0.375),
        "no votes": (0, None),
        "unscored": (1, 1.0),
        "broken": (1, 0.0),
    }


def test_the_minority_share_is_of_decided_votes_and_null_below_three(rows):
    shares = {n: r["minority_share"] for n, r in rows.items()}
    assert shares["agreed"] == pytest.approx(0.25)
    assert shares["with a tie"] == pytest.approx(1 / 3)
    assert {n for n, s in shares.items() if s is None} == set(VOTES) - {"agreed", "with a tie"}


def test_the_metrics_are_those_of_the_side_that_the_humans_chose(rows):
    assert (rows["agreed"]["confidence"], rows["agreed"]["minority_score"]) == (pytest.approx(0.2), pytest.approx(0.3))
    assert (rows["lost"]["confidence"], rows["lost"]["minority_score"]) == (pytest.approx(0.8), pytest.approx(0.7))
    assert rows["with a tie"]["metric"] == pytest.approx(0.5)
    for name in ("tied", "split", "no votes"):
        assert [rows[name][k] for k in ("confidence", "stability", "metric", "minority_score")] == [None] * 4


def test_sources_scores_prompt_and_split_are_joined(rows):
    assert rows["agreed"]["sources"] == "hpd+pap"
    assert rows["lost"]["sources"] == "pap"
    assert json.loads(rows["agreed"]["scores_1"]) == {"clip": 0.25, "pick": 21.0}
    assert json.loads(rows["broken"]["scores_0"]) == {"clip": None, "pick": None}
    assert json.loads(rows["unscored"]["scores_1"]) == {}
    assert {(r["prompt"], r["split"]) for r in rows.values()} == {("a cat", "train")}
    assert {(r["p_smpo"], r["p_ensemble"]) for r in rows.values()} == {(0.6, 0.7)}


def test_a_pair_that_no_model_may_train_on_says_which_image_and_why(rows):
    reasons = {n: r["excluded_because"] for n, r in rows.items() if r["excluded_because"] is not None}
    assert reasons == {
        "broken": "image_0 undecodable: broken data stream",
        "unscored": "image_1 not scored",
    }


def decisions(policy, table):
    result = policy.apply(table.lazy()).collect()
    assert result["pair_id"].to_list() == table["pair_id"].to_list(), "a policy keeps every row"
    assert result.drop("target_label_0", "excluded_because").equals(table.drop("excluded_because"))
    return {r["pair_id"]: (r["target_label_0"], r["excluded_because"]) for r in result.iter_rows(named=True)}


def test_the_human_policy_takes_the_side_of_most_humans(table):
    even = "human votes are even or absent"
    assert decisions(curation.HumanPolicy(), table) == {
        "agreed": (1.0, None),
        "lost": (0.0, None),
        "tied": (None, even),
        "split": (None, even),
        "with a tie": (0.0, None),
        "no votes": (None, even),
        "unscored": (None, "image_1 not scored"),
        "broken": (None, "image_0 undecodable: broken data stream"),
    }


def test_the_consensus_policy_takes_the_scorers_side_even_against_the_humans(table):
    assert decisions(curation.ConsensusPolicy(), table) == {
        "agreed": (0.0, None),
        "lost": (0.0, None),
        "tied": (1.0, None),
        "split": (1.0, None),
        "with a tie": (None, "the consensus is undecided"),
        "no votes": (1.0, None),
        "unscored": (None, "image_1 not scored"),
        "broken": (None, "image_0 undecodable: broken data stream"),
    }


@pytest.mark.parametrize("policy", [curation.HumanPolicy(), curation.ConsensusPolicy()], ids=lambda p: p.name)
def test_a_row_has_either_a_target_or_a_reason(policy, table):
    for target, reason in decisions(policy, table).values():
        assert (target is None) == (reason is not None)
