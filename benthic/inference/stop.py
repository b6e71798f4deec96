"""Text that ends where a stop string does, and never shows a part of one on the way."""

from collections.abc import Iterable, Sequence

from benthic.inference.config import SamplingParams
from benthic.tokenizer.stream import TextStream
from benthic.tokenizer.tokenizer import Tokenizer


class StopStrings:
    """Looks for the stop string that is complete first; of two that end together, the longer counts.

    Each character costs one step of a small automaton per stop string (Knuth, Morris, Pratt 1977), whatever they hold.
    """

    def __init__(self, stop: Iterable[str], include: bool = False):
        self._stop, self._include = tuple(stop), include
        self._borders = [_borders(stop) for stop in self._stop]
        self._matched = [0] * len(self._stop)  # characters of each that the text ends with
        self._held = ""
        self.hit = ""  # the stop string that was found; nothing after it counts

    def feed(self, text: str) -> tuple[str, str]:
        """The text that belongs to the answer for certain, and the stop string where one is complete, else ""."""
        if self.hit:
            return "", self.hit
        begin = len(self._held)
        self._held += text
        for end in range(begin, len(self._held)):
            if hit := self._step(self._held[end]):
                self.hit = hit
                return self._take(end + 1 - (0 if self._include else len(hit))), hit
        return self._take(len(self._held) - max(self._matched, default=0)), ""

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.hit else self._take(len(self._held))

    def _step(self, character: str) -> str:
        """Move every automaton; the longest stop string that is complete now, or ""."""
        hit = ""
        for i, (stop, borders) in enumerate(zip(self._stop, self._borders)):
            matched = self._matched[i]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            self._matched[i] = matched
            if matched == len(stop) > len(hit):
                hit = stop
        return hit

    def _take(self, length: int) -> str:
        out, self._held = self._held[:length], self._held[length:]
        return out


def _borders(text: str) -> list[int]:
    """For each beginning of the text, the longest shorter beginning that it ends with."""
    borders = [0] * len(text)
    for i in range(1, len(text)):
        k = borders[i - 1]
        while k and text[k] != text[i]:
            k = borders[k - 1]
        borders[i] = k + (text[k] == text[i])
    return borders


class Transcript:
    """The text of one answer, token by token, up to a stop string that is not in its first min_tokens."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._stream = TextStream(tokenizer, skip_special=True)
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self._free = params.min_tokens
        self.text = ""  # certain so far

    def feed(self, ids: Sequence[int]) -> int:
        """Add tokens; how many of them belong to the answer: up to the one that completes a stop string."""
        for count, id in enumerate(ids, 1):
            text = self._stream.feed((id,))
            if self._free > 0:
                self._free -= 1
                self.text += text
            else:
                safe, hit = self._stops.feed(text)
                self.text += safe
                if hit:
                    return count
        return len(ids)

    @property
    def hit(self) -> str:
        """The stop string that ended it."""
        return self._stops.hit

    def finish(self) -> str:
        """The whole text, once no more tokens come."""
        self.text += self._stops.feed(self._stream.finish())[0] + self._stops.finish()
        return self.text
