"""Random checkpoints of the five reward models in their published file formats, for measuring speed.

Sizes: `base` (CLIP ViT-B/32, BLIP of ViT-B/16) and `full` (ViT-H-14 for PickScore, CLIP score and HPSv2.1, ViT-L-14 for
Aesthetic, BLIP of ViT-L/16: the published architectures). The text vocabulary is the small world's: speed does not see it.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CLIPConfig, CLIPModel

from pipelines.config import ScorerConfig
from pipelines.scoring import imagereward, open_clip
from pipelines.scoring.published import LinearHead
from trainers.world_models import tokenizer as world_tokenizer

Size = Literal["base", "full"]
CLIP = {
    "ViT-B-32": {"vision": (768, 12, 12, 32), "text": (512, 12, 8), "embed": 512},
    "ViT-L-14": {"vision": (1024, 24, 16, 14), "text": (768, 12, 12), "embed": 768},
    "ViT-H-14": {"vision": (1280, 32, 16, 14), "text": (1024, 24, 16), "embed": 1024},
}
BLIP = {
    "base": {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "full": {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
}
ARCHITECTURES = {
    "base": dict.fromkeys(("pickscore", "clip", "hpsv2", "aesthetic"), "ViT-B-32"),
    "full": {"pickscore": "ViT-H-14", "clip": "ViT-H-14", "hpsv2": "ViT-H-14", "aesthetic": "ViT-L-14"},
}


def write(folder: Path, size: Size, batch_size: int, precision: str = "float32") -> tuple[ScorerConfig, ...]:
    """Write the five checkpoints below `folder` unless they lie there; return their scorers."""
    torch.manual_seed(0)
    names = ARCHITECTURES[size]
    for name in ("pickscore", "clip"):
        _once(folder / name, lambda to, name=name: _clip_folder(to, names[name]))
    _once(folder / "hpsv2", lambda to: _hpsv2(to, names["hpsv2"]))
    _once(folder / "imagereward", lambda to: _imagereward(to, BLIP[size]))
    _once(folder / "aesthetic", lambda to: _aesthetic(to, names["aesthetic"]))
    kinds = {"pickscore": "pickscore", "clip": "clip", "hpsv2": "hpsv2.1", "imagereward": "imagereward"}
    common: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    return (
        *(ScorerConfig(name=n, kind=k, checkpoint=str(folder / n), **common) for n, k in kinds.items()),  # type: ignore[arg-type]
        ScorerConfig(
            name="aesthetic",
            kind="aesthetic",
            checkpoint=str(folder / "aesthetic"),
            backbone=str(folder / "aesthetic" / "clip"),
            **common,
        ),
    )


def _once(folder: Path, make: Any) -> None:
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        make(part)
        part.rename(folder)


def _clip(architecture: str, activation: str = "gelu") -> CLIPModel:
    numbers = CLIP[architecture]
    width, layers, heads, patch = numbers["vision"]
    text_width, text_layers, text_heads = numbers["text"]
    words = world_tokenizer.build()
    config = CLIPConfig(
        projection_dim=numbers["embed"],
        vision_config={
            "image_size": 224,
            "patch_size": patch,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": activation,
        },
        text_config={
            "vocab_size": len(words),
            "max_position_embeddings": 77,
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads,
            "hidden_act": activation,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        },
    )
    return CLIPModel(config).eval()


def _clip_folder(folder: Path, architecture: str) -> None:
    _clip(architecture).save_pretrained(folder)
    world_tokenizer.build().save_pretrained(folder)
    options = {
        "size": {"shortest_edge": 224},
        "resample": 3,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(options))


def _hpsv2(folder: Path, architecture: str) -> None:
    model = _clip(architecture)
    torch.save({"state_dict": open_clip.to_open_clip(model)}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip.architecture_of(model.config)))
    world_tokenizer.build().save_pretrained(folder)


def _imagereward(folder: Path, sizes: dict[str, int]) -> None:
    letters = [*string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    med = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "vocab_size": len(vocab) + 2,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(med))
    (folder / "vit_config.json").write_text(json.dumps(sizes))
    vision, text = imagereward.build(sizes, med)
    head = LinearHead([768, 1024, 128, 64, 16, 1])
    torch.save(imagereward.to_published(vision, text, head), folder / "ImageReward.pt")


def _aesthetic(folder: Path, architecture: str) -> None:
    model = _clip(architecture, "quick_gelu")
    model.save_pretrained(folder / "clip")
    head = LinearHead([model.config.projection_dim, 1024, 128, 64, 16, 1])
    torch.save(head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
