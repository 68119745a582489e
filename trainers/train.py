"""`python -m trainers.train`: caches, training and evaluation without Dagster; also what the launcher starts.

python -m trainers.train all                              everything below, in order
python -m trainers.train cache                            latents and prompt embeddings
python -m trainers.train train --recipe diffusion_dpo     one recipe (default: all configured)
python -m trainers.train evaluate                         samples, scores, held-out pairs, leaderboard
"""

from __future__ import annotations

import argparse
import sys

from pipelines import config as configuration
from pipelines import schemas
from pipelines.tables import Built, Store
from trainers import report
from trainers.sampling import BASE
from trainers.steps import Training


def say(message: str) -> None:
    """Print one line at once."""
    print(message, flush=True)


def _tell(name: str, built: Built) -> None:
    m = built.manifest
    say(f"{name}: {m.rows} rows, " + ("unchanged" if built.is_reused else f"{m.seconds:.1f} s"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainers.train", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("what", choices=("all", "cache", "train", "evaluate"))
    parser.add_argument("--config", help="TOML file; default: $POLYPHONY_CONFIG, else the small world")
    parser.add_argument("--recipe", help="one recipe; default: all of training.recipes")
    options = parser.parse_args(arguments)
    config = configuration.load(options.config)
    recipes = [options.recipe] if options.recipe else list(config.training.recipes)
    store = Store(config.store_location)
    training = Training(store, config, say)
    if options.what in ("all", "cache"):
        for key in training.shard_keys():
            _tell(f"latents {key}", training.latents(key))
        _tell("prompt_embeddings", training.prompt_embeddings())
    if options.what in ("all", "train"):
        for recipe in recipes:
            _tell(f"trained {recipe}", training.train(recipe).metrics)
    if options.what in ("all", "evaluate"):
        for model in (BASE, *recipes):
            _tell(f"samples {model}", training.samples(model))
            _tell(f"evaluations {model}", training.evaluations(model))
        for recipe in recipes:
            _tell(f"held_out {recipe}", training.held_out(recipe))
        if recipes == list(config.training.recipes):
            _tell("leaderboard", training.leaderboard())
            say("\n" + report.leaderboard_table(store.read(schemas.LEADERBOARD)))
        store.write_views()
    return 0


if __name__ == "__main__":
    from pipelines.errors import run_command

    sys.exit(run_command(main))
