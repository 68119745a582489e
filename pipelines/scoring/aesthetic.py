"""The aesthetic predictor v2: a linear head on CLIP ViT-L/14 features, blind to the prompt (Schuhmann 2022, LAION).

    score = head(f(image) / |f(image)|)

https://github.com/christophschuhmann/improved-aesthetic-predictor, preprocessing and all as in ImageReward's package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel

from pipelines.config import ScorerConfig
from pipelines.scoring import checkpoints, published
from pipelines.scoring.clip import load_folder
from pipelines.scoring.pictures import CLIP_MEAN, CLIP_STD, Picture, crop_round, normalise
from pipelines.scoring.published import LinearHead
from pipelines.scoring.scorer import Scorer, half


class Aesthetic(Scorer):
    """The head's number, once per picture."""

    def __init__(self, config: ScorerConfig, files: Mapping[str, Path], device: str = "cpu") -> None:
        super().__init__(config, device)
        model = load_folder(files["config.json"].parent)
        checkpoint = next(path for name, path in files.items() if name.endswith(".pth"))
        self.head = load_head(checkpoint, model.config.projection_dim).to(self.device)
        model.text_model = None  # a fourth of the weights, and no prompt is read
        self.model: CLIPModel = half(model.eval(), config).to(self.device)
        self.size = int(model.config.vision_config.image_size)
        self.preprocessing = f"shortest:{self.size}:own-mode:round"
        self._mean = torch.tensor(CLIP_MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(CLIP_STD, device=self.device).view(3, 1, 1)

    def prepare(self, picture: Picture) -> torch.Tensor:
        """Return uint8 [3, size, size]: shorter side bicubic in the image's own mode, centre crop with rounded offsets."""
        return crop_round(picture, self.size)

    def encode_images(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the scores [N], float32."""
        pixels = normalise(batch, self._mean, self._std)
        features = self.model.get_image_features(pixel_values=pixels).pooler_output.float()
        return self.head(F.normalize(features, dim=-1))

    def compare(self, features: torch.Tensor, rows: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores of the pictures in these rows, whatever the prompts, [M]."""
        return features[torch.as_tensor(rows, device=features.device)]


def create(config: ScorerConfig, device: str = "cpu") -> Aesthetic:
    """Load the predictor and the backbone whose features it reads."""
    return Aesthetic(config, checkpoints.resolve(config), device)


def load_head(path: Path, features: int) -> LinearHead:
    """Return a published head in float32; every tensor of the file is used and none is missing.

    features: the backbone's.

    Raises:
        CheckpointError: the file holds another head, or one for another backbone.
    """
    found = published.read(path)
    head = published.build_head(path, found, features)
    published.require_fit(
        path,
        found,
        head.state_dict(),
        f"The backbone has {features} features; set the scorer's backbone to the CLIP that the head was trained on "
        f"(openai/clip-vit-large-patch14 for the published one)",
    )
    published.fill(head, found)
    return head
