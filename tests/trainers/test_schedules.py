import pytest
import torch

from trainers.recipes import Optimiser
from trainers.schedules import learning_rate, optimizer


def rates(steps=10, **numbers):
    rule = Optimiser(learning_rate=1.0, **numbers)
    return [learning_rate(rule, s, steps) for s in range(steps)]


def test_the_rate_warms_up_linearly_and_then_stays():
    assert rates(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(3, warmup_steps=0) == [1.0, 1.0, 1.0]


def test_linear_and_cosine_schedules_fall_from_the_rate_after_warm_up():
    assert rates(6, warmup_steps=2, schedule="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = rates(6, warmup_steps=2, schedule="cosine")
    assert cosine[2] == 1.0
    assert cosine[4] == pytest.approx(0.5)
    assert cosine == sorted(cosine[:2]) + sorted(cosine[2:], reverse=True)


def test_adafactor_does_as_it_is_told_and_nothing_relative():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    steps = []
    for _ in range(2):
        chosen = optimizer(Optimiser("adafactor", learning_rate=0.1, weight_decay=0.0), [weight])
        start = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        chosen.step()
        steps.append((start - weight.detach()).unique())
    # The update's root mean square is clipped at 1, so that the first step is the rate itself.
    assert all(s.tolist() == pytest.approx([0.1], rel=1e-3) for s in steps)


def test_adamw_has_the_recipes_numbers():
    chosen = optimizer(Optimiser(weight_decay=0.3), [torch.nn.Parameter(torch.zeros(2))])
    assert type(chosen) is torch.optim.AdamW
    assert chosen.defaults["weight_decay"] == 0.3
