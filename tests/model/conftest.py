"""Tiny models whose every weight matters: norms away from one, gate biases of both signs."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    max_position_embeddings=128,
)

V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_nextn_predict_layers=1,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    n_shared_experts=1,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    max_position_embeddings=163840,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture
def v3() -> ModelConfig:
    """DeepSeek-V3 as released."""
    return V3


@pytest.fixture
def build() -> Callable[..., Transformer]:
    return _build


@pytest.fixture
def model() -> Transformer:
    return _build(TINY)


def _build(config: ModelConfig, seed: int = 0, bias: float = 0.3, dtype: torch.dtype = torch.float32) -> Transformer:
    """A random model: matrices ~ N(0, 0.2^2), norms in [0.5, 1.5], gate biases ~ N(0, bias^2)."""
    model = initialise(Transformer(config, dtype=dtype), std=0.2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        for gate in model.gates():
            if gate.e_score_correction_bias is None:
                continue
            gate.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=generator) * bias)
    return model
