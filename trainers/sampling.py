"""Samples of base and tuned models: the same prompts, the same initial noise, one table per model.

Belongs here: drawing pictures. Does not belong here: judging them (`evaluate`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import torch
from PIL import Image

from pipelines import identity, schemas
from pipelines import prompts as prompts_of
from pipelines.config import Config
from pipelines.tables import Built, Manifest, Store, StoreError
from trainers import randomness, versions
from trainers.caches import Backbone
from trainers.precision import autocast, resolve_precision

CODE_VERSION = versions.SAMPLING
BASE = "base"
"""Name of the untuned model in the tables."""
Progress = Callable[[str], None]


def evaluation_prompts(store: Store, config: Config) -> pl.DataFrame:
    """Return prompt_id, prompt of the first prompts of the suite, else of the held-out (test, then validation) ones by id.

    Raises:
        StoreError: the store has no held-out prompt.
        prompts.PromptSuiteError: the suite cannot be read.
    """
    count, suite = config.evaluation.prompts, config.suite()
    if suite is not None:
        texts = prompts_of.read_suite(suite)[:count]
        return pl.DataFrame({"prompt_id": [identity.prompt_id(t) for t in texts], "prompt": texts})
    store.require("catalogue_prompts")
    frame = (
        store.scan(schemas.CATALOGUE_PROMPTS)
        .filter(pl.col("split") != "train")
        .sort("split", "prompt_id")
        .select("prompt_id", "prompt")
        .head(count)
        .collect()
    )
    if frame.is_empty():
        raise StoreError("no prompt of split test or validation: nothing to evaluate on")
    return frame


@torch.no_grad()
def draw(
    backbone: Any, unet: torch.nn.Module, prompts: list[str], noise: torch.Tensor, *, steps: int, guidance: float
) -> list[Image.Image]:
    """Return one picture per prompt: DDIM, classifier-free guidance, as the diffusers pipeline of the family does.

    The autoencoder decodes in float32 even under autocast. The UNet may be one that is being trained: its mode is as before.

    Args:
        backbone: see `trainers.backbones`.
        unet: base, exported model or policy, with or without adapters.
        noise: initial latents, [N, C, H, W], standard normal.
        steps: DDIM steps.
        guidance: scale w of eps(uncond) + w (eps(prompt) - eps(uncond)); 1: none.
    """
    was_training = unet.training
    unet.eval()
    try:
        latents = backbone.pipeline(unet)(
            prompts,
            latents=noise.to(backbone.device),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=backbone.config.resolution,
            width=backbone.config.resolution,
            output_type="latent",
        ).images
    finally:
        unet.train(was_training)
    return backbone.decode_latents(latents)


def sample(
    store: Store,
    config: Config,
    backbone: Backbone,
    model: str,
    unet_folder: Path | None,
    trained: Manifest | None,
    progress: Progress = lambda m: None,
) -> Built:
    """Draw evaluation.seeds pictures per held-out prompt with a model into `samples`.

    Args:
        unet_folder: exported folder of the tuned model (pipeline or LoRA); None: the base.
        trained: commit of the run that made the model; None for the base.

    Raises:
        StoreError: the store has no prompt to draw.
        CheckpointError: the exported model is not whole, or a LoRA of another base.
    """
    options = config.evaluation
    precision = resolve_precision(config.training.precision, backbone.device)

    def make() -> Iterator[pl.DataFrame]:
        loaded = backbone.model
        unet = loaded.unet if unet_folder is None else loaded.load_unet(unet_folder)
        prompts = evaluation_prompts(store, config)
        jobs = [(key, text, seed) for key, text in prompts.rows() for seed in range(options.seeds)]
        for start in range(0, len(jobs), loaded.pictures_at_once):
            part = jobs[start : start + loaded.pictures_at_once]
            noise = randomness.normal(loaded.latent_shape, [("sample", seed, key) for key, _, seed in part])
            texts = [text for _, text, _ in part]
            with autocast(precision, backbone.device):
                pictures = draw(loaded, unet, texts, noise, steps=options.steps, guidance=options.guidance)
            encoded = [_png(p) for p in pictures]
            progress(f"samples of {model}: {start + len(part)}/{len(jobs)}")
            yield pl.DataFrame(
                {
                    "prompt_id": [key for key, _, _ in part],
                    "prompt": texts,
                    "seed": [seed for _, _, seed in part],
                    "image_id": [identity.image_id_of_bytes(b)[0] for b in encoded],
                    "bytes": encoded,
                }
            )

    return store.build(
        schemas.SAMPLES,
        make,
        inputs=[store.require("catalogue_prompts")],
        code_version=CODE_VERSION,
        parameters=parameters(config, backbone, trained),
        partition=model,
    )


def parameters(config: Config, backbone: Backbone, trained: Manifest | None) -> dict[str, Any]:
    """Return what a model's samples depend on beside the catalogue's prompts. trained: see sample.

    Raises:
        prompts.PromptSuiteError: the suite cannot be read.
    """
    suite = config.suite()
    return {
        "model": trained.fingerprint if trained is not None else backbone.digest,
        "backbone": backbone.digest,
        "suite": None if suite is None else identity.fingerprint(prompts=prompts_of.read_suite(suite)),
        "device": torch.device(backbone.device).type,
        "precision": resolve_precision(config.training.precision, backbone.device),
        **config.evaluation.model_dump(include={"prompts", "seeds", "steps", "guidance"}),
    }


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
