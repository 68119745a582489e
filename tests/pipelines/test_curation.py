from dataclasses import asdict

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from pipelines import curation, schemas
from pipelines.config import ConfigError

BROKEN = "image_0 undecodable: broken data stream"
# pair: human_label_0, is_unanimous, consensus_label_0, raw_sum_label_0, p_smpo, p_ensemble, minority_probability,
# minority_score, excluded_because
PAIRS = {
    "agreed": (1.0, True, 1.0, 1.0, 0.9, 0.8, 0.1, 0.2, None),
    "lost": (0.0, True, 0.0, 0.0, 0.2, 0.3, 0.2, 0.3, None),
    "against": (1.0, False, 0.0, 0.0, 0.3, 0.1, 0.8, 0.9, None),
    "mostly": (0.25, False, None, 1.0, 0.5, 0.4, None, 0.7, None),
    "tied": (0.5, None, 1.0, None, 0.6, 0.7, None, None, None),
    "no votes": (None, None, 1.0, 0.0, 0.4, 0.6, None, None, None),
    "a score missing": (1.0, None, 1.0, None, None, None, None, None, None),
    "at the threshold": (1.0, True, 1.0, 1.0, 0.7, 0.5, 0.5, 0.6, None),
    "broken": (0.0, True, 0.0, 0.0, 0.1, 0.1, 0.9, 0.9, BROKEN),
}
VALUES = ("human_label_0", "is_unanimous", "consensus_label_0", "raw_sum_label_0", "p_smpo", "p_ensemble")
VALUES += ("minority_probability", "minority_score", "excluded_because")
OTHER_SIDE = ("human_label_0", "consensus_label_0", "raw_sum_label_0", "p_smpo", "p_ensemble")


@pytest.fixture(scope="module")
def table():
    given = pl.DataFrame(
        [(name, *values) for name, values in PAIRS.items()],
        schema={"pair_id": pl.String, **{c: schemas.PREFERENCES.polars_schema[c] for c in VALUES}},
        orient="row",
    )
    fixed = {
        "prompt_id": "p",
        "prompt": "a cat",
        "split": "train",
        "sources": "pap",
        "n_votes": 1,
        "n_decided": 1,
        "is_in_cycle": False,
    }
    blank = {c: pl.lit(fixed.get(c), dtype) for c, dtype in schemas.PREFERENCES.polars_schema.items()}
    frame = given.with_columns(**{c: value for c, value in blank.items() if c not in given.columns})
    frame = frame.with_columns(image_0_id=pl.col("pair_id") + "/0", image_1_id=pl.col("pair_id") + "/1")
    return schemas.PREFERENCES.conform(frame)


def decisions(policy, table):
    """{pair: (target, probability, reason)}; every policy keeps every row and column and gives a target or a reason."""
    result = policy.apply(table.lazy()).collect()
    assert result["pair_id"].to_list() == table["pair_id"].to_list(), "a policy keeps every row, in its place"
    added = ["target_label_0", "target_probability"]
    assert result.drop(*added, "excluded_because").equals(table.drop("excluded_because"))
    assert result.schema["target_label_0"] == result.schema["target_probability"] == pl.Float64
    found = {}
    for name, *decision in result.select("pair_id", *added, "excluded_because").iter_rows():
        target, probability, reason = found[name] = tuple(decision)
        assert (target is None) == (probability is None) == (reason is not None), name
        assert target in (1.0, 0.0, None), name
        assert probability is None or 0.5 <= probability <= 1, name
    assert found["broken"] == (None, None, BROKEN), "a reason that is there already stays"
    return found


def targets(policy, table):
    return {n: t for n, (t, _, _) in decisions(policy, table).items() if t is not None}


def reasons(policy, table):
    return {n: r for n, (_, _, r) in decisions(policy, table).items() if r is not None and n != "broken"}


EVERY = [
    curation.HumanPolicy(),
    *(curation.ConsensusPolicy(a) for a in ("majority", "random_scorer", "raw_sum", "zscore_sum")),
    curation.UnanimousPolicy(),
    *(curation.SmoothedPolicy(c) for c in ("p_smpo", "p_ensemble", "p_linear", "p_log")),
    curation.WithoutMinorityPolicy(),
    curation.WithoutMinorityPolicy(0.25, "minority_score", ""),
    curation.MinorityOnlyPolicy(),
]


def test_the_human_policy_takes_the_side_of_most_humans(table):
    policy = curation.HumanPolicy()
    assert targets(policy, table) == {
        "agreed": 1.0,
        "lost": 0.0,
        "against": 1.0,
        "mostly": 0.0,
        "a score missing": 1.0,
        "at the threshold": 1.0,
    }
    assert reasons(policy, table) == {"tied": "human votes are even", "no votes": "no human vote counts"}


def test_the_consensus_policy_takes_the_scorers_side_even_against_the_humans(table):
    policy = curation.ConsensusPolicy()
    assert targets(policy, table) == {
        "agreed": 1.0,
        "lost": 0.0,
        "against": 0.0,
        "tied": 1.0,
        "no votes": 1.0,
        "a score missing": 1.0,
        "at the threshold": 1.0,
    }
    assert reasons(policy, table) == {"mostly": "the consensus is undecided"}


def test_another_aggregation_of_the_consensus_is_another_column(table):
    policy = curation.ConsensusPolicy("raw_sum")
    assert targets(policy, table)["mostly"] == 1.0
    assert reasons(policy, table) == dict.fromkeys(["tied", "a score missing"], "raw_sum is undecided or lacks a score")


