import hashlib
import json

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import catalogue, identity, schemas, steps
from pipelines.config import ScorerConfig, SourceConfig
from pipelines.errors import run_command
from pipelines.scoring import batches, checkpoints, imported
from pipelines.scoring.imported import ImportedScoresError

KEYS = ["image_id", "prompt_id"]
SCORE_COLUMNS = list(schemas.SCORES.polars_schema)


def scorer_of(file, **options):
    return ScorerConfig(**{"name": "lab", "kind": "imported", "checkpoint": str(file), "family": "pickapic", **options})


def owned_of(store, keys):
    return batches.owned_pairs(store, keys).collect()


def write(frame, file):
    {".parquet": frame.write_parquet, ".csv": frame.write_csv, ".jsonl": frame.write_ndjson}[file.suffix](file)
    return file


@pytest.fixture(scope="module")
def listing(ingested):
    """Every pair of the store with all the names that its image and prompt have, and a score; read only."""
    store, keys = ingested
    names = store.scan(schemas.IMAGE_NAMES).filter(family="pickapic").select("image_id", image_uid="uid").collect()
    digests = store.scan(schemas.IMAGES).select("image_id", "sha256").unique("image_id").collect()
    pairs = owned_of(store, keys).drop("owner").join(names.unique("image_id"), on="image_id", how="left")
    scores = np.random.default_rng(0).normal(size=len(pairs)).astype(np.float32)
    return pairs.join(digests, on="image_id").sort(KEYS).with_columns(score=pl.Series(scores))


@pytest.fixture
def named(tmp_path, store, ingest_all):
    """Ingest rows of votes on images that are known by their names alone; return (store, shard keys)."""

    def run(*rows, **options):
        (tmp_path / "mine").mkdir(exist_ok=True)
        file = tmp_path / "mine" / "votes.parquet"
        fields = ("prompt", "image_0", "image_1", "label_0")
        pq.write_table(pa.Table.from_pylist([dict(zip(fields, r, strict=True)) for r in rows]), file)
        source = SourceConfig(name="mine", layout="pairs", location=str(tmp_path / "mine"), **options)
        return store, ingest_all(store, [source])

    return run


def scored(store, keys, scorer):
    return imported.score_owned(store, scorer, owned_of(store, keys))


def by_name(frame, names, family="mine"):
    """Return name -> (score, status)."""
    ids = {identity.image_id_of_uid(family, n): n for n in names}
    return {ids[i]: (v, s) for i, v, s in frame.select("image_id", "score", "status").iter_rows()}


# --- what a file may look like ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", imported.SUFFIXES)
@pytest.mark.parametrize("image", ["image_id", "sha256", "image_uid"])
@pytest.mark.parametrize("prompt", ["prompt", "prompt_id"])
def test_every_pair_gets_its_score_by_whatever_names_its_image_and_prompt(
    ingested, listing, tmp_path, suffix, image, prompt
):
    store, keys = ingested
    rows = listing.drop_nulls("image_uid") if image == "image_uid" else listing
    assert len(rows) > 50
    file = write(rows.sample(fraction=1, shuffle=True, seed=1).select(image, prompt, "score"), tmp_path / f"s{suffix}")
    found = scored(store, keys, scorer_of(file)).sort(KEYS)
    assert found.columns == SCORE_COLUMNS
    assert schemas.SCORES.conform(found).equals(found)
    assert found.select(KEYS).equals(listing.select(KEYS))
    ok = found.filter(status="ok")
    assert ok.select(KEYS).equals(rows.select(KEYS))
    assert ok["score"].to_list() == pytest.approx(rows["score"].to_list(), rel=1e-6)
    assert ok["reason"].null_count() == len(ok)
    rest = found.filter(pl.col("status") != "ok")
    assert set(rest["status"]) <= {"not_imported"}
    assert rest["score"].null_count() == len(rest)
    assert rest["reason"].null_count() == 0


