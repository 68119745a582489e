"""Which pairs a page shows, with everything that the tables say of them.

Belongs here: questions to `preferences`. Does not belong here: how pairs look (`cards`), their pictures (`pictures`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipelines import schemas
from pipelines.config import ConfigError
from pipelines.curation import Policy, spelled
from pipelines.tables import Store

_HUMAN, _CONSENSUS = pl.col("human_label_0"), pl.col("consensus_label_0")
_IS_DECIDED = _HUMAN.is_not_null() & (_HUMAN != 0.5)
_MINORITY = pl.coalesce("minority_probability", "minority_score")
_DECIDED = pl.col("n_decided")
# Ties are half in the mean of the votes.
_CHOSE_0 = _HUMAN * pl.col("n_votes") - (pl.col("n_votes") - _DECIDED) / 2
_EVENNESS = pl.min_horizontal(_CHOSE_0, _DECIDED - _CHOSE_0) / _DECIDED
# Column by column: every scorer's score of image_0 beside its score of image_1.
_ALL_CHOOSE_0 = pl.all_horizontal(pl.col("^score_0_.+$") > pl.col("^score_1_.+$"))
_ALL_CHOOSE_1 = pl.all_horizontal(pl.col("^score_0_.+$") < pl.col("^score_1_.+$"))


@dataclass(frozen=True, eq=False)
class Query:
    """A question to `preferences`. where: pairs for which it holds; order: smallest first, then by pair_id."""

    title: str
    words: str
    where: pl.Expr
    order: tuple[pl.Expr, ...] = ()


QUERIES: dict[str, Query] = {
    "highest_minority": Query(
        "Most likely minority choices",
        "Pairs on which the humans chose a side, those first where most other people would probably choose the other "
        "(minority_probability, or minority_score where that is not known).",
        _IS_DECIDED & _MINORITY.is_not_null(),
        (-_MINORITY,),
    ),
    "split_votes": Query(
        "Split votes",
        "Pairs on which people chose either image, the most evenly divided first, and of those the pairs with most votes "
        "(ties left out).",
        # Less than a person is rounding.
        (_DECIDED >= 2) & (pl.min_horizontal(_CHOSE_0, _DECIDED - _CHOSE_0) > 0.5),
        (-_EVENNESS.round(9), -_DECIDED),
    ),
    "consensus_against_human": Query(
        "Consensus against the humans",
        "Pairs on which the scorers' consensus chooses the image that most humans did not, the most united scorers first.",
        _IS_DECIDED & (_CONSENSUS != 0.5) & ((_CONSENSUS > 0.5) != (_HUMAN > 0.5)),
        (-pl.col("agreement"), -(pl.col("p_ensemble") - 0.5).abs()),
    ),
    "unanimous_against_human": Query(
        "All scorers against the humans",
        "Pairs on which every scorer gives the image that most humans did not choose the higher score, those first of which "
        "the calibrated ensemble is surest.",
        ((_HUMAN > 0.5) & _ALL_CHOOSE_1) | ((_HUMAN < 0.5) & _ALL_CHOOSE_0),
        (-(pl.col("p_ensemble") - 0.5).abs(),),
    ),
    "excluded": Query(
        "Excluded pairs",
        "Pairs that no model may train on, or that the policy leaves out where one is given, by reason.",
        pl.col("excluded_because").is_not_null(),
        (pl.col("excluded_because"),),
    ),
    "random": Query("A random look", "Pairs in the order of their ids: a draw that stays the same.", pl.lit(True)),
}


@dataclass(frozen=True)
class Chosen:
    """The pairs of a page in their order, joined with what other tables say of them, and their single votes by pair."""

    query: Query
    facts: tuple[tuple[str, str], ...]
    matching: int
    pairs: list[dict[str, Any]]
    votes: dict[str, list[dict[str, Any]]]
    scorers: tuple[str, ...]

    @property
    def uses(self) -> Counter[str]:
        """Return how often the page shows each image."""
        return Counter(pair[f"image_{i}_id"] for pair in self.pairs for i in (0, 1))


def choose(
    store: Store,
    name: str,
    where: str | None,
    order_by: str | None,
    policy: Policy | None,
    limit: int,
    blur: float,
) -> Chosen:
    """Return the pairs of a page; see `pairs_page.page` for the options and their errors."""
    if name not in QUERIES:
        raise ConfigError(f"pairs: query: expected one of {list(QUERIES)}, found {name!r}")
    if limit < 1:
        raise ConfigError(f"pairs: limit: expected 1 or more, found {limit}")
    # A NaN fails the comparison too.
    if not 0 <= blur <= 100:
        raise ConfigError(f"pairs: blur: expected percent of a picture's longer side, 0 to 100, found {blur!r}")
    made_from = store.require_current(schemas.PREFERENCES.name)
    query, preferences = QUERIES[name], store.scan(schemas.PREFERENCES)
    decided = preferences if policy is None else policy.apply(preferences)
    matching, order, descending = decided.filter(query.where), list(query.order), False
    if where is not None:
        matching = matching.filter(_expression("where", where, decided, is_condition=True))
    if order_by is not None:
        text, descending = _direction(order_by)
        order = [_expression("order_by", text, decided)]
    keys = [f"_{i}" for i in range(len(order))]
    ranked = matching.select("pair_id", *(e.alias(k) for e, k in zip(order, keys, strict=True)))
    # Ids first: texts and scores of a million pairs stay on the disk.
    ranked = ranked.sort(*keys, "pair_id", descending=[descending] * len(keys) + [False], nulls_last=True)
    with _explained("where, order_by", f"{where}; {order_by}", decided):
        count, ids = pl.collect_all([matching.select(pl.len()), ranked.select("pair_id").head(limit)])
    pairs, scorers = _joined(store, ids, policy)
    facts = {
        "Store": store.location,
        "Preferences": made_from.content[:12],
        "Scorers": ", ".join(scorers) or "none",
        "Policy": "" if policy is None else spelled(policy),
        "Where": where or "",
        "Order": f"{order_by}, instead of the order above" if order_by else "",
        "Pictures": f"blurred, {blur:g} % of the longer side" if blur else "",
    }
    told = tuple((k, v) for k, v in facts.items() if v)
    return Chosen(query, told, int(count.item()), pairs.to_dicts(), _single_votes(store, ids), scorers)


def _direction(order_by: str) -> tuple[str, bool]:
    """Return an ORDER BY item as expression and whether the largest comes first."""
    text, _, last = order_by.strip().rpartition(" ")
    return (text, last.lower() == "desc") if text and last.lower() in ("asc", "desc") else (order_by, False)


def _expression(option: str, text: str, frame: pl.LazyFrame, is_condition: bool = False) -> pl.Expr:
    """Return what a person wrote in SQL, checked against the frame's columns and types."""
    with _explained(option, text, frame):
        expression = pl.sql_expr(text)
        (dtype,) = frame.select(expression.alias("_")).collect_schema().dtypes()
    if is_condition and dtype != pl.Boolean:
        raise ConfigError(f"pairs: {option} {text!r}: expected a condition (true or false), found {dtype}")
    return expression


