"""The committed tiny models do what the world needs; the numbers of the whole check are printed by their script."""

import dataclasses
import io
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipelines.config import WEIGHTS
from pipelines.scoring import imagereward, open_clip, scorer
from pipelines.scoring.pictures import Picture
from pipelines.world import raw
from trainers.world_models import blip, generator, measure, tokenizer, votes


@pytest.fixture(scope="module")
def pipeline():
    return generator.load(WEIGHTS / "tiny-sd")


def test_prompted_attributes_are_right_on_four_samples_of_five(pipeline):
    # 160 of 500 samples: with a true share of 0.9 the chance of fewer than 0.8 is 1e-5.
    assert generator.measure(pipeline, 160, seed=5)["all"] >= 0.8


def test_the_reader_is_right_on_decoded_latents(pipeline):
    assert generator.reconstruction_accuracy(pipeline.vae, 300, seed=6) >= 0.98


def test_open_attributes_stay_open(pipeline):
    from pipelines.world import scene

    read = scene.read_attributes(generator.sample_pictures(pipeline, ["a red circle"] * 48, seed=7))
    assert read.brightness.std() > 0.08
    assert read.saturation.std() > 0.05


def _weights(file):
    """The tensors of a file of weights, whichever of the published formats it has."""
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    content = torch.load(file, weights_only=True)
    return content.get("state_dict", content)


def test_weights_are_float16_and_a_few_megabytes_in_all():
    files = sorted(f for f in WEIGHTS.rglob("*") if f.suffix in (".safetensors", ".pt", ".pth"))
    assert len(files) >= 8
    for file in files:
        dtypes = {t.dtype for t in _weights(file).values()}
        assert {d for d in dtypes if d.is_floating_point} == {torch.float16}, file
    rewards = [f for f in files if "tiny-sd" not in f.parts]
    assert len(rewards) == 5
    assert all(f.stat().st_size < 1_000_000 for f in rewards)
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 12_000_000


def test_hpsv2_lies_as_open_clip_publishes_it():
    folder = WEIGHTS / "tiny-hpsv2"
    assert set(torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)) == {"state_dict"}
    keys = set(_weights(folder / "HPS_v2.1_compressed.pt"))
    assert keys >= {"logit_scale", "positional_embedding", "text_projection", "token_embedding.weight", "visual.proj"}
    assert keys >= {"visual.conv1.weight", "visual.transformer.resblocks.0.attn.in_proj_weight", "ln_final.weight"}
    architecture = json.loads((folder / "open_clip_config.json").read_text())
    assert architecture["vision_cfg"]["head_width"] == 20
    assert not architecture.get("quick_gelu")
    assert {"vocab.json", "merges.txt"} <= {f.name for f in folder.iterdir()}


def test_imagereward_lies_as_its_package_publishes_it():
    folder = WEIGHTS / "tiny-imagereward"
    weights = _weights(folder / "ImageReward.pt")
    parts = {"blip.visual_encoder", "blip.text_encoder", "blip.vision_proj", "blip.text_proj", "mlp.layers"}
    assert {".".join(k.split(".")[:2]) for k in weights} == parts
    assert weights["blip.visual_encoder.blocks.0.attn.qkv.weight"].shape == (144, 48)
    assert weights["blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"].shape == (64, 48)
    assert [weights[f"mlp.layers.{i}.weight"].shape[0] for i in (0, 2, 4, 6, 7)] == [1024, 128, 64, 16, 1]
    assert json.loads((folder / "vit_config.json").read_text())["img_size"] == 32
    assert json.loads((folder / "med_config.json").read_text())["vocab_size"] == len(blip.vocabulary()) + 2
    assert (folder / "vocab.txt").read_text().split("\n")[:-1] == blip.vocabulary()


