"""The engine on kernels answers as the engine on the plain model: prompts in chunks, cached prefixes, drafts, steps
that run ahead. Graphs are CUDA's on a GPU; elsewhere a stand-in runs the step again and refills the same tensors."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_fused import V2, V3, build, coarse  # noqa: F401  (a fixture)
from test_prompt_logprobs import agree
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")
from benthic.inference import fused_runner
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Request
from benthic.model.transformer import Transformer

LONG = pytest.mark.skipif(False, reason="") if torch.cuda.is_available() else pytest.mark.long  # in the interpreter
GREEDY = SamplingParams(max_tokens=9, temperature=0)


def tensors(found: Any) -> list[Tensor]:
    """Every tensor in dataclasses, tuples and lists."""
    if isinstance(found, Tensor):
        return [found]
    if dataclasses.is_dataclass(found):
        return [t for f in dataclasses.fields(found) for t in tensors(getattr(found, f.name))]
    if isinstance(found, tuple | list):
        return [t for part in found for t in tensors(part)]
    return []


class Host:
    """The GPU's manners without one."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def event(self) -> Any:
        class Done:
            def synchronize(self) -> None: ...

        return Done()

    def graph(self, step: Callable[[], Any]) -> tuple[Any, Any]:
        out = step()

        class Replayed:
            def replay(self) -> None:
                for old, new in zip(tensors(out), tensors(step()), strict=True):
                    old.copy_(new)

        return Replayed(), out


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cpu":
        monkeypatch.setattr(fused_runner, "Cuda", Host)


def engines(config, device: str, **settings) -> tuple[Engine, Engine]:
    """(plain, fused) on the same weights in float32."""
    model = build(config, "cpu").to(device)
    settings = {"page_size": 16, "max_model_len": 96, "max_num_seqs": 4, "num_pages": 40} | settings
    return tuple(Engine(model, None, EngineConfig(backend=b, **settings)) for b in ("plain", "fused"))  # type: ignore


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, 61, (n,), generator=generator).tolist() for n in lengths]


def bend(model: Transformer) -> None:
    """Let the next token follow mostly from the last, in the module too, so that drafts are often right."""
    with torch.no_grad():
        d = model.config.hidden_size
        model.lm_head.weight.copy_(2 * model.embed_tokens.weight.roll(1, 0))
        model.embed_tokens.weight.mul_(5)
        model.mtp[0].eh_proj.weight.copy_(torch.cat((torch.eye(d), torch.zeros(d, d)), 1))


def same(plain: Engine, fused: Engine, asked: list[list[int]], params) -> None:
    for a, b in zip(plain.generate(asked, params), fused.generate(asked, params), strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
        assert (a.prompt_logprobs is None) == (b.prompt_logprobs is None)
        assert a.prompt_logprobs is None or agree(b.prompt_logprobs, a.prompt_logprobs, 1e-3)
    assert not fused.busy
    assert len(fused.scheduler.pool.free) == fused.config.num_pages


def test_short_answers_with_drafts_are_those_of_the_plain_engine(device) -> None:
    plain, fused = engines(V3, device, num_speculative_tokens=1)
    same(plain, fused, prompts(4, 2), dataclasses.replace(GREEDY, max_tokens=2))


def test_log_probabilities_of_prompts_are_those_of_the_plain_engine(device) -> None:
    plain, fused = engines(V3, device, max_num_batched_tokens=16)
    same(plain, fused, prompts(9, 4, 15), SamplingParams(max_tokens=1, prompt_logprobs=3))


@LONG
@pytest.mark.parametrize("drafts", [0, 1])
def test_log_probabilities_of_prompts_beside_answers_that_run_ahead_are_those_of_the_plain_engine(
    drafts, device
) -> None:
    """Two prompts of three pages, of which the second steps back, half scored, for one that is more urgent."""
    settings = {"max_num_batched_tokens": 24, "num_pages": 8, "num_speculative_tokens": drafts}
    found = []
    for engine in engines(V3, device, **settings):
        asked = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=2)
        first, second, urgent = prompts(20, 36, 33)
        for prompt in (first, second):
            engine.add(Request(prompt_token_ids=prompt, params=asked))
        outputs = [output for _ in range(2) for output in engine.step().outputs]
        engine.add(Request(prompt_token_ids=urgent, params=asked, priority=-1))
        while engine.busy:
            outputs += engine.step().outputs
        assert engine.stats.preemptions > 0
        found.append(sorted(outputs, key=lambda output: output.request_id))
    for a, b in zip(*found, strict=True):
        assert a.token_ids == b.token_ids
        assert a.prompt_logprobs is not None
        assert agree(b.prompt_logprobs, a.prompt_logprobs, 1e-3)


