"""docs/analysts.md as it stands: its answers in polars and in DuckDB are the same, and what the votes and scores say."""

import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from pipelines import catalogue, schemas, steps
from pipelines import config as configuration
from pipelines.config import Config, ScorerConfig
from pipelines.scoring import batches, differences
from pipelines.tables import Store

TEXT = (Path(__file__).parents[1] / "docs" / "analysts.md").read_text()
LOCATION = ".polyphony/store"
OPENING, *QUESTIONS = re.split(r"^## (?=\()", TEXT, flags=re.MULTILINE)
SCORERS = ("hpsv2", "pickscore", "clip", "imagereward")
KEYS = ["image_id", "prompt_id"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


ANSWERS = [
    (f"{question[1]}{n}", *pair)
    for question in QUESTIONS
    for n, pair in enumerate(zip(blocks(question, "python"), blocks(question, "sql"), strict=True), 1)
]


class World:
    """A store with all labels of four scorers, two revisions of one of them, and what they were made from, as dicts."""

    def __init__(self, store, keys, revisions, files):
        self.store, self.keys, self.revisions = store, keys, revisions
        # Scores are stored in 32 bits.
        self.scores = {
            name: {(i, p): float(np.float32(s)) for i, p, s in file.select(*KEYS, "score").iter_rows()}
            for name, file in files.items()
        }
        self.pairs = {r["pair_id"]: r for r in store.read(schemas.CATALOGUE_PAIRS).iter_rows(named=True)}
        self.votes, self.sources = defaultdict(list), defaultdict(set)
        for vote in catalogue.resolved_votes(store, keys).collect().iter_rows(named=True):
            if vote["pair_id"] is not None:
                self.sources[vote["pair_id"]].add(vote["source"])
            if vote["status"] == "ok":
                self.votes[vote["pair_id"]] += [vote] * (vote["count"] or 1)

    def label(self, pair_id):
        labels = [v["label_0"] for v in self.votes[pair_id]]
        return sum(labels) / len(labels) if labels else None

    def side(self, pair_id):
        """Return 1 (most people chose image_0), -1, or 0 where they are even or nobody voted."""
        return 0 if not self.votes[pair_id] else int(np.sign(self.label(pair_id) - 0.5))

    def decided(self, pair_id):
        return [v for v in self.votes[pair_id] if v["label_0"] != 0.5]

    def vote(self, name, pair_id):
        """Return the sign of a scorer's difference, None where a score is missing."""
        pair, scores = self.pairs[pair_id], self.scores[name]
        first, second = (scores.get((pair[f"image_{i}_id"], pair["prompt_id"])) for i in (0, 1))
        return None if first is None or second is None else (first > second) - (first < second)


@pytest.fixture(scope="module")
def world(ingested, tiny_world, tiny_world_config, sources_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysts")
    store = Store(str(shutil.copytree(ingested[0].location, folder / "store")))
    keys, files = ingested[1], scores_of(store)
    for name, file in files.items():
        file.write_parquet(folder / f"{name}.parquet")

    def configured(hpsv2):
        of = {**{s: s for s in SCORERS}, "hpsv2": hpsv2}
        scorers = [ScorerConfig(name=n, kind="imported", checkpoint=str(folder / f"{of[n]}.parquet")) for n in SCORERS]
        options = configuration.small_world(folder, tiny_world_config).model_dump()
        return Config.model_validate({**options, "sources": sources_of(tiny_world), "scorers": scorers})

    revisions = {}
    for hpsv2 in ("hpsv2_old", "hpsv2"):
        config = configured(hpsv2)
        for key in keys:
            batches.score_shard(store, key, config.scorers)
        revisions[hpsv2] = batches.activate(store, config, keys)["hpsv2"]
    labels = steps.Labels(store, config, keys)
    for name in steps.LABEL_TABLES:
        getattr(labels, name)()
    store.write_views()
    return World(store, keys, revisions, files)


def scores_of(store):
    """Return name -> scores that follow the votes loosely, some equal and some missing; hpsv2_old is near hpsv2."""
    rng = np.random.default_rng(0)
    pairs = store.read(schemas.CATALOGUE_PAIRS).select("prompt_id", "image_0_id", "image_1_id", "human_label_0")
    sides = [
        pairs.select("prompt_id", image_id=f"image_{i}_id", liked=abs(i - pl.col("human_label_0"))) for i in (1, 0)
    ]
    liked = pl.concat(sides).group_by(KEYS).agg(pl.col("liked").mean().fill_null(0.5)).sort(KEYS)

    def around(centre, noise):
        return np.round(centre + rng.normal(scale=noise, size=len(liked)), 1)

    found = {name: around(liked["liked"].to_numpy(), 0.4) for name in SCORERS}
    found["hpsv2_old"] = around(found["hpsv2"], 0.2)
    return {
        name: liked.select(KEYS).with_columns(score=pl.Series(values)).filter(pl.Series(rng.random(len(liked)) > 0.03))
        for name, values in found.items()
    }


@pytest.fixture(scope="module")
def answers(world):
    """Return 'a1', 'b1', 'b2', ... -> (the answer in polars, the answer in DuckDB)."""
    found = {}
    with duckdb.connect() as connection:
        connection.execute(Path(world.store.path("views.sql")).read_text())
        for name, python, sql in ANSWERS:
            names = {"store": world.store.location}
            exec(compile(python, f"docs/analysts.md ({name})", "exec"), names)
            found[name] = names["answer"], connection.sql(sql.replace(LOCATION, world.store.location)).pl()
    return found


# --- the two answers -----------------------------------------------------------------------------------------------


def test_every_question_is_there_and_answered_twice():
    assert [name for name, *_ in ANSWERS] == ["a1", "b1", "b2", "c1", "d1", "e1"]
    assert all(question.count("How to read it:") == len(blocks(question, "sql")) for question in QUESTIONS)


@pytest.mark.parametrize("name", [name for name, *_ in ANSWERS])
def test_polars_and_duckdb_give_the_same_rows_in_the_same_order(answers, name):
    in_polars, in_duckdb = answers[name]
    assert len(in_polars) > 0
    # Counts are of other integer types there.
    assert_frame_equal(in_polars, in_duckdb, check_dtypes=False, rel_tol=1e-9, abs_tol=1e-12)


@pytest.fixture
def rows(answers):
    return lambda name: list(answers[name][1].iter_rows(named=True))


# --- and they are right --------------------------------------------------------------------------------------------


def test_a_the_pairs_listed_are_the_most_evenly_divided_ones_of_the_votes(world, rows):
    shares = {}
    for pair_id in world.pairs:
        decided = world.decided(pair_id)
        if len(decided) >= 3:
            first = sum(v["label_0"] for v in decided)
            shares[pair_id] = min(first, len(decided) - first) / len(decided)
    assert len(shares) > 20
    found = rows("a1")
    assert [r["minority_share"] for r in found] == pytest.approx(sorted(shares.values(), reverse=True)[:20])
    assert [shares[r["pair_id"]] for r in found] == pytest.approx([r["minority_share"] for r in found])
    most = [abs(r["p_ensemble"] - 0.5) for r in found if r["minority_share"] == 0.5 and r["p_ensemble"] is not None]
    assert most == sorted(most, reverse=True)


def test_b_the_counts_are_those_of_the_votes_and_the_imported_scores(world, rows):
    pairs, against, equal = Counter(), Counter(), Counter()
    for pair_id in world.pairs:
        side, vote = world.side(pair_id), world.vote("hpsv2", pair_id)
        if side == 0 or vote is None:
            continue
        n, share = len(world.votes[pair_id]), max(world.label(pair_id), 1 - world.label(pair_id))
        humans = (
            "one person"
            if n == 1
            else "all of several"
            if share == 1
            else "three quarters"
            if share >= 0.75
            else "a majority"
        )
        key = "+".join(sorted(world.sources[pair_id])), humans
        pairs[key] += 1
        against[key] += vote == -side
        equal[key] += vote == 0
    found = {(r["sources"], r["humans"]): r for r in rows("b1")}
    assert {k: (r["pairs"], r["against"], r["equal"]) for k, r in found.items()} == {
        k: (n, against[k], equal[k]) for k, n in pairs.items()
    }
    assert min(against.total(), equal.total()) > 0
    assert {k: r["share_against"] for k, r in found.items()} == pytest.approx(
        {k: (against[k] + equal[k] / 2) / n for k, n in pairs.items()}
    )


def test_b_the_pairs_listed_are_those_on_which_the_calibrated_score_is_farthest_from_several_people(world, rows):
    expected = dict(world.store.read(schemas.SMOOTHED.of(SCORERS)).select("pair_id", "calibrated_hpsv2").iter_rows())
    gaps = {
        p: abs(world.label(p) - expected[p])
        for p in world.pairs
        if len(world.votes[p]) >= 3 and world.side(p) and world.vote("hpsv2", p) == -world.side(p)
    }
    found = rows("b2")
    assert [r["gap"] for r in found] == pytest.approx(sorted(gaps.values(), reverse=True)[:20])
    assert {r["pair_id"]: r["gap"] for r in found} == pytest.approx({r["pair_id"]: gaps[r["pair_id"]] for r in found})


def test_c_who_votes_against_the_crowd_is_counted_as_the_votes_say(world, rows):
    compared, against = Counter(), Counter()
    for pair_id in world.pairs:
        decided = world.decided(pair_id)
        for vote in decided:
            who = vote["annotator_id"]
            others = [v["label_0"] for v in decided if v["annotator_id"] != who]
            if who is None or not others or np.mean(others) == 0.5:
                continue
            compared[who] += 1
            against[who] += vote["label_0"] != round(np.mean(others))
    found = rows("c1")
    assert {r["annotator_id"]: (r["compared"], r["against"]) for r in found} == {
        w: (n, against[w]) for w, n in compared.items()
    }
    assert [r["share_against"] for r in found] == pytest.approx([r["against"] / r["compared"] for r in found])
    judged = world.store.read(schemas.MINORITY).filter(pl.col("share_against") != 0.5)
    assert {r["annotator_id"]: r["expected"] for r in found} == pytest.approx(
        {r["annotator_id"]: judged.filter(annotator_id=r["annotator_id"])["minority_probability"].mean() for r in found}
    )
    people = {r["annotator_id"]: r for r in world.store.read(schemas.ANNOTATORS).iter_rows(named=True)}
    assert all(people[r["annotator_id"]]["agreeing"] == r["compared"] - r["against"] for r in found)
    assert [r["reliability"] for r in found] == sorted(people[who]["reliability"] for who in compared)


def test_d_what_the_consensus_changes_is_what_four_signs_say(world, rows):
    pairs, by_majority, people = Counter(), Counter(), Counter()
    for pair_id in world.pairs:
        votes = [v for s in SCORERS if (v := world.vote(s, pair_id)) is not None]
        side = world.side(pair_id)
        # An even vote is decided by the humans: the tie policy of the default configuration.
        consensus = int(np.sign(sum(votes))) or (side if votes else 0)
        if side and consensus:
            change = "label kept" if side == consensus else "label turned round"
        else:
            change = "label lost" if side else "label gained" if consensus else "no label"
        key = "+".join(sorted(world.sources[pair_id])), change
        pairs[key] += 1
        by_majority[key] += sum(votes) != 0
        people[key] += len(world.votes[pair_id])
    found = {(r["sources"], r["change"]): r for r in rows("d1")}
    assert {k: (r["pairs"], r["by_majority"], r["people"]) for k, r in found.items()} == {
        k: (n, by_majority[k], people[k]) for k, n in pairs.items()
    }
    assert {change for _, change in found} >= {"label kept", "label turned round", "label gained"}
    assert 0 < by_majority.total() < pairs.total()
    for source in {s for s, _ in found}:
        assert sum(r["share"] for (s, _), r in found.items() if s == source) == pytest.approx(1)


def test_e_votes_and_majorities_move_as_the_signs_of_both_revisions_say(world, rows):
    moved = Counter()
    for pair_id in world.pairs:
        old, new = (world.vote(name, pair_id) for name in ("hpsv2_old", "hpsv2"))
        if old is not None and new is not None:
            others = sum(world.vote(s, pair_id) or 0 for s in SCORERS[1:])
            moved[old, new, int(np.sign(others + old)), int(np.sign(others + new))] += 1
    found = rows("e1")
    columns = ("vote_old", "vote_new", "majority_old", "majority_new")
    assert {tuple(r[c] for c in columns): r["pairs"] for r in found} == moved
    assert {r["revision_old"] for r in found} == {world.revisions["hpsv2_old"]}
    assert any(r["majority_old"] * r["majority_new"] < 0 for r in found)


def test_e_counts_as_many_flips_as_score_diff(world, rows):
    old, new = world.revisions["hpsv2_old"], world.revisions["hpsv2"]
    diff = differences.score_diff(world.store, "hpsv2", old, new, world.keys)
    summary = differences.summary(diff, world.store.scan(schemas.CATALOGUE_PAIRS))
    found = rows("e1")
    assert sum(r["pairs"] for r in found) == summary.pairs_scored
    assert sum(r["pairs"] for r in found if r["vote_old"] * r["vote_new"] < 0) == summary.flips > 0
    assert sum(r["pairs"] for r in found if r["vote_old"] and not r["vote_new"]) == summary.ties_made > 0


# --- opening the tables --------------------------------------------------------------------------------------------


def sources_of_pairs(world):
    counts = Counter("+".join(sorted(world.sources[p])) for p in world.pairs)
    return pl.DataFrame({"sources": sorted(counts), "pairs": [counts[s] for s in sorted(counts)]})


def test_the_tables_open_as_the_first_block_says(world, monkeypatch):
    here = blocks(OPENING, "python")[0]
    assert here.count(LOCATION) == 1
    with duckdb.connect() as connection:
        # Other tests see no views in the connection that a process shares.
        monkeypatch.setattr(duckdb, "sql", connection.sql)
        names = {}
        exec(here.replace(LOCATION, world.store.location), names)
        assert_frame_equal(names["answer"], sources_of_pairs(world))
    assert_frame_equal(names["pairs"], world.store.read(schemas.PREFERENCES))


def test_the_tables_open_elsewhere_than_on_a_disk_as_the_second_block_says(world):
    memory = fsspec.filesystem("memory")
    memory.put(world.store.location, "/analysts", recursive=True)
    try:
        store = Store("memory://analysts")
        store.write_views()
        assert "memory://" in store.read_text("views.sql")
        assert world.store.location not in store.read_text("views.sql")
        names = {"store": store.location}
        exec(blocks(OPENING, "python")[1], names)
        assert_frame_equal(names["answer"], sources_of_pairs(world))
        assert_frame_equal(names["pairs"], world.store.read(schemas.PREFERENCES))
        names["there"].close()
    finally:
        memory.rm("/analysts", recursive=True)


def test_the_query_of_the_shell_block_is_the_one_of_the_python_block():
    (query,) = re.findall(r'python -m pipelines sql "(.*?)"', *blocks(OPENING, "sh"))
    assert all(f'"{query}"' in block for block in blocks(OPENING, "python"))


# --- the data dictionary and the views -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dictionary(world):
    """Return table -> column or template -> (type, meaning), and what stands above them."""
    head, *sections = re.split(r"^## ", Path(world.store.path("data_dictionary.md")).read_text(), flags=re.MULTILINE)
    tables = {}
    for section in sections:
        lines = [line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| ")]
        tables[section.splitlines()[0]] = {name: (kind, meaning) for name, kind, _, meaning in lines[1:]}
    return head, tables


@pytest.mark.parametrize("table", steps.LABEL_TABLES)
def test_the_dictionary_describes_exactly_the_columns_of_every_label_table(world, dictionary, table):
    described = {}
    for name, (kind, meaning) in dictionary[1][table].items():
        assert len(meaning) > 3
        for scorer in SCORERS if "<scorer>" in name else [""]:
            described[name.replace("<scorer>", scorer)] = kind
    there = pl.read_parquet_schema(world.store.data_path(table))
    assert described == {name: str(kind) for name, kind in there.items()}
    assert ("hpsv2" in " ".join(there)) == ("<scorer>" in " ".join(dictionary[1][table]))


def test_every_view_opens_with_the_columns_that_the_dictionary_describes(world, dictionary):
    head, tables = dictionary
    text = Path(world.store.path("views.sql")).read_text()
    views = re.findall(r"CREATE OR REPLACE VIEW (\w+)", text)
    assert set(views) >= {*steps.LABEL_TABLES, "votes", "images", "prompts", "scores", "catalogue_pairs"}
    with duckdb.connect() as connection:
        connection.execute(text)
        for view in views:
            found = connection.sql(f"SELECT * FROM {view} LIMIT 1").pl()
            known = [n.replace("<scorer>", s) for n in tables[view] for s in (SCORERS if "<scorer>" in n else [""])]
            assert set(known) < set(found.columns)
            assert all(f"`{name}`" in head for name in set(found.columns) - set(known))
        active = connection.sql("SELECT DISTINCT scorer, revision FROM scores").fetchall()
    assert dict(active) == world.store.current_revisions()
    assert dict(active)["hpsv2"] == world.revisions["hpsv2"] != world.revisions["hpsv2_old"]


def test_a_folder_above_the_store_does_not_fill_a_column_of_its_name(world, tmp_path):
    store = Store(str(shutil.copytree(world.store.location, tmp_path / "split=nowhere" / "store")))
    with duckdb.connect() as connection:
        connection.execute(Path(store.write_views()).read_text())
        splits = connection.sql("SELECT DISTINCT split FROM preferences ORDER BY ALL").fetchall()
    assert splits == [("test",), ("train",), ("validation",)]
