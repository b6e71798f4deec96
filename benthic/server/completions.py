"""POST /v1/chat/completions: one conversation in, one answer out, whole or in server-sent events."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from benthic.base.errors import InputError
from benthic.inference.config import SamplingParams
from benthic.inference.request import Request as Generation
from benthic.server.answer import Answer, Decoder, Piece
from benthic.server.asgi import Message, Receive, Scope, Send
from benthic.server.errors import ApiError
from benthic.server.gate import caller
from benthic.server.limits import LIMITS
from benthic.server.protocol import ChatRequest, Reply, parse_chat, usage
from benthic.server.stream import Stream
from benthic.server.wire import DONE, dump, event
from benthic.server.worker import Worker
from benthic.tokenizer import chat
from benthic.tokenizer.runs import Rendered
from benthic.tokenizer.stream import TextStream
from benthic.tokenizer.templates import ThinkingRefused
from benthic.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes share."""

    name: str  # of the model, as clients see it
    tokenizer: Tokenizer
    worker: Worker
    max_model_len: int
    thinking: bool | None = None  # where a request leaves it open; None: the chat template's own way
    created: int = field(default_factory=lambda: int(time.time()))

    async def prepare(self, ask: ChatRequest) -> tuple[Rendered, Generation]:
        """Render the conversation, in a thread because a long one takes a while. ApiError 400 where it does not fit."""
        thinking = self.thinking if ask.thinking is None else ask.thinking
        try:
            prompt = await asyncio.to_thread(chat.render, list(ask.messages), self.tokenizer, True, thinking)
        except ThinkingRefused as error:
            raise ApiError(400, str(error), param="chat_template_kwargs.thinking") from error
        except InputError as error:
            raise ApiError(400, str(error), param="messages") from error
        room = min(self.max_model_len - len(prompt.ids), int(LIMITS["max_tokens"].high))
        if room < 1 or len(prompt.ids) > LIMITS["prompt_tokens"].high:
            raise _too_long("messages", f"the prompt has {len(prompt.ids)} tokens", self.max_model_len)
        if ask.max_tokens is not None and ask.max_tokens > room:
            sizes = f"the prompt has {len(prompt.ids)} tokens and max_tokens is {ask.max_tokens}"
            raise _too_long("max_tokens", sizes, self.max_model_len)
        params = SamplingParams(
            max_tokens=room if ask.max_tokens is None else ask.max_tokens,
            temperature=ask.temperature,
            top_p=ask.top_p,
            seed=secrets.randbits(63) if ask.seed is None else ask.seed,
        )
        return prompt, Generation(prompt_token_ids=list(prompt.ids), params=params)


class Chat:
    """POST /v1/chat/completions. An ASGI app, so that one block owns the place in the worker to the last byte."""

    def __init__(self, service: Service):
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ask = parse_chat(await Request(scope, receive).body())
        if ask.model != self._service.name:
            message = f"the model {ask.model!r} does not exist -> use {self._service.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        async with self._service.worker.open(caller(scope)) as stream:
            await _attended(receive, self._answer(ask, stream, _patient(send)))

    async def _answer(self, ask: ChatRequest, stream: Stream, send: Send) -> None:
        service = self._service
        prompt, generation = await service.prepare(ask)
        stream.start([generation])
        decoder = WithoutLead(TextStream(service.tokenizer, skip_special=True), prompt.lead)
        pieces = _pieces(stream, Answer(decoder, ask.stop, prompt.thinks))
        reply = Reply(id=f"chatcmpl-{secrets.token_hex(12)}", created=int(time.time()), model=service.name)
        try:
            if ask.stream:
                await _send_events(reply, pieces, len(prompt.ids), ask.include_usage, send)
            else:
                await _send_whole(reply, pieces, len(prompt.ids), send)
        except TimeoutError:
            return  # a client that does not read loses its answer


class WithoutLead:
    """A decoder that leaves out what the chat format has every answer begin with (V1's blank).

    Clients send answers back as messages, and the format would write it again.
    """

    def __init__(self, decoder: Decoder, lead: str):
        self._decoder, self._lead = decoder, lead

    def feed(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return self._bare(self._decoder.feed(ids))

    def finish(self) -> str:
        """What is left at the end."""
        return self._bare(self._decoder.finish())

    def _bare(self, text: str) -> str:
        if not text:
            return text
        lead, self._lead = self._lead, ""
        return text.removeprefix(lead)


Pieces = AsyncIterator[tuple[Piece, int, str]]


async def _pieces(stream: Stream, answer: Answer) -> Pieces:
    """Text as it becomes certain, and the tokens so far; the last piece has a finish reason."""
    async for _, delta in stream:
        piece, finish_reason = answer.feed(delta.token_ids), delta.finish_reason
        if answer.stopped or finish_reason:
            rest = answer.finish()
            piece = Piece(piece.reasoning + rest.reasoning, piece.content + rest.content)
            yield piece, answer.tokens, "stop" if answer.stopped else finish_reason
            return
        yield piece, answer.tokens, ""


async def _send_whole(reply: Reply, pieces: Pieces, prompt: int, send: Send) -> None:
    parts = [part async for part in pieces]
    reasoning, content = ("".join(texts) for texts in zip(*(piece for piece, _, _ in parts)))
    _, count, finish_reason = parts[-1]
    body = dump(reply.completion(reasoning, content, finish_reason, usage(prompt, count)))
    await _send_start(send, "application/json")
    await send({"type": "http.response.body", "body": body})


async def _send_events(reply: Reply, pieces: Pieces, prompt: int, include_usage: bool, send: Send) -> None:
    """Server-sent events. The status is sent with the first token, so whatever fails before it has its own status."""
    started = False
    try:
        async for piece, count, finish_reason in pieces:
            events = []
            if not started:
                events.append(event(reply.first()))
                await _send_start(send, "text/event-stream")
                started = True
            if any(piece):
                events.append(event(reply.chunk(*piece)))
            if finish_reason:
                events.append(event(reply.chunk("", "", finish_reason)))
                if include_usage:
                    events.append(event(reply.last(usage(prompt, count))))
                events.append(DONE)
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
    except ApiError as error:
        if not started:
            raise
        await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _patient(send: Send) -> Send:
    """`send` that gives up on a client which does not read what it gets."""

    async def patient(message: Message) -> None:
        async with asyncio.timeout(LIMITS["send_seconds"].high):
            await send(message)

    return patient


async def _send_start(send: Send, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _attended(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, unless the client hangs up first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})
    if not task.cancelled():
        task.result()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_long(param: str, sizes: str, max_model_len: int) -> ApiError:
    message = f"{sizes}; prompt and answer together may have {max_model_len} -> shorten the messages or max_tokens"
    return ApiError(400, message, param=param, code="context_length_exceeded")
