import math

import pytest
import torch

from trainers import recipes
from trainers.objectives import Bound


def step(bound, batch, state):
    sums = bound.sums(batch, state)
    return bound.loss(batch, {**state, **sums}), bound.update(state, sums)


def test_pairs_weigh_by_their_groups_weight_over_its_share(batch_with_margins):
    # Two pairs of group 0, one of an unknown group: alpha is 1/2 each, N / N_g 3/2 and 3.
    bound = Bound(recipes.GroupRobust(beta=2.0, groups=1))
    loss, _ = step(bound, batch_with_margins(0.0, 0.0, 0.0, group=[0, 0, -1]), bound.state())
    assert loss.tolist() == pytest.approx([0.75 * math.log(2), 0.75 * math.log(2), 1.5 * math.log(2)])


def test_the_worse_group_gains_the_weight_worked_out_by_hand(batch_with_margins):
    # -log sigmoid is log 2 and log 4; with eta = 1 the weights are as 2 to 4.
    bound = Bound(recipes.GroupRobust(beta=2.0, eta=1.0, groups=1))
    _, state = step(bound, batch_with_margins(0.0, 0.0, -math.log(3), group=[0, 0, -1]), bound.state())
    assert state["alpha"].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert state["seen_pairs"].tolist() == [2, 1]


def test_shares_are_those_of_all_pairs_seen(batch_with_margins):
    bound = Bound(recipes.GroupRobust(beta=2.0, eta=0.0, groups=2))
    _, state = step(bound, batch_with_margins(0.0, 0.0, 0.0, 0.0, group=[0, 0, 0, 0]), bound.state())
    # Six pairs of group 0 and two of group 1: N / N_g is 8/6 and 8/2. No pair of unknown group: alpha is 1/2 each.
    loss, _ = step(bound, batch_with_margins(0.0, 0.0, 0.0, 0.0, group=[0, 0, 1, 1]), state)
    assert loss.tolist() == pytest.approx([math.log(2) * w for w in (4 / 6, 4 / 6, 2.0, 2.0)])


def test_groups_that_do_not_occur_change_nothing(batch_with_margins):
    batches = [batch_with_margins(1.0, -2.0, 0.5, group=[0, 1, 0]) for _ in range(3)]
    losses = []
    for groups in (2, 6):
        bound = Bound(recipes.GroupRobust(beta=2.0, eta=0.5, groups=groups))
        state = bound.state()
        for batch in batches:
            loss, state = step(bound, batch, state)
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_a_rare_group_with_the_same_loss_keeps_its_weight(batch_with_margins):
    bound = Bound(recipes.GroupRobust(beta=2.0, eta=0.01, groups=2))
    state = bound.state()
    for number in range(200):
        group = [0, 0, 0, 1 if number % 10 == 0 else 0]
        _, state = step(bound, batch_with_margins(0.0, 0.0, 0.0, 0.0, group=group), state)
    first, rare, _ = state["alpha"].tolist()
    assert rare / first == pytest.approx(1, rel=1e-4)


def test_a_group_rises_by_its_last_loss_in_steps_without_pairs_of_it(batch_with_margins):
    bound = Bound(recipes.GroupRobust(beta=2.0, eta=1.0, groups=1))
    _, state = step(bound, batch_with_margins(0.0, -math.log(3), group=[0, -1]), bound.state())
    _, state = step(bound, batch_with_margins(0.0, group=[0]), state)
    # Twice as 2 to 4.
    assert state["alpha"].tolist() == pytest.approx([1 / 5, 4 / 5])


def test_a_group_beyond_the_objectives_is_refused_with_what_to_set(batch_with_margins):
    bound = Bound(recipes.GroupRobust(groups=2))
    with pytest.raises(ValueError, match=r"0 to 1 or -1.*found 2.*`groups`"):
        bound.sums(batch_with_margins(1.0, 1.0, group=[0, 2]), bound.state())
