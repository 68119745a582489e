"""A CLIP tokenizer whose vocabulary is the bytes and the words of the small world's grammar.

Any text can be tokenized (unknown words fall back to bytes); every word of the grammar is one token.
"""

from __future__ import annotations

import json

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from pipelines.world import scene

MAX_TOKENS = 24
WORDS = sorted(
    {w for p in scene.PREFIXES for w in p.split()}
    | {"a", ","}
    | set(scene.SHAPES + scene.COLOURS + scene.SIZES + scene.PLACES)
)


def build() -> CLIPTokenizer:
    """Return the tokenizer: 256 bytes, 256 bytes that end a word, one merge chain per word, two special tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        # Merging from the end keeps a word's chain its own: every intermediate piece carries the end of the word.
        tail = pieces.pop()
        while pieces:
            head = pieces.pop()
            if (head, tail) not in merges:
                merges.append((head, tail))
                tokens.append(head + tail)
            tail = head + tail
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_TOKENS,
        pad_token="<|endoftext|>",
    )
    for word in WORDS:
        if len(tokenizer(word).input_ids) != 3:
            raise AssertionError(f"the word {word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def vocabulary(tokenizer: CLIPTokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a tokenizer's token -> id in the order of the ids, and its merges, the first one merged first."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return dict(vocab), [(first, second) for first, second in model["merges"]]
