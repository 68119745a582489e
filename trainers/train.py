"""`python -m trainers.train`: caches, training and evaluation without Dagster; also what the launcher starts.

python -m trainers.train all                              everything below, in order
python -m trainers.train recipes                          what there is to train
python -m trainers.train cache                            latents and prompt embeddings
python -m trainers.train plan --recipe smpo_sd15          a dry run: pairs, memory, caches, duration; changes nothing
python -m trainers.train trajectories --recipe smpo       the inverted latents that it trains on (`train` makes them, too)
python -m trainers.train train --recipe diffusion_dpo     one recipe (default: all configured)
python -m trainers.train evaluate                         samples, scores, held-out pairs, leaderboard

`--recipe NAME` alone trains that recipe. Everything else is said by the configuration, `[training]`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines import config as configuration
from pipelines import reporting, schemas
from pipelines.config import CONFIG_VARIABLE, Config
from pipelines.tables import Built, Store
from trainers import loop, plan, recipes, report
from trainers.checkpoints import CheckpointFileError
from trainers.sampling import BASE
from trainers.steps import Training


def say(message: str) -> None:
    """Print one line at once."""
    print(message, flush=True)


def _line(name: str, built: Built) -> str:
    m = built.manifest
    return f"{name}: {m.rows} rows, " + ("unchanged" if built.is_reused else f"{m.seconds:.1f} s")


def _tell(name: str, built: Built) -> None:
    say(_line(name, built))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainers.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="train",
        choices=("all", "recipes", "cache", "plan", "trajectories", "train", "evaluate"),
    )
    parser.add_argument("--config", help="TOML file; default: $POLYPHONY_CONFIG, else the small world")
    parser.add_argument("--recipe", help="one recipe; default: all of training.recipes")
    parser.add_argument("--json", action="store_true", help="print metrics as JSON lines, too")
    parser.add_argument("--dry-run", action="store_true", help="with train: the same as plan")
    return parser


def spread(config: Config, options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Become torchrun with training.processes copies of this command, unless this is such a copy already.

    The process is replaced, so that whoever started it holds all of them.
    """
    if config.training.processes == 1 or "RANK" in os.environ:
        return
    environment = {**os.environ, **({CONFIG_VARIABLE: str(Path(options.config).resolve())} if options.config else {})}
    if config.training.device == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc_per_node={config.training.processes}",
        *("-m", "trainers.train", *arguments),
    ]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    if options.what == "recipes":
        say(recipes.listing())
        return 0
    config = configuration.load(options.config)
    names = [options.recipe] if options.recipe else list(config.training.recipes)
    chosen = [r.name for r in recipes.recipes_in_order(names)]
    for name in chosen:
        if options.what != "cache":
            loop.require_family(recipes.recipe(name), config)
    is_first = int(os.environ.get("RANK", "0")) == 0
    store = Store(config.store_location)
    training = Training(store, config, say if is_first else lambda message: None)
    if options.what == "plan" or options.dry_run:
        for name in chosen:
            say(plan.describe(plan.plan(training.run(name, is_plan=True))) + "\n")
        return 0
    # Before there are several processes, which would only wait.
    if options.what in ("all", "cache") and "RANK" not in os.environ:
        for key in training.shard_keys():
            _tell(f"latents {key}", training.latents(key, chosen))
        _tell("prompt_embeddings", training.prompt_embeddings())
    if options.what in ("all", "trajectories", "train"):
        spread(config, options, given)
    with reporting.opened() as tell:
        _train(training, options, chosen, tell)
    if options.what in ("all", "evaluate") and is_first:
        _evaluate(training, store, config, chosen)
    return 0


def _train(training: Training, options: argparse.Namespace, names: list[str], tell: reporting.Tell) -> None:
    """Make trajectories or train, as the options say; every process of a run calls it, the first one speaks."""
    say_first = training.progress

    def told(row: dict[str, Any]) -> None:
        if options.json:
            loop.print_json(row)
        tell(row)

    for name in names:
        if options.what == "trajectories":
            made = training.trajectories(name)
            say_first(f"trajectories {name}: {sum(m.rows for m in made)} rows in {len(made)} parts")
        if options.what in ("all", "train"):
            trained = training.train(name, told)
            say_first(_line(f"trained {name}", trained.metrics))
            say_first(f"model: {trained.model}")


def _evaluate(training: Training, store: Store, config: Config, names: list[str]) -> None:
    for model in (BASE, *names):
        _tell(f"samples {model}", training.samples(model))
        _tell(f"evaluations {model}", training.evaluations(model))
    for name in names:
        _tell(f"held_out {name}", training.held_out(name))
    if names == [r.name for r in training.recipes()]:
        _tell("leaderboard", training.leaderboard())
        say("\n" + report.leaderboard_table(store.read(schemas.LEADERBOARD)))
    store.write_views()


if __name__ == "__main__":
    from pipelines.errors import run_command

    sys.exit(run_command(main, loop.TrainingStopped, CheckpointFileError))
