"""Clients that leave: their requests are freed at once and nothing stays behind."""

import asyncio
import contextlib
import json
import random
import struct
import threading
import time
from socket import SO_LINGER, SOL_SOCKET

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benthic.server import deliver, generate
from benthic.server.queue import Queue
from benthic.server.service import Service
from benthic.server.types.chat import ChatRequest
from benthic.server.worker import Worker

MESSAGES = [{"role": "user", "content": "hello"}]


def request(stream: bool, **fields) -> bytes:
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": stream, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_answer_is_made_frees_the_request_within_one_step(
    launch, engine, eventually, raw, stream
):
    engine.script, engine.pause = [65] * 100_000, 0.01
    server = launch(max_model_len=200_000)
    connection = raw(server.port, request(stream))
    assert eventually(lambda: engine.counts["steps"] > 3)
    aborted_at = []
    abort = engine.abort
    engine.abort = lambda request_id: (aborted_at.append(engine.counts["steps"]), abort(request_id))
    withdraw = server.worker.withdraw
    closed_at = []
    server.worker.withdraw = lambda tickets: (closed_at.append(engine.counts["steps"]), withdraw(tickets))
    connection.close()
    assert eventually(lambda: aborted_at)
    assert aborted_at[0] - closed_at[0] <= 1
    assert not engine.running
    assert server.worker.idle


def test_a_client_that_leaves_before_the_first_token_frees_the_request(launch, engine, eventually, raw):
    engine.gate.clear()
    server = launch()
    connections = [raw(server.port, request(True)) for _ in range(3)]
    assert eventually(lambda: len(server.worker._open) == 3)
    for connection in connections:
        connection.close()
    assert eventually(lambda: server.worker.idle)
    engine.gate.set()
    assert eventually(lambda: not engine.running)
    assert server.client.chat.completions.create(model="tiny", messages=MESSAGES).choices[0].finish_reason == "stop"


def test_a_client_that_does_not_read_loses_its_answer_and_its_place(engine, tokenizer, eventually, monkeypatch):
    quick = deliver.LIMITS["send_seconds"]._replace(high=0.1)
    monkeypatch.setattr(deliver, "LIMITS", {**deliver.LIMITS, "send_seconds": quick})
    engine.script, engine.pause = [65] * 10**5, 0.001
    worker = Worker(engine, Queue(1, 0, 1000))
    service = Service(name="tiny", tokenizer=tokenizer, worker=worker, max_model_len=2 * 10**5)
    ask = ChatRequest.read(request(True).partition(b"\r\n\r\n")[2])

    async def main():
        forever = asyncio.Event()

        async def receive():
            await forever.wait()

        async def send(message):
            if message["type"] == "http.response.body":
                await forever.wait()

        worker.run()
        answer = await generate.Generating(service).chat(ask)
        await asyncio.wait_for(answer({"type": "http", "headers": []}, receive, send), 5)

    start = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - start < 9  # far below the limit that was not lowered
    assert worker.idle
    assert eventually(lambda: not engine.running)
    worker.stop()
    worker.join(5)


def test_two_hundred_clients_that_leave_at_random_moments_leave_nothing_behind(launch, engine, eventually, raw):
    engine.script, engine.pause = [65] * 300, 0.0005
    server = launch(capacity=1000)
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    threads = threading.active_count()
    neighbour = []
    ask = server.client.chat.completions.create
    other = threading.Thread(
        target=lambda: neighbour.append(ask(model="tiny", messages=MESSAGES, max_tokens=200).usage.completion_tokens)
    )
    other.start()
    for i in range(200):
        data = request(rng.random() < 0.5)
        connection = raw(server.port, data[: rng.choice([0, 20, len(data) - 1, len(data), len(data)])])
        if rng.random() < 0.5:
            connection.settimeout(rng.choice([0.001, 0.01, 0.03]))
            with contextlib.suppress(TimeoutError):
                connection.recv(rng.choice([1, 100, 4096]))
        if i % 3 == 0:
            connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))  # reset instead of a polite end
        connection.close()
    other.join(20)
    assert neighbour == [200]
    assert eventually(lambda: server.worker.idle and not engine.running)
    assert eventually(lambda: len(server.server.server_state.connections) <= 1)  # the neighbour's, kept alive
    assert engine.counts["added"] == engine.counts["aborted"] + engine.counts["finished"]
    assert engine.counts["aborted"] > 10
    assert not server.worker._running
    assert eventually(lambda: not server.server.server_state.tasks)
    assert threading.active_count() <= threads + 40  # the pool that renders prompts
    assert ask(model="tiny", messages=MESSAGES, max_tokens=3).usage.completion_tokens == 3


def test_a_worker_that_forgets_to_abort_would_be_noticed(launch, engine, eventually, raw):
    engine.script, engine.pause = [65] * 100_000, 0.001
    server = launch(max_model_len=200_000)
    server.worker.withdraw = lambda tickets: None  # the place is given back, the engine is not told
    connection = raw(server.port, request(True))
    assert eventually(lambda: engine.counts["steps"] > 3)
    connection.close()
    assert eventually(lambda: server.worker.idle)
    assert not eventually(lambda: not engine.running, seconds=0.3)


def test_an_idle_engine_thread_sleeps(launch, engine, eventually):
    server = launch()
    server.client.chat.completions.create(model="tiny", messages=MESSAGES)
    steps = engine.counts["steps"]
    assert not engine.busy
    assert not eventually(lambda: engine.counts["steps"] > steps, seconds=0.2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
ROLES = st.sampled_from(["user", "system", "assistant", "tool"])
MESSAGE = st.fixed_dictionaries({"role": ROLES | JSON, "content": JSON})
FIELDS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE | JSON, max_size=3) | st.just(MESSAGES)},
    optional={
        "max_tokens": st.integers(-1, 40) | JSON, "temperature": st.floats(-1, 3) | JSON,
        "stream": st.booleans() | JSON,
        "top_p": st.floats(0, 1) | JSON, "seed": st.integers() | JSON, "stop": st.lists(st.text(max_size=3)) | JSON,
        "n": JSON, "tools": JSON, "logprobs": JSON, "stream_options": JSON, "user": JSON,
    },
)  # fmt: skip


def test_no_body_makes_a_5xx_and_the_answer_to_a_good_one_stays_the_same(launch, tokenizer, engine):
    engine.script = [*tokenizer.encode("canary"), tokenizer.eos_id]
    server = launch()
    seen = set()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.builds(lambda f: json.dumps({"model": "tiny", **f}).encode(), FIELDS) | st.binary(max_size=40))
    def post(body):
        answer = server.http.post("/v1/chat/completions", content=body)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    post()
    assert {200, 400} <= seen
    good = server.client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert good.choices[0].message.content == "canary"


BROKEN = [
    b"\x00" * 50, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n\r\n", b"\r\n\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET \xff HTTP/1.1\r\nHost: a\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("data", BROKEN)
def test_broken_http_is_refused_and_the_server_lives(shared, raw, data):
    server = shared
    answer = raw(server.port, data + b"\r\n\r\n").recv(4096)
    assert answer.startswith(b"HTTP/1.1 4") or not answer
    assert server.http.get("/health").status_code == 200


def test_the_openai_client_can_close_a_stream_early(launch, engine, eventually):
    engine.script, engine.pause = [65] * 100_000, 0.001
    server = launch(max_model_len=200_000)
    with server.client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True) as stream:
        assert isinstance(stream, openai.Stream)
        next(stream)
    assert eventually(lambda: engine.counts["aborted"] == 1)
    assert not engine.running
