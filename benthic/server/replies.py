"""Answers and chunks in OpenAI's shapes."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from benthic.inference.request import PromptPlace
from benthic.server.answer import Piece, Token
from benthic.server.types.replies import (
    AssistantReply,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    FinishReason,
    Likely,
    PromptLogprobs,
    TokenLogprob,
    Usage,
)
from benthic.tokenizer.tokenizer import Tokenizer

LEAST = -9999.0  # what a log-probability is at least: JSON has no infinity


class Whole(NamedTuple):
    """One whole answer, its prompt, and what the model thought of the prompt's tokens where that was asked for."""

    piece: Piece
    finish_reason: FinishReason
    prompt_ids: Sequence[int]
    places: Sequence[PromptPlace | None] | None


class Replies(Protocol):
    """The two routes that generate differ in this."""

    def opening(self, index: int) -> Any:
        """The chunk that begins an answer in a stream; None where there is none."""
        ...

    def chunk(self, index: int, piece: Piece, finish_reason: FinishReason | None) -> Any:
        """A piece of an answer in a stream."""
        ...

    def last(self, usage: Usage) -> Any:
        """The chunk that carries the token counts and no choice."""
        ...

    def whole(self, answers: Sequence[Whole], usage: Usage) -> Any:
        """All answers at once."""
        ...


class Spelled:
    """Tokens as log-probabilities show them."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool):
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, id: int) -> str:
        """The token's text; bytes that are no character show as U+FFFD."""
        return f"token_id:{id}" if self._as_ids else self._tokenizer.decode([id])

    def key(self, id: int) -> str:
        """The same for the old format, which has no other place for the bytes."""
        if self._as_ids:
            return f"token_id:{id}"
        data = self._tokenizer.bytes_of(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def likely(self, id: int, logprob: float | None) -> Likely:
        """A token with its log-probability."""
        return {"token": self.text(id), "logprob": finite(logprob), "bytes": list(self._tokenizer.bytes_of(id))}

    def entry(self, token: Token) -> TokenLogprob:
        """A token of the answer, with the likeliest ones in its place."""
        return {
            **self.likely(token.id, token.logprob),
            "top_logprobs": [self.likely(id, logprob) for id, logprob in token.top],
        }

    def prompt(self, whole: Whole, most: int) -> PromptLogprobs:
        """The prompt's tokens in vLLM's shape: {token id: ...}, the `most` likeliest and the token itself."""
        entries: PromptLogprobs = []
        for id, place in zip(whole.prompt_ids, whole.places or []):
            if place is None:
                entries.append(None)
                continue
            ranked = [(other, logprob, i + 1) for i, (other, logprob) in enumerate(place.top[:most])]
            if all(other != id for other, _, _ in ranked):
                ranked.append((id, place.logprob, place.rank))
            entries.append(
                {
                    str(other): {"logprob": finite(logprob), "rank": rank, "decoded_token": self.text(other)}
                    for other, logprob, rank in ranked
                }
            )
        return entries


class ChatReplies:
    """Of /v1/chat/completions."""

    def __init__(self, model: str, spelled: Spelled, logprobs: bool, prompt_logprobs: int | None):
        self._id, self._created, self._model = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model
        self._spelled, self._logprobs, self._prompt_logprobs = spelled, logprobs, prompt_logprobs

    def opening(self, index: int) -> ChatChunk:
        """The role."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, piece: Piece, finish_reason: FinishReason | None) -> ChatChunk:
        """A piece, and the finish reason with the last one."""
        delta: ChatDelta = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.content:
            delta["content"] = piece.content
        if piece.calls:
            delta["tool_calls"] = [_call_delta(call) for call in piece.calls]
        return self._chunk(index, delta, self._of(piece), finish_reason)

    def last(self, usage: Usage) -> ChatChunk:
        """The token counts."""
        return self._event([], usage)

    def whole(self, answers: Sequence[Whole], usage: Usage) -> ChatReply:
        """`reasoning_content` and `tool_calls` are present only where there are some."""
        choices: list[ChatChoice] = [
            {
                "index": index,
                "message": _message(answer.piece),
                "logprobs": self._of(answer.piece, always=True),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        reply: ChatReply = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage,
        }
        if self._prompt_logprobs is not None:
            reply["prompt_logprobs"] = self._spelled.prompt(answers[0], self._prompt_logprobs)
        return reply

    def _of(self, piece: Piece, always: bool = False) -> ChatLogprobs | None:
        if not self._logprobs or not (piece.tokens or always):
            return None
        return {"content": [self._spelled.entry(token) for token in piece.tokens], "refusal": None}

    def _chunk(
        self, index: int, delta: ChatDelta, logprobs: ChatLogprobs | None, finish_reason: FinishReason | None
    ) -> ChatChunk:
        choices: Any = [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        return self._event(choices, None)

    def _event(self, choices: Any, usage: Usage | None) -> ChatChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage,
        }


class CompletionReplies:
    """Of /v1/completions."""

    def __init__(self, model: str, spelled: Spelled, logprobs: bool, prompt_logprobs: int | None):
        self._id, self._created, self._model = f"cmpl-{secrets.token_hex(12)}", int(time.time()), model
        self._spelled, self._logprobs, self._prompt_logprobs = spelled, logprobs, prompt_logprobs

    def opening(self, index: int) -> None:
        """There is no role to tell."""
        return None

    def chunk(self, index: int, piece: Piece, finish_reason: FinishReason | None) -> CompletionReply:
        """A piece, and the finish reason with the last one."""
        return self._reply([self._choice(index, piece, finish_reason)], None)

    def last(self, usage: Usage) -> CompletionReply:
        """The token counts."""
        return self._reply([], usage)

    def whole(self, answers: Sequence[Whole], usage: Usage) -> CompletionReply:
        """All answers, those to one prompt together."""
        choices = [self._choice(index, answer.piece, answer.finish_reason) for index, answer in enumerate(answers)]
        if self._prompt_logprobs is not None:
            for choice, answer in zip(choices, answers):
                choice["prompt_logprobs"] = self._spelled.prompt(answer, self._prompt_logprobs)
        return self._reply(choices, usage)

    def _choice(self, index: int, piece: Piece, finish_reason: FinishReason | None) -> CompletionChoice:
        logprobs = self._of(piece.tokens) if self._logprobs else None
        return {"index": index, "text": piece.content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _of(self, tokens: Sequence[Token]) -> CompletionLogprobs:
        return {
            "tokens": [self._spelled.key(token.id) for token in tokens],
            "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens, and the token itself where it is none of them."""
        if token.logprob is None:
            return None
        return {self._spelled.key(id): finite(logprob) for id, logprob in [*token.top, (token.id, token.logprob)]}

    def _reply(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionReply:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": usage,
        }


def _message(piece: Piece) -> AssistantReply:
    message: AssistantReply = {"role": "assistant", "content": piece.content or (None if piece.calls else "")}
    if piece.reasoning:
        message["reasoning_content"] = piece.reasoning
    if piece.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in piece.calls
        ]
    return message


def _call_delta(call: Any) -> CallDelta:
    if not call.id:
        return {"index": call.number, "function": {"arguments": call.arguments}}
    function: Any = {"name": call.name, "arguments": call.arguments}
    return {"index": call.number, "id": call.id, "type": "function", "function": function}


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can carry."""
    return logprob if logprob is not None and logprob > LEAST else LEAST
