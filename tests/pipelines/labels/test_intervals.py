import math

import numpy as np
import pytest

from pipelines.labels.intervals import clustered_share, design_effect, wilson


def test_wilsons_interval_by_hand():
    # 8 of 10: (0.8 + z^2/20 +- z sqrt(0.016 + z^2/400)) / (1 + z^2/10), z = 1.96.
    low, high = wilson(0.8, 10)
    assert (float(low), float(high)) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_wilsons_interval_of_all_and_of_none_ends_at_the_end_of_the_scale():
    low, high = wilson(np.array([0.0, 1.0]), np.array([10.0, 10.0]))
    # z^2 / (n + z^2) = 3.841 / 13.841
    assert low == pytest.approx([0.0, 1 - 0.27754], abs=1e-5)
    assert high == pytest.approx([0.27754, 1.0], abs=1e-5)


def test_wilsons_interval_of_nothing_is_unknown():
    low, high = wilson(np.array([0.5, math.nan]), np.array([0.0, 0.0]))
    assert np.isnan([*low, *high]).all()


def test_wilsons_interval_covers_a_share_nineteen_times_of_twenty():
    rng = np.random.default_rng(0)
    low, high = wilson(rng.binomial(40, 0.3, 20_000) / 40, np.full(20_000, 40))
    assert ((low <= 0.3) & (high >= 0.3)).mean() == pytest.approx(0.95, abs=0.02)


def test_the_design_effect_by_hand():
    # Four clusters of two votes, agreeing wholly or not at all: k = 2, 0, 2, 0 of p n = 1; p = 1/2, n = 8.
    right, count = np.array([1, 1, 0, 0, 1, 1, 0, 0]), np.ones(8)
    clusters = np.repeat(np.arange(4), 2)
    # 4/3 * (4 * 1) / (1/4 * 8^2 / 7)
    assert design_effect(right, count, clusters) == pytest.approx(7 / 3)
    # The same rows, brought together before.
    assert design_effect(np.array([2, 0, 2, 0]), np.full(4, 2), np.arange(4)) == pytest.approx(7 / 3)


def test_groups_with_shares_of_their_own_are_no_dependence_within_clusters():
    rng = np.random.default_rng(3)
    people, sittings, votes = 200, 6, 15
    share = rng.beta(4, 1.5, people)
    agree = rng.binomial(votes, share[:, None], (people, sittings)).reshape(-1).astype(float)
    count, cluster = np.full(people * sittings, float(votes)), np.arange(people * sittings)
    assert design_effect(agree, count, cluster) > 2.5
    assert design_effect(agree, count, cluster, cluster // sittings) == pytest.approx(1.0, abs=0.15)
    copied = votes * (rng.random((people, sittings)) < share[:, None]).reshape(-1)
    # On the safe side of 15: a share of six sittings leaves less variance within it than there is.
    assert design_effect(copied, count, cluster, cluster // sittings) == pytest.approx(votes * 6 / 5, rel=0.1)


def test_votes_that_are_clusters_of_their_own_have_no_design_effect_at_all():
    votes = np.array([1, 0, 0, 1, 1])
    assert design_effect(votes, np.ones(5), np.arange(5)) == pytest.approx(1.0, abs=1e-12)


def test_votes_that_disagree_within_their_clusters_are_not_taken_for_more_than_independent_ones():
    assert design_effect(np.array([1, 1, 1, 1]), np.full(4, 2), np.arange(4)) == 1.0


@pytest.mark.parametrize("right", [[0, 0, 0], [2, 2, 2]], ids=["none", "all"])
def test_there_is_no_design_effect_where_all_are_alike(right):
    assert design_effect(np.array(right), np.full(3, 2), np.arange(3)) == 1.0


def test_rows_without_events_and_single_clusters_have_no_design_effect():
    assert design_effect(np.array([1, 0]), np.array([2, 0]), np.array([0, 1])) == 1.0
    assert design_effect(np.zeros(0), np.zeros(0), np.zeros(0, int)) == 1.0


def test_the_design_effect_of_independent_votes_is_near_one_and_of_copied_ones_their_number():
    rng = np.random.default_rng(1)
    votes = (rng.random(6_000) < 0.7).astype(float)
    clusters = np.arange(6_000) % 1_500
    assert design_effect(votes, np.ones(6_000), clusters) == pytest.approx(1.0, abs=0.1)
    copied = np.repeat(votes[:1_500], 4)
    assert design_effect(copied, np.ones(6_000), np.repeat(np.arange(1_500), 4)) == pytest.approx(4.0, abs=0.1)


def test_a_share_over_clusters_has_the_interval_of_as_many_votes_as_it_is_worth():
    right, count, clusters = np.array([2.0, 0.0, 2.0, 0.0]), np.full(4, 2.0), np.arange(4)
    low, high = wilson(0.5, 8 / (7 / 3))
    assert clustered_share(right, count, clusters) == pytest.approx((0.5, float(low), float(high)))
    assert clustered_share(np.zeros(2), np.zeros(2), np.arange(2)) == (None, None, None)


def test_the_interval_over_clusters_covers_where_the_one_over_votes_does_not():
    rng = np.random.default_rng(2)
    covered = np.zeros(2)
    for _ in range(400):
        # Eight people judge each of 100 prompts; the prompts' shares are spread around 0.7.
        agree = rng.binomial(8, rng.beta(3.5, 1.5, 100)).astype(float)
        _, low, high = clustered_share(agree, np.full(100, 8.0), np.arange(100))
        plain = wilson(agree.sum() / 800, 800)
        covered += low <= 0.7 <= high, plain[0] <= 0.7 <= plain[1]
    assert covered[0] / 400 > 0.92
    assert covered[1] / 400 < 0.85


def test_no_interval_leaves_the_scale():
    n = np.arange(1, 3_000)
    for share in (0.0, 1.0):
        low, high = wilson(np.full(len(n), share), n)
        assert low.min() >= 0
        assert high.max() <= 1
