import base64
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
from PIL import Image

from pipelines import catalogue, curation, pairs_page, schemas
from pipelines.config import ConfigError
from pipelines.pages import cards, elements
from pipelines.tables import Store, StoreError

SCORERS = ("clip", "hpsv2.1")
LABEL_TABLES = (schemas.PREFERENCES, schemas.CONSENSUS, schemas.SMOOTHED)


# --- a store with labels -----------------------------------------------------------------------------------------------


def write(store, table, frame):
    table = table.of(SCORERS)
    store.write(table, frame.select(list(table.polars_schema)), made_from="test")


def label(store, keys):
    """Write label tables with scores drawn at random, some equal and some missing; one pair in seven is excluded."""
    draw = np.random.default_rng(3)
    pairs = catalogue.all_pairs(store).collect()
    scores = draw.normal(size=(len(pairs), 2, len(SCORERS))).astype(np.float32)
    scores[::9, 1, 0] = scores[::9, 0, 0]
    d = scores[:, 0].astype(float) - scores[:, 1]
    is_missing = np.arange(len(pairs)) % 11 == 5
    signs = np.sign(d).astype(np.int8)
    total = signs.sum(1)
    p = 1 / (1 + np.exp(-d))
    side = np.sign(pairs["human_label_0"].fill_null(0.5).to_numpy() - 0.5)
    towards = np.where(side > 0, p.mean(1), 1 - p.mean(1))

    def known(values, when=True):
        return pl.Series(
            [v if k else None for v, k in zip(values.tolist(), np.broadcast_to(when, len(pairs)), strict=True)]
        )

    columns = {
        "sources": pl.Series(["pickapic"] * len(pairs)),
        "is_in_cycle": pairs["cycle"].is_not_null(),
        "confidence": known(1 - towards, side != 0),
        "minority_score": known(1 - towards, side != 0),
        "minority_probability": known((1 - towards) ** 2, (side != 0) & (np.arange(len(pairs)) % 2 == 0)),
        "is_unanimous": known((signs == side[:, None]).all(1), (side != 0) & ~is_missing),
        "consensus_label_0": known((total > 0) * 1.0, total != 0),
        "agreement": known(np.abs(total) / len(SCORERS)),
        "decided_by": known(np.where(total != 0, "majority", "none")),
        "excluded_because": known(np.array(["image_1 too_large: 9x9"] * len(pairs)), np.arange(len(pairs)) % 7 == 0),
        "votes_0": known((signs > 0).sum(1)),
        "votes_1": known((signs < 0).sum(1)),
        "voters": known(np.full(len(pairs), len(SCORERS))),
        **{c: known(p.mean(1)) for c in ("p_smpo", "p_ensemble", "p_linear", "p_log")},
    }
    for k, s in enumerate(SCORERS):
        columns |= {f"score_{i}_{s}": known(scores[:, i, k], True if i or k else ~is_missing) for i in (0, 1)}
        is_known = ~is_missing if k == 0 else True
        columns |= {f"vote_{s}": known(signs[:, k], is_known), f"calibrated_{s}": known(p[:, k], is_known)}
    frame = pairs.with_columns(**columns).join(
        store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt", "split").collect(), on="prompt_id"
    )
    decided = catalogue.counted_votes(store, keys).filter(pl.col("label_0") != 0.5).collect()
    on_pair = decided.group_by("pair_id").agg(n=pl.len(), for_0=(pl.col("label_0") == 1).sum())
    smaller = pl.min_horizontal("for_0", pl.col("n") - pl.col("for_0")) / pl.col("n")
    frame = frame.join(on_pair, on="pair_id", how="left").with_columns(
        n_decided=pl.col("n").fill_null(0).cast(pl.Int64), minority_share=pl.when(pl.col("n") >= 3).then(smaller)
    )
    for table in LABEL_TABLES:
        absent = {c: t for c, t in table.of(SCORERS).polars_schema.items() if c not in frame.columns}
        write(store, table, frame.with_columns(pl.lit(None, t).alias(c) for c, t in absent.items()))
    minority = decided.with_columns(
        people=pl.col("count").fill_null(1),
        minority_score=pl.lit(0.123),
        annotator_score=pl.lit(0.0),
        others=pl.lit(4),
        share_against=pl.lit(0.75),
    )
    absent = {c: t for c, t in schemas.MINORITY.polars_schema.items() if c not in minority.columns}
    write(store, schemas.MINORITY, minority.with_columns(pl.lit(None, t).alias(c) for c, t in absent.items()))


