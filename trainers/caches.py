"""Caches per backbone: latents of images, embeddings of prompts, keyed by content and by the backbone's files.

Belongs here: encoding once, packing tensors into parquet. Does not belong here: which pairs are trained on (`data`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from pipelines import catalogue, images, schemas, stored
from pipelines.config import BackboneConfig
from pipelines.identity import fingerprint
from pipelines.tables import Built, Store, StoreError, made_of
from trainers import backbones, versions
from trainers.tensors import pack

if TYPE_CHECKING:
    from trainers.backbones.stable_diffusion import StableDiffusionBackbone

CODE_VERSION = versions.CACHES
IMAGES_AT_ONCE, PROMPTS_AT_ONCE = 64, 64
EMPTY_PROMPT = "empty"
"""prompt_id of the empty prompt in `prompt_embeddings` (no hash can be it)."""
Progress = Callable[[str], None]


class Backbone:
    """A backbone that is loaded only when something has to be computed; its digest is known before."""

    def __init__(self, config: BackboneConfig, device: str) -> None:
        self.config, self.device = config, device
        self.digest = backbones.digest(config)
        self._loaded: StableDiffusionBackbone | None = None

    @property
    def model(self) -> StableDiffusionBackbone:
        """Return the loaded backbone."""
        if self._loaded is None:
            self._loaded = backbones.load(self.config, self.device)
        return self._loaded

    def partition(self, *rest: str) -> str:
        """Return where this backbone's caches lie below a table."""
        return "/".join([f"{self.config.name}-{self.digest}", *rest])


def cache_latents(
    store: Store, shard_key: str, backbone: Backbone, progress: Progress = lambda m: None, *, flips: bool = False
) -> Built:
    """Encode the decodable images that a shard owns into `latents`, with `flips` also their mirror images.

    Pictures are mirrored in pixels: the autoencoder's latent of a mirrored picture is not the mirrored latent.
    Images that cannot be decoded get no latent; why stands in `scores.status` and `preferences.excluded_because`.

    Raises:
        StoreError: the shard is not ingested, or bytes that its source held are no more there.
        ValueError: a latent overflows float16.
    """
    source = store.require("images", shard_key)
    catalogue.require_images_and_scorables(store, shard_key)
    owned = set(
        store.scan(schemas.CATALOGUE_IMAGES)
        .filter(pl.col("owner") == shard_key)
        .select("image_id")
        .collect()["image_id"]
    )

    def make() -> Iterator[pl.DataFrame]:
        model, done = backbone.model, 0

        def pixels(image: stored.StoredImage) -> torch.Tensor | None:
            if image.is_lost:
                raise StoreError(
                    f"latents of {shard_key}: {image.reason}; make the source readable, or ingest the shard again"
                )
            try:
                return None if image.data is None else model.to_pixels(images.decode_rgb(image.data))
            except images.UndecodableImage:
                return None

        with ThreadPoolExecutor() as pool:
            for batch in stored.read_images(store, shard_key, owned, IMAGES_AT_ONCE):
                frames = []
                for start in range(0, len(batch), model.pictures_at_once):
                    part = batch[start : start + model.pictures_at_once]
                    decoded = zip(part, pool.map(pixels, part), strict=True)
                    found = {image.image_id: p for image, p in decoded if p is not None}
                    if not found:
                        continue
                    upright = torch.stack(list(found.values()))
                    frames.append(_latents(list(found), False, *model.encode_images(upright)))
                    if flips:
                        frames.append(_latents(list(found), True, *model.encode_images(upright.flip(-1))))
                done += len(batch)
                progress(f"latents {shard_key}: {done}/{len(owned)}" + (", each also mirrored" if flips else ""))
                if frames:
                    yield pl.concat(frames)

    partition = backbone.partition(shard_key)
    inputs = {f"{source.table}/{source.partition}": source.content}
    existing = store.manifest("latents", partition)
    both = made_of(schemas.LATENTS, inputs, CODE_VERSION, latents_parameters(owned, backbone, flips=True))
    if existing is not None and existing.fingerprint == both:
        # Mirrored ones that nobody asks for now do no harm.
        return Built(existing, True)
    return store.build(
        schemas.LATENTS,
        make,
        inputs=[source],
        code_version=CODE_VERSION,
        parameters=latents_parameters(owned, backbone, flips=flips),
        partition=partition,
    )


def latents_parameters(owned: Collection[str], backbone: Backbone, *, flips: bool) -> dict[str, Any]:
    """Return what a shard's latents depend on beside its images. owned: ids of those that are the shard's."""
    return {"wanted": fingerprint(owned=sorted(owned), backbone=backbone.digest), "flips": flips}


def _latents(ids: list[str], is_flipped: bool, mean: torch.Tensor, log_variance: torch.Tensor) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "image_id": ids,
            "is_flipped": [is_flipped] * len(ids),
            "mean": [pack(x) for x in mean],
            "log_variance": [pack(x) for x in log_variance],
            "height": [mean.shape[2]] * len(ids),
            "width": [mean.shape[3]] * len(ids),
        }
    )


def cache_prompts(store: Store, backbone: Backbone, progress: Progress = lambda m: None) -> Built:
    """Encode every prompt of the catalogue, and the empty prompt, into `prompt_embeddings`.

    Raises:
        StoreError: there is no catalogue.
        ValueError: an embedding overflows float16.
    """
    catalogued = store.require("catalogue_prompts")

    def make() -> Iterator[pl.DataFrame]:
        rows = store.scan(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt").collect().rows()
        rows.append((EMPTY_PROMPT, ""))
        for start in range(0, len(rows), PROMPTS_AT_ONCE):
            part = rows[start : start + PROMPTS_AT_ONCE]
            encoded = backbone.model.encode_prompts([prompt for _, prompt in part])
            hidden, pooled = encoded.hidden, encoded.pooled
            progress(f"prompt embeddings: {start + len(part)}/{len(rows)}")
            yield pl.DataFrame(
                {
                    "prompt_id": [key for key, _ in part],
                    "embedding": [pack(x) for x in hidden],
                    "tokens": [hidden.shape[1]] * len(part),
                    "width": [hidden.shape[2]] * len(part),
                    "pooled": [None] * len(part) if pooled is None else [pack(x) for x in pooled],
                    "pooled_width": [None if pooled is None else pooled.shape[1]] * len(part),
                },
                schema_overrides={"pooled": pl.Binary, "pooled_width": pl.Int32},
            )

    return store.build(
        schemas.PROMPT_EMBEDDINGS,
        make,
        inputs=[catalogued],
        code_version=CODE_VERSION,
        parameters=prompts_parameters(backbone),
        partition=backbone.partition("all"),
    )


def prompts_parameters(backbone: Backbone) -> dict[str, Any]:
    """Return what prompt embeddings depend on beside the catalogue's prompts."""
    return {"backbone": backbone.digest}
