"""`python -m trainers.world_models`: train all tiny models of the small world and write `weights/`.

With `--only` a part of them: `generator`, `rewards` (all five reward models) or one by name; with `--check` nothing is
trained. Prints what the models can do, measured on what they did not see and on the files as written; exits with status 1
if fewer than 80 % of 500 prompts come out wholly right or a reward model's accuracy on held-out votes is not as wanted.
"""

from __future__ import annotations

import argparse
import functools
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipelines.config import WEIGHTS
from pipelines.world import raw
from trainers.world_models import aesthetic, blip, generator, measure, rewards, tokenizer, votes

SEED = 11
CHECK_SAMPLES, MINIMUM_RIGHT, MINIMUM_DECODED = 500, 0.80, 0.98
REWARDS = ("clip", "pickscore", "hpsv2", "imagereward", "aesthetic")
"""In the order in which they are built: the aesthetic head reads the saved `clip`."""


def say(message: str) -> None:
    """Print one line at once."""
    print(message, flush=True)


def build_generator(folder: Path) -> None:
    """Train and save the text-to-image pipeline."""
    vae = generator.train_autoencoder(SEED, say)
    generator.save_half(generator.train_generator(vae, SEED + 1, say), folder)


def check_generator(folder: Path) -> bool:
    """Measure the saved pipeline and say so; return whether it is good enough."""
    pipeline = generator.load(folder)
    decoded = generator.reconstruction_accuracy(pipeline.vae, 1000, SEED + 2)
    right = generator.measure(pipeline, CHECK_SAMPLES, SEED + 2)
    say(f"autoencoder: all four attributes right on {decoded:.1%} of 1000 decoded latents of renders")
    say(f"generator: prompted attributes right on {CHECK_SAMPLES} samples: {generator.as_text(right)}")
    return right["all"] >= MINIMUM_RIGHT and decoded >= MINIMUM_DECODED


def build_rewards(folder: Path, world: Path, names: Sequence[str] = REWARDS) -> None:
    """Train and save reward models; `world`: the folder of the rewards' world."""
    train, test, words = votes.read(world, "train"), votes.read(world, "test"), tokenizer.build()
    say(f"reward models: {len(train)} votes to learn from, {len(test)} held out, prompts disjoint from every store's")

    @functools.cache
    def clip() -> rewards.CLIPModel:
        return rewards.train_clip(train, test, words, SEED, say)

    for name in names:
        start, target = time.monotonic(), folder / f"tiny-{name}"
        if name == "clip":
            rewards.save_half(clip(), words, target)
        elif name == "pickscore":
            # From `clip` in float32, before it was rounded: built alone, it is trained again and not saved.
            rewards.save_half(rewards.train_pickscore(clip(), train, test, words, SEED + 1, say), words, target)
        elif name == "hpsv2":
            rewards.save_hpsv2(rewards.train_hpsv2(train, test, words, SEED + 2, say), words, target)
        elif name == "imagereward":
            blip.train(target, train, test, SEED + 4, say)
        else:
            aesthetic.train(target, folder / "tiny-clip", train, test, SEED + 6, say)
        say(f"{name}: built in {time.monotonic() - start:.0f} s")


def check_rewards(folder: Path, world: Path, names: Sequence[str] = REWARDS) -> bool:
    """Measure saved reward models on held-out votes of their world and say so; return whether they are as wanted."""
    frame, scorers = votes.read_frame(world, "test"), measure.scorers(folder)
    label = frame["label_0"].to_numpy()
    found = {name: measure.margins(scorers[name], frame) for name in names}
    good = True
    for name, margin in found.items():
        share, n = votes.accuracy(margin, label)
        low, high = measure.ACCURACY[name]
        good &= low <= share <= high
        say(
            f"{name}: accuracy {share:.1%} on {n} held-out decided votes (equal scores count as wrong), wanted between "
            f"{low:.0%} and {high:.0%}"
        )
    if len(found) > 1:
        say("correlation of the differences in score between a pair's pictures:")
        for name, row in zip(found, np.corrcoef(list(found.values())), strict=True):
            say(f"  {name:12}" + "".join(f"{r:6.2f}" for r in row))
    return good


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainers.world_models")
    parser.add_argument("--only", choices=("generator", "rewards", *REWARDS))
    parser.add_argument("--check", action="store_true", help="train nothing, measure what lies in the folder")
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    start = time.monotonic()
    say(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    good = True
    if options.only in (None, "generator"):
        if not options.check:
            build_generator(options.folder / "tiny-sd")
        good &= check_generator(options.folder / "tiny-sd")
    if options.only != "generator":
        names = (options.only,) if options.only in REWARDS else REWARDS
        with tempfile.TemporaryDirectory() as temporary:
            world = Path(temporary) / "world"
            raw.write_world(world, votes.WORLD)
            if not options.check:
                build_rewards(options.folder, world, names)
            good &= check_rewards(options.folder, world, names)
    say(f"{'done' if good else 'NOT GOOD ENOUGH'} in {(time.monotonic() - start) / 60:.1f} minutes")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
