"""Pair policies: frozen dataclasses that turn preferences into training labels.

A policy is a pure function of a row: it keeps every row, adds `target_label_0` and `target_probability`, and fills
`excluded_because` where it gives no target. Belongs here: decisions about pairs. Does not belong here: how labels are
computed (`labels`), where pairs are read from or written to (`export`, `trainers`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, get_args

import polars as pl

from pipelines.config import ConfigError

Aggregation = Literal["majority", "random_scorer", "raw_sum", "zscore_sum"]
Probability = Literal["p_smpo", "p_ensemble", "p_linear", "p_log"]
Minority = Literal["minority_probability", "minority_score", "metric", "confidence"]
MINORITY_DIGITS = 4
"""Of the value in a reason: enough to see on which side of a threshold it lies."""


class Policy(Protocol):
    """A pair policy. A row of its result has either a target or a reason."""

    @property
    def name(self) -> str:
        """Return the name used in tables."""
        ...

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """Return the preferences, every row in its place, with the policy's decision.

        target_label_0: 1.0 (image_0 is to win), 0.0, or null. target_probability: probability in [0.5, 1] that the
        target's side is preferred; 1.0 where the label is hard. excluded_because: why there is no target; a reason that is
        there already stays.
        """
        ...


@dataclass(frozen=True)
class HumanPolicy:
    """The side that most humans chose; pairs without counted votes and even votes are excluded."""

    name: str = field(default="human", init=False)

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """See Policy."""
        return _decided(preferences, _human(), _no_human())


@dataclass(frozen=True)
class ConsensusPolicy:
    """The side of the scorers' consensus (BalancedDPO, arXiv 2503.12575), also against the humans; undecided is excluded.

    aggregation: majority vote after labels.tie_policy, or one of the baselines: see the table `consensus`.
    """

    aggregation: Aggregation = "majority"
    name: str = field(default="consensus", init=False)

    def __post_init__(self) -> None:
        _require_one_of("consensus", "aggregation", self.aggregation, Aggregation)

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """See Policy."""
        is_majority = self.aggregation == "majority"
        label = pl.col("consensus_label_0" if is_majority else f"{self.aggregation}_label_0")
        why = "the consensus is undecided" if is_majority else f"{self.aggregation} is undecided or lacks a score"
        return _decided(preferences, label, pl.lit(why))


@dataclass(frozen=True)
class UnanimousPolicy:
    """The humans' side where every scorer agrees with it (the clean set of Semi-DPO, arXiv 2604.24952)."""

    name: str = field(default="unanimous", init=False)

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """See Policy."""
        unanimous = pl.col("is_unanimous")
        why = (
            pl.when(_no_human().is_not_null())
            .then(_no_human())
            .when(unanimous.is_null())
            .then(pl.lit("a score is missing"))
            .otherwise(pl.lit("a scorer does not choose the humans' side"))
        )
        return _decided(preferences, pl.when(unanimous).then(_human()), why)


@dataclass(frozen=True)
class SmoothedPolicy:
    """The side that a smoothed preference p favours, with max(p, 1 - p) (SmPO, arXiv 2506.02698); p = 0.5 is excluded."""

    column: Probability = "p_smpo"
    name: str = field(default="smoothed", init=False)

    def __post_init__(self) -> None:
        _require_one_of("smoothed", "column", self.column, Probability)

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """See Policy."""
        p = pl.col(self.column)
        why = (
            pl.when(p.is_null()).then(pl.lit(f"{self.column} is not known")).otherwise(pl.lit(f"{self.column} is 0.5"))
        )
        return _decided(preferences, p, why, probability=pl.max_horizontal(p, 1 - p))


@dataclass(frozen=True)
class WithoutMinorityPolicy:
    """The human policy without the pairs whose minority value exceeds the threshold; an unknown value does not exceed it.

    column: the minority value. fallback: read where that is null; '' for none. With MinorityOnlyPolicy of the same options
    it shares out the pairs of the human policy.
    """

    threshold: float = 0.5
    column: Minority = "minority_probability"
    fallback: Minority | Literal[""] = "minority_score"
    name: str = field(default="without_minority", init=False)

    def __post_init__(self) -> None:
        _require_minority(self)

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """See Policy."""
        exceeds, said = _minority(self.column, self.fallback, self.threshold)
        label = pl.when(~exceeds.fill_null(False)).then(_human())
        return _decided(preferences, label, pl.coalesce(_no_human(), said))


@dataclass(frozen=True)
class MinorityOnlyPolicy:
    """The humans' side of the pairs whose minority value exceeds the threshold: what WithoutMinorityPolicy leaves out."""

    threshold: float = 0.5
    column: Minority = "minority_probability"
    fallback: Minority | Literal[""] = "minority_score"
    name: str = field(default="minority_only", init=False)

    def __post_init__(self) -> None:
        _require_minority(self)

    def apply(self, preferences: pl.LazyFrame) -> pl.LazyFrame:
        """See Policy."""
        exceeds, said = _minority(self.column, self.fallback, self.threshold)
        return _decided(preferences, pl.when(exceeds).then(_human()), pl.coalesce(_no_human(), said))


