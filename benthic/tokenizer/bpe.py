"""Trains a byte-level BPE tokenizer with the layout of DeepSeek-V3 and the pre-tokenizer of V3 or V1."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import tokenizers
from tokenizers import pre_tokenizers, trainers

from benthic.base.errors import InputError
from benthic.tokenizer import tokens
from benthic.tokenizer.encoder import whole_characters
from benthic.tokenizer.pretokenizer import V1, V3
from benthic.tokenizer.tokenizer import Tokenizer, config_of_new_tokenizer

BYTES = 256
_EMPTY = {
    "version": "1.0",
    "added_tokens": [],
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}


def train(
    texts: Iterable[str],
    vocab_size: int,
    on_progress: Callable[[int], None] | None = None,
    pretokenizer: Literal["v3", "v1"] = "v3",
    tools: bool = False,
) -> Tokenizer:
    """Learn merges from `texts`. The same texts in any order give the same tokenizer.

    `vocab_size` counts everything: BOS, EOS and padding (ids 0 to 2), 256 bytes, the merges, and at the end the other
    added tokens. `on_progress(n)` is called after the n-th text is read. "v1" has single digits and line breaks, and
    chats in V1's format, which needs no tokens of its own; `tools` adds those of V3's tool calls. InputError when there
    is no text, or too little for that many merges.
    """
    if pretokenizer not in ("v3", "v1"):
        raise InputError(f"pretokenizer is {pretokenizer!r} -> use 'v3' or 'v1'")
    cut = {"v3": V3, "v1": V1}[pretokenizer]
    last = {"v3": tokens.LAST, "v1": tokens.FIM}[pretokenizer] + (tokens.TOOLS if tools else ())
    fewest = len(tokens.FIRST) + BYTES + len(last)
    if vocab_size < fewest:
        raise InputError(f"vocab_size={vocab_size} is less than bytes and added tokens need -> use {fewest} or more")
    engine = tokenizers.Tokenizer.from_str(json.dumps(_EMPTY | {"pre_tokenizer": cut}))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(last),
        special_tokens=list(tokens.FIRST),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(_counted(texts, on_progress or (lambda n: None)), trainer)
    engine.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in last])
    if engine.get_vocab_size() < vocab_size:
        raise InputError(
            f"vocab_size={vocab_size} is more than the texts can fill ({engine.get_vocab_size()}) "
            "-> give more text or a smaller vocab_size"
        )
    spec = json.loads(engine.to_str()) | {"pre_tokenizer": cut}
    return Tokenizer(spec, config_of_new_tokenizer(template=pretokenizer))


def _counted(texts: Iterable[str], on_progress: Callable[[int], None]) -> Iterator[str]:
    n = 0
    for n, text in enumerate(texts, 1):
        yield whole_characters(text)
        on_progress(n)
    if n == 0:
        raise InputError("no text to train a tokenizer on -> give at least one document")
