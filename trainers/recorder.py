"""What a run tells while it trains: JSON lines, TensorBoard, a progress bar, lines for a launcher, rows per pair.

All of it can be watched while the run goes on, and is cut back to the checkpoint where a run resumes.
Belongs here: where numbers go. Does not belong here: how they come about.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from pipelines import schemas

Report = Callable[[dict[str, Any]], None]
PAIRS = "pairs"
"""Folder of a run with its rows of `training_pairs`."""


class Recorder:
    """The live record of one run, written by its first process."""

    def __init__(self, folder: Path, name: str, steps: int, first: int, report: Report) -> None:
        """Open the record.

        Args:
            first: steps done before (of the checkpoint); what was recorded after it is cut off.
            report: called with every row of metrics, beside `recipe` and `of` (all steps).
        """
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self._name, self._steps, self._report = name, steps, report
        self._pairs: list[dict[str, Any]] = []
        self._pairs_folder = folder / PAIRS
        self._cut_back(folder / "metrics.jsonl", first)
        self._lines = (folder / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        self._bar = tqdm(total=steps, initial=first, desc=name, unit="step", disable=not sys.stderr.isatty())

    def _cut_back(self, file: Path, first: int) -> None:
        if file.exists():
            # A run that begins anew measures its start again.
            kept = [line for line in file.read_text().splitlines() if first and _step_of(line) <= first]
            staged = file.with_suffix(".writing")
            staged.write_text("".join(line + "\n" for line in kept))
            staged.replace(file)
        for part in self._pairs_folder.glob("*.parquet"):
            if int(part.stem) > first:
                part.unlink()

    def step(self, row: dict[str, Any]) -> None:
        """Record an optimiser step's row of `training_metrics`."""
        self._write(row)
        for key, value in row.items():
            if key != "step" and value is not None:
                self._board.add_scalar(f"train/{key}", value, row["step"])
        self._bar.set_postfix(loss=f"{row['loss']:.4f}", accuracy=row["implicit_accuracy"], refresh=False)
        self._bar.update(1)

    def validation(self, step: int, values: dict[str, tuple[float, int]], pictures: bytes | None) -> None:
        """Record a validation: metric -> (value, count), and a PNG of samples."""
        self._write({"step": step, "validation": {k: v for k, (v, _) in values.items()}})
        for key, (value, _) in values.items():
            self._board.add_scalar(f"validation/{key}", value, step)
        if pictures is not None:
            self._board.add_image("samples", _pixels(pictures), step, dataformats="HWC")
        self._board.flush()

    def pairs(self, rows: list[dict[str, Any]]) -> None:
        """Keep rows of `training_pairs` until the next `save_pairs`."""
        self._pairs += rows

    def save_pairs(self, step: int) -> None:
        """Write the rows kept so far; called before the checkpoint of that step."""
        if not self._pairs:
            return
        self._pairs_folder.mkdir(exist_ok=True)
        file = self._pairs_folder / f"{step:09d}.parquet"
        staged = file.with_suffix(".writing")
        pl.DataFrame(self._pairs, schema=schemas.TRAINING_PAIRS.polars_schema).write_parquet(staged)
        staged.replace(file)
        self._pairs = []

    def close(self) -> None:
        """Flush and close everything."""
        self._lines.close()
        self._board.close()
        self._bar.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        self._report({"recipe": self._name, "of": self._steps, **row})


def saved_pairs(folder: Path) -> list[Path]:
    """Return the files of rows per pair that a run's folder holds, in the order of steps."""
    return sorted((folder / PAIRS).glob("*.parquet"))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # The kill may have cut a line in two; it belongs to a step that will come again.
        return sys.maxsize


def _pixels(png: bytes) -> Any:
    import io

    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
