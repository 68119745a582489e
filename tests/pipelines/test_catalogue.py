import polars as pl
import pytest

from pipelines import catalogue, identity, ingest, schemas
from pipelines.config import SourceConfig
from pipelines.sources import pickapic
from pipelines.tables import StoreError


@pytest.fixture
def build(tmp_path, store, write_pickapic):
    """Write named sources of {split: rows}, ingest them and build the catalogue in the order given."""

    def run(order, into=store, **sources):
        keys = []
        for name in order:
            for split, rows in sources[name].items():
                write_pickapic(tmp_path / name, rows, split)
            source = SourceConfig(name=name, layout="pickapic", location=str(tmp_path / name))
            for shard in pickapic.list_shards(source):
                ingest.ingest_shard(into, ingest.plan(source), shard)
                keys.append(shard.key)
        catalogue.build(into, keys)
        return keys

    return run


def image_id(row, side):
    return identity.image_id_of_bytes(row[f"jpg_{side}"])[0]


def owners(store):
    return dict(store.read(schemas.CATALOGUE_IMAGES).select("image_id", "owner").iter_rows())


def events(store, keys):
    """The votes that count, told apart by what they say and not by where they came from."""
    columns = ["annotator_id", "pair_id", "created_at", "label_0"]
    return sorted(catalogue.counted_votes(store, keys).select(columns).collect().rows(), key=repr)


def test_every_image_and_every_image_with_prompt_has_one_owner_that_holds_it(ingested):
    store, keys = ingested
    held = {k: set(store.read(schemas.IMAGES, k)["image_id"]) for k in keys}
    owned = owners(store)
    assert set(owned) == set.union(*held.values())
    assert all(image in held[shard] for image, shard in owned.items())
    votes = store.scan(schemas.VOTES).filter(pl.col("pair_id").is_not_null()).collect()
    wanted = {(v[f"image_{i}_id"], v["prompt_id"]) for v in votes.iter_rows(named=True) for i in (0, 1)}
    scorables = store.read(schemas.CATALOGUE_SCORABLES)
    assert set(scorables.select("image_id", "prompt_id").rows()) == wanted
    assert len(scorables) == len(wanted)
    assert all(image in held[shard] for image, _, shard in scorables.iter_rows())


def test_an_image_in_two_neighbouring_shards_is_owned_once_by_the_first(ingested):
    store, keys = ingested
    first, second = [k for k in keys if k.startswith("pickapic.train")]
    shared = set(store.read(schemas.IMAGES, first)["image_id"]) & set(store.read(schemas.IMAGES, second)["image_id"])
    assert len(shared) >= 1, "sessions cross the cut"
    owned = owners(store)
    assert {owned[i] for i in shared} == {first}


def test_an_owner_keeps_what_it_owns_when_a_shard_is_added_in_front(raw_rows, build, store):
    shared, more = raw_rows[:4], raw_rows[20:24]
    build(["b"], b={"train": shared})
    before = owners(store)
    build(["a", "b"], a={"train": [*shared, *more]}, b={"train": shared})
    after = owners(store)
    assert {image: after[image] for image in before} == before
    assert {after[i] for i in set(after) - set(before)} == {k for k in after.values() if k.startswith("a.")}
    assert len(after) > len(before)
    scorables = store.read(schemas.CATALOGUE_SCORABLES)
    assert set(scorables.filter(pl.col("image_id").is_in(list(before)))["owner"]) == set(before.values())


def test_ownership_passes_on_when_the_owner_no_longer_holds_the_image(raw_rows, build, store, tmp_path):
    build(["a", "b"], a={"train": raw_rows[:4]}, b={"train": raw_rows[:4]})
    assert {k.split(".")[0] for k in owners(store).values()} == {"a"}
    keys = build(["a", "b"], a={"train": raw_rows[30:34]}, b={"train": raw_rows[:4]})
    owned = owners(store)
    assert {owned[image_id(r, i)] for r in raw_rows[:4] for i in (0, 1)} == {keys[1]}


def test_one_vote_in_two_shards_counts_once_and_the_repetition_names_the_one_that_counts(raw_rows, build, store):
    keys = build(["a", "b"], a={"train": raw_rows[:6]}, b={"train": raw_rows[4:10]})
    repeated = store.read(schemas.CATALOGUE_VOTES)
    ids = {
        key: dict(
            zip(store.read(schemas.VOTES, key)["created_at"], store.read(schemas.VOTES, key)["vote_id"], strict=True)
        )
        for key in keys
    }
    both = [sorted((ids[keys[0]][r["created_at"]], ids[keys[1]][r["created_at"]])) for r in raw_rows[4:6]]
    expected = {(other, "duplicate_of", counted) for counted, other in both}
    assert set(repeated.select("vote_id", "status", "reason").rows()) == expected
    assert repeated["is_flipped"].to_list() == [False, False]
    assert set(catalogue.counted_votes(store, keys).collect()["vote_id"]).isdisjoint(repeated["vote_id"])
    assert len(events(store, keys)) == 10
    assert store.read(schemas.VOTES, keys[1])["status"].to_list() == ["ok"] * 6, "a shard says nothing of other shards"


def test_a_vote_in_three_shards_counts_once(raw_rows, build, store):
    keys = build(["a", "b", "c"], **{name: {"train": raw_rows[:2]} for name in "abc"})
    repeated = store.read(schemas.CATALOGUE_VOTES)
    assert repeated["status"].to_list() == ["duplicate_of"] * 4
    each = [store.read(schemas.VOTES, k).sort("created_at")["vote_id"].to_list() for k in keys]
    counted = {same: min(same) for same in zip(*each, strict=True)}
    expected = {(vote, first) for same, first in counted.items() for vote in same if vote != first}
    assert set(repeated.select("vote_id", "reason").rows()) == expected
    assert set(catalogue.counted_votes(store, keys).collect()["vote_id"]) == set(counted.values())
    assert len(events(store, keys)) == 2


