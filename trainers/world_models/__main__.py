"""`python -m trainers.world_models`: train all tiny models of the small world and write `weights/`.

With `--only generator` or `--only rewards` a part of them. Prints what the models can do, measured on what they did not
see; exits with status 1 if the generator gets fewer than 80 % of 500 prompts wholly right or a reward model's accuracy
on held-out votes is not between 60 % and 90 %.
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
MINIMUM_RIGHT, CHECK_SAMPLES = 0.80, 500


def say(message: str) -> None:
    """Print one line at once."""
    print(message, flush=True)


def build_generator(folder: Path) -> bool:
    """Train and save the text-to-image pipeline; return whether it is good enough."""
    vae = generator.train_autoencoder(SEED, say)
    say(
        f"autoencoder: all four attributes right on {generator.reconstruction_accuracy(vae, 1000, SEED):.1%} of 1000 decoded"
    )
    pipeline = generator.train_generator(vae, SEED + 1, say)
    generator.save_half(pipeline, folder)
    # Measured on what was written, so that rounding to float16 is part of it.
    right = generator.measure(generator.load(folder), CHECK_SAMPLES, SEED + 2)
    say(f"generator: prompted attributes right on {CHECK_SAMPLES} samples: {generator.as_text(right)}")
    return right["all"] >= MINIMUM_RIGHT


def build_rewards(folder: Path) -> bool:
    """Train and save the reward models; return whether they are good, and imperfect, enough."""
    with tempfile.TemporaryDirectory() as world:
        models, tokenizer, test = rewards.train_rewards(Path(world) / "world", SEED, say)
    shares = []
    for name, model in models.items():
        rewards.save_half(model, tokenizer, folder / f"tiny-{name}")
        share, votes = rewards.accuracy(model, test)
        shares.append(share)
        say(f"{name}: accuracy {share:.1%} on {votes} held-out decided votes")
    return all(0.6 <= s <= 0.9 for s in shares) and len({round(s, 3) for s in shares}) == len(shares)


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainers.world_models")
    parser.add_argument("--only", choices=("generator", "rewards"))
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    start = time.monotonic()
    say(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    good = True
    if options.only != "rewards":
        good &= build_generator(options.folder / "tiny-sd")
    if options.only != "generator":
        good &= build_rewards(options.folder)
    say(f"{'done' if good else 'NOT GOOD ENOUGH'} in {(time.monotonic() - start) / 60:.1f} minutes")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
