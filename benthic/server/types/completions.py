"""POST /v1/completions: the request."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Discriminator, Tag, model_validator

from benthic.server.limits import LIMITS
from benthic.server.types.base import TAG, Within, fault
from benthic.server.types.sampling import NO_EFFECT, NOTHING, Sampling, TokenId

Ids = Annotated[list[TokenId], Within("prompt_tokens")]


def _by_kind(value: Any) -> str:
    """Of an empty or odd list the branch whose errors are clearest."""
    if not isinstance(value, list):
        return f"{TAG}text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return f"{TAG}lists"
    return f"{TAG}texts" if isinstance(first, str) else f"{TAG}ids"


Prompt = Annotated[
    Annotated[str, Tag(f"{TAG}text")]
    | Annotated[Annotated[list[str], Within("prompts")], Tag(f"{TAG}texts")]
    | Annotated[Ids, Tag(f"{TAG}ids")]
    | Annotated[Annotated[list[Ids], Within("prompts")], Tag(f"{TAG}lists")],
    Discriminator(_by_kind),
]


class CompletionRequest(Sampling):
    """One or several prompts to go on with."""

    HARMLESS: ClassVar = NO_EFFECT
    NEUTRAL: ClassVar = {**NOTHING, "suffix": (), "prompt_embeds": (), "kv_transfer_params": ()}
    prompt: Prompt
    """A text, several texts, token ids, or several lists of token ids."""
    echo: bool = False
    """Begin the answer with the prompt."""
    logprobs: Annotated[int, Within("logprobs")] | None = None
    """Report log-probabilities of the answer's tokens (and of the prompt's, with echo), beside so many likeliest."""
    add_special_tokens: bool = True
    """Begin a prompt that is text with the begin-of-sentence token."""

    @model_validator(mode="after")
    def _of_completions(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise fault("is 0; use 1 or more, or echo", "max_tokens")
        if self.stream and self.echo and self.logprobs is not None and len(self.prompts) > 1:
            raise fault("not for several prompts in a stream with echo; ask for one at a time", "logprobs")
        answers = len(self.prompts) * self.n
        if answers > LIMITS["answers"].high:
            raise fault(f"makes {answers:,} answers; use at most {LIMITS['answers'].high:,} prompts times n", "n")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, as texts or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return self.prompt if isinstance(self.prompt[0], str | list) else [self.prompt]  # type: ignore[return-value]
