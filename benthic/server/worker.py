"""One thread owns the engine. The event loop hands it requests through a queue and never waits for a step."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from benthic.base.errors import InputError
from benthic.inference.request import Delta, Request
from benthic.server.errors import ApiError
from benthic.server.queue import Full, Queue
from benthic.server.stream import Stream, Ticket

log = logging.getLogger("benthic.server")


class Step(Protocol):
    """What the worker reads of a step."""

    @property
    def deltas(self) -> Sequence[Delta]: ...


class Engine(Protocol):
    """What the worker needs of an engine (`benthic.inference.engine.Engine`)."""

    def add(self, request: Request) -> int:
        """Queue a request; InputError where it cannot run."""
        ...

    def abort(self, request_id: int) -> None:
        """Forget an unfinished request and free what it holds."""
        ...

    def step(self) -> Step:
        """Advance the requests of one batch; `deltas` says by what."""
        ...

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do or to report."""
        ...

    def close(self) -> None:
        """End what runs beside this process."""
        ...


class Watch(Protocol):
    """Who is told what happens to requests (`benthic.server.metrics.Metrics`)."""

    def arrived(self, ticket: Ticket, tokens: int, now: float) -> None:
        """Tokens of a request, before its own count of them changes."""
        ...

    def ended(self, ticket: Ticket, now: float) -> None:
        """A request has ended, for `ticket.reason`."""
        ...


class Unwatched:
    """Nobody."""

    def arrived(self, ticket: Ticket, tokens: int, now: float) -> None:
        """Nothing to do."""

    def ended(self, ticket: Ticket, now: float) -> None:
        """Nothing to do."""


