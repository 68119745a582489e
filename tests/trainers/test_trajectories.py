from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from pipelines import schemas
from pipelines.tables import Store, StoreError
from trainers import inversion, randomness, trajectories
from trainers.backbones.conditioning import Conditioning
from trainers.caches import EMPTY_PROMPT
from trainers.recipes import Inversion
from trainers.tensors import TensorFile

SHAPE = (4, 8, 8)
RULE = Inversion(mode="consistent", steps=5)
WHERE = "tiny-0123/consistent-5"
ABAR = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


@dataclass
class World:
    """A random UNet, images and prompts that are functions of their ids, and what the UNet was asked."""

    store: Store
    unet: UNet2DConditionModel
    rows: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def x0(self, keys):
        return randomness.normal(SHAPE, [("image", image, int(flip)) for image, flip in keys])

    def conditioning(self, prompts):
        return Conditioning(randomness.normal((7, 32), [("prompt", p) for p in prompts]))

    def predict(self, x, labels, conditioning):
        assert len(x) == len(labels) == len(conditioning)
        self.rows.append(len(x))
        self.labels.extend(labels.tolist())
        with torch.no_grad():
            return self.unet(x, labels, encoder_hidden_states=conditioning.hidden).sample

    def ensure(self, wanted, where=WHERE, rule=RULE, **options):
        return trajectories.ensure(
            self.store,
            wanted,
            **{
                "where": where,
                "inversion": rule,
                "x0": self.x0,
                "conditioning": self.conditioning,
                "predict": self.predict,
                "alphas_cumprod": ABAR,
                "predicts_velocity": False,
                "batch_size": 4,
                "part_size": 8,
                **options,
            },
        )

    def there(self, where=WHERE):
        found = self.store.scan(schemas.TRAJECTORIES, below=where + "/").select(schemas.TRAJECTORIES.key).collect()
        assert found.is_unique().all()
        return set(found.rows())


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            norm_num_groups=4,
            attention_head_dim=8,
        ).eval()


@pytest.fixture
def world(tmp_path, unet):
    return World(Store(str(tmp_path / "store")), unet)


def wanted_rows(count, *levels):
    """Return rows of `count` trajectories at these levels in turn; every third is mirrored, every fifth promptless."""
    return pl.DataFrame(
        [
            (f"image-{i:02}", EMPTY_PROMPT if i % 5 == 0 else f"prompt-{i % 4}", i % 3 == 0, levels[i % len(levels)])
            for i in range(count)
        ],
        schema={"image_id": pl.String, "prompt_id": pl.String, "is_flipped": pl.Boolean, "level": pl.Int32},
        orient="row",
    )


def read(store, rows, scratch, where=WHERE):
    file = TensorFile(store, schemas.TRAJECTORIES, where + "/", scratch)
    return trajectories.read(file, *(rows[c].to_list() for c in schemas.TRAJECTORIES.key), SHAPE)


def online(world, rows, rule):
    """Return what online inversion gives for these rows as winners, and for the same rows as losers."""
    keys = list(zip(rows["image_id"], rows["is_flipped"], strict=True))
    told = world.conditioning(rows["prompt_id"].to_list()).twice()
    whose = rows.select("image_id", "prompt_id", "is_flipped").rows() * 2
    x, _ = inversion.invert(
        world.x0(keys).expand(2, -1, *SHAPE),
        torch.tensor(rows["level"].to_list()),
        ABAR,
        rule.steps,
        lambda x, labels, rows: world.predict(x, labels, told[rows]),
        mode=rule.mode,
        predicts_velocity=False,
        noise=trajectories.inpo_noise(whose, SHAPE),
    )
    return x


@pytest.mark.parametrize("mode", inversion.MODES)
def test_a_cached_latent_is_the_one_of_online_inversion(world, tmp_path, mode):
    rule, where = Inversion(mode=mode, steps=5), f"tiny-0123/{mode}-5"
    rows = wanted_rows(11, 201, 801, 401)
    world.ensure(rows, where, rule)
    cached = read(world.store, rows, tmp_path, where)
    for side in online(world, rows, rule):
        torch.testing.assert_close(cached, side, rtol=1e-3, atol=2e-3)
    assert (cached - world.x0(rows.select("image_id", "is_flipped").rows())).abs().mean() > 0.05


def test_levels_images_prompts_and_mirroring_all_matter(world, tmp_path):
    one = wanted_rows(1, 401)
    others = [
        one.with_columns(**change)
        for change in (
            {},
            {"image_id": pl.lit("image-77")},
            {"prompt_id": pl.lit("prompt-1")},
            {"is_flipped": pl.lit(False)},
            {"level": pl.lit(601, pl.Int32)},
        )
    ]
    rows = pl.concat(others)
    world.ensure(rows)
    first, *rest = read(world.store, rows, tmp_path)
    assert all((first - other).abs().max() > 1e-3 for other in rest)


def test_all_levels_of_a_trajectory_cost_the_forwards_of_its_highest(world):
    rows = pl.concat([wanted_rows(4, level) for level in (801, 201, 401)])
    world.ensure(rows)
    assert sum(world.rows) == 4 * inversion.forwards("consistent", 5, 801)
    assert len(world.there()) == 12


