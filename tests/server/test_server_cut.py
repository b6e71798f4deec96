"""Streams that are cut in every phase, on a real engine: every page comes back and no neighbour notices."""

import asyncio
import random
import time

import pytest
from crowd import PHASES, cut, open_files, post, read_all, resident, tiny_engine

PROMPTS = [
    "hello world",
    "this is a test",
    "of the server",
    "你好世界",
    "a",
    "hello, this is a test of the server. " * 2,
]


def clean(server) -> bool:
    """Nothing of any request is left."""
    engine, worker = server.engine, server.worker
    pool = engine.scheduler.pool
    return (
        worker.idle
        and not worker._running
        and worker.turns.running == worker.turns.waiting == 0
        and not engine.busy
        and len(pool.free) == pool.num_pages
        and not server.server.server_state.tasks
    )


async def storm(port: int, rng: random.Random, count: int, answers: dict[str, str]) -> int:
    """`count` clients that leave, 30 at a time, beside neighbours that stay. How many neighbours there were."""
    places, done, stayed = asyncio.Semaphore(30), asyncio.Event(), 0

    async def leave(number: int) -> None:
        async with places:
            await cut(port, rng, rng.choice(PROMPTS), PHASES[number % len(PHASES)])

    async def stay() -> None:
        nonlocal stayed
        while not done.is_set():
            prompt = rng.choice(PROMPTS)
            status, text, *_ = await read_all(port, post(prompt, max_tokens=20))
            assert (status, text) == (200, answers[prompt])
            stayed += 1

    neighbours = [asyncio.ensure_future(stay()) for _ in range(2)]
    await asyncio.gather(*(leave(number) for number in range(count)))
    done.set()
    await asyncio.gather(*neighbours)
    return stayed


def weather(launch, tokenizer, eventually, count: int) -> tuple[float, float]:
    """(seconds until all is clean, megabytes more) after `count` cut streams."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    server = launch(engine=tiny_engine(tokenizer), capacity=9, max_queued=100, max_model_len=256)
    answers = {prompt: asyncio.run(read_all(server.port, post(prompt, max_tokens=20)))[1] for prompt in PROMPTS}
    assert len(set(answers.values())) > 3
    asyncio.run(storm(server.port, rng, 40, answers))  # warm: threads, buffers
    assert eventually(lambda: clean(server))
    memory, files = resident(), open_files()
    stayed = asyncio.run(storm(server.port, rng, count, answers))
    begun = time.monotonic()
    assert eventually(lambda: clean(server))
    seconds = time.monotonic() - begun
    assert eventually(lambda: open_files() <= files + 2)
    assert stayed >= 2
    more = resident() - memory
    print(f"{count} cuts, {stayed} neighbours; clean after {seconds:.2f} s, {more:+.1f} MB")
    return seconds, more


def test_streams_cut_in_every_phase_leave_nothing_behind(launch, tokenizer, eventually):
    weather(launch, tokenizer, eventually, 160)


@pytest.mark.long
def test_two_thousand_streams_cut_in_every_phase_leave_nothing_behind(launch, tokenizer, eventually):
    seconds, more = weather(launch, tokenizer, eventually, 2000)
    assert seconds < 1
    assert more < 5


@pytest.mark.parametrize("forgets", [False, True])
def test_a_worker_that_forgets_to_abort_leaves_pages_behind(launch, tokenizer, eventually, forgets):
    """Negative control."""
    server = launch(engine=tiny_engine(tokenizer), capacity=9, max_model_len=256)
    step = server.engine.step
    server.engine.step = lambda: time.sleep(0.02) or step()
    if forgets:
        server.worker._abort = lambda tickets: None

    async def leave() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(post("hello", max_tokens=200, ignore_eos=True))
        while not server.engine.stats.steps:
            await asyncio.sleep(0.001)
        writer.close()

    asyncio.run(leave())
    assert eventually(lambda: server.worker.idle)
    assert eventually(lambda: clean(server), seconds=1) != forgets


@pytest.mark.long
def test_two_hundred_streams_for_five_minutes_with_a_third_leaving_are_all_what_they_are_alone(
    launch, tokenizer, eventually
):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    server = launch(engine=tiny_engine(tokenizer, rows=64), capacity=72, max_queued=300, max_model_len=256)
    answers = {prompt: asyncio.run(read_all(server.port, post(prompt, max_tokens=60)))[1] for prompt in PROMPTS}
    files, end, seen = open_files(), time.monotonic() + 300, {"stayed": 0, "left": 0}

    async def client() -> None:
        while time.monotonic() < end:
            prompt = rng.choice(PROMPTS)
            if rng.random() < 1 / 3:
                await cut(server.port, rng, prompt, rng.choice(PHASES))
                seen["left"] += 1
            else:
                status, text, *_ = await read_all(server.port, post(prompt, max_tokens=60))
                assert (status, text) == (200, answers[prompt])
                seen["stayed"] += 1

    async def all_clients() -> None:
        await asyncio.gather(*(client() for _ in range(200)))

    asyncio.run(all_clients())
    print(seen)
    assert eventually(lambda: clean(server))
    assert eventually(lambda: open_files() <= files + 2)
    assert seen["stayed"] > 500
    assert seen["left"] > 100
