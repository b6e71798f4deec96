"""The queue alone: turns by tokens, bounds, and the wait that refused clients are told of."""

import ast
from pathlib import Path

import pytest
from queue_mutants import MUTANTS, mutant
from queue_world import Broken, World

from benthic.server import queue
from benthic.server.queue import Entry, Full, Queue

WORLDS, EVENTS = 40, 300


def test_random_lives_keep_every_invariant():
    worlds = [World(seed) for seed in range(WORLDS)]
    for world in worlds:
        world.run(EVENTS)
    assert sum(world.started for world in worlds) > 3000
    assert sum(world.refused for world in worlds) > 1000
    assert sum(world.pushed for world in worlds) > 300


@pytest.mark.long
def test_a_million_events_keep_every_invariant():
    for seed in range(1000):
        World(seed).run(400)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_world_kills(name):
    """Negative control: with one bug, the invariant that is there for it breaks in one of the worlds."""
    old, new, invariant = MUTANTS[name]
    broken = mutant(old, new)
    for seed in range(3 * WORLDS):
        try:
            World(seed, broken).run(EVENTS)
        except (Broken, ValueError, IndexError, KeyError) as error:
            if invariant in str(error):
                return
    pytest.fail(f"no world says {invariant!r}")


def test_every_invariant_has_a_mutant_that_it_kills():
    source = Path(__file__).with_name("queue_world.py").read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    said = {call.args[1].value for call in calls if ast.unparse(call.func) == "require"}
    assert len(said) > 15
    assert [what for what in said if not any(invariant in what for _, _, invariant in MUTANTS.values())] == []


def play(queue: Queue, clients: dict[str, tuple[int, int]], tokens: int) -> dict[str, int]:
    """{client: tokens it was given} of `tokens`, where all {client: (prompt, answer)} always have requests waiting."""
    left, given = {}, dict.fromkeys(clients, 0)
    while sum(given.values()) < tokens:
        for name, (prompt, _) in clients.items():
            while sum(entry.client == name for entry in queue_waiting(queue)) < 3:
                queue.add([Entry(client=name, tokens=prompt)])
        while (entry := queue.next()) is not None:
            left[entry] = clients[entry.client][1]
            given[entry.client] += entry.tokens
        for entry in list(left):
            queue.give(entry, 1)
            given[entry.client] += 1
            left[entry] -= 1
            if not left[entry]:
                del left[entry]
                queue.end(entry, 0.0)
    return given


def queue_waiting(queue: Queue) -> list[Entry]:
    return [entry for client in queue._clients.values() for entry in client.waiting]


def test_clients_get_the_same_tokens_however_long_their_requests_are():
    sizes = {"long": (500, 300), "short": (3, 2), "prompts": (200, 1), "answers": (1, 200)}
    given = play(Queue(4, 100, 10**6), sizes, 200_000)
    assert all(abs(tokens - 50_000) <= 3 * 4 * 800 for tokens in given.values()), given


def test_a_polite_client_waits_for_one_place_however_long_the_flood_is():
    turns = Queue(2, 1000, 10**6)
    turns.add([Entry(client="flood", tokens=10) for _ in range(900)])
    running = [turns.next(), turns.next()]
    for entry in running:
        turns.give(entry, 50)
    polite = Entry(client="polite", tokens=10)
    turns.add([polite])
    turns.end(running[0], 1.0)
    assert turns.next() is polite


def test_a_prompt_that_was_found_computed_costs_nothing():
    turns = Queue(1, 10, 10**6)
    turns.add([Entry(client="cached", tokens=1000) for _ in range(3)])
    turns.add([Entry(client="new", tokens=100) for _ in range(3)])
    order = []
    while (entry := turns.next()) is not None:
        order.append(entry.client)
        if entry.client == "cached":
            turns.give(entry, -990)
        turns.end(entry, 0.0)
    assert order == ["cached", "new", "cached", "cached", "new", "new"]


def test_a_group_comes_whole_or_not_at_all():
    turns = Queue(1, 2, 10**6)
    turns.add([Entry(client="a", tokens=1)])
    turns.next()
    with pytest.raises(Full):
        turns.add([Entry(client="a", tokens=1) for _ in range(3)])
    assert turns.waiting == 0
    assert turns.add([Entry(client="a", tokens=1) for _ in range(2)]) == []
    assert turns.waiting == 2


def test_prompt_tokens_that_wait_are_bounded_and_the_client_with_most_gives_way():
    turns = Queue(1, 100, 1000)
    turns.add([Entry(client="big", tokens=400)])
    turns.next()
    turns.add([Entry(client="big", tokens=400) for _ in range(2)])
    small = [Entry(client="small", tokens=90) for _ in range(5)]
    assert turns.add(small[:2]) == []
    assert [entry.client for entry in turns.add(small[2:4])] == ["big"]
    with pytest.raises(Full):
        turns.add([Entry(client="big", tokens=600)])
    assert turns.tokens == 400 + 4 * 90


def test_the_wait_that_is_asked_for_is_that_of_those_who_wait_at_the_measured_rate():
    turns = Queue(1, 100, 10**6)
    assert turns.retry_after(5.0) == 1  # nothing measured yet
    turns.add([Entry(client="a", tokens=1) for _ in range(50)])
    for second in range(1, 41):
        entry = turns.next()
        turns.end(entry, second / 2)  # two a second
    assert turns.waiting == 10
    assert turns.retry_after(20.0) == 6
    assert turns.retry_after(40.0) == 13  # nothing has ended for a while
    turns.add([Entry(client="a", tokens=1) for _ in range(80)])
    assert turns.retry_after(10_000.0) == queue.LONGEST_WAIT


def test_what_is_remembered_of_clients_is_bounded(monkeypatch):
    monkeypatch.setattr(queue, "MAX_CLIENTS", 50)
    turns = Queue(2, 5, 10**6)
    heavy = Entry(client="heavy", tokens=10**5)
    turns.add([heavy])
    turns.add([Entry(client="waits", tokens=1) for _ in range(3)])
    for _ in range(2):
        turns.next()
    turns.end(heavy, 0.0)
    for number in range(500):
        stranger = Entry(client=f"stranger {number}", tokens=1)
        turns.add([stranger])
        turns.leave(stranger)
        assert len(turns._clients) <= 55
    assert "heavy" in turns._clients  # what it owes is not forgotten


def test_the_queue_knows_no_clock_loop_or_tensor():
    tree = ast.parse(Path(queue.__file__).read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"math", "bisect", "collections", "collections.abc", "dataclasses", "typing"}
