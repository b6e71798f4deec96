"""POST /tokenize and /detokenize, GET /tokenizer_info: the tokenizer from outside, in vLLM's shapes."""

from dataclasses import dataclass

from starlette.responses import Response

from benthic.server.prepare import encode, render
from benthic.server.route import Route, get, json_response, post
from benthic.server.service import Service
from benthic.server.types.replies import DetokenizeReply, TokenizeReply, TokenizerInfo
from benthic.server.types.tokens import DetokenizeRequest, TokenizeChat, TokenizeText, read_tokenize


@dataclass(frozen=True)
class Tokens:
    """The served model's tokenizer."""

    service: Service

    async def tokenize(self, ask: TokenizeText | TokenizeChat) -> Response:
        """Ids of a text or of a conversation's prompt."""
        self.service.check_model(ask.model)
        tokenizer = self.service.tokenizer
        if isinstance(ask, TokenizeChat):
            ids = (await render(self.service, ask)).ids
        elif ask.prompt in tokenizer.special:  # how clients ask for the id of an end of sentence
            ids = [tokenizer.id_of(ask.prompt)]
        else:
            ids = await encode(self.service, ask.prompt, ask.add_special_tokens)
        reply: TokenizeReply = {
            "count": len(ids),
            "max_model_len": self.service.max_model_len,
            "tokens": ids,
            "token_strs": [tokenizer.decode([id]) for id in ids] if ask.return_token_strs else None,
        }
        return json_response(reply)

    async def detokenize(self, ask: DetokenizeRequest) -> Response:
        """The text of ids, control tokens included."""
        self.service.check_model(ask.model)
        self.service.check_ids(ask.tokens, "tokens")
        reply: DetokenizeReply = {"prompt": self.service.tokenizer.decode(ask.tokens)}
        return json_response(reply)

    async def info(self) -> Response:
        """What the tokenizer is."""
        tokenizer = self.service.tokenizer
        names = {id: name for name, id in tokenizer.special.items()}
        reply: TokenizerInfo = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": self.service.max_model_len,
            "bos_token": names[tokenizer.bos_id],
            "eos_token": names[tokenizer.eos_id],
            "pad_token": names[tokenizer.pad_id],
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
            "added_tokens": tokenizer.special,
            "chat_template": tokenizer.chat_template,
        }
        return json_response(reply)


def routes(service: Service) -> list[Route]:
    """All three."""
    tokens = Tokens(service)
    return [
        post("/tokenize", tokens.tokenize, read_tokenize, TokenizeReply, "Text or conversation to token ids"),
        post("/detokenize", tokens.detokenize, DetokenizeRequest.read, DetokenizeReply, "Token ids to text"),
        get("/tokenizer_info", tokens.info, TokenizerInfo, "What the tokenizer is"),
    ]
