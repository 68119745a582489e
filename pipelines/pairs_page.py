"""Pictures of the data: one self-contained HTML page that shows pairs with everything that is known about them.

    pairs/<query>.html        both images, votes, scores, probabilities and reasons of the pairs that a query finds
    pairs/index.html          what pages there are

A page loads nothing and runs nothing: images are small JPEGs within it, and its content policy forbids the rest. Prompts,
names and reasons come from strangers; they reach the page through `_el` alone, which escapes them.

Belongs here: which pairs to look at, and how they look. Does not belong here: what a label means (`labels`), who may be
trained on (`curation`).
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from PIL import Image, ImageFilter

from pipelines import images, schemas
from pipelines.config import ConfigError
from pipelines.curation import Policy, spelled
from pipelines.sources import SourceError
from pipelines.stored import StoredImage, read_images
from pipelines.tables import Store

BUDGET_BYTES = 5_000_000
MINORITY_FROM = 0.5
"""A minority value above it marks a pair; the default threshold of the policies `without_minority` and `minority_only`."""
VOTES_SHOWN = 12
"""Single votes listed per pair; how many more there are is said."""
TEXT_SHOWN = 1000
"""Characters of a prompt or a reason; how many it has is said."""
NAME_SHOWN = 80
"""Characters of a name (of a generator, an annotator, sources)."""
QUALITIES = (
    *((512, 82), (448, 80), (384, 80), (320, 78), (288, 76), (256, 75), (224, 72), (192, 68), (176, 64), (160, 60)),
    *((144, 55), (128, 50), (112, 45), (96, 40), (80, 35), (64, 30)),
)
"""(longest side in pixels, JPEG quality), best first: a page takes the first with which it fits."""
PIXEL_ART = 64
"""Pictures up to this side are kept whole, in full colour, and enlarged as squares."""
PREVIEWS = 8
"""Pictures of each page that the index shows."""
_SAMPLE = 12
_BATCH = 32


# --- which pairs -------------------------------------------------------------------------------------------------------

_HUMAN, _CONSENSUS = pl.col("human_label_0"), pl.col("consensus_label_0")
_IS_DECIDED = _HUMAN.is_not_null() & (_HUMAN != 0.5)
_MINORITY = pl.coalesce("minority_probability", "minority_score")
# Of two votes that differ there is no minority_share.
_EVENNESS = pl.coalesce("minority_share", 0.5 - (_HUMAN - 0.5).abs())
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
        "Pairs on which several people voted and do not agree, the most evenly divided first, and of those the pairs with "
        "most votes (minority_share; where fewer than three chose an image, a tie counts half for each side).",
        (pl.col("n_votes") >= 2) & (_EVENNESS > 0),
        (-_EVENNESS, -pl.col("n_votes")),
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
class _Chosen:
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


def page(
    store: Store,
    shard_keys: Sequence[str],
    *,
    query: str = "random",
    where: str | None = None,
    order_by: str | None = None,
    policy: Policy | None = None,
    limit: int = 200,
    blur: float = 0.0,
    budget_bytes: int = BUDGET_BYTES,
) -> str:
    """Return a page of the pairs that a query finds, as HTML of at most `budget_bytes` bytes in UTF-8.

    Args:
        shard_keys: `catalogue.shard_keys`: the shards whose images count.
        query: one of QUERIES.
        where: SQL condition on the columns of `preferences` that the pairs fulfil besides.
        order_by: SQL expression in place of the query's order, smallest first; '... DESC' for largest first; null last.
        policy: pairs show its target, or why there is none; where and order_by may use `target_label_0` and
            `target_probability`, and `excluded_because` is then the policy's.
        limit: pairs shown at most.
        blur: standard deviation of a Gaussian in percent of a picture's longer side; the page holds no sharper picture.

    Raises:
        ConfigError: an option is wrong, or the page does not fit into the budget with the smallest pictures.
        tables.StoreError: a label table is missing or old, or a shard is not ingested.
    """
    chosen = _choose(store, query, where, order_by, policy, limit, blur)
    return _fitted(chosen, _pictures(store, shard_keys, chosen.uses, blur), budget_bytes)


def write_all(
    store: Store,
    shard_keys: Sequence[str],
    limit: int = 60,
    *,
    policy: Policy | None = None,
    blur: float = 0.0,
    budget_bytes: int = BUDGET_BYTES,
) -> dict[str, str]:
    """Publish a page for each of QUERIES and an index of them; return name -> path, the index as 'index'.

    Raises:
        ConfigError, tables.StoreError: see page.
    """
    chosen = {name: _choose(store, name, None, None, policy, limit, blur) for name in QUERIES}
    # One image may be on several pages; a shard is read once for all of them.
    wanted = {image_id for c in chosen.values() for image_id in c.uses}
    pictures = _pictures(store, shard_keys, wanted, blur)
    sizes: dict[str, int] = {}
    for name, of_query in chosen.items():
        content = _fitted(of_query, pictures, budget_bytes).encode()
        store.publish(f"pairs/{name}.html", content)
        sizes[name] = len(content)
    store.publish("pairs/index.html", _index(chosen, pictures, sizes).encode())
    return {name: store.path("pairs", f"{name}.html") for name in (*chosen, "index")}


def _choose(
    store: Store,
    name: str,
    where: str | None,
    order_by: str | None,
    policy: Policy | None,
    limit: int,
    blur: float,
) -> _Chosen:
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
    return _Chosen(query, told, int(count.item()), pairs.to_dicts(), _single_votes(store, ids), scorers)


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
    reliability = store.scan(schemas.ANNOTATORS).select("annotator_id", "reliability").collect()
    votes = votes.join(reliability, on="annotator_id", how="left")
    by_pair: dict[str, list[dict[str, Any]]] = {}
    for vote in votes.sort("label_0", "vote_id", descending=[True, False]).iter_rows(named=True):
        by_pair.setdefault(vote["pair_id"], []).append(vote)
    return by_pair


# --- pictures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    """An image as a page may show it: a JPEG of at most the first of QUALITIES, or None with status and reason."""

    jpeg: bytes | None
    width: int = 0
    height: int = 0
    status: str = "ok"
    reason: str | None = None

    @property
    def is_pixel_art(self) -> bool:
        return max(self.width, self.height) <= PIXEL_ART


def _pictures(store: Store, shard_keys: Sequence[str], wanted: Iterable[str], blur: float) -> dict[str, _Picture]:
    """Return image_id -> picture for every wanted image."""
    ids = sorted(set(wanted))
    found: dict[str, _Picture] = {}
    owners = store.scan(schemas.CATALOGUE_IMAGES).filter(pl.col("image_id").is_in(ids)).collect()
    for (owner,), part in owners.sort("owner").group_by("owner", maintain_order=True):
        if owner not in shard_keys:
            continue
        try:
            for batch in read_images(store, str(owner), part["image_id"].to_list(), _BATCH):
                found.update((i.image_id, _picture(i, blur)) for i in batch)
        except SourceError as error:
            # A page without the pictures of a shard says more than no page.
            problem = _Picture(None, status="unreadable", reason=str(error))
            found.update((i, problem) for i in part["image_id"] if i not in found)
    absent = _Picture(None, status="missing", reason="no shard of the catalogue holds the image")
    return {i: found.get(i, absent) for i in ids}


def _picture(image: StoredImage, blur: float) -> _Picture:
    if image.data is None:
        return _Picture(None, status=image.status, reason=image.reason)
    try:
        picture = images.decode_rgb(image.data)
    except images.UndecodableImage as error:
        return _Picture(None, status="undecodable", reason=str(error))
    width, height = picture.size
    picture.thumbnail(QUALITIES[0][:1] * 2)
    if blur:
        # Here, before anything is kept: nothing behind this line has the sharp picture.
        picture = picture.filter(ImageFilter.GaussianBlur(blur / 100 * max(picture.size)))
    return _Picture(_jpeg(picture, 95, full_colour=True), width, height)


def _jpeg(picture: Image.Image, quality: int, full_colour: bool) -> bytes:
    # A source's comment would come along: of any length, and blurred by nothing.
    picture.info.clear()
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=True, subsampling=0 if full_colour else 2)
    return out.getvalue()


def _uri(picture: _Picture, side: int, quality: int) -> str:
    assert picture.jpeg is not None
    data = picture.jpeg
    if not picture.is_pixel_art:
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        image.thumbnail((side, side))
        data = _jpeg(image, quality, full_colour=False)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _fitted(chosen: _Chosen, pictures: Mapping[str, _Picture], budget_bytes: int) -> str:
    """Return the page with the best pictures with which it fits into the budget."""
    uses = Counter({i: n for i, n in chosen.uses.items() if pictures[i].jpeg is not None})
    text = len(_page(chosen, pictures, {}).encode())
    sample = sorted(uses)[:: max(1, len(uses) // _SAMPLE)]
    for side, quality in QUALITIES:
        # A few pictures say whether it is worth while to encode all.
        few = [(uses[i], len(_uri(pictures[i], side, quality))) for i in sample]
        if few and text + uses.total() * sum(n * size for n, size in few) / sum(n for n, _ in few) > budget_bytes:
            continue
        uris = {i: _uri(pictures[i], side, quality) for i in uses}
        if text + sum(uses[i] * len(uri) for i, uri in uris.items()) <= budget_bytes:
            return _page(chosen, pictures, uris)
    raise ConfigError(
        f"pairs: budget_bytes = {budget_bytes:,} is too small for {len(chosen.pairs)} pairs: their text alone takes "
        f"{text:,}; raise it or lower limit = {len(chosen.pairs)}"
    )


# --- HTML --------------------------------------------------------------------------------------------------------------


class _Html(str):
    """Text that is HTML already."""


_VOID = ("img", "meta")
_VISIBLE = {**{i: 0x2400 + i for i in range(32) if i not in (9, 10)}, 127: 0x2421}
"""Control characters as their pictures: some of them are no HTML, and none should hide what a prompt holds."""


def _el(tag: str, *children: str | None, **attributes: str | bool | None) -> _Html:
    """Return an element; children and attribute values are escaped unless they are _Html. class_ stands for class."""
    named = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items())
    told = "".join(f" {k}" if v is True else f' {k}="{_escaped(str(v))}"' for k, v in named if v not in (None, False))
    inner = "".join(c if isinstance(c, _Html) else _escaped(c) for c in children if c is not None)
    return _Html(f"<{tag}{told}>" if tag in _VOID else f"<{tag}{told}>{inner}</{tag}>")


def _escaped(text: str) -> str:
    return html.escape(text.translate(_VISIBLE))


def _all(parts: Iterable[_Html]) -> _Html:
    return _Html("".join(parts))


def _stranger(tag: str, text: str | None, **attributes: str | bool | None) -> _Html:
    """Return a stranger's text in an element that its writing direction does not leave."""
    return _cut(tag, text or "", TEXT_SHOWN, **attributes)


