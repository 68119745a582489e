import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers.models import BPE
from transformers import CLIPModel, CLIPTokenizer

from pipelines.hub import CheckpointError
from pipelines.scoring import open_clip, published
from pipelines.world import scene

GOLDENS = Path(__file__).parents[4] / "shared" / "goldens" / "scorers"
needs_goldens = pytest.mark.skipif(not GOLDENS.exists(), reason="scores of the original packages are not at hand")
CHECKPOINT = "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="module")
def folder(tiny_hpsv2):
    return Path(tiny_hpsv2.checkpoint)


@pytest.fixture(scope="module")
def state(folder):
    return published.read(folder / CHECKPOINT)


@pytest.fixture
def architecture(folder):
    return json.loads((folder / open_clip.CONFIG_FILE).read_text())


@pytest.fixture(scope="module")
def tokenizer(folder):
    return open_clip.read_tokenizer({"tokenizer.json": folder / "tokenizer.json"}, 24)


def write(folder, state, architecture=None):
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / CHECKPOINT)
    if architecture is not None:
        (folder / open_clip.CONFIG_FILE).write_text(json.dumps(architecture))
        return folder / CHECKPOINT, folder / open_clip.CONFIG_FILE
    return folder / CHECKPOINT, None


def transformer(x, state, prefix, layers, heads, mask=None, activation=F.gelu):
    """open_clip's residual blocks, written from its names; x is [N, T, D]."""
    for i in range(layers):
        w = {k.removeprefix(f"{prefix}{i}."): v for k, v in state.items() if k.startswith(f"{prefix}{i}.")}
        y = F.layer_norm(x, x.shape[-1:], w["ln_1.weight"], w["ln_1.bias"]).transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            *(y, y, y, y.shape[-1], heads, w["attn.in_proj_weight"], w["attn.in_proj_bias"], None, None, False, 0.0),
            *(w["attn.out_proj.weight"], w["attn.out_proj.bias"]),
            training=False,
            attn_mask=mask,
        )
        x = x + y.transpose(0, 1)
        y = F.layer_norm(x, x.shape[-1:], w["ln_2.weight"], w["ln_2.bias"])
        y = activation(y @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"])
        x = x + y @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]
    return x


