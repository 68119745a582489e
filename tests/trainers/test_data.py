import dataclasses

import polars as pl
import pytest
import torch

from pipelines import schemas
from pipelines.tables import Store, StoreError
from trainers import data, inversion
from trainers.caches import EMPTY_PROMPT
from trainers.data import batch_rows
from trainers.recipes import AdaptiveDPO, Inversion, SmPO, recipe
from trainers.steps import Training


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    rows = [r for step in range(6) for r in batch_rows(step, 5, 10, seed=3)]
    first, second = [r for r, e in rows if e == 0], [r for r, e in rows if e == 1]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_batch_depends_on_its_step_alone_and_may_span_epochs():
    assert batch_rows(4, 7, 10, seed=3) == batch_rows(4, 7, 10, seed=3)
    assert {e for _, e in batch_rows(1, 7, 10, seed=3)} == {0, 1}
    assert batch_rows(0, 7, 10, seed=3) != batch_rows(0, 7, 10, seed=4)


# --- draws -----------------------------------------------------------------------------------------------------------


def drawn(rule, ids=("a", "b", "c"), epochs=(0, 0, 1), seed=0):
    return data.draws(seed, ids, epochs, rule, 1000)


def test_a_pairs_draws_are_the_same_in_any_batch_and_others_in_another_epoch_or_seed():
    rule = dataclasses.replace(recipe("diffusion_dpo"), flip=True)
    whole, alone = drawn(rule), drawn(rule, ("b",), (0,))
    assert alone.timesteps == whole.timesteps[1:2]
    assert alone.keys == whole.keys[1:2]
    many = [f"pair{i}" for i in range(400)]
    zero, one, seeded = (drawn(rule, many, [e] * 400, s) for e, s in ((0, 0), (1, 0), (0, 1)))
    for other in (one, seeded):
        assert other.timesteps != zero.timesteps
        assert other.is_flipped != zero.is_flipped
        assert other.is_dropped != zero.is_dropped


def test_draws_have_the_shares_of_the_recipe():
    many = [f"pair{i}" for i in range(4000)]
    plain = recipe("diffusion_dpo")
    flipping = dataclasses.replace(plain, flip=True, prompt_dropout=0.2)
    found = drawn(flipping, many, [0] * 4000)
    # Standard errors are 0.6 and 0.8 points.
    assert sum(found.is_dropped) / 4000 == pytest.approx(0.2, abs=0.025)
    assert sum(found.is_flipped) / 4000 == pytest.approx(0.5, abs=0.03)
    assert torch.tensor(found.timesteps).float().mean() == pytest.approx(499.5, abs=18)
    assert not any(drawn(plain, many, [0] * 4000).is_flipped)


def test_timesteps_of_consistent_inversion_lie_on_its_levels():
    rule = dataclasses.replace(recipe("diffusion_dpo"), noising=Inversion("consistent", steps=5))
    found = drawn(rule, [f"p{i}" for i in range(300)], [0] * 300)
    assert set(found.timesteps) == set(inversion.levels(1000, 5, "consistent").tolist()) == {201, 401, 601, 801}


# --- pairs of a store ------------------------------------------------------------------------------------------------


@pytest.fixture
def store(cached_config):
    return Store(cached_config.store_location)


def test_objectives_get_the_columns_that_they_need(store):
    smooth = data.training_pairs(store, recipe("smpo"))
    assert smooth["probability"].is_between(0.5, 1.0).all()
    adaptive = data.training_pairs(store, recipe("adaptive_dpo"))
    joined = adaptive.join(store.read(schemas.PREFERENCES), on="pair_id")
    assert joined.height == len(adaptive) > 50
    expected = joined["minority_probability"].fill_null(joined["minority_score"])
    assert (joined["minority"] == expected).all()
    assert "minority" not in data.training_pairs(store, recipe("diffusion_dpo")).columns


def test_a_pair_without_the_value_that_the_objective_needs_is_excluded_with_that_reason(store):
    frame = store.read(schemas.PREFERENCES)
    chosen = data.training_pairs(store, recipe("adaptive_dpo"))["pair_id"][0]
    hidden = pl.when(pl.col("pair_id") != chosen)
    changed = frame.with_columns(hidden.then(c).alias(c) for c in ("metric", "minority_probability", "minority_score"))
    store.write(schemas.PREFERENCES.of(schemas.PREFERENCES.scorers(frame.columns)), changed, made_from="test")
    for column, reason in (("metric", "metric is not known"), ("minority_probability", "minority_probability is not")):
        rule = dataclasses.replace(recipe("adaptive_dpo"), minority_column=column)
        row = data.decided(store, rule, ["train"]).filter(pl.col("pair_id") == chosen).collect().row(0, named=True)
        assert row["target_label_0"] is None
        assert row["excluded_because"].startswith(reason)
        assert chosen not in data.training_pairs(store, rule)["pair_id"]


