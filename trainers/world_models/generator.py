"""Trains the tiny text-to-image pipeline: AutoencoderKL + CLIPTextModel + UNet2DConditionModel on rendered scenes."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipelines.world import scene
from trainers.world_models import tokenizer as world_tokenizer

AUTOENCODER_STEPS, GENERATOR_STEPS, BATCH = 2_200, 3_000, 64
AUTOENCODER_BATCH = 32
OBJECT_WEIGHT = 8.0
SCENE_BANK = 20_000
PROMPT_DROPOUT = 0.1
TIMESTEPS, HIGH_NOISE = 1_000, 800
HIGH_NOISE_STEPS, HIGH_NOISE_SHARE = 400, 0.25
CHECK_STEPS, CHECK_GUIDANCE = 20, 3.0
Log = Callable[[str], None]


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Return uint8 [N, H, W, 3] as float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(tensor: torch.Tensor) -> np.ndarray:
    """Return [N, 3, H, W] in [-1, 1] as uint8 [N, H, W, 3]."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def random_wanted(n: int, rng: np.random.Generator) -> list[scene.Wanted]:
    """Draw n prompts' meanings, every attribute but the shape left open half of the time."""
    return [
        scene.Wanted(
            int(rng.integers(len(scene.SHAPES))),
            *(
                int(rng.integers(len(v))) if rng.random() < 0.5 else scene.NONE
                for v in (scene.COLOURS, scene.SIZES, scene.PLACES)
            ),
        )
        for _ in range(n)
    ]


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 50
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to 1e-3 of the rate."""

    def factor(i: int) -> float:
        return min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(i / steps, 1.0))) + 1e-3)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_autoencoder(seed: int, log: Log, steps: int = AUTOENCODER_STEPS) -> AutoencoderKL:
    """Train the autoencoder (32x32x3 -> 8x8x4) on object-weighted L1 + 4 MSE and a little KL; scale latents to std 1."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scene.PIXELS,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = learning_rate_schedule(optimizer, steps)
    start = time.monotonic()
    for step in range(steps):
        x = to_tensor(
            scene.render(scene.sample_scenes(random_wanted(AUTOENCODER_BATCH, rng), rng), grain=0.01, rng=rng)
        )
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).abs()
        # The object covers few pixels and carries all meaning: pixels unlike the picture's corner weigh more.
        different = (x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.15
        weight = 1 + OBJECT_WEIGHT * F.max_pool2d(different.float(), 5, stride=1, padding=2)
        weight = weight / weight.mean()
        loss = (weight * (error + 4 * error**2)).mean() + 3e-5 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(f"autoencoder {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - start:.0f} s")
    with torch.no_grad():
        pictures = scene.render(scene.sample_scenes(random_wanted(512, rng), rng))
        vae.register_to_config(scaling_factor=float(1 / vae.encode(to_tensor(pictures)).latent_dist.sample().std()))
    return vae.eval()


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained two-layer CLIP text encoder of width 64 for `tokenizer`."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=world_tokenizer.MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=64,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Return token ids [N, MAX_TOKENS]."""
    return tokenizer(
        prompts, padding="max_length", max_length=world_tokenizer.MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def train_generator(
    vae: AutoencoderKL, seed: int, log: Log, steps: int = GENERATOR_STEPS, checkpoint: Path | None = None
) -> StableDiffusionPipeline:
    """Train UNet and text encoder together on v-prediction; return the pipeline with their weights' average."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = world_tokenizer.build()
    encoder = text_encoder(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=scene.PIXELS // 4,
        in_channels=4,
        out_channels=4,
        # At the third level (2x2 cells) every cell touches other borders, which is how the network knows where it is.
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    log(f"generator: UNet {sum(p.numel() for p in unet.parameters()):,} parameters")

    scenes = scene.sample_scenes(random_wanted(SCENE_BANK, rng), rng)
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(to_tensor(scene.render(scenes.take(i)))).latent_dist.mean * vae.config.scaling_factor
                for i in np.array_split(np.arange(SCENE_BANK), SCENE_BANK // 256)
            ]
        )
    parameters = [*unet.parameters(), *encoder.parameters()]
    averages = [copy.deepcopy(m).requires_grad_(False) for m in (unet, encoder)]
    optimizer = torch.optim.AdamW(parameters, lr=1.2e-3, weight_decay=1e-3)
    schedule = learning_rate_schedule(optimizer, steps, warmup=100)
    start, recent = time.monotonic(), []
    for step in range(steps):
        pick = rng.integers(0, SCENE_BANK, BATCH)
        prompts = [caption(scenes, int(i), rng) if rng.random() >= PROMPT_DROPOUT else "" for i in pick]
        x0 = latents[pick]
        noise = torch.randn_like(x0)
        # Where things are is decided at high noise. Trained on all timesteps alone, the place of the object was still at
        # chance when shape, colour and size were right; trained on high noise first, it is learned in 150 steps.
        high = (torch.rand(BATCH) < HIGH_NOISE_SHARE) | (step < HIGH_NOISE_STEPS)
        t = torch.where(high, torch.randint(HIGH_NOISE, TIMESTEPS, (BATCH,)), torch.randint(0, TIMESTEPS, (BATCH,)))
        hidden = encoder(tokenize(tokenizer, prompts)).last_hidden_state
        target = scheduler.get_velocity(x0, noise, t)
        loss = F.mse_loss(unet(scheduler.add_noise(x0, noise, t), t, hidden).sample, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, model in zip(averages, (unet, encoder), strict=True):
                for a, p in zip(average.parameters(), model.parameters(), strict=True):
                    a.lerp_(p, 1 - decay)
        if step % 100 == 0 or step == steps - 1:
            log(f"generator {step + 1}/{steps} loss {np.mean(recent[-100:]):.4f} {time.monotonic() - start:.0f} s")
        if checkpoint is not None and (step + 1) % 500 == 0:
            pipeline = _pipeline(vae, averages[1], tokenizer, averages[0], scheduler)
            pipeline.save_pretrained(checkpoint)
            log(f"  on 200 samples right: {as_text(measure(pipeline, 200, seed + 1))}")
    return _pipeline(vae, averages[1], tokenizer, averages[0], scheduler)


def _pipeline(
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def caption(scenes: scene.Scenes, i: int, rng: np.random.Generator) -> str:
    """Return a true prompt for scene i that fixes 2 to 4 of its attributes."""
    keep = rng.random(3) < 0.6
    if not keep.any():
        keep[rng.integers(3)] = True
    names = ("colour", "size", "place")
    wanted = scene.Wanted(
        int(scenes.shape[i]),
        *(int(getattr(scenes, n)[i]) if k else scene.NONE for n, k in zip(names, keep, strict=True)),
    )
    return wanted.text(scene.PREFIXES[rng.integers(len(scene.PREFIXES))])


def sample_pictures(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> np.ndarray:
    """Return one picture per prompt, uint8 [N, 32, 32, 3] (DDIM, CHECK_STEPS steps, guidance CHECK_GUIDANCE)."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        pipeline(
            prompts[i : i + 64],
            num_inference_steps=CHECK_STEPS,
            guidance_scale=CHECK_GUIDANCE,
            generator=generator,
            output_type="np",
        ).images
        for i in range(0, len(prompts), 64)
    ]
    return np.round(np.concatenate(parts) * 255).astype(np.uint8)