class Worker:
    """Requests wait in `turns` until the engine has a place; each may take `request_timeout` seconds, waiting included.

    The engine gets no priorities: those of a request hold among its client's own.
    """

    def __init__(self, engine: Engine, turns: Queue[Ticket], request_timeout: float = 3600.0):
        self._engine = engine
        self._watch: Watch = Unwatched()
        self._turns = turns  # event loop only, like the next three
        self._request_timeout = request_timeout
        self._open: set[Stream] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="benthic-engine", daemon=True)
        self._running: dict[int, Ticket] = {}  # engine thread only
        self._stopped = False  # the same
        self.refusal = ""  # why no request is accepted; "" while they are

    def run(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def watch(self, watch: "Watch") -> None:
        """Have `watch` told of what happens to requests."""
        self._watch = watch

    # On the event loop

    def open(self, client: str) -> Stream:
        """Begin a call of `client`. Raises ApiError 503 while none is accepted, 429 where it would find no room."""
        if self.refusal:
            raise ApiError(503, self.refusal, code="unavailable", headers=(("retry-after", "1"),))
        begun = sum(not stream.tickets for stream in self._open if stream.client == client)
        try:
            self._turns.check(client, begun + 1)
        except Full:
            raise self._full() from None
        self._loop = asyncio.get_running_loop()
        stream = Stream(self, client, self._request_timeout)
        self._open.add(stream)
        return stream

    def submit(self, tickets: list[Ticket]) -> None:
        """Have the requests wait for their turns."""
        most = self._turns.places + self._turns.max_waiting
        if len(tickets) > most:
            raise ApiError(400, f"{len(tickets)} answers in one call; this server makes at most {most} at once")
        try:
            out = self._turns.add(tickets)
        except Full:
            raise self._full() from None
        now = self._now()
        for ticket in tickets:
            ticket.came = now
        for ticket in out:
            self._ended(ticket, "error", now)
            ticket.stream.fail(self._full())
        self._start()

    def withdraw(self, tickets: list[Ticket]) -> None:
        """End the requests: those that run before the engine's next step."""
        running, now = [ticket for ticket in tickets if ticket.state == "running"], self._now()
        for ticket in tickets:
            if ticket.state == "waiting":
                self._turns.leave(ticket)
            else:
                self._turns.end(ticket, now)
            self._ended(ticket, "error" if ticket.stream.failed else "abort", now)
        if running:
            self._inbox.put(partial(self._abort, running))
        self._start()

    def close(self, stream: Stream) -> None:
        """The call has ended."""
        self._open.discard(stream)

    def _start(self) -> None:
        """Hand the engine those whose turn it is."""
        tickets = list(iter(self._turns.next, None))
        if tickets:
            now = self._now()
            for ticket in tickets:
                ticket.begun = now
            self._inbox.put(partial(self._add, tickets))

    def _feed(self, news: list[tuple[Ticket, Delta]]) -> None:
        """What a step brought."""
        now = self._now()
        for ticket, delta in news:
            if ticket.state != "running":
                continue  # withdrawn meanwhile
            count = len(delta.token_ids)
            if count:
                self._count(ticket, delta, count, now)
            if delta.finish_reason:
                self._turns.end(ticket, now)
                self._ended(ticket, delta.finish_reason, now)
            ticket.stream.feed(ticket, delta)
        self._start()

    def _count(self, ticket: Ticket, delta: Delta, count: int, now: float) -> None:
        if not ticket.count:
            ticket.cached, ticket.first = delta.num_cached_tokens, now
            self._turns.give(ticket, -ticket.cached)
        self._turns.give(ticket, count)
        self._watch.arrived(ticket, count, now)
        ticket.count += count
        ticket.last = now

    def _ended(self, ticket: Ticket, reason: str, now: float) -> None:
        ticket.reason = reason
        self._watch.ended(ticket, now)

    def _full(self) -> ApiError:
        wait = str(self._turns.retry_after(self._now()))
        message = f"the queue is full -> try again in {wait} s"
        return ApiError(429, message, code="queue_full", headers=(("retry-after", wait),))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def idle(self) -> bool:
        """No request is running or waiting."""
        return not self._open

    def drain(self) -> None:
        """Accept no more requests; those accepted go on."""
        self.refusal = self.refusal or "the server is shutting down"

    def stop(self) -> None:
        """End the thread after the current step; requests that are left fail with 503."""
        self.drain()
        self._inbox.put(self._halt)

    def join(self, timeout: float) -> None:
        """Wait for the thread to end."""
        self._thread.join(timeout)

    def _fail_open(self, message: str) -> None:
        for stream in list(self._open):
            stream.fail(ApiError(503, message, code="unavailable"))

    # In the engine thread

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._take()
                if not self._stopped:
                    self._step()
        except Exception:
            log.exception("the engine is beyond repair; requests are refused until the server is restarted")
        finally:  # nobody waits for a dead engine
            self.refusal = self.refusal or "the engine has failed -> restart the server"
            self._call(partial(self._fail_open, self.refusal))
            self._engine.close()

    def _take(self) -> None:
        """Do what the event loop asked for; with nothing to run, sleep until it asks."""
        while not self._stopped and (not self._engine.busy or not self._inbox.empty()):
            self._inbox.get()()

    def _step(self) -> None:
        try:
            deltas = self._engine.step().deltas
        except Exception as error:
            if not self._running:
                raise  # nobody to tell: the engine itself is broken
            log.exception("the engine failed; %d running requests end with an error", len(self._running))
            self._fail_running(error)
            return
        news = [(self._running[delta.request_id], delta) for delta in deltas if delta.request_id in self._running]
        if news:
            self._call(partial(self._feed, news))
        for _, delta in news:
            if delta.finish_reason:
                del self._running[delta.request_id]

    def _fail_running(self, error: Exception) -> None:
        """Fail what runs and clear the engine. Where that fails too, the thread ends and the server refuses all."""
        tickets, self._running = self._running, {}
        try:
            for request_id in tickets:
                self._engine.abort(request_id)
        finally:
            self._call(partial(_fail, list(tickets.values()), _failure(error)))

    def _add(self, tickets: list[Ticket]) -> None:
        """Add the requests to the engine. One that it does not take fails with its stream."""
        for ticket in tickets:
            try:
                ticket.request_id = self._engine.add(replace(ticket.request, priority=0))
            except InputError as error:
                self._call(partial(_fail, [ticket], ApiError(400, str(error))))
            except Exception as error:
                log.exception("the engine could not take a request, which ends with an error")
                self._call(partial(_fail, [ticket], _failure(error)))
            else:
                self._running[ticket.request_id] = ticket

    def _abort(self, tickets: list[Ticket]) -> None:
        """Those that have ended meanwhile are left alone."""
        for ticket in tickets:
            if self._running.pop(ticket.request_id, None) is not None:
                self._engine.abort(ticket.request_id)

    def _halt(self) -> None:
        self._stopped = True
        for request_id in self._running:
            self._engine.abort(request_id)

    def _call(self, action: Callable[[], object]) -> None:
        """Have the event loop do `action`."""
        if self._loop is None:
            return  # no request ever came
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:
            if not self._loop.is_closed():  # closed: the server is gone, and with it every reader
                raise


def _fail(tickets: list[Ticket], error: ApiError) -> None:
    for ticket in tickets:
        ticket.stream.fail(error)


def _failure(error: Exception) -> ApiError:
    return ApiError(500, f"the engine failed ({type(error).__name__})", code="engine_failed")
