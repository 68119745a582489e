"""Forward noise for pairs: one timestep and one noise are shared by winner and loser.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps;   target = eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
"""

from __future__ import annotations

import torch


def noised(
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    predicts_velocity: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x_t, target), both [2, B, C, H, W].

    latents: x_0 scaled, [2, B, C, H, W]. noise: [B, C, H, W]. timesteps: [B]. alphas_cumprod: abar, [T].
    """
    abar = alphas_cumprod[timesteps].to(latents.dtype).view(1, -1, 1, 1, 1)
    noise = noise[None].expand_as(latents)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    target = abar.sqrt() * noise - (1 - abar).sqrt() * latents if predicts_velocity else noise
    return noisy, target
