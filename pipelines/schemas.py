"""Every table of the store, declared once: columns, types, units, meaning, rules.

Types on write, checks, the columns shown in Dagster and the data dictionary all derive from these declarations.
Belongs here: what a table is. Does not belong here: how it is stored (`tables`) or computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypedDict

import polars as pl
import pyarrow as pa


class SchemaError(ValueError):
    """A frame does not fit its table's declaration."""


SCORER = "{scorer}"
"""In the name of a column: there is one such column for every configured scorer."""


@dataclass(frozen=True)
class Column:
    """One column: polars type, meaning with unit, whether null is allowed, and the values or range allowed."""

    name: str
    dtype: pl.DataType | type[pl.DataType]
    meaning: str
    nullable: bool = False
    values: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Table:
    """One table: what a row is, its columns, its key (unique within a partition) and how it is cut into files."""

    name: str
    row: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    cut_by: str
    version: int = 1

    @property
    def polars_schema(self) -> dict[str, pl.DataType | type[pl.DataType]]:
        """Return column name -> polars type, in the table's order; without the columns that scorers bring (see `of`)."""
        return {c.name: c.dtype for c in self.columns if SCORER not in c.name}

    def of(self, scorers: Iterable[str]) -> Table:
        """Return this table with one column for each of these scorers in place of every column '...{scorer}'."""
        names = list(scorers)
        columns = [
            replace(c, name=c.name.replace(SCORER, n), meaning=c.meaning.replace(SCORER, n))
            for c in self.columns
            for n in (names if SCORER in c.name else [""])
        ]
        return replace(self, columns=tuple(columns))

    def scorers(self, found: Iterable[str]) -> list[str]:
        """Return the scorers whose columns are among these, in their order."""
        templates = [c.name.replace(SCORER, "") for c in self.columns if SCORER in c.name]
        if not templates:
            return []
        fixed = self.polars_schema
        names = [f for f in found if f not in fixed and f.startswith(templates[0])]
        return [n.removeprefix(templates[0]) for n in names]

    def empty(self) -> pl.DataFrame:
        """Return a frame of this table without rows."""
        return pl.DataFrame(schema=self.polars_schema)

    def conform(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return `frame` with exactly this table's columns, order and types, its rules checked.

        Raises:
            SchemaError: a column is missing, unknown, of another type, or breaks its rule (null, value, range, NaN).
        """
        if any(SCORER in c.name for c in self.columns):
            return self.of(self.scorers(frame.columns)).conform(frame)
        expected, found = [c.name for c in self.columns], frame.columns
        if missing := [c for c in expected if c not in found]:
            raise SchemaError(f"table {self.name}: missing columns {missing}; expected {expected}, found {found}")
        if extra := [c for c in found if c not in expected]:
            raise SchemaError(f"table {self.name}: unknown columns {extra}; declare them in pipelines/schemas.py")
        for c in self.columns:
            if _is_other_type(frame.schema[c.name], c.dtype):
                raise SchemaError(
                    f"table {self.name}, column {c.name}: expected {c.dtype}, found {frame.schema[c.name]}"
                )
        try:
            frame = frame.select(pl.col(c.name).cast(c.dtype, strict=True) for c in self.columns)
        except (pl.exceptions.InvalidOperationError, pl.exceptions.ComputeError) as error:
            raise SchemaError(f"table {self.name}: a column has another type than declared: {error}") from error
        for column in self.columns:
            self._check(column, frame[column.name])
        return frame

    def conform_arrow(self, table: pa.Table) -> pa.Table:
        """Return an arrow table with this table's columns and types; binary columns pass through without a copy.

        Raises:
            SchemaError: see conform.
        """
        blobs = [c.name for c in self.columns if c.dtype == pl.Binary and c.name in table.column_names]
        rest = replace(self, columns=tuple(c for c in self.columns if c.name not in blobs))
        plain = pl.from_arrow(table.drop_columns(blobs))
        assert isinstance(plain, pl.DataFrame)
        checked = rest.conform(plain).to_arrow(compat_level=pl.CompatLevel.oldest())
        for i, column in enumerate(self.columns):
            if column.name in blobs:
                checked = checked.add_column(i, column.name, table[column.name].cast(pa.large_binary()))
                if not column.nullable and table[column.name].null_count:
                    raise SchemaError(f"table {self.name}, column {column.name}: nulls, none allowed")
        return checked

    def _check(self, column: Column, values: pl.Series) -> None:
        where = f"table {self.name}, column {column.name}"
        if not column.nullable and values.null_count():
            raise SchemaError(f"{where}: {values.null_count()} nulls, none allowed")
        if values.dtype.is_float() and values.is_nan().any():
            raise SchemaError(f"{where}: {int(values.is_nan().sum())} NaN; an unknown number is null, with a status")
        if column.values and (odd := set(values.drop_nulls().unique()) - set(column.values)):
            raise SchemaError(f"{where}: found {sorted(odd)}, allowed {list(column.values)}")
        if column.low is not None and (values < column.low).any():
            raise SchemaError(f"{where}: minimum {values.min()!r} is below {column.low}")
        if column.high is not None and (values > column.high).any():
            raise SchemaError(f"{where}: maximum {values.max()!r} is above {column.high}")


def _is_other_type(found: pl.DataType, declared: pl.DataType | type[pl.DataType]) -> bool:
    """Return whether `found` would have to be reinterpreted, not only widened or narrowed, to be `declared`."""
    if found in (declared, pl.Null):
        return False
    if found.is_numeric() and declared.is_numeric():
        return found.is_float() and declared.is_integer()
    if declared == pl.String:
        return found not in (pl.Categorical, pl.Enum)
    return not (isinstance(found, pl.Datetime) and declared == pl.Datetime)


VOTE_STATUSES = (
    "ok",
    "unlabelled",
    "invalid_label",
    "no_prompt",
    "no_image",
    "same_image",
    "duplicate_of",
    "unreadable",
)
IMAGE_STATUSES = ("ok", "no_bytes", "missing", "refused", "unreadable", "truncated", "too_large")
SCORE_STATUSES = (*IMAGE_STATUSES, "undecodable", "changed", "not_imported", "unscorable")
SPLITS = ("train", "validation", "test")

_PROMPT_ID = Column("prompt_id", pl.String, "prompt, by its normalised text")
_IMAGE_ID = Column("image_id", pl.String, "image, by its bytes (by its uid where a source has no bytes)")
_PAIR_KEYS = (
    Column("pair_id", pl.String, "pair of images of one prompt, whatever the order shown"),
    _PROMPT_ID,
    Column("image_0_id", pl.String, "first image in id order"),
    Column("image_1_id", pl.String, "second image in id order"),
)


class _Range(TypedDict):
    low: float
    high: float


_PROBABILITY: _Range = {"low": 0.0, "high": 1.0}

VOTES = Table(
    "votes",
    "human judgement of a pair, as recorded",
    (
        Column("vote_id", pl.String, "vote, by source, source_row and rater"),
        *(Column(c.name, c.dtype, c.meaning, nullable=True) for c in _PAIR_KEYS),
        Column("source", pl.String, "name of the source in the configuration"),
        Column("source_row", pl.String, "where the row stands in the source: file and row"),
        Column("rater", pl.Int32, "which vote of the source's row (raters and pairs of a ranking)"),
        Column("annotator_id", pl.String, "'<family>:<id>'; null where unknown", nullable=True),
        Column("label_0", pl.Float64, "preference for image_0: 1, 0.5 (tie) or 0", nullable=True, **_PROBABILITY),
        Column("count", pl.Int64, "people whom this row counts for; null: unknown, or no vote", nullable=True, low=1),
        Column(
            "source_label_0",
            pl.Float64,
            "the source's own verdict for image_0 where it is more than its votes (HPDv3: weighted by ability)",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("source_confidence", pl.Float64, "the source's own confidence in that verdict", nullable=True),
        Column("group_id", pl.String, "ranking or session; rows of one group are not independent", nullable=True),
        Column("was_swapped", pl.Boolean, "image_0 was displayed second; null: not known", nullable=True),
        Column("was_listed_second", pl.Boolean, "image_0 stands second in the source's row"),
        Column("model_0", pl.String, "generator of image_0", nullable=True),
        Column("model_1", pl.String, "generator of image_1", nullable=True),
        Column("created_at", pl.Datetime("us"), "time of the vote, UTC", nullable=True),
        Column("split", pl.String, "split that the source names; null: none", nullable=True, values=SPLITS),
        Column("status", pl.String, "'ok', or why the vote does not count", values=VOTE_STATUSES),
        Column("reason", pl.String, "details of the status", nullable=True),
    ),
    key=("vote_id",),
    cut_by="shard",
    version=2,
)
IMAGES = Table(
    "images",
    "distinct image of a shard",
    (
        _IMAGE_ID,
        Column("sha256", pl.String, "full digest of the bytes", nullable=True),
        Column("bytes", pl.Binary, "encoded image as the source has it; null where it is referred to", nullable=True),
        Column("uri", pl.String, "file of the source that holds the bytes (images.storage = reference)", nullable=True),
        Column("row_group", pl.Int32, "row group of that parquet file", nullable=True),
        Column("row", pl.Int64, "row of that row group", nullable=True),
        Column("image_column", pl.String, "column of that row", nullable=True),
        Column("byte_offset", pl.Int64, "first byte in that archive", nullable=True),
        Column("byte_length", pl.Int64, "bytes in that archive", nullable=True),
        Column("width", pl.Int32, "pixels", nullable=True),
        Column("height", pl.Int32, "pixels", nullable=True),
        Column("format", pl.String, "JPEG, PNG, ...", nullable=True),
        Column("status", pl.String, "of the header; pixels are decoded at scoring", values=IMAGE_STATUSES),
        Column("reason", pl.String, "details of the status", nullable=True),
    ),
    key=("image_id",),
    cut_by="shard",
    version=2,
)
IMAGE_NAMES = Table(
    "image_names",
    "name that a source gives to an image of a shard",
    (
        Column("named_id", pl.String, "the id that the name gives where there are no bytes"),
        _IMAGE_ID,
        Column("family", pl.String, "family of the source"),
        Column("uid", pl.String, "the source's own name of the image"),
    ),
    key=("named_id", "image_id"),
    cut_by="shard",
)
PROMPTS = Table(
    "prompts",
    "distinct prompt of a shard",
    (_PROMPT_ID, Column("prompt", pl.String, "normalised text")),
    ("prompt_id",),
    "shard",
)
_OWNER = Column("owner", pl.String, "shard that scores and caches it")
CATALOGUE_IMAGES = Table("catalogue_images", "image of the store", (_IMAGE_ID, _OWNER), ("image_id",), "whole")
CATALOGUE_NAMES = Table(
    "catalogue_names",
    "id of a name that some shard has bytes for",
    (
        Column("named_id", pl.String, "id by the name, as votes of releases without bytes have it"),
        Column(
            "image_id", pl.String, "the image; where one name has several bytes, a readable one, then the smallest id"
        ),
        Column("images", pl.Int64, "distinct bytes under the name", low=1),
    ),
    ("named_id",),
    "whole",
)
CATALOGUE_PROMPTS = Table(
    "catalogue_prompts",
    "prompt of the store",
    (
        _PROMPT_ID,
        Column("prompt", pl.String, "normalised text"),
        Column("split", pl.String, "one per prompt: test before validation before train", values=SPLITS),
        Column("is_conflict", pl.Boolean, "sources name several splits for it"),
        Column("is_drawn", pl.Boolean, "no source names a split for it: drawn by its id"),
    ),
    ("prompt_id",),
    "whole",
    version=2,
)
CATALOGUE_SCORABLES = Table(
    "catalogue_scorables",
    "(image, prompt) to score",
    (_IMAGE_ID, _PROMPT_ID, _OWNER),
    ("image_id", "prompt_id"),
    "whole",
)
CATALOGUE_VOTES = Table(
    "catalogue_votes",
    "vote that stands otherwise over all shards than its own shard says",
    (
        Column("vote_id", pl.String, "vote"),
        *(Column(c.name, c.dtype, c.meaning, nullable=True) for c in _PAIR_KEYS),
        Column("is_flipped", pl.Boolean, "its images stand in the other order: label_0 and the like turn round"),
        Column("status", pl.String, "status over all shards", values=VOTE_STATUSES),
        Column("reason", pl.String, "details of the status", nullable=True),
    ),
    ("vote_id",),
    "whole",
)
CATALOGUE_PAIRS = Table(
    "catalogue_pairs",
    "pair of the store",
    (
        *_PAIR_KEYS,
        Column(
            "n_votes", pl.Int64, "people whose votes count (status ok, no duplicate; an unknown count is one)", low=0
        ),
        Column("human_label_0", pl.Float64, "mean of those votes", nullable=True, **_PROBABILITY),
        Column(
            "cycle",
            pl.Int64,
            "number of the preference cycle that the pair lies on: following the humans' choices leads back; null: none",
            nullable=True,
        ),
    ),
    ("pair_id",),
    "whole",
)
ACCOUNTING = Table(
    "accounting",
    "source, or 'all'",
    (
        Column("source", pl.String, "name in the configuration; 'all': everything, what sources share counted once"),
        Column("layout", pl.String, "layout that was read", nullable=True),
        Column("shards", pl.Int64, "shards"),
        Column("rows", pl.Int64, "rows (records, samples) of the raw files"),
        Column("votes", pl.Int64, "vote rows made of them: a ranking of n images makes n (n - 1) / 2 per rater"),
        Column("votes_ok", pl.Int64, "of those, votes that count"),
        Column("people", pl.Int64, "people behind the votes that count"),
        Column("ties", pl.Int64, "votes that count and choose neither"),
        Column("unlabelled", pl.Int64, "vote rows without a label"),
        Column("unreadable", pl.Int64, "vote rows of raw rows that could not be read"),
        Column("duplicates", pl.Int64, "vote rows that repeat another, here or in another shard"),
        Column("other_rejected", pl.Int64, "vote rows with another status"),
        Column("pairs", pl.Int64, "distinct pairs with a vote that counts"),
        Column("votes_per_pair", pl.Float64, "people / pairs", nullable=True),
        Column("pairs_in_cycles", pl.Int64, "of those pairs, pairs that lie on a preference cycle"),
        Column("cycles", pl.Int64, "preference cycles (strongly connected groups of images of a prompt)"),
        Column("image_references", pl.Int64, "image places of the raw rows"),
        Column("images", pl.Int64, "distinct images"),
        Column("image_reuse", pl.Float64, "uses of an image in counting votes / images so used", nullable=True),
        Column("images_unusable", pl.Int64, "distinct images whose status is not ok"),
        Column("prompts", pl.Int64, "distinct prompts"),
        Column("prompts_train", pl.Int64, "of those, by resolved split"),
        Column("prompts_validation", pl.Int64, "of those, by resolved split"),
        Column("prompts_test", pl.Int64, "of those, by resolved split"),
        Column("split_conflicts", pl.Int64, "prompts for which sources name several splits"),
        Column("annotators", pl.Int64, "known people"),
        Column("ambiguous_names", pl.Int64, "names of images that have several bytes: one of them stands for all"),
    ),
    ("source",),
    "whole",
)
SCORES = Table(
    "scores",
    "(image, prompt) and reward model",
    (
        _IMAGE_ID,
        _PROMPT_ID,
        Column("score", pl.Float32, "the reward model's published score; null unless status is ok", nullable=True),
        Column(
            "status",
            pl.String,
            "'ok', or why there is no score: the image's status, or undecodable, changed (other bytes than were ingested), "
            "not_imported (no row in the file), unscorable (this scorer's code cannot take the image, others may)",
            values=SCORE_STATUSES,
        ),
        Column("reason", pl.String, "details of the status", nullable=True),
    ),
    key=("image_id", "prompt_id"),
    cut_by="scorer/revision/shard",
)
SCORER_REPORT = Table(
    "scorer_report",
    "scorer and source, or 'all' sources",
    (
        Column("scorer", pl.String, "reward model"),
        Column(
            "source",
            pl.String,
            "name in the configuration, with all that its vote rows name, also where other sources name it too; "
            "'all': everything once",
        ),
        Column("revision", pl.String, "active revision of the scorer"),
        Column("scores", pl.Int64, "(image, prompt) that the source's vote rows name"),
        Column("scores_ok", pl.Int64, "of those, with a score"),
        Column("scores_not_ok", pl.Int64, "of those, without one"),
        Column("statuses_not_ok", pl.String, "why they have none: how many by status, JSON"),
        Column("mean", pl.Float64, "of the scores", nullable=True),
        Column("sd", pl.Float64, "standard deviation of the scores (unbiased)", nullable=True, low=0.0),
        Column("min", pl.Float64, "smallest score", nullable=True),
        Column("q05", pl.Float64, "5 % quantile of the scores, interpolated", nullable=True),
        Column("q25", pl.Float64, "25 % quantile", nullable=True),
        Column("q50", pl.Float64, "median", nullable=True),
        Column("q75", pl.Float64, "75 % quantile", nullable=True),
        Column("q95", pl.Float64, "95 % quantile", nullable=True),
        Column("max", pl.Float64, "largest score", nullable=True),
        Column(
            "histogram",
            pl.String,
            "counts of the scores in equal bins, JSON; what lies outside is in the outermost bins",
            nullable=True,
        ),
        Column("histogram_low", pl.Float64, "lower end of the first bin, the same for all sources", nullable=True),
        Column("histogram_high", pl.Float64, "upper end of the last bin, the same for all sources", nullable=True),
        Column("pairs", pl.Int64, "pairs that the source's vote rows name"),
        Column("pairs_scored", pl.Int64, "of those, with a score of both images"),
        Column("votes_decided", pl.Int64, "people behind the votes that count and choose an image"),
        Column("votes_covered", pl.Int64, "of those people, on pairs with a score of both images"),
        Column(
            "accuracy",
            pl.Float64,
            "share of the covered people whose choice has the higher score; equal scores count half, tied votes not at all",
            nullable=True,
            **_PROBABILITY,
        ),
        Column(
            "accuracy_low",
            pl.Float64,
            "2.5 % quantile of 1,000 bootstrap resamples of the prompts, seed 0",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("accuracy_high", pl.Float64, "97.5 % quantile of the same resamples", nullable=True, **_PROBABILITY),
        Column("pairs_decided", pl.Int64, "scored pairs on which a counted vote chooses an image"),
        Column("share_equal", pl.Float64, "share of those whose two scores are equal", nullable=True, **_PROBABILITY),
    ),
    ("scorer", "source"),
    "whole",
)
_CORRELATION: _Range = {"low": -1.0, "high": 1.0}
SCORER_CORRELATION = Table(
    "scorer_correlation",
    "two scorers, each two once",
    (
        Column("scorer_a", pl.String, "reward model, the earlier one of the configuration"),
        Column("scorer_b", pl.String, "another reward model"),
        Column("scores", pl.Int64, "(image, prompt) with a score of both"),
        Column("pearson", pl.Float64, "correlation of those scores", nullable=True, **_CORRELATION),
        Column("spearman", pl.Float64, "rank correlation of those scores", nullable=True, **_CORRELATION),
        Column("pairs", pl.Int64, "pairs with a difference d of both"),
        Column("pearson_d", pl.Float64, "correlation of those differences", nullable=True, **_CORRELATION),
        Column("spearman_d", pl.Float64, "rank correlation of those differences", nullable=True, **_CORRELATION),
        Column("pairs_decided", pl.Int64, "of those pairs, those on which neither has equal scores"),
        Column(
            "agreement", pl.Float64, "share of those on which both choose the same image", nullable=True, **_PROBABILITY
        ),
    ),
    ("scorer_a", "scorer_b"),
    "whole",
)
SCORER_PRECISION = Table(
    "scorer_precision",
    "scorer that was compared in bfloat16 and float32",
    (
        Column("scorer", pl.String, "reward model"),
        Column("revision", pl.String, "its revision in float32"),
        Column("revision_bfloat16", pl.String, "its revision in bfloat16"),
        Column("device", pl.String, "what both ran on"),
        Column("pairs", pl.Int64, "pairs with a decided human label whose images were scored in both"),
        Column("images_left_out", pl.Int64, "images that could not be read or decoded, left out with their pairs"),
        Column("scores", pl.Int64, "(image, prompt) of those pairs"),
        Column("score_sd", pl.Float64, "standard deviation of the float32 scores (unbiased)", nullable=True),
        Column("difference_mean", pl.Float64, "mean of bfloat16 - float32", nullable=True),
        Column("difference_sd", pl.Float64, "its standard deviation (unbiased)", nullable=True),
        Column("difference_max", pl.Float64, "largest |bfloat16 - float32|", nullable=True),
        Column("pairs_decided", pl.Int64, "of the pairs, those without equal scores in float32"),
        Column("flips", pl.Int64, "of those, pairs on which bfloat16 chooses the other image"),
        Column("ties_made", pl.Int64, "of those, pairs on which bfloat16 has equal scores"),
        Column(
            "share_flipped",
            pl.Float64,
            "(flips + ties_made / 2) / pairs_decided; the goal is below 0.005",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("is_goal_met", pl.Boolean, "share_flipped is below 0.005", nullable=True),
        Column("seconds_float32", pl.Float64, "of the model alone, pictures being prepared"),
        Column("seconds_bfloat16", pl.Float64, "of the model alone, pictures being prepared"),
    ),
    ("scorer",),
    "scorer",
)
MARGINS = Table(
    "margins",
    "pair, with what every scorer gives its images",
    (
        _PAIR_KEYS[0],
        _PROMPT_ID,
        Column("model_0", pl.String, "generator of image_0, as its votes name it", nullable=True),
        Column("model_1", pl.String, "generator of image_1", nullable=True),
        Column("score_0_{scorer}", pl.Float32, "score of image_0 by {scorer}; null: it has none", nullable=True),
        Column("score_1_{scorer}", pl.Float32, "score of image_1 by {scorer}; null: it has none", nullable=True),
    ),
    key=("pair_id",),
    cut_by="whole",
)
CALIBRATION = Table(
    "calibration",
    "scorer, and fold of prompts left out",
    (
        Column("scorer", pl.String, "reward model, 'ensemble', or 'generator:<name>' (labels.generator_term)"),
        Column("fold", pl.Int8, "prompts with this fold were left out of the fit; -1: none"),
        Column(
            "slope",
            pl.Float64,
            "a of p = sigmoid(a * d), d the difference of scores (of z-logits for the ensemble)",
            nullable=True,
        ),
        Column(
            "weight",
            pl.Float64,
            "weight of z = d / rms in the ensemble's logit; of a generator: what it adds for its image",
            nullable=True,
        ),
        Column("rms", pl.Float64, "root mean square of d over pairs", nullable=True, low=0.0),
        Column("min", pl.Float64, "smallest score", nullable=True),
        Column("max", pl.Float64, "largest score", nullable=True),
        Column("logit_scale", pl.Float64, "factor of the cosine in the score; null: none is known", nullable=True),
        Column(
            "accuracy",
            pl.Float64,
            "agreement with decided human votes, equal scores half; of a fold: with the votes left out of its fit",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("votes", pl.Int64, "people behind the decided votes that the accuracy rests on"),
        Column(
            "ece_raw",
            pl.Float64,
            "expected calibration error of sigmoid(d) (ensemble: sigmoid of the mean z), ties half; null but for fold -1",
            nullable=True,
            **_PROBABILITY,
        ),
        Column(
            "ece_calibrated",
            pl.Float64,
            "the same of the cross-fitted probability",
            nullable=True,
            **_PROBABILITY,
        ),
    ),
    key=("scorer", "fold"),
    cut_by="whole",
    version=2,
)
RELIABILITY = Table(
    "reliability",
    "scorer (or 'ensemble'), stage and bin of probability that holds votes",
    (
        Column("scorer", pl.String, "reward model, or 'ensemble'"),
        Column("stage", pl.String, "raw: sigmoid(d); calibrated: cross-fitted", values=("raw", "calibrated")),
        Column("bin", pl.Int32, "of ten equal ones of the favoured image's probability, 0.5 to 1", low=0, high=9),
        Column("votes", pl.Int64, "people who voted on the bin's pairs, ties among them"),
        Column("probability", pl.Float64, "mean probability of the favoured image", **_PROBABILITY),
        Column("agreement", pl.Float64, "share of those people who chose it, ties half", **_PROBABILITY),
    ),
    key=("scorer", "stage", "bin"),
    cut_by="whole",
)
_SIDE: _Range = {"low": -1.0, "high": 1.0}
CONSENSUS = Table(
    "consensus",
    "pair",
    (
        _PAIR_KEYS[0],
        Column("vote_{scorer}", pl.Int8, "sign of {scorer}'s d: 1 for image_0, -1, 0; null: no vote", True, **_SIDE),
        Column("vote_human", pl.Int8, "sign of the humans' majority; null: none, or labels.human_votes is off", True),
        Column("votes_0", pl.Int32, "voters for image_0"),
        Column("votes_1", pl.Int32, "voters for image_1"),
        Column("voters", pl.Int32, "voters that could vote, 0 included"),
        Column("agreement", pl.Float64, "|sum of votes in {-1, 0, 1}| / voters", nullable=True, **_PROBABILITY),
        Column(
            "consensus_label_0",
            pl.Float64,
            "majority after the tie policy; null: undecided",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("decided_by", pl.String, "majority, the tie policy that decided, or none"),
        Column(
            "random_scorer_label_0",
            pl.Float64,
            "vote of one scorer, drawn by a hash of labels.seed, pair and scorer; null: it has none, or d = 0",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("raw_sum_label_0", pl.Float64, "sign of the sum of all d; null: 0, or a score is missing", True),
        Column(
            "zscore_sum_label_0", pl.Float64, "sign of the sum of all d / rms; null: 0, or a score is missing", True
        ),
    ),
    key=("pair_id",),
    cut_by="whole",
    version=2,
)
CONSENSUS_REPORT = Table(
    "consensus_report",
    "way to one label per pair, and level of the scorers' agreement",
    (
        Column(
            "aggregation",
            pl.String,
            "majority (of the scorers alone, no tie policy), random_scorer, raw_sum, zscore_sum, or a scorer",
        ),
        Column("level", pl.String, "'all', or '<sum of the scorers' votes without sign> of <scorers that vote>'"),
        Column("pairs", pl.Int64, "pairs of the level, those without a label among them"),
        Column("pairs_labelled", pl.Int64, "of those, pairs to which this way gives a label"),
        Column("votes", pl.Int64, "people behind the decided human votes on labelled pairs"),
        Column("accuracy", pl.Float64, "share of them who chose the labelled image", nullable=True, **_PROBABILITY),
        Column("accuracy_low", pl.Float64, "lower end of its 95 % interval, prompts as clusters", nullable=True),
        Column("accuracy_high", pl.Float64, "upper end", nullable=True),
    ),
    key=("aggregation", "level"),
    cut_by="whole",
)
SMOOTHED = Table(
    "smoothed",
    "pair",
    (
        _PAIR_KEYS[0],
        Column(
            "smpo_{scorer}", pl.Float64, "softmax preference for image_0 from {scorer}'s range", True, **_PROBABILITY
        ),
        Column(
            "calibrated_{scorer}",
            pl.Float64,
            "preference for image_0 from {scorer}, calibrated on the votes on other prompts",
            nullable=True,
            **_PROBABILITY,
        ),
        Column(
            "p_smpo",
            pl.Float64,
            "SmPO's: softmax preference for image_0 from the range of labels.smpo_scorer",
            nullable=True,
            **_PROBABILITY,
        ),
        Column(
            "p_ensemble",
            pl.Float64,
            "calibrated ensemble preference for image_0, cross-fitted by prompt",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("p_linear", pl.Float64, "mean of the scorers' calibrated preferences", nullable=True, **_PROBABILITY),
        Column(
            "p_log", pl.Float64, "sigmoid of the mean of the scorers' calibrated logits", nullable=True, **_PROBABILITY
        ),
        Column("z_mean", pl.Float64, "mean of the scorers' standardised differences", nullable=True),
        Column("z_std", pl.Float64, "their standard deviation (unbiased)", nullable=True),
    ),
    key=("pair_id",),
    cut_by="whole",
    version=2,
)
MINORITY = Table(
    "minority",
    "decided vote",
    (
        Column("vote_id", pl.String, "vote"),
        Column("pair_id", pl.String, "pair"),
        Column("annotator_id", pl.String, "'<family>:<id>'; null where unknown", nullable=True),
        Column("label_0", pl.Float64, "the vote: 1 for image_0, 0 for image_1", **_PROBABILITY),
        Column("people", pl.Int64, "how many people it stands for; an unknown count is one", low=1),
        Column(
            "confidence",
            pl.Float64,
            "c = |mean_m sigmoid(z_m) - 1|, reward models as annotators",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("stability", pl.Float64, "v = min(std_m(z_m), 1)", nullable=True, **_PROBABILITY),
        Column("metric", pl.Float64, "u = c * v", nullable=True, **_PROBABILITY),
        Column(
            "minority_score",
            pl.Float64,
            "1 - p(recorded label) under the cross-fitted ensemble",
            nullable=True,
            **_PROBABILITY,
        ),
        Column(
            "annotator_score",
            pl.Float64,
            "r_a: how much more often than expected the annotator chooses with the ensemble, on other prompts; unknown: 0",
        ),
        Column(
            "minority_probability",
            pl.Float64,
            "that most others would choose the other image, learned where several people voted; null: nowhere in the store",
            nullable=True,
            **_PROBABILITY,
        ),
        Column(
            "em_probability",
            pl.Float64,
            "a second opinion: the same by joint EM of true sides and annotators' accuracies (labels.em); null: off",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("others", pl.Int64, "people behind the decided votes of other raters on the pair"),
        Column(
            "share_against",
            pl.Float64,
            "share of those others that chose the other image",
            nullable=True,
            **_PROBABILITY,
        ),
    ),
    key=("vote_id",),
    cut_by="whole",
    version=2,
)
ANNOTATORS = Table(
    "annotators",
    "annotator with a counted vote; 'unknown': all unknown ones together",
    (
        Column("annotator_id", pl.String, "'<family>:<id>', or 'unknown'"),
        Column("votes", pl.Int64, "people behind the decided votes"),
        Column("ties", pl.Int64, "people behind the tied votes"),
        Column("prompts", pl.Int64, "prompts voted on"),
        Column("compared", pl.Int64, "people behind decided votes on which others have a majority"),
        Column("agreeing", pl.Int64, "of those, with that majority"),
        Column(
            "reliability",
            pl.Float64,
            "agreement with the others' majority, shrunk to all annotators' (empirical Bayes, beta-binomial); "
            "null: no vote of theirs was compared",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("reliability_low", pl.Float64, "2.5 % quantile of its posterior", nullable=True, **_PROBABILITY),
        Column("reliability_high", pl.Float64, "97.5 % quantile", nullable=True, **_PROBABILITY),
        Column(
            "annotator_score",
            pl.Float64,
            "r_a = sum(agree with the ensemble - max(p, 1 - p)) / (n + 20) over all prompts; 'unknown': 0",
        ),
        Column("placed", pl.Int64, "people behind decided votes whose display order is known"),
        Column(
            "first_share", pl.Float64, "share of those for the image displayed first", nullable=True, **_PROBABILITY
        ),
        Column("first_low", pl.Float64, "lower end of its 95 % interval (Wilson)", nullable=True, **_PROBABILITY),
        Column("first_high", pl.Float64, "upper end", nullable=True, **_PROBABILITY),
    ),
    key=("annotator_id",),
    cut_by="whole",
)
RATER_AGREEMENT = Table(
    "rater_agreement",
    "source, or 'all'",
    (
        Column("source", pl.String, "name in the configuration; 'all': all votes together"),
        Column("pairs", pl.Int64, "pairs with at least two people's votes"),
        Column("ratings", pl.Int64, "people behind the votes on those pairs, ties among them"),
        Column("raters", pl.Int64, "known annotators among them"),
        Column(
            "alpha",
            pl.Float64,
            "Krippendorff's alpha, nominal, a tie being a third value; null: fewer than two values occur",
            nullable=True,
            high=1.0,
        ),
        Column("alpha_low", pl.Float64, "2.5 % quantile of 1,000 bootstrap resamples of the prompts, seed 0", True),
        Column("alpha_high", pl.Float64, "97.5 % quantile", nullable=True),
        Column("alpha_decided", pl.Float64, "the same of decided votes alone", nullable=True, high=1.0),
        Column(
            "minority_share", pl.Float64, "share of people on the smaller side of pairs with 3 decided or more", True
        ),
        Column("placed", pl.Int64, "people behind decided votes whose display order is known"),
        Column(
            "first_share", pl.Float64, "share of those for the image displayed first", nullable=True, **_PROBABILITY
        ),
        Column("first_low", pl.Float64, "lower end of its 95 % interval (Wilson)", nullable=True, **_PROBABILITY),
        Column("first_high", pl.Float64, "upper end", nullable=True, **_PROBABILITY),
    ),
    key=("source",),
    cut_by="whole",
)
PREFERENCES = Table(
    "preferences",
    "pair, everything joined",
    (
        *_PAIR_KEYS,
        Column("prompt", pl.String, "normalised text"),
        Column("split", pl.String, "resolved split of the prompt", values=SPLITS),
        Column("sources", pl.String, "sources that hold votes on it, joined by '+'"),
        Column("n_votes", pl.Int64, "people whose votes count (status ok, no duplicate; an unknown count is one)"),
        Column("n_decided", pl.Int64, "of those, people who chose one of the images"),
        Column("human_label_0", pl.Float64, "mean of those votes", nullable=True, **_PROBABILITY),
        Column("is_in_cycle", pl.Boolean, "the humans' choices among the prompt's images lead round through this pair"),
        Column(
            "minority_share",
            pl.Float64,
            "share of decided votes on the smaller side; null below 3 decided votes",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("confidence", pl.Float64, "c of the humans' side", nullable=True, **_PROBABILITY),
        Column("stability", pl.Float64, "v of the humans' side", nullable=True, **_PROBABILITY),
        Column("metric", pl.Float64, "u of the humans' side", nullable=True, **_PROBABILITY),
        Column("minority_score", pl.Float64, "1 - p of the humans' side", nullable=True, **_PROBABILITY),
        Column(
            "minority_probability",
            pl.Float64,
            "mean of minority.minority_probability over the people on the humans' side",
            nullable=True,
            **_PROBABILITY,
        ),
        Column(
            "is_unanimous",
            pl.Boolean,
            "every scorer votes for the humans' side; null: no side, or a missing score",
            True,
        ),
        Column(
            "consensus_label_0",
            pl.Float64,
            "majority of the voters after the tie policy; null: undecided",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("agreement", pl.Float64, "how united the voters are", nullable=True, **_PROBABILITY),
        Column("decided_by", pl.String, "what decided the consensus", nullable=True),
        Column("random_scorer_label_0", pl.Float64, "see consensus", nullable=True, **_PROBABILITY),
        Column("raw_sum_label_0", pl.Float64, "see consensus", nullable=True, **_PROBABILITY),
        Column("zscore_sum_label_0", pl.Float64, "see consensus", nullable=True, **_PROBABILITY),
        Column("p_smpo", pl.Float64, "smoothed preference for image_0 (SmPO)", nullable=True, **_PROBABILITY),
        Column("p_ensemble", pl.Float64, "calibrated ensemble preference for image_0", nullable=True, **_PROBABILITY),
        Column("p_linear", pl.Float64, "linear pool of the scorers' calibrated preferences", True, **_PROBABILITY),
        Column("p_log", pl.Float64, "log pool of the scorers' calibrated preferences", nullable=True, **_PROBABILITY),
        Column("z_mean", pl.Float64, "mean of the scorers' standardised differences", nullable=True),
        Column("z_std", pl.Float64, "their standard deviation (unbiased)", nullable=True),
        Column("model_0", pl.String, "generator of image_0, as its votes name it", nullable=True),
        Column("model_1", pl.String, "generator of image_1", nullable=True),
        Column("score_0_{scorer}", pl.Float32, "score of image_0 by {scorer}", nullable=True),
        Column("score_1_{scorer}", pl.Float32, "score of image_1 by {scorer}", nullable=True),
        Column("excluded_because", pl.String, "why no model may train on the pair; null: it may", nullable=True),
    ),
    key=("pair_id",),
    cut_by="whole",
    version=3,
)
ANNOTATOR_GROUPS = Table(
    "annotator_groups",
    "annotator with a counted vote; 'unknown': all unknown ones together",
    (
        Column("annotator_id", pl.String, "'<family>:<id>', or 'unknown'"),
        Column("votes", pl.Int64, "people behind the decided votes on pairs that every scorer scored"),
        Column(
            "group",
            pl.Int32,
            "group of people who vote alike, 0 having most votes (labels.groups_file: as given); -1: not known",
            low=-1,
        ),
        Column(
            "status",
            pl.String,
            "'ok', or why there is no group: fewer than 20 votes, not in labels.groups_file, unknown",
            values=("ok", "few_votes", "not_given", "unknown"),
        ),
        Column(
            "weight_{scorer}",
            pl.Float64,
            "weight of {scorer}'s standardised difference z in their choices, drawn to that of all annotators by 20 votes; "
            "null: none was learned",
            nullable=True,
        ),
    ),
    key=("annotator_id",),
    cut_by="whole",
)
PAIR_GROUPS = Table(
    "pair_groups",
    "pair",
    (
        _PAIR_KEYS[0],
        Column("group", pl.Int32, "group of most known ones of those who voted for the humans' side; -1: none", low=-1),
        Column(
            "status",
            pl.String,
            "'ok', or why there is none: the humans have no side, nobody of a known group voted for it, groups are even",
            values=("ok", "no_side", "unknown", "tied"),
        ),
    ),
    key=("pair_id",),
    cut_by="whole",
)
FROZEN_SAMPLE = Table(
    "frozen_sample",
    "pair on which drift is measured: drawn once, and kept",
    (
        *_PAIR_KEYS,
        Column(
            "human_label_0",
            pl.Float64,
            "mean of the votes that counted when the sample was drawn; never 0.5",
            **_PROBABILITY,
        ),
    ),
    key=("pair_id",),
    cut_by="whole",
)
FROZEN_LABELS = Table(
    "frozen_labels",
    "scorer (or 'consensus') and pair of frozen_sample, under the revisions of one measurement",
    (
        Column(
            "measurement", pl.Int64, "number of the measurement: 1 for the first revisions, one more for others", low=1
        ),
        Column("subject", pl.String, "reward model, or 'consensus'"),
        _PAIR_KEYS[0],
        Column("is_in_store", pl.Boolean, "false: the pair left the store, its source was removed"),
        Column(
            "difference", pl.Float64, "d of the scorer; null: a score is missing, or subject 'consensus'", nullable=True
        ),
        Column(
            "label_0",
            pl.Float64,
            "its choice: 1 for image_0, 0 for image_1, 0.5 for equal scores; null: no score, or undecided",
            nullable=True,
            **_PROBABILITY,
        ),
    ),
    key=("subject", "pair_id"),
    cut_by="measurement",
)
DRIFT = Table(
    "drift",
    "measurement and scorer, or 'consensus'",
    (
        Column("measurement", pl.Int64, "number of the measurement, in the order in which they were made", low=1),
        Column("subject", pl.String, "reward model, or 'consensus'"),
        Column(
            "revision", pl.String, "of the scorer; of 'consensus': of all scorers' revisions and its options together"
        ),
        Column("pairs", pl.Int64, "pairs of frozen_sample that it chooses on, equal scores among them"),
        Column("pairs_without_choice", pl.Int64, "pairs in the store without score, or undecided"),
        Column("pairs_gone", pl.Int64, "pairs that left the store"),
        Column(
            "accuracy",
            pl.Float64,
            "share of `pairs` on which it chooses the humans' side, as frozen; equal scores count half",
            nullable=True,
            **_PROBABILITY,
        ),
        Column(
            "before",
            pl.Int64,
            "latest measurement of another revision of the subject; null: none",
            nullable=True,
            low=1,
        ),
        Column("revision_before", pl.String, "the revision of that one", nullable=True),
        Column(
            "accuracy_before",
            pl.Float64,
            "accuracy of that revision, over the pairs on which both choose",
            nullable=True,
            **_PROBABILITY,
        ),
        Column(
            "points",
            pl.Float64,
            "100 * (accuracy over the pairs on which both choose - accuracy_before)",
            nullable=True,
            low=-100.0,
            high=100.0,
        ),
        Column(
            "share_changed",
            pl.Float64,
            "share of the pairs in the store both times whose choice is another now; no choice is one of its own",
            nullable=True,
            **_PROBABILITY,
        ),
    ),
    key=("measurement", "subject"),
    cut_by="whole",
)
LATENTS = Table(
    "latents",
    "image encoded by a backbone's autoencoder",
    (
        _IMAGE_ID,
        Column("is_flipped", pl.Boolean, "of the mirrored picture; only where a recipe mirrors pairs"),
        Column("mean", pl.Binary, "float16 [C, height, width] of the posterior's mean, C order, unscaled"),
        Column("log_variance", pl.Binary, "float16, same shape"),
        Column("height", pl.Int32, "of the latent, cells"),
        Column("width", pl.Int32, "of the latent, cells"),
    ),
    key=("image_id", "is_flipped"),
    cut_by="backbone/shard",
    version=2,
)
PROMPT_EMBEDDINGS = Table(
    "prompt_embeddings",
    "prompt encoded by a backbone's text encoder",
    (
        _PROMPT_ID,
        Column("embedding", pl.Binary, "float16 [tokens, width], C order"),
        Column("tokens", pl.Int32, "length"),
        Column("width", pl.Int32, "channels"),
        Column(
            "pooled",
            pl.Binary,
            "float16 [pooled_width] of the whole prompt; null: the backbone has none",
            nullable=True,
        ),
        Column("pooled_width", pl.Int32, "channels of pooled", nullable=True),
    ),
    key=("prompt_id",),
    cut_by="backbone",
    version=2,
)
TRAJECTORIES = Table(
    "trajectories",
    "noise level of an image inverted under a prompt by a reference model",
    (
        _IMAGE_ID,
        Column("prompt_id", pl.String, "prompt that the model was told; 'empty': the empty prompt"),
        Column("is_flipped", pl.Boolean, "whether the picture was mirrored before it was encoded"),
        Column("level", pl.Int32, "timestep whose noise the latent has"),
        Column("latent", pl.Binary, "float16 [channels, height, width], C order, scaled: as the UNet sees it"),
        Column("height", pl.Int32, "of the latent, cells"),
        Column("width", pl.Int32, "of the latent, cells"),
    ),
    key=("image_id", "prompt_id", "is_flipped", "level"),
    cut_by="backbone/mode/part",
)
TRAINING_METRICS = Table(
    "training_metrics",
    "optimiser step of a run",
    (
        Column("step", pl.Int64, "optimiser steps done"),
        Column("loss", pl.Float64, "mean over the pairs of the step"),
        Column(
            "implicit_accuracy",
            pl.Float64,
            "share of the step's pairs with margin s > 0, ties half; null for objectives without reference",
            nullable=True,
            **_PROBABILITY,
        ),
        Column("margin", pl.Float64, "mean s", nullable=True),
        Column("winner_change", pl.Float64, "mean L_policy - L_reference of the winners; < 0: learned", nullable=True),
        Column("loser_change", pl.Float64, "mean L_policy - L_reference of the losers", nullable=True),
        Column("drift", pl.Float64, "mean squared difference of the policy's and the reference's predictions", True),
        Column(
            "gradient_norm", pl.Float64, "L2, before clipping; null: float16 overflowed, the step was left out", True
        ),
        Column("learning_rate", pl.Float64, "of the step"),
        Column("pairs_per_second", pl.Float64, "speed, all processes together"),
        Column("peak_memory_mib", pl.Float64, "of the first process so far: GPU memory, else resident memory"),
    ),
    key=("step",),
    cut_by="recipe",
    version=2,
)
TRAINING_VALIDATIONS = Table(
    "training_validations",
    "(validation, metric) of a run",
    (
        Column("step", pl.Int64, "optimiser steps done; 0: before training"),
        Column(
            "metric",
            pl.String,
            "implicit_accuracy_<labels> and loss_<labels> of held-out pairs against the model at the start (labels: human; "
            "consensus; minority: the human side of pairs whose minority value exceeds 0.5), median_score of samples",
        ),
        Column("value", pl.Float64, "of the metric"),
        Column("count", pl.Int64, "pairs or samples behind it"),
    ),
    key=("step", "metric"),
    cut_by="recipe",
)
TRAINING_PAIRS = Table(
    "training_pairs",
    "pair of an optimiser step of a run, if training.log_pairs",
    (
        Column("step", pl.Int64, "optimiser steps done after it"),
        Column("pair_id", pl.String, "pair, as in preferences"),
        Column("epoch", pl.Int64, "how often the pair had come before"),
        Column("timestep", pl.Int64, "of the noise"),
        Column("loss", pl.Float64, "of the pair"),
        Column("margin", pl.Float64, "s", nullable=True),
        Column("confidence", pl.Float64, "c of Adaptive-DPO", nullable=True),
        Column("stability", pl.Float64, "v of Adaptive-DPO", nullable=True),
        Column("metric", pl.Float64, "u of Adaptive-DPO", nullable=True),
        Column("weight", pl.Float64, "W of Adaptive-DPO", nullable=True),
    ),
    key=("step", "pair_id", "epoch"),
    cut_by="recipe",
)
HELD_OUT = Table(
    "held_out",
    "held-out pair under a trained model",
    (
        Column("pair_id", pl.String, "pair of a validation or test prompt"),
        _PROMPT_ID,
        Column("margin", pl.Float64, "mean s over the draws, reference = base model, winner = humans' side"),
        Column("accuracy", pl.Float64, "share of the draws with s > 0, ties half", **_PROBABILITY),
        Column("draws", pl.Int32, "(timestep, noise) draws"),
    ),
    key=("pair_id",),
    cut_by="recipe",
)
SAMPLES = Table(
    "samples",
    "picture that a model made",
    (
        _PROMPT_ID,
        Column("prompt", pl.String, "text"),
        Column("seed", pl.Int64, "of the initial noise; the same for every model"),
        _IMAGE_ID,
        Column("bytes", pl.Binary, "PNG"),
    ),
    key=("prompt_id", "seed"),
    cut_by="model",
)
EVALUATIONS = Table(
    "evaluations",
    "(model, prompt, seed, scorer)",
    (
        _PROMPT_ID,
        Column("seed", pl.Int64, "of the initial noise"),
        Column("scorer", pl.String, "reward model; in the small world also taste:<name> and fidelity"),
        Column("score", pl.Float64, "score of the sample"),
    ),
    key=("prompt_id", "seed", "scorer"),
    cut_by="model",
)
LEADERBOARD = Table(
    "leaderboard",
    "(model, scorer) against the base model",
    (
        Column("model", pl.String, "recipe"),
        Column("scorer", pl.String, "what judges; 'held-out pairs' for the implicit accuracy"),
        Column("samples", pl.Int64, "pairs of samples compared"),
        Column("prompts", pl.Int64, "distinct prompts: what the bootstrap resamples"),
        Column("base_mean", pl.Float64, "mean score of the base", nullable=True),
        Column("model_mean", pl.Float64, "mean score of the model"),
        Column("gain", pl.Float64, "mean paired gain, in the scorer's unit", nullable=True),
        Column("gain_low", pl.Float64, "2.5 % bootstrap quantile", nullable=True),
        Column("gain_high", pl.Float64, "97.5 % bootstrap quantile", nullable=True),
        Column("gain_sd", pl.Float64, "gain / standard deviation of the base's scores", nullable=True),
        Column("gain_sd_low", pl.Float64, "2.5 % bootstrap quantile", nullable=True),
        Column("gain_sd_high", pl.Float64, "97.5 % bootstrap quantile", nullable=True),
        Column("win_rate", pl.Float64, "share of samples that beat the base's, ties half", **_PROBABILITY),
        Column("win_rate_low", pl.Float64, "2.5 % bootstrap quantile", **_PROBABILITY),
        Column("win_rate_high", pl.Float64, "97.5 % bootstrap quantile", **_PROBABILITY),
    ),
    key=("model", "scorer"),
    cut_by="whole",
)

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        VOTES,
        IMAGES,
        IMAGE_NAMES,
        PROMPTS,
        CATALOGUE_IMAGES,
        CATALOGUE_NAMES,
        CATALOGUE_PROMPTS,
        CATALOGUE_SCORABLES,
        CATALOGUE_VOTES,
        CATALOGUE_PAIRS,
        ACCOUNTING,
        SCORES,
        SCORER_REPORT,
        SCORER_CORRELATION,
        SCORER_PRECISION,
        MARGINS,
        CALIBRATION,
        RELIABILITY,
        CONSENSUS,
        CONSENSUS_REPORT,
        SMOOTHED,
        MINORITY,
        ANNOTATORS,
        RATER_AGREEMENT,
        PREFERENCES,
        ANNOTATOR_GROUPS,
        PAIR_GROUPS,
        FROZEN_SAMPLE,
        FROZEN_LABELS,
        DRIFT,
        LATENTS,
        PROMPT_EMBEDDINGS,
        TRAJECTORIES,
        TRAINING_METRICS,
        TRAINING_VALIDATIONS,
        TRAINING_PAIRS,
        HELD_OUT,
        SAMPLES,
        EVALUATIONS,
        LEADERBOARD,
    )
}


def data_dictionary() -> str:
    """Return the data dictionary of all tables as Markdown."""
    lines = [
        "# Data dictionary",
        "",
        "A table's files are `<table>/<partition>.parquet`: partition `all` where it is not cut, else a path of what it is "
        "cut by (`<shard>`, `<scorer>/revision=<revision>/<shard>`). A column with `<scorer>` in its name is there once for "
        "every configured scorer. Views of `views.sql` have a column `filename` besides; `scores`, of the active revisions "
        "alone, also `scorer` and `revision`; tables cut by model or recipe also `model` or `recipe`.",
        "",
    ]
    for table in TABLES.values():
        lines += [
            f"## {table.name}",
            "",
            f"One row per {table.row}. Key: {', '.join(table.key)}. "
            + (f"Cut by: {table.cut_by}." if table.cut_by != "whole" else "Not cut."),
            "",
        ]
        lines += ["| column | type | null | meaning |", "|---|---|---|---|"]
        for c in table.columns:
            meaning = c.meaning + (f" ({', '.join(c.values)})" if c.values else "")
            name, meaning = (text.replace(SCORER, "<scorer>") for text in (c.name, meaning.replace("|", "&#124;")))
            lines.append(f"| {name} | {c.dtype} | {'yes' if c.nullable else 'no'} | {meaning} |")
        lines.append("")
    return "\n".join(lines)
