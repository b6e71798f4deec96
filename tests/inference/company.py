"""Random schedules of the whole engine: requests arrive, share prefixes, wait, are cut into chunks, drafted for,
preempted and aborted; steps fail; weights change; what nobody owns is NaN. Every answer is compared with that of the
request alone. Everything follows from one seed.

Rounding differs with the shape of a batch, so a request whose answer hangs on a tie has no answer to compare. Alone, it
is tried with every chosen logit lowered by MARGIN, and with a look at how far the experts were apart; what another
answer could come out of is left out. Nothing that happens in company has a say in that.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor

from benthic.inference import sampler
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Output, Request
from benthic.inference.runner import PlainRunner
from benthic.inference.scheduler import Plan
from benthic.model.gate import Gate
from benthic.model.transformer import Transformer
from benthic.tokenizer.tokenizer import Tokenizer

MARGIN = 1e-4  # of logits: a hundred times the rounding
GATE_MARGIN = 1e-5  # of affinities, which are below 1
LENGTH = 48  # max_model_len
# Of prompts: multiples of every page size, and one more and one less.
LENGTHS = [1, 2, 3, 7, 8, 9, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47]  # fmt: skip
CASES = 50  # requests from which 25 neighbouring schedules draw
EVENTS, ARRIVALS = 50, 10  # of one schedule
STEPS = 3000  # more than any schedule needs
LETTERS = range(3, 64)  # ids that are one printable character each
SOLITUDE = EngineConfig(
    max_num_seqs=1, max_model_len=LENGTH, page_size=LENGTH, enable_prefix_caching=False, backend="plain"
)
Weights = dict[str, Tensor]
Key = tuple[str, int]  # name of the weights, number of the request


class Answer(NamedTuple):
    """What must not depend on company."""

    token_ids: list[int]
    finish_reason: str
    text: str

    @classmethod
    def of(cls, output: Output) -> "Answer":
        return cls(output.token_ids, output.finish_reason, output.text)


# Requests


def talk(number: int) -> list[int]:
    """What prompts begin with. Talks 0 and 1 differ in their first three tokens only, and so in every latent."""
    own, rest = random.Random(f"talk {number}"), random.Random(f"talk {max(number, 1)}, the rest")
    return [(own if place < 3 else rest).randrange(64) for place in range(LENGTH)]


def case(index: int, tokenizer: Tokenizer) -> Request:
    """Request number `index` of all that there are, without priority and salt."""
    rng = random.Random(f"case {index}")
    prompt = talk(rng.randrange(3))[: rng.choice(LENGTHS)]
    for place in range(max(1, len(prompt) - rng.choice([0, 0, 0, 1, 4])), len(prompt)):
        prompt[place] = rng.randrange(64)
    return Request(prompt_token_ids=prompt, params=draw_params(rng, tokenizer))


def draw_params(rng: random.Random, tokenizer: Tokenizer) -> SamplingParams:
    def some(probability: float, value: Any, otherwise: Any) -> Any:
        return value if rng.random() < probability else otherwise

    a, b, c = rng.sample(LETTERS, 3)
    text = tokenizer.decode
    loud = {a: 7.0, b: 7.5, c: 6.5}  # an answer of three letters, so that stop strings of two or three happen
    bias = rng.choice([{}, {}, loud, loud, {a: -100.0, b: 2.5}])
    few = tuple(rng.sample(LETTERS, 5))
    stop = rng.choice([(), (), tuple(text([id]) for id in few), (text([a, b]), text([b, c, a]))])
    max_tokens = rng.choice([1, 4, 8, 12, 16, 20])
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=some(0.3, rng.randint(0, max_tokens), 0),
        temperature=rng.choice([0, 0, 0.7, 1, 1, 2.5]),
        top_k=some(0.2, rng.choice([1, 3, 20]), 0),
        top_p=some(0.2, rng.choice([0.4, 0.9]), 1.0),
        min_p=some(0.2, 0.05, 0.0),
        repetition_penalty=some(0.3, rng.choice([0.8, 1.4]), 1.0),
        presence_penalty=some(0.3, rng.choice([-1.0, 1.5]), 0.0),
        frequency_penalty=some(0.3, rng.choice([-0.5, 1.0]), 0.0),
        logit_bias=bias,
        seed=rng.choice([0, 1, rng.randrange(2**63)]),
        stop=stop,
        include_stop_str_in_output=rng.random() < 0.5,
        stop_token_ids=some(0.4, few, ()),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([0, 0, 1, 4]),
    )


# Alone


class Alone:
    """What requests answer in solitude, each in an engine of its own; None where a tie decides."""

    def __init__(
        self, model: Transformer, weights: dict[str, Weights], tokenizer: Tokenizer, memory: dict[Key, Answer | None]
    ):
        self.model, self.weights, self.tokenizer, self._known = model, weights, tokenizer, memory

    def answer(self, name: str, index: int) -> Answer | None:
        key = name, index  # the same answer in every test
        if key not in self._known:
            self.model.load_state_dict(self.weights[name])
            self._known[key] = self._run(case(index, self.tokenizer))
        return self._known[key]

    @property
    def undecided(self) -> float:
        """Share of the requests so far that a tie decides."""
        return sum(answer is None for answer in self._known.values()) / len(self._known)

    def _run(self, request: Request) -> Answer | None:
        ties: list[str] = []
        choose = sampler.choose

        def tried(logits: Tensor, *rest: Any) -> sampler.Choice:
            choice = choose(logits, *rest)
            lowered = logits.scatter_add(2, choice.tokens.unsqueeze(2), logits.new_full((1, 1, 1), -MARGIN))
            if not torch.equal(choose(lowered, *rest).tokens, choice.tokens):
                ties.append("logits")
            return choice

        def watch(gate: Any, inputs: Any, choice: Any) -> None:
            """Both experts of one of two groups are chosen: the groups' sums decide."""
            chosen = choice.scores.gather(-1, choice.topk_ids).sum(-1)
            if ((2 * chosen - choice.scores.sum(-1)).abs() < GATE_MARGIN).any():
                ties.append("gate")

        hooks = [m.register_forward_hook(watch) for m in self.model.modules() if isinstance(m, Gate)]
        with patch.object(sampler, "choose", tried):
            (output,) = Engine(self.model, self.tokenizer, SOLITUDE).generate(
                [request.prompt_token_ids], request.params
            )
        for hook in hooks:
            hook.remove()
        return None if ties else Answer.of(output)


