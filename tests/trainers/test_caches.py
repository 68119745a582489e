import polars as pl
import torch

from pipelines import schemas
from pipelines.images import decode_rgb
from pipelines.tables import Store
from trainers.caches import EMPTY_PROMPT, unpack
from trainers.steps import Training


def test_every_decodable_image_has_one_latent_and_every_prompt_one_embedding(cached_config):
    store = Store(cached_config.store_location)
    backbone = Training(store, cached_config).backbone
    latents = store.scan(schemas.LATENTS, below=backbone.partition()).select("image_id").collect()["image_id"]
    owned = store.scan(schemas.CATALOGUE_IMAGES).collect()["image_id"]
    assert sorted(latents) == sorted(owned)
    prompts = set(store.read(schemas.CATALOGUE_PROMPTS)["prompt_id"]) | {EMPTY_PROMPT}
    assert set(store.read(schemas.PROMPT_EMBEDDINGS, backbone.partition("all"))["prompt_id"]) == prompts


def test_a_cached_latent_is_what_the_autoencoder_gives(cached_config):
    store = Store(cached_config.store_location)
    model = (backbone := Training(store, cached_config).backbone).model
    row = store.scan(schemas.LATENTS, below=backbone.partition()).head(1).collect().row(0, named=True)
    image = store.scan(schemas.IMAGES).filter(pl.col("image_id") == row["image_id"]).collect().row(0, named=True)
    mean, log_variance = model.encode_images(model.to_pixels(decode_rgb(image["bytes"]))[None])
    shape = (-1, row["height"], row["width"])
    torch.testing.assert_close(unpack([row["mean"]], shape), mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(unpack([row["log_variance"]], shape), log_variance, atol=2e-2, rtol=2e-3)


def test_the_latent_decodes_to_the_picture(cached_config):
    store = Store(cached_config.store_location)
    model = (backbone := Training(store, cached_config).backbone).model
    rows = store.scan(schemas.LATENTS, below=backbone.partition()).head(8).collect()
    means = unpack(rows["mean"].to_list(), (-1, rows["height"][0], rows["width"][0]))
    pictures = store.scan(schemas.IMAGES).filter(pl.col("image_id").is_in(rows["image_id"].implode())).collect()
    data = dict(pictures.select("image_id", "bytes").rows())
    pixels = torch.stack([model.to_pixels(decode_rgb(data[i])) for i in rows["image_id"]])
    with torch.no_grad():
        decoded = model.vae.decode(means).sample
    assert (decoded - pixels).abs().mean() < 0.06
