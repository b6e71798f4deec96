"""The text of one answer: cut before the first stop string, and split into reasoning and content.

What may still turn out to be the start of a stop string or a tag is held back, so that the pieces do not depend on how
many tokens arrive at once.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

OPEN, CLOSE = "<think>", "</think>"


class Piece(NamedTuple):
    """Text that is ready to be sent; either part may be empty."""

    reasoning: str
    content: str


class Decoder(Protocol):
    """Token ids to text, in pieces (`benthic.tokenizer.stream.TextStream`)."""

    def feed(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class Answer:
    """Token ids in, pieces out. `thinks`: the prompt has already begun a thought, as R1's does."""

    def __init__(self, decoder: Decoder, stop: Iterable[str], thinks: bool = False):
        self._decoder = decoder
        self._cutter = Cutter(stop)
        self._splitter = Splitter(thinks)
        self.tokens = 0  # up to the end, or to the one that completes a stop string

    @property
    def stopped(self) -> bool:
        """A stop string was reached: no later text counts."""
        return self._cutter.stopped

    def feed(self, ids: Sequence[int]) -> Piece:
        """The text that `ids` make certain."""
        text = ""
        for id in ids:
            if not self.stopped:
                text += self._cutter.feed(self._decoder.feed((id,)))
                self.tokens += 1
        return self._splitter.feed(text)

    def finish(self) -> Piece:
        """What was held back, once no more ids come."""
        text = self._cutter.feed(self._decoder.finish()) + self._cutter.finish()
        first, rest = self._splitter.feed(text), self._splitter.finish()
        return Piece(first.reasoning + rest.reasoning, first.content + rest.content)


class Cutter:
    """Text up to the stop string that is complete first; of two that end together, the longer."""

    def __init__(self, stop: Iterable[str]):
        self._stop = tuple(stop)
        self._text = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The part that belongs to the answer for certain."""
        if self.stopped:
            return ""
        self._text += text
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._text.find(stop)) >= 0]
        self.stopped = bool(ends)
        ready = min(ends)[1] if ends else len(self._text) - _held(self._text, self._stop)
        out, self._text = self._text[:ready], self._text[ready:]
        return out

    def finish(self) -> str:
        """The text held back, where no stop string came of it."""
        return "" if self.stopped else self._text


class Splitter:
    """Text that begins with `<think>`, or after it, is reasoning up to `</think>` and content after it; any other is
    content."""

    def __init__(self, thinks: bool) -> None:
        self._text = ""
        self._state = "reasoning" if thinks else "start"

    def feed(self, text: str) -> Piece:
        """What is certain of `text` and what was held back."""
        self._text += text
        if self._state == "start":
            if self._text.startswith(OPEN):
                self._state, self._text = "reasoning", self._text.removeprefix(OPEN)
            elif OPEN.startswith(self._text):
                return Piece("", "")
            else:
                self._state = "content"
        if self._state == "content":
            return Piece("", self._take(len(self._text)))
        at = self._text.find(CLOSE)
        if at < 0:
            return Piece(self._take(len(self._text) - _held(self._text, (CLOSE,))), "")
        reasoning, self._state = self._take(at), "content"
        return Piece(reasoning, self._take(len(self._text))[len(CLOSE) :])

    def finish(self) -> Piece:
        """What was held back: an unfinished tag is plain text."""
        rest = self._take(len(self._text))
        return Piece(rest, "") if self._state == "reasoning" else Piece("", rest)

    def _take(self, length: int) -> str:
        out, self._text = self._text[:length], self._text[length:]
        return out


def _held(text: str, marks: Iterable[str]) -> int:
    """Length of the longest end of `text` with which one of `marks` begins."""
    return max((k for m in marks for k in range(1, min(len(m), len(text) + 1)) if text.endswith(m[:k])), default=0)
