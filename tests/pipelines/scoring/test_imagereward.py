import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertTokenizer, BlipTextModel

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.scoring import imagereward as module
from pipelines.scoring import published
from pipelines.scoring import scorer as scorers
from pipelines.scoring.pictures import Picture, normalise
from pipelines.scoring.published import LinearHead

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens" / "scorers"
needs_goldens = pytest.mark.skipif(not GOLDENS.exists(), reason="scores of the original packages are not at hand")
PROBES = ((0, 112, 112), (1, 50, 130), (2, 200, 100), (0, 0, 0), (2, 223, 223))
PROMPTS = ["a red circle", "", "a small blue square above a green star", "circle " * 60, "a Red, circle!"]


@pytest.fixture(scope="module")
def imagereward(tiny_imagereward):
    return scorers.load(tiny_imagereward)


@pytest.fixture(scope="module")
def golden():
    folder = GOLDENS / "imagereward"
    config = ScorerConfig(
        name="golden", kind="imagereward", checkpoint=str(folder / "ImageReward_tiny.pt"), batch_size=16
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
    pictures, prompts = (
        [scorer.prepare(opened(c["image"])) for c in cases["cases"]],
        [c["prompt"] for c in cases["cases"]],
    )
    if together:
        scores = scorer.score(pictures, prompts)
    else:
        scores = np.concatenate([scorer.score([x], [p]) for x, p in zip(pictures, prompts, strict=True)])
    assert len(scores) > 40
    for case, score in zip(cases["cases"], scores, strict=True):
        assert score == pytest.approx(case["score"], abs=cases["tolerance"]), (case["image"], case["prompt"])


@needs_goldens
def test_rankings_equal_the_packages(golden):
    scorer, cases = golden
    for ranking in cases["rankings"]:
        pictures = [scorer.prepare(opened(name)) for name in ranking["images"]]
        scores = scorer.score(pictures, [ranking["prompt"]] * len(pictures))
        np.testing.assert_allclose(scores, ranking["scores"], atol=cases["tolerance"])
        assert (np.argsort(np.argsort(-scores)) + 1).tolist() == ranking["ranking"]


@needs_goldens
def test_pixels_and_vision_features_equal_the_packages(golden):
    scorer, cases = golden
    for name, seen in cases["images"].items():
        batch = scorer.stack([scorer.prepare(opened(name))])
        pixels = normalise(batch, scorer._mean, scorer._std)[0]
        assert [pixels[p].item() for p in PROBES] == pytest.approx(seen["pixel_probe"], abs=2e-6), name
        with torch.inference_mode():
            features = scorer.encode_images(batch)[0]
        np.testing.assert_allclose(features[0, :8], seen["vit_cls_head"], atol=cases["tolerance"])
        np.testing.assert_allclose(features[101, :8], seen["vit_patch100_head"], atol=cases["tolerance"])


@needs_goldens
def test_token_ids_equal_the_packages(golden):
    scorer, cases = golden
    prompts = json.loads((GOLDENS / "imagereward" / "tokens.json").read_text()) + cases["cases"]
    assert max(len(p["input_ids"]) for p in prompts) == 35
    for prompt in prompts:
        assert scorer._tokenizer.encode(prompt["prompt"]).ids == prompt["input_ids"], prompt["prompt"]


def attention(x, y, weights, name, heads, mask=0.0):
    """BERT's attention sub-layer from its names: queries of x [N, T, D], keys and values of y [N, S, E]."""

    def linear(z, part):
        return z @ weights[f"{name}.{part}.weight"].T + weights[f"{name}.{part}.bias"]

    split = [
        t.unflatten(-1, (heads, -1)).transpose(1, 2)
        for t in (linear(x, "self.query"), linear(y, "self.key"), linear(y, "self.value"))
    ]
    share = (split[0] @ split[1].mT / split[0].shape[-1] ** 0.5 + mask).softmax(-1)
    return layer_norm(
        linear((share @ split[2]).transpose(1, 2).flatten(2), "output.dense") + x, weights, f"{name}.output.LayerNorm"
    )


def layer_norm(x, weights, name, epsilon=1e-12):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)


