"""A page of pairs as HTML: header, legend and a card per pair; and the index of pages.

Belongs here: how pairs look. Does not belong here: which pairs (`queries`), escaping and style (`elements`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines import schemas
from pipelines.pages.elements import Html, document, el, name, number, stranger, together
from pipelines.pages.pictures import QUALITIES, Picture, uri
from pipelines.pages.queries import Chosen

MINORITY_FROM = 0.5
"""A minority value above it marks a pair; the default threshold of the policies `without_minority` and `minority_only`."""
VOTES_SHOWN = 12
"""Single votes listed per pair; how many more there are is said."""
PREVIEWS = 8
"""Pictures of each page that the index shows."""


def page_html(chosen: Chosen, pictures: Mapping[str, Picture], uris: Mapping[str, str]) -> str:
    """Return a page of pairs. pictures, uris: by image; an image without a uri is one that there is no picture of."""
    query, shown = chosen.query, len(chosen.pairs)
    count = f"{chosen.matching:,} {'pair matches' if chosen.matching == 1 else 'pairs match'}, {shown:,} shown"
    facts = together(el("div", el("dt", k), stranger("dd", v)) for k, v in chosen.facts)
    header = el(
        "header",
        el("h1", query.title),
        el("p", query.words, class_="words"),
        el("p", count, class_="count"),
        el("dl", facts, class_="facts"),
        _legend(),
    )
    cards = together(_card(i, pair, chosen, pictures, uris) for i, pair in enumerate(chosen.pairs, 1))
    nothing = el("p", "No pair of the store matches.", class_="nothing")
    return document(f"{query.title}: pairs", el("main", header, cards if chosen.pairs else nothing))


_WORDS = {
    "pair": "two images of one prompt; the left one (image_0) comes first in the order of ids, whatever was shown where",
    "vote": "one human judgement of a pair, as recorded",
    "scorer": "a reward model; it votes for the image to which it gives the higher score",
    "consensus": "majority vote of the scorers on a pair",
    "minority": f"of a vote: against what most people would say; marked above {MINORITY_FROM}",
    "policy": "turns preferences into training labels (its target) and excludes pairs with a reason",
}
_COLUMNS = (
    *("p_ensemble", "p_smpo", "p_linear", "p_log", "agreement", "confidence", "stability", "metric"),
    *("minority_score", "minority_probability", "minority_share", "excluded_because"),
)
_SHORT = {"confidence": "c", "stability": "v", "metric": "u"}


def _legend() -> Html:
    # A column of `preferences` that another table brings is explained there.
    tables = (schemas.PREFERENCES, schemas.CONSENSUS, schemas.SMOOTHED, schemas.MINORITY)
    meanings = {c.name: c.meaning for t in tables for c in t.columns}
    words = {**_WORDS, **{f"{_SHORT[c]} ({c})" if c in _SHORT else c: meanings[c] for c in _COLUMNS}}
    key = el(
        "p",
        _mark("human", "humans' choice"),
        _mark("consensus", "consensus of the scorers"),
        _mark("minority", "probably a minority choice"),
        _mark("target", "target of the policy"),
        class_="key",
    )
    told = together(el("div", el("dt", word), el("dd", meaning)) for word, meaning in words.items())
    return together([key, el("details", el("summary", "What the words mean"), el("dl", told, class_="words"))])


_SIGNS = {"human": "●", "consensus": "◆", "minority": "▲", "target": "★", "bad": "✕"}
_SIDES = ("left", "right")


def _mark(kind: str, *text: str | None) -> Html:
    return el("span", _SIGNS[kind], " ", *text, class_=f"mark {kind}")


def _side(label_0: float | None) -> int | None:
    """Return the image that a label prefers, None where it prefers none."""
    return None if label_0 is None or label_0 == 0.5 else int(label_0 < 0.5)


def _card(
    place_on_page: int, pair: dict[str, Any], chosen: Chosen, pictures: Mapping[str, Picture], uris: Mapping[str, str]
) -> Html:
    minority = pair["minority_score"] if pair["minority_probability"] is None else pair["minority_probability"]
    is_minority = minority is not None and minority > MINORITY_FROM
    votes = chosen.votes.get(pair["pair_id"], [])
    people = [sum(v["people"] for v in votes if _side(v["label_0"]) == i) for i in (0, 1)]
    ties = pair["n_votes"] - sum(people)
    human, consensus, target = (_side(pair.get(c)) for c in ("human_label_0", "consensus_label_0", "target_label_0"))
    figures = []
    for i in (0, 1):
        marks = [
            _mark("human", f"humans' choice, {people[i]} of {pair['n_votes']}") if human == i else None,
            _mark("minority", f"minority {minority:.2f}") if human == i and is_minority else None,
            _mark("consensus", "consensus") if consensus == i else None,
            _mark("target", f"target, p = {pair['target_probability']:.2f}") if target == i else None,
        ]
        kinds = [k for k, side in (("human", human), ("consensus", consensus)) if side == i]
        figures.append(_figure(i, pair, pictures, uris, [m for m in marks if m], kinds))
    place = [
        el("a", f"{place_on_page}", href=f"#pair-{pair['pair_id']}", title=f"pair {pair['pair_id']}"),
        el("span", pair["split"]),
        name("span", pair["sources"]),
        el("code", pair["pair_id"][:12]),
        el("span", "in a preference cycle") if pair["is_in_cycle"] else None,
    ]
    reasons = [("no model may train on it: ", pair["excluded_because"])]
    if pair["excluded_because"] is None:
        reasons.append(("left out by the policy: ", pair.get("left_out_because")))
    told = [
        el("p", _mark("bad", what, stranger("span", why)), class_="reason") for what, why in reasons if why is not None
    ]
    return el(
        "article",
        el("p", *place, class_="place"),
        stranger("h2", pair["prompt"]),
        el(
            "div",
            el("div", el("div", *figures, class_="images"), _people(people, ties), _numbers(pair)),
            el("div", *told, _scores(pair, chosen.scorers), _votes(votes)),
            class_="columns",
        ),
        id=f"pair-{pair['pair_id']}",
        class_="minority" if is_minority else None,
    )


def _figure(
    i: int,
    pair: dict[str, Any],
    pictures: Mapping[str, Picture],
    uris: Mapping[str, str],
    marks: list[Html],
    kinds: list[str],
) -> Html:
    image_id = pair[f"image_{i}_id"]
    picture = pictures[image_id]
    if picture.jpeg is None:
        shown = el("div", el("b", picture.status), stranger("span", picture.reason), class_="absent")
    else:
        shown = _img(uris.get(image_id, ""), f"{_SIDES[i]} image of the pair", picture)
    size = f"{picture.width} x {picture.height}" if picture.jpeg is not None else None
    caption = [
        el("span", _SIDES[i], title=image_id),
        el("span", size) if size else None,
        name("span", pair[f"model_{i}"]) if pair[f"model_{i}"] is not None else None,
    ]
    return el(
        "figure",
        el("div", shown, class_="frame"),
        el("figcaption", el("p", *caption, class_="place"), el("p", *marks, class_="marks")),
        class_=" ".join(kinds) or None,
    )


def _img(uri: str, alt: str, picture: Picture) -> Html:
    return el("img", src=uri, alt=alt, class_="pixels" if picture.is_pixel_art else None)


def _people(people: Sequence[int], ties: int) -> Html:
    if not sum(people) + ties:
        return el("p", "No human vote counts.", class_="people")
    names = [f"{people[0]} left", f"{ties} {'tie' if ties == 1 else 'ties'}", f"{people[1]} right"]
    if not ties:
        del names[1]
    parts = together(
        el("i", style=f"flex-grow:{n}", class_=c)
        for c, n in (("left", people[0]), ("tie", ties), ("right", people[1]))
        if n
    )
    return el("p", el("b", "Humans "), " : ".join(names), el("span", parts, class_="bar"), class_="people")


_VOTES = {1: "◀ left", -1: "right ▶", 0: "= equal", None: "- none"}
_POOLS = {"p_ensemble": "ensemble", "p_smpo": "SmPO", "p_linear": "linear pool", "p_log": "log pool"}


def _scores(pair: dict[str, Any], scorers: Sequence[str]) -> Html:
    """Return the table of scores, votes and probabilities, headed by what the consensus of the votes is."""
    consensus = _side(pair["consensus_label_0"])
    caption = (
        "undecided"
        if consensus is None
        else f"{_SIDES[consensus]}, decided by {str(pair['decided_by']).replace('_', ' ')}"
    )
    if pair.get("voters"):
        caption += f" ({pair['votes_0']} : {pair['votes_1']} of {pair['voters']} voters)"
    rows = []
    for s in scorers:
        scores = [pair[f"score_{i}_{s}"] for i in (0, 1)]
        best = None if None in scores or scores[0] == scores[1] else int(scores[1] > scores[0])
        cells = [el("td", number(v, ".4g"), class_="best" if best == i else None) for i, v in enumerate(scores)]
        vote = el("td", _VOTES[pair.get(f"vote_{s}")])
        rows.append(el("tr", el("th", s), *cells, vote, _probability(pair.get(f"calibrated_{s}"))))
    if pair.get("vote_human") is not None:
        rows.append(el("tr", el("th", "humans"), el("td"), el("td"), el("td", _VOTES[pair["vote_human"]]), el("td")))
    pools = [el("tr", el("th", name), *[el("td")] * 3, _probability(pair[c]), title=c) for c, name in _POOLS.items()]
    head = together(el("th", name) for name in ("scorer", "left", "right", "vote", "p(left)"))
    table = el(
        "table",
        el("caption", el("b", "Consensus "), caption),
        el("thead", el("tr", head)),
        el("tbody", *rows),
        el("tbody", *pools),
        class_="scores",
    )
    return el("div", table, class_="scroll")


def _probability(value: float | None) -> Html:
    """Return a cell with a probability for image_0, as a number and as a bar that grows from the left."""
    if value is None:
        return el("td", "-")
    bar = el("span", el("i", style=f"width:{100 * value:.1f}%", class_="left"), class_="bar half")
    return el("td", number(value), bar)


def _numbers(pair: dict[str, Any]) -> Html:
    names = ["agreement", "confidence", "stability", "metric", "minority_score", "minority_probability"]
    names += ["minority_share"] if pair["minority_share"] is not None else []
    cells = together(
        el("div", el("dt", _SHORT.get(n, n.replace("_", " ")), title=n), el("dd", number(pair[n]))) for n in names
    )
    return el("dl", cells, class_="numbers")


def _votes(votes: Sequence[dict[str, Any]]) -> Html | None:
    """Return the single decided votes of a pair, folded."""
    if not votes:
        return None
    rows = []
    for vote in votes[:VOTES_SHOWN]:
        side, others = _SIDES[int(vote["label_0"] < 0.5)], vote["others"]
        against = "-" if vote["share_against"] is None else f"{vote['share_against']:.0%} of {others}"
        rows.append(
            el(
                "tr",
                name("th", vote["annotator_id"] or "unknown"),
                el("td", side + (f" x {vote['people']}" if vote["people"] > 1 else "")),
                *(el("td", number(vote[c])) for c in ("minority_score", "minority_probability")),
                el("td", against),
                el("td", number(vote["reliability"])),
            )
        )
    more = len(votes) - VOTES_SHOWN
    head = ("annotator", "chose", "minority score", "probability", "others against", "reliability")
    return el(
        "details",
        el("summary", f"{len(votes)} decided vote{'s' if len(votes) > 1 else ''}"),
        el(
            "div",
            el("table", el("thead", el("tr", *(el("th", h) for h in head))), el("tbody", *rows), class_="votes"),
            class_="scroll",
        ),
        el("p", f"and {more} more") if more > 0 else None,
    )


def index_html(chosen: Mapping[str, Chosen], pictures: Mapping[str, Picture], sizes: Mapping[str, int]) -> str:
    """Return the index of the pages that were chosen, by name, with a few of their pictures. sizes: bytes of each."""

    def previews(c: Chosen) -> list[Html]:
        found = [p for p in (pictures[i] for i in c.uses) if p.jpeg is not None][:PREVIEWS]
        return [_img(uri(p, *QUALITIES[-1]), "", p) for p in found]

    entries = [
        el(
            "article",
            el("h2", el("a", c.query.title, href=f"{name}.html")),
            el("p", c.query.words),
            el("div", *previews(c), class_="previews") if c.pairs else None,
            el("p", f"{c.matching:,} match, {len(c.pairs)} shown, {sizes[name] / 1e6:.1f} MB", class_="place"),
        )
        for name, c in chosen.items()
    ]
    facts = next(iter(chosen.values())).facts
    told = together(el("div", el("dt", k), stranger("dd", v)) for k, v in facts)
    header = el("header", el("h1", "Pairs of the store"), el("dl", told, class_="facts"))
    return document("Pairs of the store", el("main", header, *entries))
