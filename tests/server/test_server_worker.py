"""The worker and its streams without HTTP: whole deltas, deadlines, slow readers, several requests in one place."""

import asyncio
import contextlib

import pytest

from benthic.base.errors import InputError
from benthic.inference.config import SamplingParams
from benthic.inference.request import Delta, PromptPlace, Request
from benthic.server import stream as stream_module
from benthic.server.errors import ApiError
from benthic.server.queue import Queue
from benthic.server.stream import merge
from benthic.server.worker import Worker


def ask(max_tokens: int) -> Request:
    return Request(prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=max_tokens))


@pytest.fixture
def scene(engine, eventually):
    """scene(coroutine function, places=..., ...) runs it with a worker, which is idle at the end."""

    def play(act, places=8, max_waiting=0, request_timeout=20.0):
        worker = Worker(engine, Queue(places, max_waiting, 2**20), request_timeout)
        worker.run()
        try:
            result = asyncio.run(asyncio.wait_for(act(worker), 20))
            assert worker.idle
            assert eventually(lambda: not engine.running)
            return result
        finally:
            engine.gate.set()
            worker.stop()
            worker.join(10)

    return play


async def read(stream, into=None):
    """{index: (tokens, finish reason)} of a stream to its end."""
    found = {} if into is None else into
    async for index, delta in stream:
        before = found.get(index, ([], ""))
        found[index] = (before[0] + delta.token_ids, delta.finish_reason)
    return found


def test_several_requests_in_one_place_end_each_by_itself(scene, engine):
    engine.script = [65, 66, 67, 68, 69, 70]

    async def act(worker):
        async with worker.open("a") as stream:
            stream.start([ask(1), ask(5), ask(3)])
            return await read(stream)

    found = scene(act)
    assert found == {0: ([65], "length"), 1: ([65, 66, 67, 68, 69], "length"), 2: ([65, 66, 67], "length")}


def test_what_a_reader_has_not_taken_arrives_as_one_delta(scene, engine, eventually):
    engine.script = [65] * 1000

    async def act(worker):
        async with worker.open("a") as stream:
            stream.start([ask(30)])
            while stream.tickets[0].state != "ended":
                await asyncio.sleep(0.001)
            return [delta async for _, delta in stream]

    (delta,) = scene(act)
    assert delta.token_ids == [65] * 30
    assert delta.logprobs == [-1.0 - i for i in range(30)]
    assert delta.finish_reason == "length"


def test_merging_loses_nothing_of_a_delta():
    place = PromptPlace(-1.0, 1, [])
    parts = [
        Delta(3, [1, 2], [-0.1, -0.2], "", [[(1, -0.1)], [(2, -0.2)]], 7, [None, place]),
        Delta(3, [], [], "", [], 7),
        Delta(3, [5], [-0.5], "stop", [[(5, -0.5)]], 7),
    ]
    whole = [[(1, -0.1)], [(2, -0.2)], [(5, -0.5)]]
    assert merge(parts) == Delta(3, [1, 2, 5], [-0.1, -0.2, -0.5], "stop", whole, 7, [None, place])
    assert merge(parts[:1]) is parts[0]
    assert parts[0].token_ids == [1, 2]


@pytest.mark.parametrize("asked", [None, 0.4, 100.0])
def test_a_deadline_ends_the_request_where_it_is(scene, engine, eventually, asked):
    engine.script, engine.pause = [65] * 10**6, 0.001

    async def act(worker):
        seen = {}
        async with worker.open("a") as stream:
            stream.start([ask(10**6)], deadline=asked)
            with pytest.raises(ApiError) as caught:
                await read(stream, seen)
            assert len(seen[0][0]) > 3  # it had begun
            assert caught.value.status == 504
            assert caught.value.code == "deadline_exceeded"
            assert f"{asked if asked == 0.4 else 0.6:g} seconds" in caught.value.message
            while engine.running:  # aborted though the place is still held
                await asyncio.sleep(0.001)

    scene(act, request_timeout=0.6)
    assert engine.counts["aborted"] == 1


