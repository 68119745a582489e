"""The README's judge runs as it stands there, on tiny vision-language models of two architectures with random weights."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import ScorerConfig
from pipelines.scoring import checkpoints, scorer
from pipelines.scoring.pictures import Picture

README = Path(__file__).parents[1] / "README.md"
HEADING = "## Your own judges"
PROMPTS = ["a red square", "x", "a far longer prompt, about {several} things of all kinds, café"]
QUESTION = "USER: {image}Does this figure show '{prompt}'? Please answer Yes or No. ASSISTANT:"


def blocks(language):
    """Return the code blocks of the section in a language."""
    section = README.read_text().split(f"\n{HEADING}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def judges(tmp_path, monkeypatch):
    """The README's module `judges`, where Python finds it."""
    (tmp_path / "judges.py").write_text(blocks("python")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield importlib.import_module("judges")
    del sys.modules["judges"]


def tokenizer(special):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ye", "Yes"]
    words = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("Y", "e"), ("Ye", "s")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    options = {"pad_token": "<pad>", "eos_token": "<eos>", "additional_special_tokens": special}
    return PreTrainedTokenizerFast(tokenizer_object=words, **options)


TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
TEXT = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}


def save(model, processor, folder):
    # The classes' own initialisation leaves every logit near 0.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava(folder):
    import transformers

    words = tokenizer(["<image>"])
    config = transformers.LlavaConfig(
        vision_config={**VISION, "model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 16},
        text_config={**TEXT, "vocab_size": len(words)},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    size = {"height": 28, "width": 28}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return save(transformers.LlavaForConditionalGeneration(config), processor, folder)


def idefics3(folder):
    import transformers

    grid = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    words = tokenizer(["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *grid])
    config = transformers.Idefics3Config(
        vision_config={**VISION, "patch_size": 7},
        text_config={**TEXT, "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = transformers.Idefics3Processor(images, words, image_seq_len=4, chat_template=TEMPLATE)
    return save(transformers.Idefics3ForConditionalGeneration(config), processor, folder)


@pytest.fixture(scope="module", params=[llava, idefics3], ids=["llava", "idefics3"])
def checkpoint(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("vlm") / request.param.__name__)


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)) for _ in range(3)]
    return [Picture(c.resize(s)) for c, s in zip(coarse, ((40, 40), (64, 32), (30, 90)), strict=True)]


def reference(checkpoint, image, prompt):
    """Return P('Yes') of one image and prompt by a plain forward pass, without padding and chat template."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    text = QUESTION.format(image="<image>", prompt=prompt)
    inputs = processor(text=[text], images=[[image]], return_tensors="pt").to(torch.bfloat16)
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1]
    return float(logits.float().softmax(-1)[processor.tokenizer.convert_tokens_to_ids("Yes")])


def test_the_readmes_judge_gives_the_probability_of_yes_for_every_image_and_prompt(judges, checkpoint, pictures):
    config = ScorerConfig(
        name="vqa", kind="custom", function="judges:vqa", options={"checkpoint": str(checkpoint)}, batch_size=4
    )
    loaded = scorer.load(config)
    prepared = [loaded.prepare(p) for p in pictures]
    pairs = [(i, p) for i in range(3) for p in PROMPTS]
    found = loaded.score_pairs(prepared, pairs)
    wanted = [reference(checkpoint, pictures[i].rgb, p) for i, p in pairs]
    # bfloat16 has 8 bits.
    assert found.tolist() == pytest.approx(wanted, rel=0.05)
    assert all(0 < v < 1 for v in found)
    table = found.reshape(3, len(PROMPTS))
    assert (np.ptp(table, axis=0) > 0.03 * table.mean(0)).any(), "images differ"
    assert (np.ptp(table, axis=1) > 0.1 * table.mean(1)).any(), "prompts differ"


def test_a_prompt_that_looks_like_a_place_for_an_image_is_text(judges, checkpoint, pictures):
    judge = judges.vqa("cpu", str(checkpoint))
    (value,) = judge([pictures[0].rgb], ["an <image> of {prompt} on <|image_pad|>"])
    assert 0 < float(value) < 1


def test_the_readmes_configuration_of_judges_is_one(judges):
    found = [ScorerConfig(**s) for text in blocks("toml") for s in tomllib.loads(text)["scorers"]]
    assert {s.kind for s in found} == {"custom", "imported"}
    assert checkpoints.custom_source(next(s for s in found if s.kind == "custom")).name == "judges.py"


def test_the_readmes_judge_is_short():
    assert len(blocks("python")[0].splitlines()) <= 30
