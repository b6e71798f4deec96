"""Decodes ids as they arrive, without ever showing half a character."""

import codecs
from collections.abc import Iterable, Mapping

from benthic.tokenizer.tokenizer import Tokenizer


class TextStream:
    """Incremental `decode`: the pieces from `feed` and `finish`, joined, equal `tokenizer.decode` of all the ids, with
    `marks` in place of the ids that have one."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False, marks: Mapping[int, str] | None = None):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._marks = marks or {}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that is certain after `ids`; bytes of an unfinished character wait for the next call."""
        text = ""
        for id in ids:
            if id in self._marks:
                text += self.finish() + self._marks[id]
            else:
                text += self._decoder.decode(self._tokenizer.bytes_of_all((id,), self._skip_special))
        return text

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished, else nothing."""
        return self._decoder.decode(b"", True)
