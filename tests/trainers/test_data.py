from trainers.data import batch_rows


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    rows = [r for step in range(6) for r in batch_rows(step, 5, 10, seed=3)]
    first, second = [r for r, e in rows if e == 0], [r for r, e in rows if e == 1]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_batch_depends_on_its_step_alone_and_may_span_epochs():
    assert batch_rows(4, 7, 10, seed=3) == batch_rows(4, 7, 10, seed=3)
    assert {e for _, e in batch_rows(1, 7, 10, seed=3)} == {0, 1}
    assert batch_rows(0, 7, 10, seed=3) != batch_rows(0, 7, 10, seed=4)
