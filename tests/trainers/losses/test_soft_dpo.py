import math

import pytest
import torch

from trainers import losses


def test_the_loss_is_the_one_worked_out_by_hand(batch_with_margins):
    # (2 * 0.75 - 1) * z = 0.5 * 2.
    batch = batch_with_margins(2.0, probability=[0.75])
    assert losses.soft_dpo(batch, beta=2.0).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_a_hard_label_gives_diffusion_dpo(batch_with_margins):
    batch = batch_with_margins(2.0, -1.0, probability=[1.0, 1.0])
    assert torch.equal(losses.soft_dpo(batch, beta=5.0), losses.diffusion_dpo(batch, beta=5.0))
