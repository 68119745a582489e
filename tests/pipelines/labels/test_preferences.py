import numpy as np
import polars as pl
import pytest

from pipelines import schemas
from pipelines.labels import consensus as con
from pipelines.labels import margins as mar
from pipelines.labels import minority as mino
from pipelines.labels import preferences as pref
from pipelines.labels import smoothed as smo

SCORERS = ["pick", "clip"]
# pair: labels of its votes (none: none that counts), differences of pick and clip
PAIRS = {
    "agreed": ([1.0, 1.0, 1.0, 0.0], (2.0, 0.5)),
    "lost": ([0.0], (2.0, -0.5)),
    "tied": ([0.5], (2.0, 0.5)),
    "split": ([1.0, 0.0], (-2.0, -0.5)),
    "with a tie": ([1.0, 0.0, 0.0, 0.5], (-2.0, -0.5)),
    "mostly tied": ([1.0, 0.0, 0.5], (-2.0, -0.5)),
    "one equal": ([1.0], (2.0, 0.0)),
    "no votes": ([], (2.0, 0.5)),
    "unscored": ([1.0], (None, None)),
    "broken": ([0.0], (None, None)),
    "absent": ([0.0], (2.0, 0.5)),
    "not imported": ([1.0], (2.0, None)),
    "nowhere imported": ([1.0], (None, None)),
}
PROBLEMS = [
    ("pick", "broken/0", "undecodable", "broken data stream"),
    ("clip", "broken/0", "undecodable", "broken data stream"),
    ("clip", "not imported/1", "not_imported", "no row"),
    *((s, "nowhere imported/0", "not_imported", "no row") for s in SCORERS),
]
IMAGES = [
    # Of what several shards say the first in alphabetical order.
    ("absent/1", "unreadable", "no image"),
    ("absent/1", "truncated", "cut"),
    ("lost/0", "missing", None),
    # Another shard has the bytes.
    ("lost/0", "ok", None),
    *((f"{n}/{i}", "ok", None) for n in PAIRS for i in (0, 1) if f"{n}/{i}" not in ("absent/1", "lost/0")),
]


@pytest.fixture(scope="module")
def given(margins_of, votes_of, calibration_of, hexadecimal):
    """What the join takes, made of PAIRS by the functions that make it; pairs are sorted by id."""
    names = sorted(PAIRS, key=hexadecimal)
    prompts = {n: hexadecimal("q" if n == "lost" else "p") for n in names}
    margins = margins_of(
        {
            s: ([None if (d := PAIRS[n][1][k]) is None else 20.0 + d for n in names], [20.0] * len(names))
            for k, s in enumerate(SCORERS)
        },
        map(hexadecimal, names),
        prompts.values(),
        ["sd" if n == "agreed" else None for n in names],
        ["xl" if n == "agreed" else None for n in names],
    ).with_columns(
        # The picture that cannot be decoded or was imported nowhere has no score, and its partner has; nobody has scored
        # image_1 of 'unscored'.
        **{
            f"score_{i}_{s}": pl.when(pl.col("pair_id").is_in([hexadecimal("broken"), hexadecimal("nowhere imported")]))
            .then(pl.lit(None if i == 0 else 20.0, pl.Float32))
            .when(pl.col("pair_id") == hexadecimal("unscored"))
            .then(pl.lit(20.0 if i == 0 else None, pl.Float32))
            .otherwise(f"score_{i}_{s}")
            for i in (0, 1)
            for s in SCORERS
        }
    )
    labels = [PAIRS[n][0] for n in names]
    pairs = pl.DataFrame(
        {
            "pair_id": margins["pair_id"],
            "prompt_id": margins["prompt_id"],
            **{f"image_{i}_id": [f"{n}/{i}" for n in names] for i in (0, 1)},
            "n_votes": [len(v) for v in labels],
            "human_label_0": pl.Series([sum(v) / len(v) if v else None for v in labels], dtype=pl.Float64),
            "cycle": pl.Series([3 if n == "lost" else None for n in names], dtype=pl.Int64),
        }
    )
    votes = votes_of([(hexadecimal(n), f"a{k}", v) for n in names for k, v in enumerate(PAIRS[n][0])])
    calibration = calibration_of(
        pick={"slope": 0.5, "weight": 1.0, "min": 18.0, "max": 22.0},
        clip={"slope": 1.0, "weight": 0.5, "min": 19.5, "max": 20.5},
    )
    metrics = mino.pair_metrics(margins, calibration, SCORERS)
    sources = [(n, s) for n in PAIRS for s in (("pap", "hpd", "pap") if n == "agreed" else ("pap",))]
    problems = [(s, i, prompts[i.split("/")[0]], status, why) for s, i, status, why in PROBLEMS]
    text = dict.fromkeys(("scorer", "image_id", "prompt_id", "status", "reason"), pl.String)
    return {
        "pairs": pairs,
        "prompts": pl.DataFrame(
            {
                "prompt_id": [hexadecimal("p"), hexadecimal("q")],
                "prompt": ["a cat", "a dog"],
                "split": ["train", "test"],
            }
        ),
        "votes": votes,
        "sources": pl.DataFrame({"pair_id": [hexadecimal(n) for n, _ in sources], "source": [s for _, s in sources]}),
        "margins": margins,
        "metrics": metrics,
        "minority": mino.minority(votes, margins, metrics)[0].with_columns(
            minority_probability=pl.col("vote_id").str.slice(1).cast(pl.Float64) / 100
        ),
        "consensus": con.consensus(margins, pairs["human_label_0"], SCORERS, "human"),
        "smoothed": smo.smoothed(margins, calibration, SCORERS, "pick"),
        "problems": pl.DataFrame(problems, schema=text, orient="row"),
        "images": pl.DataFrame(IMAGES, schema={k: text[k] for k in ("image_id", "status", "reason")}, orient="row"),
        "scorers": SCORERS,
    }


