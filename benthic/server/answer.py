"""Tokens of one answer become pieces: text cut before the first stop string, split into reasoning, content and tool
calls, and each token's log-probability with the piece that holds its last byte.

What may still turn out to be the start of a stop string or a tag is held back. One token makes one piece or none, so
pieces do not depend on how many tokens arrive at once.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from benthic.inference.request import Top
from benthic.inference.stop import StopStrings
from benthic.tokenizer.tool_calls import plain

OPEN, CLOSE = "<think>", "</think>"


class Token(NamedTuple):
    """A token of the answer and what the model thought of it."""

    id: int
    logprob: float | None
    top: Top
    offset: int  # characters of the text before the one that its first byte belongs to


class CallPiece(NamedTuple):
    """A piece of a tool call; the first one carries id and name."""

    number: int  # of the call in its answer, from 0
    id: str
    name: str
    arguments: str


class Piece(NamedTuple):
    """What is ready to be sent; any part may be empty."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallPiece, ...] = ()
    tokens: tuple[Token, ...] = ()


class Spelling(Protocol):
    """The bytes of tokens (`benthic.tokenizer.tokenizer.Tokenizer`)."""

    def bytes_of_all(self, ids: Iterable[int], skip_special: bool = False) -> bytes: ...


class CallReader(Protocol):
    """Content in, content without tool calls and the pieces of the calls out. It may hold text back."""

    @property
    def marks(self) -> Mapping[int, str]:
        """The character that stands for each token around calls, in what it is fed."""
        ...

    def feed(self, text: str) -> tuple[str, tuple[CallPiece, ...]]: ...

    def finish(self) -> tuple[str, tuple[CallPiece, ...]]: ...

    @property
    def held(self) -> int:
        """Characters that are held back now."""
        ...

    @property
    def done(self) -> bool:
        """No later text counts."""
        ...


@dataclass(frozen=True, kw_only=True)
class Style:
    """How the tokens of an answer are read."""

    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    include_stop: bool = False
    """Whether it holds the stop string."""
    min_tokens: int = 0
    """Stop strings in so many first tokens do not count."""
    skip_special: bool = True
    """Leave control tokens out of the text."""
    splits: bool = True
    """Tell reasoning from content."""
    thinks: bool = False
    """The prompt has already begun a thought, as R1's does."""
    lead: str = ""
    """What the chat format has every answer begin with (V1's blank): left out, because it is written again where the
    answer is sent back as a message."""


PLAIN = Style(splits=False)


