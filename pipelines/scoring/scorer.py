"""The protocol of a reward model, and what all of them do alike: batches, memory, precision, repeated prompts.

    prepare         a picture as the model's input, in threads, before the model needs it
    encode_prompts  once per distinct prompt
    encode_images   once per picture of a batch
    compare         pictures and prompts at the same position -> scores

Belongs here: how a batch is run. Does not belong here: a model's mathematics (a module per kind), the walk over a shard.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from pipelines.config import ScorerConfig
from pipelines.scoring import checkpoints
from pipelines.scoring.pictures import Picture

_PROMPTS_KEPT = 200_000
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What is said where memory is asked for by others than torch's allocator of the device."""
_Model = TypeVar("_Model", bound=torch.nn.Module)


class Scorer(ABC):
    """A reward model. Its score is the published one; the last cosine or linear layer is computed in float32."""

    preprocessing: str
    """A key: scorers with the same key prepare a picture the same way, and it is prepared once for them."""

    def __init__(self, config: ScorerConfig, device: str = "cpu") -> None:
        self.config = config
        self.name, self.kind, self.batch_size = config.name, config.kind, config.batch_size
        self.revision = checkpoints.revision(config)
        self.device = torch.device(device)
        self.messages: list[str] = []

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a reader of the scores must know; it goes into every manifest."""
        return {
            "kind": self.kind,
            "revision": self.revision,
            "precision": self.config.precision,
            "device": str(self.device),
            "versions": _versions(),
        }

    @abstractmethod
    def prepare(self, picture: Picture) -> Any:
        """Return a picture as this model's input; thread-safe."""

    def stack(self, prepared: Sequence[Any]) -> Any:
        """Return prepared pictures as one batch on the device."""
        return torch.stack(list(prepared)).to(self.device)

    def encode_prompts(self, prompts: Sequence[str]) -> None:  # noqa: B027 - not every model has something to do here
        """Encode prompts that will be compared, each distinct one once; a no-op where text and image meet inside."""

    @abstractmethod
    def encode_images(self, batch: Any) -> Any:
        """Return the features of a stacked batch, one row per picture."""

    @abstractmethod
    def compare(self, features: Any, rows: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores of the pictures in these rows of `features` with the prompts at the same position, [M]."""

    @torch.inference_mode()
    def encode_all(self, prompts: Sequence[str]) -> None:
        """Encode the prompts of a whole shard, each distinct one once, in full batches."""
        # More than are kept would push each other out; the rest is encoded when its pictures come.
        some = list(dict.fromkeys(prompts))[: _PROMPTS_KEPT // 2]
        while True:
            try:
                with self._arithmetic():
                    self.encode_prompts(some)
                return
            except RuntimeError as error:
                if not _is_out_of_memory(error) or self.batch_size == 1:
                    raise
            self._halve()

    @torch.inference_mode()
    def score_pairs(self, prepared: Sequence[Any], pairs: Sequence[tuple[int, str]]) -> np.ndarray:
        """Return one score per (index of a prepared picture, prompt), float32 [len(pairs)].

        A picture is encoded once, however many prompts it meets. When the device runs out of memory the batch is halved,
        for this and all later calls, and the message kept in `messages`.

        Raises:
            torch.OutOfMemoryError: a single picture does not fit.
        """
        by_picture: dict[int, list[int]] = {}
        for position, (index, _) in enumerate(pairs):
            by_picture.setdefault(index, []).append(position)
        wanted = sorted(by_picture)
        result = np.empty(len(pairs), np.float32)
        start = 0
        while start < len(wanted):
            part = wanted[start : start + self.batch_size]
            try:
                with self._arithmetic():
                    self._score_part(prepared, pairs, part, by_picture, result)
            except RuntimeError as error:
                if not _is_out_of_memory(error) or self.batch_size == 1:
                    raise
            else:
                start += len(part)
                continue
            # Out of the except block, so that the failed attempt's tensors are free.
            self._halve()
        return result

    def score(self, prepared: Sequence[Any] | torch.Tensor, prompts: Sequence[str]) -> np.ndarray:
        """Return one score per prepared picture and prompt at the same position, float32 [N]."""
        return self.score_pairs(list(prepared), list(enumerate(prompts)))

    def _score_part(
        self,
        prepared: Sequence[Any],
        pairs: Sequence[tuple[int, str]],
        part: list[int],
        by_picture: dict[int, list[int]],
        result: np.ndarray,
    ) -> None:
        positions = [(row, p) for row, index in enumerate(part) for p in by_picture[index]]
        self.encode_prompts([pairs[p][1] for _, p in positions])
        features = self.encode_images(self.stack([prepared[i] for i in part]))
        for first in range(0, len(positions), self.batch_size):
            some = positions[first : first + self.batch_size]
            scores = self.compare(features, [row for row, _ in some], [pairs[p][1] for _, p in some])
            result[[p for _, p in some]] = scores.float().cpu().numpy()

    def _halve(self) -> None:
        self.batch_size //= 2
        self.messages.append(f"{self.name}: {self.device} ran out of memory, batch halved to {self.batch_size}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Compute in the configured precision; float32 means float32 also for convolutions on a GPU."""
        if self.config.precision == "bfloat16":
            with torch.autocast(self.device.type, torch.bfloat16):
                yield
        elif self.device.type == "cuda":
            # TF32 is cuDNN's default for convolutions, here the patch embedding, and moves a cosine by 1e-4.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield
        else:
            yield


class PromptFeatures:
    """Text features per prompt, computed once, shortest prompts first so that a batch pads little; bounded."""

    def __init__(self, encode: Callable[[list[str]], torch.Tensor], limit: int = _PROMPTS_KEPT) -> None:
        self._encode, self._limit = encode, limit
        self._kept: dict[str, torch.Tensor] = {}

    def add(self, prompts: Sequence[str], batch_size: int) -> None:
        """Encode those that are not kept yet."""
        new = set(prompts) - self._kept.keys()
        if new and len(self._kept) + len(new) > self._limit:
            self._kept.clear()
            new = set(prompts)
        ordered = sorted(new, key=lambda prompt: (len(prompt), prompt))
        for start in range(0, len(ordered), batch_size):
            part = ordered[start : start + batch_size]
            self._kept |= dict(zip(part, self._encode(part), strict=True))

    def take(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the features of prompts that were added, [len(prompts), D]."""
        return torch.stack([self._kept[p] for p in prompts])


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pillow")}


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def load(config: ScorerConfig, device: str = "cpu") -> Scorer:
    """Return the loaded scorer of a configuration.

    Raises:
        CheckpointError: a file is missing, or is not what its kind publishes.
    """
    module = "reference" if config.backend == "reference" else checkpoints.KINDS[config.kind].module
    return importlib.import_module(f"pipelines.scoring.{module}").create(config, device)


def half(model: _Model, config: ScorerConfig) -> _Model:
    """Return the model with the weights of its matrix products in the configured precision.

    Under bfloat16 only linear layers and convolutions are cast: layer norms, embeddings and the sum along the layers stay
    in float32, which is where a pure bfloat16 model loses most.
    """
    if config.precision == "bfloat16":
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.to(torch.bfloat16)
    return model
