import math
import random
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from benthic.inference import controls, sampler, speculative
from benthic.inference.chance import uniform
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Request, Seq
from benthic.inference.scheduler import Plan
from benthic.inference.stats import Stats

GREEDY = SamplingParams(max_tokens=30, temperature=0)


@pytest.fixture
def attentive(model):
    """A module that drafts mostly by what its own latents hold."""
    with torch.no_grad():
        model.mtp[0].block.self_attn.o_proj.weight.mul_(50)
    return model


def engine(model, speculative: int, **limits) -> Engine:
    return Engine(model, None, EngineConfig(num_speculative_tokens=speculative, **limits))


def answers(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize(("which", "drafts"), [("model", 1), ("foreseeing", 1), ("model", 3), ("foreseeing", 4)])
def test_drafting_gives_exactly_the_plain_greedy_answer(which, drafts, request, prompts):
    model = request.getfixturevalue(which)
    plain, drafting = engine(model, 0), engine(model, drafts)
    a, b = plain.generate(prompts, GREEDY), drafting.generate(prompts, GREEDY)
    assert answers(a) == answers(b)
    for one, two in zip(a, b):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)
    assert plain.stats.drafted == plain.stats.accepted == 0


def test_the_counters_add_up_and_right_drafts_save_steps(foreseeing, prompts):
    plain, drafting = engine(foreseeing, 0), engine(foreseeing, 1)
    plain.generate(prompts, GREEDY)
    drafting.generate(prompts, GREEDY)
    s = drafting.stats
    assert 0.2 < s.acceptance < 0.95
    assert s.accepted == round(s.acceptance * s.drafted)
    assert s.decode_tokens == s.decode_rows + s.accepted == s.generated_tokens - len(prompts)
    assert (s.drafted_at, s.accepted_at) == ([s.drafted], [s.accepted])
    assert s.tokens_per_row == s.decode_tokens / s.decode_rows > 1.15
    assert s.decode_rows < plain.stats.decode_rows == plain.stats.decode_tokens


def test_each_place_of_a_draft_is_counted_and_deeper_ones_save_steps_too(foreseeing, prompts):
    steps = []
    for drafts in (1, 2, 3):
        drafting = engine(foreseeing, drafts)
        drafting.generate(prompts, GREEDY)
        s = drafting.stats
        steps.append(s.decode_rows)
        assert (sum(s.drafted_at), sum(s.accepted_at)) == (s.drafted, s.accepted)
        assert len(s.acceptance_at) == drafts
        assert all(1 > high >= low > 0 for high, low in pairwise(s.acceptance_at))
        assert s.decode_tokens == s.decode_rows + s.accepted
    assert steps[0] > steps[1] > steps[2]


@pytest.mark.parametrize("budget", [512, 9])
def test_drafts_of_drafts_come_from_the_module_run_by_hand(attentive, prompts, budget):
    """Token by token, uncached: the module's own hidden state and its last draft go in again at the next place."""
    drafting = engine(attentive, 3, max_num_batched_tokens=budget)
    for prompt in prompts[:6]:
        drafting.add(Request(prompt_token_ids=prompt, params=replace(GREEDY, max_tokens=60)))
    checked = 0
    while checked < 60:
        drafting.step()
        for seq in drafting.scheduler.running:
            if seq.logprobs:
                assert seq.drafts == by_hand(attentive, seq.ids, 3)
                checked += 1


def by_hand(model, ids: list[int], count: int) -> list[int]:
    """What the module drafts after `ids`: it sees [h_1 ... h_n, its own states], and the tokens one place on."""
    found: list[int] = []
    with torch.inference_mode():
        states = model.hidden(torch.tensor([ids[:-1]]))[0]  # [1, n, d]
        for _ in range(count):
            out, _ = model.mtp_hidden(states, torch.tensor([[*ids[1:], *found]]))
            states = torch.cat((states, out[:, -1:]), 1)
            found.append(int(model.logits(out[:, -1:]).argmax()))
    return found