def test_which_of_two_contradicting_records_of_one_vote_counts_does_not_depend_on_the_order(raw_rows, build, tmp_path):
    from pipelines.tables import Store

    row = next(r for r in raw_rows if r["label_0"] != 0.5)
    other = {**row, "label_0": row["label_1"], "label_1": row["label_0"]}
    found = []
    for name, order in (("forward", ["a", "b"]), ("backward", ["b", "a"])):
        store = Store(str(tmp_path / name))
        keys = build(order, into=store, a={"train": [row]}, b={"train": [other]})
        found.append(catalogue.counted_votes(store, keys).select("vote_id", "label_0").collect().rows())
    assert len(found[0]) == 1
    assert found[0] == found[1]


def test_votes_of_unknown_people_in_two_shards_both_count(raw_rows, build, store):
    nobody = {**raw_rows[0], "user_id": None}
    keys = build(["a", "b"], a={"train": [nobody]}, b={"train": [nobody]})
    assert len(events(store, keys)) == 2


def test_a_vote_without_label_elsewhere_does_not_hide_the_one_with_it(raw_rows, build, store):
    row = raw_rows[0]
    keys = build(["a", "b"], a={"test": [{**row, "has_label": False}]}, b={"test": [row]})
    assert len(events(store, keys)) == 1


def test_a_prompt_in_two_splits_goes_to_test_before_validation_before_train_and_is_flagged(raw_rows, build, store):
    rows = [{**raw_rows[k], "caption": f"prompt {k}"} for k in range(4)]
    one = {**raw_rows[5], "caption": "prompt 0", "user_id": 91}
    two = {**raw_rows[6], "caption": "prompt 1", "user_id": 92}
    three = {**raw_rows[7], "caption": "prompt 2", "user_id": 93}
    build(
        ["a", "b"],
        a={"train": rows, "validation": [one, three]},
        b={"test": [two, {**three, "user_id": 94}]},
    )
    found = {
        p: (split, conflict)
        for p, split, conflict in store.read(schemas.CATALOGUE_PROMPTS)
        .select("prompt", "split", "is_conflict")
        .iter_rows()
    }
    assert found == {
        "prompt 0": ("validation", True),
        "prompt 1": ("test", True),
        "prompt 2": ("test", True),
        "prompt 3": ("train", False),
    }


def test_both_orders_of_two_sources_give_the_same_votes_splits_and_pairs(tmp_path, tiny_world, sources_of, ingest_all):
    from pipelines.tables import Store

    forward, backward = Store(str(tmp_path / "forward")), Store(str(tmp_path / "backward"))
    keys = ingest_all(forward, sources_of(tiny_world))
    reversed_keys = ingest_all(backward, sources_of(tiny_world)[::-1])
    assert keys != reversed_keys
    assert sorted(keys) == sorted(reversed_keys)
    for key in keys:
        for table in (schemas.VOTES, schemas.IMAGES, schemas.PROMPTS):
            assert forward.require(table.name, key).content == backward.require(table.name, key).content
    assert events(forward, keys) == events(backward, reversed_keys)
    assert catalogue.all_pairs(forward).collect().equals(catalogue.all_pairs(backward).collect())
    assert forward.read(schemas.CATALOGUE_PROMPTS).equals(backward.read(schemas.CATALOGUE_PROMPTS))
    assert set(owners(forward)) == set(owners(backward))


def test_overlapping_sources_count_the_same_votes_in_either_order(raw_rows, build, store):
    a, b = {"train": raw_rows[:8]}, {"test": raw_rows[5:12]}
    results = []
    for order in (["a", "b"], ["b", "a"]):
        keys = build(order, a=a, b=b)
        pairs = catalogue.all_pairs(store).collect().rows()
        splits = sorted(store.read(schemas.CATALOGUE_PROMPTS).rows())
        results.append((events(store, keys), pairs, splits))
    assert results[0] == results[1]
    assert len(results[0][0]) == 12


def test_the_catalogue_is_reused_until_a_shard_changes(ingested_copy):
    store, keys = ingested_copy
    assert {b.is_reused for b in catalogue.build(store, keys).values()} == {True}
    assert not catalogue.build(store, keys[:-1])["catalogue_images"].is_reused


def test_a_shard_that_is_not_ingested_is_named(ingested):
    store, keys = ingested
    with pytest.raises(StoreError, match="no partition 'elsewhere'"):
        catalogue.build(store, [*keys, "elsewhere"])


def test_a_pair_is_listed_once_however_many_votes_it_has(ingested):
    store, _ = ingested
    pairs = catalogue.all_pairs(store).collect()
    assert pairs["pair_id"].n_unique() == len(pairs)
    assert (pairs["image_0_id"] < pairs["image_1_id"]).all()
    votes = store.scan(schemas.VOTES).filter(pl.col("pair_id").is_not_null()).collect()
    assert set(pairs["pair_id"]) == set(votes["pair_id"])
    assert len(votes) > len(pairs)


def test_a_prompt_in_one_split_only_is_never_flagged(ingested):
    store, _ = ingested
    prompts = store.read(schemas.CATALOGUE_PROMPTS)
    assert not prompts["is_conflict"].any()
    assert set(prompts["split"]) == {"train", "validation", "test"}