def test_a_shard_gets_exactly_the_pairs_that_it_owns_in_their_order(ingested, listing, tmp_path):
    store, keys = ingested
    scorer = scorer_of(write(listing.select(*KEYS, "score"), tmp_path / "s.parquet"))
    for key in keys:
        owned = owned_of(store, [key])
        found = imported.score_owned(store, scorer, owned)
        assert found.select(KEYS).equals(owned.select(KEYS))
        assert set(found["status"]) <= {"ok"}
    assert imported.score_owned(store, scorer, owned.head(0)).columns == SCORE_COLUMNS


def test_prompts_are_compared_as_the_store_normalises_them(named, tmp_path):
    store, keys = named(("café", "a", "b", 1.0))
    frame = pl.DataFrame({"prompt": ["  cafe\u0301\n", "café"], "uid": ["a", "b"], "score": [1, 2]})
    found = scored(store, keys, scorer_of(write(frame, tmp_path / "s.csv"), family="mine"))
    assert by_name(found, "ab") == {"a": (1.0, "ok"), "b": (2.0, "ok")}


def test_a_csv_may_have_a_byte_order_mark_blank_lines_and_prompts_with_commas_quotes_and_line_breaks(named, tmp_path):
    prompt = 'a "red" square,\nlarge'
    store, keys = named((prompt, "a", "b", 1.0))
    quoted = prompt.replace('"', '""')
    text = f'\ufeffuid,score,prompt,more\r\na,0.5,"{quoted}",x\r\n\r\nb,1e-1,"{quoted}",\r\n'
    (tmp_path / "s.csv").write_bytes(text.encode())
    found = scored(store, keys, scorer_of(tmp_path / "s.csv", family="mine"))
    assert by_name(found, "ab") == {"a": (0.5, "ok"), "b": (pytest.approx(0.1), "ok")}


