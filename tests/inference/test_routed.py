"""Outputs name the experts that every token visited, as the gates of the plain model choose them."""

import dataclasses

import numpy as np
import pytest
import torch

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Output, Request
from benthic.model.init import initialise
from benthic.model.transformer import Transformer

DRAWN = [SamplingParams(max_tokens=20, temperature=i % 3 * 0.7, seed=i) for i in range(24)]
WAYS = {
    "whole prompts": {},
    "chunks": {"max_num_batched_tokens": 24},
    "short of pages": {"max_num_seqs": 7, "max_model_len": 72, "page_size": 4, "num_pages": 40},
    "drafts": {"num_speculative_tokens": 1},
    "all of it": {
        "max_num_seqs": 7, "max_num_batched_tokens": 24, "max_model_len": 72, "page_size": 4, "num_pages": 40,
        "num_speculative_tokens": 1,
    },
}  # fmt: skip


def engine(model: Transformer, **settings) -> Engine:
    return Engine(model, None, EngineConfig(return_routed_experts=True, **settings))


@torch.inference_mode()
def chosen(model: Transformer, output: Output) -> np.ndarray:
    """What the gates choose in one expanded pass over prompt and answer without its last token, in order of number."""
    ids = (output.prompt_token_ids + output.token_ids)[:-1]
    _, choices = model.hidden(torch.tensor([ids]))
    return torch.stack([choice.topk_ids for choice in choices], 1).sort(-1).values.numpy()


def right(model: Transformer, output: Output) -> bool:
    found = output.routed_experts
    assert found is not None
    assert found.dtype == np.uint8
    return np.array_equal(np.sort(found, -1), chosen(model, output))


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_every_token_has_the_experts_that_the_gates_choose(model, prompts, settings) -> None:
    runs = engine(model, **settings)
    for output in runs.generate(prompts, DRAWN):
        assert right(model, output)
    assert (runs.stats.preemptions > 0) == ("num_pages" in settings)


def test_drafts_that_were_right_have_their_experts_too(foreseeing, prompts) -> None:
    runs = engine(foreseeing, num_speculative_tokens=1)
    assert all(right(foreseeing, output) for output in runs.generate(prompts, DRAWN[0]))
    assert runs.stats.accepted > 20


def test_a_cached_prefix_has_the_experts_of_the_pass_that_computed_it(model, prompts) -> None:
    runs, long = engine(model, page_size=4), max(prompts, key=len)
    runs.generate([long], DRAWN[0])
    request = runs.add(Request(prompt_token_ids=[*long[:24], 7, 9], params=DRAWN[1]))
    runs.step()
    assert next(iter(runs._seqs.values())).cached_tokens == 24
    while runs.busy:
        outputs = runs.step().outputs
    assert outputs[0].request_id == request
    assert right(model, outputs[0])


def test_other_tokens_have_other_experts(model, prompts) -> None:
    """The negative control: the comparison notices one wrong token, and one wrong layer."""
    output = engine(model).generate([prompts[0]], DRAWN[0])[0]
    assert not right(model, dataclasses.replace(output, token_ids=[t ^ 1 for t in output.token_ids]))
    assert not right(model, dataclasses.replace(output, routed_experts=output.routed_experts[:, ::-1]))  # type: ignore


def test_what_was_chosen_before_a_preemption_is_kept(model, prompts, monkeypatch) -> None:
    """The pass that computes tokens again may choose otherwise; the log-probabilities are from the one before. Here
    every pass after the first preemption is made to claim expert 255."""
    runs = engine(model, enable_prefix_caching=False, **WAYS["short of pages"])
    store, write, before, outputs = runs.runner.routed, runs.runner.routed.write, {}, {}  # type: ignore[union-attr]
    for prompt, params in zip(prompts, DRAWN):
        runs.add(Request(prompt_token_ids=prompt, params=params))
    while runs.busy:
        outputs |= {output.request_id: output for output in runs.step().outputs}
        if runs.scheduler.stepped_back and not before:
            before = {seq.request_id: computed for seq, _, computed in runs.scheduler.stepped_back}
            monkeypatch.setattr(
                store, "write", lambda slots, ids: write(slots, [i.new_full(i.shape, 255) for i in ids])
            )
    assert before
    for request_id, computed in before.items():
        output = outputs[request_id]
        found = output.routed_experts
        assert len(output.prompt_token_ids) <= computed < len(found)
        assert np.array_equal(np.sort(found[:computed], -1), chosen(model, output)[:computed])
        assert (found[computed:] == 255).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="rounding to bfloat16 sends tokens elsewhere")
@pytest.mark.long  # in the interpreter
def test_on_kernels_too(monkeypatch, device) -> None:
    pytest.importorskip("triton", reason="needs triton")
    from test_fused import V3, build
    from test_fused_runner import Host, prompts

    from benthic.inference import fused_runner

    monkeypatch.setattr(fused_runner, "Cuda", Host)
    model = build(V3, device)
    settings = {"page_size": 16, "max_model_len": 64, "num_pages": 6, "max_num_batched_tokens": 20}
    runs = engine(model, backend="fused", num_speculative_tokens=1, **settings)
    outputs = runs.generate(prompts(5, 21, 14), SamplingParams(max_tokens=20, temperature=0))
    assert all(right(model, output) for output in outputs)
    assert runs.stats.preemptions > 0


def test_an_aborted_request_says_what_it_had_computed(model, prompts) -> None:
    runs = engine(model, max_num_batched_tokens=8)
    long = max(prompts, key=len)
    first, second = (runs.add(Request(prompt_token_ids=long, params=DRAWN[0])) for _ in range(2))
    runs.step()
    runs.abort(first)
    runs.abort(second)
    outputs = {output.request_id: output.routed_experts for output in runs.step().outputs}
    assert outputs[first].shape == (8, 2, 2)  # type: ignore[union-attr]
    assert outputs[second].shape == (0, 2, 2)  # type: ignore[union-attr]


def test_engines_that_were_not_asked_say_nothing(model, prompts) -> None:
    assert Engine(model, None).generate(prompts[:1], DRAWN[0])[0].routed_experts is None


def test_a_model_without_mixtures_is_refused(config) -> None:
    dense = initialise(Transformer(dataclasses.replace(config, first_k_dense_replace=3)), std=0.1, seed=0)
    with pytest.raises(InputError, match="no mixture layers"):
        engine(dense)


def test_flags_must_be_flags() -> None:
    with pytest.raises(InputError, match="return_routed_experts=1 is no truth value"):
        EngineConfig(return_routed_experts=1)  # type: ignore[arg-type]