@contextlib.contextmanager
def _explained(option: str, text: str, frame: pl.LazyFrame) -> Iterator[None]:
    try:
        yield
    except pl.exceptions.PolarsError as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"pairs: {option} {text!r}: {said}; expected SQL over the columns {frame.collect_schema().names()} "
            f"(a name with a dot in double quotes, a text in single ones)"
        ) from error


def _joined(store: Store, ids: pl.DataFrame, policy: Policy | None) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Return the pairs in the order of `ids` with consensus, calibrated probabilities and decision; and the scorers."""
    found = {}
    for table in (schemas.PREFERENCES, schemas.CONSENSUS, schemas.SMOOTHED):
        store.require(table.name)
        found[table.name] = store.scan(table).join(ids.lazy(), on="pair_id", how="semi").collect()
    preferences = found["preferences"]
    frame = ids.join(preferences, on="pair_id", how="left", maintain_order="left")
    for name in ("consensus", "smoothed"):
        more = found[name].select("pair_id", pl.exclude(frame.columns))
        frame = frame.join(more, on="pair_id", how="left", maintain_order="left")
    if policy is not None:
        decision = policy.apply(preferences.lazy()).select(
            "pair_id", "target_label_0", "target_probability", left_out_because="excluded_because"
        )
        frame = frame.join(decision.collect(), on="pair_id", how="left", maintain_order="left")
    return frame, tuple(schemas.PREFERENCES.scorers(preferences.columns))


def _single_votes(store: Store, ids: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Return the decided votes of each pair, those for image_0 first, with their annotator's reliability where known."""
    store.require(schemas.MINORITY.name)
    votes = store.scan(schemas.MINORITY).join(ids.lazy(), on="pair_id", how="semi").collect()
    if store.manifest(schemas.ANNOTATORS.name) is not None:
        store.require_current(schemas.ANNOTATORS.name)
    # Where the table was not made yet nothing is known of anybody.
    reliability = store.scan(schemas.ANNOTATORS).select("annotator_id", "reliability").collect()
    votes = votes.join(reliability, on="annotator_id", how="left")
    by_pair: dict[str, list[dict[str, Any]]] = {}
    for vote in votes.sort("label_0", "vote_id", descending=[True, False]).iter_rows(named=True):
        by_pair.setdefault(vote["pair_id"], []).append(vote)
    return by_pair
