"""From the worker's stream to the client: pieces as they become certain, whole answers or server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, NamedTuple

from benthic.inference.request import Delta, PromptPlace
from benthic.server.answer import Answer, Piece, Token, joined
from benthic.server.asgi import Message, Receive, Send
from benthic.server.errors import ApiError
from benthic.server.limits import LIMITS
from benthic.server.prepare import Job
from benthic.server.replies import Replies, Whole
from benthic.server.stream import Stream
from benthic.server.types.replies import FinishReason, Usage
from benthic.server.wire import DONE, dump, event


class News(NamedTuple):
    """What arrived for one of the answers."""

    answer: int
    piece: Piece
    finish_reason: FinishReason | None


class Reading:
    """The answers of one job while they arrive."""

    def __init__(self, stream: Stream, job: Job, answers: Sequence[Answer]):
        self._stream, self._job, self._answers = stream, job, answers
        self._cached = [0] * len(job.prompts)
        self._places: dict[int, list[PromptPlace | None]] = {}  # by answer, where they are asked for
        self._begun: set[int] = set()

    async def news(self) -> AsyncIterator[News]:
        """Until all answers have ended. Raises ApiError."""
        async for index, delta in self._stream:
            answer, reason = self._answers[index], delta.finish_reason
            if reason == "abort":
                raise ApiError(400, "the form of the answer takes too long to follow -> ask for a simpler one")
            pieces = [] if index in self._begun else [self._begin(index, delta)]
            if not self._job.mute:
                pieces += answer.feed(delta.token_ids, delta.logprobs, delta.tops)
            if answer.stopped:
                if not reason:
                    self._stream.cut(index)
                reason = "stop"
            if reason:
                pieces += answer.finish()
                if self._job.mute:
                    reason = "length"
                elif answer.called and reason == "stop":
                    reason = "tool_calls"
            yield News(index, joined(pieces), reason or None)

    def _begin(self, index: int, delta: Delta) -> Piece:
        """What comes before the first token: the prompt, where it is echoed."""
        self._begun.add(index)
        number = index // self._job.n
        if index % self._job.n == 0:
            self._cached[number] = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self._places[index] = delta.prompt_logprobs
        prompt = self._job.prompts[number]
        tokens = [
            Token(id, place.logprob if place else None, place.top if place else [], offset)
            for id, place, offset in zip(prompt.ids, self._places.get(index, []), prompt.offsets)
        ]
        return Piece(content=prompt.text, tokens=tuple(tokens))

    async def wholes(self) -> list[Whole]:
        """All answers, once they have ended. Raises ApiError."""
        pieces: list[list[Piece]] = [[] for _ in self._answers]
        reasons: dict[int, FinishReason] = {}
        async for index, piece, reason in self.news():
            pieces[index].append(piece)
            if reason:
                reasons[index] = reason
        return [
            Whole(joined(parts), reasons[i], self._job.prompts[i // self._job.n].ids, self._places.get(i))
            for i, parts in enumerate(pieces)
        ]

    @property
    def usage(self) -> Usage:
        """Token counts up to now."""
        prompt, completion = self._job.prompt_tokens, sum(answer.tokens for answer in self._answers)
        reasoning = sum(answer.reasoning_tokens for answer in self._answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }


async def send_whole(reading: Reading, replies: Replies, send: Send) -> None:
    """All answers at once."""
    wholes = await reading.wholes()
    body = dump(replies.whole(wholes, reading.usage))
    await _start(send, "application/json")
    await send({"type": "http.response.body", "body": body})


async def send_events(reading: Reading, replies: Replies, include_usage: bool, send: Send) -> None:
    """Server-sent events. The status is sent with the first token, so whatever fails before it has its own status."""
    begun: set[int] = set()
    try:
        async for index, piece, reason in reading.news():
            if not begun:
                await _start(send, "text/event-stream")
            events = b""
            if index not in begun:
                begun.add(index)
                opening = replies.opening(index)
                events += event(opening) if opening is not None else b""
            if any(piece) or reason:
                events += event(replies.chunk(index, piece, reason))
            if events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
        end = event(replies.last(reading.usage)) if include_usage else b""
        await send({"type": "http.response.body", "body": end + DONE, "more_body": True})
    except ApiError as error:
        if not begun:
            raise
        await send({"type": "http.response.body", "body": event(error.body()), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def patient(send: Send) -> Send:
    """`send` that gives up with TimeoutError on a client which does not read what it gets."""

    async def patient(message: Message) -> None:
        async with asyncio.timeout(LIMITS["send_seconds"].high):
            await send(message)

    return patient


async def attended(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
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


async def _start(send: Send, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