def test_json_lines_may_lack_fields_and_hold_numbers_as_text_or_as_names(named, tmp_path):
    store, keys = named(("p", "7", "8", 1.0), ("p", "8", "9", 0.0))
    lines = [
        {"uid": 7, "prompt": "p", "score": "1.5"},
        {"prompt": "p", "uid": "8", "score": 2},
        {"uid": 9.0, "prompt": "p"},
    ]
    (tmp_path / "s.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found = scored(store, keys, scorer_of(tmp_path / "s.jsonl", family="mine"))
    assert by_name(found, "789") == {"7": (1.5, "ok"), "8": (2.0, "ok"), "9": (None, "not_imported")}


def test_names_of_a_column_of_numbers_are_those_of_the_votes(named, tmp_path):
    store, keys = named(("p", 7, 12, 1.0))
    for kind in (pa.int32(), pa.float64(), pa.dictionary(pa.int32(), pa.string())):
        uid = pa.array(["7", "12"]).cast(kind) if pa.types.is_dictionary(kind) else pa.array([7, 12]).cast(kind)
        pq.write_table(pa.table({"prompt": ["p", "p"], "uid": uid, "score": [1, 2]}), tmp_path / "s.parquet")
        found = scored(store, keys, scorer_of(tmp_path / "s.parquet", family="mine"))
        assert by_name(found, ["7", "12"]) == {"7": (1.0, "ok"), "12": (2.0, "ok")}


def test_the_path_of_an_image_file_names_it(named, tmp_path, raw_rows):
    (tmp_path / "mine" / "pictures").mkdir(parents=True)
    for i in (0, 1):
        (tmp_path / "mine" / "pictures" / f"{i}.jpg").write_bytes(raw_rows[0][f"jpg_{i}"])
    store, keys = named(("p", "pictures/0.jpg", "pictures/1.jpg", 1.0), ("p", "pictures/1.jpg", "absent.jpg", 1.0))
    names = ["./pictures/0.jpg", "file:pictures/1.jpg", "absent.jpg"]
    frame = pl.DataFrame({"prompt": ["p"] * 3, "image_uid": names, "score": [1.0, 2.0, 3.0]})
    scorer = scorer_of(write(frame, tmp_path / "s.jsonl"), family="mine")
    found = dict(scored(store, keys, scorer).select("image_id", "score").iter_rows())
    ids = [identity.image_id_of_bytes(raw_rows[0][f"jpg_{i}"])[0] for i in (0, 1)]
    assert found == {ids[0]: 1.0, ids[1]: 2.0, identity.image_id_of_uid("mine", "absent.jpg"): 3.0}
    assert imported.coverage(store, scorer)["matched"] == 3


def test_a_name_stands_for_the_bytes_that_another_shard_has_under_it(
    tmp_path, store, raw_rows, write_pickapic, ingest_all
):
    row = dict(raw_rows[0])
    write_pickapic(tmp_path / "names", [{**row, "jpg_0": None, "jpg_1": None}])
    write_pickapic(tmp_path / "bytes", [{**row, "caption": "another prompt", "jpg_1": None}])
    sources = [SourceConfig(name=n, layout="pickapic", location=str(tmp_path / n)) for n in ("names", "bytes")]
    keys = ingest_all(store, sources)
    frame = pl.DataFrame(
        {"prompt": row["caption"], "uid": [row["image_0_uid"], row["image_1_uid"]], "score": [1.0, 2.0]}
    )
    found = scored(store, keys, scorer_of(write(frame, tmp_path / "s.parquet"))).filter(status="ok")
    data, name = identity.image_id_of_bytes(row["jpg_0"])[0], identity.image_id_of_uid("pickapic", row["image_1_uid"])
    assert dict(found.select("image_id", "score").iter_rows()) == {data: 1.0, name: 2.0}


def test_the_score_column_and_the_family_are_the_configurations(named, tmp_path):
    store, keys = named(("p", "a", "b", 1.0), family="friends")
    frame = pl.DataFrame({"prompt": ["p", "p"], "uid": ["a", "b"], "beauty": [1.0, 2.0], "score": [8.0, 9.0]})
    file = write(frame, tmp_path / "s.parquet")
    found = scored(store, keys, scorer_of(file, family="friends", score_column="beauty"))
    assert by_name(found, "ab", "friends") == {"a": (1.0, "ok"), "b": (2.0, "ok")}
    assert set(scored(store, keys, scorer_of(file, family="mine"))["status"]) == {"not_imported"}


# --- scores that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "null"),
        (float("nan"), "NaN"),
        (float("inf"), "infinite"),
        (float("-inf"), "infinite"),
        (1e39, "infinite"),
    ],
)
def test_a_score_that_is_no_finite_number_is_not_ok_and_says_so(named, tmp_path, value, what):
    store, keys = named(("p", "a", "b", 1.0))
    frame = pl.DataFrame({"prompt": ["p", "p"], "uid": ["a", "b"], "score": [0.25, value]})
    for suffix in (".parquet", ".csv"):
        found = scored(store, keys, scorer_of(write(frame, tmp_path / f"s{suffix}"), family="mine"))
        assert by_name(found, "ab") == {"a": (0.25, "ok"), "b": (None, "not_imported")}
        # CSV has no NaN of its own: it is one of the words for nothing.
        expected = "null" if suffix == ".csv" and what == "NaN" else what
        assert found.filter(status="not_imported")["reason"].to_list() == [f"s{suffix}, row 2: score is {expected}"]


def test_a_pair_that_the_file_does_not_have_is_not_imported_and_says_so(named, tmp_path):
    store, keys = named(("p", "a", "b", 1.0))
    frame = pl.DataFrame({"prompt": ["p"], "uid": ["a"], "score": [0.25]})
    found = scored(store, keys, scorer_of(write(frame, tmp_path / "s.parquet"), family="mine"))
    assert found.filter(status="not_imported")["reason"].to_list() == ["no row of s.parquet has this image and prompt"]


def test_equal_scores_of_one_pair_are_one_and_nothing_says_nothing(named, tmp_path):
    store, keys = named(("p", "a", "b", 1.0))
    frame = pl.DataFrame(
        {
            "prompt": ["p", " p", "p", "p", "p"],
            "uid": ["a", "a", "b", "b", "b"],
            # The last float32 digits depend on the batch in which an image was judged.
            "score": [0.25, 0.250000001, None, 0.75, float("nan")],
        }
    )
    scorer = scorer_of(write(frame, tmp_path / "s.parquet"), family="mine")
    assert by_name(scored(store, keys, scorer), "ab") == {"a": (0.25, "ok"), "b": (0.75, "ok")}
    assert imported.coverage(store, scorer)["repeated"] == 3


