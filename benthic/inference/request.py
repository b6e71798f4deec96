"""A request on its way in, while it runs, and on its way out. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from benthic.inference.config import SamplingParams

FinishReason = Literal["stop", "length", "abort"]
NO_DRAFT = -1
Top = list[tuple[int, float]]  # the likeliest tokens of one place with their log-probabilities, best first


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and one sample of it (`params.n` must be 1: `SamplingParams.samples` makes n of them)."""

    prompt_token_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(slots=True, eq=False, kw_only=True)
class Seq:
    """A running request. The latents of `ids[:computed]` are in its pages; one uncomputed token means: decode."""

    request_id: int  # also the order of arrival
    ids: list[int]  # prompt, then answer
    prompt_len: int
    max_len: int  # bound of len(ids)
    params: SamplingParams
    stop: frozenset[int] = frozenset()
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    draft: int = NO_DRAFT  # guess for the token after ids[-1]
    logprobs: list[float] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)  # one per answer token where params.logprobs asks for it
    finish_reason: FinishReason | Literal[""] = ""

    def feed(self, count: int) -> list[int]:
        """The next `count` tokens to compute; at most one of them is the draft."""
        tokens = self.ids[self.computed : self.computed + count]
        return tokens if len(tokens) == count else [*tokens, self.draft]


class Delta(NamedTuple):
    """What one step added to one request. `finish_reason` is "" while it goes on."""

    request_id: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | Literal[""]


@dataclass(frozen=True, kw_only=True)
class Output:
    """A finished request.

    logprobs[i] is log softmax(logits)[token_ids[i]] of the model itself: float32 logits at temperature 1, nothing cut
    off, whatever temperature, top_k and top_p chose the token. It is the log pi(token) that policy gradients need.
    """

    request_id: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str  # "" without a tokenizer
    finish_reason: FinishReason
    top_logprobs: list[Top] = field(default_factory=list)
    """Per answer token the `params.logprobs` likeliest; [] where none are asked for."""
