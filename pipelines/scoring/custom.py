"""A reward model of one's own: `function = "module:function"` in the configuration, `options` its arguments.

    function(device, **options) -> judge          once per process; device as torch names it
    judge(images, prompts) -> scores              Pillow images (RGB) and texts at the same position, at most batch_size;
                                                  a list, array or tensor of as many finite numbers

An image comes once per prompt and may be changed. When the judge runs out of memory it is called again with half as many.
Belongs here: calling that function and checking what it returns. Does not belong here: models.
"""

from __future__ import annotations

import importlib
import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.identity import file_digest
from pipelines.scoring import checkpoints
from pipelines.scoring.checkpoints import ScoringError
from pipelines.scoring.pictures import Picture
from pipelines.scoring.scorer import Scorer, _is_out_of_memory

Judge = Callable[[list[Image.Image], list[str]], Any]


class CustomScorerError(ScoringError):
    """A custom scorer's function failed or returned something else than scores; names scorer, function and place."""


class CustomScorer(Scorer):
    """A judge that the configuration names."""

    preprocessing = "rgb"

    def __init__(self, config: ScorerConfig, device: str = "cpu") -> None:
        super().__init__(config, device)
        self._judge = _judge(config, device)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a reader of the scores must know."""
        # A TOML file's times are no JSON.
        options = json.loads(json.dumps(self.config.options, default=str))
        named = {"function": self.config.function, "options": options, "revision_name": self.config.revision}
        return {**super().facts, **named}

    def prepare(self, picture: Picture) -> Image.Image:
        """Return the picture as RGB, in its own size."""
        return picture.rgb

    def stack(self, prepared: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the pictures as they are."""
        return list(prepared)

    def encode_images(self, batch: list[Image.Image]) -> list[Image.Image]:
        """Return the pictures: image and prompt meet inside the judge."""
        return batch

    def compare(self, features: list[Image.Image], rows: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """Return the judge's scores, [M]."""
        # Other prompts and other scorers see the same picture, and Pillow's thumbnail() works in place.
        images = [features[row].copy() for row in rows]
        try:
            found = self._judge(images, list(prompts))
        except MemoryError as error:
            raise torch.OutOfMemoryError(f"{_who(self.config)}: MemoryError: {error}") from error
        except Exception as error:
            # This one must reach who halves the batch as it is.
            if isinstance(error, RuntimeError) and _is_out_of_memory(error):
                raise
            raise _failed(self.config, f"failed on {len(images)} images", error) from error
        return _numbers(self.config, found, len(images))


_imported: dict[str, str] = {}
"""Module -> sha256 of its file when this process first imported it: the revision must be that of the code which runs."""


def _judge(config: ScorerConfig, device: str) -> Judge:
    module_name, _, name = config.function.partition(":")
    digest = file_digest(checkpoints.custom_source(config))
    if _imported.setdefault(module_name, digest) != digest:
        raise CustomScorerError(f"{_who(config)}: its file changed after this process had imported it; start again")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise _failed(config, "its module cannot be imported", error) from error
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name
        )
        raise CheckpointError(
            f"{_who(config)}: {module.__file__} has no function {name!r}; it has {found}; set the scorer's function to one"
        )
    try:
        judge = function(device, **config.options)
    except Exception as error:
        raise _failed(config, f"failed for device {device!r} and options {config.options}", error) from error
    if not callable(judge):
        raise CustomScorerError(
            f"{_who(config)}: expected it to return a function judge(images, prompts), found {type(judge).__name__}"
        )
    return judge


_NUMBERS = (int, float, np.integer, np.floating, np.bool_, np.ndarray, torch.Tensor)


def _numbers(config: ScorerConfig, found: Any, count: int) -> torch.Tensor:
    """Return what a judge returned as float32 [count], on the CPU."""
    expected = f"{_who(config)}: expected {count} numbers, one per image and prompt"
    shape = getattr(found, "shape", None)
    if shape is not None and tuple(shape) != (count,):
        raise CustomScorerError(f"{expected}, found {type(found).__name__} of shape {tuple(shape)}")
    if isinstance(found, str | bytes | dict) or not isinstance(found, Iterable):
        raise CustomScorerError(f"{expected}, found {type(found).__name__}")
    values = found.detach().cpu() if isinstance(found, torch.Tensor) else list(found)
    if len(values) != count:
        raise CustomScorerError(f"{expected}, found {len(values)}")
    for i, value in enumerate(values):
        if not isinstance(value, _NUMBERS) or np.ndim(value):
            raise CustomScorerError(f"{expected}, found {type(value).__name__} at position {i}")
    try:
        numbers = torch.tensor([float(v) for v in values], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CustomScorerError(f"{expected}, found what are none: {error}") from error
    if not bool(numbers.isfinite().all()):
        at = int((~numbers.isfinite()).nonzero()[0])
        raise CustomScorerError(
            f"{expected}, found {float(numbers[at])} at position {at}; a score is finite in 32 bits"
        )
    return numbers


def _who(config: ScorerConfig) -> str:
    return f"scorer {config.name!r}, function {config.function!r}"


def _failed(config: ScorerConfig, what: str, error: Exception) -> CustomScorerError:
    """Return the error with the place in the custom module: a worker process keeps no traceback."""
    source = str(checkpoints.custom_source(config))
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == source]
    where = f" ({source}, line {lines[-1]})" if lines else ""
    return CustomScorerError(f"{_who(config)}: {what}: {type(error).__name__}: {error}{where}")


def create(config: ScorerConfig, device: str = "cpu") -> CustomScorer:
    """Load a custom scorer.

    Raises:
        CheckpointError: its module or function is not found.
        CustomScorerError: its module cannot be imported, or the function fails or returns no judge.
    """
    return CustomScorer(config, device)
