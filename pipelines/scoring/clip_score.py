"""CLIP score: the cosine (Hessel et al. 2021, arXiv 2104.08718, without its factor 2.5); the revision says whose weights."""

from __future__ import annotations

from pipelines.config import ScorerConfig
from pipelines.scoring import checkpoints
from pipelines.scoring.pickscore import TransformersClipScorer


class ClipScore(TransformersClipScorer):
    """The cosine of a CLIPModel."""


def create(config: ScorerConfig, device: str = "cpu") -> ClipScore:
    """Load CLIP score."""
    return ClipScore(config, checkpoints.resolve(config), device)
