import json
import math
from pathlib import Path

import pytest
import torch

from trainers import losses

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens" / "objectives.json"


def constant(winner, loser):
    """Return a tensor [2, 1, 1, 1, 1] whose winner and loser hold these numbers."""
    return torch.tensor([winner, loser], dtype=torch.float64).view(2, 1, 1, 1, 1)


def test_the_loss_is_the_one_worked_out_by_hand():
    # Errors: policy 1 (winner), 9 (loser); reference 4, 4. s = (4 - 4) - (1 - 9) = 8; z = 0.5 * 0.25 * 8 = 1.
    batch = losses.PairBatch(constant(0, 0), constant(1, 3), constant(2, 2))
    assert batch.margin.item() == 8.0
    assert losses.diffusion_dpo(batch, beta=0.25).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)


def test_swapping_winner_and_loser_turns_the_margin_around():
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(2, 6, 4, 8, 8, generator=generator) for _ in range(3)]
    margin = losses.PairBatch(*parts).margin
    torch.testing.assert_close(losses.PairBatch(*(p.flip(0) for p in parts)).margin, -margin)


@pytest.mark.skipif(not GOLDENS.exists(), reason="golden values of the released program are not at hand")
def test_loss_and_gradient_equal_the_released_programs():
    cases = [c for c in json.loads(GOLDENS.read_text()) if c["method"] == "diffusion_dpo"]
    assert cases
    for case in cases:
        doubled, *rest = case["shape"]
        target, policy, reference = (
            torch.tensor(case[k], dtype=torch.float32).view(2, doubled // 2, *rest)
            for k in ("target", "policy", "reference")
        )
        policy.requires_grad_()
        loss = losses.diffusion_dpo(losses.PairBatch(target, policy, reference), beta=case["hyper"]["beta_dpo"]).mean()
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
        assert policy.grad.norm().item() == pytest.approx(case["grad_norm"], rel=1e-4)
        assert policy.grad.flatten()[:8].tolist() == pytest.approx(case["grad_first8"], rel=1e-4, abs=1e-6)
