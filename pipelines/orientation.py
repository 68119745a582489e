"""Orientation: nothing that is said of a pair depends on which of its images comes first, but by its sign.

Rows of the store are made again with the two images of every pair exchanged, by the functions that made them, and compared:

    labels and probabilities of image_0     x = 1 - x'          votes of scorers, z_mean     x = -x'
    what is said of image_0                 x = x' of image_1   everything else              x = x'

Margins are made from the active scores, other tables from the stored margins and calibration; of a few pairs, evenly spread.

Votes show what that cannot: people agree with a scorer as often where the source lists image_0 second as where it lists it
first. A reader that forgets to turn the label of the former round gives shares of 1 - a and a.

Belongs here: what the exchange of images must do to a table. Does not belong here: other checks (`checks`), mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl

from pipelines import catalogue, schemas
from pipelines.config import Config
from pipelines.labels import calibration as cal
from pipelines.labels import consensus as con
from pipelines.labels import margins as mar
from pipelines.labels import minority as mino
from pipelines.labels import preferences as pref
from pipelines.labels import smoothed as smo
from pipelines.labels.intervals import design_effect
from pipelines.scoring import batches
from pipelines.steps import Labels
from pipelines.tables import Store

PAIRS = 2_000
"""Pairs that are made again, about so many."""
STANDARD_ERRORS = 5.0
"""By which the agreement with votes listed one way and the other may differ, unless both are above or below one half."""
_TOLERANCE = 1e-9
_FIT_TOLERANCE = 1e-6
"""Of numbers that Newton steps found."""

_TURNED = {
    *(
        "label_0",
        "human_label_0",
        "consensus_label_0",
        "random_scorer_label_0",
        "raw_sum_label_0",
        "zscore_sum_label_0",
    ),
    *("p_smpo", "p_ensemble", "p_linear", "p_log", "smpo_{scorer}", "calibrated_{scorer}"),
}
_NEGATED = {"vote_{scorer}", "vote_human", "z_mean"}
_OF_IMAGE = ("image_{}_id", "model_{}", "score_{}_{{scorer}}", "votes_{}")
_OTHER = {c.format(i): c.format(1 - i) for c in _OF_IMAGE for i in (0, 1)}
_NOT_COMPARED = {
    # Where votes on a pair name several generators, the first in the order of names stands for the pair.
    "margins": {"model_0", "model_1"},
    # They depend on votes on pairs that are not made again.
    "minority": {"annotator_score", "minority_probability", "em_probability"},
    # It names image_0's reason before image_1's.
    "preferences": {"excluded_because"},
}


@dataclass(frozen=True)
class Outcome:
    """What a check found: problems, or what is said where there are none, and the numbers of both."""

    problems: list[str]
    said: str = ""
    numbers: Mapping[str, float | int] = field(default_factory=dict)

    def __add__(self, more: Outcome) -> Outcome:
        said = "; ".join(s for s in (self.said, more.said) if s)
        return Outcome(self.problems + more.problems, said, {**self.numbers, **more.numbers})


def check(store: Store, config: Config, table: str) -> Outcome:
    """Return what is found of the orientation of a label table.

    Raises:
        KeyError: the table is none of TABLES.
        StoreError: it is missing, older than its inputs, or made under other options.
        ValueError: it does not go with the tables that it was made from.
    """
    exchange = _Exchange(store, config)
    exchange.labels.current(table)
    found = TABLES[table](exchange)
    if table == "margins":
        return found + exchange.agreement()
    if table == "calibration":
        return found + exchange.agreement(exchange.calibration)
    return found


class _Exchange:
    """Some pairs of the store with their images exchanged, and what is made of them."""

    def __init__(self, store: Store, config: Config) -> None:
        self.store = store
        self.scorers = [s.name for s in config.scorers]
        self.config = config
        self.labels = Labels(store, config, catalogue.shard_keys(store))

    def rows(self, table: schemas.Table) -> pl.DataFrame:
        """Return the stored rows of the pairs, in the order of the pairs where a pair has one."""
        ids = self.pairs.lazy().select("pair_id")
        return ids.join(self.store.scan(table), on="pair_id", maintain_order="left").collect()

    @cached_property
    def pairs(self) -> pl.DataFrame:
        every = max(1, self.store.require(schemas.CATALOGUE_PAIRS.name).rows // PAIRS)
        # Pairs without a row are for another check to tell.
        there = self.store.scan(schemas.MARGINS).select("pair_id")
        pairs = catalogue.all_pairs(self.store).gather_every(every)
        return pairs.join(there, on="pair_id", how="semi", maintain_order="left").collect()

    @cached_property
    def turned_pairs(self) -> pl.DataFrame:
        return _exchanged(self.pairs, []).with_columns(human_label_0=1 - pl.col("human_label_0"))

    @cached_property
    def margins(self) -> pl.DataFrame:
        return self.rows(schemas.MARGINS)

    @cached_property
    def turned_margins(self) -> pl.DataFrame:
        return _exchanged(self.margins, self.scorers)

    @cached_property
    def calibration(self) -> pl.DataFrame:
        return self.store.read(schemas.CALIBRATION)

    @cached_property
    def votes(self) -> pl.DataFrame:
        """All votes on the pairs, with `people` and `counts`."""
        votes = catalogue.resolved_votes(self.store, self.labels.shard_keys)
        votes = votes.join(self.pairs.lazy().select("pair_id"), on="pair_id", how="semi")
        columns = ("vote_id", "pair_id", "annotator_id", "label_0", "source")
        return votes.select(*columns, people=catalogue.PEOPLE, counts=pl.col("status") == "ok").collect()

    @cached_property
    def turned_votes(self) -> pl.DataFrame:
        return self.votes.filter("counts").with_columns(label_0=1 - pl.col("label_0"))

    @cached_property
    def turned_metrics(self) -> pl.DataFrame:
        return mino.pair_metrics(self.turned_margins, self.calibration, self.scorers)

    @cached_property
    def turned_consensus(self) -> pl.DataFrame:
        # The scale is of all pairs, to the last bit: a sum near zero has the sign that it has in the table.
        scores = [c for c in schemas.MARGINS.of(self.scorers).polars_schema if c.startswith("score_")]
        rms = mar.rms(mar.matrix(self.store.scan(schemas.MARGINS).select(scores).collect(), self.scorers))
        options = self.labels.consensus_options
        human = self.turned_pairs["human_label_0"]
        return con.consensus(self.turned_margins, human, self.scorers, **options, rms=rms)

    @cached_property
    def turned_smoothed(self) -> pl.DataFrame:
        is_published = self.config.labels.smpo_constants == "published"
        return smo.smoothed(
            self.turned_margins,
            self.calibration,
            self.scorers,
            self.labels.smpo_scorer,
            published_constants=is_published,
        )

    # --- the tables, made again ------------------------------------------------------------------------------------

    def of_margins(self) -> Outcome:
        """Compare margins with those of the active scores under exchanged images."""
        asked = pl.concat(self.pairs.select("prompt_id", image_id=f"image_{i}_id") for i in (0, 1)).unique()
        active = batches.current_scores(self.store, self.scorers, self.labels.shard_keys)
        found = active.join(asked.lazy(), on=["image_id", "prompt_id"], how="semi").collect()
        scores = found.select("image_id", "prompt_id").unique()
        for scorer in self.scorers:
            own = found.filter(pl.col("scorer") == scorer).select(
                "image_id", "prompt_id", pl.col("score").alias(scorer)
            )
            scores = scores.join(own, on=["image_id", "prompt_id"], how="left")
        generators = pl.DataFrame(schema=dict.fromkeys(("pair_id", "model_0", "model_1"), pl.String))
        return self._compared(schemas.MARGINS, mar.margins(self.turned_pairs, scores, generators, self.scorers))

    def of_consensus(self) -> Outcome:
        """Compare consensus."""
        return self._compared(schemas.CONSENSUS, self.turned_consensus)

    def of_smoothed(self) -> Outcome:
        """Compare smoothed."""
        return self._compared(schemas.SMOOTHED, self.turned_smoothed)

    def of_minority(self) -> Outcome:
        """Compare minority."""
        made, _ = mino.minority(self.turned_votes, self.turned_margins, self.turned_metrics)
        return self._compared(schemas.MINORITY, made)

    def of_preferences(self) -> Outcome:
        """Compare preferences."""
        prompts = self.store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt", "split")
        nothing = schemas.SCORES.empty().with_columns(scorer=pl.lit(None, pl.String))
        made = pref.preferences(
            pairs=self.turned_pairs,
            prompts=prompts.filter(pl.col("prompt_id").is_in(self.pairs["prompt_id"].unique().implode())).collect(),
            votes=self.turned_votes,
            sources=self.votes,
            margins=self.turned_margins,
            metrics=self.turned_metrics,
            minority=self.rows(schemas.MINORITY).with_columns(label_0=1 - pl.col("label_0")),
            consensus=self.turned_consensus,
            smoothed=self.turned_smoothed,
            problems=nothing,
            images=nothing,
            scorers=self.scorers,
        )
        return self._compared(schemas.PREFERENCES, pl.concat(made))

    def of_calibration(self) -> Outcome:
        """Compare the calibration on the pairs with that on the exchanged pairs, neither of them the stored one."""
        with_term = self.config.labels.generator_term
        plain = self.votes.filter("counts")
        here = cal.calibrate(self.margins, plain, self.scorers, generator_term=with_term)
        there = cal.calibrate(self.turned_margins, self.turned_votes, self.scorers, generator_term=with_term)
        problems = _differences(schemas.CALIBRATION, here, there, [], _FIT_TOLERANCE)
        told = f"{len(self.pairs)} pairs with their images exchanged give the same calibration"
        return Outcome(problems, told, {"pairs_exchanged": len(self.pairs)})

    def _compared(self, table: schemas.Table, made: pl.DataFrame) -> Outcome:
        problems = _differences(table, self.rows(table), made, self.scorers, _TOLERANCE)
        told = f"{len(made)} rows of {len(self.pairs)} pairs, made again with the images exchanged, say the same"
        return Outcome(problems, told, {"pairs_exchanged": len(self.pairs), "rows_exchanged": len(made)})

    # --- what people say -------------------------------------------------------------------------------------------

    def agreement(self, calibration: pl.DataFrame | None = None) -> Outcome:
        """Compare how often every scorer agrees with votes of every source listed one way and the other.

        calibration: compare its accuracies too, which are over the same votes.
        """
        scores = [c for c in schemas.MARGINS.of(self.scorers).polars_schema if c.startswith("score_")]
        margins = self.store.scan(schemas.MARGINS).select("pair_id", "prompt_id", *scores).collect()
        columns = ("pair_id", "source", "label_0", "was_listed_second")
        counted = catalogue.counted_votes(self.store, self.labels.shard_keys).filter(pl.col("label_0") != 0.5)
        votes = counted.select(*columns, people=catalogue.PEOPLE).collect()
        rows = mar.rows_of(margins, votes["pair_id"])
        prompt, d = mar.codes(margins["prompt_id"])[rows], mar.matrix(margins, self.scorers)[rows]
        found: list[_Sides] = []
        problems: list[str] = []
        for k, scorer in enumerate(self.scorers):
            agreeing = _Agreement.of(scorer, d[:, k], votes, prompt)
            found += agreeing.sides()
            if calibration is not None:
                problems += agreeing.other_accuracy(calibration)
        found.sort(key=lambda sides: sides.apart, reverse=True)
        problems += [s.problem() for s in found if s.is_contrary]
        numbers = {"votes": len(votes), "votes_listed_second": int(votes["was_listed_second"].sum())}
        if not found:
            return Outcome(problems, "no source has decided votes listed both ways", numbers)
        return Outcome(problems, str(found[0]), {**numbers, "standard_errors_apart": found[0].apart})


@dataclass(frozen=True)
class _Sides:
    """How often a scorer agrees with a source's votes listed one way and the other, and how far apart that is."""

    scorer: str
    source: str
    first: float
    second: float
    apart: float

    @property
    def is_contrary(self) -> bool:
        return self.apart > STANDARD_ERRORS and (self.first - 0.5) * (self.second - 0.5) < 0

    def __str__(self) -> str:
        return (
            f"{self.scorer} agrees with {self.first:.1%} of the votes of {self.source} listed as image_0, image_1 and with "
            f"{self.second:.1%} of those listed the other way, {self.apart:.1f} standard errors apart"
        )

    def problem(self) -> str:
        return f"{self}: the reader of {self.source} does not turn labels round"