@LONG
@pytest.mark.parametrize("config", [V3, V2], ids=["V3", "V2"])
@pytest.mark.parametrize("budget", [8192, 16], ids=["whole prompts", "chunks"])
def test_greedy_answers_are_those_of_the_plain_engine(config, budget, device) -> None:
    plain, fused = engines(config, device, max_num_batched_tokens=budget)
    same(plain, fused, prompts(5, 21, 1, 33, 16), GREEDY)


@LONG
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_answers_that_are_drawn_are_those_of_the_plain_engine(drafts, device) -> None:
    plain, fused = engines(V3, device, num_speculative_tokens=drafts)
    params = [
        SamplingParams(max_tokens=7, seed=1),
        SamplingParams(max_tokens=7, seed=2, temperature=0.7, top_k=20, top_p=0.9),
        SamplingParams(max_tokens=7, seed=3, repetition_penalty=1.3, logprobs=2),
        GREEDY,
    ]
    same(plain, fused, prompts(9, 18, 4, 12), params)


@LONG
def test_sampled_rows_that_run_on_together_answer_from_a_graph_as_without(device, monkeypatch) -> None:
    monkeypatch.setattr(fused_runner, "STEADY", 1)
    plain, fused = engines(V3, device, num_speculative_tokens=1)
    bend(plain.model)
    params = [
        SamplingParams(max_tokens=8, seed=1, repetition_penalty=1.3, top_p=0.9),
        SamplingParams(max_tokens=5, seed=2, temperature=0.7, top_k=20, logit_bias={3: 1.0}),
        SamplingParams(max_tokens=8, temperature=0),
    ]
    same(plain, fused, prompts(9, 8, 4), params)
    tails = [tail for captured in fused.runner.graphs.values() for tail in captured.tails.values()]
    assert any(tail.controls is not None for tail in tails)


@LONG
@pytest.mark.parametrize("drafts", [1, 2])
@pytest.mark.parametrize("budget", [8192, 20], ids=["whole prompts", "chunks"])
def test_drafts_change_no_answer_and_are_verified(drafts, budget, device) -> None:
    plain, fused = engines(V3, device, num_speculative_tokens=drafts, max_num_batched_tokens=budget)
    without, _ = engines(V3, device)
    for engine in (plain, without):  # the first two share their model
        bend(engine.model)
    asked = prompts(5, 21)
    same(plain, fused, asked, GREEDY)
    assert 0 < fused.stats.accepted < fused.stats.drafted
    assert fused.stats.accepted_at[-1] > 0
    answers = [output.token_ids for output in plain.generate(asked, GREEDY)]
    assert [output.token_ids for output in without.generate(asked, GREEDY)] == answers


