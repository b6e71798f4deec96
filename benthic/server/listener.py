"""The socket, and uvicorn around the app."""

import asyncio
import socket
import time
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from benthic.base.errors import InputError
from benthic.server.limits import LIMITS
from benthic.server.worker import Worker


class Connection(H11Protocol):
    """uvicorn's, with an end for a client that never completes the head of a request, and for one too many."""

    _impatience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.abort()
        else:
            self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait_for_head(self) -> None:
        """The clock runs from the connection, or from the first byte after an answer, to the end of the head."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._impatience is None:
            self._impatience = self.loop.call_later(LIMITS["head_seconds"].high, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None


def most_connections() -> int:
    """The limit, or half of the open files that the system allows this process."""
    try:
        import resource  # not on Windows
    except ModuleNotFoundError:
        return int(LIMITS["connections"].high)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = files == resource.RLIM_INFINITY
    return int(LIMITS["connections"].high if unlimited else min(LIMITS["connections"].high, files // 2))


class Server(uvicorn.Server):
    """uvicorn that lets accepted requests finish: a signal starts the draining, a second one ends it."""

    def __init__(self, app: Any, worker: Worker, shutdown_timeout: float):
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # what it logs may quote a request
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=2 * int(LIMITS["header_bytes"].high),
                timeout_graceful_shutdown=2,  # for readers that are too slow to take even the end
            )
        )
        self._worker = worker
        self._shutdown_timeout = shutdown_timeout
        self._deadline = 0.0
        self.signal = 0  # the first signal that came

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called by uvicorn for SIGINT and SIGTERM."""
        self._deadline = 0.0 if self.signal else time.monotonic() + self._shutdown_timeout
        self.signal = self.signal or sig
        self._worker.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the server."""
        if self.signal and (self._worker.idle or time.monotonic() > self._deadline):
            self._worker.stop()
            return True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: nobody else can take the port while the model loads."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(
            f"cannot listen on host {host} ({error.strerror}) -> use an address of this machine"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on {host} port {port} ({error.strerror}) -> use another --port") from error
    return listener


def url(listener: socket.socket) -> str:
    """Where a browser or a client finds the server."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
