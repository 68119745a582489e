"""Trains the tiny reward models that are CLIPs on votes of a small world of their own.

`clip`: the symmetric contrastive loss on (preferred picture, prompt). `pickscore`: fine-tuned from it on pairs,
-log softmax(exp(logit_scale) * cos) at the recorded label (Kirstain et al. 2023, arXiv 2305.01569). `hpsv2`: a CLIP of
open_clip's kind (exact GELU), contrastive and then the same softmax over a pair's pictures, both on a part of the decided
votes (Wu et al. 2023, arXiv 2306.09341).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from pipelines.scoring import open_clip
from pipelines.scoring.pictures import CLIP_MEAN, CLIP_STD
from pipelines.world import scene
from trainers.world_models import tokenizer as world_tokenizer
from trainers.world_models.generator import Log, tokenize
from trainers.world_models.votes import Fit, Pairs, Votes

CLIP_STEPS, PICKSCORE_STEPS = 1_200, 500
HPSV2_CLIP_STEPS, HPSV2_STEPS = 500, 400
HPSV2_PART = (0.0, 0.6)
"""Between which shares of the votes `hpsv2` learns: not from all that the others see, so that its errors are its own."""
HPSV2_FILE = "HPS_v2.1_compressed.pt"


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained CLIPModel: 32-pixel pictures in 8-pixel patches, three layers of width 96, text two of 64."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": world_tokenizer.MAX_TOKENS,
        **special,
    }
    vision = {
        "image_size": scene.PIXELS,
        "patch_size": 8,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def _features(model: CLIPModel, pictures: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    image = model.get_image_features(pixel_values=pictures).pooler_output
    text = model.get_text_features(input_ids=tokens).pooler_output
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def _contrastive_loss(model: CLIPModel, batch: Pairs) -> torch.Tensor:
    rows = torch.arange(len(batch))
    preferred = batch.pictures[rows, (batch.label_0 < 0.5).long()]
    image, text = _features(model, preferred, batch.tokens)
    logits = model.logit_scale.exp() * image @ text.T
    # Rows with equal prompts are each other's positives, not negatives.
    same = (batch.tokens[:, None] == batch.tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _pair_margin(model: CLIPModel, batch: Pairs) -> torch.Tensor:
    """Return exp(logit_scale) * (cos_0 - cos_1), [N]."""
    image, text = _features(model, batch.pictures.flatten(0, 1), batch.tokens)
    cosine = (image.view(len(batch), 2, -1) * text[:, None]).sum(-1)
    return model.logit_scale.exp() * (cosine[:, 0] - cosine[:, 1])


def _preference_loss(model: CLIPModel, batch: Pairs) -> torch.Tensor:
    """Return the cross-entropy of the softmax over a pair's two pictures, which is a logistic loss of the margin."""
    return F.binary_cross_entropy_with_logits(_pair_margin(model, batch), batch.label_0)


def train_clip(train: Votes, test: Votes, tokenizer: CLIPTokenizer, seed: int, log: Log) -> CLIPModel:
    """Train `clip` from nothing."""
    torch.manual_seed(seed)
    model = build_clip(tokenizer)
    some, held = (v.tokenized(lambda prompts: tokenize(tokenizer, prompts)) for v in (train, test))
    Fit("clip", CLIP_STEPS, 1e-3, seed, _contrastive_loss, _pair_margin).run(model, some, held, log)
    return model


def train_pickscore(
    clip: CLIPModel, train: Votes, test: Votes, tokenizer: CLIPTokenizer, seed: int, log: Log
) -> CLIPModel:
    """Train `pickscore` from `clip`, which stays as it is."""
    model = copy.deepcopy(clip)
    some, held = (v.tokenized(lambda prompts: tokenize(tokenizer, prompts)) for v in (train, test))
    Fit("pickscore", PICKSCORE_STEPS, 4e-4, seed, _preference_loss, _pair_margin).run(model, some, held, log)
    return model


def save_half(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save a transformers CLIP folder with fp16 weights whose configuration says float32, and its preprocessing."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    for part in ("text_config", "vision_config"):
        config[part]["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": scene.PIXELS},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": scene.PIXELS, "width": scene.PIXELS},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def hpsv2_architecture(words: int) -> dict:
    """Return the open_clip architecture of `hpsv2`; `words`: size of the vocabulary."""
    return {
        "embed_dim": 48,
        "vision_cfg": {"image_size": scene.PIXELS, "layers": 3, "width": 80, "head_width": 20, "patch_size": 8},
        "text_cfg": {
            "context_length": world_tokenizer.MAX_TOKENS,
            "vocab_size": words,
            "width": 48,
            "heads": 3,
            "layers": 2,
        },
    }


def train_hpsv2(train: Votes, test: Votes, tokenizer: CLIPTokenizer, seed: int, log: Log) -> CLIPModel:
    """Train `hpsv2` from nothing."""
    torch.manual_seed(seed)
    vocab, merges = world_tokenizer.vocabulary(tokenizer)
    model = CLIPModel(open_clip.clip_config(hpsv2_architecture(len(vocab))))
    ids = open_clip.OpenClipTokenizer(vocab, merges, world_tokenizer.MAX_TOKENS)
    some, held = train.part(*HPSV2_PART).tokenized(ids).decided(), test.tokenized(ids)
    Fit("hpsv2, contrastive", HPSV2_CLIP_STEPS, 1e-3, seed, _contrastive_loss, _pair_margin).run(model, some, held, log)
    Fit("hpsv2", HPSV2_STEPS, 4e-4, seed + 1, _preference_loss, _pair_margin).run(model, some, held, log)
    return model


def save_hpsv2(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save an open_clip checkpoint in fp16 as HPSv2 publishes it, its architecture and its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: weight.half() for key, weight in open_clip.to_open_clip(model).items()}
    torch.save({"state_dict": state}, folder / HPSV2_FILE)
    vocab, merges = world_tokenizer.vocabulary(tokenizer)
    write_json(folder / open_clip.CONFIG_FILE, hpsv2_architecture(len(vocab)))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    _write_merges(folder / "merges.txt", merges)


def _write_merges(path: Path, merges: Sequence[tuple[str, str]]) -> None:
    path.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    """Write a configuration file as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n")