@LONG
def test_drafts_of_drafts_are_the_plain_ones(device) -> None:
    """Up to the end of the last page (what has none is guessed badly), and through steps that draft nothing but fill
    the module all the same."""
    engines_ = engines(V3, device, num_speculative_tokens=3)
    found: list[list[list[int]]] = []
    for engine in engines_:
        engine.runner.ahead = 0
        depths = iter([3, 3, 0, 3, 3, 0, 0, 3, 3] * 9)
        engine.drafting = engine.scheduler.drafting = SimpleNamespace(
            depth=lambda rows, depths=depths: next(depths), observe=lambda *step: None
        )
        for prompt in prompts(5, 13):
            engine.add(Request(prompt_token_ids=prompt, params=dataclasses.replace(GREEDY, max_tokens=12)))
        found.append([])
        while engine.busy:
            engine.step()
            for seq in engine.scheduler.running:
                room = len(seq.pages) * engine.config.page_size - (len(seq.ids) - 2)
                found[-1].append(seq.drafts[: max(1, room)])
    assert found[0] == found[1]
    assert max(map(len, found[0])) == 3


@LONG
def test_a_cached_prefix_changes_no_answer(device) -> None:
    plain, fused = engines(V3, device)
    (start,) = prompts(40)
    asked = [start + tail for tail in prompts(3, 9, 20)]
    same(plain, fused, [start], GREEDY)
    same(plain, fused, asked, GREEDY)


@LONG
def test_preempted_requests_answer_as_undisturbed_ones(device) -> None:
    plain, fused = engines(V2, device, num_pages=8)
    same(plain, fused, prompts(15, 14, 15, 13), dataclasses.replace(GREEDY, max_tokens=40))
    assert fused.stats.preemptions > 0


@LONG
def test_requests_that_come_and_go_between_steps_answer_as_alone(device) -> None:
    plain, fused = engines(V3, device, num_speculative_tokens=1)
    asked = prompts(12, 25, 7, 19)
    alone = [plain.generate([prompt], GREEDY)[0].token_ids for prompt in asked]
    found: dict[int, list[int]] = {}
    ids = []
    for i, prompt in enumerate(asked):
        ids.append(fused.add(Request(prompt_token_ids=prompt, params=GREEDY)))
        if i == 2:
            fused.abort(ids[1])
        for _ in range(2):
            found |= {o.request_id: o.token_ids for o in fused.step().outputs}
    while fused.busy:
        found |= {o.request_id: o.token_ids for o in fused.step().outputs}
    for i in (0, 2, 3):
        assert found[ids[i]] == alone[i]
    assert found[ids[1]] == alone[1][: len(found[ids[1]])]


@pytest.mark.parametrize(
    ("quantization", "dtype"), [pytest.param("fp8", torch.float32, marks=LONG), ("auto", torch.float16)]
)
@pytest.mark.usefixtures("exact_fp8", "coarse")
def test_after_update_weights_captured_graphs_compute_with_the_new_weights(quantization, dtype, device) -> None:
    """float32 masters, of which a trainer may think as its own; a replica in FP8 or half precision."""
    config = dataclasses.replace(V2, num_hidden_layers=1, first_k_dense_replace=0)
    model, other = build(config, "cpu").to(device), build(config, "cpu").to(device)
    model.dtype = dtype
    limits = EngineConfig(
        backend="fused", quantization=quantization, page_size=16, max_model_len=32, max_num_seqs=2, num_pages=8
    )
    asked, params = prompts(5, 3), dataclasses.replace(GREEDY, max_tokens=4)

    def answers(engine: Engine) -> list[list[float]]:
        return [output.logprobs for output in engine.generate(asked, params)]

    engine = Engine(model, None, limits)
    old = answers(engine)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters()):
            mine.copy_(theirs.flip(0))
    fresh = answers(Engine(model, None, limits))
    assert answers(engine) not in (old, fresh)  # what is shared has changed already
    engine.update_weights()
    assert answers(engine) == fresh != old
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@LONG
def test_a_call_that_was_interrupted_leaves_no_step_in_flight(device) -> None:
    plain, fused = engines(V3, device)

    def interrupt(finished: int, asked: int) -> None:
        if fused.stats.steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fused.generate(prompts(5, 9), GREEDY, interrupt)
    assert not fused.busy
    same(plain, fused, prompts(7, 4), GREEDY)
