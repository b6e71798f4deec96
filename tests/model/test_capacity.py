"""Token dropping: the budget of a device, who loses, who never does, and that nothing else changes."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benthic.base.batch import IGNORE, Batch
from benthic.base.errors import InputError
from benthic.model.capacity import Capacity
from benthic.model.config import ModelConfig
from benthic.model.gate import Choice
from benthic.model.moe import MoE
from benthic.model.transformer import Transformer
from benthic.parallel.dispatch import LocalDispatcher
from benthic.train.config import TrainConfig
from benthic.train.loss import LanguageModelling

EXPERTS, DEVICES = 8, 4


@st.composite
def problems(draw: st.DrawFn) -> tuple[Choice, Capacity]:
    """Choices of N tokens with scores that are all different, some tokens protected, some padding."""
    n, k = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scores = torch.rand(n, EXPERTS, generator=generator)
    ids = (scores + torch.rand(EXPERTS, generator=generator)).topk(k, -1).indices
    capacity = Capacity(
        factor=draw(st.sampled_from([0.25, 0.5, 1.0, 2.0])),
        protected=torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0])),
        valid=torch.rand(n, generator=generator) < draw(st.sampled_from([0.6, 1.0])) if draw(st.booleans()) else None,
    )
    return Choice(scores, ids, scores.gather(1, ids)), capacity


def in_loops(choice: Choice, capacity: Capacity) -> list[list[bool]]:
    """V2 Sec 2.2.4: device by device, copies of highest affinity until the budget is spent, protected ones anyway."""
    n, k = choice.topk_ids.shape
    valid = [True] * n if capacity.valid is None else capacity.valid.tolist()
    budget = sum(valid) * k * capacity.factor / DEVICES
    kept = [[False] * k for _ in range(n)]
    for device in range(DEVICES):
        copies = [
            (not capacity.protected[t], -choice.scores[t, e].item(), t, i)
            for t in range(n)
            for i, e in enumerate(choice.topk_ids[t].tolist())
            if e // (EXPERTS // DEVICES) == device and valid[t]
        ]
        for rank, (open_, _, t, i) in enumerate(sorted(copies)):
            kept[t][i] = rank < budget or not open_
    return kept


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_kept_copies_are_those_of_the_rule_in_loops(problem: tuple[Choice, Capacity]) -> None:
    choice, capacity = problem
    assert capacity.kept(choice, DEVICES).tolist() == in_loops(choice, capacity)


def test_one_device_with_its_even_share_drops_nothing() -> None:
    scores = torch.rand(6, EXPERTS)
    choice = Choice(scores, scores.topk(3).indices, scores)
    assert Capacity(factor=1.0, protected=torch.zeros(6, dtype=torch.bool)).kept(choice, 1).all()


def moe_and_input(tiny: ModelConfig, build: Callable[..., Transformer]) -> tuple[MoE, Tensor]:
    moe = build(tiny).layers[-1].mlp
    assert isinstance(moe, MoE)
    return moe, torch.randn(2, 9, tiny.hidden_size, generator=torch.Generator().manual_seed(3))


def passed(moe: MoE, x: Tensor, capacity: Capacity | None) -> tuple[Tensor, Choice]:
    sent = moe.dispatch(x, capacity)
    return moe.combine(sent, moe.experts(sent))


def test_a_dropped_copy_adds_nothing_and_the_others_are_untouched(tiny: ModelConfig, build: Callable) -> None:
    moe, x = moe_and_input(tiny, build)
    out, choice = passed(moe, x, Capacity(factor=0.5, protected=torch.arange(18) % 5 == 0))
    assert choice.kept is not None
    assert 0 < (~choice.kept).sum() < choice.kept.numel()
    plain = torch.zeros_like(x).flatten(0, 1)
    for t, token in enumerate(x.flatten(0, 1)):
        for i, e in enumerate(choice.topk_ids[t].tolist()):
            if choice.kept[t, i]:
                gate, up = (moe.routed_experts.gate_up_proj[e] @ token).chunk(2)
                plain[t] += choice.weights[t, i] * (moe.routed_experts.down_proj[e] @ (gate.sigmoid() * gate * up))
    torch.testing.assert_close(out - moe.shared_experts(x), plain.view_as(x), rtol=1e-4, atol=1e-5)


class Poisoned(LocalDispatcher):
    """Rows that no expert computes come back as NaN, as uninitialised memory may."""

    def combine(self, y: Tensor, routed, weights: Tensor) -> Tensor:
        return super().combine(y if routed.live is None else y.where(routed.live, torch.nan), routed, weights)


def test_what_lies_in_rows_that_no_expert_computes_reaches_neither_output_nor_gradient(tiny, build) -> None:
    moe, x = moe_and_input(tiny, build)
    capacity = Capacity(factor=0.5, protected=torch.zeros(18, dtype=torch.bool))
    out, _ = passed(moe, x, capacity)
    moe.dispatcher = Poisoned()
    x.requires_grad_()
    poisoned, _ = passed(moe, x, capacity)
    assert torch.equal(out, poisoned)
    poisoned.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in moe.parameters() if p.grad is not None)]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_gradients_with_dropping_are_those_of_zeroed_gate_weights(tiny: ModelConfig, build: Callable) -> None:
    moe, x = moe_and_input(tiny, build)
    capacity = Capacity(factor=0.5, protected=torch.zeros(18, dtype=torch.bool))
    parameters = list(moe.parameters())
    out, choice = passed(moe, x, capacity)
    found = torch.autograd.grad(out.square().sum(), parameters)
    sent = moe.dispatch(x)
    sent.choice.weights = sent.choice.weights * choice.kept
    plain, _ = moe.combine(sent, moe.experts(sent))
    expected = torch.autograd.grad(plain.square().sum(), parameters)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def train_config(**changes) -> TrainConfig:
    return TrainConfig(max_steps=1, per_device_train_batch_size=4, max_length=12, learning_rate=1e-3, **changes)


def batch_of(rows: int, tokens: int) -> Batch:
    ids = torch.randint(0, 61, (rows, tokens + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids=ids[:, :-1].clone(), labels=ids[:, 1:].clone())


def test_training_drops_by_the_factor_and_reports_it(tiny: ModelConfig, build: Callable) -> None:
    model, batch = build(tiny), batch_of(4, 12)
    outcomes = {}
    for factor, spared in ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (100.0, 0.0)):
        objective = LanguageModelling(train_config(expert_capacity_factor=factor, undropped_sequences=spared))
        outcomes[factor, spared] = objective(model, batch, objective.targets(model, batch))
    assert "dropped_copies" not in outcomes[0.0, 0.0].metrics
    copies = len(model.gates()) * 4 * 12 * tiny.num_experts_per_tok
    assert copies // 2 <= outcomes[0.5, 0.0].metrics["dropped_copies"] < copies
    assert outcomes[0.5, 0.0].loss != outcomes[0.0, 0.0].loss
    for everything_kept in ((0.5, 1.0), (100.0, 0.0)):
        assert outcomes[everything_kept].metrics["dropped_copies"] == 0
        torch.testing.assert_close(outcomes[everything_kept].loss, outcomes[0.0, 0.0].loss)


def test_a_spared_sequence_keeps_every_copy_in_every_layer(tiny: ModelConfig, build: Callable) -> None:
    model, batch = build(tiny), batch_of(4, 12)
    protected = torch.tensor([False, True, False, False]).repeat_interleave(12)
    trunk = model.trunk(batch.ids, capacity=Capacity(factor=0.25, protected=protected))
    _, choices = model.top(trunk)
    for choice in choices:
        assert choice.kept is not None
        assert choice.kept[protected].all()
        assert not choice.kept[~protected].all()


def test_about_a_tenth_of_the_sequences_is_spared_anew_each_time() -> None:
    objective = LanguageModelling(train_config(expert_capacity_factor=1.0))
    batch = Batch(torch.zeros(4000, 1, dtype=torch.int64), torch.zeros(4000, 1, dtype=torch.int64))
    torch.manual_seed(0)
    first, second = (objective.capacity(batch) for _ in range(2))
    assert first is not None
    assert second is not None
    assert 320 < first.protected.sum() < 480
    assert not torch.equal(first.protected, second.protected)


def test_padding_takes_no_room(tiny: ModelConfig, build: Callable) -> None:
    model, batch = build(tiny), batch_of(2, 8)
    batch.segments = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    batch.positions = torch.arange(8).expand(2, 8)
    batch.labels[1, 3:] = IGNORE
    objective = LanguageModelling(train_config(expert_capacity_factor=100.0, undropped_sequences=0.0))
    outcome = objective(model, batch, objective.targets(model, batch))
    assert outcome.metrics["dropped_copies"] == 0  # of real tokens
    plain = LanguageModelling(train_config())(model, batch, objective.targets(model, batch))
    torch.testing.assert_close(outcome.loss, plain.loss)


def test_without_a_capacity_nothing_is_dropped_in_training_or_evaluation(tiny: ModelConfig, build: Callable) -> None:
    model = build(dataclasses.replace(tiny, topk_method="greedy"))
    for mode in (True, False):
        _, choices = model.train(mode).hidden(batch_of(2, 8).ids)
        assert all(choice.kept is None for choice in choices)


@pytest.mark.parametrize("name", ["undropped_sequences", "bias_update_until"])
def test_a_share_outside_zero_to_one_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}=1.5 -> use a share"):
        train_config(**{name: 1.5})