POLICIES: dict[str, type[Policy]] = {
    "human": HumanPolicy,
    "consensus": ConsensusPolicy,
    "unanimous": UnanimousPolicy,
    "smoothed": SmoothedPolicy,
    "without_minority": WithoutMinorityPolicy,
    "minority_only": MinorityOnlyPolicy,
}


def policy(name: str, /, **options: Any) -> Policy:
    """Return the policy of that name.

    Raises:
        ConfigError: there is none, or an option is unknown or wrong.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy: expected one of {sorted(POLICIES)}, found {name!r}")
    known = _options(POLICIES[name])
    if unknown := sorted(options.keys() - set(known)):
        raise ConfigError(f"policy {name!r}: unknown options {unknown}; it has {known or 'none'}")
    return POLICIES[name](**options)


def parse(text: str) -> Policy:
    """Return the policy that a person wrote as 'name' or 'name:option=value,option=value'; see `spelled`.

    Raises:
        ConfigError: see policy.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        option, sign, value = (p.strip() for p in part.partition("="))
        if not sign:
            raise ConfigError(f"policy {text!r}: expected 'name:option=value,option=value', found {part!r}")
        options[option] = _number(text, value) if option == "threshold" else value
    return policy(name.strip(), **options)


def spelled(policy: Policy) -> str:
    """Return a policy as `parse` reads it: its name and the options that are not its defaults."""
    defaults = type(policy)()
    options = [
        f"{o}={getattr(policy, o)}" for o in _options(type(policy)) if getattr(policy, o) != getattr(defaults, o)
    ]
    return policy.name + (":" + ",".join(options) if options else "")


def _options(kind: type[Policy]) -> list[str]:
    return [f.name for f in fields(kind) if f.init]  # type: ignore[arg-type]


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"policy {text!r}: threshold: expected a number, found {value!r}") from None


def _human() -> pl.Expr:
    return pl.col("human_label_0")


def _no_human() -> pl.Expr:
    """Return why a pair has no side that most humans chose; null where it has one."""
    return (
        pl.when(_human().is_null())
        .then(pl.lit("no human vote counts"))
        .when(_human() == 0.5)
        .then(pl.lit("human votes are even"))
    )


def _minority(column: str, fallback: str, threshold: float) -> tuple[pl.Expr, pl.Expr]:
    """Return whether the minority value exceeds the threshold (null: it is unknown), and a text that says so."""
    columns = [column, *([fallback] if fallback else [])]
    said: pl.Expr = pl.lit(f"{' and '.join(dict.fromkeys(columns))} not known")
    for c in reversed(columns):
        sign = pl.when(pl.col(c) > threshold).then(pl.lit(">")).otherwise(pl.lit("<="))
        told = pl.format(f"{c} {{}} {{}} threshold {threshold}", pl.col(c).round(MINORITY_DIGITS), sign)
        said = pl.when(pl.col(c).is_not_null()).then(told).otherwise(said)
    return pl.coalesce(columns) > threshold, said


def _decided(
    preferences: pl.LazyFrame, label: pl.Expr, why_not: pl.Expr, probability: pl.Expr | None = None
) -> pl.LazyFrame:
    """Add the decision: the side that `label` favours unless the pair is excluded; `why_not` where it favours none."""
    target = pl.when(pl.col("excluded_because").is_null() & (label != 0.5)).then((label > 0.5).cast(pl.Float64))
    has_target = pl.col("target_label_0").is_not_null()
    return preferences.with_columns(target_label_0=target).with_columns(
        target_probability=pl.when(has_target).then(pl.lit(1.0) if probability is None else probability),
        excluded_because=pl.when(~has_target).then(pl.coalesce("excluded_because", why_not)),
    )


def _require_one_of(policy: str, option: str, found: Any, allowed: Any) -> None:
    if found not in get_args(allowed):
        raise ConfigError(f"policy {policy!r}: {option}: expected one of {list(get_args(allowed))}, found {found!r}")


def _require_minority(policy: WithoutMinorityPolicy | MinorityOnlyPolicy) -> None:
    is_number = isinstance(policy.threshold, int | float) and not isinstance(policy.threshold, bool)
    # A NaN fails the comparison too.
    if not is_number or not 0 <= policy.threshold <= 1:
        raise ConfigError(
            f"policy {policy.name!r}: threshold: expected a number from 0 to 1, found {policy.threshold!r}"
        )
    _require_one_of(policy.name, "column", policy.column, Minority)
    if policy.fallback:
        _require_one_of(policy.name, "fallback", policy.fallback, Minority)