@pytest.fixture(scope="module")
def table(given):
    return schemas.PREFERENCES.conform(pl.concat(pref.preferences(**given)))


@pytest.fixture(scope="module")
def rows(table, hexadecimal):
    names = {hexadecimal(n): n for n in PAIRS}
    return {names[r["pair_id"]]: r for r in table.iter_rows(named=True)}


def of(given, frame, name, hexadecimal):
    return given[frame].filter(pl.col("pair_id") == hexadecimal(name)).row(0, named=True)


# --- the join by hand ----------------------------------------------------------------------------------------------


def test_every_pair_is_one_row_in_the_order_of_the_catalogue(given, table):
    assert table["pair_id"].equals(given["pairs"]["pair_id"])
    keys = ["pair_id", "prompt_id", "image_0_id", "image_1_id"]
    assert table.select(keys).equals(given["pairs"].select(keys))


def test_the_human_label_is_the_catalogues(rows):
    found = {n: (r["n_votes"], r["human_label_0"]) for n, r in rows.items()}
    assert found["agreed"] == (4, 0.75)
    assert found["tied"] == (1, 0.5)
    assert found["with a tie"] == (4, 0.375)
    assert found["no votes"] == (0, None)


def test_the_minority_share_is_of_decided_votes_and_null_below_three(rows):
    shares = {n: r["minority_share"] for n, r in rows.items() if r["minority_share"] is not None}
    assert shares == {"agreed": pytest.approx(0.25), "with a tie": pytest.approx(1 / 3)}


def test_the_metrics_are_those_of_the_side_that_the_humans_chose(rows, given, hexadecimal):
    for name, side in (("agreed", 0), ("lost", 1), ("with a tie", 1)):
        its = of(given, "metrics", name, hexadecimal)
        logit = its["logit"] if side == 0 else -its["logit"]
        row = rows[name]
        assert row["confidence"] == pytest.approx(its[f"confidence_{side}"])
        assert row["stability"] == pytest.approx(its["stability"])
        assert row["metric"] == pytest.approx(its[f"confidence_{side}"] * its["stability"])
        assert row["minority_score"] == pytest.approx(1 / (1 + np.exp(logit)))


def test_without_a_side_there_are_no_metrics_of_it(rows):
    columns = ("confidence", "stability", "metric", "minority_score", "minority_probability", "is_unanimous")
    for name in ("tied", "split", "mostly tied", "no votes"):
        assert [rows[name][k] for k in columns] == [None] * 6
    assert [rows["unscored"][k] for k in (*columns[:4], "is_unanimous")] == [None] * 5


def test_the_minority_probability_is_the_mean_over_the_people_on_the_humans_side(given, hexadecimal):
    minority = given["minority"]
    heavy = minority.with_columns(
        people=pl.when(pl.col("vote_id") == minority.filter(pair_id=hexadecimal("agreed"))["vote_id"][0])
        .then(4)
        .otherwise("people")
        .cast(pl.Int64)
    )
    result = pl.concat(pref.preferences(**given | {"minority": heavy}))
    its = heavy.filter(pl.col("pair_id") == hexadecimal("agreed"), pl.col("label_0") == 1)
    assert its["people"].to_list() == [4, 1, 1]
    expected = its["people"].dot(its["minority_probability"]) / 6
    found = result.filter(pl.col("pair_id") == hexadecimal("agreed"))["minority_probability"].item()
    assert found == pytest.approx(expected)
    lost = heavy.filter(pl.col("pair_id") == hexadecimal("lost"))["minority_probability"].item()
    assert result.filter(pl.col("pair_id") == hexadecimal("lost"))["minority_probability"].item() == lost


def test_where_no_minority_probability_was_learned_there_is_none(given):
    nothing = given["minority"].with_columns(minority_probability=pl.lit(None, pl.Float64))
    result = schemas.PREFERENCES.conform(pl.concat(pref.preferences(**given | {"minority": nothing})))
    assert result["minority_probability"].null_count() == len(result)


