import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benthic.model.config import ModelConfig
from benthic.model.gate import Gate, node_limited_top_k
from benthic.model.transformer import Transformer

CONFIG = ModelConfig(
    hidden_size=16, n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5
)


def gate_of(config: ModelConfig, bias: Tensor | float = 0.0) -> Gate:
    gate = Gate(config)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.5)
        gate.e_score_correction_bias.add_(bias)
    return gate


def tokens(n: int = 200) -> Tensor:
    return torch.randn(n, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))


def uneven_bias(config: ModelConfig = CONFIG) -> Tensor:
    return torch.linspace(-0.5, 0.5, config.n_routed_experts)[
        torch.randperm(config.n_routed_experts, generator=torch.Generator().manual_seed(2))
    ]


def plain_choice(biased: list[float], config: ModelConfig) -> set[int]:
    """Node-limited routing for one token, in plain python: V3 Sec 2.1.2 and the released inference code."""
    size = config.n_routed_experts // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    if config.topk_group < config.n_group:
        value = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
        best = sorted(range(config.n_group), key=lambda g: -value[g])[: config.topk_group]
        allowed = [e for g in best for e in groups[g]]
    else:
        allowed = list(range(config.n_routed_experts))
    return set(sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok])


@st.composite
def problems(draw: st.DrawFn) -> tuple[ModelConfig, Tensor]:
    """A routing shape and biased scores [N, E] without ties, shifted anywhere from all negative to all positive."""
    groups = draw(st.integers(1, 5))
    size = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, kept * size))
    shift = draw(st.sampled_from([-3.0, -0.5, 0.0, 2.0]))
    seed = draw(st.integers(0, 999))
    config = dataclasses.replace(
        CONFIG, n_routed_experts=groups * size, n_group=groups, topk_group=kept, num_experts_per_tok=k
    )
    return config, torch.rand(5, groups * size, generator=torch.Generator().manual_seed(seed)) + shift


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_choice_equals_a_plain_search_whatever_the_sign_of_the_scores(problem: tuple[ModelConfig, Tensor]) -> None:
    config, biased = problem
    for row, ids in zip(biased.tolist(), node_limited_top_k(biased, config).tolist()):
        assert set(ids) == plain_choice(row, config)
        assert len(set(ids)) == config.num_experts_per_tok


def test_a_group_is_worth_the_sum_of_its_two_best() -> None:
    config = dataclasses.replace(CONFIG, n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=1)
    one_star = [0.9, 0.1, 0.1]  # the best expert of all, but a sum of two of 1.0
    two_good = [0.6, 0.6, 0.0]  # 1.2
    three_fair = [0.55, 0.55, 0.55]  # 1.1 for two, 1.65 for all three
    assert node_limited_top_k(torch.tensor([one_star + two_good]), config).item() in (3, 4)
    assert node_limited_top_k(torch.tensor([two_good + three_fair]), config).item() in (0, 1)


def test_a_group_is_valued_by_biased_scores() -> None:
    gate = gate_of(dataclasses.replace(CONFIG, topk_group=1, num_experts_per_tok=3))
    gate.e_score_correction_bias[3:6] = 5.0
    assert set(gate(tokens()).topk_ids.flatten().tolist()) == {3, 4, 5}


