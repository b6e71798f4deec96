"""Log-probabilities of prompts are those of one direct pass, however the prompt is cut, whoever else runs, whatever is
cached or computed again."""

import math

import pytest
import torch

from benthic.base.errors import BenthicError
from benthic.inference import scores
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Delta, Output, PromptPlace, Request
from benthic.model.transformer import Transformer

ASKED = [SamplingParams(max_tokens=1 + i % 3 * 9, temperature=i % 2, seed=i, prompt_logprobs=i % 4) for i in range(24)]
TIGHT = {"max_num_seqs": 7, "max_num_batched_tokens": 24, "max_model_len": 72, "page_size": 4, "num_pages": 24}
WAYS = {
    "whole prompts": {},
    "chunks": {"max_num_batched_tokens": 9},
    "short of pages": TIGHT,
    "drafts": {"num_speculative_tokens": 1},
    "drafts, in chunks, short of pages": TIGHT | {"num_speculative_tokens": 1},
}


@torch.inference_mode()
def direct(model: Transformer, prompt: list[int], count: int) -> list[PromptPlace | None]:
    """From one pass over the whole prompt, and a sort of every row."""
    places: list[PromptPlace | None] = [None]
    for logprobs, token in zip(model(torch.tensor([prompt]))[0].log_softmax(-1), prompt[1:]):
        order = logprobs.sort(descending=True)
        rank = int((order.indices == token).nonzero()) + 1
        top = list(zip(order.indices[:count].tolist(), order.values[:count].tolist()))
        places.append(PromptPlace(float(logprobs[token]), rank, top))
    return places


def agree(found: list[PromptPlace | None] | None, expected: list[PromptPlace | None], within: float = 1e-4) -> bool:
    """The same up to rounding, which at one place of a prompt may turn two neighbours in rank around."""
    if found is None or len(found) != len(expected) or found[0] is not None:
        return False
    pairs = [(a, b) for a, b in zip(found[1:], expected[1:]) if a is not None and b is not None]
    turned = [a.rank - b.rank for a, b in pairs if a.rank != b.rank]
    others = [a for a, b in pairs if [token for token, _ in a.top] != [token for token, _ in b.top]]
    return (
        len(pairs) == len(found) - 1
        and len(turned) <= 1
        and set(turned) <= {-1, 1}
        and len(others) <= 1
        and all(a.logprob == pytest.approx(b.logprob, abs=within) for a, b in pairs)
        and all([p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=within) for a, b in pairs)
    )


def right(model: Transformer, output: Output, params: SamplingParams) -> bool:
    return agree(output.prompt_logprobs, direct(model, output.prompt_token_ids, params.prompt_logprobs))


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_they_are_those_of_a_direct_pass_however_the_prompt_is_computed(model, prompts, settings) -> None:
    engine = Engine(model, None, EngineConfig(**settings))
    for _ in range(2):  # the second time every prompt is cached
        for output, params in zip(engine.generate(prompts, ASKED), ASKED):
            assert right(model, output, params)
    assert (engine.stats.preemptions > 0) == ("num_pages" in settings)


def test_they_change_no_answer(model, prompts) -> None:
    plain = [SamplingParams(max_tokens=p.max_tokens, temperature=p.temperature, seed=p.seed) for p in ASKED]
    expected = Engine(model, None).generate(prompts, plain)
    found = Engine(model, None, EngineConfig(**TIGHT)).generate(prompts, ASKED)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert all(output.prompt_logprobs is None for output in expected)