class Answer:
    """Tokens in, pieces out. `begin`: characters of the text before the answer (of a prompt that is echoed)."""

    def __init__(self, spelling: Spelling, style: Style, calls: CallReader | None = None, begin: int = 0):
        self._begin = begin
        self._spelling, self._style, self._calls = spelling, style, calls
        self._marks = calls.marks if calls is not None else {}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopStrings(style.stop, style.include_stop)
        self._splitter = Splitter(style.thinks) if style.splits else Whole()
        self._lead = style.lead
        self._led = 0  # characters of the lead that were left out
        self._decoded = 0  # characters of the answer, and of them those that passed the stop strings
        self._passed = 0
        self._waiting: deque[tuple[int, Token]] = deque()  # with the number of characters that hold all its bytes
        self.tokens = 0  # up to the end, or to the one that completes a stop string
        self.reasoning_tokens = 0
        self.called = False  # it holds a tool call

    @property
    def stopped(self) -> bool:
        """A stop string was reached, or all the calls that may be: no later token counts."""
        return bool(self._stops.hit) or (self._calls is not None and self._calls.done)

    def feed(self, ids: Sequence[int], logprobs: Sequence[float] = (), tops: Sequence[Top] = ()) -> list[Piece]:
        """The pieces that the tokens make certain."""
        pieces = []
        for i, id in enumerate(ids):
            if self.stopped:
                break
            token = Token(id, logprobs[i] if logprobs else None, tops[i] if tops else [], self._begin + self._decoded)
            pieces.append(self._next(token))
        return [piece for piece in pieces if any(piece)]

    def finish(self) -> list[Piece]:
        """What was held back, once no more tokens come."""
        safe = self._without_lead(self._stops.feed(self._decoder.decode(b"", True))[0] + self._stops.finish())
        reasoning, content = (a + b for a, b in zip(self._splitter.feed(safe), self._splitter.finish()))
        calls: tuple[CallPiece, ...] = ()
        if self._calls is not None:
            content, calls = self._calls.feed(content)
            rest, more = self._calls.finish()
            content, calls = content + rest, calls + more
        self.called |= bool(calls)
        piece = Piece(self._plain(reasoning), content, calls, self._ready(None))
        return [piece] if any(piece) else []

    def _next(self, token: Token) -> Piece:
        self.tokens += 1
        if token.id in self._marks:
            text = self._decoder.decode(b"", True) + self._marks[token.id]
        else:
            text = self._decoder.decode(self._spelling.bytes_of_all((token.id,), self._style.skip_special))
        self._decoded += len(text)
        unfinished = bool(self._decoder.getstate()[0])  # the character that its last byte belongs to is to come
        self._waiting.append((self._decoded + unfinished, token))
        if self.tokens <= self._style.min_tokens:
            safe = text
        else:
            safe, _ = self._stops.feed(text)
        self._passed += len(safe)
        reasoning, content = self._splitter.feed(self._without_lead(safe))
        calls: tuple[CallPiece, ...] = ()
        held = self._splitter.held
        if self._calls is not None:
            content, calls = self._calls.feed(content)
            held += self._calls.held
        self.called |= bool(calls)
        return Piece(self._plain(reasoning), content, calls, self._ready(None if self.stopped else self._passed - held))

    def _plain(self, text: str) -> str:
        """Text with the names of tokens in place of their marks."""
        return plain(text) if self._marks else text

    def _without_lead(self, text: str) -> str:
        if not text or not self._lead:
            return text
        bare = text.removeprefix(self._lead)
        self._led, self._lead = len(text) - len(bare), ""
        return bare

    def _ready(self, upto: int | None) -> tuple[Token, ...]:
        """The tokens whose last byte is among the first `upto` characters; None: all."""
        ready = []
        while self._waiting and (upto is None or self._waiting[0][0] <= upto):
            end, token = self._waiting.popleft()
            self.reasoning_tokens += self._splitter.thinking or end <= self._led + self._splitter.thought
            ready.append(token)
        return tuple(ready)


class Whole:
    """A splitter for text that is all content."""

    held = thought = 0
    thinking = False

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content)."""
        return "", text

    def finish(self) -> tuple[str, str]:
        """Nothing is held back."""
        return "", ""


class Splitter:
    """Text that begins with `<think>`, or after it, is reasoning up to `</think>` and content after it; any other is
    content."""

    def __init__(self, thinks: bool) -> None:
        self._text = ""
        self._state = "reasoning" if thinks else "start"
        self._seen = 0
        self.thought = 0  # characters of the whole text up to the end of the closing tag

    @property
    def thinking(self) -> bool:
        """The text that comes next is reasoning."""
        return self._state == "reasoning"

    @property
    def held(self) -> int:
        """Characters that are held back now."""
        return len(self._text)

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content): what is certain of `text` and what was held back."""
        self._text += text
        self._seen += len(text)
        if self._state == "start":
            if self._text.startswith(OPEN):
                self._state, self._text = "reasoning", self._text.removeprefix(OPEN)
            elif OPEN.startswith(self._text):
                return "", ""
            else:
                self._state = "content"
        if self._state == "content":
            return "", self._take(len(self._text))
        at = self._text.find(CLOSE)
        if at < 0:
            return self._take(len(self._text) - _held(self._text, CLOSE)), ""
        reasoning, self._state = self._take(at), "content"
        content = self._take(len(self._text))[len(CLOSE) :]
        self.thought = self._seen - len(content)
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """What was held back: an unfinished tag is plain text."""
        rest = self._take(len(self._text))
        return (rest, "") if self._state == "reasoning" else ("", rest)

    def _take(self, length: int) -> str:
        out, self._text = self._text[:length], self._text[length:]
        return out


def joined(pieces: Iterable[Piece]) -> Piece:
    """Several pieces as one."""
    pieces = list(pieces)
    if len(pieces) == 1:
        return pieces[0]
    calls: list[CallPiece] = []
    for call in (call for piece in pieces for call in piece.calls):
        if calls and calls[-1].number == call.number:
            calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + call.arguments)
        else:
            calls.append(call)
    return Piece(
        "".join(piece.reasoning for piece in pieces),
        "".join(piece.content for piece in pieces),
        tuple(calls),
        tuple(token for piece in pieces for token in piece.tokens),
    )


def _held(text: str, mark: str) -> int:
    """Length of the longest end of `text` with which `mark` begins."""
    return next((k for k in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:k])), 0)
