import json
from pathlib import Path

import pytest
import torch

from trainers import losses

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens"


@pytest.fixture
def batch_with():
    """Return a batch of one-number latents (target 0) in which the models make the given errors, [[winners], [losers]]."""

    def batch(policy, reference=None, dtype=torch.float64, **parts):
        predictions = [
            None if errors is None else torch.tensor(errors, dtype=dtype).sqrt()[:, :, None, None, None]
            for errors in (policy, reference)
        ]
        predictions[0].requires_grad_()
        tensors = {k: torch.tensor(v, dtype=torch.int64 if k == "group" else dtype) for k, v in parts.items()}
        return losses.PairBatch(torch.zeros_like(predictions[0]), *predictions, **tensors)

    return batch


@pytest.fixture
def batch_with_margins(batch_with):
    """Return a batch in which the policy's margins are these numbers; the reference makes no errors."""

    def batch(*margins, **parts):
        return batch_with(errors_of(margins), [[0.0] * len(margins)] * 2, **parts)

    return batch


@pytest.fixture
def with_margins():
    """Return the errors of a model whose margins are these numbers where the reference makes none."""
    return errors_of


def errors_of(margins):
    return [[max(-s, 0.0) for s in margins], [max(s, 0.0) for s in margins]]


@pytest.fixture
def released():
    """Return the numbers that a paper's released program printed, by file; skip where they are not at hand."""

    def cases(name):
        if not (GOLDENS / name).exists():
            pytest.skip("golden values of the released programs are not at hand")
        return json.loads((GOLDENS / name).read_text())

    return cases