@dataclass(frozen=True)
class _Agreement:
    """A scorer against decided votes, [N]: people who agree with it (equal scores: half of them), and all people."""

    scorer: str
    right: np.ndarray
    count: np.ndarray
    prompt: np.ndarray
    source: np.ndarray
    is_second: np.ndarray

    @classmethod
    def of(cls, scorer: str, d: np.ndarray, votes: pl.DataFrame, prompt: np.ndarray) -> _Agreement:
        label, source = votes["label_0"].to_numpy(), votes["source"].to_numpy()
        count = np.where(np.isnan(d), 0, votes["people"].to_numpy())
        right = count * np.where(d > 0, label, np.where(d < 0, 1 - label, 0.5))
        return cls(scorer, right, count, prompt, source, votes["was_listed_second"].to_numpy())

    def sides(self) -> Iterator[_Sides]:
        """Yield the sides of every source that has votes listed both ways."""
        for source in sorted(set(self.source)):
            of_source = self.source == source
            (first, error), (second, other) = (self._share(of_source & (self.is_second == s)) for s in (False, True))
            if error > 0 and other > 0:
                yield _Sides(self.scorer, source, first, second, float(abs(first - second) / np.hypot(error, other)))

    def _share(self, rows: np.ndarray) -> tuple[float, float]:
        """Return the share of people who agree, and its standard error with prompts as clusters; 0, 0 without any."""
        right, count = self.right[rows], self.count[rows]
        total = float(count.sum())
        if not total:
            return 0.0, 0.0
        # One for and one against more: a share of few votes is not known to be 0 or 1.
        likely = (float(right.sum()) + 1) / (total + 2)
        error = np.sqrt(likely * (1 - likely) / total * design_effect(right, count, self.prompt[rows]))
        return float(right.sum()) / total, float(error)

    def other_accuracy(self, calibration: pl.DataFrame) -> list[str]:
        """Return whether a calibration says another accuracy than these votes."""
        row = calibration.filter(pl.col("scorer") == self.scorer, pl.col("fold") == cal.ALL)
        stored, total = row["accuracy"].item(), float(self.count.sum())
        found = float(self.right.sum()) / total if total else None
        if stored == found or (stored is not None and found is not None and abs(stored - found) < _TOLERANCE):
            return []
        return [f"calibration says that {self.scorer} agrees with {stored} of the decided votes, the votes say {found}"]