@pytest.mark.parametrize("budget", [512, 6])
def test_drafts_come_from_the_module_with_its_own_latents(model, prompts, budget):
    """The last draft of a request equals the one that the module gives over the whole sequence, uncached."""
    drafting = engine(model, 1, max_num_batched_tokens=budget)
    for prompt in prompts[:10]:
        drafting.add(Request(prompt_token_ids=prompt, params=GREEDY))
    checked = 0
    while checked < 100:
        drafting.step()
        for seq in drafting.scheduler.running:
            if not seq.logprobs:
                continue  # in the middle of its prompt
            ids = torch.tensor([seq.ids])
            with torch.inference_mode():
                hidden, _ = model.hidden(ids[:, :-1])
                ahead, _ = model.mtp_hidden(hidden, ids[:, 1:])
                assert seq.drafts[0] == int(model.logits(ahead[:, -1]).argmax())
            checked += 1


def drafts_of(drafting: Engine, prompt: list[int]) -> tuple[list[list[int]], int]:
    """Every draft of twelve steps of one request, and how much of its prompt was cached."""
    drafting.add(Request(prompt_token_ids=prompt, params=GREEDY))
    drafts = []
    for _ in range(12):
        drafting.step()
        drafts.append(drafting.scheduler.running[-1].drafts)
    return drafts, drafting.scheduler.running[-1].cached_tokens


def test_drafts_after_a_cached_prefix_are_those_without_one(attentive, prompts):
    """Also where two prompts part exactly at the end of a page, whose last latents in the module differ by that."""
    warm = engine(attentive, 1, page_size=4)
    for token, expected in ((3, 0), (3, 8), (9, 4)):
        prompt = [*prompts[0][:8], token, *prompts[1][:3]]
        drafts, cached = drafts_of(warm, prompt)
        assert drafts == drafts_of(engine(attentive, 1), prompt)[0]
        assert cached == expected


def test_pages_of_requests_that_sample_serve_those_that_draft(attentive, prompts):
    warm = engine(attentive, 1, page_size=4)
    warm.generate([prompts[0]], SamplingParams(max_tokens=20, seed=1))
    drafts, cached = drafts_of(warm, prompts[0])
    assert drafts == drafts_of(engine(attentive, 1), prompts[0])[0]
    assert cached > 0


def test_preemption_changes_no_draft_answer(foreseeing, prompts):
    crowded = engine(
        foreseeing, 1, max_num_seqs=7, max_num_batched_tokens=24, max_model_len=88, page_size=4, num_pages=40
    )
    assert answers(crowded.generate(prompts, GREEDY)) == answers(engine(foreseeing, 0).generate(prompts, GREEDY))
    assert crowded.stats.preemptions > 5
    assert crowded.stats.accepted > 100


def mixed_params(count: int) -> list[SamplingParams]:
    shapes = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
        {"temperature": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"temperature": 0.0, "presence_penalty": 1.0, "logit_bias": {5: 2.0}},
        {"temperature": 0.7, "min_tokens": 10, "stop_token_ids": (1, 2, 3)},
    ]
    return [SamplingParams(max_tokens=30, seed=i, logprobs=2, **shapes[i % len(shapes)]) for i in range(count)]


@pytest.mark.parametrize(("which", "drafts"), [("model", 1), ("foreseeing", 1), ("model", 2), ("foreseeing", 3)])
def test_rows_of_every_kind_answer_with_drafts_as_without(which, drafts, request, prompts):
    model, params = request.getfixturevalue(which), mixed_params(24)
    crowd = {"max_num_seqs": 7, "max_num_batched_tokens": 24, "max_model_len": 88, "page_size": 4, "num_pages": 40}
    plain, drafting, crowded = engine(model, 0), engine(model, drafts), engine(model, drafts, **crowd)
    want = plain.generate(prompts, params)
    for other in (drafting, crowded):
        got = other.generate(prompts, params)
        assert answers(got) == answers(want)
        assert [[[i for i, _ in top] for top in o.top_logprobs] for o in got] == [
            [[i for i, _ in top] for top in o.top_logprobs] for o in want
        ]
        assert all(len(o.top_logprobs) == len(o.token_ids) for o in got)
    assert crowded.stats.preemptions > 5
    assert drafting.stats.drafted > 100


