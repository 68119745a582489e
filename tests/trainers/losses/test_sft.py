from trainers import losses


def test_the_loss_is_the_winners_error_alone(batch_with):
    batch = batch_with([[4.0, 1.0], [9.0, 7.0]])
    loss = losses.sft(batch)
    loss.sum().backward()
    assert loss.tolist() == [4.0, 1.0]
    assert batch.policy.grad[1].abs().max() == 0
