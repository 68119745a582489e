"""Caches over the tiny world's store: with the shipped tiny backbone, and with a random SDXL."""

import polars as pl
import pytest
import torch
from PIL import ImageOps

from pipelines import catalogue, schemas
from pipelines.config import WEIGHTS, BackboneConfig
from pipelines.images import decode_rgb
from trainers import caches
from trainers.backbones import random_pipelines
from trainers.caches import EMPTY_PROMPT
from trainers.tensors import TensorFile, unpack

TINY = BackboneConfig(name="tiny", family="tiny", checkpoint=str(WEIGHTS / "tiny-sd"), resolution=32)


@pytest.fixture
def backbone():
    return caches.Backbone(TINY, "cpu")


@pytest.fixture
def xl(tmp_path):
    folder = random_pipelines.make_pipeline("sdxl", tmp_path / "sdxl")
    config = BackboneConfig(
        name="xl", family="sdxl", checkpoint=str(folder), resolution=random_pipelines.TINY_RESOLUTION
    )
    return caches.Backbone(config, "cpu")


@pytest.fixture
def shard(ingested_copy):
    """(store, key of a shard that owns images, its images' ids and pictures)."""
    store, keys = ingested_copy
    owners = store.scan(schemas.CATALOGUE_IMAGES).filter(pl.col("owner").is_in(keys)).collect()
    key = owners["owner"].sort()[0]
    owned = owners.filter(pl.col("owner") == key)["image_id"]
    stored = store.read(schemas.IMAGES, key).filter(pl.col("image_id").is_in(owned.implode()))
    pictures = {i: decode_rgb(b) for i, b in stored.filter(status="ok").select("image_id", "bytes").iter_rows()}
    return store, key, pictures


def encoded(backbone, pictures):
    """Return image id -> (mean, log-variance) by the autoencoder itself."""
    model = backbone.model
    pixels = torch.stack([model.to_pixels(p) for p in pictures.values()])
    with torch.no_grad():
        posterior = model.vae.encode(pixels).latent_dist
    return dict(zip(pictures, zip(posterior.mean, posterior.logvar, strict=True), strict=True))


