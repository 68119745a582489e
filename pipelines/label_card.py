"""The label card: one page on whose votes a store holds, how far they agree, and what each pair policy makes of them.

Shares are of people: a vote that counts for several is several. Intervals are 2.5 and 97.5 % quantiles over resamples of the
prompts, because votes on one prompt are not independent.

Belongs here: numbers for readers, from finished tables. Does not belong here: labels (`labels`), decisions (`curation`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from pipelines import catalogue, schemas
from pipelines.curation import POLICIES, Policy, spelled
from pipelines.tables import Manifest, Store

FILE = "label_card.md"
RESAMPLES = 1_000
SEED = 0
OTHERS = 2
"""Other raters from which on a vote is said to be with or against their majority."""
TERTILES = ("low", "middle", "high")
_TABLES = (
    schemas.PREFERENCES,
    schemas.CALIBRATION,
    schemas.MINORITY,
    schemas.ANNOTATORS,
    schemas.RATER_AGREEMENT,
)
_ALL = "all"


def build(store: Store, policies: Sequence[Policy] | None = None) -> str:
    """Publish the card as `label_card.md` of the store; return its path.

    Raises:
        tables.StoreError: see card.
    """
    store.publish(FILE, card(store, policies).encode())
    return store.path(FILE)


def card(store: Store, policies: Sequence[Policy] | None = None) -> str:
    """Return the card as Markdown. policies: whose decisions it tells; None: every policy with its defaults.

    Raises:
        tables.StoreError: a table of labels is missing or old, or there is no catalogue.
    """
    commits = {t.name: store.require_current(t.name) for t in _TABLES}
    votes = _votes(store)
    chosen = [kind() for kind in POLICIES.values()] if policies is None else list(policies)
    pairs, prompts = store.scan(schemas.PREFERENCES).select(pl.len(), pl.col("prompt_id").n_unique()).collect().row(0)
    head = (
        f"# Label card\n\n{pairs:,} pairs of {prompts:,} prompts. Shares count people; [low, high] are 95 % intervals."
    )
    parts = [
        head,
        _voters(votes),
        _agreement(store),
        _scorers(store),
        _minority(votes, commits[schemas.MINORITY.name]),
        *_policies(store, chosen, votes),
    ]
    return "\n\n".join(parts) + "\n"


def reason_kind(column: str) -> pl.Expr:
    """Return a reason without what differs from pair to pair: which image, details behind a colon, a compared value."""
    return (
        pl.col(column)
        .str.replace(r"(?s):\s.*$", "")
        .str.replace_all(r"\bimage_[01]\b", "image")
        .str.replace_all(r" -?\d[\w.+-]*( [<>]=?) ", "$1 ")
    )


def _votes(store: Store) -> pl.DataFrame:
    """Return every vote that counts, with its source, split, people, number of its prompt, and what `minority` says."""
    said = ("minority_probability", "minority_score", "others", "share_against")
    return (
        catalogue.counted_votes(store, catalogue.shard_keys(store))
        .select("vote_id", "pair_id", "prompt_id", "source", "annotator_id", "label_0", people=catalogue.PEOPLE)
        .join(store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "split"), on="prompt_id", how="left")
        .join(store.scan(schemas.MINORITY).select("vote_id", *said), on="vote_id", how="left")
        .join(_tertiles(store), on="annotator_id", how="left")
        .with_columns(
            prompt=pl.col("prompt_id").rank("dense").cast(pl.Int64) - 1,
            is_against=pl.when(pl.col("others") >= OTHERS, pl.col("share_against") != 0.5).then(
                pl.col("share_against") > 0.5
            ),
        )
        .drop("vote_id", "prompt_id")
        .collect()
    )


def _tertiles(store: Store) -> pl.LazyFrame:
    """Return the third of the known annotators by annotator_score in which each lies."""
    place = pl.col("annotator_score").rank("average") / pl.len()
    third = pl.when(place <= 1 / 3).then(pl.lit("low")).when(place > 2 / 3).then(pl.lit("high"))
    known = store.scan(schemas.ANNOTATORS).filter(pl.col("annotator_id") != "unknown", pl.col("votes") > 0)
    return known.select("annotator_id", tertile=third.otherwise(pl.lit("middle")))


def _by_source(votes: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    parts = [(str(name), part) for (name,), part in votes.group_by("source")]
    # One source is all there is.
    return sorted(parts, key=lambda p: p[0]) + ([(_ALL, votes)] if len(parts) != 1 else [])


# --- the parts ---------------------------------------------------------------------------------------------------------


def _voters(votes: pl.DataFrame) -> str:
    rows = []
    for name, part in _by_source(votes):
        people, pairs = _people(part), part["pair_id"].n_unique()
        rows.append(
            [
                name,
                f"{people:,}",
                f"{part['annotator_id'].drop_nulls().n_unique():,}",
                _percent(_ratio(_people(part, part["annotator_id"].is_null()), people)),
                f"{pairs:,}",
                _number(_ratio(people, pairs)),
                _percent(_ratio(_people(part, part["label_0"] == 0.5), people)),
                *(f"{_people(part, part['split'] == s):,}" for s in schemas.SPLITS),
            ]
        )
    header = ["source", "votes", "annotators known", "votes by unknown %", "pairs", "votes per pair", "ties %"]
    return _section(
        "Who voted",
        "A vote is one person's on one pair; votes that repeat another or have no label do not count. Unknown: the source "
        "names no annotator. The last three columns are the votes by split of their prompt.",
        [*header, *schemas.SPLITS],
        rows,
    )


def _agreement(store: Store) -> str:
    rows = [
        [
            r["source"],
            f"{r['pairs']:,}",
            f"{r['ratings']:,}",
            _number(r["alpha"], r["alpha_low"], r["alpha_high"]),
            _number(r["alpha_decided"]),
            _percent(r["minority_share"]),
            _percent(r["first_share"], r["first_low"], r["first_high"]),
        ]
        for r in store.read(schemas.RATER_AGREEMENT).iter_rows(named=True)
    ]
    people = store.read(schemas.ANNOTATORS).filter(pl.col("annotator_id") != "unknown")
    compared = people.filter(pl.col("reliability").is_not_null())
    reliability = "Nobody can be compared with others, so no annotator has a reliability."
    if len(compared):
        low, middle, high = (100 * (compared["reliability"].quantile(q, "linear") or 0) for q in (0.05, 0.5, 0.95))
        reliability = (
            f"Reliability (agreement with the others' majority, shrunk to the mean, decided votes only) of the "
            f"{len(compared):,} annotators who can be compared: median {middle:.1f} %, 5 to 95 % of them {low:.1f} to "
            f"{high:.1f} %."
        )
    placed = people.filter(pl.col("placed") > 0)
    leaning = placed.filter((pl.col("first_low") > 0.5) | (pl.col("first_high") < 0.5))
    sides = (
        f" {len(leaning):,} of {len(placed):,} annotators prefer one place of the display beyond their 95 % interval; "
        f"chance alone gives about {0.05 * len(placed):.0f}."
        if len(placed)
        else ""
    )
    header = [
        "source",
        "pairs of several",
        "votes on them",
        "alpha",
        "alpha, decided",
        "smaller side %",
        "first shown %",
    ]
    return _section(
        "Do they agree",
        "alpha is Krippendorff's, nominal: 1 agreement, 0 chance; a tie is a value of its own, but not in 'decided'. Smaller "
        "side: people on it, of pairs with 3 decided votes or more. First shown: decided votes for the image displayed "
        f"first; 50 is no bias. {reliability}{sides}",
        header,
        rows,
    )


def _scorers(store: Store) -> str:
    found = store.read(schemas.CALIBRATION).filter(pl.col("fold") == -1)
    revisions = store.current_revisions()
    rows = [
        [
            r["scorer"],
            revisions.get(r["scorer"], "-"),
            _percent(r["accuracy"]),
            f"{r['votes']:,}",
            "-" if r["slope"] is None else f"{r['slope']:.3g}",
            _number(r["ece_raw"], digits=3),
            _number(r["ece_calibrated"], digits=3),
        ]
        for r in found.filter(~pl.col("scorer").str.contains(":")).iter_rows(named=True)
    ]
    learned = len(found.filter(pl.col("scorer").str.contains(":")))
    note = f" The ensemble also learned what a generator adds for its images (terms: {learned})." if learned else ""
    return _section(
        "The scorers against the votes",
        "Accuracy: decided votes whose image has the higher score; equal scores count half, tied votes not at all. "
        "p = sigmoid(slope x difference of scores). Calibration error: mean gap between p and the share that chose the "
        f"favoured image, ties half; of the scores as published, then cross-fitted by prompt.{note}",
        ["scorer", "active revision", "accuracy %", "votes", "slope", "error before", "error after"],
        rows,
    )


def _minority(votes: pl.DataFrame, commit: Manifest) -> str:
    decided = votes.filter(pl.col("label_0") != 0.5)
    rows = []
    for name, part in _by_source(decided):
        told = part.filter(pl.col("is_against").is_not_null())
        rows.append(
            [
                name,
                f"{_people(part):,}",
                _percent(*share(part, "minority_probability"), none="uncalibrated"),
                _percent(*share(part, "minority_score")),
                _percent(*share(told.with_columns(pl.col("is_against").cast(pl.Float64)), "is_against")),
                f"{_people(told):,}",
            ]
        )
    on = commit.extra.get("calibrated_on") or []
    basis = (
        f"fitted where several people voted ({', '.join(on)})"
        if on
        else "uncalibrated: no source has several votes per pair"
    )
    note = f" {commit.extra['calibration_note'].rstrip('.')}." if commit.extra.get("calibration_note") else ""
    header = [
        "source",
        "decided votes",
        "minority share %",
        "mean minority_score %",
        "against the others %",
        "of votes",
    ]
    return _section(
        "Votes against what most people would say",
        f"Minority share: mean minority_probability, {basis}.{note} minority_score is 1 - p of the recorded label: it also "
        "rises where people are divided, so its mean is no share of minority votes. Against the others: counted, where "
        f"{OTHERS} others or more decided and were not even. Ties are left out; intervals: prompts as clusters.",
        header,
        rows,
    )


def _policies(store: Store, policies: Iterable[Policy], votes: pl.DataFrame) -> tuple[str, str]:
    """Return what each policy keeps and drops, and whose votes it loses."""
    decided = votes.filter(pl.col("label_0") != 0.5)
    groups = _groups(decided)
    everyone = pl.repeat(True, len(decided), eager=True)
    sizes = [_percent(_ratio(_people(decided, group), _people(decided))) for group in groups.values()]
    kept: list[list[str]] = []
    lost = {
        "votes of": ["all", "- dropped", "- overruled", *groups, "against, of those that others judge"],
        "share of all": ["", "", "", *sizes, _percent(_share_against(decided, everyone))],
    }
    for policy in policies:
        pairs = (
            policy.apply(store.scan(schemas.PREFERENCES))
            .select("pair_id", "human_label_0", "target_label_0", why=reason_kind("excluded_because"))
            .collect()
        )
        kept.append([spelled(policy), *_kept(pairs)])
        lost[spelled(policy)] = _lost(decided, groups, pairs)
    keeps = _section(
        "What each policy keeps",
        "Of the pairs of all splits. Turned: kept pairs whose target is not the side that most humans chose, of those where "
        "most chose one.",
        ["policy", "pairs kept", "%", "turned %", "not kept, because"],
        kept,
    )
    loses = _section(
        "Whose votes each policy loses",
        "A decided vote is lost where its pair is dropped, or kept with the other side as target (overruled). 12.3 (40.0): "
        "of the group's votes 12.3 % are lost, and 40.0 % of all lost votes are the group's. Annotators: thirds of the known "
        "ones by annotator_score, their agreement with the scorers; policies that read scores lose more of the lowest third "
        "by construction. With, against the others: as above; the last line is the share against them of all, and of the "
        "lost, votes on which others say anything. Ties are left out.",
        list(lost),
        [list(row) for row in zip(*lost.values(), strict=True)],
    )
    return keeps, loses


def _kept(pairs: pl.DataFrame) -> list[str]:
    """Return a policy's row of what it keeps. pairs: human_label_0, target_label_0, why."""
    kept = pairs.filter(pl.col("target_label_0").is_not_null())
    sided = kept.filter(pl.col("human_label_0") != 0.5)
    turned = sided.filter((pl.col("human_label_0") > 0.5) != (pl.col("target_label_0") > 0.5))
    why = pairs.filter(pl.col("target_label_0").is_null()).group_by("why").len()
    reasons = why.sort("len", "why", descending=[True, False]).iter_rows()
    return [
        f"{len(kept):,}",
        _percent(_ratio(len(kept), len(pairs))),
        _percent(_ratio(len(turned), len(sided))),
        "; ".join(f"{n:,} {reason}" for reason, n in reasons),
    ]


