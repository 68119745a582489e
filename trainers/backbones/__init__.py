"""Backbones: what differs between the models that are trained; everything else uses their few functions.

A backbone offers

    folder, digest              where it lies; the key of everything that is cached with it
    timesteps, alphas_cumprod   of the noise schedule, T and abar [T]
    predicts_velocity           v = sqrt(abar) eps - sqrt(1 - abar) x0 rather than eps
    latent_scale, vae_factor    between the autoencoder's latents and the UNet's; pixels per cell of the latent and side
    unet                        the untuned UNet, frozen
    encode_prompts(texts) -> Conditioning
    to_pixels(picture) -> [3, R, R];  encode_images(pixels [N, 3, R, R]) -> mean, log-variance [N, C, H, W]
    predict(unet, noisy [N, C, H, W], timesteps [N], conditioning) -> [N, C, H, W]; `unet` is anything callable as one
    trainable(weights, start) -> UNet   with the recipe's weights (all, or LoRA) trainable, from the base or an export
    load_unet(folder) -> UNet   an exported model's, frozen
    export(unet, folder)        what plain diffusers loads
    pipeline(unet)              a diffusers pipeline that samples with `unet` (DDIM)
"""