def test_contradicting_scores_are_refused_with_their_rows_keys_and_values(named, tmp_path):
    store, keys = named(("p", "a", "b", 1.0))
    frame = pl.DataFrame({"prompt": ["p", "p", "p "], "uid": ["b", "a", "a"], "score": [0.5, 0.25, 0.26]})
    file = write(frame, tmp_path / "s.parquet")
    with pytest.raises(ImportedScoresError) as error:
        scored(store, keys, scorer_of(file, family="mine"))
    message = str(error.value)
    assert message.startswith(f"scorer 'lab': {file}: 1 (image, prompt) with different scores")
    assert "row 2: prompt 'p', uid 'a', score 0.25; row 3: prompt 'p ', uid 'a', score 0.26" in message


# --- files that are wrong --------------------------------------------------------------------------------------------

GOOD = {"prompt": ["p", "p"], "uid": ["a", "b"], "score": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"score": None}, {}, r"column 'score' is missing, found \['prompt', 'uid'\]; set the scorer's score_column"),
        ({"prompt": None}, {}, r"no column of the prompt: expected one of \['prompt', 'prompt_id'\], found \["),
        ({"uid": None}, {}, r"no column of the image: expected one of \['image_id', .*\], found \['prompt', 'score'\]"),
        ({}, {"family": ""}, "column 'uid' holds a source's own names; set the scorer's family"),
        ({}, {"score_column": "uid"}, "score_column = 'uid' names a prompt or an image"),
        ({"prompt": [1, 2]}, {}, "column 'prompt': expected text, found int64"),
        ({"prompt": [b"p", b"p"]}, {}, "column 'prompt': expected text, found large_binary"),
        ({"score": ["1.5", "good"]}, {}, "row 2: column 'score': expected a number, found 'good'"),
        ({"score": [True, False]}, {}, "column 'score': expected a number, found bool"),
        ({"score": [[1.0], [2.0]]}, {}, "column 'score': expected Float64, found large_list"),
        ({"uid": [b"a", b"b"]}, {}, "column 'uid': expected String, found large_binary"),
        (
            {"image_id": ["0" * 32, "b.jpg"]},
            {},
            "row 2: column 'image_id': expected 32 hexadecimal digits, found 'b.jpg'",
        ),
        ({"sha256": ["0" * 64, "0" * 32]}, {}, "row 2: column 'sha256': expected 64 hexadecimal digits"),
        (
            {"prompt": None, "prompt_id": ["7", "8"]},
            {},
            "row 1: column 'prompt_id': .*found '7'; to give the text itself",
        ),
    ],
)
def test_a_wrong_column_is_named_with_what_was_found_and_expected(named, tmp_path, columns, options, message):
    store, keys = named(("p", "a", "b", 1.0))
    frame = pl.DataFrame({k: v for k, v in {**GOOD, **columns}.items() if v is not None})
    file = write(frame, tmp_path / "s.parquet")
    with pytest.raises(ImportedScoresError, match=message) as error:
        scored(store, keys, scorer_of(file, **{"family": "mine", **options}))
    assert str(error.value).startswith(f"scorer 'lab': {file}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.parquet", b"PAR1 no more", "cannot be read: .*expected one .parquet or .csv or .jsonl file"),
        ("s.csv", b"", "holds no header"),
        ("s.csv", b"prompt,uid,score\np,a\n", "line 2: expected 3 fields, found 2"),
        ("s.csv", b'prompt,uid,score\np,"a"x,1\n', "line 2: not CSV"),
        ("s.csv", b"prompt,uid,score\np,a,1,5\n", "line 2: expected 3 fields, found 4"),
        ("s.csv", b"prompt;uid;score\np;a;1\n", r"column 'score' is missing, found \['prompt;uid;score'\]"),
        ("s.csv", b"prompt,uid,score,score\np,a,1,2\n", "column 'score' stands several times"),
        ("s.csv", b"prompt,uid,score\n\xff,a,1\n", "cannot be read: 'utf-8' codec can't decode"),
        ("s.csv", b"prompt,uid,score\np,a,one\n", "row 1: column 'score': expected a number, found 'one'"),
        ("s.jsonl", b"", "holds no row"),
        ("s.jsonl", b'{"prompt": "p", "uid": "a", "score": 1}\n{"prompt"', "line 2: not JSON"),
        ("s.jsonl", b"[1]\n", r"line 1: expected an object, found \[1\]"),
        ("s.jsonl", b'{"prompt": 5, "uid": "a", "score": 1}', "line 1: column 'prompt': expected text, found 5"),
        ("s.jsonl", b'{"prompt": "p", "uid": "a", "score": [1]}', r"'score': expected a number, found \[1\]"),
        ("s.jsonl", b'{"prompt": "p", "uid": "a", "score": true}', "'score': expected a number, found 'True'"),
        ("s.jsonl", b'{"prompt": "p", "uid": "a"}', "column 'score' is missing"),
        ("s.xlsx", b"", r"expected one file that ends in \.parquet, \.csv, \.jsonl"),
    ],
)
def test_an_unreadable_file_is_one_clear_error(named, tmp_path, name, content, message):
    store, keys = named(("p", "a", "b", 1.0))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImportedScoresError, match=message) as error:
        scored(store, keys, scorer_of(tmp_path / name, family="mine"))
    assert str(error.value).startswith(f"scorer 'lab': {tmp_path / name}: ")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "folder.parquet").mkdir()
    for name, message in (("absent.csv", "No such file"), ("folder.parquet", "Is a directory"), ("folder", "ends in")):
        with pytest.raises(ImportedScoresError, match=f"{name}.*{message}"):
            checkpoints.revision(scorer_of(tmp_path / name))
    with pytest.raises(ImportedScoresError, match=r"unknown://x\.csv: cannot be read: Protocol not known"):
        checkpoints.revision(scorer_of("unknown://x.csv"))
    assert run_command(lambda: checkpoints.revision(scorer_of(tmp_path / "absent.csv"))) == 2
    assert capsys.readouterr().err.startswith("error: scorer 'lab': ")


