"""A request on its way in, while it runs, and on its way out. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from benthic.inference.config import SamplingParams

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length", "abort"]
Top = list[tuple[int, float]]  # the likeliest tokens of one place with their log-probabilities, best first


class PromptPlace(NamedTuple):
    """What the model thought of one prompt token, given those before it."""

    logprob: float  # log softmax(logits)[token], as of answer tokens
    rank: int  # 1 for the likeliest token; one more for each that is likelier
    top: Top  # the `params.prompt_logprobs` likeliest tokens


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and one sample of it (`params.n` must be 1: `SamplingParams.samples` makes n of them)."""

    prompt_token_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Smaller numbers go first; equal ones in order of arrival."""
    cache_salt: str = ""
    """Cached prefixes are shared only among requests with the same salt, so that others cannot time what was asked."""


@dataclass(slots=True, eq=False, kw_only=True)
class Seq:
    """An unfinished request. What was committed is exact: the latents of `ids[:computed]` are in its pages. What is in
    flight is a bound: once it is committed, between `start` and `start + slack` tokens will be computed. Without steps
    in flight start = computed and slack = 0."""

    request_id: int  # also the order of arrival
    ids: list[int]  # prompt, then answer
    prompt_len: int
    max_len: int  # bound of len(ids)
    params: SamplingParams
    priority: int = 0
    salt: str = ""
    num_drafts: int = 0  # most drafts that one of its steps makes for the next
    min_len: int = 0  # a stop token among ids[:min_len] does not stop
    stop: frozenset[int] = frozenset()

    pages: list[int] = field(default_factory=list)
    computed: int = 0
    fill: int = 0  # tokens to compute before it decodes: those that were known when it was admitted
    published: int = 0  # its first pages that the pool knows by content
    node: int = 0  # of the last of them
    cached_tokens: int = -1  # prompt tokens that it found computed at its first admission; -1 before

    flying: int = 0  # steps in flight that hold a row of it
    start: int = 0
    slack: int = 0
    row: int = -1  # its row in the last step
    made: int = 0  # drafts that it makes there

    drafts: list[int] = field(default_factory=list)  # guesses for the tokens after ids[-1]
    logprobs: list[float] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)  # one per answer token where params.logprobs asks for it
    scores: list[PromptPlace] = field(default_factory=list)  # of its prompt from the second token on
    finish_reason: FinishReason | Literal[""] = ""

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of its prompt are asked for and not all known."""
        return self.params.prompt_logprobs >= 0 and len(self.scores) < self.prompt_len - 1

    @property
    def prompt_logprobs(self) -> list[PromptPlace | None] | None:
        """As of `Output`."""
        if self.params.prompt_logprobs < 0 or not self.logprobs:
            return None
        return [None, *self.scores]

    @property
    def rank(self) -> tuple[int, int]:
        """Who comes first: the smallest priority, then the earliest arrival."""
        return self.priority, self.request_id

    def feed(self, count: int) -> list[int]:
        """The next `count` tokens to compute, drafts after known ones. Without steps in flight."""
        tokens = self.ids[self.computed : self.computed + count]
        return tokens + self.drafts[: count - len(tokens)]


class Delta(NamedTuple):
    """What one step added to one request. `finish_reason` is "" while it goes on."""

    request_id: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | Literal[""]
    tops: Sequence[Top] = ()  # per token the `params.logprobs` likeliest; empty where none are asked for
    num_cached_tokens: int = 0  # prompt tokens that were found computed, the same in every delta of a request
    prompt_logprobs: list[PromptPlace | None] | None = None  # as of `Output`, in the delta with the first token

    @classmethod
    def of(cls, seq: Seq, new: int) -> "Delta":
        """What is to be said of the last `new` tokens of a request."""
        first = len(seq.logprobs) - new
        return cls(
            request_id=seq.request_id,
            token_ids=seq.ids[len(seq.ids) - new :],
            logprobs=seq.logprobs[first:],
            finish_reason=seq.finish_reason,
            tops=seq.tops[first:],
            num_cached_tokens=max(0, seq.cached_tokens),
            prompt_logprobs=seq.prompt_logprobs if new and first == 0 else None,
        )


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
    num_cached_tokens: int = 0
    """Tokens of the prompt whose latents were found computed."""
    top_logprobs: list[Top] = field(default_factory=list)
    """Per answer token the `params.logprobs` likeliest; [] where none are asked for."""
    prompt_logprobs: list[PromptPlace | None] | None = None
    """With `params.prompt_logprobs` one entry per prompt token, None for the first, which nothing stands before. None
    where they are not asked for, and for a request that was aborted before its first token."""
    routed_experts: "np.ndarray | None" = field(default=None, compare=False, repr=False)
    """With `return_routed_experts`: the experts [tokens, mixture layers, K] of prompt and answer but its last token, in
    the pass that the log-probabilities come from, cached prefixes included. Those of prediction modules are not."""
