"""With `deterministic`, tokens, log-probabilities and routing of a request are the same bits in any company, however
its prompt is cut, cached or computed again, with drafts or without, on both runners."""

import random

import numpy as np
import pytest
import torch

from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Output
from benthic.model.transformer import Transformer

CROWDED = {"max_num_seqs": 4, "max_num_batched_tokens": 13, "max_model_len": 64, "page_size": 4, "num_pages": 16}
COMPANY = {
    "whole prompts": {},
    "in chunks, short of pages": CROWDED,
    "drafts": {"num_speculative_tokens": 1},
    "drafts, in chunks, short of pages": CROWDED | {"num_speculative_tokens": 1},
}
LONG = pytest.mark.skipif(False, reason="") if torch.cuda.is_available() else pytest.mark.long  # in the interpreter


def work(count: int, vocab_size: int, longest: int, new: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of which some begin alike; greedy, drawn, cut and penalised answers."""
    rng = random.Random(2)
    begin = [rng.randrange(2, vocab_size) for _ in range(longest // 2)]
    prompts = [
        (begin if i % 3 else []) + [rng.randrange(2, vocab_size) for _ in range(rng.randint(1, longest // 2))]
        for i in range(count)
    ]
    kinds = [
        {"temperature": 0},
        {"temperature": 1},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.5, "top_k": 9, "logprobs": 3, "prompt_logprobs": 3},
    ]
    return prompts, [SamplingParams(max_tokens=new, seed=i, **kinds[i % 4]) for i in range(count)]  # type: ignore


def same(one: Output, other: Output) -> bool:
    return (one.token_ids, one.logprobs, one.top_logprobs, one.prompt_logprobs) == (
        other.token_ids,
        other.logprobs,
        other.top_logprobs,
        other.prompt_logprobs,
    ) and np.array_equal(one.routed_experts, other.routed_experts)  # type: ignore[arg-type]


def alone(model: Transformer, prompts, params, **settings) -> list[Output]:
    config = EngineConfig(enable_prefix_caching=False, return_routed_experts=True, **settings)
    engine = Engine(model, None, config)
    return [engine.generate([prompt], p)[0] for prompt, p in zip(prompts, params)]


def together(model: Transformer, prompts, params, **settings) -> tuple[list[Output], Engine]:
    engine = Engine(model, None, EngineConfig(return_routed_experts=True, **settings))
    return engine.generate(prompts, params), engine


@pytest.mark.parametrize("settings", COMPANY.values(), ids=COMPANY)
def test_company_changes_no_bit_on_the_plain_model(model, settings) -> None:
    prompts, params = work(10, 64, 24, 9)
    expected = alone(model, prompts, params, deterministic=True)
    found, engine = together(model, prompts, params, deterministic=True, **settings)
    assert all(map(same, found, expected))
    assert (engine.stats.preemptions > 0) == (settings.get("num_pages") == 16)
    again = engine.generate(prompts, params)  # prefixes are cached now
    assert all(map(same, again, expected))


def test_without_the_mode_company_changes_bits(model) -> None:
    """The negative control: log-probabilities round otherwise in other shapes."""
    prompts, params = work(10, 64, 24, 9)
    found, _ = together(model, prompts, params)
    assert not all(map(same, found, alone(model, prompts, params)))


def test_deterministic_answers_are_those_of_the_model(model) -> None:
    prompts, params = work(6, 64, 24, 9)
    fast, _ = together(model, prompts, params)
    slow, _ = together(model, prompts, params, deterministic=True)
    for a, b in zip(fast, slow, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


# The same on the runner for GPUs; in the interpreter a stand-in runs the step in place of its graph.

PAGES = {"page_size": 16, "max_model_len": 64, "num_pages": 24, "max_num_seqs": 4, "backend": "fused"}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, device: str):
    """built(name) -> a model that the kernels can compute, in bfloat16 on a GPU, else in float32."""
    pytest.importorskip("triton", reason="needs triton")
    import test_fused
    from test_fused_runner import Host

    from benthic.inference import fused_runner

    if device == "cpu":
        monkeypatch.setattr(fused_runner, "Cuda", Host)
    return lambda name: test_fused.build(getattr(test_fused, name), device)


def check_on_kernels(model: Transformer, count: int, longest: int, new: int, cache: str = "auto", **settings) -> Engine:
    prompts, params = work(count, 61, longest, new)
    base = PAGES | {"deterministic": True, "kv_cache_dtype": cache}
    expected = alone(model, prompts, params, **base)
    found, engine = together(model, prompts, params, **(base | settings))
    assert all(map(same, found, expected))
    return engine


def test_company_chunks_and_drafts_change_no_bit_on_kernels(built) -> None:
    check_on_kernels(built("V3"), 2, 6, 2, max_num_batched_tokens=5, num_speculative_tokens=1)


@LONG
@pytest.mark.parametrize("name", ["V3", "V2"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 16}, {"num_pages": 4}, {"cache": "int6"}],
    ids=["whole prompts", "chunks", "short of pages", "6 bits"],
)
def test_company_changes_no_bit_on_kernels(built, name, settings) -> None:
    engine = check_on_kernels(built(name), 3, 14, 24, **settings)
    assert (engine.stats.preemptions > 0) == ("num_pages" in settings)


@LONG
def test_drafts_change_no_bit_on_kernels(built) -> None:
    engine = check_on_kernels(built("V3"), 3, 20, 6, num_speculative_tokens=1)
    assert engine.stats.drafted > 0


@LONG
def test_deterministic_answers_on_kernels_are_those_of_the_plain_model(built) -> None:
    model, (prompts, params) = built("V3").float(), work(3, 61, 20, 4)
    model.dtype = torch.float32
    found, _ = together(model, prompts, params, deterministic=True, **PAGES)
    expected, _ = together(model, prompts, params, **(PAGES | {"backend": "plain"}))
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
        assert np.array_equal(a.routed_experts, b.routed_experts)  # type: ignore[arg-type]
