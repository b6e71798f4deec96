"""POST /tokenize and /detokenize: the requests, in vLLM's shapes."""

from typing import Annotated, ClassVar

from benthic.server.types.base import Strict, Within
from benthic.server.types.chat import Conversation
from benthic.server.types.sampling import TokenId
from benthic.server.wire import decode

Model = Annotated[str, Within("model")]


class TokenizeText(Strict):
    """A text to turn into token ids. One that is just the name of an added token is that token."""

    model: Model | None = None
    prompt: str
    add_special_tokens: bool = True
    """Begin with the begin-of-sentence token."""
    return_token_strs: bool = False
    """Give each token's text too."""


class TokenizeChat(Conversation):
    """A conversation to turn into the token ids of its prompt."""

    NEUTRAL: ClassVar = {"add_special_tokens": (False,)}
    model: Model | None = None
    return_token_strs: bool = False
    """Give each token's text too."""


class DetokenizeRequest(Strict):
    """Token ids to turn into text."""

    model: Model | None = None
    tokens: Annotated[list[TokenId], Within("tokens")]


def read_tokenize(body: bytes) -> TokenizeText | TokenizeChat:
    """Messages make it a conversation. ApiError 400 names what cannot be used."""
    fields = decode(body)
    return TokenizeChat.check(fields) if "messages" in fields else TokenizeText.check(fields)