def test_a_deadline_counts_from_the_opening_and_is_told_at_the_start(scene, engine):
    async def act(worker):
        async with worker.open("a") as stream:
            await asyncio.sleep(0.03)
            with pytest.raises(ApiError, match="not done within"):
                stream.start([ask(3)])

    scene(act, request_timeout=0.01)
    assert not engine.requests


def test_a_request_that_is_done_before_its_deadline_does_not_fail_after_it(scene, engine):
    async def act(worker):
        async with worker.open("a") as stream:
            stream.start([ask(3)], deadline=0.2)
            while stream.tickets[0].state != "ended":
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.25)
            return await read(stream)

    assert scene(act) == {0: ([65, 66, 67], "stop")}


def test_a_reader_that_is_too_slow_loses_its_answer_and_costs_the_others_nothing(scene, engine, monkeypatch):
    monkeypatch.setattr(stream_module, "MAX_UNREAD", 50)
    engine.script, engine.pause = [65] * 10**6, 0.0005

    async def act(worker):
        async with worker.open("slow") as slow, worker.open("quick") as quick:
            slow.start([ask(10**6)])
            quick.start([ask(200)])
            answer = await read(quick)
            with pytest.raises(ApiError, match="left unread") as caught:
                await read(slow)
            assert caught.value.code == "slow_reader"
            assert not engine.running  # freed though its place is still held
            return answer

    assert scene(act) == {0: ([65] * 200, "length")}
    assert engine.counts["aborted"] == 1


def test_a_reader_that_is_just_quick_enough_keeps_its_answer(scene, engine, monkeypatch):
    monkeypatch.setattr(stream_module, "MAX_UNREAD", 50)
    engine.script = [65] * 10**6

    async def act(worker):
        async with worker.open("a") as stream:
            stream.start([ask(50)])
            while stream.tickets[0].state != "ended":
                await asyncio.sleep(0.001)
            return await read(stream)

    assert scene(act) == {0: ([65] * 50, "length")}


def test_leaving_the_block_aborts_what_is_unfinished_before_the_next_step(scene, engine):
    engine.script = [65] * 10**6

    async def act(worker):
        engine.gate.clear()
        async with worker.open("a") as stream:
            stream.start([ask(10), ask(10), ask(10)])
            await asyncio.to_thread(engine.at_gate.wait, 5)
        assert worker.idle
        steps = engine.counts["steps"]
        engine.gate.set()
        while engine.counts["aborted"] < 3:
            await asyncio.sleep(0.001)
        assert engine.counts["steps"] == steps + 1  # the one that was under way

    scene(act)


def test_a_request_that_is_cut_ends_alone(scene, engine):
    engine.script, engine.pause = [65] * 10**6, 0.001

    async def act(worker):
        async with worker.open("a") as stream:
            stream.start([ask(10**6), ask(40)])
            seen = {0: 0, 1: 0}
            async for index, delta in stream:
                seen[index] += len(delta.token_ids)
                if index == 0 and seen[0] > 5:
                    stream.cut(0)
            return seen

    seen = scene(act)
    assert seen[1] == 40
    assert 5 < seen[0] < 40
    assert engine.counts["aborted"] == 1


def test_places_are_counted_in_requests(scene, engine):
    async def act(worker):
        async with worker.open("a") as stream, worker.open("b") as other:
            with pytest.raises(ApiError, match="at most 8"):
                stream.start([ask(3)] * 9)
            stream.start([ask(3)] * 7)
            with pytest.raises(ApiError) as caught:
                other.start([ask(3)] * 2)
            assert caught.value.status == 429
            assert dict(caught.value.headers) == {"retry-after": "1"}
            other.start([ask(3)])
            with pytest.raises(ApiError, match="queue is full"):
                worker.open("c")
            return await read(stream), await read(other)

    assert [len(found) for found in scene(act)] == [7, 1]


