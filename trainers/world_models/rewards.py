"""Trains the tiny reward models on votes of a small world of their own (another seed, another pool of prompts).

`clip`: the symmetric contrastive loss on (preferred picture, prompt). `pickscore`: fine-tuned from it on pairs,
-log softmax(exp(logit_scale) * cos) at the recorded label (Kirstain et al. 2023, arXiv 2305.01569).
"""

from __future__ import annotations

import copy
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from pipelines.world import raw, scene
from trainers.world_models import tokenizer as world_tokenizer
from trainers.world_models.generator import Log, learning_rate_schedule, tokenize

WORLD = raw.WorldConfig(
    seed=1_000_003,
    prompt_pool="rewards",
    pickapic_shards={"train": 12, "test": 1},
    pickapic_prompts={"train": 480, "test": 100},
    rows_per_shard=2_000,
    hpd_train_prompts=1,
    hpd_test_groups=1,
    hpd_test_groups_of_ten=0,
)
NAMES = ("clip", "pickscore")
CLIP_STEPS, PICKSCORE_STEPS, BATCH = 1_200, 500, 96
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Pairs:
    """N decided or tied votes: pictures [N, 2, 3, 32, 32] normalised, token ids [N, T], label of the first [N]."""

    pictures: torch.Tensor
    tokens: torch.Tensor
    label_0: torch.Tensor

    def __len__(self) -> int:
        return len(self.label_0)


def read_pairs(folder: Path, split: str, tokenizer: CLIPTokenizer) -> Pairs:
    """Read one split's labelled votes from raw files in Pick-a-Pic's layout."""
    frame = pl.concat([pl.read_parquet(f) for f in sorted((folder / "pickapic" / "data").glob(f"{split}-*.parquet"))])
    frame = frame.filter(pl.col("has_label"))

    def decode(column: str) -> torch.Tensor:
        stack = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in frame[column]])
        return torch.from_numpy(stack).permute(0, 3, 1, 2)

    pixels = torch.stack([decode("jpg_0"), decode("jpg_1")], 1).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    label = torch.tensor(frame["label_0"].to_numpy().copy(), dtype=torch.float32)
    return Pairs(pixels, tokenize(tokenizer, frame["caption"].to_list()), label)


def held_out_pairs(world_folder: Path) -> Pairs:
    """Write the rewards' world and return the votes of it that no model was trained on."""
    raw.write_world(world_folder, WORLD)
    return read_pairs(world_folder, "test", world_tokenizer.build())


def load(folder: Path) -> CLIPModel:
    """Load a saved reward model in float32."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


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
    return F.binary_cross_entropy_with_logits(_pair_margin(model, batch), batch.label_0)


def _take(pairs: Pairs, index: torch.Tensor) -> Pairs:
    return Pairs(pairs.pictures[index], pairs.tokens[index], pairs.label_0[index])


def accuracy(model: CLIPModel, pairs: Pairs) -> tuple[float, int]:
    """Return the share of decided votes (ties left out) whose preferred picture scores higher, and their number."""
    with torch.no_grad():
        margin = torch.cat([_pair_margin(model, _take(pairs, i)) for i in torch.arange(len(pairs)).split(256)])
    decided = pairs.label_0 != 0.5
    right = margin * (pairs.label_0 - 0.5) > 0
    return float(right[decided].float().mean()), int(decided.sum())


def _fit(
    model: CLIPModel,
    pairs: Pairs,
    test: Pairs,
    objective: Callable[[CLIPModel, Pairs], torch.Tensor],
    steps: int,
    rate: float,
    seed: int,
    name: str,
    log: Log,
) -> CLIPModel:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = learning_rate_schedule(optimizer, steps)
    start = time.monotonic()
    for step in range(steps):
        batch = _take(pairs, torch.randint(0, len(pairs), (BATCH,), generator=generator))
        loss = objective(model.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100.0))
        if step % 100 == 0 or step == steps - 1:
            right, n = accuracy(model.eval(), test)
            log(
                f"{name} {step + 1}/{steps} loss {loss.item():.4f} accuracy {right:.1%} of {n} held-out votes "
                f"{time.monotonic() - start:.0f} s"
            )
    return model.eval()


def train_rewards(world_folder: Path, seed: int, log: Log) -> tuple[dict[str, CLIPModel], CLIPTokenizer]:
    """Write the rewards' world, train `clip` on it and `pickscore` from it; return both models and the tokenizer."""
    torch.manual_seed(seed)
    raw.write_world(world_folder, WORLD)
    tokenizer = world_tokenizer.build()
    train, test = read_pairs(world_folder, "train", tokenizer), read_pairs(world_folder, "test", tokenizer)
    log(f"reward models: {len(train)} votes to learn from, {len(test)} held out, prompts disjoint from every store's")
    clip = _fit(build_clip(tokenizer), train, test, _contrastive_loss, CLIP_STEPS, 1e-3, seed, "clip", log)
    pickscore = _fit(
        copy.deepcopy(clip), train, test, _preference_loss, PICKSCORE_STEPS, 4e-4, seed + 1, "pickscore", log
    )
    return {"clip": clip, "pickscore": pickscore}, tokenizer


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
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