def test_invalid_text_is_named_by_its_row(named, tmp_path):
    store, keys = named(("p", "a", "b", 1.0))
    raw = pa.array([b"p", b"\xff\xfe"], pa.large_binary())
    text = pa.Array.from_buffers(pa.large_string(), 2, raw.buffers())
    pq.write_table(pa.table({"prompt": text, "uid": ["a", "b"], "score": [1.0, 2.0]}), tmp_path / "s.parquet")
    with pytest.raises(ImportedScoresError, match="row 2: column 'prompt': not valid UTF-8"):
        scored(store, keys, scorer_of(tmp_path / "s.parquet", family="mine"))


# --- identity --------------------------------------------------------------------------------------------------------


def test_the_revision_is_of_the_content_and_of_how_it_is_read_and_not_of_the_place(tmp_path):
    frame = pl.DataFrame(GOOD)
    file, copy = (write(frame, tmp_path / n) for n in ("a.parquet", "b.parquet"))
    other = write(frame.with_columns(score=pl.col("score") + 1), tmp_path / "c.parquet")
    base = checkpoints.revision(scorer_of(file))
    assert checkpoints.revision(scorer_of(copy)) == base
    changed = [
        scorer_of(other),
        *(scorer_of(file, **o) for o in ({"family": "hpd"}, {"score_column": "uid2"}, {"revision": "2024-06"})),
    ]
    revisions = {base, *map(checkpoints.revision, changed)}
    assert len(revisions) == 5
    assert {len(r) for r in revisions} == {12}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert imported.identity(scorer_of(file, revision="2024-06")) == {
        "file": digest,
        "revision": "2024-06",
        "family": "pickapic",
        "score_column": "score",
    }


def test_a_file_behind_a_url_is_read_once_and_again_when_it_changes(named, tmp_path):
    store, keys = named(("p", "a", "b", 1.0))
    memory = fsspec.filesystem("memory")
    scorer = scorer_of("memory://scores/s.csv", family="mine")
    with pytest.raises(ImportedScoresError, match="no such file"):
        imported.identity(scorer)
    revisions = []
    for value in (1, 2):
        memory.pipe_file("/scores/s.csv", f"prompt,uid,score\np,a,{value}\n".encode())
        revisions += [checkpoints.revision(scorer), checkpoints.revision(scorer)]
        assert by_name(scored(store, keys, scorer), "ab")["a"] == (value, "ok")
    assert revisions[0] == revisions[1] != revisions[2] == revisions[3]


