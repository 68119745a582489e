import diffusers
import pytest
import torch

from trainers.backbones.conditioning import Conditioning


@pytest.fixture
def xl(backbone_of):
    return backbone_of("sdxl")


@pytest.fixture
def plain(xl):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(xl.folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_embeddings_are_those_of_the_diffusers_pipeline(xl, plain):
    prompts = ["a small red circle", "a triangle, left", "a circle " * 50]
    hidden, _, pooled, _ = plain.encode_prompt(prompts, do_classifier_free_guidance=False)
    encoded = xl.encode_prompts(prompts)
    torch.testing.assert_close(encoded.hidden, hidden)
    torch.testing.assert_close(encoded.pooled, pooled)
    assert encoded.hidden.shape == (3, 24, 32 + 48)
    assert encoded.pooled.shape == (3, 40)


def test_the_empty_prompt_is_encoded_like_any_other(xl, plain):
    hidden, _, pooled, _ = plain.encode_prompt("", do_classifier_free_guidance=False)
    encoded = xl.encode_prompts([""])
    torch.testing.assert_close(encoded.hidden, hidden)
    torch.testing.assert_close(encoded.pooled, pooled)
    assert encoded.hidden.abs().sum() > 0


def test_the_two_encoders_read_their_own_tokenizers(xl):
    first, second = (t("a circle", padding="max_length").input_ids for t in xl.tokenizers.values())
    assert first != second, "they pad with different tokens, as the published ones do"


def test_the_unet_is_told_resolution_and_no_crop_for_every_picture(xl, question):
    noisy, timesteps, conditioning = question(xl)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(3, 1)
    with torch.no_grad():
        expected = xl.unet(
            noisy,
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": ids},
        ).sample
    torch.testing.assert_close(xl.predict(xl.unet, noisy, timesteps, conditioning), expected)


def test_a_prediction_without_pooled_embedding_is_refused(xl, question):
    noisy, timesteps, conditioning = question(xl)
    with pytest.raises(ValueError, match="pooled"):
        xl.predict(xl.unet, noisy, timesteps, Conditioning(conditioning.hidden))


def test_the_pipeline_stands_for_the_empty_prompt_as_the_checkpoint_says(xl, plain, tmp_path):
    assert xl.pipeline(xl.unet).config.force_zeros_for_empty_prompt == plain.config.force_zeros_for_empty_prompt
    assert xl.pipeline(xl.unet).watermark is None