def _lost(decided: pl.DataFrame, groups: dict[str, pl.Series], pairs: pl.DataFrame) -> list[str]:
    """Return a policy's column of whose votes it loses. pairs: pair_id, target_label_0."""
    targets = pairs.select("pair_id", "target_label_0")
    target = decided.select("pair_id").join(targets, on="pair_id", how="left", maintain_order="left")["target_label_0"]
    is_dropped, is_overruled = target.is_null(), (target != decided["label_0"]).fill_null(False)
    is_lost = is_dropped | is_overruled
    lost, total = _people(decided, is_lost), _people(decided)
    cells = [_percent(_ratio(_people(decided, group), total)) for group in (is_lost, is_dropped, is_overruled)]
    for group in groups.values():
        people, gone = _people(decided, group), _people(decided, group & is_lost)
        cells.append(f"{_percent(gone / people)} ({_percent(_ratio(gone, lost))})" if people else "-")
    return [*cells, _percent(_share_against(decided, is_lost))]


def _share_against(decided: pl.DataFrame, group: pl.Series) -> float | None:
    """Return which share of a group's votes is against the others, of those that can be compared with them."""
    compared = decided["is_against"].is_not_null() & group
    return _ratio(_people(decided, compared & decided["is_against"].fill_null(False)), _people(decided, compared))