def test_the_file_is_read_once_for_all_shards_and_again_when_it_or_the_catalogue_changes(
    ingested_copy, listing, tmp_path, monkeypatch
):
    store, keys = ingested_copy
    scorers = [
        scorer_of(write(listing.select(*KEYS, "score"), tmp_path / f"{n}.parquet"), name=n) for n in ("one", "two")
    ]
    reads = []
    real = imported._pieces
    monkeypatch.setattr(imported, "_pieces", lambda scorer: reads.append(scorer.name) or real(scorer))
    for key in keys:
        for scorer in scorers:
            scored(store, [key], scorer)
            imported.facts(scorer)
    assert reads == ["one", "two"]
    write(listing.select(*KEYS, score=-pl.col("score")), tmp_path / "one.parquet")
    found = scored(store, keys, scorers[0]).sort(KEYS)
    assert reads == ["one", "two", "one"]
    assert found["score"].to_list() == (-listing["score"]).to_list()
    catalogue.build(store, keys[:-1])
    scored(store, keys[:-1], scorers[0])
    assert reads == ["one", "two", "one", "one"]


def test_the_facts_name_file_rows_and_revisions(tmp_path):
    scorer = scorer_of(write(pl.DataFrame(GOOD), tmp_path / "s.parquet"), revision="2024-06")
    assert imported.facts(scorer) == {
        "kind": "imported",
        "revision": checkpoints.revision(scorer),
        "revision_name": "2024-06",
        "file": str(tmp_path / "s.parquet"),
        "rows": 2,
    }


# --- coverage --------------------------------------------------------------------------------------------------------


def test_the_coverage_accounts_for_every_row_of_the_file(named, tmp_path):
    store, _ = named(("p", "a", "b", 1.0), ("q", "c", "d", 0.0))
    rows = [
        ("p", "a", 1.0),
        ("p", "a", 1.0),  # repeated
        ("p", "b", None),  # matched, without a score
        ("unknown", "a", 1.0),
        ("unknown", "z", 1.0),
        ("p", "z", 1.0),
        ("p", "c", 1.0),  # both known, no vote joins them
        (None, "a", 1.0),
        ("p", None, 1.0),
    ]
    frame = pl.DataFrame(rows, schema=["prompt", "uid", "score"], orient="row")
    scorer = scorer_of(write(frame, tmp_path / "s.parquet"), family="mine")
    found = imported.coverage(store, scorer)
    examples = found.pop("examples")
    assert found == {
        "rows": 9,
        "wanted": 4,
        "matched": 2,
        "without_score": 1,
        "repeated": 1,
        "without_key": 2,
        "unmatched_prompts": 2,
        "unmatched_images": 1,
        "unpaired": 1,
    }
    parts = ("matched", "repeated", "without_key", "unmatched_prompts", "unmatched_images", "unpaired")
    assert sum(found[p] for p in parts) == found["rows"]
    assert [e.split(":")[0] for e in examples] == ["row 4", "row 5", "row 6", "row 7", "row 8", "row 9"]
    assert examples[0] == "row 4: prompt 'unknown', uid 'a', score 1.0"


def test_a_file_without_rows_matches_nothing(named, tmp_path):
    store, keys = named(("p", "a", "b", 1.0))
    scorer = scorer_of(write(pl.DataFrame(GOOD).head(0), tmp_path / "s.parquet"), family="mine")
    assert set(scored(store, keys, scorer)["status"]) == {"not_imported"}
    found = imported.coverage(store, scorer)
    assert (found["rows"], found["matched"], found["examples"]) == (0, 0, [])


# --- from votes to labels --------------------------------------------------------------------------------------------


