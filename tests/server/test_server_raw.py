"""Bytes that are no HTTP, or only nearly: nothing answers 5xx, stalls, grows or dies."""

import asyncio
import contextlib
import random
import resource
import time

import pytest
from crowd import Stalls, post, read_all, resident

from benthic.server import listener
from benthic.server.limits import LIMITS

SEEDS = [
    post("hello", False, max_tokens=2), post("hello", True, max_tokens=2),
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nTE: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"a\":\r\n0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\nAccess-Control-Request-Method: POST\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
]  # fmt: skip
PIECES = [
    b"\r\n", b"\n", b"\x00", b"\xff" * 9, b"Content-Length: 99999999999999999999\r\n", b"Content-Length: -1\r\n", b":",
    b"Transfer-Encoding: chunked\r\n", b" " * 300, b"HTTP/9.9", b"Host: \r\n", b"%00", b"//", b"ffffffffffffffff\r\n",
    b"[" * 400, b"\"\\ud800\"", b"1e999", b"x: " + b"y" * 9000 + b"\r\n",
]  # fmt: skip


def mutate(rng: random.Random) -> bytes:
    """A request with up to four changes."""
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at : at + rng.randint(1, 30)] = b""
            case 1:
                data[at:at] = rng.choice(PIECES)
            case 2:
                data[at : at + 1] = rng.randbytes(rng.randint(1, 3))
            case 3:
                data[at:at] = data[rng.randrange(len(data) + 1) :][: rng.randint(1, 60)]
            case 4:
                data = data + rng.choice(SEEDS)
    return bytes(data)


async def fire(port: int, data: bytes, seen: dict[int, int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError, TimeoutError):
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(4096), 0.3)
        if answer:
            status = int(answer.split()[1])
            seen[status] = seen.get(status, 0) + 1
            assert status < 500, data
    writer.close()


async def barrage(port: int, rng: random.Random, count: int) -> dict[int, int]:
    seen, places = {}, asyncio.Semaphore(40)

    async def one() -> None:
        async with places:
            await fire(port, mutate(rng), seen)

    await asyncio.gather(*(one() for _ in range(count)))
    return seen


def fuzz(launch, engine, tokenizer, eventually, count):
    engine.script = [*tokenizer.encode("canary"), tokenizer.eos_id]
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    server = launch(capacity=100)
    assert asyncio.run(read_all(server.port, post("hello")))[:2] == (200, "canary")
    loop = server.worker._loop
    asyncio.run(barrage(server.port, rng, 100))  # warm
    memory = resident()
    with Stalls(loop) as stalls:
        seen = asyncio.run(barrage(server.port, rng, count))
    print(seen, f"late: loop {stalls.loop_late:.3f} s, idle thread {stalls.thread_late:.3f} s")
    assert seen[200] > count / 50
    assert seen[400] > count / 50
    assert asyncio.run(read_all(server.port, post("hello")))[:2] == (200, "canary")
    assert eventually(lambda: server.worker.idle and not engine.running)
    assert eventually(lambda: len(server.server.server_state.connections) == 0)
    assert resident() - memory < 50
    return stalls


def test_raw_bytes_get_no_5xx_and_leave_the_server_as_it_was(launch, engine, tokenizer, eventually):
    fuzz(launch, engine, tokenizer, eventually, 1000)


@pytest.mark.long
def test_ten_thousand_raw_byte_strings_get_no_5xx_and_stall_nothing(launch, engine, tokenizer, eventually):
    stalls = fuzz(launch, engine, tokenizer, eventually, 10_000)
    assert stalls.loop_late < 0.1 + stalls.thread_late


def test_a_loop_that_stands_still_would_be_noticed(launch):
    """Negative control."""
    server = launch()
    server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
    with Stalls(server.worker._loop) as stalls:
        server.worker._loop.call_soon_threadsafe(time.sleep, 0.4)
        time.sleep(0.5)
    assert stalls.loop_late > 0.1 + stalls.thread_late


@pytest.fixture
def many_files():
    """Room for both ends of many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_five_hundred_heads_that_never_end_keep_nobody_waiting_and_are_closed(
    launch, raw, many_files, monkeypatch, eventually
):
    quick = LIMITS["head_seconds"]._replace(high=2.0)
    monkeypatch.setattr(listener, "LIMITS", {**LIMITS, "head_seconds": quick})
    server = launch()
    for _ in range(500):
        raw(server.port, b"POST /v1/completions HTTP/1.1\r\nHost: loc")
    connections = server.server.server_state.connections
    begun = time.monotonic()
    assert asyncio.run(read_all(server.port, post("hello", max_tokens=2)))[0] == 200
    assert time.monotonic() - begun < 2
    assert eventually(lambda: not connections, seconds=10)