def test_drafting_that_comes_and_goes_changes_no_answer(foreseeing, prompts):
    """And what the module has missed while nothing was drafted is nothing: steps fill its latents all the same."""
    want = engine(foreseeing, 0).generate(prompts, mixed_params(24))
    rng = random.Random(0)
    drafting = engine(foreseeing, 3, page_size=4)
    drafting.drafting = drafting.scheduler.drafting = SimpleNamespace(
        depth=lambda rows: rng.choice([0, 0, 3, 3, 2]), observe=lambda *step: None
    )
    assert answers(drafting.generate(prompts, mixed_params(24))) == answers(want)
    assert 0 < drafting.stats.accepted < drafting.stats.drafted < 3 * drafting.stats.decode_rows


def test_a_draft_with_the_numbers_of_its_token_is_right_nearly_as_often_as_any_can_be():
    """No draft from q is right more often than sum(min(p, q)); the likeliest token of q is right much less often."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, 200, generator=generator) * 2.5
    guess = logits + 0.4 * torch.randn(3000, 200, generator=generator)
    built, places = controls.build([seq(SamplingParams(), seed) for seed in range(3000)], "cpu"), torch.arange(3000)
    tokens = sampler.choose(logits.unsqueeze(1), built, places, 200).tokens[:, 0]
    shared = float((sampler.propose(guess, built, places, 200) == tokens).float().mean())
    likeliest = float((guess.argmax(-1) == tokens).float().mean())
    best = float(torch.minimum(logits.softmax(-1), guess.softmax(-1)).sum(-1).mean())
    assert 0.75 * best < shared <= best + 0.02
    assert shared > 2 * likeliest


VOCAB = 5
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5  # a model that sees the last token
PARAMS = SamplingParams(temperature=0.8)


def adversary(name: str, last: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """A draft that is as wrong as it can be, or right, or made from the very number that decides."""
    if name == "unlikeliest":
        return TABLE[last].argmin(-1)
    if name == "likeliest":
        return TABLE[last].argmax(-1)
    return (u * VOCAB).long()


def decode(
    name: str, depth: int, tokens: int, rounds: int, params: SamplingParams, always: bool = False
) -> torch.Tensor:
    """[rounds, tokens] drawn with `depth` drafts a step; `always` believes every draft."""
    built = controls.build([seq(params, seed) for seed in range(rounds)], "cpu")
    out = torch.zeros(rounds, 1 + tokens + depth, dtype=torch.int64)
    have = torch.ones(rounds, dtype=torch.int64)  # tokens so far, the first is given
    every = torch.arange(rounds)
    zero = torch.zeros_like(every)
    while have.min() <= tokens:
        have.clamp_(max=tokens)  # those that are done do their last token again
        fed = [out[every, have - 1]]
        for k in range(depth):
            fed.append(adversary(name, fed[-1], uniform(every, have + k, zero)))
        ids = torch.stack(fed, 1)  # [rounds, 1 + depth]
        chosen = sampler.choose(TABLE[ids], built, have, VOCAB).tokens
        accepted = speculative.accept(SimpleNamespace(ids=ids, counts=torch.full_like(have, 1 + depth)), chosen)
        if always:
            accepted = torch.full_like(accepted, depth)
            chosen = torch.cat((ids[:, 1:], chosen[:, depth:]), 1)
        for k in range(1 + depth):
            out[every, have + k] = torch.where(accepted >= k, chosen[:, k], out[every, have + k])
        have = have + accepted + 1
    return out[:, 1 : 1 + tokens]


def seq(params: SamplingParams, seed: int) -> Seq:
    return Seq(request_id=0, ids=[0], prompt_len=1, max_len=9, params=replace(params, seed=seed))


def surprise(drawn: torch.Tensor, params: SamplingParams) -> tuple[float, int]:
    """Pearson's chi-square of whole answers against the exact chain, and its degrees of freedom."""
    p = (TABLE.double() / params.temperature).softmax(-1)
    ranked = p.sort(descending=True, stable=True)
    kept = ranked.values.cumsum(1) - ranked.values < params.top_p
    p = p * torch.zeros_like(p).scatter_(1, ranked.indices, kept.double())
    p = p / p.sum(1, keepdim=True)
    joint = p[0]
    cell = drawn[:, 0]
    for k in range(1, drawn.shape[1]):
        joint = (joint.unsqueeze(-1) * p.repeat(VOCAB ** (k - 1), 1)).flatten()
        cell = cell * VOCAB + drawn[:, k]
    counts = cell.bincount(minlength=len(joint)).double()
    if counts[joint == 0].any():
        return math.inf, 0
    want = joint * len(drawn)
    rare = want < 5  # too few for Pearson's statistic: one cell together
    counts = torch.cat((counts[~rare], counts[rare].sum().view(1)))
    want = torch.cat((want[~rare], want[rare].sum().view(1)))
    counts, want = counts[want > 0], want[want > 0]
    return float(((counts - want) ** 2 / want).sum()), len(want) - 1


