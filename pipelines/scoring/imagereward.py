"""ImageReward: BLIP and a linear head, tuned on ranked pictures (Xu et al. 2023, arXiv 2304.05977).

    score = (head(BLIP text encoder(prompt, cross-attending to BLIP vision encoder(image))[CLS]) - 0.1672) / 1.0333

Text and image meet inside, so a score costs a text forward per (picture, prompt) and a vision forward per picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from pipelines.config import ScorerConfig
from pipelines.hub import CheckpointError
from pipelines.scoring import checkpoints, published
from pipelines.scoring.pictures import CLIP_MEAN, CLIP_STD, Picture, crop_round, normalise
from pipelines.scoring.published import LinearHead
from pipelines.scoring.scorer import Scorer, half

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""The published normalisation of the raw reward."""
TOKENS = 35
VIT_L: dict[str, int] = {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
"""The vision transformer that the package hard-codes; a `vit_config.json` next to the checkpoint takes its place."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BLIP_TOKENS = ("[DEC]", "[ENC]")
"""BLIP puts them behind BERT's vocabulary."""

_MED_OPTIONS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
)
"""Options of a med_config.json that mean the same in transformers."""
_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""In the published file, but no part of the score: BLIP's contrastive projections and the numbers 0, 1, ..."""
_VISION_NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("post_layernorm.", "norm."),
    ("encoder.layers.", "blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
)
"""Parts of transformers' names and of the published ones (timm's); the text encoder's are the same."""