def test_no_pair_is_lost_between_those_that_train_and_those_with_a_reason(store):
    for name in ("diffusion_dpo", "smpo", "adaptive_dpo", "balanced_dpo"):
        frame = data.decided(store, recipe(name), ["train"]).collect()
        assert len(frame) == store.read(schemas.PREFERENCES).filter(pl.col("split") == "train").height
        assert (frame["target_label_0"].is_null() == frame["excluded_because"].is_not_null()).all()
        assert frame["target_label_0"].drop_nulls().len() == len(data.training_pairs(store, recipe(name)))


@pytest.fixture
def opened(cached_config, store, tmp_path):
    backbone = Training(store, cached_config, lambda message: None).backbone

    def of(rule, **options):
        pairs = data.training_pairs(store, rule)
        return data.PairData(store, pairs, backbone, tmp_path / "scratch", rule.noising, **options)

    return of


def test_a_batch_holds_scaled_latents_drawn_from_their_posteriors_the_same_in_any_batch(opened):
    rule = recipe("diffusion_dpo")
    source = opened(rule)
    ids = source.pairs["pair_id"].to_list()

    def batch(rows, seed=0):
        return source.batch(rows, data.draws(seed, [ids[r] for r in rows], [0] * len(rows), rule, 1000))

    whole, part = batch([4, 9, 2]), batch([9])
    assert torch.equal(whole.latents[:, 1:2], part.latents)
    assert torch.equal(whole.noise[1:2], part.noise)
    assert torch.equal(whole.conditioning.hidden[1:2], part.conditioning.hidden)
    means = torch.stack([source.start_latents([(source.pairs[c][9], False)]) for c in ("winner_id", "loser_id")])
    other = batch([9], seed=1)
    assert not torch.equal(other.latents, part.latents)
    # The posteriors of the tiny autoencoder are narrow.
    assert 0 < (part.latents - means).abs().mean() < 0.2 * means.abs().mean()


def test_dropped_prompts_are_the_empty_prompt(opened):
    rule = dataclasses.replace(recipe("diffusion_dpo"), prompt_dropout=0.5)
    source = opened(rule)
    ids = source.pairs["pair_id"].to_list()[:12]
    found = data.draws(0, ids, [0] * 12, rule, 1000)
    batch = source.batch(list(range(12)), found)
    empty = source.conditioning([EMPTY_PROMPT]).hidden[0]
    for i, is_dropped in enumerate(found.is_dropped):
        assert torch.equal(batch.conditioning.hidden[i], empty) == is_dropped
    assert 0 < sum(found.is_dropped) < 12


def test_mirroring_needs_mirrored_latents(opened):
    with pytest.raises(StoreError, match=r"mirrored images.*cache"):
        opened(recipe("diffusion_dpo"), with_flips=True)


def test_trajectories_start_from_the_posteriors_means_and_are_all_wanted_beforehand(opened):
    rule = dataclasses.replace(recipe("smpo"), objective=SmPO(), prompt_dropout=0.5)
    source = opened(rule)
    wanted = data.wanted_trajectories(source.pairs, range(3), 16, 0, rule, 1000)
    assert wanted.is_duplicated().sum() == 0
    rows = [r for s in range(3) for r in batch_rows(s, 16, len(source), 0)]
    ids = [source.pairs["pair_id"][r] for r, _ in rows]
    found = data.draws(0, ids, [e for _, e in rows], rule, 1000)
    keys = set(wanted.rows())
    for (row, _), timestep, is_dropped in zip(rows, found.timesteps, found.is_dropped, strict=True):
        prompt = EMPTY_PROMPT if is_dropped else source.pairs["prompt_id"][row]
        assert (source.pairs["winner_id"][row], prompt, False, timestep) in keys
        assert (source.pairs["loser_id"][row], prompt, False, timestep) in keys
    batch = source.batch([3], data.draws(0, [source.pairs["pair_id"][3]], [0], rule, 1000))
    assert torch.equal(batch.latents[0], source.start_latents([(source.pairs["winner_id"][3], False)]))
    assert batch.noise is None


def test_the_dataset_metric_needs_nothing_but_the_reference():
    assert AdaptiveDPO(metric="dataset", margin_term="none").needs == {"reference", "minority"}
    assert AdaptiveDPO(metric="online").needs == {"reference", "annotators"}
