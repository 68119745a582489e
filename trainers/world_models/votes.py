"""The votes that the reward models learn from: those of a small world of their own (another seed, other prompts).

Belongs here: reading its votes, the loop that fits a model to them. Does not belong here: models and their losses.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from PIL import Image

from pipelines.scoring.pictures import CLIP_MEAN, CLIP_STD
from pipelines.world import raw
from trainers.world_models.generator import Log, learning_rate_schedule

WORLD = raw.WorldConfig(
    seed=1_000_003,
    prompt_pool="rewards",
    pickapic_shards={"train": 12, "test": 1},
    pickapic_prompts={"train": 480, "test": 100},
    rows_per_shard=2_000,
    hpd_train_prompts=1,
    hpd_test_groups=1,
    hpd_test_groups_of_ten=0,
)
BATCH = 96
Tokenize = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class Pairs:
    """N votes as a model reads them: pictures [N, 2, 3, 32, 32] normalised, token ids [N, T], label of the first [N]."""

    pictures: torch.Tensor
    tokens: torch.Tensor
    label_0: torch.Tensor

    def __len__(self) -> int:
        return len(self.label_0)

    def take(self, index: torch.Tensor) -> Pairs:
        """Return the votes at `index`."""
        return Pairs(self.pictures[index], self.tokens[index], self.label_0[index])

    def decided(self) -> Pairs:
        """Return the votes that are no ties."""
        return self.take((self.label_0 != 0.5).nonzero()[:, 0])


@dataclass(frozen=True)
class Votes:
    """N labelled votes: prompts [N], pictures [N, 2, 3, 32, 32] normalised, label of the first picture [N]."""

    prompts: list[str]
    pictures: torch.Tensor
    label_0: torch.Tensor

    def __len__(self) -> int:
        return len(self.label_0)

    def tokenized(self, tokenize: Tokenize) -> Pairs:
        """Return the votes with the ids that a model's tokenizer gives to their prompts."""
        return Pairs(self.pictures, tokenize(self.prompts), self.label_0)

    def part(self, start: float, end: float) -> Votes:
        """Return the votes between two shares of all, e.g. the first half with (0, 0.5)."""
        rows = slice(round(start * len(self)), round(end * len(self)))
        return Votes(self.prompts[rows], self.pictures[rows], self.label_0[rows])


def read_frame(folder: Path, split: str) -> pl.DataFrame:
    """Return one split's labelled votes from raw files in Pick-a-Pic's layout: caption, jpg_0, jpg_1, label_0."""
    frame = pl.concat([pl.read_parquet(f) for f in sorted((folder / "pickapic" / "data").glob(f"{split}-*.parquet"))])
    return frame.filter(pl.col("has_label")).select("caption", "jpg_0", "jpg_1", "label_0")


def read(folder: Path, split: str) -> Votes:
    """Return one split's labelled votes; their pictures are as large as the models want them."""
    frame = read_frame(folder, split)

    def decode(column: str) -> torch.Tensor:
        stack = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in frame[column]])
        return torch.from_numpy(stack).permute(0, 3, 1, 2)

    pixels = torch.stack([decode("jpg_0"), decode("jpg_1")], 1).float() / 255
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    label = torch.tensor(frame["label_0"].to_numpy().copy(), dtype=torch.float32)
    return Votes(frame["caption"].to_list(), pixels, label)


def accuracy(margin: np.ndarray, label_0: np.ndarray) -> tuple[float, int]:
    """Return the share of decided votes (ties left out) whose preferred picture scores higher, and their number.

    margin: score of the first picture minus that of the second, [N]; 0 counts as wrong.
    """
    decided = label_0 != 0.5
    right = margin * (label_0 - 0.5) > 0
    return float(right[decided].mean()), int(decided.sum())


@dataclass(frozen=True)
class Fit:
    """How a model is fitted: AdamW on `loss(model, batch)`; `margin(model, batch)` [N] tells its progress."""

    name: str
    steps: int
    rate: float
    seed: int
    loss: Callable[[Any, Pairs], torch.Tensor]
    margin: Callable[[Any, Pairs], torch.Tensor]

    def run(self, model: torch.nn.Module, train: Pairs, test: Pairs, log: Log) -> None:
        """Train `model` in place; it is in evaluation mode afterwards."""
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, weight_decay=0.05)
        schedule = learning_rate_schedule(optimizer, self.steps)
        scale = getattr(model, "logit_scale", None)
        start = time.monotonic()
        for step in range(self.steps):
            batch = train.take(torch.randint(0, len(train), (BATCH,), generator=generator))
            loss = self.loss(model.train(), batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if scale is not None:
                with torch.no_grad():
                    scale.clamp_(max=np.log(100.0))
            if step % 100 == 0 or step == self.steps - 1:
                right, n = accuracy(self.margins(model.eval(), test), test.label_0.numpy())
                log(
                    f"{self.name} {step + 1}/{self.steps} loss {loss.item():.4f} accuracy {right:.1%} of {n} held-out "
                    f"votes {time.monotonic() - start:.0f} s"
                )

    @torch.no_grad()
    def margins(self, model: torch.nn.Module, pairs: Pairs) -> np.ndarray:
        """Return the margins of all votes, [N]."""
        parts = torch.arange(len(pairs)).split(256)
        return torch.cat([self.margin(model, pairs.take(i)) for i in parts]).numpy()