class ImageReward(Scorer):
    """The normalised reward."""

    def __init__(self, config: ScorerConfig, files: Mapping[str, Path], device: str = "cpu") -> None:
        super().__init__(config, device)
        vision, text, head = load(files["ImageReward.pt"], files["med_config.json"], files.get("vit_config.json"))
        self.vision: BlipVisionModel = half(vision, config).to(self.device)
        # transformers adds the positions in the patch embedding's precision, and the layers keep it for their sum.
        vision.embeddings.patch_embedding.float()
        self.text: BlipTextModel = half(text, config).to(self.device)
        self.head = head.to(self.device)
        self.size = int(vision.config.image_size)
        self.preprocessing = f"shortest:{self.size}:own-mode:round"
        self._tokenizer = read_tokenizer(files, text.config)
        self._mean = torch.tensor(CLIP_MEAN, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(CLIP_STD, device=self.device).view(3, 1, 1)

    def prepare(self, picture: Picture) -> torch.Tensor:
        """Return uint8 [3, size, size]: shorter side bicubic in the image's own mode, centre crop with rounded offsets."""
        return crop_round(picture, self.size)

    def encode_images(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the vision encoder's output [N, 1 + patches, width]."""
        return self.vision(pixel_values=normalise(batch, self._mean, self._std)).last_hidden_state

    def compare(self, features: torch.Tensor, rows: Sequence[int], prompts: Sequence[str]) -> torch.Tensor:
        """Return the rewards of the pictures in these rows with the prompts at the same position, [M], float32."""
        tokens = self._tokenizer.encode_batch(list(prompts))
        hidden = self.text(
            input_ids=torch.tensor([t.ids for t in tokens], device=self.device),
            attention_mask=torch.tensor([t.attention_mask for t in tokens], device=self.device),
            encoder_hidden_states=features[torch.as_tensor(rows, device=features.device)],
            is_decoder=False,  # a decoder's causal mask moves a score by 4.4
        ).last_hidden_state
        return (self.head(hidden[:, 0]) - MEAN) / STD


def create(config: ScorerConfig, device: str = "cpu") -> ImageReward:
    """Load ImageReward."""
    return ImageReward(config, checkpoints.resolve(config), device)


def load(
    path: Path, med_config: Path, vit_config: Path | None = None
) -> tuple[BlipVisionModel, BlipTextModel, LinearHead]:
    """Return the three parts of a published file in float32; every tensor but BLIP's projections is used.

    Raises:
        CheckpointError: the weights do not fit the configurations, or a file is not what it should be.
    """
    found = {k: v for k, v in published.read(path).items() if not k.startswith(_UNUSED)}
    vit = VIT_L if vit_config is None else _read_json(vit_config)
    try:
        with torch.device("meta"):
            vision, text = build(vit, _read_json(med_config))
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{med_config}, {vit_config or 'built-in ViT-L'}: no configuration of a BLIP ({type(error).__name__}: {error}); "
            f"take the files that belong to {path.name}"
        ) from error
    head = published.build_head(path, found, text.config.hidden_size, _HEAD)
    published.require_fit(
        path,
        found,
        to_published(vision, text, head),
        f"Take the {med_config.name} that belongs to it"
        + (
            f"; {vit_config.name} next to it describes another vision transformer"
            if vit_config
            else "; without a vit_config.json next to it a ViT-L/16 of 224 pixels is expected"
        ),
    )
    for part, model in ((_VISION, vision), (_TEXT, text), (_HEAD, head)):
        published.fill(model, {key: found[_published(part, key)] for key in model.state_dict()})
    return vision, text, head


def to_published(vision: BlipVisionModel, text: BlipTextModel, head: LinearHead) -> dict[str, torch.Tensor]:
    """Return the weights under the names of the published file, without those that no score needs."""
    parts = ((_VISION, vision), (_TEXT, text), (_HEAD, head))
    return {_published(part, key): tensor for part, model in parts for key, tensor in model.state_dict().items()}


def _published(part: str, key: str) -> str:
    if part == _VISION:
        for ours, theirs in _VISION_NAMES:
            key = key.replace(ours, theirs)
    return part + key


def build(vit: Mapping[str, Any], med: Mapping[str, Any]) -> tuple[BlipVisionModel, BlipTextModel]:
    """Return the two encoders that a vit_config.json and a med_config.json describe, with transformers' own weights.

    Raises:
        ValueError: numbers that fit no model.
        KeyError: an option is missing.
    """
    vision = BlipVisionConfig(
        image_size=vit["img_size"],
        patch_size=vit["patch_size"],
        hidden_size=vit["embed_dim"],
        intermediate_size=4 * vit["embed_dim"],
        num_hidden_layers=vit["depth"],
        num_attention_heads=vit["num_heads"],
        layer_norm_eps=1e-6,  # timm's; transformers' default moves a score by 1.7e-2
    )
    text = BlipTextConfig(
        **{name: med[name] for name in _MED_OPTIONS},
        # The file's encoder_width is not the real one; the package overwrites it too.
        encoder_hidden_size=vision.hidden_size,
        # Creates the cross-attention; the forward then says that it is an encoder.
        is_decoder=True,
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a JSON object: {error}; fetch the file again") from error


def read_tokenizer(files: Mapping[str, Path], text: BlipTextConfig) -> Tokenizer:
    """Return BERT's WordPiece tokenizer with BLIP's two tokens, cut to 35 ids, padded to the longest of a batch.

    Built from the parts: `BertTokenizer(vocab_file=...)` of transformers 5 silently gives a vocabulary of five tokens.

    Raises:
        CheckpointError: the vocabulary is another model's.
    """
    path = files["vocab.txt"]
    options = _read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    vocab = WordPiece.read_file(str(path))
    if missing := [t for t in SPECIAL if t not in vocab]:
        raise CheckpointError(f"{path}: {missing} are missing; expected the vocabulary of a BERT, one token per line")
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.add_special_tokens([*SPECIAL, *BLIP_TOKENS])
    if tokenizer.get_vocab_size() != text.vocab_size:
        raise CheckpointError(
            f"{path}: {len(vocab)} tokens and {' '.join(BLIP_TOKENS)} make {tokenizer.get_vocab_size()}, but the model has "
            f"{text.vocab_size}; set the scorer's processor to the folder of its own vocabulary (bert-base-uncased)"
        )
    tokenizer.normalizer = BertNormalizer(
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    ends = [(t, vocab[t]) for t in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_truncation(min(TOKENS, text.max_position_embeddings))
    tokenizer.enable_padding(pad_id=vocab["[PAD]"], pad_token="[PAD]")
    return tokenizer