def test_logits_are_made_a_slice_of_bounded_size_at_a_time(model, prompts, monkeypatch) -> None:
    sizes, true = [], model.logits
    monkeypatch.setattr(
        model, "logits", lambda hidden: sizes.append(hidden.numel() // hidden.shape[-1]) or true(hidden)
    )
    monkeypatch.setattr(scores, "SCRATCH", 3 * 4 * model.config.vocab_size)
    outputs = Engine(model, None).generate(prompts[:6], ASKED[:6])
    monkeypatch.undo()
    assert all(right(model, output, params) for output, params in zip(outputs, ASKED))
    assert max(sizes) <= 6  # rows that choose a token; slices have three places
    assert sizes.count(3) > 20


def test_a_cached_prefix_is_not_used_for_a_prompt_that_is_scored_and_is_for_others(model, prompts) -> None:
    prompt = max(prompts, key=len)
    engine = Engine(model, None, EngineConfig(page_size=4))
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    first, again = engine.generate([prompt], asked)[0], engine.generate([prompt], asked)[0]
    other = engine.generate([prompt], SamplingParams(max_tokens=1))[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 0)
    assert other.num_cached_tokens == (len(prompt) - 1) // 4 * 4  # of the latents that the scored ones left


def test_a_prompt_that_steps_back_is_scored_once(model, prompts, monkeypatch) -> None:
    """Every place of every prompt, though prompts are computed again."""
    asked = [0]
    true = scores.places

    def counted(plan, begins):
        found = true(plan, begins)
        asked[0] += found.shape[1]
        return found

    monkeypatch.setattr(scores, "places", counted)
    engine = Engine(model, None, EngineConfig(**TIGHT))
    engine.generate(prompts, ASKED)
    assert engine.stats.preemptions > 0
    assert asked[0] == sum(len(prompt) - 1 for prompt in prompts)


def test_the_first_delta_has_them_whole_and_no_other(model, prompts) -> None:
    engine = Engine(model, None, EngineConfig(max_num_batched_tokens=8))
    engine.add(Request(prompt_token_ids=prompts[2], params=SamplingParams(max_tokens=4, prompt_logprobs=2)))
    deltas: list[Delta] = []
    while engine.busy:
        deltas += engine.step().deltas
    assert [delta.prompt_logprobs is not None for delta in deltas] == [True, False, False, False]
    assert agree(deltas[0].prompt_logprobs, direct(model, prompts[2], 2))


def test_a_prompt_of_one_token_has_nothing_to_say(model) -> None:
    (output,) = Engine(model, None).generate([[5]], SamplingParams(max_tokens=1, prompt_logprobs=3))
    assert output.prompt_logprobs == [None]


def test_a_request_that_is_aborted_in_its_prompt_has_none(model, prompts) -> None:
    engine = Engine(model, None, EngineConfig(max_num_batched_tokens=4))
    engine.abort(engine.add(Request(prompt_token_ids=prompts[2], params=SamplingParams(prompt_logprobs=0))))
    number = engine.add(Request(prompt_token_ids=prompts[2], params=SamplingParams(prompt_logprobs=0)))
    engine.step()
    engine.abort(number)
    step = engine.step()
    assert [output.prompt_logprobs for output in step.outputs] == [None]
    assert [delta.prompt_logprobs for delta in step.deltas] == [None]


def test_ranks_and_alternatives_are_among_the_tokens_that_the_tokenizer_knows(model, prompts) -> None:
    """Embedding rows beyond the last id are part of the softmax and of nothing else."""
    with torch.no_grad():
        model.lm_head.weight[60:].mul_(5)

    class Small:
        vocab_size, eos_id = 60, 2

        def decode(self, ids, skip_special=False) -> str:
            return ""

    prompt = [token % 60 for token in prompts[2]]
    (output,) = Engine(model, Small()).generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=20))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]))[0].log_softmax(-1)[: len(prompt) - 1]
    assert output.prompt_logprobs is not None
    beyond = 0
    for place, row, token in zip(output.prompt_logprobs[1:], expected, prompt[1:]):
        assert place is not None
        assert place.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert place.rank == 1 + int((row[:60] > row[token]).sum())
        assert all(id < 60 for id, _ in place.top)
        beyond += int(row.argmax()) >= 60
    assert beyond > 3


def test_logits_that_are_no_numbers_in_a_prompt_are_an_error(model, prompts) -> None:
    with torch.no_grad():
        model.embed_tokens.weight[prompts[2][3]] = math.nan
    engine = Engine(model, None, EngineConfig(max_num_batched_tokens=8))
    with pytest.raises(BenthicError, match="not finite"):
        engine.generate([prompts[2]], SamplingParams(max_tokens=1, prompt_logprobs=0))


def bits(outputs: list[Output]) -> list[object]:
    return [output.prompt_logprobs for output in outputs]


@pytest.mark.parametrize("deterministic", [True, False])
def test_company_changes_no_bit_in_deterministic_mode_and_some_without(model, prompts, deterministic) -> None:
    asked = [SamplingParams(max_tokens=2, prompt_logprobs=2)] * len(prompts)
    alone = [
        Engine(model, None, EngineConfig(deterministic=deterministic)).generate([prompt], asked[0])[0]
        for prompt in prompts
    ]
    crowded = Engine(model, None, EngineConfig(deterministic=deterministic, **TIGHT))
    assert (bits(crowded.generate(prompts, asked)) == bits(alone)) == deterministic
    assert all(right(model, output, asked[0]) for output in alone)