def features_by_hand(state, architecture, pixels, ids, activation=F.gelu):
    """What open_clip computes: image features [N, E] and text features [M, E], pooled at the largest id."""
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=vision["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    heads = vision["width"] // vision["head_width"]
    x = transformer(x, state, "visual.transformer.resblocks.", vision["layers"], heads, activation=activation)
    x = F.layer_norm(x[:, 0], x.shape[-1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    t = state["token_embedding.weight"][ids] + state["positional_embedding"][: ids.shape[1]]
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    t = transformer(t, state, "transformer.resblocks.", text["layers"], text["heads"], mask, activation)
    t = F.layer_norm(t, t.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    return x @ state["visual.proj"], t[torch.arange(len(t)), ids.argmax(1)] @ state["text_projection"]


def features_of(model, pixels, ids):
    with torch.inference_mode():
        images = model.get_image_features(pixel_values=pixels).pooler_output
        return images, model.get_text_features(input_ids=ids).pooler_output


@pytest.fixture(scope="module")
def inputs(tokenizer):
    prompts = ["a red circle", "", "small blue square above a green star", "circle " * 100, "a green circle"]
    ids = tokenizer(prompts)
    # To the full length, as open_clip does.
    ids = F.pad(ids, (0, 24 - ids.shape[1]))
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ids


@pytest.mark.parametrize("quick", [False, True])
def test_the_converted_model_has_the_features_that_open_clips_formulas_give(
    state, architecture, inputs, tmp_path, quick
):
    path, config = write(tmp_path, {"state_dict": state}, architecture | {"quick_gelu": quick})
    activation = (lambda x: x * torch.sigmoid(1.702 * x)) if quick else F.gelu
    expected = features_by_hand(state, architecture, *inputs, activation)
    found = features_of(open_clip.load(path, config), *inputs)
    for one, other in zip(found, expected, strict=True):
        assert other.std() > 0.1
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(one[0], one[1], atol=0.1)


def test_padding_to_the_longest_prompt_changes_nothing(folder, inputs):
    model = open_clip.load(folder / CHECKPOINT, folder / open_clip.CONFIG_FILE)
    pixels, ids = inputs
    short = ids[[0, 1, 2, 4]]
    longest = int((short != 0).sum(1).max())
    assert longest < 24
    full, cut = features_of(model, pixels, short)[1], features_of(model, pixels, short[:, :longest])[1]
    torch.testing.assert_close(cut, full, atol=1e-6, rtol=1e-5)


def test_conversion_and_its_inverse_give_every_tensor_back(state, folder):
    model = open_clip.load(folder / CHECKPOINT, folder / open_clip.CONFIG_FILE)
    back = open_clip.to_open_clip(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    again = CLIPModel(open_clip.clip_config(open_clip.architecture_of(model.config)))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert again.config.vision_config.num_attention_heads == 4
    assert again.config.text_config.num_attention_heads == 3


def test_the_architecture_is_read_plain_or_below_model_cfg_and_other_widths_of_the_mlp_are_kept(architecture, tmp_path):
    architecture["vision_cfg"] = architecture["vision_cfg"] | {"mlp_ratio": 2.0}
    config = open_clip.clip_config(architecture)
    assert (config.vision_config.intermediate_size, config.text_config.intermediate_size) == (64, 192)
    assert open_clip.architecture_of(config)["vision_cfg"]["mlp_ratio"] == 2.0
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": {"mean": [0.5] * 3}}))
    assert open_clip.read_architecture(file) == architecture


def test_without_its_json_a_vit_h_14_is_expected():
    vision, text = (
        open_clip.clip_config(open_clip.read_architecture(None)).to_dict()[f"{p}_config"] for p in ("vision", "text")
    )
    assert (vision["hidden_size"], vision["num_attention_heads"], vision["num_hidden_layers"]) == (1280, 16, 32)
    assert (text["hidden_size"], text["num_attention_heads"], text["eos_token_id"]) == (1024, 16, 49407)
    assert (vision["intermediate_size"], text["intermediate_size"], vision["hidden_act"]) == (5120, 4096, "gelu")


def test_a_tiny_checkpoint_without_its_json_is_refused_with_the_file_to_add(state, tmp_path):
    path, _ = write(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"missing: .*of another shape: .*expected \[.*no open_clip_config.json"):
        open_clip.load(path)


def test_half_precision_and_older_files_are_read(state, architecture, inputs, tmp_path):
    halves = {k: v.half() for k, v in state.items()}
    path, config = write(tmp_path, {"state_dict": halves}, architecture)
    model = open_clip.load(path, config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    rounded = {k: v.half().float() for k, v in state.items()}
    assert all(torch.equal(v, rounded[k]) for k, v in open_clip.to_open_clip(model).items())
    torch.save(rounded, path, _use_new_zipfile_serialization=False)
    old = features_of(open_clip.load(path, config), *inputs)
    assert torch.equal(old[0], features_of(model, *inputs)[0])


def lose(state):
    del state["visual.ln_pre.bias"]


def add(state):
    state["visual.extra.weight"] = torch.zeros(3)


def widen(state):
    state["text_projection"] = torch.zeros(48, 25)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lose, r"1 missing: visual\.ln_pre\.bias"),
        (add, r"1 unused: visual\.extra\.weight"),
        (widen, r"text_projection \[48, 25\] \(expected \[48, 24\]\)"),
    ],
)
def test_every_tensor_of_a_file_is_used_and_none_is_missing(state, architecture, tmp_path, edit, told):
    state = dict(state)
    edit(state)
    with pytest.raises(CheckpointError, match=told):
        open_clip.load(*write(tmp_path, state, architecture))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vision_cfg": {"timm_model_name": "resnet"}}, "vision_cfg.timm_model_name.*not implemented"),
        ({"text_cfg": {"hf_model_name": "roberta"}}, "text_cfg.hf_model_name.*not implemented"),
        ({"custom_text": True}, "custom_text.*not implemented"),
        ({"vision_cfg": None}, "no open_clip architecture"),
        ({"vision_cfg": {"head_width": 7}}, "width 32 is no multiple of head_width 7"),
    ],
)
def test_an_architecture_that_is_not_implemented_is_refused(state, architecture, tmp_path, change, told):
    changed = {k: architecture.get(k, {}) | v if isinstance(v, dict) else v for k, v in (architecture | change).items()}
    with pytest.raises(CheckpointError, match=told):
        open_clip.load(*write(tmp_path, state, changed))


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>", b"PK\3\4no"]
)
def test_a_file_that_torch_did_not_write_is_refused(tmp_path, content):
    (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(CheckpointError, match="expected tensors written by torch"):
        published.read(tmp_path / CHECKPOINT)


def test_a_file_of_something_else_than_tensors_is_refused(tmp_path):
    for content in ([1, 2], {"epoch": 3}, torch.zeros(2)):
        torch.save(content, tmp_path / CHECKPOINT)
        with pytest.raises(CheckpointError, match="expected a dictionary name -> tensor"):
            published.read(tmp_path / CHECKPOINT)


@needs_goldens
def test_token_ids_equal_the_packages_also_where_special_tokens_stand_in_a_prompt():
    folder = GOLDENS / "clip_bpe"
    tokenizer = open_clip.read_tokenizer({n: folder / n for n in ("vocab.json", "merges.txt")}, 77)
    prompts = json.loads((GOLDENS / "hpsv2" / "tokens.json").read_text())
    prompts += json.loads((GOLDENS / "hpsv2" / "cases.json").read_text())["cases"]
    assert {p.get("group") for p in prompts} >= {"edge", "ordinary"}
    assert max(len(p["input_ids"]) for p in prompts) == 77
    for prompt in prompts:
        assert tokenizer.encode(prompt["prompt"]) == prompt["input_ids"], prompt["prompt"]


def test_the_small_worlds_prompts_have_the_ids_of_its_own_tokenizer(folder, tokenizer):
    theirs = CLIPTokenizer.from_pretrained(folder)
    prompts = [*scene.all_prompts()[:200], "a wooden  Circle's 12 stars?!"]
    for prompt, ids in zip(
        prompts, theirs(prompts, padding=False, truncation=True, max_length=24).input_ids, strict=True
    ):
        assert tokenizer.encode(prompt) == ids


def test_both_kinds_of_vocabulary_files_give_the_same_ids(folder, tokenizer, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"] | {t["content"]: t["id"] for t in content["added_tokens"]}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(m) for m in content["model"]["merges"])]
    for end in ("\n", "\r\n"):
        (tmp_path / "merges.txt").write_bytes((end.join(lines) + end).encode())
        other = open_clip.read_tokenizer({n: tmp_path / n for n in ("vocab.json", "merges.txt")}, 24)
        prompts = ["a red circle", "Größe: 12 ★, it's", "circle " * 100]
        assert [other.encode(p) for p in prompts] == [tokenizer.encode(p) for p in prompts]


def test_prompts_are_cleaned_padded_with_zeros_and_cut_with_the_end_token_last(tokenizer):
    ids = tokenizer(["a red circle", "A  RED\tCircle", "a &amp;amp; b", "a & b", "circle " * 100, ""])
    start, end = tokenizer.start, tokenizer.end
    assert ids.shape == (6, 24)
    assert ids[0].tolist() == ids[1].tolist()
    assert ids[2].tolist() == ids[3].tolist()
    assert (ids[4, 0], ids[4, -1]) == (start, end)
    assert ids[5].tolist() == [start, end] + [0] * 22
    assert tokenizer.encode("it\u2019s cafÃ©") == tokenizer.encode("it's café")
    # ftfy resolves entities only where there is no "<".
    assert tokenizer.encode("a < &amp;amp; b") == tokenizer.encode("a < & b")
    # The contraction's pattern ignores case, and the long s is an s.
    assert tokenizer.encode("it'\u017f") != tokenizer.encode("it' \u017f")
    assert tokenizer.encode("a <END_OF_TEXT> b")[2] == end
    assert end not in tokenizer.encode("a <|endoftext|> b")[:-1]
    assert tokenizer([]).shape == (0, 0)


def test_merges_are_applied_in_their_order_not_from_left_to_right():
    letters = [*open_clip._SYMBOLS, *(s + "</w>" for s in open_clip._SYMBOLS)]
    merges = [("b", "c</w>"), ("a", "b"), ("a", "a"), ("aa", "a</w>")]
    tokens = [*letters, *("".join(m) for m in merges), open_clip.START, open_clip.END]
    tokenizer = open_clip.OpenClipTokenizer({t: i for i, t in enumerate(tokens)}, merges, 77)

    def pieces(text):
        return [tokens[i] for i in tokenizer.encode(text)[1:-1]]

    assert pieces("abc") == ["a", "bc</w>"]
    assert pieces("abd") == ["ab", "d</w>"]
    assert pieces("aaaaa") == ["aa", "aaa</w>"]
    assert pieces("aaad 7") == ["aa", "a", "d</w>", "7</w>"]


@pytest.mark.parametrize("seed", range(5))
def test_words_are_merged_as_the_tokenizers_library_merges_them(seed):
    rng = random.Random(seed)
    symbols = [*"abc", *(c + "</w>" for c in "abc")]
    merges = []
    for _ in range(40):
        pair = (rng.choice([s for s in symbols if not s.endswith("</w>")]), rng.choice(symbols))
        if "".join(pair) not in symbols:
            merges.append(pair)
            symbols.append("".join(pair))
    letters = [*open_clip._SYMBOLS, *(s + "</w>" for s in open_clip._SYMBOLS)]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*letters, *symbols, open_clip.START, open_clip.END]))}
    ours = open_clip.OpenClipTokenizer(vocab, merges, 77)
    theirs = BPE(vocab, merges, end_of_word_suffix="</w>")
    for _ in range(200):
        word = "".join(rng.choices("abc", k=rng.randrange(1, 30)))
        assert ours.encode(word)[1:-1] == [t.id for t in theirs.tokenize(word)]


