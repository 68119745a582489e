"""The label card over a store of five pairs whose numbers are worked out by hand."""

import polars as pl
import pytest

from pipelines import catalogue, curation, ingest, label_card, schemas
from pipelines.config import SourceConfig
from pipelines.tables import StoreError

TABLES = {
    t.name: t
    for t in (
        schemas.PREFERENCES.of(["pickscore"]),
        schemas.CALIBRATION,
        schemas.MINORITY,
        schemas.ANNOTATORS,
        schemas.RATER_AGREEMENT,
    )
}
# Pair 0, 1, 2: one vote each, by annotators 1, 2, 3; pair 3: a tie by annotator 1. Pair 4: annotators 1, 2, 3 and somebody
# unknown choose one image, annotator 4 the other.
SINGLE = [(0, 1, 1.0), (1, 2, 1.0), (2, 3, 0.0), (3, 1, 0.5)]
SEVERAL = [(4, 1, 1.0), (4, 2, 1.0), (4, 3, 1.0), (4, 4, 0.0), (4, None, 1.0)]
PROBABILITY = {0: 0.9, 1: 0.1, 2: 0.2}
"""Of the single votes; of pair 4: 0.8 of annotator 4's vote, 0.1 of the others."""


@pytest.fixture
def labelled(store, raw_rows, write_pickapic, tmp_path):
    """The store of the five pairs, with every table that the card reads."""
    pairs, seen = [], set()
    for row in raw_rows:
        names = {row["image_0_uid"], row["image_1_uid"], row["caption"]}
        if not names & seen and len(pairs) < 5:
            pairs.append(row)
            seen |= names
    keys = []
    for name, votes, split in (("single", SINGLE, "train"), ("several", SEVERAL, "test")):
        rows = [{**pairs[p], "user_id": u, "label_0": y, "label_1": 1 - y, "has_label": True} for p, u, y in votes]
        write_pickapic(tmp_path / name, rows, split)
        source = SourceConfig(name=name, layout="pickapic", location=str(tmp_path / name), family="people")
        for shard in ingest.LAYOUTS["pickapic"].list_shards(source):
            ingest.ingest_shard(store, ingest.plan(source), shard)
            keys.append(shard.key)
    catalogue.build(store, keys)
    write_labels(store, {p["caption"]: i for i, p in enumerate(pairs)})
    return store


def write(store, name, rows, **extra):
    """Write a table of rows whose other columns are null."""
    table = TABLES[name]
    types = table.polars_schema
    rows = [{**dict.fromkeys(types), **row} for row in rows]
    store.write(table, pl.DataFrame(rows, schema=types), made_from="test", extra=extra)


