import ast
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, mutant
from shadow import Broken
from simulation import Limits, World

from benthic.inference.config import SamplingParams
from benthic.inference.drafting import Always
from benthic.inference.request import Seq
from benthic.inference.scheduler import Plan, Scheduler

WORLDS, EVENTS = 100, 300


def test_random_lives_keep_every_invariant():
    worlds = [World(seed) for seed in range(WORLDS)]
    for world in worlds:
        world.run(EVENTS)
    assert sum(world.finished for world in worlds) > 3000
    assert sum(world.preemptions for world in worlds) > 300
    assert sum(world.hits for world in worlds) > 3000
    assert sum(world.wasted for world in worlds) > 300


@pytest.mark.long
def test_a_million_events_keep_every_invariant():
    for seed in range(2000):
        World(seed).run(500)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulation_kills(name):
    """Negative control: with one bug, the invariant that is there for it breaks in one of the worlds."""
    old, new, invariant = MUTANTS[name]
    broken = mutant(old, new)
    for seed in range(3 * WORLDS):
        try:
            World(seed, broken).run(EVENTS)
        except (Broken, RuntimeError, ValueError, IndexError, KeyError) as error:
            if invariant in str(error):
                return
    pytest.fail(f"no world says {invariant!r}")


def test_every_invariant_has_a_mutant_that_it_kills():
    invariants = set()
    for name in ("shadow.py", "simulation.py"):
        for node in ast.walk(ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("require", "compare")):
                invariants |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    assert len(invariants) > 40
    assert invariants <= {invariant for _, _, invariant in MUTANTS.values()}


def test_the_same_seed_lives_the_same_life():
    one, two = World(3), World(3)
    one.run(300), two.run(300)
    assert one.finished > 0
    assert (one.finished, one.preemptions, one.device.memory) == (two.finished, two.preemptions, two.device.memory)


def scheduler(**limits) -> Scheduler:
    defaults = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "page_size": 4,
        "num_pages": 100,
        "num_speculative_tokens": 0,
        "enable_prefix_caching": True,
    }
    built = Limits(**(defaults | limits))
    return Scheduler(built, Always(built.num_speculative_tokens))


def seq(request_id: int, ids: int | list[int], **fields) -> Seq:
    """A request of so many tokens of its own, or of these."""
    ids = [100 * request_id + i for i in range(ids)] if isinstance(ids, int) else list(ids)
    defaults = {"max_len": 64, "num_drafts": 9, "stop": frozenset([2])}
    return Seq(request_id=request_id, ids=ids, prompt_len=len(ids), params=SamplingParams(), **(defaults | fields))


def start(s: Scheduler, *seqs: Seq) -> None:
    for one in seqs:
        s.add(one)


def rows(plan: Plan) -> list[tuple[int, int, int]]:
    """Request, count and start of each row."""
    return [(one.request_id, count, begin) for one, count, begin in zip(plan.seqs, plan.counts, plan.starts)]


def run(s: Scheduler, steps: int = 1, token: int = 1) -> Plan:
    """Steps in which every row chooses `token` and accepts no draft. The last one's plan."""
    for _ in range(steps):
        plan = s.plan()
        s.commit(plan, [[token]] * len(plan.seqs))
    return plan


def test_decode_rows_come_first_and_chunks_of_prompts_fill_the_budget():
    s = scheduler(max_num_batched_tokens=10)
    start(s, seq(0, 4), seq(1, 15))
    assert rows(run(s)) == [(0, 4, 0), (1, 6, 0)]
    plan = run(s)
    assert (plan.decode, rows(plan)) == (1, [(0, 1, 4), (1, 9, 6)])
    start(s, seq(2, 3))
    plan = run(s)
    assert (plan.decode, rows(plan)) == (2, [(0, 1, 5), (1, 1, 15), (2, 3, 0)])


def test_fewer_requests_run_where_the_budget_could_not_serve_prompts_too():
    s = scheduler(max_num_batched_tokens=8)
    start(s, *(seq(i, 4) for i in range(9)))
    run(s, 20)
    assert s.max_rows == len(s.running) == 7  # six decode, and two tokens are left for the prompt of the seventh
    assert scheduler(max_num_batched_tokens=64).max_rows == 8


def test_a_prefix_is_found_once_the_step_that_computed_it_is_committed():
    s = scheduler()
    prompt = list(range(10, 22))  # three pages
    start(s, seq(0, prompt))
    plan = s.plan()
    start(s, seq(1, prompt))
    assert rows(s.plan()) == [(0, 1, 12), (1, 12, 0)]  # not yet
    s.commit(plan, [[1]])
    start(s, last := seq(2, prompt))
    assert rows(s.plan())[-1] == (2, 4, 8)  # not the third page, of which a token must be computed
    assert last.cached_tokens == 8
    assert last.pages[:2] == s.running[0].pages[:2]
    assert last.pages[2] != s.running[0].pages[2]