def test_any_text_has_ids_and_always_the_same(folder, tokenizer):
    rng = random.Random(0)
    odd = [
        "İ",
        "\u017f",
        "'\u017f",
        "Σ",
        "&#xD800;",
        "&amp;lt;",
        "&#133;",
        "\u2028",
        "\x1c",
        "â€™",
        "<start_of_text>",
        "\ud800",
    ]
    texts = ["".join(rng.choice([*odd, *(chr(rng.randrange(0x110000)) for _ in range(20))]) for _ in range(rng.randrange(40)))
             for _ in range(300)]  # fmt: skip
    fresh = open_clip.read_tokenizer({"tokenizer.json": folder / "tokenizer.json"}, 24)
    last = len(fresh._vocab)
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode(text) == fresh.encode(text)
        assert 2 <= len(ids) <= 24
        assert ids[0] == tokenizer.start
        assert ids[-1] == tokenizer.end
        assert all(0 <= i < last for i in ids)


def test_a_vocabulary_that_cannot_spell_every_prompt_is_refused(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["q</w>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"lacks 1 tokens.*q</w>"):
        open_clip.read_tokenizer({"tokenizer.json": tmp_path / "tokenizer.json"}, 24)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected the byte-pair vocabulary"):
        open_clip.read_tokenizer({"tokenizer.json": tmp_path / "tokenizer.json"}, 24)
