"""More than the server can do: what it accepts it serves as well as ever, and it says no at once to the rest."""

import asyncio
import time

import pytest
from crowd import post, read_all

PLACES, WAITING, STEP, TOKENS = 8, 8, 0.04, 8
PAUSE = 0.6  # between the questions of a refused client: ten times as many as the server can answer


class Load:
    """Clients that ask again and again, and what they saw."""

    def __init__(self, port: int):
        self._port = port
        self.first: list[float] = []  # seconds to the first byte of accepted requests
        self.refused: list[float] = []  # seconds to the refusal
        self.waits: set[str] = set()
        self.most_waiting = 0
        self.done = 0  # between the first second and the end

    async def client(self, begin: float, end: float, number: int) -> None:
        while time.monotonic() < end:
            status, _, first, retry = await read_all(self._port, post("hello", max_tokens=TOKENS, user=str(number)))
            if status == 200:
                self.first.append(first)
                self.done += begin < time.monotonic() < end
                continue
            assert status == 429
            self.refused.append(first)
            self.waits.add(retry)
            await asyncio.sleep(PAUSE)  # less than it was asked for

    async def run(self, clients: int, seconds: float, server) -> float:
        """Requests done per second."""
        begin = time.monotonic() + 1
        end = begin + seconds

        async def watch() -> None:
            while time.monotonic() < end:
                self.most_waiting = max(self.most_waiting, server.worker.turns.waiting)
                await asyncio.sleep(0.005)

        await asyncio.gather(watch(), *(self.client(begin, end, number) for number in range(clients)))
        return self.done / seconds


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def at_capacity(launch, engine, seconds, max_queued=WAITING):
    """(server, requests per second, p99 of the first byte) with as many clients as it has room for."""
    engine.script, engine.pause = [65] * 1000, STEP
    server = launch(capacity=PLACES, max_queued=max_queued)
    calm = Load(server.port)
    peak = asyncio.run(calm.run(PLACES + WAITING, seconds, server))
    assert not calm.refused
    return server, peak, p99(calm.first)


def overload(launch, engine, seconds, *, goodput, refusal, late):
    server, peak, normal = at_capacity(launch, engine, seconds / 2)
    storm = Load(server.port)
    served = asyncio.run(storm.run(10 * (PLACES + WAITING), seconds, server))
    print(
        f"peak {peak:.1f}/s, overloaded {served:.1f}/s; {len(storm.refused)} refused, p99 {p99(storm.refused):.3f} s;"
    )
    print(f"first byte p99 {normal:.3f} s at capacity, {p99(storm.first):.3f} s overloaded")
    assert len(storm.refused) > len(storm.first)
    assert storm.most_waiting <= WAITING
    assert served >= goodput * peak
    assert p99(storm.first) <= late * normal
    assert p99(storm.refused) < refusal
    assert all(1 <= int(wait) <= 60 for wait in storm.waits)
    begun = time.monotonic()
    assert asyncio.run(read_all(server.port, post("hello", max_tokens=TOKENS)))[0] == 200
    assert time.monotonic() - begun < 2


def test_ten_times_the_load_costs_no_throughput_and_refusals_are_quick(launch, engine):
    overload(launch, engine, 3, goodput=0.5, refusal=2, late=5)  # others may use this machine too


@pytest.mark.long
def test_a_minute_of_ten_times_the_load_costs_no_throughput_and_refusals_are_quick(launch, engine):
    overload(launch, engine, 60, goodput=0.95, refusal=0.05, late=2)


def test_without_a_bound_the_first_byte_would_come_late(launch, engine):
    """Negative control: at capacity a first byte waits for one round of answers, here for most of nine."""
    engine.script, engine.pause = [65] * 1000, STEP
    server = launch(capacity=PLACES, max_queued=10_000)
    storm = Load(server.port)
    asyncio.run(storm.run(5 * (PLACES + WAITING), 1, server))
    assert storm.most_waiting > WAITING
    assert p99(storm.first) > 5 * STEP * TOKENS
