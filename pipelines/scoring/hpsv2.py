"""HPSv2 and v2.1: the cosine of an open_clip ViT-H/14 tuned on HPD v2 (Wu et al. 2023, arXiv 2306.09341).

    score = <f(image), g(prompt)> / (|f(image)| |g(prompt)|), without the logit scale, in float32

The package's own scores are fp16 on a GPU: steps of 1e-4, which make false ties.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.scoring import checkpoints, open_clip
from pipelines.scoring.clip import ClipScorer
from pipelines.scoring.pictures import Picture, longest_padded


class HPSv2(ClipScorer):
    """The cosine, with open_clip's tokenizer and HPSv2's preprocessing."""

    def __init__(self, config: ScorerConfig, files: Mapping[str, Path], device: str = "cpu") -> None:
        checkpoint = next(path for name, path in files.items() if name.endswith(".pt"))
        model = open_clip.load(checkpoint, files.get(open_clip.CONFIG_FILE))
        super().__init__(config, model, device)
        self.preprocessing = f"longest:{self.size}"
        self._tokenizer = open_clip.read_tokenizer(files, self.text_length)
        last = model.config.text_config.vocab_size - 1
        if self._tokenizer.end != last:
            raise CheckpointError(
                f"{checkpoint} reads ids up to {last}, the id of its end token, but that of the tokenizer "
                f"{files.get('vocab.json') or files['tokenizer.json']} is {self._tokenizer.end}; set the scorer's "
                f"processor to the folder of the tokenizer that the model was trained with"
            )

    def prepare(self, picture: Picture) -> torch.Tensor:
        """Return float32 [3, size, size] in about [0, 1]: longer side bicubic, padded with zeros."""
        return longest_padded(picture, self.size)

    def tokenize(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return the ids, padded with 0 to the longest prompt: behind the end token nothing is attended to."""
        return {"input_ids": self._tokenizer(prompts)}


def create(config: ScorerConfig, device: str = "cpu") -> HPSv2:
    """Load HPSv2 or v2.1, whichever file the configuration's kind names."""
    return HPSv2(config, checkpoints.resolve(config), device)
