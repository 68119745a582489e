import pytest
import torch

from trainers.noising import noised


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64)
    return latents, noise, torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.36, 0.0], dtype=torch.float64)


def test_winner_and_loser_share_timestep_and_noise(pair):
    latents, noise, timesteps, abar = pair
    noisy, target = noised(latents, noise, timesteps, abar, predicts_velocity=False)
    assert torch.equal(target[0], target[1])
    torch.testing.assert_close(noisy[0, 1], 0.6 * latents[0, 1] + 0.8 * noise[1])
    assert torch.equal(noisy[:, 0], latents[:, 0])
    assert torch.equal(noisy[1, 2], noise[2])


def test_velocity_and_noisy_latent_give_back_latent_and_noise(pair):
    latents, noise, timesteps, abar = pair
    noisy, velocity = noised(latents, noise, timesteps, abar, predicts_velocity=True)
    a, b = (x.sqrt().view(1, 3, 1, 1, 1) for x in (abar, 1 - abar))
    torch.testing.assert_close(a * noisy - b * velocity, latents)
    torch.testing.assert_close(b * noisy + a * velocity, noise.expand_as(latents))
