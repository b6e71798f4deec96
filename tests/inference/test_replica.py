"""An engine that computes in another format than its owner's: what it holds, and how it follows changes."""

import dataclasses

import pytest
import torch
from torch import Tensor

from benthic.inference import engine as engine_of
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.replica import Replica
from benthic.model.fp8 import eligible, is_fp8, to_fp8
from benthic.model.init import initialise
from benthic.model.linear import FP8, SCALE
from benthic.model.transformer import Transformer

GREEDY = SamplingParams(max_tokens=12, temperature=0)
FP8_CONFIG = EngineConfig(quantization="fp8", page_size=4)


@pytest.fixture
def masters(model) -> Transformer:
    """float32 weights, arithmetic in half precision."""
    model.dtype = torch.float16
    return model


def changed(model: Transformer) -> None:
    """Other weights in the same place."""
    other = initialise(Transformer(model.config), std=0.15, seed=9)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters()):
            mine.copy_(theirs)


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(prompts, GREEDY)]


def places(model: Transformer) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


IDS = torch.arange(20).view(2, 10)


@torch.no_grad()
def test_a_cast_replica_computes_the_masters_logits_bit_for_bit(masters) -> None:
    replica = Replica(masters, "auto", cast=True)
    assert torch.equal(replica.model(IDS), masters(IDS))


def test_what_does_not_differ_is_shared(masters) -> None:
    replica = Replica(masters, "auto", cast=True)
    mine, theirs = places(masters), places(replica.model)
    own = {name for name in mine if mine[name] != theirs[name]}
    assert {name for name in mine if "norm" in name or "mlp.gate." in name} == mine.keys() - own
    assert replica.nbytes == sum(t.numel() * 2 for name, t in masters.state_dict().items() if name in own)
    assert replica.model.layers[0].input_layernorm.weight is masters.layers[0].input_layernorm.weight
    assert all(p.requires_grad and p.dtype == torch.float32 for p in masters.parameters())


def test_without_a_difference_there_is_no_replica(model) -> None:
    assert Replica(model, "auto", cast=True).model is model
    assert Replica(model, "none", cast=True).nbytes == 0
    to_fp8(model)
    assert Replica(model, "fp8", cast=True).model is model
    assert Replica(model, "auto", cast=True).model is model


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["fp8", "auto"])
def test_refreshing_writes_the_masters_new_values_into_the_same_storage(masters, quantization) -> None:
    replica = Replica(masters, quantization, cast=True)
    before, old = places(replica.model), replica.model(IDS)
    changed(masters)
    stale = replica.model(IDS)
    replica.refresh()
    fresh = replica.model(IDS)
    assert places(replica.model) == before
    assert torch.equal(fresh, Replica(masters, quantization, cast=True).model(IDS))
    assert not torch.equal(fresh, stale)
    assert not torch.equal(fresh, old)


@torch.no_grad()
def test_an_fp8_replica_is_the_model_that_to_fp8_makes(model) -> None:
    replica = Replica(model, "fp8", cast=False)
    assert not is_fp8(model)
    assert is_fp8(replica.model)
    found = replica.model(IDS)
    to_fp8(model)
    assert torch.equal(found, model(IDS))


@torch.no_grad()
def test_a_model_in_fp8_can_be_served_without(model) -> None:
    to_fp8(model)
    replica = Replica(model, "none", cast=False)
    assert not is_fp8(replica.model)
    assert torch.equal(replica.model(IDS), model(IDS))


@pytest.mark.parametrize("config", [FP8_CONFIG, dataclasses.replace(FP8_CONFIG, num_speculative_tokens=1)])
def test_after_update_weights_answers_are_those_of_a_fresh_engine(model, prompts, config) -> None:
    engine = Engine(model, None, config)
    answers(engine, prompts[:6])
    changed(model)
    fresh = answers(Engine(model, None, config), prompts[:6])
    assert answers(engine, prompts[:6]) != fresh  # it does not know yet
    engine.update_weights()
    assert answers(engine, prompts[:6]) == fresh


def test_cached_prefixes_of_the_old_weights_are_not_found(model, prompts) -> None:
    engine = Engine(model, None, FP8_CONFIG)
    prompt = max(prompts, key=len)
    answers(engine, [prompt])
    computed = engine.stats.prefill_tokens
    answers(engine, [prompt])
    assert engine.stats.prefill_tokens - computed < len(prompt)
    changed(model)
    engine.update_weights()
    computed = engine.stats.prefill_tokens
    answers(engine, [prompt])
    assert engine.stats.prefill_tokens - computed == len(prompt)


def test_the_replica_takes_its_memory_before_the_cache_is_measured(model, monkeypatch) -> None:
    made: list[int] = []

    class Seen(Replica):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self.nbytes)

    def fitted(config: EngineConfig, model: Transformer, asked: int) -> EngineConfig:
        assert made
        return config

    monkeypatch.setattr(engine_of, "Replica", Seen)
    monkeypatch.setattr(engine_of, "fitted", fitted)
    engine = Engine(model, None, FP8_CONFIG)
    blocks = [t for name, t in engine.replica.model.state_dict().items() if t.dtype == FP8 or name.endswith(SCALE)]
    assert made == [sum(tensor.nbytes for tensor in blocks)]
    assert len(blocks) == 2 * len(list(eligible(model)))


def test_the_trainer_goes_on_with_its_masters(masters, prompts) -> None:
    """Gradients reach the masters, also those that the replica shares, while it is there."""
    engine = Engine(masters, None, FP8_CONFIG)
    answers(engine, prompts[:2])
    masters.dtype = torch.float32
    masters(IDS).square().mean().backward()
    grads: list[Tensor | None] = [p.grad for p in masters.layers.parameters()]
    assert sum(grad is not None for grad in grads) > 30
    assert all(parameter.grad is None for parameter in engine.replica.model.parameters() if parameter.dtype == FP8)