def test_calls_that_are_being_prepared_count_against_their_own_client(scene, engine):
    async def act(worker):
        async with worker.open("a"), worker.open("a"), worker.open("b"):
            with pytest.raises(ApiError, match="queue is full"):
                worker.open("a")

    scene(act, places=2)


def test_requests_beyond_the_places_wait_outside_the_engine_and_run_in_turn(scene, engine):
    engine.script = [65] * 100

    async def act(worker):
        async with worker.open("flood") as flood, worker.open("polite") as polite:
            flood.start([ask(20)] * 6)
            polite.start([ask(20)])
            await asyncio.gather(read(flood), read(polite))

    engine.add = lambda r, add=engine.add: (most.append(len(engine.running) + 1), add(r))[1]
    most = []
    scene(act, places=2, max_waiting=10)
    assert max(most) <= 2
    assert len(most) == 7


def test_a_queued_request_that_is_given_up_never_reaches_the_engine(scene, engine):
    engine.script = [65] * 100

    async def act(worker):
        async with worker.open("a") as stream:
            stream.start([ask(20)])
            async with worker.open("a") as second:
                second.start([ask(20)])
                assert second.tickets[0].state == "waiting"
            return await read(stream)

    scene(act, places=1, max_waiting=1)
    assert engine.counts["added"] == 1


def test_a_flood_gives_up_its_last_request_for_a_client_that_holds_less(scene, engine):
    engine.script = [65] * 100

    async def act(worker):
        async with contextlib.AsyncExitStack() as stack:
            engine.gate.clear()
            flood = [await stack.enter_async_context(worker.open("flood")) for _ in range(5)]
            for stream in flood:
                stream.start([ask(5)])
            with pytest.raises(ApiError, match="queue is full"):
                worker.open("flood")
            polite = await stack.enter_async_context(worker.open("polite"))
            polite.start([ask(5)])
            engine.gate.set()
            with pytest.raises(ApiError, match="queue is full"):
                await read(flood[-1])
            return await asyncio.gather(*map(read, [polite, *flood[:-1]]))

    assert len(scene(act, places=1, max_waiting=4)) == 5


def test_the_engine_hears_of_no_priority_because_it_would_hold_against_other_clients(scene, engine):
    async def act(worker):
        async with worker.open("a") as stream:
            stream.start([Request(prompt_token_ids=[1], priority=-9)])
            await read(stream)

    scene(act)
    assert [request.priority for request in engine.requests] == [0]


def test_one_request_that_the_engine_refuses_ends_its_stream_and_no_other(scene, engine):
    engine.script, engine.pause = [65] * 10**6, 0.001
    add = engine.add
    engine.add = lambda r: add(r) if r.params.max_tokens != 7 else (_ for _ in ()).throw(InputError("odd -> not 7"))

    async def act(worker):
        async with worker.open("a") as bad, worker.open("b") as good:
            good.start([ask(30)])
            bad.start([ask(10**6), ask(7), ask(10**6)])
            with pytest.raises(ApiError, match="not 7") as caught:
                await read(bad)
            assert caught.value.status == 400
            return await read(good)

    assert scene(act) == {0: ([65] * 30, "length")}


def test_one_wakeup_of_the_loop_serves_all_streams_of_a_step(scene, engine):
    engine.script = [65] * 10**6
    calls = []

    async def act(worker):
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(worker.open("a")) for _ in range(8)]
            engine.gate.clear()
            for stream in streams:
                stream.start([ask(20)])
            wake = loop.call_soon_threadsafe
            loop.call_soon_threadsafe = lambda *args: calls.append(1) or wake(*args)
            engine.gate.set()
            await asyncio.gather(*map(read, streams))
        return len(calls)

    assert 20 <= scene(act) <= engine.counts["steps"]
