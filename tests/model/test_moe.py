"""DeepSeekMoE against a loop over tokens and experts in float64.

On a CPU, `F.grouped_mm` takes float32, bfloat16 and float16 but not float64, and wants rows that are multiples of
16 bytes. So the module runs in float32 and only the loop runs in float64.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.model.config import ModelConfig
from benthic.model.moe import MoE
from benthic.model.transformer import Transformer


def moe_of(config: ModelConfig, build: Callable[..., Transformer]) -> MoE:
    return build(config).layers[1].mlp  # type: ignore[return-value]


def forward(moe: MoE, x: Tensor) -> Tensor:
    sent = moe.dispatch(x)
    return moe.combine(sent, moe.experts(sent))[0]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return down @ (F.silu(gate @ x) * (up @ x))


def loop(moe: MoE, w: dict[str, Tensor], x: Tensor, topk_ids: Tensor) -> Tensor:
    """V3 Eq 12-13, 15 for each token and each chosen expert. The choice itself (Eq 16) is given."""
    config, rows = moe.gate.config, []
    names = ("gate_proj", "up_proj", "down_proj")
    for token, chosen in zip(x.flatten(0, 1), topk_ids.tolist()):
        out = swiglu(token, *(w[f"shared_experts.{name}.weight"] for name in names))
        scores = {e: (w["gate.weight"][e] @ token).sigmoid() for e in chosen}
        norm = sum(scores.values()) if config.norm_topk_prob else 1.0
        for e in chosen:
            gate, up = w["routed_experts.gate_up_proj"][e].chunk(2, 0)
            expert = swiglu(token, gate, up, w["routed_experts.down_proj"][e])
            out = out + scores[e] / norm * config.routed_scaling_factor * expert
        rows.append(out)
    return torch.stack(rows).view_as(x)


CHANGES = [
    {},
    {"norm_topk_prob": False},
    {"n_shared_experts": 2},
    {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
    {"num_experts_per_tok": 4, "topk_group": 4},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_output_and_gradients_equal_a_float64_loop(
    tiny: ModelConfig, build: Callable[..., Transformer], change: dict[str, int | bool]
) -> None:
    moe = moe_of(dataclasses.replace(tiny, **change), build)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, tiny.hidden_size, generator=generator, requires_grad=True)
    upstream = torch.randn(x.shape, generator=generator)
    ours = forward(moe, x)
    ours.backward(upstream)

    weights = {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    plain = loop(moe, weights, x64, moe.gate(x.detach().flatten(0, 1)).topk_ids)
    plain.backward(upstream.double())

    torch.testing.assert_close(ours.double(), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-5, rtol=1e-4)
    for name, parameter in moe.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), weights[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_experts_that_receive_no_token_get_a_zero_gradient_and_leave_the_others_right(
    tiny: ModelConfig, build: Callable[..., Transformer]
) -> None:
    moe = moe_of(tiny, build)
    idle = [0, 3, 7]  # first, middle and last: the ends of the offsets
    moe.gate.e_score_correction_bias[idle] = -10.0
    x = torch.randn(1, 5, tiny.hidden_size, generator=torch.Generator().manual_seed(0))
    ids = moe.gate(x.flatten(0, 1)).topk_ids
    assert not set(ids.flatten().tolist()) & set(idle)
    out = forward(moe, x)
    out.square().sum().backward()
    plain = loop(moe, {n: p.detach().double() for n, p in moe.named_parameters()}, x.double(), ids)
    torch.testing.assert_close(out.double(), plain, atol=1e-5, rtol=1e-5)
    for name in ("gate_up_proj", "down_proj"):
        grad = getattr(moe.routed_experts, name).grad
        assert [e for e in range(8) if not grad[e].any()] == sorted(set(range(8)) - set(ids.flatten().tolist()))
        assert grad.isfinite().all()


def test_a_single_token_works(tiny: ModelConfig, build: Callable[..., Transformer]) -> None:
    moe, x = moe_of(tiny, build), torch.ones(1, 1, tiny.hidden_size)
    plain = loop(
        moe, {n: p.double() for n, p in moe.named_parameters()}, x.double(), moe.gate(x.flatten(0, 1)).topk_ids
    )
    torch.testing.assert_close(forward(moe, x).double(), plain, atol=1e-5, rtol=1e-5)


def test_a_token_does_not_feel_the_others_in_its_batch(tiny: ModelConfig, build: Callable[..., Transformer]) -> None:
    moe = moe_of(tiny, build)
    x = torch.randn(1, 9, tiny.hidden_size, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([forward(moe, x[:, t : t + 1]) for t in range(9)], 1)
    torch.testing.assert_close(forward(moe, x), alone, atol=1e-5, rtol=1e-5)


def test_the_shared_expert_is_added_unscaled(tiny: ModelConfig, build: Callable[..., Transformer]) -> None:
    moe = moe_of(tiny, build)
    with torch.no_grad():
        moe.routed_experts.down_proj.zero_()
    x = torch.randn(1, 4, tiny.hidden_size)
    torch.testing.assert_close(forward(moe, x), moe.shared_experts(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_gives_half_precision_output_close_to_float32(
    tiny: ModelConfig, build: Callable[..., Transformer], dtype: torch.dtype
) -> None:
    moe = moe_of(tiny, build)
    x = torch.randn(2, 8, tiny.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        out, exact = forward(moe, x), forward(moe, x.float())
    assert out.dtype == dtype
    assert (out.float() - exact).norm() / exact.norm() < 0.02


def test_two_passes_and_their_gradients_are_equal_bit_for_bit(
    tiny: ModelConfig, build: Callable[..., Transformer]
) -> None:
    moe = moe_of(tiny, build)
    x = torch.randn(2, 16, tiny.hidden_size, generator=torch.Generator().manual_seed(0))
    runs = []
    for _ in range(2):
        moe.zero_grad()
        out = forward(moe, x)
        out.square().sum().backward()
        runs.append([out.detach(), *(p.grad for p in moe.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
