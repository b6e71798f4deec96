"""Tool calls of one answer, in the pieces that clients get."""

import secrets
from collections.abc import Mapping
from typing import Protocol

from benthic.server.answer import CallPiece
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.tokenizer.tool_calls import ToolCallReader, ToolPiece, format_of, marks


class Reader(Protocol):
    """Of one format (`benthic.tokenizer.tool_calls.ToolCallReader`)."""

    @property
    def held(self) -> int: ...

    def feed(self, text: str) -> list[ToolPiece]: ...

    def finish(self) -> list[ToolPiece]: ...


class Calls:
    """Reads content with marks; gives each call an id of its own. After `most` calls no later text counts."""

    def __init__(self, reader: Reader, marks: Mapping[int, str], most: int = 2**31):
        self._reader, self._most = reader, most
        self.marks = marks
        self.done = False

    @property
    def held(self) -> int:
        """Characters that are held back now."""
        return self._reader.held

    def feed(self, text: str) -> tuple[str, tuple[CallPiece, ...]]:
        """Content without calls, and pieces of calls."""
        return self._split(self._reader.feed(text))

    def finish(self) -> tuple[str, tuple[CallPiece, ...]]:
        """What was held back, once no more text comes."""
        return self._split(self._reader.finish())

    def _split(self, pieces: list[ToolPiece]) -> tuple[str, tuple[CallPiece, ...]]:
        content, calls = "", []
        for piece in pieces:
            self.done = self.done or piece.index >= self._most
            if self.done:
                break
            content += piece.content
            if piece.index >= 0:
                id = f"call_{secrets.token_hex(12)}" if piece.name else ""
                calls.append(CallPiece(piece.index, id, piece.name, piece.arguments))
        return content, tuple(calls)


def reader(tokenizer: Tokenizer, parallel: bool) -> Calls:
    """Of an answer that may hold calls, one or several. The tokenizer's format has calls (`can_call`)."""
    return Calls(ToolCallReader(format_of(tokenizer)), marks(tokenizer), 2**31 if parallel else 1)


def can_call(tokenizer: Tokenizer) -> bool:
    """The chat format has words for tools."""
    return bool(format_of(tokenizer))