@pytest.mark.parametrize(
    ("name", "depth"), [("same numbers", 1), ("same numbers", 3), ("unlikeliest", 2), ("likeliest", 2)]
)
def test_sampled_answers_have_the_plain_distribution_whatever_the_drafts(name, depth):
    drawn = decode(name, depth, 1 + depth, 50_000, PARAMS)
    chi, degrees = surprise(drawn, PARAMS)
    assert chi < degrees + 4 * math.sqrt(2 * degrees)
    assert torch.equal(drawn[:5000], decode(name, 0, 1 + depth, 5000, PARAMS))


def test_the_cut_distribution_is_the_plain_one_too():
    cut = replace(PARAMS, top_p=0.8)
    chi, degrees = surprise(decode("same numbers", 2, 2, 5000, cut), cut)
    assert chi < degrees + 4 * math.sqrt(2 * degrees)


def test_believing_every_draft_is_noticed():
    """Negative control, with the kindest drafts there are."""
    chi, degrees = surprise(decode("likeliest", 1, 2, 5000, PARAMS, always=True), PARAMS)
    assert chi > 10 * (degrees + 1)


def test_a_row_accepts_drafts_up_to_the_first_wrong_one_and_no_more_than_it_has():
    ids = torch.tensor([[9, 1, 2], [9, 1, 2], [9, 1, 2], [9, 1, 2], [9, 0, 0]])
    tokens = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 3], [0, 0, 3]])
    rows = SimpleNamespace(ids=ids, counts=torch.tensor([3, 3, 3, 2, 1]))
    assert speculative.accept(rows, tokens).tolist() == [2, 1, 0, 1, 0]
    assert speculative.accept(rows, tokens[:, :1]).tolist() == [0] * 5


def test_a_stop_token_cuts_the_second_token_off(foreseeing, prompts):
    for stop in range(0, 64, 16):
        params = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=(stop,))
        a, b = (engine(foreseeing, k).generate(prompts, params) for k in (0, 1))
        assert answers(a) == answers(b)
        assert [output.finish_reason for output in a] == [output.finish_reason for output in b]


def test_acceptance_is_counted_for_each_place_of_a_draft():
    stats = Stats()
    stats.count(Plan([], [3, 3, 2, 1], [], [], 4), [[1, 2, 3], [4, 5], [6], [7]], [3, 2, 1, 1])
    assert (stats.drafted_at, stats.accepted_at) == ([3, 2], [2, 1])
    assert (stats.drafted, stats.accepted) == (5, 3)
    assert stats.acceptance_at == [2 / 3, 1 / 2]


def test_a_draft_was_right_even_where_a_stop_cuts_its_successor_off():
    stats = Stats()
    plan = Plan(seqs=[], counts=[2, 2, 1, 2, 9], starts=[], sources=[], decode=4)
    stats.count(plan, [[1, 2], [3], [4], [5, 6], [7]], gained=[1, 1, 1, 0, 1])  # row 3 was wasted
    assert (stats.drafted, stats.accepted, stats.decode_rows, stats.decode_tokens) == (2, 1, 3, 3)
    assert (stats.prefill_tokens, stats.generated_tokens) == (9, 4)
