import json
import typing
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from trainers import inversion, noising, recipes
from trainers.losses import PairBatch

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens" / "smpo"
at_hand = pytest.mark.skipif(not GOLDENS.exists(), reason="golden values of the released program are not at hand")
ABAR = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


@pytest.fixture(scope="module")
def released():
    """Return the golden cases and the two UNets they were made with."""
    found = json.loads((GOLDENS / "cases.json").read_text())
    abar = DDIMScheduler(**found["scheduler"]).alphas_cumprod
    unets = [UNet2DConditionModel.from_pretrained(GOLDENS / f"{n}_unet").eval() for n in ("policy", "reference")]
    return found["cases"], abar, *unets


def stacked(cases, dtype=torch.float32):
    """Return latents [2, B, 4, 8, 8], t0 [B] and prompt embeddings for winners and then losers [2B, 7, 32]."""
    latents = torch.stack([torch.tensor(c["latents"], dtype=dtype).view(2, 4, 8, 8) for c in cases], 1)
    prompts = torch.stack([torch.tensor(c["prompt_embeds"], dtype=dtype).view(7, 32) for c in cases])
    return latents, torch.tensor([c["t0"] for c in cases]), prompts.repeat(2, 1, 1)


def predictor(unet, prompts):
    return lambda x, labels, rows: unet(x, labels, encoder_hidden_states=prompts[rows]).sample


def golden(cases, name):
    return torch.stack([torch.tensor(c[name]).view(2, 4, 8, 8) for c in cases], 1)


def assert_released(cases, abar, unet):
    latents, t0, prompts = stacked(cases)
    x, target = inversion.released(
        latents, t0, abar, cases[0]["n_steps"], predictor(unet, prompts), predicts_velocity=False
    )
    torch.testing.assert_close(x, golden(cases, "noisy_latents"), rtol=1e-5, atol=3e-6)
    # At t0 = 0 the target magnifies a rounding of the latent 34 times.
    torch.testing.assert_close(target, golden(cases, "target"), rtol=1e-5, atol=5e-5)
    return x, target, t0, prompts


def latents_of(pairs, channels=4, side=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, pairs, channels, side, side, generator=generator, dtype=dtype)


# --- the released program ----------------------------------------------------------------------------------------------