def _groups(decided: pl.DataFrame) -> dict[str, pl.Series]:
    """Return name -> whether each vote is of this group."""
    groups = {name: decided["source"] == name for name in sorted(decided["source"].unique())}
    for third in TERTILES:
        groups[f"annotators, {third} score"] = (decided["tertile"] == third).fill_null(False)
    groups["unknown annotators"] = decided["annotator_id"].is_null()
    groups["votes with the others"] = (~decided["is_against"]).fill_null(False)
    groups["votes against the others"] = decided["is_against"].fill_null(False)
    return groups


def _people(votes: pl.DataFrame, group: pl.Series | None = None) -> int:
    return int((votes["people"] if group is None else votes["people"].filter(group)).sum())


# --- numbers -----------------------------------------------------------------------------------------------------------


def share(votes: pl.DataFrame, column: str) -> tuple[float | None, float | None, float | None]:
    """Return the mean of a column over people, where it is known, and its 95 % interval; None where there is none.

    There is no mean where nothing is known, and no interval of a single prompt, which can only be drawn again as it is.
    votes: people, prompt (a number) and the column.
    """
    known = votes.filter(pl.col(column).is_not_null())
    if known.is_empty():
        return None, None, None
    people, prompt = known["people"].to_numpy().astype(float), known["prompt"].to_numpy()
    sums = np.stack([np.bincount(prompt, people * known[column].to_numpy()), np.bincount(prompt, people)], 1)
    sums = sums[sums[:, 1] > 0]
    mean, n = float(sums[:, 0].sum() / sums[:, 1].sum()), len(sums)
    if n < 2:
        return mean, None, None
    rng = np.random.default_rng(SEED)
    drawn = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) @ sums for _ in range(RESAMPLES)])
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]).tolist()
    return mean, low, high


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(value: float | None, low: float | None = None, high: float | None = None, none: str = "-") -> str:
    value, low, high = (None if v is None else 100 * v for v in (value, low, high))
    return _number(value, low, high, digits=1, none=none)


def _number(
    value: float | None, low: float | None = None, high: float | None = None, digits: int = 2, none: str = "-"
) -> str:
    if value is None:
        return none
    return f"{value:.{digits}f}" + ("" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


def _section(title: str, note: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [f"## {title}", "", note, "", _line(header), "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *map(_line, rows)])


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"