def test_answers_are_found_too_and_other_salts_and_other_beginnings_are_not():
    s = scheduler()
    start(s, first := seq(0, 6))
    run(s, 10)
    whole = first.ids[:12]
    others = [seq(1, whole), seq(2, whole, salt="x"), seq(3, [9, *whole[1:]]), seq(4, [*whole[:5], 9, *whole[6:]])]
    start(s, *others)
    run(s)
    assert [other.cached_tokens for other in others] == [8, 0, 0, 4]


def test_a_page_of_a_drafting_engine_is_found_by_those_who_go_on_with_the_same_token():
    prompt = list(range(10, 22))
    for drafts, expected in ((0, [8, 8]), (1, [8, 4])):
        s = scheduler(num_speculative_tokens=drafts)
        start(s, seq(0, prompt))
        run(s)
        start(s, same := seq(1, prompt), other := seq(2, [*prompt[:8], 5, 5]))
        run(s)
        assert [same.cached_tokens, other.cached_tokens] == expected


def test_what_was_used_least_recently_is_forgotten_first_from_its_end():
    s = scheduler(num_pages=16)
    for i in range(4):
        start(s, seq(i, 9, max_len=10))
        run(s)  # two full pages each, eight in all; the third of each is handed on
    start(s, seq(4, seq(0, 9).ids, max_len=10))  # request 0's are used again
    run(s)
    start(s, seq(5, 40, max_len=41))  # ten pages: eight that nobody can find, then those of request 1
    run(s)
    assert [len(s.pool.find(seq(i, 9).ids, "", 99)[0]) for i in range(4)] == [2, 0, 2, 2]
    s = scheduler(num_pages=16)
    start(s, seq(0, 17, max_len=18))
    run(s)
    start(s, seq(1, 54, max_len=55))  # 14 pages: twelve empty ones, and the last two of request 0
    run(s)
    assert len(s.pool.find(seq(0, 17).ids, "", 99)[0]) == 2


def test_a_reset_forgets_everything_even_what_runs():
    s = scheduler()
    start(s, first := seq(0, 9), seq(1, 5))
    run(s)
    s.reset_cache()
    run(s, 8)  # both fill more pages, with latents on top of old ones
    start(s, *(again := [seq(2, first.ids), seq(3, seq(1, 5).ids + [1] * 8)]))
    run(s)
    assert [one.cached_tokens for one in again] == [0, 0]
    start(s, third := seq(4, first.ids))
    run(s)
    assert third.cached_tokens == len(first.ids) // 4 * 4 - 4 * (len(first.ids) % 4 == 0)


def test_without_prefix_caching_nothing_is_found():
    s = scheduler(enable_prefix_caching=False)
    start(s, seq(0, 9))
    run(s)
    start(s, again := seq(1, seq(0, 9).ids))
    run(s)
    assert again.cached_tokens == 0


def test_the_latest_arrival_yields_its_pages_and_finds_them_again():
    s = scheduler(num_pages=16, max_model_len=40)
    start(s, first := seq(0, 20, max_len=40), last := seq(1, 30, max_len=40))
    assert rows(run(s, 7)) == [(0, 1, 25), (1, 1, 35)]  # on seven pages and nine
    assert rows(run(s)) == [(0, 1, 26)]
    assert (s.preemptions, [one.request_id for one in s.waiting]) == (1, [1])
    s.finish(first, "stop")
    assert rows(run(s)) == [(1, 1, 36)]
    assert last.cached_tokens == 0  # of its prompt, when it first came in


def test_a_smaller_priority_goes_first_and_others_make_way():
    s = scheduler(num_pages=16)
    start(s, seq(0, 30), seq(1, 20))
    run(s, 2)
    start(s, seq(2, 22, priority=-1))
    assert rows(run(s)) == [(0, 1, 31), (2, 22, 0)]
    assert [one.request_id for one in s.waiting] == [1]
    assert [one.request_id for one in s.running] == [2, 0]