def write_labels(store, number_of):
    pairs = catalogue.all_pairs(store).join(store.scan(schemas.CATALOGUE_PROMPTS), on="prompt_id").collect()
    number = {r["pair_id"]: number_of[r["prompt"]] for r in pairs.iter_rows(named=True)}
    preferences = [
        {c: r[c] for c in ("pair_id", "prompt_id", "image_0_id", "image_1_id", "prompt", "split")}
        | {
            "sources": "people",
            "n_votes": r["n_votes"],
            "n_decided": r["n_votes"],
            "human_label_0": r["human_label_0"],
            "is_in_cycle": False,
            "minority_score": PROBABILITY.get(number[r["pair_id"]], 0.3),
            # The scorers agree with nobody, and say nothing of pair 1.
            "consensus_label_0": None if number[r["pair_id"]] == 1 else float(r["human_label_0"] < 0.5),
        }
        for r in pairs.iter_rows(named=True)
    ]
    write(store, "preferences", preferences)
    votes = catalogue.counted_votes(store, catalogue.shard_keys(store)).collect()
    minority = []
    for v in votes.filter(pl.col("label_0") != 0.5).iter_rows(named=True):
        several = number[v["pair_id"]] == 4
        is_odd = v["annotator_id"] == "people:4"
        p = (0.8 if is_odd else 0.1) if several else PROBABILITY[number[v["pair_id"]]]
        facts = {"others": 4, "share_against": 1.0 if is_odd else 0.25} if several else {"others": 0}
        columns = {c: v[c] for c in ("vote_id", "pair_id", "annotator_id", "label_0")}
        known = {"minority_probability": p, "minority_score": p / 2, "annotator_score": 0.0}
        minority.append({**columns, "people": 1, **known, **facts})
    note = "its error on single cannot be observed."
    write(store, "minority", minority, calibrated_on=["several"], calibration_note=note)
    people = {
        "people:1": {"annotator_score": 0.3, "reliability": 0.9, "placed": 9, "first_low": 0.6, "first_high": 0.9},
        "people:2": {"annotator_score": 0.1, "reliability": 0.8, "placed": 9, "first_low": 0.4, "first_high": 0.9},
        "people:3": {"annotator_score": -0.1, "reliability": 0.7, "placed": 0, "first_low": 0.6, "first_high": 0.9},
        "people:4": {"annotator_score": -0.5, "reliability": 0.6, "placed": 9, "first_low": 0.4, "first_high": 0.9},
        "unknown": {"annotator_score": 0.0, "placed": 9, "first_low": 0.6, "first_high": 0.9},
    }
    counts = {"votes": 1, "ties": 0, "prompts": 1, "compared": 1, "agreeing": 1}
    write(store, "annotators", [{"annotator_id": a, **counts, **facts} for a, facts in people.items()])
    write(
        store,
        "rater_agreement",
        [
            {"source": "several", "pairs": 1, "ratings": 5, "raters": 4, "alpha": 0.123, "alpha_low": 0.05}
            | {"alpha_high": 0.2, "alpha_decided": 0.45, "minority_share": 0.2, "placed": 7}
            | {"first_share": 0.5714, "first_low": 0.25, "first_high": 0.842}
        ],
    )
    fit = {"accuracy": 0.6789, "votes": 8, "slope": 12.3456, "ece_raw": 0.25, "ece_calibrated": 0.0125}
    write(
        store,
        "calibration",
        [{"scorer": "pickscore", "fold": f, **fit, "accuracy": a} for f, a in ((-1, 0.6789), (0, 0.1111))]
        + [{"scorer": "generator:renderer", "fold": -1, "votes": 0}],
    )


def section(card, title):
    """{first cell: {column: cell}} of the table of a section."""
    lines = card.split(f"## {title}\n")[1].split("\n## ")[0].strip().splitlines()
    header, _, *rows = [[c.strip() for c in x.strip("|").split(" | ")] for x in lines if x.startswith("|")]
    assert all(len(row) == len(header) for row in rows)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_the_card_says_who_voted(labelled):
    found = section(label_card.card(labelled), "Who voted")
    assert list(found) == ["several", "single", "all"]
    assert list(found["all"].values()) == ["9", "4", "11.1", "5", "1.80", "11.1", "4", "0", "5"]
    assert list(found["several"].values()) == ["5", "4", "20.0", "1", "5.00", "0.0", "0", "0", "5"]


def test_the_card_says_how_far_they_agree(labelled):
    card = label_card.card(labelled)
    found = section(card, "Do they agree")["several"]
    assert found["alpha"] == "0.12 [0.05, 0.20]"
    assert found["alpha, decided"] == "0.45"
    assert found["smaller side %"] == "20.0"
    assert found["first shown %"] == "57.1 [25.0, 84.2]"
    assert "of the 4 annotators who can be compared: median 75.0 %, 5 to 95 % of them 61.5 to 88.5 %" in card
    assert "1 of 3 annotators prefer one place" in card, "annotators whose display order is unknown do not count"


