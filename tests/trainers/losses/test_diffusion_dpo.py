import math

import pytest
import torch

from trainers import losses


def test_the_loss_is_the_one_worked_out_by_hand(batch_with):
    # Errors: policy 1 (winner), 9 (loser); reference 4, 4. s = (4 - 4) - (1 - 9) = 8; z = 0.5 * 0.25 * 8 = 1.
    batch = batch_with([[1.0], [9.0]], [[4.0], [4.0]])
    assert batch.margin.item() == 8.0
    assert losses.diffusion_dpo(batch, beta=0.25).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)


def test_swapping_winner_and_loser_turns_the_margin_around():
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(2, 6, 4, 8, 8, generator=generator) for _ in range(3)]
    margin = losses.PairBatch(*parts).margin
    torch.testing.assert_close(losses.PairBatch(*(p.flip(0) for p in parts)).margin, -margin)
