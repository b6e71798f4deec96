"""Drafting that stops where it does not pay: simulated clocks and acceptances."""

import random
from dataclasses import dataclass, field

import pytest

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.drafting import LEAST, MOST, SETTLE, TRIAL, Adaptive, Always, make
from benthic.inference.engine import Engine


@dataclass
class Machine:
    """Steps take `plain` seconds, or `longer` times as long with drafts, of which each row accepts `right`."""

    plain: float
    longer: float
    right: float
    noise: float = 0.0
    now: float = 0.0
    made: list[int] = field(default_factory=lambda: [0, 0])  # drafts of each step so far

    def clock(self) -> float:
        return self.now


def live(policy: Adaptive, machine: Machine, steps: int, rows: int = 1, rng: random.Random | None = None) -> list[bool]:
    """Run steps, each planned while the one before is in flight. Which of them made drafts."""
    rng, begin = rng or random.Random(0), len(machine.made)
    for _ in range(steps):
        machine.made.append(policy.depth(rows))
        verified, drafts = machine.made[-3:-1]
        seconds = machine.plain * (machine.longer if verified else 1) * (1 + machine.noise * rng.random())
        if bool(verified) != bool(drafts):
            seconds += 0.5  # captures a graph
        machine.now += seconds
        whole = int(machine.right)
        tokens = sum(1 + whole + (rng.random() < machine.right - whole) for _ in range(rows)) if verified else rows
        policy.observe(rows, verified, drafts, tokens)
    return [depth > 0 for depth in machine.made[begin:]]


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_drafts_that_pay_go_on_and_others_stop(rows):
    fast = Machine(0.003, 1.3, 0.9, noise=0.2)
    policy = Adaptive(2, fast.clock)
    assert sum(live(policy, fast, 4000, rows)) > 0.95 * 4000
    slow = Machine(0.01, 2.2, 0.9, noise=0.2)
    policy = Adaptive(2, slow.clock)
    made = live(policy, slow, 4000, rows)
    assert all(made[:LEAST])  # begins with drafts
    assert sum(made[LEAST:]) < 0.1 * 4000


def test_it_follows_the_work_in_both_directions():
    machine = Machine(0.003, 1.5, 1.2)
    policy = Adaptive(3, machine.clock)
    live(policy, machine, 1000)
    assert policy.buckets[1].on
    machine.right = 0.1
    live(policy, machine, 3 * MOST)
    assert not policy.buckets[1].on
    machine.right = 2.5
    live(policy, machine, 3 * MOST)
    assert policy.buckets[1].on


@pytest.mark.parametrize("right", [0.0, 0.55, 2.0])
def test_trials_are_a_bounded_share_of_the_steps(right):
    machine = Machine(0.001, 1.5, right, noise=0.1)
    policy = Adaptive(2, machine.clock)
    steps, trials, rng = 20_000, 0, random.Random(0)
    for _ in range(steps):
        live(policy, machine, 1, rng=rng)
        trials += policy.buckets[1].trial
    assert 0 < trials <= steps * TRIAL / (LEAST + TRIAL)


def test_what_pays_about_as_much_changes_nothing():
    """Hysteresis: within the margin either way, the mode stays."""
    machine = Machine(0.002, 1.5, 0.5, noise=0.02)
    for on in (True, False):
        policy = Adaptive(1, machine.clock)
        policy.depth(64)
        policy.buckets[7].on = on
        live(policy, machine, 5000, rows=64)
        assert policy.buckets[7].on == on


def test_each_number_of_rows_learns_for_itself():
    few, many = Machine(0.002, 1.1, 0.8), Machine(0.02, 2.5, 0.8)
    policy = Adaptive(1)
    for _ in range(20):
        policy.clock = few.clock
        live(policy, few, 100, rows=2)
        policy.clock = many.clock
        live(policy, many, 100, rows=100)
    assert policy.buckets[2].on
    assert not policy.buckets[7].on


def test_a_step_that_compiles_or_waits_decides_nothing():
    machine = Machine(0.002, 1.2, 0.9)
    policy, rng = Adaptive(1, machine.clock), random.Random(1)
    for _ in range(3000):
        live(policy, machine, 1, rng=rng)
        if rng.random() < 0.02:
            machine.now += 1.0
    assert policy.buckets[1].on
    assert SETTLE < TRIAL


def test_steps_with_prompts_and_changes_of_mode_are_not_measured():
    policy = Adaptive(2, lambda: 0.0)
    policy.observe(0, 2, 2, 5)
    policy.observe(3, 0, 2, 3)
    policy.observe(3, 2, 0, 4)
    assert not policy.buckets


def test_an_engine_asks_the_policy_only_where_it_drafts_and_may_adapt():
    assert make(0, True) == Always(0)
    assert make(2, False) == Always(2)
    assert isinstance(make(2, True), Adaptive)


def test_answers_do_not_depend_on_what_pays(foreseeing, prompts):
    """A clock by which drafts never pay: the engine stops, tries again, and answers the same."""
    params = [SamplingParams(max_tokens=40, seed=i, temperature=i % 2) for i in range(len(prompts))]
    want = Engine(foreseeing, None, EngineConfig()).generate(prompts, params)
    engine = Engine(foreseeing, None, EngineConfig(num_speculative_tokens=2, max_num_seqs=1, page_size=4))
    assert isinstance(engine.drafting, Adaptive)
    seconds = [0.0]
    observe, engine.drafting.clock = engine.drafting.observe, lambda: seconds[0]

    def slow(rows: int, verified: int, made: int, tokens: int) -> None:
        seconds[0] += 10.0 if verified else 1.0
        observe(rows, verified, made, tokens)

    engine.drafting.observe = slow
    got = engine.generate(prompts, params)
    assert [o.token_ids for o in got] == [o.token_ids for o in want]
    assert not engine.drafting.buckets[1].on
    assert 0 < engine.stats.drafted < engine.stats.decode_rows