def _name(tag: str, text: str) -> _Html:
    return _cut(tag, text, NAME_SHOWN)


def _cut(tag: str, text: str, shown: int, **attributes: str | bool | None) -> _Html:
    more = f" … ({len(text):,} characters)" if len(text) > shown else None
    return _el(tag, _el("bdi", text[:shown], dir="auto"), more, **attributes)


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _document(title: str, body: _Html) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = [
        _el("meta", charset="utf-8"),
        _Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        _el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _el("title", title),
        _Html(f"<style>{_STYLE}</style>"),
    ]
    return "<!doctype html>\n" + _el("html", _el("head", *head), "\n", _el("body", body), lang="en") + "\n"


def _page(chosen: _Chosen, pictures: Mapping[str, _Picture], uris: Mapping[str, str]) -> str:
    query, shown = chosen.query, len(chosen.pairs)
    count = f"{chosen.matching:,} {'pair matches' if chosen.matching == 1 else 'pairs match'}, {shown:,} shown"
    facts = _all(_el("div", _el("dt", k), _stranger("dd", v)) for k, v in chosen.facts)
    header = _el(
        "header",
        _el("h1", query.title),
        _el("p", query.words, class_="words"),
        _el("p", count, class_="count"),
        _el("dl", facts, class_="facts"),
        _legend(),
    )
    cards = _all(_card(i, pair, chosen, pictures, uris) for i, pair in enumerate(chosen.pairs, 1))
    nothing = _el("p", "No pair of the store matches.", class_="nothing")
    return _document(f"{query.title}: pairs", _el("main", header, cards if chosen.pairs else nothing))


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


