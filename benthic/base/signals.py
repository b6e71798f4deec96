"""Stopping politely: the first signal is a request, the second an order."""

import logging
import os
import signal
import socket
import threading

from benthic.base.errors import Interrupted

log = logging.getLogger("benthic")


def leave_to_rank_0() -> None:
    """Ignore SIGTERM and SIGINT, which reach every process that torchrun has started: rank 0 ends in order and takes
    the others, of which this is one, along. For the command line only."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


class Stop:
    """Whether somebody asked this process to stop.

    Long loops call `raise_if_requested` where they have just saved. Only the command line calls `install`: a process
    that uses Benthic as a library keeps its own signal handlers, and its `Stop` is never set unless it sets it.
    """

    def __init__(self) -> None:
        self.requested: int | None = None  # number of the signal that asked

    def install(self) -> None:
        """Take over SIGTERM and SIGINT. The first sets `requested`, the second ends the process with 128 + its number.

        A thread reads the signals from Python's wakeup socket, because the main thread may sit in a kernel or a
        collective for minutes, where a Python handler would not run.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: None)
        threading.Thread(target=self._listen, args=(reader, writer), name="signals", daemon=True).start()

    def _listen(self, reader: socket.socket, writer: socket.socket) -> None:
        """Act on each signal number that arrives. `writer` is held here so that it stays open."""
        while data := reader.recv(1):
            signum = data[0]
            if signum not in (signal.SIGTERM, signal.SIGINT):
                continue
            if self.requested is not None:
                os._exit(128 + signum)
            self.requested = signum
            log.warning("%s: stopping at the next safe point; once more to stop at once", signal.Signals(signum).name)

    def raise_if_requested(self, message: str) -> None:
        """Raise Interrupted (exit code 128 + signal number) with `message` if a signal has arrived."""
        if self.requested is not None:
            raise Interrupted(self.requested, message)
