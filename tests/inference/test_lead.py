"""The others see every step as rank 0 sees it, whatever requests do: one process, messages through a queue."""

import json
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benthic.base.errors import BenthicError
from benthic.inference import engine as engines
from benthic.inference.config import EngineConfig, SamplingParams, StructuredOutputsParams
from benthic.inference.engine import Engine
from benthic.inference.lead import Following, Leading, from_data, to_data
from benthic.inference.request import Request
from benthic.inference.scheduler import Plan
from benthic.parallel.config import ParallelConfig
from benthic.parallel.ranks import Ranks


class Queue(Ranks):
    """Rank 0 and one other in one process."""

    def __init__(self) -> None:
        self.rank, self.size, self.failure, self.messages = 0, 2, "", deque()

    def tell(self, message: dict[str, Any]) -> None:
        self.messages.append(json.dumps(message))

    def hear(self) -> dict[str, Any]:
        return json.loads(self.messages.popleft())

    def guarded(self, work):
        return work()


def state(plan: Plan, mask: torch.Tensor | None) -> Any:
    """All that a runner reads of a plan."""
    rows = [
        (s.request_id, s.ids, s.pages, s.computed, s.fill, s.drafts, s.prompt_len, s.max_len, s.stop, to_data(s.params))
        for s in plan.seqs
    ]
    numbers = (plan.counts, plan.starts, plan.sources, plan.decode, list(plan.scores))
    return json.dumps([rows, numbers, None if mask is None else mask.tolist()], default=sorted)


def led(model, config: EngineConfig) -> tuple[Engine, Following, list[Any], list[Any]]:
    """(engine of rank 0, the other's runner, what either computed)."""
    engine, ranks = Engine(model, None, config), Queue()
    ours: list[Any] = []
    theirs: list[Any] = []
    share: Any = SimpleNamespace(ranks=ranks, parallel=ParallelConfig(), placement=None)
    true = engine.runner

    def launch(plan: Plan, mask: torch.Tensor | None = None) -> Any:
        ours.append(state(plan, mask))
        return true.launch(plan, mask)

    def seen(plan: Plan, mask: torch.Tensor | None = None) -> None:
        theirs.append(state(plan, mask))

    stub = SimpleNamespace(launch=launch, collect=true.collect, cache=true.cache, ahead=0, routed=None)
    engine.runner = Leading(stub, share)  # type: ignore[arg-type]
    other = Following(SimpleNamespace(launch=seen, cache=None, ahead=0, routed=None), share)  # type: ignore[arg-type]
    return engine, other, ours, theirs


@pytest.mark.parametrize("drafts", [0, 1])
def test_every_step_is_the_same_for_all_while_requests_come_go_and_step_back(model, prompts, drafts: int) -> None:
    limits = EngineConfig(max_num_seqs=4, page_size=8, max_model_len=64, num_pages=9, num_speculative_tokens=drafts)
    engine, other, ours, theirs = led(model, limits)
    rng, ids, waiting = random.Random(3), [], prompts[:16]
    while engine.busy or waiting:
        if waiting and rng.random() < 0.4:
            length, seed = rng.randrange(1, 24), rng.randrange(99)
            params = SamplingParams(
                max_tokens=length, seed=seed, stop_token_ids=(3, 5), logit_bias={7: 1.5},
                prompt_logprobs=rng.randrange(-1, 3),
            )  # fmt: skip
            request = Request(prompt_token_ids=waiting.pop(), params=params, priority=rng.randrange(3))
            ids.append(engine.add(request))
        if ids and rng.random() < 0.05:
            engine.abort(rng.choice(ids))
        engine.step()
        while other.ranks.messages:  # type: ignore[attr-defined]
            assert other._next()
        assert theirs == ours
    assert engine.stats.preemptions > 0
    assert len(other._seqs) <= 4  # those that have ended are forgotten
    engine.close()
    assert not other._next()


def test_masks_of_guided_rows_arrive_bit_for_bit(model, monkeypatch) -> None:
    engine, other, ours, theirs = led(model, EngineConfig(max_num_seqs=2, page_size=8, max_model_len=64))

    class Matcher:
        slow = False

        def accept(self, tokens: list[int]) -> None: ...

    words = torch.tensor([[-1, 0x7FFFFFF0]], dtype=torch.int32)
    monkeypatch.setattr(Engine, "grammars", SimpleNamespace(matcher=lambda form: Matcher()))
    monkeypatch.setattr(engines, "bitmask", lambda guided, vocab: words)
    form = StructuredOutputsParams(regex="a+")
    engine.generate([[4, 5, 6]], SamplingParams(max_tokens=3, temperature=0, structured_outputs=form))
    while other.ranks.messages:  # type: ignore[attr-defined]
        other._next()
    assert theirs == ours
    assert all(json.loads(step)[2] == words.tolist() for step in theirs)


def test_a_step_whose_results_are_wrong_fails_alone_and_the_next_goes_on(model) -> None:
    engine, other, ours, theirs = led(model, EngineConfig(max_num_seqs=2, page_size=8, max_model_len=64))
    weight = model.lm_head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(BenthicError, match="not finite"):
        engine.generate([[4, 5]], SamplingParams(max_tokens=3))
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
    assert len(engine.generate([[4, 5]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    while other.ranks.messages:  # type: ignore[attr-defined]
        other._next()
    assert theirs == ours


def test_only_rank_0_takes_requests(model) -> None:
    _, other, *_ = led(model, EngineConfig(max_num_seqs=2, page_size=8, max_model_len=64))
    with pytest.raises(BenthicError, match="requests are rank 0's"):
        other.launch(Plan([], [], [], [], 0))


def test_what_the_others_are_told_of_a_request_is_enough_to_sample() -> None:
    params = SamplingParams(
        seed=7, temperature=0.3, top_k=4, min_p=0.1, repetition_penalty=1.2, logit_bias={3: -1.5, 9: 2}, logprobs=2,
        stop=("x",), stop_token_ids=(4, 5),
    )  # fmt: skip
    assert from_data(json.loads(json.dumps(to_data(params)))) == params
    guided = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    assert from_data(json.loads(json.dumps(to_data(guided)))).guided
