"""The label steps on a store: read tables, call one pure function, commit. What Dagster and the command line both call.

Belongs here: which tables a step reads and which parameters enter its fingerprint. Does not belong here: mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import polars as pl

from pipelines import catalogue, schemas
from pipelines.config import Config
from pipelines.labels import annotators as ann
from pipelines.labels import calibration as cal
from pipelines.labels import consensus as con
from pipelines.labels import margins as mar
from pipelines.labels import minority as mino
from pipelines.labels import preferences as pref
from pipelines.labels import smoothed as smo
from pipelines.scoring import batches
from pipelines.tables import Built, Manifest, Store, StoreError

CODE_VERSION = "5"
_COSINES = ("clip", "hpsv2", "hpsv2.1")
"""Kinds whose score is a cosine as it is; PickScore's is one times the scale that its manifests name."""


class Labels:
    """The label tables of a store under a configuration; each method builds one table or reuses it.

    What several steps of one process read is read once.
    """

    def __init__(self, store: Store, config: Config, shard_keys: list[str]) -> None:
        self.store, self.config, self.shard_keys = store, config, shard_keys
        self.scorers = [s.name for s in config.scorers]

    # --- what steps read -----------------------------------------------------------------------------------------

    @cached_property
    def _scored(self) -> dict[str, list[Manifest]]:
        """The commits of the active scores of every scorer."""
        catalogue.require_current(self.store, self.shard_keys)
        current = batches.require_active(self.store, self.config, self.shard_keys)
        return {
            s: self.store.require_all("scores", [batches.partition(s, current[s], k) for k in self.shard_keys])
            for s in self.scorers
        }

    @cached_property
    def _voted(self) -> list[Manifest]:
        """The commits of votes and of what the catalogue says of them."""
        votes = self.store.require_all("votes", self.shard_keys)
        return [*votes, *(self.store.require(t) for t in ("catalogue_votes", "catalogue_pairs"))]

    def _inputs(self, *labels: str) -> list[Manifest]:
        """Return the commits of votes and of label tables, these made from what lies there now."""
        scores = [m for manifests in self._scored.values() for m in manifests]
        seen = {"margins": [*self._voted, *scores]}
        return [*self._voted, *(self.store.require_current(t, made_from=seen.get(t, ())) for t in labels)]

    @cached_property
    def _pairs(self) -> pl.DataFrame:
        return catalogue.all_pairs(self.store).collect()

    @cached_property
    def _all_votes(self) -> pl.DataFrame:
        columns = ("vote_id", "pair_id", "annotator_id", "label_0", "was_swapped", "source", "model_0", "model_1")
        votes = catalogue.resolved_votes(self.store, self.shard_keys).filter(pl.col("pair_id").is_not_null())
        names = pl.col("source", "model_0", "model_1").cast(pl.Categorical)
        votes = votes.select(*columns, people=catalogue.PEOPLE, counts=pl.col("status") == "ok").with_columns(names)
        found = votes.collect()
        # The pairs are those of margins, in its order.
        return found.with_columns(row=pl.Series(mar.rows_of(self._pairs, found["pair_id"])))

    @cached_property
    def _votes(self) -> pl.DataFrame:
        return self._all_votes.filter("counts")

    @cached_property
    def _margins(self) -> pl.DataFrame:
        """The margins, with the ids of the pairs that they were made from: the same texts lie in memory once."""
        columns = [c for c in schemas.MARGINS.of(self.scorers).polars_schema if c not in ("pair_id", "prompt_id")]
        return self._pairs.select("pair_id", "prompt_id").hstack(self._read(schemas.MARGINS, *columns))

    @cached_property
    def _calibration(self) -> pl.DataFrame:
        return self.store.read(schemas.CALIBRATION)

    @cached_property
    def _metrics(self) -> pl.DataFrame:
        return pl.concat(mino.pair_metrics(m, self._calibration, self.scorers) for m in self._pieces())

    def _pieces(self) -> Iterator[pl.DataFrame]:
        return (self._margins.slice(start, mar.ROWS) for start in mar.starts(len(self._margins)))

    def _scores(self) -> pl.DataFrame:
        """Return image_id, prompt_id and a column of scores per scorer, null where it has none."""
        result = pl.DataFrame()
        for scorer, commits in self._scored.items():
            scan = self.store.scan(schemas.SCORES, partitions=[m.partition for m in commits])
            found = scan.select("image_id", "prompt_id", pl.col("score").alias(scorer)).collect()
            # Every scorer's file of a shard has a row for every (image, prompt) that the shard owns, sorted.
            if len(result) and not found.drop(scorer).equals(result.select("image_id", "prompt_id")):
                raise StoreError(
                    f"{self.store.location}: scores of {scorer} have other (image, prompt) rows than those of "
                    f"{self.scorers[0]}; score both again (`python -m pipelines score`)"
                )
            result = result.with_columns(found[scorer]) if len(result) else found
        return result

    def _logit_scales(self) -> dict[str, float]:
        """Return scorer -> factor of the cosine in its score, where it is one."""
        found: dict[str, float] = {}
        for scorer in self.config.scorers:
            if scorer.kind in _COSINES:
                found[scorer.name] = 1.0
            elif scorer.kind == "pickscore":
                named = [m.extra["logit_scale"] for m in self._scored[scorer.name] if "logit_scale" in m.extra]
                found |= {scorer.name: named[0]} if named else {}
        return found

    def _models(self) -> pl.DataFrame:
        """Return pair_id, model_0, model_1 of pairs whose generators their votes name; of several names the first."""
        named = self._all_votes.select("pair_id", "model_0", "model_1").drop_nulls()
        if not len(named):
            return named
        return named.group_by("pair_id").agg(pl.col("model_0", "model_1").cast(pl.String).min())

    def _read(self, table: schemas.Table, *columns: str) -> pl.DataFrame:
        """Return some columns of a label table."""
        self.store.require(table.name)
        return self.store.scan(table, partitions=["all"]).select(columns).collect()

    def _of_preferences(self, table: schemas.Table) -> pl.DataFrame:
        """Return the columns that preferences takes over."""
        return self._read(table, *(c for c in table.polars_schema if c in schemas.PREFERENCES.polars_schema))

    def _images(self) -> pl.DataFrame:
        """Return image_id, status, reason of every image that is not ok in some shard."""
        images = self.store.scan(schemas.IMAGES, partitions=self.shard_keys).select("image_id", "status", "reason")
        bad = images.filter(pl.col("status") != "ok").collect()
        return images.filter(pl.col("image_id").is_in(bad["image_id"].unique().implode())).collect()

    # --- the steps ---------------------------------------------------------------------------------------------

    def margins(self) -> Built:
        """Build `margins`."""
        scores = [m for manifests in self._scored.values() for m in manifests]
        return self.store.build(
            schemas.MARGINS,
            lambda: mar.margins(self._pairs, self._scores(), self._models(), self.scorers),
            inputs=[*self._voted, *scores],
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers},
        )

    def calibration(self) -> Built:
        """Build `calibration`."""
        term = self.config.labels.generator_term
        scales = self._logit_scales()
        return self.store.build(
            schemas.CALIBRATION,
            lambda: cal.calibrate(self._margins, self._votes, self.scorers, logit_scales=scales, generator_term=term),
            inputs=self._inputs("margins"),
            code_version=CODE_VERSION,
            parameters={
                "scorers": self.scorers,
                "folds": mar.FOLDS,
                "equality": cal.PROMPTS_OF_EQUALITY,
                "generator_term": term,
                "logit_scales": scales,
            },
        )

    def reliability(self) -> Built:
        """Build `reliability`."""
        return self.store.build(
            schemas.RELIABILITY,
            lambda: cal.reliability(self._margins, self._calibration, self._votes, self.scorers),
            inputs=self._inputs("margins", "calibration"),
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers},
        )

    def consensus(self) -> Built:
        """Build `consensus`."""
        labels = self.config.labels
        options = {
            "tie_policy": labels.tie_policy,
            "tie_breaker": labels.tie_breaker,
            "human_votes": labels.human_votes,
            "seed": labels.seed,
        }

        def make() -> Iterator[pl.DataFrame]:
            rms = mar.rms(mar.matrix(self._margins, self.scorers))
            human = self._pairs["human_label_0"]
            for start, piece in zip(mar.starts(len(human)), self._pieces(), strict=True):
                of_piece = human.slice(start, mar.ROWS)
                yield con.consensus(piece, of_piece, self.scorers, **options, rms=rms)  # type: ignore[arg-type]

        return self.store.build(
            schemas.CONSENSUS,
            make,
            inputs=self._inputs("margins"),
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers, **options},
        )

    def consensus_report(self) -> Built:
        """Build `consensus_report`."""
        return self.store.build(
            schemas.CONSENSUS_REPORT,
            lambda: con.report(
                self.store.read(schemas.CONSENSUS),
                self._margins,
                cal.votes_per_pair(self._margins, self._votes),
                self.scorers,
            ),
            inputs=self._inputs("margins", "consensus"),
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers},
        )

    def smoothed(self) -> Built:
        """Build `smoothed`."""
        of_pickscore = [s.name for s in self.config.scorers if s.kind == "pickscore"]
        smpo = self.config.labels.smpo_scorer or [*of_pickscore, self.scorers[0]][0]
        published = self.config.labels.smpo_constants == "published"
        return self.store.build(
            schemas.SMOOTHED,
            lambda: smo.smoothed(self._margins, self._calibration, self.scorers, smpo, published_constants=published),
            inputs=self._inputs("margins", "calibration"),
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers, "smpo_scorer": smpo, "published_constants": published},
        )

    def minority(self) -> Built:
        """Build `minority`; its manifest says what minority_probability was learned from."""
        lessons: list[mino.Lesson] = []

        def make() -> pl.DataFrame:
            table, lesson = mino.minority(self._votes, self._margins, self._metrics, em=self.config.labels.em)
            lessons.append(lesson)
            return table

        return self.store.build(
            schemas.MINORITY,
            make,
            inputs=self._inputs("margins", "calibration"),
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers, "rho": mino.RHO, "em": self.config.labels.em},
            extra=lambda: lessons[0].facts(),
        )

    def annotators(self) -> Built:
        """Build `annotators`."""
        return self.store.build(
            schemas.ANNOTATORS,
            lambda: ann.annotators(self._votes, self._margins, self.store.read(schemas.MINORITY)),
            inputs=self._inputs("margins", "minority"),
            code_version=CODE_VERSION,
        )

    def rater_agreement(self) -> Built:
        """Build `rater_agreement`."""
        return self.store.build(
            schemas.RATER_AGREEMENT,
            lambda: ann.rater_agreement(self._votes, self._margins),
            inputs=self._inputs("margins"),
            code_version=CODE_VERSION,
        )

    def preferences(self) -> Built:
        """Build `preferences`."""

        def make() -> Iterator[pl.DataFrame]:
            scores = batches.current_scores(self.store, self.scorers, self.shard_keys)
            return pref.preferences(
                pairs=self._pairs,
                prompts=self.store.read(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt", "split"),
                votes=self._votes,
                sources=self._all_votes.select("row", "source"),
                margins=self._margins,
                metrics=self._metrics,
                minority=self._read(schemas.MINORITY, "pair_id", "label_0", "people", "minority_probability"),
                consensus=self._of_preferences(schemas.CONSENSUS),
                smoothed=self._of_preferences(schemas.SMOOTHED),
                problems=scores.filter(pl.col("status") != "ok").drop("score").collect(),
                images=self._images(),
                scorers=self.scorers,
            )

        # Imported scores stay as they are when bytes come or go.
        images = self.store.require_all("images", self.shard_keys)
        prompts = self.store.require(schemas.CATALOGUE_PROMPTS.name)
        scores = [m for manifests in self._scored.values() for m in manifests]
        labels = self._inputs("margins", "calibration", "consensus", "smoothed", "minority")
        return self.store.build(
            schemas.PREFERENCES,
            make,
            inputs=[*labels, prompts, *images, *scores],
            code_version=CODE_VERSION,
            parameters={"scorers": self.scorers},
        )


LABEL_TABLES: dict[str, tuple[str, ...]] = {
    "margins": (),
    "calibration": ("margins",),
    "reliability": ("margins", "calibration"),
    "consensus": ("margins",),
    "consensus_report": ("margins", "consensus"),
    "smoothed": ("margins", "calibration"),
    "minority": ("margins", "calibration"),
    "annotators": ("margins", "minority"),
    "rater_agreement": ("margins",),
    "preferences": ("margins", "calibration", "consensus", "smoothed", "minority"),
}
"""Methods of Labels in an order in which they can run, and the label tables that each reads."""
