"""Two engines that turn plain text into ids: the reference (`tokenizers`) and the fast one (`tiktoken`)."""

import json
import re
from typing import Any

import tiktoken
import tokenizers

from benthic.base.errors import InputError
from benthic.tokenizer import pretokenizer

BLOCK = 250_000  # characters
_BREAKS_RUN = re.compile(r"[!-~\u4e00-\u9fa5]")


def whole_characters(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class PlainEncoder:
    """The `tokenizers` library on a tokenizer.json. Without its added tokens (the default) none matches inside text."""

    def __init__(self, spec: dict[str, Any], where: str, with_added_tokens: bool = False):
        quiet: dict[str, Any] = {"post_processor": None, "truncation": None, "padding": None}
        if not with_added_tokens:
            quiet["added_tokens"] = []
        try:
            self._engine = tokenizers.Tokenizer.from_str(json.dumps({**spec, **quiet}))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{where} is refused by the tokenizers library ({error}) -> use another file") from error

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids


class FastEncoder:
    """tiktoken with our merges; an id is its own merge rank. Ids equal `PlainEncoder`'s."""

    def __init__(self, ranks: dict[bytes, int], spec: dict[str, Any], where: str):
        self._engine = tiktoken.Encoding(
            "benthic", pat_str=pretokenizer.SINGLE_REGEX, mergeable_ranks=ranks, special_tokens={}
        )
        self._spec, self._where = spec, where

    def encode(self, text: str) -> list[int]:
        if _has_long_run(text):
            return PlainEncoder(self._spec, self._where).encode(text)
        return self._engine.encode_ordinary(text)


def _has_long_run(text: str) -> bool:
    """Whether a run of blanks or zero-width characters may be long enough to overflow tiktoken's regex stack (10^6).

    A run of two blocks covers one whole aligned block, and one visible ASCII or Han character clears a block.
    """
    return any(not _BREAKS_RUN.search(text, start, start + BLOCK) for start in range(0, len(text) - BLOCK + 1, BLOCK))