def test_labels_rest_on_imported_scores_where_no_image_has_bytes(named, tmp_path, tiny_config):
    rng = np.random.default_rng(3)
    rows = []
    for p in range(40):
        rows += [(f"prompt {p}", f"{p}-{a}", f"{p}-{b}", float(rng.integers(0, 2))) for a, b in ((0, 1), (1, 2))]
    store, keys = named(*rows)
    names = sorted({n for r in rows for n in r[1:3]})
    value = {n: float(np.float32(rng.normal())) for n in names}
    frame = pl.DataFrame(
        {"prompt": [f"prompt {n.split('-')[0]}" for n in names], "uid": names, "score": value.values()}
    )
    # One image without a score: its pairs have no difference.
    frame = frame.filter(pl.col("uid") != "0-0")
    scorer = scorer_of(write(frame, tmp_path / "s.jsonl"), family="mine", revision="2024-06")
    config = tiny_config.model_copy(update={"scorers": (scorer,)})
    models = {}
    built = {k: batches.score_shard(store, k, config.scorers, models=models)["lab"] for k in keys}
    assert models == {}, "nothing is loaded"
    manifest = built[keys[0]].manifest
    assert manifest.rows_by_status == {"not_imported": 1, "ok": len(names) - 1}
    assert manifest.extra["revision_name"] == "2024-06"
    assert batches.score_shard(store, keys[0], config.scorers)["lab"].is_reused
    assert batches.activate(store, config, keys) == {"lab": checkpoints.revision(scorer)}

    labels = steps.Labels(store, config, keys)
    ids = {identity.image_id_of_uid("mine", n): n for n in names}
    for name in steps.LABEL_TABLES:
        getattr(labels, name)()
    preferences = store.read(schemas.PREFERENCES)
    for row in preferences.iter_rows(named=True):
        for i in (0, 1):
            name = ids[row[f"image_{i}_id"]]
            assert row[f"score_{i}_lab"] == (None if name == "0-0" else value[name])
    assert len(preferences) == len(rows)
    assert preferences["consensus_label_0"].null_count() <= 1
    assert all("missing" in why for why in preferences["excluded_because"]), "pictures without bytes train nothing"


def test_a_pair_that_lacks_an_imported_score_alone_may_be_trained_on(ingested_copy, listing, tmp_path, tiny_config):
    store, keys = ingested_copy
    file = write(listing.select("image_id", "prompt", "score").head(3), tmp_path / "s.parquet")
    config = tiny_config.model_copy(update={"scorers": (tiny_config.scorers[0], scorer_of(file))})
    for key in keys:
        batches.score_shard(store, key, config.scorers)
    batches.activate(store, config, keys)
    labels = steps.Labels(store, config, keys)
    for name in steps.LABEL_TABLES:
        getattr(labels, name)()
    preferences = store.read(schemas.PREFERENCES)
    assert preferences["excluded_because"].null_count() == len(preferences)


def test_a_changed_file_is_another_revision_that_is_scored_beside_the_old_one(named, tmp_path):
    store, (key,) = named(("p", "a", "b", 1.0))
    file = write(pl.DataFrame(GOOD), tmp_path / "s.csv")
    scorer = scorer_of(file, family="mine")
    first = batches.score_shard(store, key, [scorer])["lab"]
    write(pl.DataFrame(GOOD).with_columns(score=-pl.col("score")), file)
    second = batches.score_shard(store, key, [scorer])["lab"]
    assert first.manifest.partition != second.manifest.partition
    old, new = (store.read(schemas.SCORES, b.manifest.partition) for b in (first, second))
    assert old["score"].to_list() == (-new["score"]).to_list()


def test_imported_and_judged_scores_stand_side_by_side(ingested_copy, listing, tmp_path, tiny_config):
    store, keys = ingested_copy
    file = write(listing.select("image_id", "prompt", "score"), tmp_path / "s.parquet")
    scorers = (tiny_config.scorers[0], scorer_of(file))
    config = tiny_config.model_copy(update={"scorers": scorers})
    for key in keys:
        built = batches.score_shard(store, key, scorers)
        assert list(built) == ["pickscore", "lab"]
    batches.activate(store, config, keys)
    found = batches.current_scores(store, ["lab"], keys).sort(KEYS).collect()
    assert found["score"].equals(listing["score"], check_names=False)
    labels = steps.Labels(store, config, keys)
    margins = labels.margins()
    assert {"score_0_pickscore", "score_0_lab"} <= set(store.read(schemas.MARGINS).columns)
    assert set(margins.manifest.inputs) >= {f"scores/{b.manifest.partition}" for b in built.values()}
