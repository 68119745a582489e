"""Trains the tiny aesthetic predictor: a linear head on the features of the tiny CLIP, blind to the prompt.

    -log sigmoid(h(f(winner)) - h(f(loser))), f = normalised image features

The published head was fitted to ratings of single pictures; the small world's people only compare. So the output is
scaled to look like ratings.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel

from pipelines.scoring.clip import load_folder
from pipelines.scoring.published import LinearHead
from trainers.world_models.blip import HEAD_WIDTHS, scale_last
from trainers.world_models.generator import Log
from trainers.world_models.votes import Fit, Pairs, Votes

STEPS = 2_000
MEAN_RATING, DEVIATION = 5.5, 0.5
FILE = "sac+logos+ava1-l14-linearMSE.pth"


def _features(clip: CLIPModel, votes: Votes) -> Pairs:
    """Return the votes with features in the pictures' place, [N, 2, D], and without prompts."""
    with torch.no_grad():
        found = [clip.get_image_features(pixel_values=p).pooler_output for p in votes.pictures.flatten(0, 1).split(512)]
    features = F.normalize(torch.cat(found), dim=-1).view(len(votes), 2, -1)
    return Pairs(features, torch.zeros(len(features), 0, dtype=torch.long), votes.label_0)


def _margin(head: LinearHead, batch: Pairs) -> torch.Tensor:
    return head(batch.pictures[:, 0]) - head(batch.pictures[:, 1])


def _preference_loss(head: LinearHead, batch: Pairs) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(_margin(head, batch), batch.label_0)


def train(folder: Path, clip: Path, votes: Votes, test: Votes, seed: int, log: Log) -> None:
    """Train a head on the features of the CLIP folder `clip` and save it in `folder` as it is published, in fp16."""
    torch.manual_seed(seed)
    backbone = load_folder(clip).eval()
    some, held = _features(backbone, votes), _features(backbone, test)
    head = LinearHead([backbone.config.projection_dim, *HEAD_WIDTHS])
    Fit("aesthetic", STEPS, 1e-3, seed, _preference_loss, _margin).run(head, some, held, log)
    with torch.no_grad():
        scale_last(head, head(some.pictures.flatten(0, 1)), MEAN_RATING, DEVIATION)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({key: weight.half() for key, weight in head.state_dict().items()}, folder / FILE)
