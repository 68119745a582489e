"""PickScore: exp(logit_scale) * cos, a CLIPModel tuned on Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.scoring import checkpoints
from pipelines.scoring.clip import ClipScorer, load_folder, load_tokenizer
from pipelines.scoring.pictures import Picture, crop_floor


class TransformersClipScorer(ClipScorer):
    """A CLIPModel with transformers' own tokenizer and image preprocessing: no cleaning of prompts, floor offsets."""

    def __init__(self, config: ScorerConfig, files: Mapping[str, Path], device: str = "cpu") -> None:
        options = _read_preprocessing(files["preprocessor_config.json"])
        model = load_folder(files["config.json"].parent)
        super().__init__(config, model, device, options["image_mean"], options["image_std"])
        self.preprocessing = f"shortest:{self.size}:floor"
        crop = options["crop_size"]
        if (crop["height"] if isinstance(crop, dict) else crop) != self.size:
            raise CheckpointError(
                f"{files['preprocessor_config.json']}: crop_size {crop}, but the model reads {self.size} pixels; they "
                f"belong to different models, set the scorer's processor to the model's own"
            )
        tokenizer_file = files.get("tokenizer.json") or files["vocab.json"]
        self._tokenizer = load_tokenizer(tokenizer_file.parent)

    def prepare(self, picture: Picture) -> torch.Tensor:
        """Return uint8 [3, size, size]: shorter side bicubic, centre crop with floor offsets."""
        return crop_floor(picture, self.size)

    def tokenize(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return ids and mask, padded to the longest prompt of the batch, cut to the model's length."""
        tokens = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=self.text_length, return_tensors="pt"
        )
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


class PickScore(TransformersClipScorer):
    """exp(logit_scale) * cos."""

    def compare(self, features: torch.Tensor, rows: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """Return exp(logit_scale) * cos, [M]."""
        return self.logit_scale * self.cosine(features, rows, prompts)


def create(config: ScorerConfig, device: str = "cpu") -> PickScore:
    """Load PickScore."""
    return PickScore(config, checkpoints.resolve(config), device)


def _read_preprocessing(path: Path) -> dict:
    options = json.loads(path.read_text())
    size, crop = options.get("size"), options.get("crop_size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    side = crop.get("height") if isinstance(crop, dict) else crop
    if shortest != side or options.get("resample", 3) != Image.Resampling.BICUBIC:
        raise CheckpointError(
            f"{path}: size {size}, crop_size {crop}, resample {options.get('resample')}: only bicubic (3) to the crop's size "
            f"is implemented; scores would be wrong"
        )
    return options