@pytest.fixture(scope="module")
def labelled(ingested, tmp_path_factory):
    """(store, shard keys) with label tables; read only."""
    store, keys = ingested
    folder = tmp_path_factory.mktemp("labelled") / "store"
    shutil.copytree(store.location, folder)
    store = Store(str(folder))
    label(store, keys)
    return store, keys


@pytest.fixture
def labelled_copy(labelled, tmp_path):
    store, keys = labelled
    shutil.copytree(store.location, tmp_path / "labelled")
    return Store(str(tmp_path / "labelled")), keys


@pytest.fixture(scope="module")
def preferences(labelled):
    return labelled[0].read(schemas.PREFERENCES).sort("pair_id").to_dicts()


def change(store, table, pair_id, **values):
    frame = store.read(table)
    is_pair = pl.col("pair_id") == pair_id
    write(
        store,
        table,
        frame.with_columns(pl.when(is_pair).then(pl.lit(v)).otherwise(c).alias(c) for c, v in values.items()),
    )


def replace_bytes(store, keys, data_of):
    """Give every image of the store the bytes that `data_of` returns for its id; None keeps them."""
    for key in keys:
        frame = store.read(schemas.IMAGES, key)
        changed = [data_of(i) or b for i, b in frame.select("image_id", "bytes").iter_rows()]
        store.write(
            schemas.IMAGES, frame.with_columns(bytes=pl.Series(changed, dtype=pl.Binary)), partition=key, made_from="t"
        )


# --- what a page holds -------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects the pairs of a page: id -> text and images; and all elements and attributes."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.pairs, self.elements, self.current = [], {}, [], None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "article" and "id" in attributes:
            self.current = self.pairs[attributes["id"].removeprefix("pair-")] = {
                "text": "",
                "images": [],
                "classes": [],
            }
        if self.current is not None:
            self.current["classes"].append((tag, attributes.get("class") or ""))
            self.current["images"] += [attributes["src"]] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "elements close in order"
        if tag == "article":
            self.current = None

    def handle_data(self, data):
        if self.current is not None:
            self.current["text"] += data


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def shown(page):
    return list(read(page).pairs)


def pictures(page):
    return [
        Image.open(io.BytesIO(base64.b64decode(u))) for u in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    ]


def side(value):
    return 0 if value is None else int(np.sign(value - 0.5))


# --- queries -----------------------------------------------------------------------------------------------------------


def minority_of(row):
    return row["minority_score"] if row["minority_probability"] is None else row["minority_probability"]


def smaller(row):
    """Return how many people chose the image that fewer chose."""
    if not row["n_decided"]:
        return 0
    for_0 = round(row["human_label_0"] * row["n_votes"] - (row["n_votes"] - row["n_decided"]) / 2)
    return min(for_0, row["n_decided"] - for_0)


def scorers_side(row):
    sides = {
        0 if None in scores else int(np.sign(scores[0] - scores[1]))
        for scores in ((row[f"score_0_{s}"], row[f"score_1_{s}"]) for s in SCORERS)
    }
    return sides.pop() if len(sides) == 1 else 0


MEANING = {
    "highest_minority": (lambda r: side(r["human_label_0"]) != 0, lambda r: -minority_of(r)),
    "split_votes": (lambda r: smaller(r) > 0, lambda r: (-round(smaller(r) / r["n_decided"], 9), -r["n_decided"])),
    "consensus_against_human": (
        lambda r: side(r["human_label_0"]) * side(r["consensus_label_0"]) == -1,
        lambda r: (-r["agreement"], -abs(r["p_ensemble"] - 0.5)),
    ),
    "unanimous_against_human": (
        lambda r: side(r["human_label_0"]) * scorers_side(r) == -1,
        lambda r: -abs(r["p_ensemble"] - 0.5),
    ),
    "excluded": (lambda r: r["excluded_because"] is not None, lambda r: r["excluded_because"]),
    "random": (lambda r: True, lambda r: 0),
}


def test_every_named_query_has_a_meaning_that_is_tested():
    assert list(MEANING) == list(pairs_page.QUERIES)