# In company


class Outage(RuntimeError):
    """What the device raises in a step that fails."""


@dataclass(frozen=True)
class Event:
    """add: request `index`. weights: those of `name`, once all requests have ended. abort: one of those added, by
    `luck`. fail: the next launch, by `luck` before or after it has written. step."""

    kind: str
    luck: float
    name: str = ""
    index: int = 0
    priority: int = 0
    salt: str = ""


def draw_config(rng: random.Random) -> EngineConfig:
    page_size = rng.choice([1, 1, 2, 4, 8])
    longest = LENGTH // page_size
    return EngineConfig(
        max_num_seqs=rng.choice([2, 4, 8, 8]),
        max_num_batched_tokens=rng.choice([3, 9, 16, 24, 32, 48]),
        max_model_len=LENGTH,
        num_speculative_tokens=rng.randrange(4),
        page_size=page_size,
        num_pages=longest + rng.choice([0, 0, 1, 2, longest // 2, 2 * longest]),
        enable_prefix_caching=rng.random() < 0.9,
        backend="plain",
    )


class Company:
    """One schedule. All is drawn, and all answers alone are known, before its engine starts."""

    def __init__(self, seed: int, alone: Alone):
        rng = random.Random(seed)
        self.seed, self.alone = seed, alone
        self.config = draw_config(rng)
        self.first = rng.choice(list(alone.weights))
        self.events = self._draw(rng)

    def _draw(self, rng: random.Random) -> list[Event]:
        name, base = self.first, self.seed // 25 * CASES
        odds = {"add": 10, "weights": 0.7, "step": rng.choice([3, 8, 16]), "abort": 1, "fail": 1}
        favourites = [base + rng.randrange(CASES) for _ in range(2)]
        events: list[Event] = []
        arrivals = 0
        for _ in range(EVENTS):
            (kind,) = rng.choices(list(odds), list(odds.values()))
            index = rng.choice([base + rng.randrange(CASES), rng.choice(favourites)])
            priority, salt = rng.choice([0, 0, 0, -1, 1]), rng.choice(["", "", "", "pepper"])
            if kind == "weights":
                name = rng.choice([other for other in self.alone.weights if other != name])
            if kind == "add":
                arrivals += 1
                if arrivals == ARRIVALS:
                    odds |= {"add": 0, "weights": 0}
            if kind != "add" or self.alone.answer(name, index):
                events.append(Event(kind, rng.random(), name, index, priority, salt))
        return events

    def run(self) -> Counter[str]:
        """Live it, and compare. Returns how often what happened."""
        model = self.alone.model
        model.load_state_dict(self.alone.weights[self.first])
        self.engine = Engine(model, self.alone.tokenizer, self.config)
        self.seen: Counter[str] = Counter()
        self.wanted: list[Answer] = []  # by request id
        self.outputs: dict[int, Output] = {}
        self.told: dict[int, list[int]] = {}
        self.aborted: set[int] = set()
        self.failure = ""
        self._disturb_launches()
        for event in self.events:
            self._happen(event)
        self._drain()
        self._judge()
        return self.seen

    def _happen(self, event: Event) -> None:
        if event.kind == "add":
            request = case(event.index, self.alone.tokenizer)
            self.engine.add(replace(request, priority=event.priority, cache_salt=event.salt))
            answer = self.alone.answer(event.name, event.index)
            self.wanted += [answer] if answer else []
        elif event.kind == "weights":
            self._drain()
            self.alone.model.load_state_dict(self.alone.weights[event.name])
            self.engine.update_weights()
        elif event.kind == "abort" and self.wanted:
            victim = int(event.luck * len(self.wanted))  # who may have ended
            self.aborted.add(victim)
            self.engine.abort(victim)
        elif event.kind == "fail":
            self.failure = "before" if event.luck < 0.5 else "after"
        else:
            self._step()

    def _drain(self) -> None:
        while self.engine.busy:
            self._step()

    def _step(self) -> None:
        self.seen["steps"] += 1
        assert self.seen["steps"] < STEPS, f"seed {self.seed}: requests never end"
        try:
            step = self.engine.step()
        except Outage:
            self.seen["failures"] += 1
            return
        for delta in step.deltas:
            self.told.setdefault(delta.request_id, []).extend(delta.token_ids)
        for output in step.outputs:
            assert output.request_id not in self.outputs, f"seed {self.seed}: reported twice"
            self.outputs[output.request_id] = output

    def _disturb_launches(self) -> None:
        launch = self.engine.runner.launch

        def disturbed(plan: Plan, bitmask: Tensor | None = None) -> Any:
            poison(self.engine)
            failure, self.failure = self.failure, ""
            if failure == "before":
                raise Outage
            result = launch(plan, bitmask)
            if failure == "after":
                raise Outage
            ends = [start + count for start, count in zip(plan.starts, plan.counts)]
            self.seen["chunks"] += sum(end < seq.fill for seq, end in zip(plan.seqs, ends))
            self.seen["rows beside others"] += len(plan.seqs) if len(plan.seqs) > 1 else 0
            fresh = [seq for seq in plan.seqs if seq.cached_tokens > 0 and not seq.logprobs]
            self.seen["hits"] += len(fresh)
            self.seen["hits up to the last page"] += sum(
                seq.prompt_len == seq.cached_tokens + self.config.page_size for seq in fresh
            )
            return result

        self.engine.runner.launch = disturbed

    def _judge(self) -> None:
        assert sorted(self.outputs) == list(range(len(self.wanted))), f"seed {self.seed}: an output is missing"
        for request_id, wanted in enumerate(self.wanted):
            output = self.outputs[request_id]
            where = f"seed {self.seed}, request {request_id}"
            tokens = output.token_ids
            assert len(output.logprobs) == len(tokens), where
            assert self.told.get(request_id, []) == tokens, where
            if output.finish_reason == "abort":
                assert request_id in self.aborted, where
                assert tokens == wanted.token_ids[: len(tokens)], where
                assert len(tokens) < len(wanted.token_ids), where
                self.seen["cut short"] += len(tokens) > 0
            else:
                assert Answer.of(output) == wanted, where
            self.seen[output.finish_reason] += 1
        pool = self.engine.scheduler.pool
        assert sorted(pool.free) == list(range(1, 1 + self.config.num_pages)), f"seed {self.seed}: pages are lost"
        assert not any(pool.refs), f"seed {self.seed}: a page without a request has a holder"
        self.seen["preemptions"] += self.engine.stats.preemptions
        self.seen["accepted"] += self.engine.stats.accepted
        self.seen["rejected"] += self.engine.stats.drafted - self.engine.stats.accepted


def poison(engine: Engine) -> None:
    """NaN, and ids that are none, in every slot that holds no committed token of a running request and can not be
    found: freed pages, rejected drafts, what a failed step has written."""
    layers, size = engine.runner.cache.layers, engine.config.page_size
    keep = torch.zeros(len(layers[0].c_kv), dtype=torch.bool)
    for seq in engine.scheduler.running:
        keep[[seq.pages[i // size] * size + i % size for i in range(seq.computed)]] = True
    for page in engine.scheduler.pool.findable:
        keep[page * size : (page + 1) * size] = True
    for layer in layers:
        layer.c_kv[~keep], layer.k_rope[~keep] = math.nan, math.nan
    cast(PlainRunner, engine.runner).ids[~keep] = -1
