"""The label steps on a store: read tables, call one pure function, commit. What Dagster and the command line both call.

Belongs here: which tables a step reads and which parameters enter its fingerprint. Does not belong here: mathematics.
"""

from __future__ import annotations

import polars as pl

from pipelines import catalogue, curation, schemas
from pipelines.config import Config
from pipelines.labels import calibration as cal
from pipelines.labels import consensus as con
from pipelines.labels import margins, smoothed
from pipelines.labels import minority as mino
from pipelines.scoring import batches
from pipelines.tables import Built, Manifest, Store

CODE_VERSION = "4"


class Labels:
    """The label tables of a store under a configuration; each method builds one table or reuses it."""

    def __init__(self, store: Store, config: Config, shard_keys: list[str]) -> None:
        self.store, self.config, self.shard_keys = store, config, shard_keys
        self.scorers = [s.name for s in config.scorers]
        self._differences: pl.DataFrame | None = None

    def _inputs(self, *tables: str) -> list[Manifest]:
        """Return the commits of votes, the catalogue's view of them, active scores, and the whole tables named."""
        catalogue.require_current(self.store, self.shard_keys)
        current = batches.require_active(self.store, self.config, self.shard_keys)
        wanted = [batches.partition(s, current[s], k) for s in self.scorers for k in self.shard_keys]
        scores, votes = self.store.require_all("scores", wanted), self.store.require_all("votes", self.shard_keys)
        over_all = [self.store.require(t) for t in ("catalogue_votes", "catalogue_pairs")]
        return [*votes, *over_all, *scores, *(self.store.require(t) for t in tables)]

    def _scores(self) -> pl.LazyFrame:
        return batches.current_scores(self.store, self.scorers, self.shard_keys)

    def _votes(self) -> pl.LazyFrame:
        return catalogue.counted_votes(self.store, self.shard_keys)

    def differences(self) -> pl.DataFrame:
        """Return the scorers' differences per pair (kept for the steps of one process)."""
        if self._differences is None:
            pairs = catalogue.all_pairs(self.store)
            self._differences = margins.differences(pairs, self._scores(), self.scorers)
        return self._differences

    def _human(self) -> pl.DataFrame:
        return catalogue.all_pairs(self.store).select("pair_id", "human_label_0").drop_nulls().collect()

    def calibration(self) -> Built:
        """Build `calibration`."""

        def make() -> pl.DataFrame:
            ranges = (
                self._scores().group_by("scorer").agg(low=pl.col("score").min(), high=pl.col("score").max()).collect()
            )
            votes = self._votes().select("pair_id", "label_0", people=catalogue.PEOPLE).collect()
            return cal.calibrate(self.differences(), votes, ranges, self.scorers)

        parameters = {"scorers": self.scorers, "folds": margins.FOLDS, "ridge": cal.RIDGE}
        return self.store.build(
            schemas.CALIBRATION, make, inputs=self._inputs(), code_version=CODE_VERSION, parameters=parameters
        )

    def consensus(self) -> Built:
        """Build `consensus`."""
        labels = self.config.labels
        parameters = {"scorers": self.scorers, "tie_policy": labels.tie_policy, "tie_breaker": labels.tie_breaker}
        return self.store.build(
            schemas.CONSENSUS,
            lambda: con.consensus(
                self.differences(), self._human(), self.scorers, labels.tie_policy, labels.tie_breaker
            ),
            inputs=self._inputs(),
            code_version=CODE_VERSION,
            parameters=parameters,
        )

    def smoothed(self) -> Built:
        """Build `smoothed`."""
        smpo = next((s.name for s in self.config.scorers if s.kind == "pickscore"), self.scorers[0])
        return self.store.build(
            schemas.SMOOTHED,
            lambda: smoothed.smoothed(self.differences(), self.store.read(schemas.CALIBRATION), self.scorers, smpo),
            inputs=self._inputs("calibration"),
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers, "smpo_scorer": smpo},
        )

    def _sides(self) -> pl.DataFrame:
        return mino.side_metrics(self.differences(), self.store.read(schemas.CALIBRATION), self.scorers)

    def minority(self) -> Built:
        """Build `minority`."""
        return self.store.build(
            schemas.MINORITY,
            lambda: mino.minority(self._votes().collect(), self._sides()),
            inputs=self._inputs("calibration"),
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers, "rho": mino.RHO},
        )

    def preferences(self) -> Built:
        """Build `preferences`."""

        def make() -> pl.DataFrame:
            return curation.preferences(
                pairs=catalogue.all_pairs(self.store),
                prompts=self.store.scan(schemas.CATALOGUE_PROMPTS),
                votes=self._votes(),
                vote_sources=catalogue.resolved_votes(self.store, self.shard_keys),
                scores=self._scores(),
                sides=self._sides(),
                consensus=self.store.scan(schemas.CONSENSUS),
                smoothed=self.store.scan(schemas.SMOOTHED),
                images=self.store.scan(schemas.IMAGES, partitions=self.shard_keys).select(
                    "image_id", "status", "reason"
                ),
            )

        # Imported scores stay as they are when bytes come or go.
        images = self.store.require_all("images", self.shard_keys)

        return self.store.build(
            schemas.PREFERENCES,
            make,
            inputs=[*self._inputs("calibration", "consensus", "smoothed", "catalogue_prompts"), *images],
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers},
        )


LABEL_TABLES = ("calibration", "consensus", "smoothed", "minority", "preferences")
"""Methods of Labels in the order in which they depend on each other."""
