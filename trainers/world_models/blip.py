"""Trains the tiny ImageReward: BLIP and a linear head, one number per (picture, prompt).

First image-text matching, -log sigmoid(r(x, c) - r(x, c')) with the prompt c' of another vote, then
-log sigmoid(r(winner, c) - r(loser, c)) on decided votes (Xu et al. 2023, arXiv 2304.05977).
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from pipelines.scoring import imagereward
from pipelines.scoring.published import LinearHead
from pipelines.world import scene
from trainers.world_models import tokenizer as world_tokenizer
from trainers.world_models.generator import Log
from trainers.world_models.votes import Fit, Pairs, Votes

MATCHING_STEPS, STEPS = 600, 500
PART = (0.4, 1.0)
"""Between which shares of the votes it learns: others than hpsv2's but for a fifth, so that its errors are its own."""
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
VIT = {"img_size": scene.PIXELS, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
PROJECTION = 256
PAD = 0
FILE, MED_FILE, VIT_FILE, VOCAB_FILE = "ImageReward.pt", "med_config.json", "vit_config.json", "vocab.txt"
TOKENIZER_FILE = "tokenizer_config.json"


def vocabulary() -> list[str]:
    """Return BERT's special tokens, printable characters at the start and inside of a word, the words of the world."""
    characters = sorted(set(string.printable) - set(string.whitespace + string.ascii_uppercase))
    inside = [f"##{c}" for c in characters if c.isalnum()]
    words = [w for w in world_tokenizer.WORDS if w not in characters]
    return [*imagereward.SPECIAL, *characters, *inside, *words]


def med_config() -> dict:
    """Return the text encoder's configuration in the published format."""
    return {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "model_type": "bert",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": PAD,
        "type_vocab_size": 2,
        "vocab_size": len(vocabulary()) + len(imagereward.BLIP_TOKENS),
        "encoder_width": VIT["embed_dim"],
        "add_cross_attention": True,
    }


def write_configuration(folder: Path) -> None:
    """Write everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VOCAB_FILE).write_text("".join(f"{t}\n" for t in vocabulary()))
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64}
    for name, content in ((MED_FILE, med_config()), (VIT_FILE, VIT), (TOKENIZER_FILE, tokenizer)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


class Blip(nn.Module):
    """The three parts of ImageReward; the reward is the head's number before it is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = imagereward.build(VIT, med_config())
        self.head = LinearHead([med_config()["hidden_size"], *HEAD_WIDTHS])

    def forward(self, pictures: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return rewards [N, K] of pictures [N, K, 3, 32, 32] with the prompts whose ids are tokens [N, T]."""
        n, k = pictures.shape[:2]
        seen = self.vision(pixel_values=pictures.flatten(0, 1)).last_hidden_state
        return self.read(seen, tokens.repeat_interleave(k, 0)).view(n, k)

    def read(self, seen: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return rewards [M] of encoded pictures and prompts at the same position."""
        hidden = self.text(
            input_ids=tokens, attention_mask=(tokens != PAD).long(), encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        return self.head(hidden[:, 0])


def _margin(model: Blip, batch: Pairs) -> torch.Tensor:
    rewards = model(batch.pictures, batch.tokens)
    return rewards[:, 0] - rewards[:, 1]


def _preference_loss(model: Blip, batch: Pairs) -> torch.Tensor:
    sign = 2 * batch.label_0 - 1
    return -F.logsigmoid(sign * _margin(model, batch)).mean()


def _matching_loss(model: Blip, batch: Pairs) -> torch.Tensor:
    rows = torch.arange(len(batch))
    preferred = batch.pictures[rows, (batch.label_0 < 0.5).long()]
    seen = model.vision(pixel_values=preferred).last_hidden_state
    # The batch is in random order: its neighbour's prompt is another one, but for a few that are the same and cost log 2.
    right, wrong = model.read(seen, batch.tokens), model.read(seen, batch.tokens.roll(1, 0))
    return -F.logsigmoid(right - wrong).mean()


def train(folder: Path, votes: Votes, test: Votes, seed: int, log: Log) -> None:
    """Train the model from nothing and save it in `folder` as ImageReward is published, in fp16."""
    torch.manual_seed(seed)
    write_configuration(folder)
    model = Blip()
    words = imagereward.read_tokenizer({n: folder / n for n in (VOCAB_FILE, TOKENIZER_FILE)}, model.text.config)

    def tokenize(prompts: list[str]) -> torch.Tensor:
        return torch.tensor([t.ids for t in words.encode_batch(prompts)])

    some, held = votes.part(*PART).tokenized(tokenize).decided(), test.tokenized(tokenize)
    Fit("imagereward, matching", MATCHING_STEPS, 1e-3, seed, _matching_loss, _margin).run(model, some, held, log)
    Fit("imagereward", STEPS, 4e-4, seed + 1, _preference_loss, _margin).run(model, some, held, log)
    _standardise(model, some)
    state = imagereward.to_published(model.vision, model.text, model.head)
    # No score needs BLIP's contrastive projections, but the published file has them and the original package wants them.
    for side, width in (("vision", VIT["embed_dim"]), ("text", model.text.config.hidden_size)):
        state[f"blip.{side}_proj.weight"] = torch.zeros(PROJECTION, width)
        state[f"blip.{side}_proj.bias"] = torch.zeros(PROJECTION)
    torch.save({key: weight.half() for key, weight in state.items()}, folder / FILE)


@torch.no_grad()
def _standardise(model: Blip, pairs: Pairs) -> None:
    """Shift and scale the last layer so that the normalised scores of these pictures have mean 0 and deviation 1."""
    parts = torch.arange(len(pairs)).split(256)[:16]
    found = torch.cat([model(p.pictures, p.tokens).flatten() for p in map(pairs.take, parts)])
    scale_last(model.head, found, imagereward.MEAN, imagereward.STD)


@torch.no_grad()
def scale_last(head: LinearHead, found: torch.Tensor, mean: float, deviation: float) -> None:
    """Change a head's last layer so that its numbers `found` get this mean and standard deviation."""
    last = cast(nn.Linear, head.layers[head.INDICES[-1]])
    scale = deviation / found.std()
    last.weight.mul_(scale)
    last.bias.copy_((last.bias - found.mean()) * scale + mean)