@pytest.mark.parametrize("query", MEANING)
def test_a_named_query_shows_the_pairs_that_it_says_in_its_order_and_ties_by_id(query, labelled, preferences):
    belongs, order = MEANING[query]
    expected = sorted((r for r in preferences if belongs(r)), key=lambda r: (order(r), r["pair_id"]))
    assert expected, "the store must hold such pairs"
    page = pairs_page.page(*labelled, query=query, limit=25)
    assert shown(page) == [r["pair_id"] for r in expected][:25]
    assert f"{len(expected)} pairs match, {min(25, len(expected))} shown" in page


def test_a_condition_and_an_order_in_sql_choose_the_pairs(labelled, preferences):
    where = 'n_votes >= 1 AND "score_0_hpsv2.1" > "score_1_hpsv2.1" AND prompt LIKE \'%red%\''
    page = pairs_page.page(*labelled, where=where, order_by="p_ensemble DESC")
    wins = [
        r
        for r in preferences
        if r["n_votes"] >= 1 and r["score_0_hpsv2.1"] > r["score_1_hpsv2.1"] and "red" in r["prompt"]
    ]
    assert wins
    assert shown(page) == [r["pair_id"] for r in sorted(wins, key=lambda r: (-r["p_ensemble"], r["pair_id"]))]


def test_pairs_without_a_value_to_order_by_come_last(labelled, preferences):
    ids = shown(pairs_page.page(*labelled, order_by="minority_probability desc", limit=1000))
    values = {r["pair_id"]: r["minority_probability"] for r in preferences}
    known = [values[i] for i in ids if values[i] is not None]
    assert known == sorted(known, reverse=True)
    assert [values[i] for i in ids] == known + [None] * (len(ids) - len(known))
    assert len(known) < len(ids)


def test_a_condition_narrows_a_named_query(labelled):
    all_of_it = shown(pairs_page.page(*labelled, query="excluded"))
    narrowed = shown(pairs_page.page(*labelled, query="excluded", where="split = 'test'"))
    assert set(narrowed) < set(all_of_it)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("n_votes >", "n_votes >"),
        ("", "parse"),
        ("nobody > 1", "nobody"),
        ("n_votes", "expected a condition"),
        ("prompt > 3", "prompt > 3"),
        ("n_votes > 1; DROP TABLE votes", ";"),
        ("CAST(prompt AS INT) = 1", "CAST"),
        ("prompt IN (SELECT prompt FROM votes)", "SELECT"),
    ],
)
def test_a_condition_that_cannot_be_read_is_an_error_that_names_it(where, said, labelled):
    with pytest.raises(ConfigError, match=r"pairs: where") as error:
        pairs_page.page(*labelled, where=where)
    assert said in str(error.value)


