import subprocess
import sys

import pytest
from simulation import Broken, World, mutant

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.pages import PagePool
from benthic.inference.request import Seq
from benthic.inference.scheduler import Scheduler

MUTANTS = {
    "page 0 is handed out": ("range(num_pages, TRASH, -1)", "range(num_pages - 1, TRASH - 1, -1)"),
    "pages are rounded down": ("return -(-tokens // self.page_size)", "return max(1, tokens // self.page_size)"),
    "pages are returned and kept": ("        pages.clear()\n", ""),
    "a page is lost on return": ("self.free.extend(reversed(pages))", "self.free.extend(pages[1:])"),
    "a finished request keeps its pages": ("                    self.pool.give(seq.pages)\n", ""),
    "an abort keeps the pages": (
        "        self.pool.give(seq.pages)\n        seq.finish_reason",
        "        seq.finish_reason",
    ),
    "the earliest is preempted": ("seq = self.running.pop()", "seq = self.running.pop(0)"),
    "a preempted request believes its latents": ("        seq.computed = 0\n", ""),
    "a preempted request goes to the end": ("self.waiting.appendleft(seq)", "self.waiting.append(seq)"),
    "growth is one short": ("if seq.computed + count <=", "if seq.computed + count - 1 <="),
    "a draft is fed without a page": ("len(seq.ids) + 2 <= seq.max_len and self._grow(seq, 2)", "True"),
    "tokens after a stop are kept": ("finished = True\n                    break", "finished = True"),
    "padding is not budgeted": ("(len(seqs) + 1) * max(*counts, count)", "sum(counts) + count"),
    "prefill starves decode": ("not (self._prefilled and decodable)", "True"),
    "decode starves prefill": ("not (self._prefilled and decodable)", "not decodable"),
    "the last row is forgotten": (
        "while len(seqs) < len(self.running) and",
        "while len(seqs) < len(self.running[:-1]) and",
    ),
    "too many run": ("len(self.running) < self.config.max_num_seqs", "len(self.running) <= self.config.max_num_seqs"),
    "the middle of a prompt answers": ("if plan.prefill and seq.computed < len(seq.ids):", "if False:"),
    "a rejected draft counts as computed": ("else len(chosen)", "else count"),
    "an answer is one too long": ("len(seq.ids) >= seq.max_len", "len(seq.ids) > seq.max_len"),
}
WORLDS, EVENTS = 100, 300


def live(scheduler_class: type[Scheduler]) -> list[World]:
    worlds = [World(seed, scheduler_class) for seed in range(WORLDS)]
    for world in worlds:
        world.run(EVENTS)
    return worlds


def test_random_lives_keep_every_invariant_and_give_every_answer():
    worlds = live(Scheduler)
    assert sum(world.finished for world in worlds) > 700
    assert sum(world.preemptions for world in worlds) > 200


@pytest.mark.long
def test_a_million_events_keep_every_invariant():
    for seed in range(1000):
        World(seed).run(1000)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulation_kills(name):
    """Negative control: a scheduler with one bug cannot live through the same worlds."""
    broken = mutant(*MUTANTS[name])
    with pytest.raises((Broken, RuntimeError, ValueError, IndexError)):
        live(broken)


def test_the_same_seed_lives_the_same_life():
    one, two = World(3), World(3)
    one.run(300), two.run(300)
    assert (one.finished, one.preemptions, one.cells) == (two.finished, two.preemptions, two.cells)


def seq(request_id: int, length: int) -> Seq:
    params = SamplingParams(temperature=0)
    return Seq(request_id=request_id, ids=[1] * length, prompt_len=length, max_len=64, params=params)


def scheduler(**limits: int) -> Scheduler:
    return Scheduler(EngineConfig(**({"max_model_len": 64} | limits)).resolve(64, 1))


def run(s: Scheduler) -> tuple[bool, list[int], list[int]]:
    plan = s.plan()
    rows = len(plan.seqs)
    s.commit(plan, [[2]] * rows, [[0.0]] * rows, [-1] * rows)
    return plan.prefill, [seq.request_id for seq in plan.seqs], plan.counts


def test_prompts_share_a_prefill_batch_within_the_padded_budget():
    s = scheduler(max_num_batched_tokens=24)
    for i, length in enumerate([8, 8, 8, 3]):
        s.add(seq(i, length))
    assert run(s) == (True, [0, 1, 2], [8, 8, 8])
    assert run(s) == (False, [0, 1, 2], [1, 1, 1])  # those who run are not kept waiting by those who come
    assert run(s) == (True, [3], [3])


def test_a_long_prompt_is_computed_in_pieces_between_the_decode_steps_of_others():
    s = scheduler(max_num_batched_tokens=8)
    s.add(seq(0, 4))
    s.add(seq(1, 20))
    assert run(s) == (True, [0], [4])
    assert run(s) == (False, [0], [1])
    assert run(s) == (True, [1], [8])
    assert run(s) == (False, [0], [1])
    assert run(s) == (True, [1], [8])
    assert run(s) == (False, [0], [1])
    assert run(s) == (True, [1], [4])
    assert run(s) == (False, [0, 1], [1, 1])


def test_the_latest_arrival_yields_its_pages():
    s = scheduler(page_size=8, num_pages=9)
    s.add(seq(0, 24))
    s.add(seq(1, 40))
    assert run(s) == (True, [0, 1], [24, 40])  # 3 + 5 of 9 pages
    assert run(s) == (False, [0], [1])  # request 0 takes the last page, request 1 steps back
    assert [w.request_id for w in s.waiting] == [1]
    assert s.preemptions == 1


def test_a_pool_hands_out_what_it_has_and_no_more():
    pool = PagePool(3, 16)
    taken = pool.take(3)
    assert sorted(taken) == [1, 2, 3]
    with pytest.raises(RuntimeError, match="1 pages wanted, 0 free"):
        pool.take(1)
    pool.give(taken)
    assert taken == []
    assert sorted(pool.free) == [1, 2, 3]
    assert [pool.needed(n) for n in (1, 16, 17)] == [1, 1, 2]


def test_decisions_are_made_without_torch():
    code = "import sys, benthic.inference.scheduler, benthic.inference.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
