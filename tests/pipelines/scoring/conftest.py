"""Tiny reward models with random weights in the formats in which the real ones are published, and odd pictures.

Each `make_tiny_*` writes a folder that a ScorerConfig can name as its checkpoint; everything it needs lies in it.
"""

import io
import json
import string

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import ScorerConfig

SIDE = 32


def randomise(model, generator):
    """Draw weights at which neither the picture nor the prompt vanishes from the score, whatever the class's own are."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "logit_scale":
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                weight.copy_(noise / weight[0].numel() ** 0.5 if "embed" not in name else noise * 0.3)
            else:
                # One-dimensional weights are the layer norms'.
                weight.copy_(0.1 * noise + float(name.endswith("weight")))
    return model.eval()


@pytest.fixture(scope="session")
def make_tiny_hpsv2():
    """Write HPS_v2.1_compressed.pt, open_clip_config.json and a tokenizer.json of the small world's words."""

    def make(folder, seed):
        from transformers import CLIPModel

        from pipelines.scoring import open_clip
        from trainers.world_models import tokenizer

        words = tokenizer.build()
        architecture = {
            "embed_dim": 24,
            "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
            "text_cfg": {"context_length": 24, "vocab_size": len(words), "width": 48, "heads": 3, "layers": 2},
        }
        folder.mkdir(parents=True)
        words.save_pretrained(folder)
        (folder / "open_clip_config.json").write_text(json.dumps(architecture))
        model = CLIPModel(open_clip.clip_config(architecture))
        state = open_clip.to_open_clip(randomise(model, torch.Generator().manual_seed(seed)))
        torch.save({"epoch": 3, "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
        return folder

    return make


@pytest.fixture(scope="session")
def make_tiny_imagereward():
    """Write ImageReward.pt with the keys of the published file, both configurations and a vocab.txt."""

    def make(folder, seed):
        from pipelines.scoring import imagereward
        from pipelines.scoring.published import LinearHead
        from trainers.world_models import tokenizer

        letters = [c for c in string.printable if c.strip() and c not in string.ascii_uppercase]
        words = [*imagereward.SPECIAL, *letters, *(f"##{c}" for c in letters)]
        words += [w for w in tokenizer.WORDS if w not in words]
        vit = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
        med = {
            "vocab_size": len(words) + len(imagereward.BLIP_TOKENS),
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 64,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
            "encoder_width": 48,
        }
        folder.mkdir(parents=True)
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        (folder / "vit_config.json").write_text(json.dumps(vit))
        (folder / "med_config.json").write_text(json.dumps(med))
        generator = torch.Generator().manual_seed(seed)
        vision, text = imagereward.build(vit, med)
        head = LinearHead([48, 1024, 128, 64, 16, 1])
        state = imagereward.to_published(*(randomise(part, generator) for part in (vision, text, head)))
        state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
        for name, width in (("vision_proj", 32), ("text_proj", 48)):
            state[f"blip.{name}.weight"] = torch.randn(256, width, generator=generator)
            state[f"blip.{name}.bias"] = torch.randn(256, generator=generator)
        torch.save(state, folder / "ImageReward.pt")
        return folder

    return make


@pytest.fixture(scope="session")
def make_tiny_aesthetic(make_tiny_clip):
    """Write the published head's file for the features of a small CLIP whose folder it shares."""

    def make(folder, seed):
        from pipelines.scoring.published import LinearHead

        make_tiny_clip(folder, seed)
        width = json.loads((folder / "config.json").read_text())["projection_dim"]
        head = randomise(LinearHead([width, 1024, 128, 64, 16, 1]), torch.Generator().manual_seed(seed))
        torch.save(head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_hpsv2(make_tiny_hpsv2, tmp_path_factory):
    folder = make_tiny_hpsv2(tmp_path_factory.mktemp("models") / "hpsv2", seed=1)
    return ScorerConfig(name="hpsv2", kind="hpsv2.1", checkpoint=str(folder))


@pytest.fixture(scope="session")
def tiny_imagereward(make_tiny_imagereward, tmp_path_factory):
    folder = make_tiny_imagereward(tmp_path_factory.mktemp("models") / "imagereward", seed=2)
    return ScorerConfig(name="imagereward", kind="imagereward", checkpoint=str(folder))


@pytest.fixture(scope="session")
def tiny_aesthetic(make_tiny_aesthetic, tmp_path_factory):
    folder = make_tiny_aesthetic(tmp_path_factory.mktemp("models") / "aesthetic", seed=3)
    return ScorerConfig(name="aesthetic", kind="aesthetic", checkpoint=str(folder))


@pytest.fixture(scope="session")
def noise_images():
    """Nine RGB images of several sizes, all different."""
    rng = np.random.default_rng(4)
    sizes = [(SIDE, SIDE), (40, 40), (61, 47), (47, 61), (90, 20), (SIDE, 20), (33, 100), (64, 64), (8, 9)]
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [c.resize(size, Image.Resampling.BICUBIC) for c, size in zip(coarse, sizes, strict=True)]


@pytest.fixture(scope="session")
def odd_images():
    """Images, by what is odd about them, as Pillow opens them."""
    rng = np.random.default_rng(5)
    base = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (40, 60), dtype=np.uint16))
    masked = base.copy()
    masked.putalpha(Image.fromarray(rng.integers(0, 256, (50, 70), dtype=np.uint8)))
    images = {
        "a pixel wide": base.resize((1, 1000)),
        "a pixel high": base.resize((1000, 1)),
        "exactly the model's side, not square": base.resize((SIDE, 20)),
        "exactly 224, not square": base.resize((224, 100)),
        "a single pixel": base.resize((1, 1)),
        "alpha": masked,
        "grey": base.convert("L"),
        "grey with alpha": masked.convert("LA"),
        "palette": base.quantize(16),
        "bilevel": base.convert("1"),
        "16 bits": deep,
    }
    opened = {name: _reopen(image, "PNG") for name, image in images.items()}
    assert opened["16 bits"].mode.startswith("I")
    return opened | {"CMYK": _reopen(base.convert("CMYK"), "JPEG")}


def _reopen(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return Image.open(buffer)


@pytest.fixture(scope="session")
def odd_prompts():
    return [
        "",
        " \n\t ",
        "circle " * 200,
        "a red circle \N{ROBOT FACE}\N{SPARKLES} \N{HEAVY BLACK HEART}\ufe0f",
        "the painterâ€™s cafÃ©",
        "x" * 500,
        "\0\x1b[31m\u200b\ufeff",
        "赤い円、左上",
        "a blue square, below",
    ]


@pytest.fixture
def tampered(tmp_path):
    """Copy a scorer's checkpoint folder, let a function edit a file's tensors, and return the configuration of the copy."""
    import shutil

    def tamper(config, file, edit):
        folder = tmp_path / "tampered"
        shutil.copytree(config.checkpoint, folder)
        content = torch.load(folder / file, weights_only=True)
        edit(content.get("state_dict", content))
        torch.save(content, folder / file)
        return config.model_copy(update={"checkpoint": str(folder)})

    return tamper
