"""A small engine whose tokens are known, and real servers on loopback ports."""

import contextlib
import signal
import socket
import threading
import time
from collections import Counter
from types import SimpleNamespace

import httpx
import openai
import pytest

from benthic.inference.request import Delta, PromptPlace
from benthic.server.app import build
from benthic.server.keys import Keys
from benthic.server.listener import Server, bind, url
from benthic.server.queue import Queue
from benthic.server.service import Forms, Service
from benthic.server.worker import Worker
from benthic.tokenizer import bpe


class FakeEngine:
    """Says `script` to everybody, one token per step. `gate` holds the steps; `broken` is raised by the next one."""

    def __init__(self):
        self.script: list[int] = [65, 66, 67]
        self.running: dict[int, list] = {}  # id -> [request, tokens so far]
        self.requests: list = []
        self.counts = Counter()
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Event()
        self.broken: Exception | None = None
        self.refuse: Exception | None = None  # raised by `add`
        self.abort_broken = False
        self.pause = 0.0  # seconds that a step takes
        self.threads: set[str] = set()
        self.cached = 0  # prompt tokens found computed

    @property
    def busy(self):
        return bool(self.running)

    def add(self, request):
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        self.running[len(self.requests)] = [request, 0]
        self.counts["added"] += 1
        return len(self.requests)

    def abort(self, request_id):
        if self.abort_broken:
            raise RuntimeError("abort is broken")
        self.counts["aborted"] += 1
        del self.running[request_id]  # last: tests wait for it

    def close(self):
        self.counts["closed"] += 1

    def step(self):
        self.threads.add(threading.current_thread().name)
        self.at_gate.set()
        if not self.gate.wait(10):
            raise TimeoutError("the test never opened the gate")
        self.counts["steps"] += 1
        if self.pause:
            time.sleep(self.pause)
        if self.broken is not None:
            error, self.broken = self.broken, None
            raise error
        deltas = []
        for request_id, state in list(self.running.items()):
            request, said = state
            token, state[1] = self.script[said % len(self.script)], said + 1
            reason = "length" if said + 1 == request.params.max_tokens else ""
            reason = "stop" if said + 1 == len(self.script) else reason
            deltas.append(self.delta(request_id, request, token, said, reason))
            if reason:
                self.counts["finished"] += 1
                del self.running[request_id]
        return SimpleNamespace(deltas=deltas)

    def delta(self, request_id, request, token, said, reason):
        """Token number i has log-probability -(i + 1); the likeliest tokens are 0, 1, 2, ... with -0.5 each."""
        params, prompt = request.params, request.prompt_token_ids
        places = None
        if not said and params.prompt_logprobs >= 0:
            places = [None, *(PromptPlace(-0.25 * i, i, top(params.prompt_logprobs)) for i in range(1, len(prompt)))]
        return Delta(
            request_id, [token], [-1.0 - said], reason, [top(params.logprobs)] if params.logprobs else [], self.cached,
            places,
        )  # fmt: skip


def top(count):
    """The likeliest tokens of the small engine."""
    return [(i, -0.5) for i in range(count)]


def wait_for(condition, seconds=5.0):
    """Poll until `condition()` holds; False if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture(scope="session")
def tokenizer():
    return bpe.train(["hello world, this is a test of the server. 你好世界"] * 3, 280)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def eventually():
    return wait_for


@contextlib.contextmanager
def running(
    engine, tokenizer, *, key="", capacity=8, max_queued=0, host="127.0.0.1", max_model_len=4096, shutdown_timeout=5.0,
    thinking=None, forms=None, origins=(), **front,
):  # fmt: skip
    """A server on a free port with clients of it; closed and checked at the end."""
    worker = Worker(engine, Queue(capacity, max_queued, 2**20))
    service = Service(
        name="tiny", tokenizer=tokenizer, worker=worker, max_model_len=max_model_len, thinking=thinking,
        forms=forms or Forms(),
    )  # fmt: skip
    listener = bind("127.0.0.1", 0)
    server = Server(
        build(service, host, Keys([key] if key else []), origins=origins, **front), worker, shutdown_timeout
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
    worker.run()
    thread.start()
    address = url(listener)
    with httpx.Client(base_url=address, timeout=20, verify=False) as http:  # reading certificates takes a while
        client = openai.OpenAI(
            base_url=f"{address}/v1", api_key=key or "none", max_retries=0, timeout=20, http_client=http
        )
        try:
            assert wait_for(lambda: server.started)
            yield SimpleNamespace(
                server=server, worker=worker, service=service, thread=thread, port=listener.getsockname()[1],
                client=client, http=http, url=address, engine=engine,
            )  # fmt: skip
        finally:
            if isinstance(engine, FakeEngine):
                engine.gate.set()
            server.handle_exit(signal.SIGTERM, None)
            server.handle_exit(signal.SIGTERM, None)  # at once
            thread.join(10)
            worker.join(10)
            assert not thread.is_alive()
            assert not worker._thread.is_alive()


@pytest.fixture
def launch(engine, tokenizer):
    """launch(...) -> a server of its own for this test."""
    with contextlib.ExitStack() as stack:
        yield lambda engine=engine, tokenizer=tokenizer, **options: stack.enter_context(
            running(engine, tokenizer, **options)
        )


@pytest.fixture(scope="module")
def shared(tokenizer):
    """A server for the tests that leave no trace in it."""
    with running(FakeEngine(), tokenizer) as server:
        yield server


@pytest.fixture(scope="module")
def locked(tokenizer):
    """The same with the key sk-right."""
    with running(FakeEngine(), tokenizer, key="sk-right") as server:
        yield server


@pytest.fixture
def raw():
    """raw(port, data) -> an open socket on which `data` was sent; closed after the test."""
    with contextlib.ExitStack() as stack:

        def connect(port, data=b""):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.sendall(data)
            return connection

        yield connect