TABLES: dict[str, Callable[[_Exchange], Outcome]] = {
    "margins": _Exchange.of_margins,
    "calibration": _Exchange.of_calibration,
    "consensus": _Exchange.of_consensus,
    "smoothed": _Exchange.of_smoothed,
    "minority": _Exchange.of_minority,
    "preferences": _Exchange.of_preferences,
}
"""Label tables that speak of image_0 and image_1, or are fitted to what does, and how each is made again."""


def _exchanged(frame: pl.DataFrame, scorers: list[str]) -> pl.DataFrame:
    """Return a frame with the columns of image_0 and image_1 exchanged; ids of pairs stay."""
    other = _expanded(_OTHER, scorers)
    return frame.select(pl.col(other.get(c, c)).alias(c) for c in frame.columns)


def _expanded(templates: dict[str, str], scorers: list[str]) -> dict[str, str]:
    return {
        a.replace(schemas.SCORER, s): b.replace(schemas.SCORER, s)
        for a, b in templates.items()
        for s in (scorers if schemas.SCORER in a else [""])
    }


def _differences(
    table: schemas.Table, stored: pl.DataFrame, made: pl.DataFrame, scorers: list[str], tolerance: float
) -> list[str]:
    """Return per column how many rows say something else than what was made of them with the images exchanged."""
    both = stored.join(made, on=table.key, suffix="'", maintain_order="left")
    problems = []
    for column in table.columns:
        if column.name in (*table.key, *_NOT_COMPARED.get(table.name, ())):
            continue
        rows = both
        if column.name == "consensus_label_0":
            # This tie policy is a coin that lies on image_0, by design.
            rows = both.filter(pl.col("decided_by") != "keep_order")
        for own, other in _expanded({column.name: _OTHER.get(column.name, column.name)}, scorers).items():
            expected = pl.col(f"{other}'")
            if column.name in _TURNED:
                expected = 1 - expected
            elif column.name in _NEGATED:
                expected = -expected
            if n := rows.select(_is_other(pl.col(own), expected, column.dtype, tolerance).sum()).item():
                problems.append(f"column {own}: {n} of {len(rows)} rows say something else with the images exchanged")
    return problems


def _is_other(here: pl.Expr, there: pl.Expr, dtype: pl.DataType | type[pl.DataType], tolerance: float) -> pl.Expr:
    if dtype not in (pl.Float32, pl.Float64):
        return here.ne_missing(there)
    is_near = (here - there).abs() <= tolerance * pl.max_horizontal(1.0, here.abs())
    return (here.is_null() != there.is_null()) | ~is_near.fill_null(True)
