"""How well the groups of annotators are the tastes of small worlds whose truth is known.

    python -m benchmarks.labels_groups [--seeds 401 402 403 404 405] [--home FOLDER]

Three settings; the worlds' other parameters are the defaults (60 annotators with about 55 votes each, 48 with about 460):

    quarter   a quarter of the people have the opposite taste
    half      half of them have
    one       all have the same taste: more than one group would be noise

Each with all votes and with no more than 40, 30 and 20 decided votes of a person, drawn at random. Beside every number of
groups stands what it gains on held-out votes with its standard error, and the adjusted Rand index of the groups with the
tastes, over the annotators that have a group: 1 is perfect, 0 is chance, and one group alone is 0 where there are two tastes.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.labels_truth import SEEDS, interval, shown, write_labels
from pipelines import catalogue, schemas
from pipelines.config import small_world
from pipelines.labels import groups as gro
from pipelines.world import raw

SETTINGS = {"quarter": 0.25, "half": 0.5, "one": 0.0}
"""Name -> share of the opposite taste."""
MOST_VOTES = (None, 40, 30, 20)
"""Decided votes of a person that are kept; None: all."""


@dataclass(frozen=True)
class Result:
    """What was found in a world: votes kept per person, the finding, and the index against the tastes; None: one taste."""

    most: int | None
    finding: gro.Finding
    index: float | None

    def text(self) -> str:
        """Return a line: people, groups with their members, gain of the likeliest number of groups, index."""
        found, best = self.finding, int(np.argmax(self.finding.gain))
        members = " + ".join(str(m) for m in found.members)
        gain = "one group is the likeliest"
        if best:
            gain = (
                f"{best + 1} gain {found.gain[best]:.4f} +- {found.gain_error[best] or float('nan'):.4f} nats per vote"
            )
        index = "-" if self.index is None else f"{self.index:.3f}"
        return (
            f"{found.annotators:4d} people, {found.votes:6d} votes: {found.groups} ({members}); {gain}; index {index}"
        )


def results(home: Path, share: float, seed: int) -> list[Result]:
    """Return what is found in a new world with ever fewer votes per person.

    Raises:
        RuntimeError: the label step's table says something else than the function on all votes.
    """
    config = small_world(home, raw.WorldConfig(seed=seed, minority_share=share))
    raw.write_world(config.world_folder, config.world)
    store, keys = write_labels(config)
    scorers, margins = [s.name for s in config.scorers], store.read(schemas.MARGINS)
    truth = pl.read_parquet(config.world_folder / "truth" / "votes.parquet")
    truth = truth.select("source", "source_row", "rater", "taste")
    votes = catalogue.counted_votes(store, keys).with_columns(people=catalogue.PEOPLE).collect()
    votes = votes.join(truth, on=["source", "source_row", "rater"], how="left", maintain_order="left", validate="1:1")
    tastes = votes.drop_nulls("annotator_id").group_by("annotator_id").agg(pl.col("taste").unique())
    # A person has one taste, or the truth is none.
    tastes = tastes.with_columns(pl.col("taste").list.item())
    found = []
    for most in MOST_VOTES:
        table, finding = gro.annotator_groups(_thinned(votes, most, seed), margins, scorers)
        if most is None and not table.equals(store.read(schemas.ANNOTATOR_GROUPS)):
            raise RuntimeError(f"seed {seed}: the store's annotator_groups are others than those of the same votes")
        told = table.filter(status="ok").join(tastes, on="annotator_id", how="left", validate="1:1")
        index = gro.adjusted_rand_index(told["group"].to_numpy(), told["taste"].to_numpy()) if share else None
        found.append(Result(most, finding, index))
    return found


def _thinned(votes: pl.DataFrame, most: int | None, seed: int) -> pl.DataFrame:
    """Return the decided votes, of every known annotator no more than so many."""
    votes = votes.filter(pl.col("label_0") != 0.5)
    if most is None:
        return votes
    votes = votes.with_columns(drawn=pl.Series(np.random.default_rng(seed).random(len(votes))))
    is_kept = (pl.col("drawn").rank().over("annotator_id") <= most) | pl.col("annotator_id").is_null()
    return votes.filter(is_kept).drop("drawn")


def main(seeds: tuple[int, ...] = SEEDS, home: Path | None = None) -> None:
    """Print what is found, by setting, votes per person and seed, and the indices' means with 95 % intervals over seeds."""
    for setting, share in SETTINGS.items():
        print(f"{setting}: minority_share {share}", flush=True)
        by_seed = {}
        for seed in seeds:
            with tempfile.TemporaryDirectory() as temporary:
                place = (home or Path(temporary)) / f"{setting}-{seed}"
                by_seed[seed] = results(place, share, seed)
        for i, most in enumerate(MOST_VOTES):
            print(f"  {'all votes' if most is None else f'at most {most} votes of a person'}")
            for seed, found in by_seed.items():
                print(f"    seed {seed}: {found[i].text()}")
            those = [found[i] for found in by_seed.values()]
            chosen = ", ".join(str(r.finding.groups) for r in those)
            if share:
                indices = shown(interval([r.index for r in those if r.index is not None]), 3)
                print(f"    groups {chosen}; adjusted Rand index {indices}", flush=True)
            else:
                print(f"    groups {chosen}; one is right", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--home", type=Path, help="keep the worlds here (default: temporary folders)")
    options = parser.parse_args()
    main(tuple(options.seeds), options.home)
