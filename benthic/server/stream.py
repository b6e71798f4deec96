"""A place in the worker, and the tokens that arrive there. Everything here belongs to the event loop."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from benthic.inference.request import Delta, Request
from benthic.server.errors import ApiError
from benthic.server.queue import Entry

MAX_UNREAD = 4096  # tokens of one stream that wait for their reader


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket(Entry):
    """One request on its way through queue and engine."""

    stream: "Stream"
    index: int  # in its stream
    request: Request
    request_id: int = -1  # in the engine; belongs to its thread
    cached: int = -1  # tokens of its prompt that were found computed; -1 before its first delta
    count: int = 0  # tokens of its answer
    reason: str = ""  # why it ended: a finish reason, or error
    came: float = 0.0  # when it began to wait, by the loop's clock like the next three
    begun: float = 0.0  # when the engine got it
    first: float = 0.0  # when its first token came
    last: float = 0.0  # when its last token came


class Owner(Protocol):
    """What a stream needs of its worker."""

    def submit(self, tickets: list[Ticket]) -> None:
        """Have the tickets' requests run. ApiError 429 where there is no room for all of them."""
        ...

    def withdraw(self, tickets: list[Ticket]) -> None:
        """End the tickets' requests before the engine's next step."""
        ...

    def close(self, stream: "Stream") -> None:
        """Give the place back."""
        ...


class Stream:
    """`async with worker.open(client) as stream` gives the place back and ends the engine's work, however the block
    ends; inside, `stream.start(requests, deadline=...)` once and `async for index, delta in stream`.

    A deadline is in seconds since `open`; a stream whose deadline has passed, or whose reader lets more than MAX_UNREAD
    tokens wait, fails at once: its requests end where they are, and the reader gets the error instead of the tokens.
    """

    def __init__(self, owner: Owner, client: str, deadline: float):
        self.client = client
        self.tickets: list[Ticket] = []
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.opened = self._loop.time()
        self._deadline = deadline
        self._timer = self._loop.call_at(self.opened + deadline, self._expire)
        self._error: ApiError | None = None
        self._news: dict[int, list[Delta]] = {}  # by index, what the reader has not taken
        self._unread = 0  # tokens in `_news`
        self._left = 0  # requests that go on
        self._waiting: asyncio.Future[None] | None = None  # the reader, where there are no news

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()
        self._end()
        self._owner.close(self)

    def start(self, requests: Sequence[Request], *, deadline: float | None = None) -> None:
        """Have the requests run. `deadline` may only shorten the server's. Raises ApiError 429 without room for all."""
        if self._error is not None:
            raise self._error
        if self.tickets:
            raise RuntimeError("a stream is started once")
        if deadline is not None and deadline < self._deadline:
            self._deadline = deadline
            self._timer.cancel()
            self._timer = self._loop.call_at(self.opened + deadline, self._expire)
        tickets = [
            Ticket(
                client=self.client, tokens=len(request.prompt_token_ids), priority=request.priority, stream=self,
                index=index, request=request,
            )
            for index, request in enumerate(requests)
        ]  # fmt: skip
        self._owner.submit(tickets)
        self.tickets, self._left = tickets, len(tickets)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        """What has arrived for one of the requests since its last turn; ends when all have ended. Raises ApiError."""
        while self._error is None and not self._news:
            if not self._left:
                raise StopAsyncIteration
            self._waiting = self._loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if self._error is not None:
            raise self._error
        index = next(iter(self._news))
        delta = merge(self._news.pop(index))
        self._unread -= len(delta.token_ids)
        return index, delta

    def cut(self, index: int) -> None:
        """End one of the requests: its reader wants no more of it."""
        ticket = self.tickets[index]
        self._unread -= sum(len(delta.token_ids) for delta in self._news.pop(index, []))
        if ticket.state != "ended":
            self._left -= 1
            self._owner.withdraw([ticket])

    # For the worker

    @property
    def failed(self) -> bool:
        """It ended with an error."""
        return self._error is not None

    def feed(self, ticket: Ticket, delta: Delta) -> None:
        """Add what one step brought to one request."""
        if delta.finish_reason:
            self._left -= 1
        self._news.setdefault(ticket.index, []).append(delta)
        self._unread += len(delta.token_ids)
        if self._unread > MAX_UNREAD:
            self.fail(ApiError(408, f"more than {MAX_UNREAD} tokens were left unread", code="slow_reader"))
        else:
            self._wake()

    def fail(self, error: ApiError) -> None:
        """End all requests with an error, unless the last tokens of all have arrived."""
        if self._error is None and (self._left or not self.tickets):
            self._error = error
            self._news.clear()
            self._end()
            self._wake()

    def _expire(self) -> None:
        message = f"the request was not done within its {self._deadline:g} seconds -> ask for less, or allow more time"
        self.fail(ApiError(504, message, code="deadline_exceeded"))

    def _end(self) -> None:
        unfinished = [ticket for ticket in self.tickets if ticket.state != "ended"]
        if unfinished:
            self._left = 0
            self._owner.withdraw(unfinished)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def merge(deltas: list[Delta]) -> Delta:
    """Deltas of one request, in their order, as one."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return last._replace(
        token_ids=[id for delta in deltas for id in delta.token_ids],
        logprobs=[value for delta in deltas for value in delta.logprobs],
        tops=[top for delta in deltas for top in delta.tops],
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
    )
