import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import WEIGHTS, ScorerConfig
from pipelines.scoring import checkpoints
from pipelines.scoring.pictures import Picture
from pipelines.scoring.scorer import load
from pipelines.world import scene

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens" / "scorers"
needs_goldens = pytest.mark.skipif(not GOLDENS.exists(), reason="scores of the original packages are not at hand")


@pytest.fixture(scope="module")
def pickscore():
    return load(ScorerConfig(name="pickscore", kind="pickscore", checkpoint=str(WEIGHTS / "tiny-pickscore")))


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [scene.all_prompts()[i] for i in rng.integers(0, 1000, count)]
    drawn = scene.render(scene.sample_scenes([scene.parse_prompt(p) for p in prompts], rng))
    return [Picture(Image.fromarray(p)) for p in drawn], prompts


@needs_goldens
def test_pickscore_equals_the_model_cards_code_on_every_shape_and_mode():
    folder = GOLDENS / "pickscore"
    cases = json.loads((folder / "cases.json").read_text())
    scorer = load(ScorerConfig(name="golden", kind="pickscore", checkpoint=str(folder / "model")))
    assert len(cases["cases"]) > 20
    for case in cases["cases"]:
        picture = Picture(Image.open(GOLDENS / "images" / case["image"]))
        score = scorer.score([scorer.prepare(picture)], [case["prompt"]])[0]
        assert score == pytest.approx(case["score"], abs=cases["tolerance"]), (case["image"], case["prompt"])


def test_clip_score_is_the_cosine_that_pickscore_scales(pickscore):
    cosine = load(ScorerConfig(name="c", kind="clip", checkpoint=str(WEIGHTS / "tiny-pickscore")))
    images, prompts = pictures(6)
    batch = torch.stack([pickscore.prepare(i) for i in images])
    scaled, plain = pickscore.score(batch, prompts), cosine.score(batch, prompts)
    assert np.abs(plain).max() <= 1
    np.testing.assert_allclose(scaled, plain * pickscore.facts["logit_scale"], rtol=1e-5)


def test_a_score_does_not_depend_on_the_batch(pickscore):
    images, prompts = pictures(9)
    batch = torch.stack([pickscore.prepare(i) for i in images])
    together = pickscore.score(batch, prompts)
    alone = np.concatenate([pickscore.score(batch[[i]], [p]) for i, p in enumerate(prompts)])
    np.testing.assert_allclose(together, alone, atol=1e-5 * pickscore.facts["logit_scale"])


def test_odd_pictures_and_prompts_get_a_finite_score(pickscore):
    odd = [Picture(Image.new("RGB", size, "red")) for size in [(1, 300), (300, 1), (31, 33), (500, 20)]]
    prompts = ["", "🔴 ünïcode", "word " * 200, "a red circle"]
    scores = pickscore.score(torch.stack([pickscore.prepare(i) for i in odd]), prompts)
    assert np.isfinite(scores).all()


def test_the_revision_follows_weights_and_kind_not_the_place(tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(WEIGHTS / "tiny-clip", folder)
    there = ScorerConfig(name="a", kind="clip", checkpoint=str(WEIGHTS / "tiny-clip"))
    here = ScorerConfig(name="b", kind="clip", checkpoint=str(folder))
    assert checkpoints.revision(here) == checkpoints.revision(there)
    assert checkpoints.revision(here.model_copy(update={"kind": "pickscore"})) != checkpoints.revision(there)
    other = WEIGHTS / "tiny-pickscore" / "model.safetensors"
    shutil.copy(other, folder / "model.safetensors")
    assert checkpoints.revision(here) != checkpoints.revision(there)


def test_a_missing_file_is_named_with_what_to_do(tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match=r"config\.json is missing.*world_models"):
        checkpoints.resolve(ScorerConfig(name="a", kind="clip", checkpoint=str(tmp_path)))


def test_a_hub_id_that_cannot_be_had_is_named_with_the_command_that_fetches_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(checkpoints.CheckpointError, match="hf download nobody/nothing"):
        checkpoints.resolve(ScorerConfig(name="a", kind="clip", checkpoint="nobody/nothing"))
