import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.scoring import scorer as scorers
from pipelines.scoring.pictures import Picture, normalise

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens" / "scorers"
needs_goldens = pytest.mark.skipif(not GOLDENS.exists(), reason="scores of the original packages are not at hand")
PROBES = ((0, 112, 112), (1, 50, 130), (2, 200, 100), (0, 0, 0), (2, 223, 223))


@pytest.fixture(scope="module")
def hpsv2(tiny_hpsv2):
    return scorers.load(tiny_hpsv2)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The package's checkpoint under its published name, with its architecture next to it."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "HPS_v2.1_compressed.pt").symlink_to(GOLDENS / "hpsv2" / "HPS_v2.1_tiny.pt")
    (folder / "open_clip_config.json").symlink_to(GOLDENS / "hpsv2" / "ViT-H-14.json")
    config = ScorerConfig(
        name="golden", kind="hpsv2.1", checkpoint=str(folder), processor=str(GOLDENS / "clip_bpe"), batch_size=16
    )
    return scorers.load(config), json.loads((GOLDENS / "hpsv2" / "cases.json").read_text())


def opened(case):
    image = Image.open(GOLDENS / "images" / case["image"])
    return Picture(image.convert(case["convert"]) if "convert" in case else image)


def prepared(scorer, images):
    return [scorer.prepare(Picture(image)) for image in images]


@needs_goldens
@pytest.mark.parametrize("together", [False, True])
def test_scores_equal_the_packages_on_every_shape_and_mode(golden, together):
    scorer, cases = golden
    pictures, prompts = [scorer.prepare(opened(c)) for c in cases["cases"]], [c["prompt"] for c in cases["cases"]]
    if together:
        scores = scorer.score(pictures, prompts)
    else:
        scores = np.concatenate([scorer.score([x], [p]) for x, p in zip(pictures, prompts, strict=True)])
    assert len(scores) > 40
    for case, score in zip(cases["cases"], scores, strict=True):
        assert score == pytest.approx(case["score"], abs=cases["tolerance"]), (case["image"], case["prompt"])


@needs_goldens
def test_pixels_and_image_features_equal_the_packages(golden):
    scorer, cases = golden
    for name, seen in cases["images"].items():
        batch = scorer.stack([scorer.prepare(opened({"image": name}))])
        pixels = normalise(batch, scorer._mean, scorer._std)[0]
        assert [pixels[p].item() for p in PROBES] == pytest.approx(seen["pixel_probe"], abs=2e-6), name
        assert [pixels.mean().item(), pixels.std().item()] == pytest.approx(
            [seen["pixel_mean"], seen["pixel_std"]], abs=2e-6
        )
        with torch.inference_mode():
            features = scorer.encode_images(batch)[0].numpy()
        np.testing.assert_allclose(features, seen["image_features"], atol=cases["tolerance"])


def test_a_picture_is_padded_with_black_around_its_middle(hpsv2):
    pixels = hpsv2.prepare(Picture(Image.new("RGB", (64, 32), "white")))
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 8:24], torch.ones(3, 16, 32))
    assert pixels[:, :8].abs().max() == pixels[:, 24:].abs().max() == 0
    # One row more below than above.
    odd = hpsv2.prepare(Picture(Image.new("RGB", (32, 17), "white")))
    assert odd[0, :, 0].tolist() == [0] * 7 + [1] * 17 + [0] * 8


def test_the_score_is_the_plain_cosine_of_the_features(hpsv2, noise_images):
    prompts = ["a red circle", "a small blue square", "", "a star"]
    pictures = prepared(hpsv2, noise_images[:4])
    with torch.inference_mode():
        pixels = normalise(torch.stack(pictures), hpsv2._mean, hpsv2._std)
        images = hpsv2.model.get_image_features(pixel_values=pixels).pooler_output
        texts = [hpsv2.model.get_text_features(**hpsv2.tokenize([p])).pooler_output[0] for p in prompts]
    expected = [float(i @ t / (i.norm() * t.norm())) for i, t in zip(images, texts, strict=True)]
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(hpsv2.score(pictures, prompts), expected, atol=1e-6)


def test_a_score_does_not_depend_on_the_batch(tiny_hpsv2, noise_images):
    prompts = ["a", "a red circle", "", "circle " * 50, "small green star left", "a red circle", "b", "blue", "x y z"]
    many, one = scorers.load(tiny_hpsv2), scorers.load(tiny_hpsv2.model_copy(update={"batch_size": 1}))
    pictures = prepared(many, noise_images)
    np.testing.assert_allclose(many.score(pictures, prompts), one.score(pictures, prompts), atol=1e-5)


def test_odd_pictures_and_prompts_get_finite_scores(hpsv2, odd_images, odd_prompts):
    pictures = prepared(hpsv2, odd_images.values())
    assert {tuple(p.shape) for p in pictures} == {(3, 32, 32)}
    pairs = [(i, p) for i in range(len(pictures)) for p in odd_prompts]
    scores = hpsv2.score_pairs(pictures, pairs)
    assert np.isfinite(scores).all()
    assert np.abs(scores).max() <= 1 + 1e-6


def test_bfloat16_stays_near_float32(tiny_hpsv2, hpsv2, noise_images):
    half = scorers.load(tiny_hpsv2.model_copy(update={"precision": "bfloat16"}))
    assert half.model.visual_projection.weight.dtype == torch.bfloat16
    pictures, prompts = prepared(hpsv2, noise_images), ["a red circle"] * len(noise_images)
    exact, rounded = hpsv2.score(pictures, prompts), half.score(pictures, prompts)
    assert 0 < np.abs(exact - rounded).max() < 0.02
    assert half.revision != hpsv2.revision


def test_the_scorer_says_how_it_prepares_and_what_it_is(hpsv2):
    assert hpsv2.preprocessing == "longest:32"
    assert hpsv2.facts["kind"] == "hpsv2.1"


def test_weights_that_do_not_fit_are_refused(tiny_hpsv2, tampered):
    config = tampered(tiny_hpsv2, "HPS_v2.1_compressed.pt", lambda state: state.pop("logit_scale"))
    with pytest.raises(CheckpointError, match=r"HPS_v2\.1_compressed\.pt: .*1 missing: logit_scale"):
        scorers.load(config)


def test_a_tokenizer_of_another_model_is_refused(tiny_hpsv2, tmp_path):
    content = json.loads((Path(tiny_hpsv2.checkpoint) / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["id"] += 5
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if not t.startswith("<|")}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"ids up to 594.*tokenizer\.json is 599"):
        scorers.load(tiny_hpsv2.model_copy(update={"processor": str(tmp_path)}))


def test_memory_that_is_used_again_never_changes_a_picture_that_was_prepared():
    from pipelines.scoring import pictures

    rng = np.random.default_rng(0)
    shapes = [(64, 64), (300, 200), (64, 64), (20, 900), (64, 64)]
    shown = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in shapes]
    prepared = [pictures.longest_padded(Picture(i), 64) for i in shown]
    kept = [p.clone() for p in prepared]
    for image, first, copy in zip(reversed(shown), reversed(prepared), reversed(kept), strict=True):
        again = pictures.longest_padded(Picture(image), 64)
        assert torch.equal(first, copy)
        assert torch.equal(again, copy)