def test_the_card_tells_a_scorers_accuracy_over_all_folds_its_revision_and_the_tie_rule(labelled):
    labelled.publish("scores/current.json", b'{"revisions": {"pickscore": "0123456789ab"}}')
    card = label_card.card(labelled)
    found = section(card, "The scorers against the votes")
    assert list(found) == ["pickscore"], "generators are no scorers"
    assert list(found["pickscore"].values()) == ["0123456789ab", "67.9", "8", "12.3", "0.250", "0.013"]
    assert "equal scores count half, tied votes not at all" in card
    assert "what a generator adds for its images (terms: 1)" in card


def test_the_minority_share_is_of_people_with_prompts_as_clusters(labelled):
    card = label_card.card(labelled)
    found = section(card, "Votes against what most people would say")
    values = {name: row["minority share %"].split(" [")[0] for name, row in found.items()}
    assert values == {"several": "24.0", "single": "40.0", "all": "30.0"}
    # Three prompts of 10, 20 and 90 % reach from one to the other; a single one has no interval.
    assert found["several"]["minority share %"] == "24.0"
    assert found["single"]["minority share %"].endswith("[10.0, 90.0]")
    assert found["all"]["mean minority_score %"].startswith("15.0 [")
    assert found["several"]["against the others %"].startswith("20.0")
    assert (found["single"]["against the others %"], found["single"]["of votes"]) == ("-", "0")
    assert "fitted where several people voted (several). its error on single cannot be observed. " in card


def test_a_store_without_pairs_of_several_votes_is_called_uncalibrated(labelled):
    extra = {"calibrated_on": [], "calibration_note": "no pair has three votes"}
    frame = labelled.read(schemas.MINORITY).with_columns(minority_probability=pl.lit(None, pl.Float64))
    labelled.write(schemas.MINORITY, frame, made_from="uncalibrated", extra=extra)
    card = label_card.card(labelled)
    found = section(card, "Votes against what most people would say")
    assert {row["minority share %"] for row in found.values()} == {"uncalibrated"}
    assert found["all"]["mean minority_score %"].startswith("15.0 [")
    assert "uncalibrated: no source has several votes per pair. no pair has three votes." in card


def test_the_card_counts_what_each_policy_keeps_and_why_it_drops_the_rest(labelled):
    policies = [curation.HumanPolicy(), curation.ConsensusPolicy(), curation.WithoutMinorityPolicy(threshold=0.25)]
    found = section(label_card.card(labelled, policies), "What each policy keeps")
    assert list(found["human"].values()) == ["4", "80.0", "0.0", "1 human votes are even"]
    # Kept with the human side turned: pairs 0, 2 and 4; pair 3 has no human side.
    assert list(found["consensus"].values()) == ["4", "80.0", "100.0", "1 the consensus is undecided"]
    reasons = "2 minority_score > threshold 0.25; 1 human votes are even"
    assert list(found["without_minority:threshold=0.25"].values()) == ["2", "40.0", "0.0", reasons]


def test_the_card_says_whose_votes_a_policy_loses(labelled):
    found = section(label_card.card(labelled, [curation.WithoutMinorityPolicy()]), "Whose votes each policy loses")
    # Of 8 decided votes, pair 0's is dropped and annotator 4's is overruled by the other four.
    assert {name: tuple(row.values()) for name, row in found.items()} == {
        "all": ("", "25.0"),
        "- dropped": ("", "12.5"),
        "- overruled": ("", "12.5"),
        "several": ("62.5", "20.0 (50.0)"),
        "single": ("37.5", "33.3 (50.0)"),
        "annotators, low score": ("12.5", "100.0 (50.0)"),
        "annotators, middle score": ("25.0", "0.0 (0.0)"),
        "annotators, high score": ("50.0", "25.0 (50.0)"),
        "unknown annotators": ("12.5", "0.0 (0.0)"),
        "votes with the others": ("50.0", "0.0 (0.0)"),
        "votes against the others": ("12.5", "100.0 (50.0)"),
        "against, of those that others judge": ("20.0", "100.0"),
    }


