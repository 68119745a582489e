"""Checkpoints of a run: one file, complete or absent, with everything from which the run continues exactly.

Belongs here: writing and reading that file. Does not belong here: what a run is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

CODE_VERSION = 2


class CheckpointFileError(RuntimeError):
    """A checkpoint cannot be read; the message says which and what to do."""


class CheckpointFile:
    """One torch file with plain tensors and values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._staged = path.with_suffix(".writing")

    def save(self, state: dict[str, Any]) -> None:
        """Write the state beside the file, then rename: a kill leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._staged.open("wb") as handle:
            torch.save({"code_version": CODE_VERSION, **state}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(self._staged, self.path)

    def load(self) -> dict[str, Any] | None:
        """Return the state, on the CPU; None where there is no checkpoint.

        Raises:
            CheckpointFileError: it is damaged, or of another version of the program.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception as error:
            # torch raises several unrelated types for damaged files.
            raise CheckpointFileError(
                f"{self.path}: unreadable ({error}); remove it to train from the start"
            ) from error
        if state.get("code_version") != CODE_VERSION:
            raise CheckpointFileError(
                f"{self.path}: written by version {state.get('code_version')} of the trainer, this is {CODE_VERSION}; "
                "remove it to train from the start"
            )
        return state

    def remove(self) -> None:
        """Remove the file and what an interrupted write left."""
        self.path.unlink(missing_ok=True)
        self._staged.unlink(missing_ok=True)
