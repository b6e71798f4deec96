import pytest
import torch

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Request
from benthic.inference.scheduler import Plan
from benthic.inference.stats import Stats

GREEDY = SamplingParams(max_tokens=30, temperature=0)


def engine(model, speculative: int, **limits) -> Engine:
    return Engine(model, None, EngineConfig(num_speculative_tokens=speculative, **limits))


def answers(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("which", ["model", "foreseeing"])
def test_drafting_gives_exactly_the_plain_greedy_answer(which, request, prompts):
    model = request.getfixturevalue(which)
    plain, drafting = engine(model, 0), engine(model, 1)
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
    assert s.tokens_per_row == s.decode_tokens / s.decode_rows > 1.15
    assert s.decode_rows < plain.stats.decode_rows == plain.stats.decode_tokens


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


@pytest.fixture
def attentive(model):
    """A module that drafts mostly by what its own latents hold."""
    with torch.no_grad():
        model.mtp[0].block.self_attn.o_proj.weight.mul_(50)
    return model


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


def test_sampling_rows_decode_plainly_beside_drafting_ones(foreseeing, prompts):
    params = [SamplingParams(max_tokens=30, temperature=(0.0, 1.0, 0.6)[i % 3], seed=i) for i in range(24)]
    drafting = engine(foreseeing, 1)
    mixed = drafting.generate(prompts, params)
    assert answers(mixed) == answers(engine(foreseeing, 0).generate(prompts, params))
    assert drafting.stats.accepted > 0
    sampling_only = engine(foreseeing, 1)
    sampling_only.generate(prompts, SamplingParams(max_tokens=10))
    assert sampling_only.stats.drafted == 0


def test_a_stop_token_cuts_the_second_token_off(foreseeing, prompts):
    for stop in range(0, 64, 16):
        params = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=(stop,))
        a, b = (engine(foreseeing, k).generate(prompts, params) for k in (0, 1))
        assert answers(a) == answers(b)
        assert [output.finish_reason for output in a] == [output.finish_reason for output in b]


def test_a_draft_was_right_even_where_a_stop_cuts_its_successor_off():
    stats = Stats()
    plan = Plan(seqs=[], counts=[2, 2, 1, 2, 9], starts=[], sources=[], decode=4)
    stats.count(plan, [[1, 2], [3], [4], [5, 6], [7]], gained=[1, 1, 1, 0, 1])  # row 3 was wasted
    assert (stats.drafted, stats.accepted, stats.decode_rows, stats.decode_tokens) == (2, 1, 3, 3)
    assert (stats.prefill_tokens, stats.generated_tokens) == (9, 4)