def score_by_hand(state, image, ids, mask, vision_heads=4, text_heads=3):
    """The published model from the published names, in float64: pixels [1, 3, H, W] and 35 ids -> score."""
    state = {k: v.double() for k, v in state.items()}
    w = {k.removeprefix("blip.visual_encoder."): v for k, v in state.items()}
    x = F.conv2d(image.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).mT
    x = torch.cat([w["cls_token"], x], 1) + w["pos_embed"]
    for i in range(2):
        y = layer_norm(x, w, f"blocks.{i}.norm1", 1e-6)
        qkv = y @ w[f"blocks.{i}.attn.qkv.weight"].T + w[f"blocks.{i}.attn.qkv.bias"]
        q, k, v = (t.unflatten(-1, (vision_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[f"blocks.{i}.attn.proj.weight"].T + w[f"blocks.{i}.attn.proj.bias"]
        y = F.gelu(
            layer_norm(x, w, f"blocks.{i}.norm2", 1e-6) @ w[f"blocks.{i}.mlp.fc1.weight"].T
            + w[f"blocks.{i}.mlp.fc1.bias"]
        )
        x = x + y @ w[f"blocks.{i}.mlp.fc2.weight"].T + w[f"blocks.{i}.mlp.fc2.bias"]
    image_features = layer_norm(x, w, "norm", 1e-6)

    w = {k.removeprefix("blip.text_encoder."): v for k, v in state.items()}
    h = w["embeddings.word_embeddings.weight"][ids][None] + w["embeddings.position_embeddings.weight"][: len(ids)]
    h = layer_norm(h, w, "embeddings.LayerNorm")
    hidden = torch.where(mask.bool(), 0.0, -torch.inf).double()
    for i in range(2):
        layer = f"encoder.layer.{i}"
        h = attention(h, h, w, f"{layer}.attention", text_heads, hidden)
        h = attention(h, image_features, w, f"{layer}.crossattention", text_heads)
        y = F.gelu(h @ w[f"{layer}.intermediate.dense.weight"].T + w[f"{layer}.intermediate.dense.bias"])
        h = layer_norm(
            y @ w[f"{layer}.output.dense.weight"].T + w[f"{layer}.output.dense.bias"] + h,
            w,
            f"{layer}.output.LayerNorm",
        )
    reward = h[0, 0]
    for i in (0, 2, 4, 6, 7):
        reward = state[f"mlp.layers.{i}.weight"] @ reward + state[f"mlp.layers.{i}.bias"]
    return (reward.item() - 0.16717362830052426) / 1.0333394966054072


def test_scores_are_what_the_published_formulas_give(tiny_imagereward, imagereward, noise_images):
    folder = Path(tiny_imagereward.checkpoint)
    state = published.read(folder / "ImageReward.pt")
    tokenizer = tokenizer_of(folder)
    pictures = prepared(imagereward, noise_images[: len(PROMPTS)])
    expected = []
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        image = normalise(picture[None], imagereward._mean, imagereward._std)
        expected.append(score_by_hand(state, image, tokens.input_ids[0], tokens.attention_mask[0]))
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(imagereward.score(pictures, PROMPTS), expected, atol=1e-5)


def tokenizer_of(folder):
    """transformers' own tokenizer with BLIP's two tokens, as the package makes it."""
    tokenizer = BertTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def test_token_ids_equal_those_of_transformers(tiny_imagereward, imagereward, odd_prompts):
    tokenizer = tokenizer_of(Path(tiny_imagereward.checkpoint))
    assert len(tokenizer) > 100
    for prompt in [*PROMPTS, *odd_prompts, "[DEC] a [MASK] b [ENC] [SEP]c", "Ünïcode\u2019s 12%", "[mask]"]:
        theirs = tokenizer(prompt, truncation=True, max_length=35).input_ids
        assert imagereward._tokenizer.encode(prompt).ids == theirs, prompt


def test_conversion_and_its_inverse_give_every_tensor_back(tiny_imagereward):
    folder = Path(tiny_imagereward.checkpoint)
    parts = module.load(*(folder / n for n in ("ImageReward.pt", "med_config.json", "vit_config.json")))
    state, back = published.read(folder / "ImageReward.pt"), module.to_published(*parts)
    assert {k.split(".")[1] for k in state.keys() - back.keys()} == {"vision_proj", "text_proj", "text_encoder"}
    assert back.keys() <= state.keys()
    assert all(torch.equal(back[k], state[k]) for k in back)


def test_without_a_vit_config_the_packages_vit_l_is_expected(tiny_imagereward, tampered):
    with torch.device("meta"):
        vision, text = module.build(
            module.VIT_L, json.loads((Path(tiny_imagereward.checkpoint) / "med_config.json").read_text())
        )
    assert (vision.config.image_size, vision.config.hidden_size, vision.config.intermediate_size) == (224, 1024, 4096)
    assert (vision.config.num_hidden_layers, vision.config.num_attention_heads) == (24, 16)
    assert text.config.encoder_hidden_size == 1024
    # Too small a difference to move a tiny model's score.
    assert (vision.config.layer_norm_eps, text.config.layer_norm_eps) == (1e-6, 1e-12)
    config = tampered(tiny_imagereward, "ImageReward.pt", lambda state: None)
    (Path(config.checkpoint) / "vit_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"missing: .*of another shape: .*without a vit_config.json"):
        scorers.load(config)


def test_a_score_does_not_depend_on_the_batch(tiny_imagereward, imagereward, noise_images):
    one = scorers.load(tiny_imagereward.model_copy(update={"batch_size": 1}))
    pictures = prepared(imagereward, noise_images)
    pairs = [(i, p) for i in range(len(pictures)) for p in PROMPTS]
    together, alone = imagereward.score_pairs(pictures, pairs), one.score_pairs(pictures, pairs)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    scores = together.reshape(len(pictures), len(PROMPTS))
    assert scores.std(0).min() > 0.01
    assert scores.std(1).min() > 0.01


def test_a_picture_is_encoded_once_however_many_prompts_it_meets(imagereward, noise_images, monkeypatch):
    encoded = []
    real = imagereward.encode_images
    monkeypatch.setattr(imagereward, "encode_images", lambda batch: encoded.append(len(batch)) or real(batch))
    imagereward.score_pairs(prepared(imagereward, noise_images[:2]), [(i, p) for i in (0, 1) for p in PROMPTS])
    assert encoded == [2]


def test_odd_pictures_and_prompts_get_finite_scores(imagereward, odd_images, odd_prompts):
    pictures = prepared(imagereward, odd_images.values())
    assert {tuple(p.shape) for p in pictures} == {(3, 32, 32)}
    pairs = [(i, p) for i in range(len(pictures)) for p in odd_prompts]
    assert np.isfinite(imagereward.score_pairs(pictures, pairs)).all()


def test_bfloat16_stays_near_float32_and_ends_in_float32(tiny_imagereward, imagereward, noise_images):
    half = scorers.load(tiny_imagereward.model_copy(update={"precision": "bfloat16"}))
    assert half.text.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16
    pictures, prompts = prepared(imagereward, noise_images), ["a red circle"] * len(noise_images)
    exact, rounded = imagereward.score(pictures, prompts), half.score(pictures, prompts)
    assert 0 < np.abs(exact - rounded).max() < 0.1 * exact.std() + 0.02
    with torch.inference_mode(), half._arithmetic():
        features = half.encode_images(half.stack(pictures))
        assert half.compare(features, [0], ["a"]).dtype == torch.float32
    # The sum along the vision layers is float32, or its output would be bfloat16 all along.
    assert features.dtype == torch.float32


def test_the_head_computes_in_float32_also_under_autocast():
    generator = torch.Generator().manual_seed(0)
    head = LinearHead([48, 1024, 128, 64, 16, 1])
    features = torch.randn(7, 48, generator=generator)
    exact = features.double()
    for layer in head.layers.values():
        exact = exact @ layer.weight.double().T + layer.bias.double()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = head(features)
    assert (found.dtype, found.shape) == (torch.float32, (7,))
    torch.testing.assert_close(found.double(), exact[:, 0], atol=1e-6, rtol=1e-5)


def test_the_number_of_heads_is_that_of_the_med_config(tiny_imagereward, imagereward, tampered, noise_images):
    config = tampered(tiny_imagereward, "ImageReward.pt", lambda state: None)
    file = Path(config.checkpoint) / "med_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 6}))
    pictures = prepared(imagereward, noise_images[:1])
    assert imagereward.score(pictures, ["a"]) != pytest.approx(scorers.load(config).score(pictures, ["a"]), abs=1e-3)


def lose(state):
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]


def lose_the_end(state):
    del state["mlp.layers.7.weight"]


def add(state):
    state["blip.text_encoder.pooler.dense.weight"] = torch.zeros(48, 48)


def widen(state):
    state["mlp.layers.0.weight"] = torch.zeros(1024, 50)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lose, r"1 missing: blip\.text_encoder\.encoder\.layer\.1\.crossattention\.self\.key\.bias"),
        (lose_the_end, r"mlp\.layers\.7\.weight"),
        (add, r"1 unused: blip\.text_encoder\.pooler\.dense\.weight"),
        (widen, r"mlp\.layers\.0\.weight \[1024, 50\] \(expected \[1024, 48\]\)"),
    ],
)
def test_every_tensor_of_a_file_is_used_and_none_is_missing(tiny_imagereward, tampered, edit, told):
    with pytest.raises(CheckpointError, match=told):
        scorers.load(tampered(tiny_imagereward, "ImageReward.pt", edit))