def assert_cached(frame, backbone, pictures):
    expected = encoded(backbone, pictures)
    assert sorted(frame["image_id"]) == sorted(pictures)
    for row in frame.iter_rows(named=True):
        mean, log_variance = expected[row["image_id"]]
        assert (row["height"], row["width"]) == backbone.model.latent_shape[1:]
        shape = (-1, row["height"], row["width"])
        torch.testing.assert_close(unpack([row["mean"]], shape)[0], mean, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(unpack([row["log_variance"]], shape)[0], log_variance, atol=2e-2, rtol=2e-3)


def test_every_decodable_image_has_the_latent_that_the_autoencoder_gives(shard, backbone):
    store, key, pictures = shard
    lines = []
    built = caches.cache_latents(store, key, backbone, lines.append)
    frame = store.read(schemas.LATENTS, built.manifest.partition)
    assert_cached(frame, backbone, pictures)
    assert not frame["is_flipped"].any()
    assert lines[-1] == f"latents {key}: {len(pictures)}/{len(pictures)}"


def test_mirror_images_are_encoded_from_mirrored_pictures(shard, backbone):
    store, key, pictures = shard
    built = caches.cache_latents(store, key, backbone, flips=True)
    frame = store.read(schemas.LATENTS, built.manifest.partition)
    assert_cached(frame.filter(~pl.col("is_flipped")), backbone, pictures)
    assert_cached(frame.filter("is_flipped"), backbone, {i: ImageOps.mirror(p) for i, p in pictures.items()})
    shape = (-1, *backbone.model.latent_shape[1:])
    upright, mirrored = (unpack(frame.filter(is_flipped=f)["mean"].to_list(), shape) for f in (False, True))
    # The autoencoder is no mirror itself: mirroring latents would be another thing.
    assert (upright.flip(-1) - mirrored).abs().mean() > 0.05


def test_mirror_images_are_made_when_they_are_asked_for_and_kept(shard, backbone):
    store, key, pictures = shard
    assert caches.cache_latents(store, key, backbone).manifest.rows == len(pictures)
    assert caches.cache_latents(store, key, backbone).is_reused
    both = caches.cache_latents(store, key, backbone, flips=True)
    assert (both.is_reused, both.manifest.rows) == (False, 2 * len(pictures))
    assert caches.cache_latents(store, key, backbone, flips=True).is_reused


def test_memory_decides_how_many_pictures_are_encoded_at_once_and_nothing_else(shard, backbone):
    store, key, pictures = shard
    backbone.model.pictures_at_once = 3
    frame = store.read(schemas.LATENTS, caches.cache_latents(store, key, backbone, flips=True).manifest.partition)
    assert_cached(frame.filter("is_flipped"), backbone, {i: ImageOps.mirror(p) for i, p in pictures.items()})


def test_an_image_that_cannot_be_decoded_gets_no_latent(ingested_copy, backbone):
    store, keys = ingested_copy
    key = store.scan(schemas.CATALOGUE_IMAGES).collect()["owner"].sort()[0]
    frame = store.read(schemas.IMAGES, key)
    owned = store.scan(schemas.CATALOGUE_IMAGES).filter(owner=key).collect()["image_id"].to_list()
    broken = frame.with_columns(
        bytes=pl.when(pl.col("image_id") == owned[0]).then(pl.col("bytes").bin.slice(0, 40)).otherwise("bytes")
    )
    store.write(schemas.IMAGES, broken, partition=key, made_from="broken")
    catalogue.build(store, keys)
    lines = []
    built = caches.cache_latents(store, key, backbone, lines.append)
    assert built.manifest.rows == len(owned) - 1
    assert owned[0] not in store.read(schemas.LATENTS, built.manifest.partition)["image_id"]
    assert lines[-1].endswith(f"{len(owned)}/{len(owned)}"), "progress counts images that were looked at"


def test_the_latent_decodes_to_the_picture(shard, backbone):
    store, key, pictures = shard
    built = caches.cache_latents(store, key, backbone)
    frame = store.read(schemas.LATENTS, built.manifest.partition).head(8)
    model = backbone.model
    means = unpack(frame["mean"].to_list(), (-1, *model.latent_shape[1:]))
    pixels = torch.stack([model.to_pixels(pictures[i]) for i in frame["image_id"]])
    with torch.no_grad():
        decoded = model.vae.decode(means).sample
    assert (decoded - pixels).abs().mean() < 0.06


@pytest.mark.parametrize("name", ["backbone", "xl"])
def test_every_prompt_and_the_empty_one_has_the_backbones_embedding(ingested_copy, name, request):
    (store, _), backbone = ingested_copy, request.getfixturevalue(name)
    lines = []
    built = caches.cache_prompts(store, backbone, lines.append)
    frame = store.read(schemas.PROMPT_EMBEDDINGS, built.manifest.partition)
    texts = dict(store.read(schemas.CATALOGUE_PROMPTS).select("prompt_id", "prompt").iter_rows()) | {EMPTY_PROMPT: ""}
    assert set(frame["prompt_id"]) == set(texts)
    assert lines[-1] == f"prompt embeddings: {len(texts)}/{len(texts)}"
    expected = backbone.model.encode_prompts([texts[i] for i in frame["prompt_id"]])
    shape = (frame["tokens"][0], frame["width"][0])
    found = unpack(frame["embedding"].to_list(), shape)
    torch.testing.assert_close(found, expected.hidden, atol=2e-3, rtol=2e-3)
    if expected.pooled is None:
        assert frame["pooled"].null_count() == frame["pooled_width"].null_count() == len(frame)
    else:
        pooled = unpack(frame["pooled"].to_list(), (frame["pooled_width"][0],))
        torch.testing.assert_close(pooled, expected.pooled, atol=2e-3, rtol=2e-3)
    assert caches.cache_prompts(store, backbone).is_reused


def test_training_reads_the_caches_by_their_keys(shard, xl, tmp_path):
    store, key, pictures = shard
    caches.cache_latents(store, key, xl, flips=True)
    caches.cache_prompts(store, xl)
    image, shape = next(iter(pictures)), xl.model.latent_shape
    latents = TensorFile(store, schemas.LATENTS, xl.partition(), tmp_path / "scratch")
    mirrored = encoded(xl, {image: ImageOps.mirror(pictures[image])})[image][0]
    torch.testing.assert_close(latents.read("mean", [(image, True)], shape)[0], mirrored, atol=2e-3, rtol=2e-3)
    prompts = TensorFile(store, schemas.PROMPT_EMBEDDINGS, xl.partition(), tmp_path / "scratch")
    empty = xl.model.encode_prompts([""])
    torch.testing.assert_close(prompts.read("pooled", [EMPTY_PROMPT], (40,)), empty.pooled, atol=2e-3, rtol=2e-3)


def test_another_backbone_has_caches_of_its_own(backbone, xl):
    assert backbone.partition("all") != xl.partition("all")
    other = caches.Backbone(TINY.model_copy(update={"resolution": 16}), "cpu")
    assert other.partition() != backbone.partition()


def test_a_latent_beyond_half_precision_is_refused_with_the_option(shard, backbone):
    store, key, _ = shard
    with torch.no_grad():
        backbone.model.vae.quant_conv.bias += 1e6
    with pytest.raises(ValueError, match=r"overflows float16.*backbones\.vae"):
        caches.cache_latents(store, key, backbone)
    assert store.manifest("latents", backbone.partition(key)) is None