def _legend() -> _Html:
    # A column of `preferences` that another table brings is explained there.
    tables = (schemas.PREFERENCES, schemas.CONSENSUS, schemas.SMOOTHED, schemas.MINORITY)
    meanings = {c.name: c.meaning for t in tables for c in t.columns}
    words = {**_WORDS, **{f"{_SHORT[c]} ({c})" if c in _SHORT else c: meanings[c] for c in _COLUMNS}}
    key = _el(
        "p",
        _mark("human", "humans' choice"),
        _mark("consensus", "consensus of the scorers"),
        _mark("minority", "probably a minority choice"),
        _mark("target", "target of the policy"),
        class_="key",
    )
    told = _all(_el("div", _el("dt", word), _el("dd", meaning)) for word, meaning in words.items())
    return _all([key, _el("details", _el("summary", "What the words mean"), _el("dl", told, class_="words"))])


_SIGNS = {"human": "●", "consensus": "◆", "minority": "▲", "target": "★", "bad": "✕"}
_SIDES = ("left", "right")


def _mark(kind: str, *text: str | None) -> _Html:
    return _el("span", _SIGNS[kind], " ", *text, class_=f"mark {kind}")


def _side(label_0: float | None) -> int | None:
    """Return the image that a label prefers, None where it prefers none."""
    return None if label_0 is None or label_0 == 0.5 else int(label_0 < 0.5)


