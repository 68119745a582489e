import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.scoring import aesthetic as module
from pipelines.scoring import published
from pipelines.scoring import scorer as scorers
from pipelines.scoring.clip import load_folder
from pipelines.scoring.pictures import CLIP_MEAN, CLIP_STD, Picture, normalise

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens" / "scorers"
needs_goldens = pytest.mark.skipif(not GOLDENS.exists(), reason="scores of the original packages are not at hand")
HEAD = "sac+logos+ava1-l14-linearMSE.pth"


@pytest.fixture(scope="module")
def aesthetic(tiny_aesthetic):
    return scorers.load(tiny_aesthetic)


@pytest.fixture(scope="module")
def golden():
    folder = GOLDENS / "aesthetic"
    config = ScorerConfig(
        name="golden",
        kind="aesthetic",
        checkpoint=str(folder / "linearMSE_random.pth"),
        backbone=str(folder / "clip"),
        batch_size=8,
    )
    return scorers.load(config), json.loads((folder / "cases.json").read_text())


def opened(name):
    return Picture(Image.open(GOLDENS / "images" / name))


def prepared(scorer, images):
    return [scorer.prepare(Picture(image)) for image in images]


@needs_goldens
@pytest.mark.parametrize("together", [False, True])
def test_scores_equal_the_packages_on_every_shape_and_mode(golden, together):
    scorer, cases = golden
    pictures = [scorer.prepare(opened(c["image"])) for c in cases["cases"]]
    if together:
        scores = scorer.score(pictures, [""] * len(pictures))
    else:
        scores = np.concatenate([scorer.score([x], [""]) for x in pictures])
    assert len(scores) == 16
    for case, score in zip(cases["cases"], scores, strict=True):
        assert score == pytest.approx(case["score"], abs=cases["tolerance"]), case["image"]


@needs_goldens
def test_the_ranking_equals_the_packages(golden):
    scorer, cases = golden
    ranking = cases["ranking"]
    pictures = [scorer.prepare(opened(name)) for name in ranking["images"]]
    scores = scorer.score(pictures, [""] * len(pictures))
    np.testing.assert_allclose(scores, ranking["scores"], atol=cases["tolerance"])
    assert (np.argsort(np.argsort(-scores)) + 1).tolist() == ranking["ranking"]


@needs_goldens
def test_the_head_alone_equals_the_packages(golden):
    scorer, cases = golden
    features = torch.tensor(cases["head_cases"]["features"])
    with torch.inference_mode():
        scores = scorer.head(F.normalize(features, dim=-1))
    np.testing.assert_allclose(scores, cases["head_cases"]["scores"], atol=cases["tolerance"])


@needs_goldens
def test_pixels_and_features_equal_the_packages(golden):
    scorer, cases = golden
    for name, seen in cases["images"].items():
        pixels = normalise(scorer.stack([scorer.prepare(opened(name))]), scorer._mean, scorer._std)
        found = [pixels.mean().item(), pixels.std().item()]
        assert found == pytest.approx([seen["pixel_mean"], seen["pixel_std"]], abs=2e-6), name
        with torch.inference_mode():
            features = scorer.model.get_image_features(pixel_values=pixels).pooler_output[0]
        np.testing.assert_allclose(features[:8], seen["feature_head"], atol=cases["tolerance"])
        assert features.norm().item() == pytest.approx(seen["feature_norm"], abs=cases["tolerance"])


def test_the_score_is_the_linear_map_of_the_normalised_features(tiny_aesthetic, aesthetic, noise_images):
    state = {k: v.double() for k, v in published.read(Path(tiny_aesthetic.checkpoint) / HEAD).items()}
    matrix, bias = torch.eye(64).double(), torch.zeros(64).double()
    for i in (0, 2, 4, 6, 7):
        matrix = state[f"layers.{i}.weight"] @ matrix
        bias = state[f"layers.{i}.weight"] @ bias + state[f"layers.{i}.bias"]
    pictures = prepared(aesthetic, noise_images)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    model = load_folder(Path(tiny_aesthetic.checkpoint)).eval()
    with torch.inference_mode():
        features = model.get_image_features(pixel_values=normalise(torch.stack(pictures), mean, std)).pooler_output
    expected = (features / features.norm(dim=-1, keepdim=True)).double() @ matrix[0] + bias
    assert expected.std() > 0.01
    np.testing.assert_allclose(aesthetic.score(pictures, ["a"] * len(pictures)), expected, atol=1e-5)