def test_a_pair_is_unanimous_if_every_scorer_takes_the_humans_side(rows):
    assert {n: r["is_unanimous"] for n, r in rows.items() if r["is_unanimous"] is not None} == {
        "agreed": True,
        "lost": False,
        "with a tie": True,
        "one equal": False,
        "absent": False,
    }


def test_labels_scores_generators_prompt_split_and_cycle_are_joined(rows, given, hexadecimal):
    for name, row in rows.items():
        for frame in ("consensus", "smoothed", "margins"):
            its = of(given, frame, name, hexadecimal)
            joined = set(its) & set(row)
            assert joined - {"pair_id", "prompt_id"}, frame
            assert {c: row[c] for c in joined} == {c: its[c] for c in joined}
        assert (row["prompt"], row["split"]) == (("a dog", "test") if name == "lost" else ("a cat", "train"))
        assert row["is_in_cycle"] is (name == "lost")
    assert [rows["agreed"][c] for c in ("model_0", "model_1", "score_0_pick", "score_1_clip")] == ["sd", "xl", 22, 20]


def test_the_sources_of_all_votes_are_named_once_and_in_order(rows):
    assert {n: r["sources"] for n, r in rows.items()} == dict.fromkeys(PAIRS, "pap") | {"agreed": "hpd+pap"}


def test_a_single_source_and_many_are_named_alike(given, hexadecimal):
    one = given["sources"].with_columns(source=pl.lit("pap"))
    result = pl.concat(pref.preferences(**given | {"sources": one}))
    assert set(result["sources"]) == {"pap"}
    many = pl.concat([one, *(one.with_columns(source=pl.lit(s)) for s in ("z", "a", "m"))])
    result = pl.concat(pref.preferences(**given | {"sources": many.sample(fraction=1, shuffle=True, seed=0)}))
    assert set(result["sources"]) == {"a+m+pap+z"}


# --- who may be trained on -----------------------------------------------------------------------------------------


def test_a_pair_that_no_model_may_train_on_says_which_image_and_why(rows):
    assert {n: r["excluded_because"] for n, r in rows.items() if r["excluded_because"] is not None} == {
        "broken": "image_0 undecodable: broken data stream",
        "unscored": "image_1 not scored",
        "absent": "image_1 truncated: cut",
    }


def test_the_first_image_is_named_if_both_are_unusable_and_a_status_without_reason_has_a_dash(given, hexadecimal):
    images = pl.DataFrame({"image_id": ["absent/0"], "status": ["missing"]}).with_columns(
        reason=pl.lit(None, pl.String)
    )
    result = pl.concat(
        pref.preferences(
            **given | {"images": pl.concat([given["images"].filter(pl.col("image_id") != "absent/0"), images])}
        )
    )
    why = result.filter(pl.col("pair_id") == hexadecimal("absent"))["excluded_because"].item()
    assert why == "image_0 missing: -"


def test_a_problem_of_another_prompt_does_not_exclude_the_pair(given, hexadecimal):
    moved = given["problems"].with_columns(prompt_id=pl.lit(hexadecimal("q")))
    result = pl.concat(pref.preferences(**given | {"problems": moved}))
    why = result.filter(pl.col("pair_id") == hexadecimal("broken"))["excluded_because"].item()
    assert why == "image_0 not scored"


# --- how it comes --------------------------------------------------------------------------------------------------


def test_pieces_are_the_same_as_the_whole(given, table, monkeypatch):
    monkeypatch.setattr(mar, "ROWS", 3)
    pieces = list(pref.preferences(**given))
    assert [len(p) for p in pieces] == [3, 3, 3, 3, 1]
    assert schemas.PREFERENCES.conform(pl.concat(pieces)).equals(table)


def test_a_store_without_pairs_gives_a_table_without_rows(given):
    whole = ("pairs", "margins", "metrics", "consensus", "smoothed", "votes", "sources", "minority")
    pieces = list(pref.preferences(**given | {k: given[k].clear() for k in whole}))
    assert len(schemas.PREFERENCES.conform(pl.concat(pieces))) == 0


@pytest.mark.parametrize("name", ["margins", "metrics", "consensus", "smoothed"])
def test_a_table_of_other_pairs_is_refused_by_name(given, name):
    with pytest.raises(ValueError, match=f"{name}: holds other pairs than the catalogue; build it again"):
        next(pref.preferences(**given | {name: given[name].reverse()}))


def test_a_prompt_that_the_catalogue_lacks_breaks_the_schema_instead_of_losing_its_pairs(given):
    result = pl.concat(pref.preferences(**given | {"prompts": given["prompts"].head(1)}))
    assert len(result) == len(PAIRS)
    with pytest.raises(schemas.SchemaError, match="column prompt: 1 nulls, none allowed"):
        schemas.PREFERENCES.conform(result)
