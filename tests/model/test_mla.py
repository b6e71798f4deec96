"""Latent attention against a script of the equations that shares no code with it."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from benthic.model import rope
from benthic.model.config import ModelConfig
from benthic.model.mla import MLA
from benthic.model.transformer import Transformer


@pytest.fixture
def mla(model: Transformer) -> MLA:
    return model.layers[1].self_attn  # type: ignore[return-value]


def inputs(model: Transformer, rows: int, tokens: int) -> Tensor:
    return torch.randn(rows, tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(3))


def angles(model: Transformer, positions: Tensor) -> tuple[Tensor, Tensor]:
    return rope.angles(positions, model.config)


def rms_norm(vector: Tensor, weight: Tensor, eps: float) -> Tensor:
    return vector / math.sqrt(float((vector**2).mean()) + eps) * weight


def turned(vector: Tensor, position: int, theta: float) -> Tensor:
    """RoFormer Eq 34, one pair (2i, 2i+1) after the other."""
    out = torch.empty_like(vector)
    for i in range(0, len(vector), 2):
        angle = position * theta ** (-i / len(vector))
        out[i] = vector[i] * math.cos(angle) - vector[i + 1] * math.sin(angle)
        out[i + 1] = vector[i] * math.sin(angle) + vector[i + 1] * math.cos(angle)
    return out


def equations(model: Transformer, mla: MLA, h: Tensor) -> Tensor:
    """V3 Eq 1-11 in float64 for one document h [T, d]: loops over positions and heads, nothing vectorised over them."""
    c = model.config
    n, d_h, d_r, d_v, d_c = (
        c.num_attention_heads,
        c.qk_nope_head_dim,
        c.qk_rope_head_dim,
        c.v_head_dim,
        c.kv_lora_rank,
    )
    w = {name: parameter.detach().double() for name, parameter in mla.named_parameters()}
    down = w["kv_a_proj_with_mqa.weight"]
    up = w["kv_b_proj.weight"].view(n, d_h + d_v, d_c)
    queries_up = w["q_b_proj.weight"].view(n, d_h + d_r, c.q_lora_rank)
    keys, values, outputs = [], [], []
    for t, h_t in enumerate(h.double()):
        c_kv = rms_norm(down[:d_c] @ h_t, w["kv_a_layernorm.weight"], c.rms_norm_eps)  # Eq 1 (and its norm)
        k_rope = turned(down[d_c:] @ h_t, t, c.rope_theta)  # Eq 3
        keys.append([torch.cat((up[i, :d_h] @ c_kv, k_rope)) for i in range(n)])  # Eq 2, 4
        values.append([up[i, d_h:] @ c_kv for i in range(n)])  # Eq 5
        c_q = rms_norm(w["q_a_proj.weight"] @ h_t, w["q_a_layernorm.weight"], c.rms_norm_eps)  # Eq 6
        heads = []
        for i in range(n):
            q_nope = queries_up[i, :d_h] @ c_q  # Eq 7
            q_rope = turned(queries_up[i, d_h:] @ c_q, t, c.rope_theta)  # Eq 8
            q = torch.cat((q_nope, q_rope))  # Eq 9
            scores = torch.stack([q @ keys[j][i] / math.sqrt(d_h + d_r) for j in range(t + 1)])
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(weights[j] * values[j][i] for j in range(t + 1)))  # Eq 10
        outputs.append(w["o_proj.weight"] @ torch.cat(heads))  # Eq 11
    return torch.stack(outputs)


def test_expanded_attention_equals_the_equations(model: Transformer, mla: MLA) -> None:
    x = inputs(model, 2, 7)
    ours = mla.expanded(x, *angles(model, torch.arange(7).unsqueeze(0)), None)
    plain = torch.stack([equations(model, mla, row) for row in x])
    assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()


def test_the_comparison_notices_a_wrong_scale(model: Transformer, mla: MLA) -> None:
    x = inputs(model, 1, 7)
    mla.scale = model.config.kv_lora_rank**-0.5  # of the latent instead of the head
    ours = mla.expanded(x, *angles(model, torch.arange(7).unsqueeze(0)), None)
    assert (ours[0] - equations(model, mla, x[0])).abs().max() > 1e-2


def test_a_causal_mask_given_as_a_tensor_changes_nothing(model: Transformer, mla: MLA) -> None:
    x, turn = inputs(model, 2, 9), angles(model, torch.arange(9).unsqueeze(0))
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(mla.expanded(x, *turn, mask), mla.expanded(x, *turn, None), atol=1e-6, rtol=1e-5)


def test_only_differences_of_positions_matter(model: Transformer, mla: MLA) -> None:
    x, positions = inputs(model, 1, 6), torch.arange(6).unsqueeze(0)
    near = mla.expanded(x, *angles(model, positions), None)
    far = mla.expanded(x, *angles(model, positions + 90), None)
    stretched = mla.expanded(x, *angles(model, positions * 2), None)
    torch.testing.assert_close(near, far, atol=2e-5, rtol=1e-4)
    assert (near - stretched).abs().max() > 1e-3


def test_the_cached_latent_is_the_normed_one_with_a_turned_rotary_key(model: Transformer, mla: MLA) -> None:
    x = inputs(model, 1, 4)
    c_kv, k_rope = mla.latents(x, *angles(model, torch.arange(4).unsqueeze(0)))
    c = model.config
    for t in range(4):
        both = mla.kv_a_proj_with_mqa.weight.detach().double() @ x[0, t].double()
        normed = rms_norm(both[: c.kv_lora_rank], mla.kv_a_layernorm.weight.detach().double(), c.rms_norm_eps)
        torch.testing.assert_close(c_kv[0, t].double(), normed, atol=1e-5, rtol=1e-5)
        key = turned(both[c.kv_lora_rank :], t, c.rope_theta)
        torch.testing.assert_close(k_rope[0, t].double(), key, atol=1e-5, rtol=1e-5)


def test_rotation_turns_neighbouring_pairs_and_keeps_lengths(tiny: ModelConfig) -> None:
    x = torch.randn(1, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    out = rope.rotate(x, *rope.angles(torch.arange(5).unsqueeze(0), dataclasses.replace(tiny, qk_rope_head_dim=8)))
    for t in range(5):
        for head in range(3):
            expected = turned(x[0, t, head].double(), t, 10000.0)
            torch.testing.assert_close(out[0, t, head].double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[:, 0], x[:, 0])


def test_rotation_of_bfloat16_is_computed_in_float32(tiny: ModelConfig) -> None:
    x = torch.randn(1, 64, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turn = rope.angles(torch.arange(4000, 4064).unsqueeze(0), dataclasses.replace(tiny, qk_rope_head_dim=8))
    out = rope.rotate(x, *turn)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rope.rotate(x.float(), *turn).bfloat16())
