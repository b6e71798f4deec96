"""Trains a byte-level BPE tokenizer with the layout and the pre-tokenizer of DeepSeek-V3."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from benthic.base.errors import InputError
from benthic.tokenizer import pretokenizer, tokens
from benthic.tokenizer.encoder import whole_characters
from benthic.tokenizer.tokenizer import Tokenizer, config_of_new_tokenizer

BYTES = 256


def train(texts: Iterable[str], vocab_size: int, on_progress: Callable[[int], None] | None = None) -> Tokenizer:
    """Learn merges from `texts`. The same texts in any order give the same tokenizer.

    `vocab_size` counts everything: BOS, EOS and padding (ids 0 to 2), 256 bytes, the merges, and at the end the other
    added tokens. `on_progress(n)` is called after the n-th text is read. InputError when there is no text, or too
    little for that many merges.
    """
    fewest = len(tokens.FIRST) + BYTES + len(tokens.LAST)
    if vocab_size < fewest:
        raise InputError(f"vocab_size={vocab_size} is less than bytes and added tokens need -> use {fewest} or more")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = _pre_tokenizer()  # type: ignore
    engine.decoder = decoders.ByteLevel()  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tokens.LAST),
        special_tokens=list(tokens.FIRST),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(_counted(texts, on_progress or (lambda n: None)), trainer)
    engine.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in tokens.LAST])
    if engine.get_vocab_size() < vocab_size:
        raise InputError(
            f"vocab_size={vocab_size} is more than the texts can fill ({engine.get_vocab_size()}) "
            "-> give more text or a smaller vocab_size"
        )
    return Tokenizer(_spec(engine), config_of_new_tokenizer())


def _counted(texts: Iterable[str], on_progress: Callable[[int], None]) -> Iterator[str]:
    n = 0
    for n, text in enumerate(texts, 1):
        yield whole_characters(text)
        on_progress(n)
    if n == 0:
        raise InputError("no text to train a tokenizer on -> give at least one document")


def _spec(engine: tokenizers.Tokenizer) -> dict[str, Any]:
    return {**json.loads(engine.to_str()), "pre_tokenizer": pretokenizer.V3}


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    regexes = (pretokenizer.DIGITS_REGEX, pretokenizer.HAN_KANA_REGEX, pretokenizer.WORDS_REGEX)
    splits = [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in regexes]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
