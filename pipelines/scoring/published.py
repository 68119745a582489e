"""What published checkpoints have in common: files of torch.save, their fit to a model, and a head of linear layers.

Belongs here: reading a file of weights and refusing one that is not what a model needs. Does not belong here: a model's
names and configuration (a module per kind), where files lie (`checkpoints`).
"""

from __future__ import annotations

import itertools
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from pipelines.hub import CheckpointError

_NAMES_SHOWN = 4


def read(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that torch.save wrote: a state dict, bare or under the key `state_dict`; nothing else is run.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        # Only the zip format can be mapped; a mapped file's pages are read once, while they are copied into the model.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path}: expected tensors written by torch.save, found something else ({type(error).__name__}: {said}); "
            f"fetch the file again: a web page or a Git LFS pointer may lie in its place"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise CheckpointError(
            f"{path}: expected a dictionary name -> tensor, bare or under 'state_dict', found "
            f"{sorted(map(str, state))[:_NAMES_SHOWN] if isinstance(state, Mapping) else type(state).__name__}; "
            f"name the published file of weights"
        )
    return dict(state)


def require_fit(
    path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what_to_do: str
) -> None:
    """Refuse weights unless every tensor is used, none is missing and every shape fits; `expected` may be without memory.

    Raises:
        CheckpointError: names the tensors and their shapes.
    """
    shapes = [
        f"{k} {list(found[k].shape)} (expected {list(expected[k].shape)})"
        for k in expected
        if k in found and found[k].shape != expected[k].shape
    ]
    problems = {
        "missing": [k for k in expected if k not in found],
        "unused": [k for k in found if k not in expected],
        "of another shape": shapes,
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {how}: {_some(names)}" for how, names in problems.items() if names)
        raise CheckpointError(f"{path}: of {len(expected)} expected tensors, {told}. {what_to_do}")


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def fill(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give a model that was built on the meta device its weights, as float32 copies, and set it to evaluation."""
    copies = {key: tensor.to(torch.float32, copy=True).contiguous() for key, tensor in state.items()}
    model.load_state_dict(copies, assign=True)
    for module in model.modules():
        # The positions 0, 1, ... are a buffer that no state dict holds, so it is still without memory.
        positions = getattr(module, "position_ids", None)
        if positions is not None:
            module.position_ids = torch.arange(positions.shape[-1]).expand(1, -1)
    model.eval()


class LinearHead(nn.Module):
    """Five linear layers without activations between them, [N, D] -> [N], always in float32.

    Published as `layers.0`, `.2`, `.4`, `.6` and `.7`; the numbers between them were dropout. The five are one linear map,
    but rounding them as published keeps the published score.
    """

    INDICES = ("0", "2", "4", "6", "7")

    def __init__(self, widths: Sequence[int]) -> None:
        """widths: of the input and of each layer's output, the last one 1."""
        super().__init__()
        pairs = zip(self.INDICES, itertools.pairwise(widths), strict=True)
        self.layers = nn.ModuleDict({index: nn.Linear(*pair) for index, pair in pairs})

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return one number per row of `features` [N, D]."""
        with torch.autocast(features.device.type, enabled=False):
            result = features.float()
            for layer in self.layers.values():
                result = layer(result)
        return result.squeeze(-1)


def build_head(path: Path, state: Mapping[str, torch.Tensor], inputs: int, prefix: str = "") -> LinearHead:
    """Return a head without memory whose hidden widths are those of the file, and which reads `inputs` features.

    Raises:
        CheckpointError: a layer is missing or not a matrix.
    """
    names = [f"{prefix}layers.{i}.weight" for i in LinearHead.INDICES]
    if wrong := [n for n in names if n not in state or state[n].ndim != 2]:
        raise CheckpointError(
            f"{path}: expected the matrices {names}, missing or not matrices: {wrong}; fetch the published file"
        )
    with torch.device("meta"):
        return LinearHead([inputs, *(state[n].shape[0] for n in names[:-1]), 1])
