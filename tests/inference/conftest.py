import random

import pytest
import torch

from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=64,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    max_position_embeddings=96,
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture
def model() -> Transformer:
    """Random weights: every answer depends on its whole context, and drafts are almost never right."""
    return initialise(Transformer(CONFIG), std=0.15, seed=0)


@pytest.fixture
def foreseeing() -> Transformer:
    """Random weights bent so that the next token follows mostly from the last one, and so drafts are often right."""
    model = initialise(Transformer(CONFIG), std=0.15, seed=0)
    with torch.no_grad():
        model.lm_head.weight.copy_(2 * model.embed_tokens.weight.roll(1, 0))
        model.embed_tokens.weight.mul_(2)
        d = CONFIG.hidden_size
        model.mtp[0].eh_proj.weight.copy_(torch.cat((torch.eye(d), torch.zeros(d, d)), 1))
    return model


@pytest.fixture
def prompts() -> list[list[int]]:
    """24 prompts of 1 to 40 tokens."""
    rng = random.Random(1)
    return [[rng.randrange(CONFIG.vocab_size) for _ in range(rng.randrange(1, 41))] for _ in range(24)]