def _card(
    number: int, pair: dict[str, Any], chosen: _Chosen, pictures: Mapping[str, _Picture], uris: Mapping[str, str]
) -> _Html:
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
        _el("a", f"{number}", href=f"#pair-{pair['pair_id']}", title=f"pair {pair['pair_id']}"),
        _el("span", pair["split"]),
        _name("span", pair["sources"]),
        _el("code", pair["pair_id"][:12]),
        _el("span", "in a preference cycle") if pair["is_in_cycle"] else None,
    ]
    reasons = [("no model may train on it: ", pair["excluded_because"])]
    if pair["excluded_because"] is None:
        reasons.append(("left out by the policy: ", pair.get("left_out_because")))
    told = [
        _el("p", _mark("bad", what, _stranger("span", why)), class_="reason")
        for what, why in reasons
        if why is not None
    ]
    return _el(
        "article",
        _el("p", *place, class_="place"),
        _stranger("h2", pair["prompt"]),
        _el(
            "div",
            _el("div", _el("div", *figures, class_="images"), _people(people, ties), _numbers(pair)),
            _el("div", *told, _scores(pair, chosen.scorers), _votes(votes)),
            class_="columns",
        ),
        id=f"pair-{pair['pair_id']}",
        class_="minority" if is_minority else None,
    )


def _figure(
    i: int,
    pair: dict[str, Any],
    pictures: Mapping[str, _Picture],
    uris: Mapping[str, str],
    marks: list[_Html],
    kinds: list[str],
) -> _Html:
    image_id = pair[f"image_{i}_id"]
    picture = pictures[image_id]
    if picture.jpeg is None:
        shown = _el("div", _el("b", picture.status), _stranger("span", picture.reason), class_="absent")
    else:
        shown = _img(uris.get(image_id, ""), f"{_SIDES[i]} image of the pair", picture)
    size = f"{picture.width} x {picture.height}" if picture.jpeg is not None else None
    caption = [
        _el("span", _SIDES[i], title=image_id),
        _el("span", size) if size else None,
        _name("span", pair[f"model_{i}"]) if pair[f"model_{i}"] is not None else None,
    ]
    return _el(
        "figure",
        _el("div", shown, class_="frame"),
        _el("figcaption", _el("p", *caption, class_="place"), _el("p", *marks, class_="marks")),
        class_=" ".join(kinds) or None,
    )


