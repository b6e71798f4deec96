"""Decodes ids as they arrive, without ever showing half a character."""

import codecs
from collections.abc import Iterable

from benthic.tokenizer.tokenizer import Tokenizer


class TextStream:
    """Incremental `decode`: the pieces from `feed` and `finish`, joined, equal `tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is certain after `ids`; bytes of an unfinished character wait for the next call."""
        return self._decoder.decode(self._tokenizer.bytes_of_all(ids, self._skip_special))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished, else nothing."""
        return self._decoder.decode(b"", True)