@at_hand
def test_each_pair_alone_is_inverted_as_by_the_released_program(released):
    cases, abar, policy, _ = released
    for case in cases:
        assert case["grid"] == [step - 1000 // case["n_steps"] for step in levels("released", case["n_steps"])]
        assert_released([case], abar, policy)


@at_hand
@pytest.mark.parametrize("steps", [5, 10])
def test_pairs_with_other_timesteps_and_prompts_in_one_batch_do_not_change_each_other(released, steps):
    cases, abar, policy, reference = released
    cases = [c for c in cases if c["n_steps"] == steps]
    assert len({c["t0"] for c in cases}) > 4
    x, target, t0, prompts = assert_released(cases, abar, policy)
    with torch.no_grad():
        mine, other = (predictor(u, prompts)(x.flatten(0, 1), t0.repeat(2), slice(None)) for u in (policy, reference))
    batch = PairBatch(target, mine.view_as(x), other.view_as(x))
    for name, errors in (("model_losses", batch.policy_error), ("ref_losses", batch.reference_error)):
        torch.testing.assert_close(errors, torch.tensor([c[name] for c in cases]).T, rtol=2e-4, atol=1e-6)


@at_hand
@pytest.mark.parametrize("mode", ["released", "consistent"])
def test_a_model_that_predicts_velocity_gives_the_latents_of_one_that_predicts_noise(released, mode):
    cases, abar, policy, _ = released
    policy = UNet2DConditionModel.from_config(policy.config).double().eval()
    cases = [c for c in cases if c["n_steps"] == 5]
    latents, t0, prompts = stacked(cases, torch.float64)
    t0 = t0 if mode == "released" else torch.tensor(levels(mode, 5) * 2)
    noise = predictor(policy, prompts)

    def velocity(x, labels, rows):
        a = abar.double()[labels.clamp(min=0)].view(-1, 1, 1, 1)
        return (noise(x, labels, rows) - (1 - a).sqrt() * x) / a.sqrt()

    x, e = inversion.invert(latents, t0, abar, 5, noise, mode=mode, predicts_velocity=False)
    x_v, v = inversion.invert(latents, t0, abar, 5, velocity, mode=mode, predicts_velocity=True)
    torch.testing.assert_close(x_v, x)
    a = abar.double()[t0].view(1, -1, 1, 1, 1)
    torch.testing.assert_close(v, a.sqrt() * e - (1 - a).sqrt() * latents)


# --- algebra -----------------------------------------------------------------------------------------------------------


def levels(mode, steps, timesteps=1000):
    return inversion.levels(timesteps, steps, mode).tolist()


def drawn(mode, steps, *places):
    return inversion.drawable(1000, steps, mode)[list(places)]


def test_the_recipes_modes_are_the_ones_there_are():
    assert set(typing.get_type_hints(recipes.Inversion)["mode"].__args__) == set(inversion.MODES)


@pytest.mark.parametrize("mode", inversion.MODES)
@pytest.mark.parametrize("velocity", [False, True])
def test_latent_and_target_lead_back_to_the_clean_latent(mode, velocity):
    x0 = latents_of(4)
    t0 = drawn(mode, 5, 0, 1, 2, -1)
    noise = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, target = inversion.invert(
        x0,
        t0,
        ABAR,
        5,
        lambda x, labels, rows: torch.tanh(x) + labels.view(-1, 1, 1, 1) / 1000,
        mode=mode,
        predicts_velocity=velocity,
        noise=lambda rows, level: noise[rows],
    )
    a = ABAR.double()[t0].view(1, -1, 1, 1, 1)
    back = a.sqrt() * x - (1 - a).sqrt() * target if velocity else (x - (1 - a).sqrt() * target) / a.sqrt()
    torch.testing.assert_close(back, x0)
    assert (x - x0).abs().amax((0, 2, 3, 4)).min() > 1e-3


@pytest.mark.parametrize("velocity", [False, True])
def test_where_the_noise_is_known_consistent_inversion_is_forward_noise(velocity):
    x0, t0 = latents_of(9), torch.tensor(levels("consistent", 10))
    e = latents_of(9, seed=1)[0]

    def predict(x, labels, rows):
        known = e[rows % 9]
        a = ABAR.double()[labels].view(-1, 1, 1, 1)
        return (known - (1 - a).sqrt() * x) / a.sqrt() if velocity else known

    found = inversion.consistent(x0, t0, ABAR, 10, predict, predicts_velocity=velocity)
    expected = noising.noised(x0, e, t0, ABAR.double(), predicts_velocity=velocity)
    torch.testing.assert_close(found, expected)


def test_the_released_pseudo_step_starts_from_the_noise_of_timestep_0():
    # abar: 0.9, 0.8, 0.5, 0.2; n = 2, so labels -1 and 1, levels 1 and 3. With e = 1 everywhere and x0 = 2:
    # x_1 = sqrt(.8/.9) (2 - sqrt(.1)) + sqrt(.2), x_3 = sqrt(.2/.8) (x_1 - sqrt(.2)) + sqrt(.8).
    abar = torch.tensor([0.9, 0.8, 0.5, 0.2], dtype=torch.float64)
    seen = []

    def predict(x, labels, rows):
        seen.append(labels.tolist())
        return torch.ones_like(x)

    x, _ = inversion.released(
        torch.full((2, 1, 1, 1, 1), 2.0).double(), torch.tensor([2]), abar, 2, predict, predicts_velocity=False
    )
    first = (0.8 / 0.9) ** 0.5 * (2 - 0.1**0.5) + 0.2**0.5
    assert x.flatten().tolist() == pytest.approx([0.5 * (first - 0.2**0.5) + 0.8**0.5] * 2, rel=1e-7)
    assert seen == [[-1, -1]] * 2 + [[1, 1]] * 2


def test_inpo_predicts_once_per_step_and_adds_a_tenth_of_ddims_noise():
    # The grid above with e = 0, x0 = 2, noise 1 then 3: variances (.1/.2)(1 - .8/.9) and (.2/.8)(1 - .2/.8).
    abar = torch.tensor([0.9, 0.8, 0.5, 0.2], dtype=torch.float64)
    seen = []

    def predict(x, labels, rows):
        seen.append(labels.tolist())
        return torch.zeros_like(x)

    def noise(rows, level):
        return torch.full((len(rows), 1, 1, 1), float(level))

    start = torch.full((2, 1, 1, 1, 1), 2.0).double()
    x, target = inversion.inpo(start, torch.tensor([3]), abar, 2, predict, noise, predicts_velocity=False)
    first = (0.8 / 0.9) ** 0.5 * 2 + 0.1 * (0.1 / 0.2 * (1 - 0.8 / 0.9)) ** 0.5
    second = 0.5 * first + 0.1 * 3 * (0.2 / 0.8 * (1 - 0.2 / 0.8)) ** 0.5
    assert x.flatten().tolist() == pytest.approx([second] * 2, rel=1e-7)
    assert target.flatten().tolist() == pytest.approx([(second - 0.2**0.5 * 2) / 0.8**0.5] * 2, rel=1e-7)
    assert seen == [[-1, -1], [1, 1]]


def test_inpo_without_its_noise_is_refused():
    with pytest.raises(ValueError, match="give `noise`"):
        inversion.invert(
            latents_of(1), torch.tensor([5]), ABAR, 5, lambda x, *_: x, mode="inpo", predicts_velocity=False
        )


# --- sampling back -----------------------------------------------------------------------------------------------------


def sampled_back(x, grid, abar, predict):
    """Return what DDIM sampling over the levels of the grid makes of x [N, C, H, W] at the last of them."""
    for level, below in zip(reversed(grid), [*reversed(grid[:-1]), None], strict=True):
        e = predict(x, torch.full((len(x),), level), torch.arange(len(x)))
        a = abar[level]
        a_next = torch.ones_like(a) if below is None else abar[below]
        x = inversion.ddim_inverse_step(x, e, a, a_next)
    return x


@pytest.mark.parametrize("second", ["source", "target"])
def test_sampling_back_with_the_same_predictions_returns_the_clean_latent_exactly(second):
    x0, grid = latents_of(3), levels("consistent", 10)
    e = latents_of(3, seed=1).flatten(0, 1)
    x, _ = inversion.consistent(
        x0, torch.tensor([grid[-1]] * 3), ABAR, 10, lambda x, _, rows: e[rows], predicts_velocity=False, second=second
    )
    back = sampled_back(x.flatten(0, 1), grid, ABAR.double(), lambda x, _, rows: e[rows])
    torch.testing.assert_close(back, x0.flatten(0, 1), rtol=0, atol=1e-12)


@at_hand
@pytest.mark.parametrize("steps", [5, 10])
def test_the_correction_at_the_target_label_brings_sampling_back_nearest_to_the_clean_latent(
    released, steps, record_property
):
    cases, abar, *_ = released
    latents, _, prompts = stacked([c for c in cases if c["n_steps"] == steps][:3], torch.float64)
    # A double-precision copy: the fixture's models stay float32.
    unet = UNet2DConditionModel.from_pretrained(GOLDENS / "reference_unet").eval().double()
    predict, grid = predictor(unet, prompts), levels("consistent", steps)
    t0 = torch.tensor([grid[-1]] * latents.shape[1])
    plain = inversion.walk(
        latents.flatten(0, 1),
        t0.tolist() * 2,
        abar,
        steps,
        predict,
        mode=inversion.Mode(is_clean_first=True, second=None),
        predicts_velocity=False,
    )
    ends = {"plain DDIM": list(plain)[-1][2]}
    for label in ("source", "target"):
        x, _ = inversion.consistent(latents, t0, abar, steps, predict, predicts_velocity=False, second=label)
        ends[label] = x.flatten(0, 1)
    with torch.no_grad():
        error = {
            name: (sampled_back(x, grid, abar.double(), predict) - latents.flatten(0, 1)).pow(2).mean().sqrt().item()
            for name, x in ends.items()
        }
    record_property("round_trip_rms", error)
    print(f"round trip with {steps} steps, rms error of latents: {error}")
    assert error["target"] < error["source"] < 0.75 * error["plain DDIM"]


# --- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", inversion.MODES)
def test_each_pair_takes_its_own_number_of_steps(mode):
    t0 = drawn(mode, 5, 0, 1, -1)
    seen = torch.zeros(6, dtype=torch.int64)

    def predict(x, labels, rows):
        assert len(x) == len(labels) == len(rows)
        seen.index_add_(0, rows, torch.ones_like(rows))
        return x

    inversion.invert(
        latents_of(3),
        t0,
        ABAR,
        5,
        predict,
        mode=mode,
        predicts_velocity=False,
        noise=lambda rows, level: torch.zeros(1),
    )
    expected = [inversion.forwards(mode, 5, t) for t in t0.tolist()]
    assert seen.tolist() == expected * 2
    assert len(set(expected)) > 1


def test_the_mean_number_of_forwards_is_the_one_of_the_paper_s_program():
    for steps, mean in ((5, 7.6), (10, 12.8)):
        assert sum(inversion.forwards("released", steps, t) for t in range(1000)) / 1000 == pytest.approx(
            mean, abs=0.05
        )
    assert [inversion.forwards("consistent", 5, t) for t in (201, 401, 601, 801)] == [2, 4, 6, 8]
    assert inversion.forwards("inpo", 10, 999) == 10


def test_levels_and_drawn_timesteps_by_hand():
    assert levels("consistent", 5) == [201, 401, 601, 801]
    assert levels("released", 5) == levels("inpo", 5) == [1, 201, 401, 601, 801]
    # Stride 1000 // 9 = 111.
    assert levels("released", 9)[-1] == 889
    assert inversion.drawable(1000, 5, "consistent").tolist() == [201, 401, 601, 801]
    for mode in ("released", "inpo"):
        assert inversion.drawable(1000, 5, mode).tolist() == list(range(1000))
        t0 = torch.tensor([0, 1, 2, 201, 202, 801, 999])
        assert inversion.level_of(t0, 1000, 5, mode).tolist() == [1, 1, 201, 201, 401, 801, 801]


def test_a_timestep_between_the_levels_is_refused_where_label_and_latent_must_agree():
    with pytest.raises(ValueError, match=r"levels \[201, 401, 601, 801\], found \[333\]"):
        inversion.consistent(latents_of(2), torch.tensor([201, 333]), ABAR, 5, lambda x, *_: x, predicts_velocity=False)
    with pytest.raises(ValueError, match=r"t0: expected timesteps in \[0, 1000\), found \[1000\]"):
        inversion.level_of(torch.tensor([1000, 3]), 1000, 5, "released")
    with pytest.raises(ValueError, match="steps: expected 2 to 500"):
        inversion.levels(1000, 501, "released")


@pytest.mark.parametrize("mode", inversion.MODES)
def test_no_gradient_flows_and_the_clean_latents_stay_as_they_are(mode):
    weight = torch.ones((), requires_grad=True)
    x0 = latents_of(2, dtype=torch.float32).requires_grad_()
    before = x0.detach().clone()
    outcomes = inversion.invert(
        x0,
        drawn(mode, 5, 0, -1),
        ABAR,
        5,
        lambda x, labels, rows: weight * x,
        mode=mode,
        predicts_velocity=False,
        noise=lambda rows, level: torch.ones(1),
    )
    assert not any(o.requires_grad for o in outcomes)
    assert torch.is_grad_enabled()
    assert torch.equal(x0, before)


def test_half_precision_latents_and_predictions_are_walked_in_float32():
    x0 = latents_of(2, dtype=torch.float32).bfloat16()
    t0 = torch.tensor([201, 801])

    def predict(x, labels, rows):
        assert x.dtype == torch.float32
        return x.bfloat16()

    x, target = inversion.consistent(x0, t0, ABAR, 5, predict, predicts_velocity=False)
    assert x.dtype == target.dtype == torch.float32
    exact, _ = inversion.consistent(x0.double(), t0, ABAR, 5, lambda x, *_: x, predicts_velocity=False)
    torch.testing.assert_close(x.double(), exact, rtol=0.03, atol=0.03)