def test_no_token_reaches_more_groups_than_it_may() -> None:
    ids = gate_of(CONFIG, uneven_bias())(tokens()).topk_ids  # [N, K]
    groups = [len(set(row)) for row in (ids // 3).tolist()]
    assert max(groups) == CONFIG.topk_group
    free = gate_of(dataclasses.replace(CONFIG, topk_group=4), uneven_bias())(tokens()).topk_ids
    assert max(len(set(row)) for row in (free // 3).tolist()) > CONFIG.topk_group  # the limit is what holds them


@pytest.mark.parametrize("bias", [-10.0, -1.0, 0.0, 10.0])
def test_a_bias_common_to_all_changes_nothing_even_if_it_makes_all_scores_negative(bias: float) -> None:
    plain, shifted = gate_of(CONFIG)(tokens()), gate_of(CONFIG, bias)(tokens())
    assert torch.equal(plain.topk_ids.sort(1).values, shifted.topk_ids.sort(1).values)
    assert max(len(set(row)) for row in (shifted.topk_ids // 3).tolist()) <= CONFIG.topk_group


def test_masking_with_zero_instead_would_choose_a_losing_group() -> None:
    """The mistake that released modelling code once made: it only shows when biased scores are negative."""
    config = dataclasses.replace(CONFIG, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    scores = torch.tensor([[-0.1, -0.2, -0.3, -0.4]])
    assert scores.masked_fill(torch.tensor([[False, False, True, True]]), 0.0).topk(2).indices.tolist() == [[2, 3]]
    assert sorted(node_limited_top_k(scores, config)[0].tolist()) == [0, 1]


def test_the_bias_changes_who_is_chosen_and_never_the_weights() -> None:
    plain, biased = gate_of(CONFIG)(tokens()), gate_of(CONFIG, uneven_bias())(tokens())
    assert not torch.equal(plain.topk_ids.sort(1).values, biased.topk_ids.sort(1).values)
    assert torch.equal(plain.scores, biased.scores)
    chosen = biased.scores.gather(1, biased.topk_ids)  # without bias
    torch.testing.assert_close(biased.weights, chosen / chosen.sum(1, keepdim=True) * 2.5)


def test_a_bias_that_changes_no_choice_changes_no_bit_of_the_weights() -> None:
    plain, biased = gate_of(CONFIG)(tokens()), gate_of(CONFIG, 0.25)(tokens())
    order_a, order_b = plain.topk_ids.argsort(1), biased.topk_ids.argsort(1)
    assert torch.equal(plain.topk_ids.gather(1, order_a), biased.topk_ids.gather(1, order_b))
    torch.testing.assert_close(plain.weights.gather(1, order_a), biased.weights.gather(1, order_b), atol=0, rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.5, 16.0])
def test_weights_sum_to_the_scaling_factor(factor: float) -> None:
    gate = gate_of(dataclasses.replace(CONFIG, routed_scaling_factor=factor), uneven_bias())
    sums = gate(tokens()).weights.sum(1)
    torch.testing.assert_close(sums, torch.full_like(sums, factor))


def test_without_normalisation_weights_are_the_scaled_scores() -> None:
    choice = gate_of(dataclasses.replace(CONFIG, norm_topk_prob=False), uneven_bias())(tokens())
    torch.testing.assert_close(choice.weights, choice.scores.gather(1, choice.topk_ids) * 2.5)


def test_scores_that_underflow_to_zero_still_give_finite_weights() -> None:
    gate = gate_of(CONFIG)
    with torch.no_grad():
        gate.weight.fill_(-100.0)
    choice = gate(torch.ones(3, CONFIG.hidden_size))
    assert choice.scores.max() == 0
    assert choice.weights.isfinite().all()


def test_the_gate_computes_in_float32_when_tokens_are_bfloat16() -> None:
    gate, x = gate_of(CONFIG, uneven_bias()), tokens().bfloat16()
    choice, exact = gate(x), gate(x.float())
    assert choice.scores.dtype == choice.weights.dtype == torch.float32
    assert torch.equal(choice.scores, exact.scores)
    assert torch.equal(choice.topk_ids, exact.topk_ids)
    coarse = torch.nn.functional.linear(x, gate.weight.bfloat16()).float().sigmoid()
    assert (coarse - exact.scores).abs().max() > 1e-4  # what bfloat16 would have cost


CASTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "double()": lambda m: m.double(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_casting_the_model_leaves_every_bit_of_the_bias(model: Transformer, cast: Callable) -> None:
    before = [gate.e_score_correction_bias.clone() for gate in model.gates()]
    cast(model)
    assert model.lm_head.weight.dtype != torch.float32
    for gate, bias in zip(model.gates(), before):
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(gate.e_score_correction_bias, bias)
        assert dict(gate.named_buffers())["e_score_correction_bias"] is gate.e_score_correction_bias


def test_moving_the_model_to_the_meta_device_takes_the_bias_along(model: Transformer) -> None:
    model.to("meta", torch.bfloat16)
    assert {gate.e_score_correction_bias.device.type for gate in model.gates()} == {"meta"}
    assert {gate.e_score_correction_bias.dtype for gate in model.gates()} == {torch.float32}


def test_the_bias_is_no_parameter_and_gets_no_gradient(model: Transformer) -> None:
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    gate = model.gates()[0]
    gate(torch.randn(4, model.config.hidden_size)).weights.sum().backward()
    assert gate.weight.grad is not None
    assert not gate.e_score_correction_bias.requires_grad


def test_the_cosine_affinity_is_the_angle_between_token_and_centroid() -> None:
    gate = gate_of(dataclasses.replace(CONFIG, gate_affinity="cosine"))
    x = tokens(5)
    for token, scores in zip(x, gate(x).scores):
        for e, centroid in enumerate(gate.weight):
            angle = (token @ centroid / (token.norm() * centroid.norm())).item()
            assert scores[e].item() == pytest.approx(torch.tensor(angle / 0.07).sigmoid().item(), abs=1e-5)


def test_the_cosine_affinity_is_blind_to_the_length_of_tokens_and_centroids_and_the_dot_product_is_not() -> None:
    changed = {}
    for affinity in ("cosine", "dot"):
        gate, x = gate_of(dataclasses.replace(CONFIG, gate_affinity=affinity)), tokens(20)
        before = gate(x).scores
        with torch.no_grad():
            gate.weight[3] *= 5
        changed[affinity] = (gate(3 * x).scores - before).abs().max().item()
    assert changed["cosine"] < 1e-4
    assert changed["dot"] > 0.1