def measure(pipeline: StableDiffusionPipeline, samples: int, seed: int) -> dict[str, float]:
    """Return on which share of `samples` pictures the reader finds a prompted attribute right, and all of them."""
    rng = np.random.default_rng(seed)
    everything = scene.all_prompts()
    prompts = [everything[i] for i in rng.integers(0, len(everything), samples)]
    wanted = [scene.parse_prompt(p) for p in prompts]
    read = scene.read_attributes(sample_pictures(pipeline, prompts, seed))
    result = {"all": float((scene.fidelity(read, wanted) == 1).mean())}
    for name in ("shape", "colour", "size", "place"):
        want = np.array([getattr(w, name) for w in wanted])
        fixed = want != scene.NONE
        result[name] = float((getattr(read, name) == want)[fixed].mean())
    return result


def as_text(shares: dict[str, float]) -> str:
    """Return shares as text."""
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def reconstruction_accuracy(vae: AutoencoderKL, samples: int, seed: int) -> float:
    """Return the share of decoded latents of renders on which the reader finds all four attributes right."""
    rng = np.random.default_rng(seed)
    truth = scene.sample_scenes(random_wanted(samples, rng), rng)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_tensor(scene.render(truth))).latent_dist.mean).sample
    read = scene.read_attributes(to_pictures(decoded))
    return float(
        np.all([getattr(read, k) == getattr(truth, k) for k in ("shape", "colour", "size", "place")], 0).mean()
    )


def load(folder: Path) -> StableDiffusionPipeline:
    """Load a saved pipeline, quietly."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_half(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save the pipeline with fp16 weights; its configurations say float32, so that plain loaders compute in float32."""
    copy.deepcopy(pipeline).to(torch.float16).save_pretrained(folder)
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