def test_the_unanimous_policy_keeps_pairs_on_which_every_scorer_takes_the_humans_side(table):
    policy = curation.UnanimousPolicy()
    assert targets(policy, table) == {"agreed": 1.0, "lost": 0.0, "at the threshold": 1.0}
    assert reasons(policy, table) == {
        "against": "a scorer does not choose the humans' side",
        "mostly": "a scorer does not choose the humans' side",
        "tied": "human votes are even",
        "no votes": "no human vote counts",
        "a score missing": "a score is missing",
    }


def test_the_smoothed_policy_favours_the_likelier_side_and_says_how_likely_it_is(table):
    found = decisions(curation.SmoothedPolicy(), table)
    assert found["agreed"][:2] == (1.0, 0.9)
    assert found["lost"][:2] == (0.0, 0.8)
    assert found["no votes"][:2] == (0.0, 0.6)
    assert found["mostly"] == (None, None, "p_smpo is 0.5")
    assert found["a score missing"] == (None, None, "p_smpo is not known")
    assert decisions(curation.SmoothedPolicy("p_ensemble"), table)["no votes"][:2] == (1.0, 0.6)


def test_pairs_above_the_minority_threshold_are_left_out_and_the_reason_has_the_numbers(table):
    policy = curation.WithoutMinorityPolicy()
    assert targets(policy, table) == {"agreed": 1.0, "lost": 0.0, "a score missing": 1.0, "at the threshold": 1.0}
    assert reasons(policy, table) == {
        "against": "minority_probability 0.8 > threshold 0.5",
        "mostly": "minority_score 0.7 > threshold 0.5",
        "tied": "human votes are even",
        "no votes": "no human vote counts",
    }


def test_without_a_fallback_an_unknown_minority_value_is_unknown(table):
    options = {"threshold": 0.15, "fallback": ""}
    assert "mostly" in targets(curation.WithoutMinorityPolicy(**options), table)
    only = curation.MinorityOnlyPolicy(**options)
    assert reasons(only, table)["mostly"] == "minority_probability not known"
    assert reasons(only, table)["agreed"] == "minority_probability 0.1 <= threshold 0.15"
    assert targets(only, table) == {"lost": 0.0, "against": 1.0, "at the threshold": 1.0}


@pytest.mark.parametrize("fallback", ["minority_score", ""])
@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.5, 0.75, 1.0])
def test_minority_only_and_without_minority_share_out_the_pairs_of_the_human_policy(table, threshold, fallback):
    without, only = (
        targets(kind(threshold, fallback=fallback), table)
        for kind in (curation.WithoutMinorityPolicy, curation.MinorityOnlyPolicy)
    )
    assert not without.keys() & only.keys()
    assert without | only == targets(curation.HumanPolicy(), table)


@pytest.mark.parametrize("policy", EVERY, ids=curation.spelled)
def test_swapping_the_images_of_every_pair_turns_targets_round_and_nothing_else(policy, table):
    swapped = table.with_columns(**{c: 1 - pl.col(c) for c in OTHER_SIDE})
    turned = policy.apply(swapped.lazy()).with_columns(target_label_0=1 - pl.col("target_label_0")).collect()
    columns = ["pair_id", "target_label_0", "target_probability", "excluded_because"]
    assert_frame_equal(turned.select(columns), policy.apply(table.lazy()).collect().select(columns))


@pytest.mark.parametrize("policy", EVERY, ids=curation.spelled)
def test_a_policy_is_plain_values_with_its_name_and_is_found_as_it_is_spelled(policy):
    assert asdict(policy)["name"] == policy.name
    assert type(policy) is curation.POLICIES[policy.name]
    assert hash(policy) == hash(curation.parse(curation.spelled(policy)))
    assert curation.parse(curation.spelled(policy)) == policy


def test_every_policy_is_had_by_name_without_options():
    assert {n: curation.policy(n).name for n in curation.POLICIES} == {n: n for n in curation.POLICIES}
    assert curation.policy("smoothed", column="p_log") == curation.SmoothedPolicy("p_log")
    assert curation.spelled(curation.WithoutMinorityPolicy(0.3)) == "without_minority:threshold=0.3"
    assert curation.parse(" without_minority : threshold = 0.3, fallback= ") == curation.WithoutMinorityPolicy(
        0.3, fallback=""
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("humans", "expected one of .*'human'.*found 'humans'"),
        ("human:threshold=0.5", r"'human': unknown options \['threshold'\]; it has none"),
        ("human:name=mine", r"unknown options \['name'\]"),
        ("consensus:aggregation=mean", "aggregation: expected one of .*'majority'.*found 'mean'"),
        ("smoothed:column=p_best", "column: expected one of .*found 'p_best'"),
        ("without_minority:threshold=1.5", "threshold: expected a number from 0 to 1, found 1.5"),
        ("without_minority:threshold=nan", "threshold: expected a number from 0 to 1, found nan"),
        ("minority_only:threshold=half", "threshold: expected a number, found 'half'"),
        ("minority_only:column=prompt", "column: expected one of .*found 'prompt'"),
        ("minority_only:fallback=prompt", "fallback: expected one of .*found 'prompt'"),
        ("minority_only:0.5", "expected 'name:option=value,option=value', found '0.5'"),
    ],
)
def test_a_policy_that_is_none_says_what_is_wrong_and_what_there_is(text, said):
    with pytest.raises(ConfigError, match=said):
        curation.parse(text)


def test_a_threshold_must_be_a_number_also_in_code():
    for threshold in ("0.5", True, None):
        with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
            curation.WithoutMinorityPolicy(threshold)