def test_what_no_score_needs_may_be_missing(tiny_imagereward, imagereward, tampered, noise_images):
    def strip(state):
        for key in [k for k in state if "_proj." in k and "blip." in k and k.count(".") == 2] + [
            "blip.text_encoder.embeddings.position_ids"
        ]:
            del state[key]

    config = tampered(tiny_imagereward, "ImageReward.pt", strip)
    pictures = prepared(imagereward, noise_images[:1])
    assert scorers.load(config).score(pictures, ["a"]) == imagereward.score(pictures, ["a"])


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        (
            "vocab.txt",
            "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n",
            r"6 tokens and \[DEC\] \[ENC\] make 8, but the model has",
        ),
        ("vocab.txt", "a\nb\n", r"'\[CLS\]'.* are missing; expected the vocabulary of a BERT"),
        ("med_config.json", "<html>", "med_config.json: expected a JSON object"),
        ("med_config.json", '{"hidden_size": 48}', "no configuration of a BLIP .KeyError"),
        (
            "vit_config.json",
            '{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 5}',
            "no configuration of a BLIP",
        ),
    ],
)
def test_files_of_another_model_are_refused(tiny_imagereward, tampered, file, content, told):
    config = tampered(tiny_imagereward, "ImageReward.pt", lambda state: None)
    (Path(config.checkpoint) / file).write_text(content)
    with pytest.raises(CheckpointError, match=told):
        scorers.load(config)


def test_a_picture_is_cropped_at_offsets_rounded_half_to_even_and_resized_in_its_own_mode(imagereward):
    columns = np.broadcast_to(np.arange(35, dtype=np.uint8)[None, :, None], (32, 35, 3))
    # An offset of 1.5.
    assert imagereward.prepare(Picture(Image.fromarray(columns.copy())))[0, 0, 0] == 2
    # An offset of 0.5.
    assert imagereward.prepare(Picture(Image.fromarray(columns[:, :33].copy())))[0, 0, 0] == 0
    palette = Image.fromarray(np.repeat(np.eye(2, dtype=np.uint8) * 255, 20, 0)).quantize(2)
    # A palette's indices have nothing in between.
    assert set(imagereward.prepare(Picture(palette.resize((40, 40)))).unique().tolist()) == {0, 255}


def test_the_text_encoder_reads_in_both_directions(imagereward):
    assert isinstance(imagereward.text, BlipTextModel)
    # With a causal mask the first position would see no word at all.
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    first, second = imagereward.score([picture, picture], ["a red circle", "a red square"])
    assert abs(first - second) > 1e-3
