"""Tool calls in an answer, read while they arrive.

The tokens around calls count as such, not by their names, which any text may hold: in the text of
`TextStream(tokenizer, marks=marks(tokenizer))` each of them is one mark, a lone surrogate, which no bytes decode to.
Stop strings and thinking tags are found in it as ever; `plain` gives it back with names in place of marks.

Formats (`templates.Tools`), without the marks' names: CALLS (CALL function SEP name fence arguments fence END_CALL)+
END_CALLS of V3 and R1, CALLS (CALL name SEP arguments END_CALL)+ END_CALLS of V3.1. What a call lacks at its end, the
next mark makes up for; what has no proper beginning is content.
"""

import re
from dataclasses import dataclass

from benthic.base.errors import InputError
from benthic.tokenizer.templates import TEMPLATES
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.tokenizer.tokens import CALL, CALLS, END_CALL, END_CALLS, SEP
from benthic.tokenizer.tools import NAME

MARKS = dict(zip((CALLS, END_CALLS, CALL, END_CALL, SEP), "\ud800\ud801\ud802\ud803\ud804"))
_NAMES = {ord(mark): name for name, mark in MARKS.items()}
_BEGIN = re.compile(f"[{MARKS[CALLS]}{MARKS[CALL]}]")
_END = re.compile(f"[{MARKS[CALLS]}{MARKS[END_CALLS]}{MARKS[CALL]}{MARKS[END_CALL]}]")
_FENCE = "```"
_MOST_SPACE = 64  # characters between calls


@dataclass(frozen=True, slots=True)
class ToolPiece:
    """Text of the answer, or of call number `index` its name, whole and first, or further text of its arguments."""

    content: str = ""
    index: int = -1
    name: str = ""
    arguments: str = ""


def marks(tokenizer: Tokenizer) -> dict[int, str]:
    """The mark of each token around calls that the tokenizer has."""
    return {tokenizer.special[name]: mark for name, mark in MARKS.items() if name in tokenizer.special}


def plain(text: str) -> str:
    """Text with the names of tokens in place of their marks."""
    return text.translate(_NAMES)


def format_of(tokenizer: Tokenizer) -> str:
    """The name of the format in which the model calls tools, "" where there is none. A template that is none of ours is
    judged by how it writes calls."""
    if CALLS not in tokenizer.special:
        return ""
    if tokenizer.template:
        return tokenizer.template if TEMPLATES[tokenizer.template].tools else ""
    if SEP not in tokenizer.chat_template:
        return ""
    return "v3" if "```json" in tokenizer.chat_template else "v3.1"


class ToolCallReader:
    """Text with marks in, pieces out. They do not depend on how much text comes at once; held back is only what may
    still turn out to be the beginning of a call, or the end of its arguments."""

    def __init__(self, template: str):
        tools = TEMPLATES[template].tools if template in TEMPLATES else None
        if tools is None:
            raise InputError(f"template {template!r} has no tool calls -> use one that has")
        before, middle, after = (_marked(part) for part in tools.call)
        self._before, self._middle, self._fenced = before, middle, len(after) > 1
        self._text = ""  # held back
        self._state = self._content
        self._pieces: list[ToolPiece] = []
        self.count = 0  # calls that have begun

    @property
    def held(self) -> int:
        """Characters that are held back now."""
        return len(self._text)

    def feed(self, text: str) -> list[ToolPiece]:
        """What is certain of `text` and what was held back."""
        self._text += text
        while self._state():
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[ToolPiece]:
        """What was held back, once no more text comes: the beginning of a call is content, the arguments of a call that
        has begun end here."""
        rest, self._text = self._text, ""
        ended = self._state == self._arguments or not rest.strip()
        return [] if ended else [ToolPiece(content=plain(rest))]

    # Each state takes what it can of the text; False where more is needed.

    def _content(self) -> bool:
        begin = _BEGIN.search(self._text)
        if said := self._take(begin.start() if begin else len(self._text)):
            self._pieces.append(ToolPiece(content=plain(said)))
        if begin:
            self._state = self._head
        return begin is not None

    def _head(self) -> bool:
        """From CALLS, or from the end of a call, to where arguments begin."""
        inside = self._text.removeprefix(MARKS[CALLS])
        rest = inside.lstrip()
        if len(inside) - len(rest) > _MOST_SPACE:
            pass
        elif rest.startswith(self._before):
            begun = rest[len(self._before) :]
            name = NAME.match(begun)
            tail = begun[name.end() :] if name else begun
            if name and tail.startswith(self._middle):
                self._pieces.append(ToolPiece(index=self.count, name=name[0]))
                self.count += 1
                self._text, self._state = tail[len(self._middle) :], self._arguments
                return True
            if self._middle.startswith(tail) and (name or not tail):
                return False
        elif self._before.startswith(rest):
            return False
        elif rest.startswith(MARKS[END_CALLS]) and not _BEGIN.match(self._text):
            self._text, self._state = rest[1:], self._content
            return True
        self._state = self._content  # no call: its first mark is text, and another may follow
        if _BEGIN.match(self._text):
            self._pieces.append(ToolPiece(content=plain(self._take(1))))
        return True

    def _arguments(self) -> bool:
        end = _END.search(self._text)
        found = self._take(end.start() if end else len(self._text))
        sure = _without_fence(found) if self._fenced else found
        if sure:
            self._pieces.append(ToolPiece(index=self.count - 1, arguments=plain(sure)))
        if end is None:
            self._text = found[len(sure) :]
            return False
        self._text, self._state = self._text.removeprefix(MARKS[END_CALL]), self._head
        return True

    def _take(self, length: int) -> str:
        out, self._text = self._text[:length], self._text[length:]
        return out


def _without_fence(text: str) -> str:
    """Text without what may be the end of fenced arguments, or the beginning of that end."""
    bare = text.rstrip()
    if bare.endswith(_FENCE):
        return bare.removesuffix(_FENCE).rstrip()
    return bare.rstrip("`").rstrip() if bare == text and text.endswith("`") else bare


def _marked(text: str) -> str:
    for name, mark in MARKS.items():
        text = text.replace(name, mark)
    return text
