"""How well the saved reward models judge votes that no model has learned from, through the code that scores stores.

So a wrong preprocessing, tokenizer or name of a weight shows here as well as a badly trained model.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from pipelines.config import WEIGHTS, ScorerConfig, small_world
from pipelines.scoring import scorer
from pipelines.scoring.pictures import Picture

ACCURACY = {
    "pickscore": (0.64, 0.72),
    "clip": (0.58, 0.68),
    "hpsv2": (0.60, 0.72),
    "imagereward": (0.60, 0.72),
    "aesthetic": (0.54, 0.63),
}
"""Lowest and highest accuracy on held-out votes. What people agree on is right on 71 %; blind to the prompt, on 61 %."""


def scorers(folder: Path = WEIGHTS) -> dict[str, ScorerConfig]:
    """Return the small world's scorers by name, with the models of another folder than `weights/` if one is given."""

    def moved(path: str) -> str:
        return str(folder / Path(path).relative_to(WEIGHTS)) if path else ""

    return {
        s.name: s.model_copy(update={"checkpoint": moved(s.checkpoint), "backbone": moved(s.backbone)})
        for s in small_world().scorers
    }


def margins(config: ScorerConfig, votes: pl.DataFrame) -> np.ndarray:
    """Return the score of the first picture minus that of the second, [N]; votes: caption, jpg_0, jpg_1."""
    model = scorer.load(config)
    prompts = votes["caption"].to_list()
    first, second = (
        model.score([model.prepare(Picture(Image.open(io.BytesIO(b)), b)) for b in votes[side]], prompts)
        for side in ("jpg_0", "jpg_1")
    )
    return first - second