def test_aesthetic_lies_as_its_authors_publish_it():
    weights = _weights(WEIGHTS / "tiny-aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")
    assert set(weights) == {f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    assert weights["layers.0.weight"].shape == (1024, 64)


@pytest.fixture(scope="module")
def held_out_votes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards") / "world"
    # Another seed than the one the models were trained on, the same pool of prompts.
    world = dataclasses.replace(votes.WORLD, seed=4242, pickapic_shards={"train": 0, "test": 1}, rows_per_shard=1500)
    raw.write_world(folder, world)
    return votes.read_frame(folder, "test")


def test_reward_models_judge_held_out_votes_well_but_not_perfectly_and_differently(held_out_votes):
    label = held_out_votes["label_0"].to_numpy()
    found = {name: measure.margins(s, held_out_votes) for name, s in measure.scorers().items()}
    assert list(found) == ["pickscore", "clip", "hpsv2", "imagereward", "aesthetic"]
    shares = {}
    for name, margin in found.items():
        shares[name], n = votes.accuracy(margin, label)
        assert n > 1200
    # Other votes than those of the script's check: two standard errors of 1,300 votes are 2.7 points.
    wrong = {k: s for k, s in shares.items() if not measure.ACCURACY[k][0] - 0.02 <= s <= measure.ACCURACY[k][1] + 0.02}
    assert not wrong
    assert shares["aesthetic"] < min(s for name, s in shares.items() if name != "aesthetic")
    correlation = np.corrcoef(list(found.values()))[~np.eye(5, dtype=bool)]
    assert correlation.max() < 0.95


def test_imagereward_and_aesthetic_scores_look_like_the_published_ones(held_out_votes):
    some = held_out_votes.head(300)
    found = {}
    for name in ("imagereward", "aesthetic"):
        model = scorer.load(measure.scorers()[name])
        pictures = [model.prepare(Picture(Image.open(io.BytesIO(b)))) for b in some["jpg_0"]]
        found[name] = model.score(pictures, some["caption"].to_list())
    assert found["imagereward"].mean() == pytest.approx(0, abs=0.3)
    assert found["imagereward"].std() == pytest.approx(1, abs=0.3)
    assert found["aesthetic"].mean() == pytest.approx(5.5, abs=0.2)
    assert found["aesthetic"].std() == pytest.approx(0.5, abs=0.2)


def test_accuracy_leaves_ties_out_and_counts_equal_scores_as_wrong():
    share, n = votes.accuracy(np.array([2.0, -1.0, 0.0, 3.0, -1.0]), np.array([1.0, 0.0, 1.0, 0.5, 1.0]))
    assert (share, n) == (0.5, 4)


def test_the_reward_models_own_tokenizers_read_every_word_of_the_world_as_one_token_and_any_text_at_all():
    prompts = ["a drawing of a small red circle, left", "An ICON of a large purple cross, center"]
    words = tokenizer.build()
    open_clip_words = open_clip.OpenClipTokenizer(*tokenizer.vocabulary(words), tokenizer.MAX_TOKENS)
    folder = WEIGHTS / "tiny-hpsv2"
    saved = open_clip.read_tokenizer({n: folder / n for n in ("vocab.json", "merges.txt")}, tokenizer.MAX_TOKENS)
    for prompt in [*prompts, *tokenizer.WORDS, "größe 🔴"]:
        assert saved.encode(prompt) == open_clip_words.encode(prompt) == words(prompt).input_ids
    assert [len(saved.encode(w)) for w in tokenizer.WORDS] == [3] * len(tokenizer.WORDS)

    folder = WEIGHTS / "tiny-imagereward"
    _, text, _ = imagereward.load(*(folder / n for n in ("ImageReward.pt", "med_config.json", "vit_config.json")))
    bert = imagereward.read_tokenizer({n: folder / n for n in ("vocab.txt", "tokenizer_config.json")}, text.config)
    assert [len(bert.encode(w).ids) for w in tokenizer.WORDS] == [3] * len(tokenizer.WORDS)
    assert "[UNK]" not in bert.encode("Überall: 10%, a zebra's (striped) hat!").tokens
    # As in BERT: what no letter of the vocabulary spells is unknown, and stands in the prompt nevertheless.
    assert bert.encode("🔴").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_the_tokenizer_reads_words_of_the_world_as_one_token_and_anything_else_as_bytes():
    tokens = tokenizer.build()
    assert tokens.tokenize("a drawing of a small red circle, left") == [
        w + "</w>" for w in ["a", "drawing", "of", "a", "small", "red", "circle", ",", "left"]
    ]
    assert len(tokens("größe 🔴").input_ids) > 4
    assert np.max(tokens("größe 🔴").input_ids) < len(tokens)


@pytest.mark.slow
def test_the_whole_check_of_the_script_passes_on_the_committed_weights(capsys, monkeypatch):
    from trainers.world_models import __main__ as script

    monkeypatch.setattr("sys.argv", ["world_models", "--check"])
    assert script.main() == 0
    said = capsys.readouterr().out
    assert "500 samples" in said
    assert all(f"{name}: accuracy" in said for name in script.REWARDS)
