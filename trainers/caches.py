"""Caches per backbone: latents of images, embeddings of prompts, keyed by content and by the backbone's files.

Belongs here: encoding once, packing tensors into parquet. Does not belong here: which pairs are trained on (`data`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import polars as pl
import torch

from pipelines import catalogue, images, schemas, stored
from pipelines.config import BackboneConfig
from pipelines.identity import fingerprint
from pipelines.tables import Built, Store, StoreError
from trainers.backbones.stable_diffusion import StableDiffusionBackbone, digest

CODE_VERSION = "1"
ENCODE_BATCH = 64
Progress = Callable[[str], None]


class Backbone:
    """A backbone that is loaded only when something has to be computed; its digest is known before."""

    def __init__(self, config: BackboneConfig, device: str) -> None:
        self.config, self.device = config, device
        self.digest = digest(config)
        self._loaded: StableDiffusionBackbone | None = None

    @property
    def model(self) -> StableDiffusionBackbone:
        """Return the loaded backbone."""
        if self._loaded is None:
            self._loaded = StableDiffusionBackbone(self.config, self.device)
        return self._loaded

    def partition(self, *rest: str) -> str:
        """Return where this backbone's caches lie below a table."""
        return "/".join([f"{self.config.name}-{self.digest}", *rest])


def cache_latents(store: Store, shard_key: str, backbone: Backbone, progress: Progress = lambda m: None) -> Built:
    """Encode the decodable images that a shard owns into `latents`.

    Images that cannot be decoded get no latent; why stands in `scores.status` and `preferences.excluded_because`.
    """
    source = store.require("images", shard_key)
    catalogue.require_images_and_scorables(store, shard_key)
    owned = set(
        store.scan(schemas.CATALOGUE_IMAGES)
        .filter(pl.col("owner") == shard_key)
        .select("image_id")
        .collect()["image_id"]
    )
    wanted = fingerprint(owned=sorted(owned), backbone=backbone.digest)

    def make() -> Iterator[pl.DataFrame]:
        model = backbone.model
        done = 0
        for batch in stored.read_images(store, shard_key, owned, ENCODE_BATCH):
            ids, pixels = [], []
            for image in batch:
                if image.is_lost:
                    raise StoreError(
                        f"latents of {shard_key}: {image.reason}; make the source readable, or ingest the shard again"
                    )
                if image.data is None:
                    continue
                try:
                    pixels.append(model.to_pixels(images.decode_rgb(image.data)))
                except images.UndecodableImage:
                    continue
                ids.append(image.image_id)
            if not ids:
                continue
            mean, log_variance = model.encode_images(torch.stack(pixels))
            done += len(ids)
            progress(f"latents {shard_key}: {done}/{len(owned)}")
            yield pl.DataFrame(
                {
                    "image_id": ids,
                    "mean": [_pack(x) for x in mean],
                    "log_variance": [_pack(x) for x in log_variance],
                    "height": [mean.shape[2]] * len(ids),
                    "width": [mean.shape[3]] * len(ids),
                }
            )

    return store.build(
        schemas.LATENTS,
        make,
        inputs=[source],
        code_version=CODE_VERSION,
        parameters={"wanted": wanted},
        partition=backbone.partition(shard_key),
    )


def cache_prompts(store: Store, backbone: Backbone, progress: Progress = lambda m: None) -> Built:
    """Encode every prompt of the catalogue, and the empty prompt, into `prompt_embeddings`."""
    catalogue = store.require("catalogue_prompts")

    def make() -> Iterator[pl.DataFrame]:
        rows = store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt").collect().rows()
        rows.append((EMPTY_PROMPT, ""))
        for start in range(0, len(rows), ENCODE_BATCH):
            part = rows[start : start + ENCODE_BATCH]
            hidden = backbone.model.encode_prompts([prompt for _, prompt in part])
            progress(f"prompt embeddings: {start + len(part)}/{len(rows)}")
            yield pl.DataFrame(
                {
                    "prompt_id": [key for key, _ in part],
                    "embedding": [_pack(x) for x in hidden],
                    "tokens": [hidden.shape[1]] * len(part),
                    "width": [hidden.shape[2]] * len(part),
                }
            )

    return store.build(
        schemas.PROMPT_EMBEDDINGS,
        make,
        inputs=[catalogue],
        code_version=CODE_VERSION,
        parameters={"backbone": backbone.digest},
        partition=backbone.partition("all"),
    )


EMPTY_PROMPT = "empty"
"""prompt_id of the empty prompt in `prompt_embeddings` (no hash can be it)."""


def _pack(tensor: torch.Tensor) -> bytes:
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError("a cached tensor overflows float16; is the autoencoder the fp16-safe one?")
    return half.cpu().contiguous().numpy().tobytes()


def unpack(data: list[bytes], shape: tuple[int, ...]) -> torch.Tensor:
    """Return packed tensors as float32 [N, *shape]."""
    flat = np.frombuffer(b"".join(data), dtype=np.float16).reshape(len(data), *shape)
    return torch.from_numpy(flat.astype(np.float32))