def test_every_policy_is_told_by_default_and_the_card_stays_one_page(labelled):
    card = label_card.card(labelled)
    assert list(section(card, "What each policy keeps")) == list(curation.POLICIES)
    assert len(card.splitlines()) < 80


def test_the_card_is_published_in_the_store(labelled):
    path = label_card.build(labelled)
    assert path.endswith("/label_card.md")
    with open(path) as file:
        assert file.read() == label_card.card(labelled)


def test_a_store_without_votes_has_a_card(store, raw_rows, write_pickapic, tmp_path):
    blank = {"label_0": None, "label_1": None, "has_label": False}
    write_pickapic(tmp_path / "raw", [{**row, **blank} for row in raw_rows[:3]])
    source = SourceConfig(name="unlabelled", layout="pickapic", location=str(tmp_path / "raw"))
    (shard,) = ingest.LAYOUTS["pickapic"].list_shards(source)
    ingest.ingest_shard(store, ingest.plan(source), shard)
    catalogue.build(store, [shard.key])
    for name in TABLES:
        write(store, name, [])
    card = label_card.card(store)
    assert section(card, "Who voted")["all"]["votes"] == "0"
    assert "Nobody can be compared" in card
    assert section(card, "Whose votes each policy loses")["all"]["human"] == "-"


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_missing_is_named(labelled, name):
    labelled.filesystem.rm_file(labelled.path("_manifests", name, "all.json"))
    with pytest.raises(StoreError, match=f"table '{name}' has no partition"):
        label_card.card(labelled)


def test_a_table_of_older_votes_is_refused(labelled):
    frame = labelled.read(schemas.ANNOTATORS)
    labelled.write(schemas.ANNOTATORS, frame, made_from="old", inputs={"catalogue_votes/all": "another"})
    with pytest.raises(StoreError, match="annotators/all was made from another catalogue_votes/all"):
        label_card.card(labelled)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("minority_probability 0.8123 > threshold 0.5", "minority_probability > threshold 0.5"),
        ("metric 0.0 <= threshold 0.3", "metric <= threshold 0.3"),
        ("minority_score 1e-05 <= threshold 0.3", "minority_score <= threshold 0.3"),
        ("image_1 undecodable: broken data stream at 12 > 3", "image undecodable"),
        ("image_0 missing: s3://bucket/a.parquet: gone", "image missing"),
        ("image_0 not scored", "image not scored"),
        ("p_smpo is 0.5", "p_smpo is 0.5"),
        ("human votes are even", "human votes are even"),
    ],
)
def test_reasons_of_one_kind_are_one_text(reason, kind):
    assert pl.DataFrame({"why": [reason]}).select(label_card.reason_kind("why")).item() == kind


def test_more_votes_on_the_same_prompts_do_not_narrow_an_interval():
    votes = pl.DataFrame({"people": [1, 2, 1, 1], "prompt": [0, 1, 2, 3], "p": [0.1, 0.6, 0.3, None]})
    mean, low, high = label_card.share(votes, "p")
    assert mean == pytest.approx((0.1 + 2 * 0.6 + 0.3) / 4)
    assert low < mean < high
    assert label_card.share(pl.concat([votes] * 50), "p") == pytest.approx((mean, low, high))
    assert label_card.share(votes.filter(pl.col("p").is_null()), "p") == (None, None, None)
    assert label_card.share(pl.concat([votes.head(1)] * 9), "p") == (pytest.approx(0.1), None, None)


def test_a_reason_of_several_lines_is_of_one_kind_with_others():
    reasons = [
        "image_0 undecodable: line one\nline two",
        "image_1 undecodable: broken",
        "minority_score 0.71 > threshold 0.5",
    ]
    kinds = pl.DataFrame({"why": reasons}).select(label_card.reason_kind("why")).to_series().to_list()
    assert kinds == ["image undecodable", "image undecodable", "minority_score > threshold 0.5"]
