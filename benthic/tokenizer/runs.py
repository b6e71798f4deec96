"""Puts added tokens and runs of text together: ids and, in the same pass, which of them carry loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

from benthic.tokenizer.encoder import whole_characters
from benthic.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """ids of a conversation; mask is True on what the assistant says, its end token included."""

    ids: list[int]
    mask: list[bool]


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

    def rendered(self) -> Rendered:
        """What came so far."""
        self._end_run()
        return Rendered(ids=self._ids, mask=self._mask)

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
