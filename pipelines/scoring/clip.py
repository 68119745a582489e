"""CLIPModel-shaped reward models: PickScore, exp(logit_scale) * cos, and CLIP score, cos.

PickScore: Kirstain et al. 2023 (arXiv 2305.01569). CLIP score: Hessel et al. 2021 (arXiv 2104.08718), without its 2.5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.scoring import checkpoints


class ClipScorer:
    """Scores with a transformers CLIP folder; text features of a prompt are computed once and kept."""

    def __init__(self, config: ScorerConfig, device: str = "cpu") -> None:
        folder = checkpoints.resolve(config)
        self.name, self.kind, self.batch_size = config.name, config.kind, config.batch_size
        self.revision = checkpoints.revision(config)
        self.device = torch.device(device)
        self._model = CLIPModel.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(folder)
        self._preprocess = ClipPreprocessing(folder)
        self._text: dict[str, torch.Tensor] = {}
        self.logit_scale = float(self._model.logit_scale.detach().exp())

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a reader of the scores must know: exp(logit_scale), and whether the score contains it."""
        return {"kind": self.kind, "revision": self.revision, "logit_scale": self.logit_scale}

    @property
    def preprocessing(self) -> str:
        """Return a key: scorers with the same key prepare an image the same way."""
        return self._preprocess.key

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return a decoded RGB picture as this model's input, float32 [3, size, size]; thread-safe."""
        return self._preprocess(image)

    @torch.inference_mode()
    def score(self, prepared: torch.Tensor, prompts: list[str]) -> np.ndarray:
        """Return one score per picture [N, 3, size, size] and prompt at the same position, float32 [N]."""
        self._encode_text(sorted(set(prompts) - self._text.keys()))
        features = self._model.get_image_features(pixel_values=prepared.to(self.device)).pooler_output
        image = F.normalize(features.float(), dim=-1)
        text = torch.stack([self._text[p] for p in prompts])
        cosine = (image * text).sum(-1)
        score = cosine * self.logit_scale if self.kind == "pickscore" else cosine
        return score.cpu().numpy().astype(np.float32)

    def _encode_text(self, prompts: list[str]) -> None:
        length = self._model.config.text_config.max_position_embeddings
        for start in range(0, len(prompts), self.batch_size):
            part = prompts[start : start + self.batch_size]
            tokens = self._tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
            features = self._model.get_text_features(**tokens.to(self.device)).pooler_output
            self._text |= dict(zip(part, F.normalize(features.float(), dim=-1), strict=True))


class ClipPreprocessing:
    """Shortest side to `size` (bicubic, Pillow), centre crop with floor offsets, CLIP's normalisation."""

    def __init__(self, folder: Path) -> None:
        options = json.loads((folder / "preprocessor_config.json").read_text())
        size = options["crop_size"]
        self.size = int(size["height"] if isinstance(size, dict) else size)
        shortest = options["size"]["shortest_edge"] if isinstance(options["size"], dict) else options["size"]
        if shortest != self.size or options.get("resample", 3) != Image.Resampling.BICUBIC:
            raise CheckpointError(
                f"{folder / 'preprocessor_config.json'}: size {shortest}, crop {self.size}, resample "
                f"{options.get('resample')}: only bicubic (3) to the crop's size is implemented; scores would be wrong"
            )
        self._mean = torch.tensor(options["image_mean"]).view(3, 1, 1)
        self._std = torch.tensor(options["image_std"]).view(3, 1, 1)
        self.key = f"clip:{self.size}:{options['image_mean']}:{options['image_std']}"

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return the RGB picture as float32 [3, size, size]."""
        width, height = image.size
        short = min(width, height)
        # The longer side is truncated, not rounded, as transformers' get_resize_output_image_size does.
        width, height = (max(1, int(self.size * side / short)) for side in (width, height))
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._std
