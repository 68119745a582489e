import torch

from trainers import randomness


def test_a_draw_depends_on_its_key_alone():
    keys = [(0, "pair-a", 1, "noise"), (0, "pair-b", 1, "noise")]
    both = randomness.normal((4, 2, 2), keys)
    assert torch.equal(both[1], randomness.normal((4, 2, 2), keys[1:])[0])
    assert not torch.equal(both[0], both[1])


def test_parts_of_a_key_are_not_run_together():
    assert not torch.equal(randomness.normal((8,), [("ab", "c")]), randomness.normal((8,), [("a", "bc")]))


def test_draws_of_many_keys_are_standard_normal_and_uniform():
    keys = [("k", i) for i in range(4000)]
    normal, uniform, whole = randomness.normal((4,), keys), randomness.uniform(keys), randomness.integers(10, keys)
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert abs(uniform.mean() - 0.5) < 0.02
    assert set(whole.tolist()) == set(range(10))