def _img(uri: str, alt: str, picture: _Picture) -> _Html:
    return _el("img", src=uri, alt=alt, class_="pixels" if picture.is_pixel_art else None)


def _people(people: Sequence[int], ties: int) -> _Html:
    if not sum(people) + ties:
        return _el("p", "No human vote counts.", class_="people")
    names = [f"{people[0]} left", f"{ties} {'tie' if ties == 1 else 'ties'}", f"{people[1]} right"]
    if not ties:
        del names[1]
    parts = _all(
        _el("i", style=f"flex-grow:{n}", class_=c)
        for c, n in (("left", people[0]), ("tie", ties), ("right", people[1]))
        if n
    )
    return _el("p", _el("b", "Humans "), " : ".join(names), _el("span", parts, class_="bar"), class_="people")


_VOTES = {1: "◀ left", -1: "right ▶", 0: "= equal", None: "- none"}
_POOLS = {"p_ensemble": "ensemble", "p_smpo": "SmPO", "p_linear": "linear pool", "p_log": "log pool"}


def _scores(pair: dict[str, Any], scorers: Sequence[str]) -> _Html:
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
        cells = [_el("td", _number(v, ".4g"), class_="best" if best == i else None) for i, v in enumerate(scores)]
        vote = _el("td", _VOTES[pair.get(f"vote_{s}")])
        rows.append(_el("tr", _el("th", s), *cells, vote, _probability(pair.get(f"calibrated_{s}"))))
    if pair.get("vote_human") is not None:
        rows.append(
            _el("tr", _el("th", "humans"), _el("td"), _el("td"), _el("td", _VOTES[pair["vote_human"]]), _el("td"))
        )
    pools = [_el("tr", _el("th", name), *[_el("td")] * 3, _probability(pair[c]), title=c) for c, name in _POOLS.items()]
    head = _all(_el("th", name) for name in ("scorer", "left", "right", "vote", "p(left)"))
    table = _el(
        "table",
        _el("caption", _el("b", "Consensus "), caption),
        _el("thead", _el("tr", head)),
        _el("tbody", *rows),
        _el("tbody", *pools),
        class_="scores",
    )
    return _el("div", table, class_="scroll")


def _probability(value: float | None) -> _Html:
    """Return a cell with a probability for image_0, as a number and as a bar that grows from the left."""
    if value is None:
        return _el("td", "-")
    bar = _el("span", _el("i", style=f"width:{100 * value:.1f}%", class_="left"), class_="bar half")
    return _el("td", _number(value), bar)


def _numbers(pair: dict[str, Any]) -> _Html:
    names = ["agreement", "confidence", "stability", "metric", "minority_score", "minority_probability"]
    names += ["minority_share"] if pair["minority_share"] is not None else []
    cells = _all(
        _el("div", _el("dt", _SHORT.get(n, n.replace("_", " ")), title=n), _el("dd", _number(pair[n]))) for n in names
    )
    return _el("dl", cells, class_="numbers")