def test_the_prompt_does_not_matter_and_a_picture_is_scored_once(aesthetic, noise_images, monkeypatch):
    encoded = []
    real = aesthetic.encode_images
    monkeypatch.setattr(aesthetic, "encode_images", lambda batch: encoded.append(len(batch)) or real(batch))
    prompts = ["a red circle", "", "x " * 200]
    scores = aesthetic.score_pairs(prepared(aesthetic, noise_images[:2]), [(i, p) for p in prompts for i in (1, 0)])
    assert encoded == [2]
    assert scores.reshape(3, 2).tolist() == [scores[:2].tolist()] * 3
    assert scores[0] != scores[1]


def test_a_score_does_not_depend_on_the_batch(tiny_aesthetic, aesthetic, noise_images):
    one = scorers.load(tiny_aesthetic.model_copy(update={"batch_size": 1}))
    pictures, prompts = prepared(aesthetic, noise_images), [""] * len(noise_images)
    np.testing.assert_allclose(aesthetic.score(pictures, prompts), one.score(pictures, prompts), atol=1e-5)


def test_odd_pictures_get_finite_scores(aesthetic, odd_images):
    pictures = prepared(aesthetic, odd_images.values())
    assert {tuple(p.shape) for p in pictures} == {(3, 32, 32)}
    assert np.isfinite(aesthetic.score(pictures, [""] * len(pictures))).all()


def test_bfloat16_stays_near_float32(tiny_aesthetic, aesthetic, noise_images):
    half = scorers.load(tiny_aesthetic.model_copy(update={"precision": "bfloat16"}))
    assert half.head.layers["0"].weight.dtype == torch.float32
    pictures, prompts = prepared(aesthetic, noise_images), [""] * len(noise_images)
    exact, rounded = aesthetic.score(pictures, prompts), half.score(pictures, prompts)
    assert 0 < np.abs(exact - rounded).max() < 0.1 * exact.std() + 0.02


def test_imagereward_prepares_pictures_the_same_way(tiny_imagereward, aesthetic, odd_images):
    other = scorers.load(tiny_imagereward)
    assert other.preprocessing == aesthetic.preprocessing == "shortest:32:own-mode:round"
    for image in odd_images.values():
        assert torch.equal(other.prepare(Picture(image)), aesthetic.prepare(Picture(image)))


def lose(state):
    del state["layers.4.bias"]


def lose_a_matrix(state):
    del state["layers.4.weight"]


def add(state):
    state["layers.9.weight"] = torch.zeros(1, 1)


def widen(state):
    state["layers.6.weight"] = torch.zeros(16, 65)


def answer_twice(state):
    state["layers.7.weight"], state["layers.7.bias"] = torch.zeros(2, 16), torch.zeros(2)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lose, r"1 missing: layers\.4\.bias"),
        (lose_a_matrix, r"missing or not matrices: \['layers\.4\.weight'\]"),
        (add, r"1 unused: layers\.9\.weight"),
        (widen, r"layers\.6\.weight \[16, 65\] \(expected \[16, 64\]\)"),
        (answer_twice, r"layers\.7\.weight \[2, 16\] \(expected \[1, 16\]\)"),
    ],
)
def test_every_tensor_of_a_file_is_used_and_none_is_missing(tiny_aesthetic, tampered, edit, told):
    with pytest.raises(CheckpointError, match=told):
        scorers.load(tampered(tiny_aesthetic, HEAD, edit))


def test_a_head_for_another_backbone_is_refused(tiny_aesthetic):
    with pytest.raises(CheckpointError, match=r"\[1024, 64\] \(expected \[1024, 768\]\).*backbone has 768 features"):
        module.load_head(Path(tiny_aesthetic.checkpoint) / HEAD, 768)
