"""`python -m trainers.world_models`: train all tiny models of the small world and write `weights/`.

With `--only generator` or `--only rewards` a part of them; with `--check` nothing is trained. Prints what the models can
do, measured on what they did not see and on the files as written; exits with status 1 if fewer than 80 % of 500 prompts
come out wholly right or a reward model's accuracy on held-out votes is not between 60 % and 90 %.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from pipelines.config import WEIGHTS
from trainers.world_models import generator, rewards

SEED = 11
CHECK_SAMPLES, MINIMUM_RIGHT, MINIMUM_DECODED = 500, 0.80, 0.98


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


def build_rewards(folder: Path) -> None:
    """Train and save the reward models."""
    with tempfile.TemporaryDirectory() as world:
        models, tokenizer = rewards.train_rewards(Path(world) / "world", SEED, say)
    for name, model in models.items():
        rewards.save_half(model, tokenizer, folder / f"tiny-{name}")


def check_rewards(folder: Path) -> bool:
    """Measure the saved reward models on held-out votes of their world and say so; return whether they are as wanted."""
    with tempfile.TemporaryDirectory() as world:
        test = rewards.held_out_pairs(Path(world) / "world")
    shares = []
    for name in rewards.NAMES:
        share, votes = rewards.accuracy(rewards.load(folder / f"tiny-{name}"), test)
        shares.append(share)
        say(f"{name}: accuracy {share:.1%} on {votes} held-out decided votes (equal scores count as wrong)")
    return all(0.6 <= s <= 0.9 for s in shares) and len({round(s, 3) for s in shares}) == len(shares)


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainers.world_models")
    parser.add_argument("--only", choices=("generator", "rewards"))
    parser.add_argument("--check", action="store_true", help="train nothing, measure what lies in the folder")
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    start = time.monotonic()
    say(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    good = True
    for part, build, check, folder in (
        ("generator", build_generator, check_generator, options.folder / "tiny-sd"),
        ("rewards", build_rewards, check_rewards, options.folder),
    ):
        if options.only in (None, part):
            if not options.check:
                build(folder)
            good &= check(folder)
    say(f"{'done' if good else 'NOT GOOD ENOUGH'} in {(time.monotonic() - start) / 60:.1f} minutes")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