def _votes(votes: Sequence[dict[str, Any]]) -> _Html | None:
    """Return the single decided votes of a pair, folded."""
    if not votes:
        return None
    rows = []
    for vote in votes[:VOTES_SHOWN]:
        side, others = _SIDES[int(vote["label_0"] < 0.5)], vote["others"]
        against = "-" if vote["share_against"] is None else f"{vote['share_against']:.0%} of {others}"
        rows.append(
            _el(
                "tr",
                _name("th", vote["annotator_id"] or "unknown"),
                _el("td", side + (f" x {vote['people']}" if vote["people"] > 1 else "")),
                *(_el("td", _number(vote[c])) for c in ("minority_score", "minority_probability")),
                _el("td", against),
                _el("td", _number(vote["reliability"])),
            )
        )
    more = len(votes) - VOTES_SHOWN
    head = ("annotator", "chose", "minority score", "probability", "others against", "reliability")
    return _el(
        "details",
        _el("summary", f"{len(votes)} decided vote{'s' if len(votes) > 1 else ''}"),
        _el(
            "div",
            _el("table", _el("thead", _el("tr", *(_el("th", h) for h in head))), _el("tbody", *rows), class_="votes"),
            class_="scroll",
        ),
        _el("p", f"and {more} more") if more > 0 else None,
    )


def _index(chosen: Mapping[str, _Chosen], pictures: Mapping[str, _Picture], sizes: Mapping[str, int]) -> str:
    def previews(c: _Chosen) -> list[_Html]:
        found = [p for p in (pictures[i] for i in c.uses) if p.jpeg is not None][:PREVIEWS]
        return [_img(_uri(p, *QUALITIES[-1]), "", p) for p in found]

    entries = [
        _el(
            "article",
            _el("h2", _el("a", c.query.title, href=f"{name}.html")),
            _el("p", c.query.words),
            _el("div", *previews(c), class_="previews") if c.pairs else None,
            _el("p", f"{c.matching:,} match, {len(c.pairs)} shown, {sizes[name] / 1e6:.1f} MB", class_="place"),
        )
        for name, c in chosen.items()
    ]
    facts = next(iter(chosen.values())).facts
    told = _all(_el("div", _el("dt", k), _stranger("dd", v)) for k, v in facts)
    header = _el("header", _el("h1", "Pairs of the store"), _el("dl", told, class_="facts"))
    return _document("Pairs of the store", _el("main", header, *entries))


_STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--ink:#1c2128;--dim:#59636e;--line:#d8dde3;--soft:#eceff2;
--human:#0a5cad;--consensus:#a34700;--minority:#9c1a6b;--target:#166b45;--bad:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--page:#0f1216;--card:#181c22;--ink:#e6e9ed;--dim:#98a3af;
--line:#343c46;--soft:#262c34;--human:#6db3ff;--consensus:#ffab5e;--minority:#f58ccb;--target:#66d19e;--bad:#ff8b80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:.94rem/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%;overflow-wrap:anywhere}
main{max-width:72rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{margin:0;font-size:1.7rem;line-height:1.2;letter-spacing:-.01em}
h2{margin:.15rem 0 .9rem;font-size:1.1rem;line-height:1.35;font-weight:600;overflow:hidden}
p{margin:.5rem 0}dl,dd{margin:0}a{color:inherit}
header{margin-bottom:1.5rem}
.words{max-width:52rem}.count{font-weight:600}.nothing{padding:3rem 0;text-align:center;color:var(--dim)}
.facts>div{display:flex;gap:.6rem}.facts>div>dt{flex:0 0 6rem;color:var(--dim)}
.key,.marks{display:flex;flex-wrap:wrap;gap:.35rem}
.key{margin:1rem 0 .6rem}
dl.words>div{display:grid;grid-template-columns:minmax(7rem,13rem) 1fr;gap:.75rem;padding:.3rem 0;
border-top:1px solid var(--line)}
dl.words dt{font-weight:600}
summary{cursor:pointer;color:var(--dim)}.scroll+details{margin-top:.8rem}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.1rem 1.1rem;margin:0 0 1rem;
break-inside:avoid}
article.minority{border-left:5px solid var(--minority)}
article:target{outline:2px solid var(--ink)}
.place{display:flex;flex-wrap:wrap;gap:.1rem .8rem;margin:0;font-size:.82rem;color:var(--dim)}
article>.place a{font-weight:700;color:var(--ink);text-decoration:none}
code{font:.95em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.columns{display:grid;grid-template-columns:minmax(0,31rem) minmax(0,1fr);gap:1.4rem;align-items:start}
.images{display:grid;grid-template-columns:1fr 1fr;gap:.9rem}
figure{margin:0;min-width:0}
.frame{display:flex;align-items:center;justify-content:center;min-height:9rem;padding:5px;border-radius:8px;
background:var(--soft);border:3px solid transparent}
.human>.frame{border-color:var(--human)}
.consensus>.frame{outline:3px dashed var(--consensus);outline-offset:2px}
.frame img{display:block;width:100%;height:auto;max-height:26rem;object-fit:contain;border-radius:3px}
.previews{display:flex;flex-wrap:wrap;gap:.4rem;margin:.7rem 0}
.previews img{width:64px;height:64px;object-fit:cover;border-radius:5px}
.pixels{image-rendering:pixelated}
.absent{padding:.6rem;text-align:center;color:var(--dim);font-size:.85rem}.absent b{display:block;color:var(--bad)}
figcaption{padding-top:.45rem}.marks{margin:.3rem 0 0}
.mark{padding:.05rem .5rem;border-radius:1rem;border:1px solid;font-size:.82rem;font-weight:600;overflow-wrap:anywhere}
.mark.human{color:var(--human)}.mark.consensus{color:var(--consensus);border-style:dashed}
.mark.minority{color:var(--card);background:var(--minority);border-color:var(--minority)}
.mark.target{color:var(--target);border-style:double;border-width:3px;padding:0 .4rem}
.mark.bad{color:var(--bad);border-radius:6px}
.reason{margin:0 0 .6rem}.reason .mark{display:block}
.people{margin:1rem 0 .8rem}
.bar{display:flex;gap:2px;height:7px;margin-top:.3rem;border-radius:4px;overflow:hidden;background:var(--soft)}
.bar i.left{background:var(--human)}.bar i.tie{background:var(--dim);opacity:.45}
.bar i.right{background:var(--human);opacity:.5}
.bar.half{display:inline-flex;position:relative;width:4.2rem;margin:0 0 0 .5rem;vertical-align:1px}
.bar.half i.left{background:var(--dim)}
.bar.half::after{content:"";position:absolute;left:50%;top:0;bottom:0;width:1px;background:var(--ink)}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
.scores{width:100%}
caption{text-align:left;padding-bottom:.3rem;font-size:.95rem}
th,td{padding:.22rem .5rem .22rem 0;text-align:right;font-weight:400;white-space:nowrap}
th:first-child{text-align:left}
td:last-child,.scores th:last-child{padding-right:0}
thead th{color:var(--dim);font-size:.78rem;border-bottom:1px solid var(--line)}
tbody+tbody tr:first-child>*{border-top:1px solid var(--line)}
.best{font-weight:700}
.numbers{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.7rem,1fr));gap:.5rem .8rem;margin:.8rem 0 0;
padding:.6rem .7rem;border-radius:8px;background:var(--soft);font-variant-numeric:tabular-nums}
.numbers dt{font-size:.75rem;color:var(--dim);line-height:1.2}.numbers dd{font-weight:600}
.scroll{overflow-x:auto}.votes{margin-top:.4rem}.votes th,.votes td{padding-right:.9rem}
@media (max-width:56rem){.columns{grid-template-columns:minmax(0,1fr)}}
@media (max-width:34rem){main{padding:1rem .6rem 3rem}article{padding:.8rem .7rem}.images{gap:.7rem}h1{font-size:1.4rem}
.bar.half{width:1.5rem;margin-left:.35rem}table{font-size:.8rem}th,td{padding-right:.4rem}
.numbers{grid-template-columns:repeat(auto-fill,minmax(6.3rem,1fr))}.frame{min-height:6rem}dl.words>div{grid-template-columns:1fr;gap:0}}
@media print{html{font-size:11px}body{background:#fff}main{max-width:none;padding:0}
.columns{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}
.votes th,.votes td{padding-right:.4rem}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details::details-content{content-visibility:visible;height:auto}}
"""
