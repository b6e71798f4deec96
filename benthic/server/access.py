"""The access log: one line of JSON per request, outside everything else, so that refusals stand there too.

It says who (the owner of the key, or an address), what, how many tokens, how long to the first and between two. Text of
prompts stands there only where the operator asks for it; keys and answers never do.
"""

import json
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from benthic.base.errors import InputError
from benthic.server.asgi import App, Message, Receive, Scope, Send
from benthic.server.gate import caller
from benthic.server.stream import Stream

STREAM = "benthic.stream"  # where in the scope a route leaves its stream
MOST_TEXT = 20_000  # characters of prompts in one line


class Counts(Protocol):
    """What is told of every request (`benthic.server.metrics.Metrics`)."""

    def replied(self, path: str, status: int) -> None: ...


Decode = Callable[[Sequence[int]], str]


class AccessLog:
    """ASGI middleware. `write` gets each line, `decode` makes text of prompts; None leaves either out."""

    def __init__(
        self, app: App, counts: Counts, write: Callable[[str], object] | None = None, decode: Decode | None = None
    ):
        self._app, self._counts, self._write, self._decode = app, counts, write, decode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status = time.perf_counter(), 0
        number = f"req-{secrets.token_hex(8)}"

        def watched(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", number.encode())]}
            return send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._counts.replied(scope.get("path", ""), status)
            if self._write is not None:
                self._write(json.dumps(self._line(scope, number, status, time.perf_counter() - begun)))

    def _line(self, scope: Scope, number: str, status: int, seconds: float) -> dict[str, Any]:
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": number,
            "client": caller(scope),
            "method": scope["method"][:16],
            "path": scope["path"][:200],
            "status": status,  # 0: the client left before there was any
            "seconds": round(seconds, 6),
        }
        stream = scope.get(STREAM)
        if isinstance(stream, Stream) and stream.tickets:
            line |= _tokens(stream)
            if self._decode is not None:
                room, line["prompts"] = MOST_TEXT, []
                for ticket in stream.tickets:
                    text = self._decode(ticket.request.prompt_token_ids[:room])[:room]
                    line["prompts"].append(text)
                    room -= len(text)
        return line


def _tokens(stream: Stream) -> dict[str, Any]:
    """Of all requests of a call together; times of the first token to come, and the mean between two."""
    tickets = stream.tickets
    begun = [ticket for ticket in tickets if ticket.count]
    steps = sum(ticket.count - 1 for ticket in begun)
    line: dict[str, Any] = {
        "prompt_tokens": sum(ticket.tokens for ticket in tickets),
        "cached_tokens": sum(max(0, ticket.cached) for ticket in tickets),
        "completion_tokens": sum(ticket.count for ticket in tickets),
        "finish": [ticket.reason for ticket in tickets],
    }
    if begun:
        line["first_token_seconds"] = round(min(ticket.first for ticket in begun) - stream.opened, 6)
    if steps:
        line["between_tokens_seconds"] = round(sum(ticket.last - ticket.first for ticket in begun) / steps, 6)
    return line


def writer(path: str, stderr: TextIO) -> Callable[[str], object] | None:
    """What appends lines to a file, opened anew when it was moved away; "-" is the error stream, "" nothing."""
    if not path:
        return None
    if path == "-":
        return lambda line: print(line, file=stderr, flush=True)
    return File(Path(path))


class File:
    """Lines at the end of a file. A program that turns logs over may move it away at any time."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise InputError(f"cannot write access_log {path} ({error.strerror}) -> check the path") from error
        self._number = path.stat().st_ino

    def __call__(self, line: str) -> None:
        try:
            moved = self._path.stat().st_ino != self._number
        except FileNotFoundError:
            moved = True
        if moved:
            self._file.close()
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
            self._number = self._path.stat().st_ino
        self._file.write(line + "\n")