@pytest.mark.parametrize("options", [{"where": "nobody > 1"}, {"order_by": "nobody DESC"}, {"where": "p_ensemble >"}])
def test_an_error_in_sql_lists_the_columns_that_there_are(options, labelled):
    with pytest.raises(ConfigError) as error:
        pairs_page.page(*labelled, **options)
    for column in (*schemas.PREFERENCES.polars_schema, "score_0_hpsv2.1"):
        assert f"'{column}'" in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"query": "best"}, "highest_minority"),
        ({"limit": 0}, "limit"),
        ({"blur": float("nan")}, "blur"),
        ({"blur": -1.0}, "blur"),
        ({"budget_bytes": 20_000}, "budget_bytes = 20,000"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_expected(options, said, labelled):
    with pytest.raises(ConfigError, match=said):
        pairs_page.page(*labelled, **options)


def test_a_store_without_labels_says_what_to_run(ingested):
    with pytest.raises(StoreError, match=r"preferences.*materialize it first"):
        pairs_page.page(*ingested)


def test_no_matching_pair_is_a_page_that_says_so(labelled):
    page = pairs_page.page(*labelled, where="n_votes > 1000000")
    assert shown(page) == []
    assert "0 pairs match, 0 shown" in page
    assert "No pair of the store matches." in page


def test_the_same_store_gives_the_same_page(labelled, labelled_copy):
    first, second = (pairs_page.page(*s, query="split_votes", limit=30) for s in (labelled, labelled_copy))
    assert first.replace(labelled[0].location, "") == second.replace(labelled_copy[0].location, "")


# --- what is shown of a pair -------------------------------------------------------------------------------------------


def test_a_pair_shows_votes_scores_probabilities_and_marks(labelled, preferences):
    page = read(pairs_page.page(*labelled, query="consensus_against_human", limit=10))
    rows = {r["pair_id"]: r for r in preferences}
    votes = labelled[0].read(schemas.MINORITY)
    for pair_id, pair in page.pairs.items():
        row, text = rows[pair_id], pair["text"]
        assert row["prompt"] in text
        for s in SCORERS:
            for i in (0, 1):
                score = row[f"score_{i}_{s}"]
                assert ("-" if score is None else f"{score:.4g}") in text
        for column in ("agreement", "p_ensemble", "minority_score", "confidence"):
            assert f"{row[column]:.3f}" in text
        of_pair = votes.filter(pl.col("pair_id") == pair_id)
        people = [int(of_pair.filter(pl.col("label_0") == x)["people"].sum()) for x in (1.0, 0.0)]
        chosen = 0 if row["human_label_0"] > 0.5 else 1
        assert f"humans' choice, {people[chosen]} of {row['n_votes']}" in text
        figures = [c for tag, c in pair["classes"] if tag == "figure"]
        assert figures == (["human", "consensus"] if chosen == 0 else ["consensus", "human"])
        assert ("mark minority" in [c for _, c in pair["classes"]]) == (minority_of(row) > 0.5)
        assert all(a in text for a in of_pair["annotator_id"].head(cards.VOTES_SHOWN).drop_nulls())
        assert "75% of 4" in text
        assert len(pair["images"]) == 2


def test_ties_are_the_people_who_did_not_decide(labelled_copy, preferences):
    store, keys = labelled_copy
    row = next(r for r in preferences if r["n_votes"] == 1 and r["human_label_0"] == 1)
    change(store, schemas.PREFERENCES, row["pair_id"], n_votes=4)
    (pair,) = read(pairs_page.page(store, keys, where=f"pair_id = '{row['pair_id']}'")).pairs.values()
    assert "1 left : 3 ties : 0 right" in pair["text"]


def test_pairs_on_which_everybody_is_undecided_are_no_split_votes(labelled_copy, preferences):
    store, keys = labelled_copy
    pair_id = preferences[0]["pair_id"]
    change(store, schemas.PREFERENCES, pair_id, n_votes=5, n_decided=0, human_label_0=0.5, minority_share=None)
    assert pair_id not in shown(pairs_page.page(store, keys, query="split_votes", limit=1000))
    # Two people for one image, two for the other, and a tie.
    change(store, schemas.PREFERENCES, pair_id, n_decided=4, minority_share=0.5)
    assert pair_id in shown(pairs_page.page(store, keys, query="split_votes", limit=1000))


def test_single_votes_beyond_what_is_shown_are_counted_and_reliabilities_come_along(labelled_copy, monkeypatch):
    store, keys = labelled_copy
    monkeypatch.setattr(cards, "VOTES_SHOWN", 3)
    votes = store.read(schemas.MINORITY)
    # The order of ids alone would list another vote first.
    is_mixed = (pl.col("label_0") == 1).any() & (pl.col("label_0").sort_by("vote_id").first() == 0)
    pair_id, n, _ = (
        votes.group_by("pair_id").agg(pl.len(), mixed=is_mixed).filter("mixed").sort("len", "pair_id").row(-1)
    )
    assert n > 4
    listed = votes.filter(pl.col("pair_id") == pair_id).sort("label_0", "vote_id", descending=[True, False])
    known = listed["annotator_id"][2]
    blank = {c: pl.lit(None, t) for c, t in schemas.ANNOTATORS.polars_schema.items() if c != "annotator_id"}
    counts = ("votes", "ties", "prompts", "compared", "agreeing", "placed")
    blank |= {c: pl.lit(1) for c in counts} | {"reliability": pl.lit(0.8125), "annotator_score": pl.lit(0.0)}
    write(store, schemas.ANNOTATORS, pl.DataFrame({"annotator_id": [known]}).with_columns(**blank))
    (pair,) = read(pairs_page.page(store, keys, where=f"pair_id = '{pair_id}'")).pairs.values()
    assert f"{n} decided votes" in pair["text"]
    assert f"and {n - 3} more" in pair["text"]
    assert pair["text"].count("75% of 4") == 3
    for annotator, label_0 in listed.select("annotator_id", "label_0").head(3).iter_rows():
        assert f"{annotator}{'left' if label_0 == 1 else 'right'}0.123" in pair["text"]
    assert pair["text"].count("0.812") == 1


def test_a_policy_shows_its_target_or_its_reason(labelled, preferences):
    policy = curation.policy("unanimous")
    page = read(pairs_page.page(*labelled, policy=policy, limit=1000))
    reason = "a scorer does not choose the humans' side"
    kept = left = 0
    for row in preferences:
        text = page.pairs[row["pair_id"]]["text"]
        is_kept = row["excluded_because"] is None and row["is_unanimous"] is True and row["human_label_0"] != 0.5
        kept, left = kept + is_kept, left + (reason in text)
        assert ("★ target, p = 1.00" in text) == is_kept
        assert ("no model may train on it: image_1 too_large" in text) == (row["excluded_because"] is not None)
    assert kept
    assert left


def test_with_a_policy_excluded_pairs_are_those_that_it_leaves_out(labelled, preferences):
    policy = curation.policy("unanimous")
    left_out = shown(pairs_page.page(*labelled, query="excluded", policy=policy, limit=1000))
    kept = shown(pairs_page.page(*labelled, where="target_label_0 IS NOT NULL", policy=policy, limit=1000))
    assert kept
    assert sorted(left_out + kept) == [r["pair_id"] for r in preferences]


HOSTILE = (
    '<script>alert(1)</script><img src=x onerror="alert(2)">\'"</h2></style>&amp;\x00\x1b',
    "\u202egnal thgir\u202c \u2067abc " + "w" * 400,
    "👩‍👩‍👧‍👦 Z̵̢͑a̴l̷g̶o̷ ]]> --> {{7*7}} ${1}",
    "data:text/html;base64,PHN2Zz4= javascript:alert(1)",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text_wherever_it_stands(text, labelled_copy, preferences):
    store, keys = labelled_copy
    pair_id = preferences[0]["pair_id"]
    calm = read(pairs_page.page(store, keys, where=f"pair_id = '{pair_id}'"))
    hostile = dict.fromkeys(("prompt", "excluded_because", "model_0", "sources", "decided_by", "image_1_id"), text)
    change(store, schemas.PREFERENCES, pair_id, **hostile)
    minority = store.read(schemas.MINORITY)
    write(store, schemas.MINORITY, minority.with_columns(annotator_id=pl.lit(text)))
    page = pairs_page.page(store, keys, where=f"pair_id = '{pair_id}' OR prompt = '{{<script>}}'", order_by="prompt")
    found = read(page)
    visible = text.replace("\x00", "␀").replace("\x1b", "␛")
    assert found.pairs[pair_id]["text"].count(visible[: elements.NAME_SHOWN]) >= 5
    allowed = {(t, a) for t, attributes in calm.elements for a in attributes}
    new = {(t, a) for t, attributes in found.elements for a in attributes} - allowed
    assert {t for t, _ in found.elements} == {t for t, _ in calm.elements} | {"bdi"}
    assert all(a in ("class", "dir") for _, a in new), "no element has an attribute that a stranger wrote"
    isolated = [a for t, a in found.elements if t == "bdi"]
    assert isolated
    assert all(a == {"dir": "auto"} for a in isolated)


def test_a_page_loads_and_runs_nothing(labelled):
    page = pairs_page.page(*labelled, limit=5)
    elements = read(page).elements
    assert "&lt;" not in page, "markup of the page's own is not escaped"
    assert not {t for t, _ in elements} & {"script", "link", "iframe", "object", "base", "form", "svg"}
    policy = next(a["content"] for t, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    for _, attributes in elements:
        assert not [a for a in attributes if a.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")


def test_a_very_long_prompt_is_cut_and_says_how_long_it_is(labelled_copy, preferences):
    store, keys = labelled_copy
    pair_id = preferences[0]["pair_id"]
    change(store, schemas.PREFERENCES, pair_id, prompt="long " * 100_000)
    page = pairs_page.page(store, keys, where=f"pair_id = '{pair_id}'")
    assert "… (500,000 characters)" in page
    assert len(page) < 60_000


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_images_that_cannot_be_read_show_their_status_and_reason(labelled_copy, preferences):
    store, keys = labelled_copy
    row = preferences[0]
    broken, gone = row["image_0_id"], row["image_1_id"]
    replace_bytes(store, keys, lambda i: b"\xff\xd8\xff no picture" if i == broken else None)
    owners = store.read(schemas.CATALOGUE_IMAGES)
    store.write(schemas.CATALOGUE_IMAGES, owners.filter(pl.col("image_id") != gone), made_from="test")
    (pair,) = read(pairs_page.page(store, keys, where=f"pair_id = '{row['pair_id']}'")).pairs.values()
    assert pair["images"] == []
    assert "undecodable" in pair["text"]
    assert "UnidentifiedImageError" in pair["text"]
    assert "missing" in pair["text"]
    assert "no shard of the catalogue holds the image" in pair["text"]


def test_a_status_of_ingestion_is_shown_with_its_reason(labelled_copy, preferences):
    store, keys = labelled_copy
    row = preferences[0]
    for key in keys:
        frame = store.read(schemas.IMAGES, key)
        bad = pl.col("image_id") == row["image_1_id"]
        frame = frame.with_columns(
            status=pl.when(bad).then(pl.lit("refused")).otherwise("status"),
            reason=pl.when(bad).then(pl.lit("HTTP <403>")).otherwise("reason"),
        )
        store.write(schemas.IMAGES, frame, partition=key, made_from="test")
    (pair,) = read(pairs_page.page(store, keys, where=f"pair_id = '{row['pair_id']}'")).pairs.values()
    assert len(pair["images"]) == 1
    assert "refused" in pair["text"]
    assert "HTTP <403>" in pair["text"]


def test_images_that_cannot_be_read_for_now_are_told_too(labelled_copy, preferences):
    store, keys = labelled_copy
    row, path = preferences[0], "/proc/self/mem"  # a file that opens; reading its first bytes is an I/O error
    for key in keys:
        frame = store.read(schemas.IMAGES, key)
        there = pl.col("image_id") == row["image_0_id"]
        frame = frame.with_columns(
            bytes=pl.when(~there).then("bytes"),
            uri=pl.when(there).then(pl.lit(path)),
            byte_offset=pl.when(there).then(0),
            byte_length=pl.when(there).then(100),
        )
        store.write(schemas.IMAGES, frame, partition=key, made_from="test")
    (pair,) = read(pairs_page.page(store, keys, where=f"pair_id = '{row['pair_id']}'")).pairs.values()
    assert len(pair["images"]) < 2
    assert f"unreadable{path}: cannot be read" in pair["text"]


def test_images_of_shards_that_do_not_count_are_missing(labelled):
    store, keys = labelled
    owners = dict(store.read(schemas.CATALOGUE_IMAGES).iter_rows())
    page = read(pairs_page.page(store, keys[:1], limit=1000))
    rows = store.read(schemas.PREFERENCES).select("image_0_id", "image_1_id").to_numpy().ravel()
    assert 0 < sum(owners[i] == keys[0] for i in rows) == sum(len(p["images"]) for p in page.pairs.values()) < len(rows)


def test_small_pictures_keep_their_pixels_and_are_enlarged_as_squares(labelled, preferences):
    store, keys = labelled
    page = pairs_page.page(store, keys, limit=5)
    images = [a for t, a in read(page).elements if t == "img"]
    assert [a["class"] for a in images] == ["pixels"] * 10
    assert ".pixels{image-rendering:pixelated}" in page
    whole = pl.concat(store.read(schemas.IMAGES, k) for k in keys)
    originals = dict(whole.select("image_id", "bytes").iter_rows())
    for picture, image_id in zip(
        pictures(page), [r[f"image_{i}_id"] for r in preferences[:5] for i in (0, 1)], strict=True
    ):
        original = np.asarray(Image.open(io.BytesIO(originals[image_id])).convert("RGB"), float)
        assert np.abs(np.asarray(picture, float) - original).mean() < 6


def photo(seed, side=512):
    """Return a JPEG with coarse forms and the grain of a camera, and a comment that is nobody's business."""
    draw = np.random.default_rng(seed)
    forms = Image.fromarray(draw.integers(0, 255, (9, 9, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    grain = draw.normal(0, 14, (side, side, 1))
    squares = 40.0 * ((np.arange(side)[:, None] // 16 + np.arange(side)[None] // 16) % 2)[..., None]
    picture = Image.fromarray(np.clip(np.asarray(forms, float) + grain + squares, 0, 255).astype(np.uint8))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=92, comment=b"secret comment " * 200)
    return out.getvalue()


@pytest.fixture(scope="module")
def with_photos(labelled, tmp_path_factory):
    """(store, shard keys) whose images are photos of 512 pixels."""
    folder = tmp_path_factory.mktemp("photos") / "store"
    shutil.copytree(labelled[0].location, folder)
    store = Store(str(folder))
    photos = [photo(seed) for seed in range(16)]
    replace_bytes(store, labelled[1], lambda image_id: photos[int(image_id[:8], 16) % 16])
    return store, labelled[1], photos


@pytest.fixture(scope="module")
def two_hundred_pairs(with_photos):
    return pairs_page.page(*with_photos[:2], limit=200)


def test_two_hundred_pairs_of_photos_fit_into_the_budget(with_photos, two_hundred_pairs):
    photos, page = with_photos[2], two_hundred_pairs
    assert 400 * len(photos[0]) * 4 / 3 > 10 * pairs_page.BUDGET_BYTES, "the photos themselves would not fit"
    assert len(shown(page)) == 200
    assert len(pictures(page)) == 400
    assert 0.6 * pairs_page.BUDGET_BYTES < len(page.encode()) <= pairs_page.BUDGET_BYTES == 5_000_000


def test_fewer_pairs_have_larger_pictures(with_photos, two_hundred_pairs):
    few = pairs_page.page(*with_photos[:2], limit=4)
    assert max(pictures(two_hundred_pairs)[0].size) < max(pictures(few)[0].size) == pairs_page.QUALITIES[0][0]


def test_a_smaller_budget_is_kept_too(with_photos):
    store, keys, _ = with_photos
    page = pairs_page.page(store, keys, limit=20, budget_bytes=400_000)
    assert len(page.encode()) <= 400_000
    assert len(pictures(page)) == 40


def test_the_budget_is_kept_where_the_sample_misleads(labelled_copy, preferences, monkeypatch):
    store, keys = labelled_copy
    flat, grainy = io.BytesIO(), photo(1)
    Image.new("RGB", (512, 512)).save(flat, "PNG")
    smallest = min(r[f"image_{i}_id"] for r in preferences[:10] for i in (0, 1))
    replace_bytes(store, keys, lambda i: flat.getvalue() if i == smallest else grainy)
    monkeypatch.setattr(pairs_page, "_SAMPLE", 1)
    page = pairs_page.page(store, keys, limit=10, budget_bytes=300_000)
    assert len(page.encode()) <= 300_000
    assert len(pictures(page)) == 20


def fine_energy(picture):
    """Return the energy of waves shorter than 34 pixels, both across and down."""
    spectrum = np.abs(np.fft.fft2(np.asarray(picture.convert("L"), float)))
    return (spectrum[15:-14, 15:-14] ** 2).sum()


def test_blurred_pictures_have_lost_what_was_fine_in_their_bytes(with_photos):
    store, keys, _ = with_photos
    sharp, blurred = (pairs_page.page(store, keys, limit=6, blur=b) for b in (0.0, 8.0))
    assert "blurred, 8 % of the longer side" in blurred
    assert len(pictures(blurred)) == 12
    for before, after in zip(pictures(sharp), pictures(blurred), strict=True):
        assert before.size == after.size == (512, 512)
        # Of such waves a Gaussian of 8 % of 512 pixels leaves nothing but the rounding of the encoding.
        assert fine_energy(after) < 1e-3 * fine_energy(before)
    assert not set(re.findall(r"base64,([^\"]+)", blurred)) & set(re.findall(r"base64,([^\"]+)", sharp))


@pytest.mark.parametrize("blur", [0.0, 8.0])
def test_a_page_has_nothing_of_the_original_files_but_the_picture(blur, with_photos):
    store, keys, photos = with_photos
    page = pairs_page.page(store, keys, limit=6, blur=blur)
    inside = b"".join(base64.b64decode(u) for u in re.findall(r"base64,([^\"]+)", page))
    assert b"secret comment" in photos[0]
    assert b"secret comment" not in inside
    for original in photos:
        assert original[-400:-200] not in inside


# --- all pages ---------------------------------------------------------------------------------------------------------


def test_every_query_has_a_published_page_and_an_entry_in_the_index(labelled_copy):
    store, keys = labelled_copy
    paths = pairs_page.write_all(store, keys, limit=7)
    assert list(paths) == [*pairs_page.QUERIES, "index"]
    for name in pairs_page.QUERIES:
        assert paths[name] == store.path("pairs", f"{name}.html")
        assert store.read_text(f"pairs/{name}.html") == pairs_page.page(store, keys, query=name, limit=7)
    links = [a["href"] for t, a in read(store.read_text("pairs/index.html")).elements if t == "a"]
    assert links == [f"{name}.html" for name in pairs_page.QUERIES]
