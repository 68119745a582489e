"""Where a reward model's files lie and which revision they are; needs no torch, so that staleness is cheap to ask.

Belongs here: files and their digests. Does not belong here: loading weights into a model.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError, local_folder
from pipelines.identity import file_digest, fingerprint

PREPROCESSING_VERSION = {
    "pickscore": "rgb,shortest-bicubic-pil,crop-floor:1",
    "clip": "rgb,shortest-bicubic-pil,crop-floor:1",
}
CLIP_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Either of these sets makes a CLIP tokenizer."""
OPTIONAL_FILES = ("tokenizer_config.json", "special_tokens_map.json")
REVISION_CHARACTERS = 12


def resolve(scorer: ScorerConfig) -> Path:
    """Return the local folder of a scorer's checkpoint, fetching it if it is a hub id.

    Raises:
        CheckpointError: the folder or one of its files is missing.
    """
    folder = local_folder(f"scorer {scorer.name!r}", "the scorer's checkpoint", scorer.checkpoint)
    missing = [f for f in CLIP_FILES if not (folder / f).exists()]
    if not any(all((folder / f).exists() for f in files) for files in TOKENIZER_FILES):
        missing.append(TOKENIZER_FILES[0][0])
    if missing:
        raise CheckpointError(
            f"scorer {scorer.name!r}: {folder / missing[0]} is missing; expected "
            f"{[*CLIP_FILES, *TOKENIZER_FILES[0]]}. The small world's "
            f"models are made by `python -m trainers.world_models`, published ones fetched by `hf download`"
        )
    return folder


def revision(scorer: ScorerConfig) -> str:
    """Return 12 hex characters: weights, tokenizer and configuration files, and our preprocessing's version."""
    folder = resolve(scorer)
    names = [*CLIP_FILES, *(f for files in TOKENIZER_FILES for f in files if (folder / f).exists())]
    names += [f for f in OPTIONAL_FILES if (folder / f).exists()]
    digests = {f: file_digest(folder / f) for f in names}
    mark = fingerprint(files=digests, kind=scorer.kind, preprocessing=PREPROCESSING_VERSION[scorer.kind])
    return mark[:REVISION_CHARACTERS]