def test_a_second_call_computes_nothing(world):
    rows = wanted_rows(10, 201, 401)
    made = world.ensure(rows)
    assert [m.rows for m in made] == [8, 2]
    asked, files = len(world.rows), [(m.partition, m.written_at) for m in made]
    assert world.ensure(pl.concat([rows, rows[:3]])) == []
    assert len(world.rows) == asked
    assert [(m.partition, m.written_at) for m in world.store.manifests("trajectories")] == sorted(files)


def test_a_run_that_wants_more_levels_computes_only_these(world):
    world.ensure(wanted_rows(10, 201, 401))
    before = world.there()
    world.rows.clear()
    more = pl.concat([wanted_rows(10, 201, 401), wanted_rows(3, 601)])
    assert sum(m.rows for m in world.ensure(more)) == 3
    assert sum(world.rows) == 3 * inversion.forwards("consistent", 5, 601)
    assert world.there() - before == set(wanted_rows(3, 601).rows())


def test_a_killed_call_keeps_its_finished_parts_and_the_next_makes_the_rest(world):
    rows = wanted_rows(20, 201, 401, 601)

    class Killed(Exception):
        pass

    def kill(message):
        # Batches of 4, parts of 8: in the middle of the second part.
        if ": 12/20," in message:
            raise Killed

    with pytest.raises(Killed):
        world.ensure(rows, progress=kill)
    assert len(world.there()) == 8
    assert world.there() < set(rows.rows())
    world.rows.clear()
    left = trajectories.missing(world.store, WHERE, rows)
    assert sum(m.rows for m in world.ensure(rows)) == len(left) == 12
    assert sum(world.rows) == sum(inversion.forwards("consistent", 5, level) for level in left["level"])
    assert world.there() == set(rows.rows())
    assert not list(Path(world.store.location).rglob("*.staged"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_share_the_work_without_overlap_whenever_they_start(world, order):
    rows = wanted_rows(23, 801, 201, 401)
    made = [sum(m.rows for m in world.ensure(rows, rank=rank, world=3)) for rank in order]
    assert sorted(made) == [7, 8, 8]
    assert world.there() == set(rows.rows())
    # Long and short trajectories are shared out alike.
    total = sum(inversion.forwards("consistent", 5, level) for level in rows["level"])
    assert sum(world.rows) == total


def test_progress_says_what_is_done_of_what_and_how_fast(world):
    said = []
    world.ensure(wanted_rows(10, 201), progress=said.append)
    assert [m.split(",")[0] for m in said] == [f"trajectories {WHERE}: {n}/10" for n in (4, 8, 10)]
    assert all(m.endswith(" per second") for m in said)


def test_modes_and_step_numbers_that_start_alike_are_kept_apart(world):
    world.ensure(wanted_rows(2, 101), "tiny-0123/consistent-10", Inversion(steps=10))
    assert len(trajectories.missing(world.store, "tiny-0123/consistent-1", wanted_rows(2, 101))) == 2
    assert trajectories.missing(world.store, "tiny-0123/consistent-10/", wanted_rows(2, 101)).is_empty()


def test_inpos_noise_is_the_same_in_every_call_and_another_for_every_latent():
    whose = [("a", "p", False), ("a", "p", True), ("b", "p", False), ("a", EMPTY_PROMPT, False)]
    noise = trajectories.inpo_noise(whose, SHAPE)
    rows = torch.arange(4)
    drawn = torch.cat([noise(rows, 201), noise(rows, 401)]).flatten(1)
    assert torch.equal(trajectories.inpo_noise(whose[::-1], SHAPE)(torch.tensor([0]), 401).flatten(1), drawn[-1:])
    assert (torch.corrcoef(drawn) - torch.eye(8)).abs().max() < 0.3


def test_a_timestep_between_the_levels_is_refused_rather_than_dropped(world):
    with pytest.raises(ValueError, match=r"column level: expected the grid's \[201, 401, 601, 801\], found \[333\]"):
        world.ensure(wanted_rows(4, 201, 333))
    assert not world.there()


def test_latents_of_another_version_of_the_program_are_refused(world, monkeypatch):
    world.ensure(wanted_rows(2, 201))
    monkeypatch.setattr(trajectories, "VERSIONS", {"code": "0"})
    with pytest.raises(StoreError, match=r"part-.*remove .*consistent-5/ to make them anew"):
        trajectories.missing(world.store, WHERE, wanted_rows(2, 201))


def test_a_latent_that_is_not_there_is_named(world, tmp_path):
    world.ensure(wanted_rows(2, 201))
    with pytest.raises(StoreError, match=r"lacks 1 latents, the first \('image-01', 'prompt-1', False, 401\)"):
        read(world.store, wanted_rows(2, 201, 401), tmp_path)


def test_the_size_is_two_bytes_per_number(world):
    made = world.ensure(wanted_rows(5, 201))
    latents = world.store.read(schemas.TRAJECTORIES, made[0].partition)["latent"]
    assert sum(len(data) for data in latents) == trajectories.size_bytes(5, SHAPE) == 5 * 4 * 8 * 8 * 2
