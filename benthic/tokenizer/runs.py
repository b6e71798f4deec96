"""Puts added tokens and runs of text together: ids and, in the same pass, which of them carry loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

from benthic.tokenizer.encoder import whole_characters
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.tokenizer.tokens import THINK


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """ids of a conversation; mask is True on what the assistant says, its end token included.

    Of a prompt: `opening` is what it already holds of the answer (R1's `<think>`), `lead` the text with which the
    format has every answer begin (V1's blank).
    """

    ids: list[int]
    mask: list[bool]
    opening: str = ""
    lead: str = ""

    @property
    def thinks(self) -> bool:
        """The answer to this prompt begins inside a thought."""
        return self.opening.startswith(THINK)

    def content(self, text: str) -> str:
        """The message content for an answer whose generated `text`, without the end token, follows this prompt.

        Rendered as the newest answer it gives this prompt and the text again, an unfinished thought included.
        """
        return (self.opening if self.thinks else "") + text.removeprefix(self.lead)


class Runs:
    """Text between two added tokens is encoded as one run, so that ids do not depend on how it came in pieces."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._mask: list[bool] = []
        self._run: list[tuple[str, bool]] = []

    def text(self, text: str, trained: bool) -> None:
        """Plain text: the name of an added token in it is only text."""
        self._run.append((whole_characters(text), trained))

    def token(self, id: int, trained: bool) -> None:
        """One added token; the run of text before it ends."""
        self._end_run()
        self._ids.append(id)
        self._mask.append(trained)

    def rendered(self, opening: str = "", lead: str = "") -> Rendered:
        """What came so far; for a prompt, also how the answer begins."""
        self._end_run()
        return Rendered(ids=self._ids, mask=self._mask, opening=opening, lead=lead)

    def _end_run(self) -> None:
        """A token that reaches over the border between two pieces belongs to the second: it is what must be said."""
        pieces = [("".join(text for text, _ in group), trained) for trained, group in groupby(self._run, _trained)]
        ids = self._tokenizer.encode("".join(text for text, _ in pieces))
        before = ""
        for text, trained in pieces:
            start = _shared(self._tokenizer.encode(before), ids) if before else 0
            del self._mask[len(self._ids) + start :]
            self._mask += [trained] * (len(ids) - start)
            before += text
        self._ids += ids
        self._run = []


def _trained(piece: tuple[str, bool]) -> bool:
    return piece[1]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading ids in which `a` and `b` agree."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
