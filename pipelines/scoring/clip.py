"""The one CLIP that PickScore, CLIP score, HPSv2 and Aesthetic share: two towers of transformers' CLIPModel.

    cosine = <f(image), g(prompt)> / (|f(image)| |g(prompt)|), in float32

Belongs here: features and cosines. Does not belong here: what a kind makes of them, checkpoint formats, preprocessing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.scoring.pictures import CLIP_MEAN, CLIP_STD, normalise
from pipelines.scoring.scorer import PromptFeatures, Scorer, half


class ClipScorer(Scorer):
    """A reward model with two towers; a kind says how token ids come about and what the score is."""

    def __init__(
        self,
        config: ScorerConfig,
        model: CLIPModel,
        device: str = "cpu",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__(config, device)
        self.model = half(model.float().eval(), config).to(self.device)
        self.size = int(model.config.vision_config.image_size)
        self.text_length = int(model.config.text_config.max_position_embeddings)
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self._mean = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(3, 1, 1)
        self._prompts = PromptFeatures(self._encode_prompts)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a reader of the scores must know; the score of a cosine's kind does not contain the scale."""
        return {**super().facts, "logit_scale": self.logit_scale}

    @abstractmethod
    def tokenize(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return `input_ids` [N, T], and `attention_mask` where the model needs one."""

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Encode each distinct prompt once."""
        self._prompts.add(prompts, self.batch_size)

    def _encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        tokens = {k: v.to(self.device) for k, v in self.tokenize(prompts).items()}
        return F.normalize(self.model.get_text_features(**tokens).pooler_output.float(), dim=-1)

    def encode_images(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the normalised image features [N, D], float32."""
        pixels = normalise(batch, self._mean, self._std)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def cosine(self, features: torch.Tensor, rows: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """Return the cosines of the pictures in these rows with the prompts at the same position, [M], float32."""
        images = features[torch.as_tensor(rows, device=features.device)]
        return (images * self._prompts.take(prompts)).sum(-1)

    def compare(self, features: torch.Tensor, rows: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """Return the cosines, [M]."""
        return self.cosine(features, rows, prompts)


def load_folder(path: Path) -> CLIPModel:
    """Load a transformers folder of a CLIPModel in float32; every key of the file is used and none is missing.

    Raises:
        CheckpointError: the weights do not fit the configuration.
    """
    model, report = CLIPModel.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    wrong = {k: sorted(map(str, v)) for k, v in report.items() if v and k != "error_msgs"}
    if wrong or report.get("error_msgs"):
        raise CheckpointError(
            f"{path}: the weights do not fit config.json: {wrong or report['error_msgs']}; fetch the checkpoint again"
        )
    return model


def load_tokenizer(path: Path) -> CLIPTokenizer:
    """Load transformers' CLIP tokenizer from a folder."""
    return CLIPTokenizer.from_pretrained(path, local_files_only=True)
