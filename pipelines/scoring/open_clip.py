"""open_clip's checkpoints and tokenizer (Ilharco et al. 2021, zenodo.5143773) for transformers' CLIPModel.

    visual.proj, text_projection     transposed
    attn.in_proj_{weight,bias}       q, k and v on top of each other
    everything else                  another name

Belongs here: names, architecture files, token ids. Does not belong here: what a score is made of, preprocessing.
"""

from __future__ import annotations

import functools
import html
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import regex
import torch
from transformers import CLIPConfig, CLIPModel

from pipelines.hub import CheckpointError
from pipelines.scoring import published

VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
CONFIG_FILE = "open_clip_config.json"
START, END = "<|startoftext|>", "<|endoftext|>"
"""The special tokens' names in transformers' vocabulary files; open_clip calls them otherwise, see _LITERALS."""

_KNOWN_OPTIONS = {
    "": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"},
    "vision_cfg": {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
_HEAD_WIDTH, _MLP_RATIO = 64, 4.0
"""open_clip's defaults."""
_NAMES = (
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_projection.weight", "text_projection"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("visual_projection.weight", "visual.proj"),
    (".self_attn.q_proj.", ".attn.in_proj_"),
    (".self_attn.k_proj.", ".attn.in_proj_"),
    (".self_attn.v_proj.", ".attn.in_proj_"),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""Parts of transformers' names and of open_clip's."""
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")
_QKV = ("q_proj", "k_proj", "v_proj")


def clip_config(architecture: Mapping[str, Any]) -> CLIPConfig:
    """Return transformers' configuration of an open_clip architecture.

    Raises:
        ValueError: an option that is not implemented, or numbers that fit no model.
        KeyError: an option is missing.
    """
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    parts = {"": architecture, "vision_cfg": vision, "text_cfg": text}
    unknown = [
        f"{p}.{k}".lstrip(".") for p, part in parts.items() for k in part if k not in _KNOWN_OPTIONS[p] and part[k]
    ]
    if unknown:
        raise ValueError(f"the options {unknown} are not implemented; scores would be wrong")
    head_width = vision.get("head_width", _HEAD_WIDTH)
    if vision["width"] % head_width:
        raise ValueError(f"vision_cfg.width {vision['width']} is no multiple of head_width {head_width}")
    activation = "quick_gelu" if architecture.get("quick_gelu") else "gelu"
    return CLIPConfig(
        projection_dim=architecture["embed_dim"],
        vision_config={
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", _MLP_RATIO)),
            "num_hidden_layers": vision["layers"],
            # Not to be seen in the weights: heads are 64 wide by default, 80 in ViT-H.
            "num_attention_heads": vision["width"] // head_width,
            "hidden_act": activation,
        },
        text_config={
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", _MLP_RATIO)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "hidden_act": activation,
            "bos_token_id": None,
            # open_clip pools the text at the largest id: the end token, which is the last of its vocabulary.
            "eos_token_id": text["vocab_size"] - 1,
        },
    )


def architecture_of(config: CLIPConfig) -> dict[str, Any]:
    """Return the open_clip architecture of a configuration, the content of `open_clip_config.json`."""
    vision, text = config.vision_config, config.text_config
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }


def to_open_clip(model: CLIPModel) -> dict[str, torch.Tensor]:
    """Return the weights under open_clip's names, the `state_dict` of a published file."""
    state = model.state_dict()
    result = {}
    for key, tensor in state.items():
        if ".q_proj." in key:
            tensor = torch.cat([state[key.replace("q_proj", part)] for part in _QKV])
        elif ".k_proj." in key or ".v_proj." in key:
            continue
        result[_name(key)] = (tensor.T if key in _TRANSPOSED else tensor).contiguous()
    return result


def _from_open_clip(key: str, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight that transformers calls `key`."""
    tensor = state[_name(key)]
    for i, part in enumerate(_QKV):
        if f".{part}." in key:
            return tensor.chunk(3)[i]
    return tensor.T if key in _TRANSPOSED else tensor


def _name(key: str) -> str:
    for ours, theirs in _NAMES:
        key = key.replace(ours, theirs)
    return key


def read_architecture(path: Path | None) -> dict[str, Any]:
    """Return the architecture of an `open_clip_config.json`, plain or under `model_cfg`; without a file ViT-H-14's."""
    if path is None:
        return VIT_H_14
    try:
        content = json.loads(path.read_text())
        return dict(content.get("model_cfg", content))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected the JSON of an open_clip architecture: {error}") from error


def load(path: Path, architecture: Path | None = None) -> CLIPModel:
    """Return an open_clip checkpoint as a CLIPModel in float32; every tensor of the file is used and none is missing.

    Args:
        path: the published file.
        architecture: the `open_clip_config.json` next to it; None: ViT-H-14.

    Raises:
        CheckpointError: the weights do not fit the architecture, or a file is not what it should be.
    """
    try:
        config = clip_config(read_architecture(architecture))
        with torch.device("meta"):
            model = CLIPModel(config)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{architecture}: no open_clip architecture that is implemented, a vision transformer and a text transformer "
            f"({type(error).__name__}: {error}); take the JSON that belongs to {path.name}"
        ) from error
    found = published.read(path)
    published.require_fit(
        path,
        found,
        to_open_clip(model),
        f"{architecture} describes another model"
        if architecture
        else f"There is no {CONFIG_FILE} next to it, so a ViT-H-14 is expected; of another architecture put its open_clip "
        f"JSON there",
    )
    published.fill(model, {key: _from_open_clip(key, found) for key in model.state_dict()})
    return model


_LITERALS = {"<start_of_text>": START, "<end_of_text>": END}
"""What open_clip takes for a special token where it stands in a prompt."""
_WORDS = regex.compile(
    "|".join(_LITERALS) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_WORD_END = "</w>"
_WORDS_KEPT = 100_000


def _byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte in a vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = itertools.count(256)
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


_SYMBOLS = _byte_symbols()


class OpenClipTokenizer:
    """open_clip's byte-pair encoding; ids equal the package's for every string, which those of transformers do not."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], length: int) -> None:
        """vocab: token -> id. merges: pairs, the first one merged first. length: ids per prompt at most.

        Raises:
            ValueError: the vocabulary lacks a token that a prompt may need.
        """
        needed = {START, END, *_SYMBOLS, *(s + _WORD_END for s in _SYMBOLS), *(a + b for a, b in merges)}
        if missing := sorted(needed - vocab.keys()):
            raise ValueError(f"the vocabulary lacks {len(missing)} tokens that prompts need, such as {missing[:4]}")
        self.length = length
        self.start, self.end = vocab[START], vocab[END]
        self._vocab = vocab
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._word = functools.lru_cache(maxsize=_WORDS_KEPT)(self._encode_word)

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return ids, int64 [N, T], padded with 0 to the longest prompt; a cut one still ends with the end token."""
        rows = [self.encode(p) for p in prompts]
        longest = max(map(len, rows), default=0)
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows]).view(len(rows), longest)

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of one prompt, from the start token to the end token."""
        ids = [self.start]
        for word in _WORDS.findall(_clean(prompt)):
            ids += self._word(word)
            if len(ids) >= self.length:
                break
        return [*ids[: self.length - 1], self.end]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in _LITERALS:
            return (self._vocab[_LITERALS[word]],)
        symbols = [_SYMBOLS[byte] for byte in word.encode()]
        symbols[-1] += _WORD_END
        while len(symbols) > 1:
            ranked = [(self._ranks[pair], pair) for pair in set(itertools.pairwise(symbols)) if pair in self._ranks]
            if not ranked:
                break
            symbols = _merge(symbols, min(ranked)[1])
        return tuple(self._vocab[s] for s in symbols)


def _clean(prompt: str) -> str:
    # open_clip also shrinks white space, which no word of the pattern contains.
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).lower()


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Return the symbols with every occurrence of the pair merged, from left to right."""
    result: list[str] = []
    i = 0
    while i < len(symbols):
        if symbols[i] == pair[0] and symbols[i + 1 : i + 2] == [pair[1]]:
            result.append(pair[0] + pair[1])
            i += 2
        else:
            result.append(symbols[i])
            i += 1
    return result


def read_tokenizer(files: Mapping[str, Path], length: int) -> OpenClipTokenizer:
    """Return the tokenizer of `vocab.json` and `merges.txt`, or of a `tokenizer.json`.

    Raises:
        CheckpointError: the files hold no such vocabulary.
    """
    source = files.get("vocab.json") or files["tokenizer.json"]
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        if source.name == "vocab.json":
            vocab = content
            # Not splitlines, which also splits at rarer separators that may be symbols.
            lines = files["merges.txt"].read_text(encoding="utf-8").split("\n")
            merges = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
        else:
            vocab = content["model"]["vocab"] | {t["content"]: t["id"] for t in content["added_tokens"]}
            merges = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
        return OpenClipTokenizer(vocab, [(first, second) for first, second in merges], length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: expected the byte-pair vocabulary of a CLIP ({type(error).__name__}: {error}); set the scorer's "
            f"processor to the folder of the tokenizer that the model was trained with"
        ) from error
