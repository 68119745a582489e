"""The label steps on a store: read tables, call one pure function, commit. What Dagster and the command line both call.

Belongs here: which tables a step reads and which parameters enter its fingerprint. Does not belong here: mathematics.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import polars as pl

from pipelines import catalogue, schemas
from pipelines.config import Config, ConfigError
from pipelines.files import open_uri, services_as_oserror
from pipelines.identity import fingerprint
from pipelines.labels import annotators as ann
from pipelines.labels import calibration as cal
from pipelines.labels import consensus as con
from pipelines.labels import drift as dri
from pipelines.labels import groups as gro
from pipelines.labels import margins as mar
from pipelines.labels import minority as mino
from pipelines.labels import preferences as pref
from pipelines.labels import smoothed as smo
from pipelines.scoring import batches
from pipelines.tables import Built, Manifest, Store, StoreError, made_of

CODE_VERSION = "5"
DRIFT_VERSION = "1"
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

    def _inputs(self, name: str) -> list[Manifest]:
        """Return the commits of everything that a label table is made from."""
        found = [*self._voted, *(self.current(t) for t in LABEL_TABLES[name])]
        if name in ("margins", "preferences"):
            found += [m for manifests in self._scored.values() for m in manifests]
        if name == "preferences":
            # Imported scores stay as they are when bytes come or go.
            images = self.store.require_all("images", self.shard_keys)
            found += [self.store.require(schemas.CATALOGUE_PROMPTS.name), *images]
        return found

    def current(self, name: str) -> Manifest:
        """Return the commit of a label table that is what this configuration and program would make now.

        Raises:
            StoreError: it is missing, older than its inputs, or made under other options or by another program.
        """
        inputs = self._inputs(name)
        manifest = self.store.require_current(name, made_from=inputs)
        contents = {f"{m.table}/{m.partition}": m.content for m in inputs}
        if manifest.fingerprint != made_of(schemas.TABLES[name], contents, CODE_VERSION, self._parameters(name)):
            raise StoreError(
                f"{self.store.location}: {name} was made under other options (labels, scorers) or by another version of the "
                f"program; materialize {name} again (`python -m pipelines label`, or the asset in Dagster)"
            )
        return manifest

    def _parameters(self, name: str) -> dict[str, Any]:
        """Return the options and constants that a label table depends on."""
        labels = self.config.labels
        own: dict[str, dict[str, Any]] = {
            "calibration": {
                "folds": mar.FOLDS,
                "penalties": [cal.RIDGE, cal.PROMPTS_OF_EQUALITY, cal.GENERATOR_PROMPTS],
                "generator_term": labels.generator_term,
                "logit_scales": self._logit_scales,
            },
            "consensus": self.consensus_options,
            "smoothed": {"smpo_scorer": self.smpo_scorer, "constants": labels.smpo_constants},
            "minority": {
                "rho": mino.RHO,
                "prior_votes": mino.PRIOR_VOTES,
                "doubt": mino.PROMPTS_OF_DOUBT,
                "least": [mino.LEAST_VOTES, mino.LEAST_TARGETS],
                "em": labels.em,
            },
            "annotator_groups": {
                "votes": [gro.LEAST_VOTES, gro.PRIOR_VOTES],
                "most": gro.MOST_GROUPS,
                "restarts": gro.RESTARTS,
                "given": hashlib.sha256(self._groups_file).hexdigest() if labels.groups_file else "",
            },
        }
        return {"scorers": self.scorers, **own.get(name, {})}

    def _build(
        self,
        name: str,
        make: Callable[[], pl.DataFrame | Iterable[pl.DataFrame]],
        extra: Callable[[], Mapping[str, Any]] | None = None,
    ) -> Built:
        return self.store.build(
            schemas.TABLES[name],
            make,
            inputs=self._inputs(name),
            code_version=CODE_VERSION,
            parameters=self._parameters(name),
            extra=extra,
        )

    @property
    def consensus_options(self) -> dict[str, Any]:
        """Return the options of consensus."""
        labels = self.config.labels
        names = ("tie_policy", "tie_breaker", "human_votes", "seed")
        return {n: getattr(labels, n) for n in names}

    @property
    def smpo_scorer(self) -> str:
        """Return the scorer of p_smpo."""
        of_pickscore = [s.name for s in self.config.scorers if s.kind == "pickscore"]
        return self.config.labels.smpo_scorer or [*of_pickscore, self.scorers[0]][0]

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
            if result.width and not found.drop(scorer).equals(result.select("image_id", "prompt_id")):
                raise StoreError(
                    f"{self.store.location}: scores of {scorer} have other (image, prompt) rows than those of "
                    f"{self.scorers[0]}; score both again (`python -m pipelines score`)"
                )
            result = result.with_columns(found[scorer]) if result.width else found
        return result

    @cached_property
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

    @cached_property
    def _groups_file(self) -> bytes:
        """The content of labels.groups_file.

        Raises:
            ConfigError: it cannot be read.
        """
        file = self.config.labels.groups_file
        try:
            with services_as_oserror(file), open_uri(file) as handle:
                return handle.read()
        except OSError as error:
            raise ConfigError(
                f"labels.groups_file: {file}: {error.strerror or error}; name a parquet file, or none to have groups found"
            ) from error

    def _given_groups(self) -> pl.DataFrame:
        try:
            return pl.read_parquet(io.BytesIO(self._groups_file))
        except pl.exceptions.PolarsError as error:
            raise ConfigError(f"labels.groups_file: {self.config.labels.groups_file}: not parquet: {error}") from error

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
        """Build `margins`.

        Raises:
            StoreError: a score is NaN or infinite.
        """

        def make() -> pl.DataFrame:
            models = mar.models(self._all_votes, self._pairs)
            try:
                return mar.margins(self._pairs, self._scores(), models, self.scorers)
            except ValueError as error:
                raise StoreError(
                    f"{self.store.location}: {error}; score again (`python -m pipelines score`)"
                ) from error

        return self._build("margins", make)

    def calibration(self) -> Built:
        """Build `calibration`."""
        options = {"logit_scales": self._logit_scales, "generator_term": self.config.labels.generator_term}
        return self._build(
            "calibration",
            lambda: cal.calibrate(self._margins, self._votes, self.scorers, **options),  # type: ignore[arg-type]
        )

    def reliability(self) -> Built:
        """Build `reliability`."""
        return self._build(
            "reliability", lambda: cal.reliability(self._margins, self._calibration, self._votes, self.scorers)
        )

    def consensus(self) -> Built:
        """Build `consensus`."""

        def make() -> Iterator[pl.DataFrame]:
            rms = mar.rms(mar.matrix(self._margins, self.scorers))
            human = self._pairs["human_label_0"]
            for start, piece in zip(mar.starts(len(human)), self._pieces(), strict=True):
                of_piece = human.slice(start, mar.ROWS)
                yield con.consensus(piece, of_piece, self.scorers, **self.consensus_options, rms=rms)

        return self._build("consensus", make)

    def consensus_report(self) -> Built:
        """Build `consensus_report`."""

        def make() -> pl.DataFrame:
            humans = cal.votes_per_pair(self._margins, self._votes)
            return con.report(self.store.read(schemas.CONSENSUS), self._margins, humans, self.scorers)

        return self._build("consensus_report", make)

    def smoothed(self) -> Built:
        """Build `smoothed`.

        Raises:
            ConfigError: labels.smpo_constants is 'published', and the scorer of p_smpo is no PickScore of ours.
        """
        published, scorer = self.config.labels.smpo_constants == "published", self.smpo_scorer
        kind = next(s.kind for s in self.config.scorers if s.name == scorer)
        if published and (kind != "pickscore" or scorer not in self._logit_scales):
            raise ConfigError(
                f"labels.smpo_constants: the published constants are cosines of PickScore, and {scorer!r} is of kind "
                f"{kind!r} (or its scores do not name their scale); set labels.smpo_scorer to one of kind 'pickscore', or "
                f"smpo_constants to 'data'"
            )
        return self._build(
            "smoothed",
            lambda: (
                smo.smoothed(m, self._calibration, self.scorers, scorer, published_constants=published)
                for m in self._pieces()
            ),
        )

    def minority(self) -> Built:
        """Build `minority`; its manifest says what minority_probability was learned from."""
        lessons: list[mino.Lesson] = []

        def make() -> pl.DataFrame:
            table, lesson = mino.minority(self._votes, self._margins, self._metrics, em=self.config.labels.em)
            lessons.append(lesson)
            return table

        return self._build("minority", make, lambda: lessons[0].facts())

    def annotators(self) -> Built:
        """Build `annotators`."""
        return self._build(
            "annotators", lambda: ann.annotators(self._votes, self._margins, self.store.read(schemas.MINORITY))
        )

    def rater_agreement(self) -> Built:
        """Build `rater_agreement`."""
        return self._build("rater_agreement", lambda: ann.rater_agreement(self._votes, self._margins))

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

        return self._build("preferences", make)

    def annotator_groups(self) -> Built:
        """Build `annotator_groups`; its manifest says how many groups held-out votes show.

        Raises:
            ConfigError: labels.groups_file cannot be read, or does not hold groups.
        """
        findings: list[gro.Finding] = []

        def make() -> pl.DataFrame:
            if self.config.labels.groups_file:
                given = self._given_groups()
                try:
                    found = gro.given_groups(self._votes, self._margins, self.scorers, given)
                except ValueError as error:
                    raise ConfigError(f"labels.groups_file: {self.config.labels.groups_file}: {error}") from error
            else:
                found = gro.annotator_groups(self._votes, self._margins, self.scorers)
            findings.append(found[1])
            return found[0]

        return self._build("annotator_groups", make, lambda: findings[0].facts())

    def pair_groups(self) -> Built:
        """Build `pair_groups`."""

        def make() -> pl.DataFrame:
            return gro.pair_groups(
                self._pairs, self._votes, self._read(schemas.ANNOTATOR_GROUPS, "annotator_id", "group")
            )

        return self._build("pair_groups", make)

    # --- drift -------------------------------------------------------------------------------------------------

    def drift(self) -> dict[str, Built]:
        """Measure the active revisions on the frozen sample, drawn if there is none; return what was built, by table.

        A measurement of other revisions is kept. What is measured under the same ones again (a source left, votes came)
        takes the place of the latest.

        Raises:
            StoreError: margins or consensus is missing or old, or a measurement is of another sample.
        """
        frozen = self._frozen_sample()
        measured = self._frozen_labels(frozen.manifest)
        commits = self._measurements(frozen.manifest)

        def make() -> pl.DataFrame:
            made = [
                dri.Measurement(
                    m.extra["measurement"], m.extra["revisions"], self.store.read(schemas.FROZEN_LABELS, m.partition)
                )
                for m in commits
            ]
            return dri.drift(self.store.read(schemas.FROZEN_SAMPLE), made)

        built = self.store.build(schemas.DRIFT, make, inputs=[frozen.manifest, *commits], code_version=DRIFT_VERSION)
        return {b.manifest.table: b for b in (frozen, measured, built)}

    def _frozen_sample(self) -> Built:
        kept = self.store.manifest(schemas.FROZEN_SAMPLE.name)
        # An empty one measures nothing, and would for ever.
        if kept is not None and kept.rows:
            return Built(kept, True)
        return self.store.build(
            schemas.FROZEN_SAMPLE,
            lambda: dri.sample(self._pairs, self.config.checks.sample_pairs),
            inputs=[self.store.require("catalogue_pairs")],
            code_version=DRIFT_VERSION,
            parameters={"sample_pairs": self.config.checks.sample_pairs},
        )

    def _measurements(self, frozen: Manifest) -> list[Manifest]:
        """Return the commits of the measurements in their order; what an empty sample gave is none."""
        commits = [m for m in self.store.manifests(schemas.FROZEN_LABELS.name) if m.rows]
        commits.sort(key=lambda commit: int(commit.extra["measurement"]))
        for commit in commits:
            if commit.inputs["frozen_sample/all"] != frozen.content:
                raise StoreError(
                    f"{self.store.location}: frozen_labels/{commit.partition} was measured on another frozen_sample than the "
                    f"present one; bring that one back, or remove the folders frozen_labels and _manifests/frozen_labels"
                )
        return commits

    def _frozen_labels(self, frozen: Manifest) -> Built:
        # The active revisions are read behind the check that the margins are made from them.
        tables = [self.current(t) for t in ("margins", "consensus")]
        active = self.store.current_revisions()
        revisions = {s: active[s] for s in self.scorers}
        options = {n: v for n, v in self.consensus_options.items() if n != "seed"}
        revisions[dri.CONSENSUS] = fingerprint(revisions=revisions, consensus=options)[:12]
        earlier = self._measurements(frozen)
        is_same = bool(earlier) and earlier[-1].extra["revisions"] == revisions
        number = earlier[-1].extra["measurement"] + (not is_same) if earlier else 1

        def make() -> pl.DataFrame:
            sample = self.store.read(schemas.FROZEN_SAMPLE)
            margins, consensus = (
                self.store.scan(t, partitions=["all"])
                .join(sample.lazy().select("pair_id"), on="pair_id", how="semi")
                .collect()
                for t in (schemas.MARGINS, schemas.CONSENSUS)
            )
            return dri.measure(number, sample, margins, consensus, self.scorers)

        return self.store.build(
            schemas.FROZEN_LABELS,
            make,
            inputs=[frozen, *tables],
            code_version=DRIFT_VERSION,
            parameters={"measurement": number, "revisions": revisions},
            partition=f"{number:04d}-{revisions[dri.CONSENSUS]}",
            extra=lambda: {"measurement": number, "revisions": revisions},
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
    "annotator_groups": ("margins",),
    "pair_groups": ("annotator_groups",),
}
"""Methods of Labels in an order in which they can run, and the label tables that each reads."""