def test_the_first_by_rank_ends_within_its_bound_whatever_comes_after():
    s = scheduler(max_num_batched_tokens=16, num_pages=40, num_speculative_tokens=1)
    start(s, *(seq(i, 20, priority=5) for i in range(8)))
    run(s, 5)
    start(s, first := seq(50, 50))
    steps = 0
    while not first.finish_reason:
        start(s, *(seq(100 + 10 * steps + i, 60, priority=i) for i in range(1, 4)))
        run(s)
        steps += 1
    assert steps <= -(-50 // s.share) + 64 - 50


def test_a_request_may_starve_behind_smaller_priorities_only():
    """The bound's other side: who ranks behind an endless stream waits for ever."""
    s = scheduler(max_num_seqs=1, max_model_len=8, num_pages=2)
    start(s, last := seq(0, 4, max_len=8, priority=1))
    for i in range(1, 50):
        start(s, seq(i, 4, max_len=5))
        run(s)
    assert last.computed == 0
    run(s, 4)
    assert last.finish_reason == "length"


def test_ahead_of_the_device_a_row_goes_on_from_the_row_before():
    s = scheduler()
    start(s, seq(0, 4, max_len=6), seq(1, 3, max_len=9))
    one = s.plan()
    two = s.plan()
    assert (rows(one), one.sources) == ([(0, 4, 0), (1, 3, 0)], [-1, -1])
    assert (rows(two), two.sources) == ([(0, 1, 4), (1, 1, 3)], [0, 1])
    with pytest.raises(RuntimeError, match="two steps are in flight"):
        s.plan()
    with pytest.raises(RuntimeError, match="in the order"):
        s.commit(two, [[1], [1]])
    assert s.commit(one, [[1], [1]]) == [1, 1]
    three = s.plan()
    assert (rows(three), three.sources) == ([(1, 1, 4)], [1])  # request 0 ends with step two, whatever it brings
    assert s.commit(two, [[1], [1]]) == [1, 1]
    assert [one.finish_reason for one in two.seqs] == ["length", ""]


def test_ahead_of_the_device_drafts_are_planned_by_their_bound_and_settle_later():
    s = scheduler(num_speculative_tokens=2)
    start(s, one := seq(0, 6))
    plans = [s.plan(), s.plan()]
    s.commit(plans[0], [[1]])
    plans.append(s.plan())
    assert [(rows(plan), plan.sources) for plan in plans[1:]] == [([(0, 3, 6)], [0]), ([(0, 3, 7)], [0])]
    assert (one.start, one.slack, len(one.pages)) == (8, 4, 4)  # 8 to 12 tokens, and a draft's draft
    s.commit(plans[1], [[1, 1, 1]])  # both drafts were right: the row in flight starts at 9
    assert (one.computed, one.start, one.slack) == (9, 10, 2)
    s.commit(plans[2], [[1]])
    assert (one.computed, one.start, one.slack, len(one.ids)) == (10, 10, 0, 11)


def test_a_row_that_had_ended_is_wasted_and_keeps_its_pages_till_then():
    s = scheduler()
    start(s, one := seq(0, 4))
    first, second = s.plan(), s.plan()
    assert s.commit(first, [[2]]) == [1]
    assert (one.finish_reason, s.running, len(s.pool.free)) == ("stop", [], 98)
    assert s.plan().seqs == []
    assert s.commit(second, [[7]]) == [0]
    assert (one.ids[4:], len(s.pool.free), s.in_flight) == ([2], 100, 0)


def test_whoever_must_make_way_does_so_with_nothing_in_flight():
    s = scheduler(max_num_seqs=1)
    start(s, seq(0, 4))
    run(s)
    flying = s.plan()
    start(s, seq(1, 4, priority=-1))
    assert s.plan().seqs == []
    s.commit(flying, [[1]])
    assert rows(s.plan()) == [(1, 4, 0)]


def test_a_failed_step_has_not_happened():
    s = scheduler(num_speculative_tokens=1)
    start(s, seq(0, 9), gone := seq(1, 5))
    run(s, 3)
    lost = [rows(s.plan()), rows(s.plan())]
    s.finish(gone, "abort")
    s.rollback()
    assert rows(run(s)) == [row for row in lost[0] if row[0] == 0]
    assert gone.pages == []


def test_stop_tokens_count_from_the_least_length_on():
    s = scheduler()
    start(s, free := seq(0, 4), bound := seq(1, 4, min_len=6))
    run(s, 3, token=2)
    assert free.ids[4:] == [2]
    assert bound.ids[4:] == [2, 2, 2]
    assert (free.finish_reason, bound.finish_reason) == ("stop", "stop")


def test_what_is_given_twice_is_an_error():
    s = scheduler()
    pages = s.pool.take(2)
    copy = list(pages)
    s.pool.give(pages)
    assert pages == []
    with pytest.raises(RuntimeError, match="nobody holds it"):
        s.pool.give(copy)
    with pytest.raises(RuntimeError, match="101 pages wanted, 100 free"):
        s.pool.take(101)


def test_decisions_are_made_without_torch():
    code = "import sys, benthic.inference.scheduler, benthic.inference.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
