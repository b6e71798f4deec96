"""The engine on plain attention: V1, the students distilled from R1, DeepSeekMoE. Cached, batched and chunked decoding
give what full passes without a cache give, and what transformers generates from the same folder."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benthic import LLM
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.model.config import ModelConfig, RopeScaling
from benthic.model.hf import write_model
from benthic.model.init import initialise
from benthic.model.transformer import Transformer

TOKENS = 16
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0)
MARGIN = 1e-4  # between the two likeliest logits: ten times the rounding, so that equal ids are no luck
DENSE: dict[str, Any] = {
    "model_type": "llama", "q_lora_rank": None, "kv_lora_rank": None, "n_routed_experts": 0,
    "first_k_dense_replace": 3, "num_nextn_predict_layers": 0, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = RopeScaling(type="llama3", factor=8.0, original_max_position_embeddings=32)
MEMBERS: dict[str, dict[str, Any]] = {
    "V1 7B: MHA": DENSE,
    "V1 67B: GQA": DENSE | {"num_key_value_heads": 2},
    "MQA": DENSE | {"num_key_value_heads": 1},
    "R1-Distill-Llama": DENSE | {"num_key_value_heads": 2, "rope_scaling": LLAMA3},
    "R1-Distill-Qwen: biases, tied": DENSE | {
        "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "MoE 16B": DENSE | {
        "model_type": "deepseek", "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "scoring_func": "softmax", "topk_method": "greedy",
        "norm_topk_prob": False,
    },
}  # fmt: skip
KNOWN = {name: change for name, change in MEMBERS.items() if change["model_type"] != "deepseek"}  # to transformers


@torch.no_grad()
def build(config: ModelConfig) -> Transformer:
    """A random model whose norms and biases matter."""
    model = initialise(Transformer(config), std=0.2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        elif parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


@pytest.fixture(params=MEMBERS.values(), ids=[*MEMBERS])
def model(request: pytest.FixtureRequest, config: ModelConfig) -> Transformer:
    return build(dataclasses.replace(config, **request.param))


@pytest.fixture
def folder(tmp_path: Path, model: Transformer) -> Path:
    write_model(tmp_path / "m", model, None)
    return tmp_path / "m"


@pytest.fixture
def prompts() -> list[list[int]]:
    """Prompts of 1 to 70 tokens, the longest beyond the original context of the scaled models."""
    rng = random.Random(2)
    return [[rng.randrange(64) for _ in range(length)] for length in (1, 2, 7, 16, 17, 33, 48, 70)]


@torch.inference_mode()
def recomputed(model: Transformer, prompts: list[list[int]]) -> list[list[int]]:
    """Plain greedy decoding: the whole sequence, without a cache, for every token."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(TOKENS):
            best = model(torch.tensor([ids]))[0, -1].topk(2)
            assert best.values[0] - best.values[1] > MARGIN
            ids.append(int(best.indices[0]))
        answers.append(ids[len(prompt) :])
    return answers


def generated(folder: Path, prompts: list[list[int]], config: EngineConfig | None = None) -> list[list[int]]:
    llm = LLM(folder, device="cpu", dtype="float32", config=config)
    return [output.token_ids for output in llm.generate(prompts, GREEDY)]


def test_a_batch_of_unequal_prompts_decodes_as_without_a_cache(folder: Path, model: Transformer, prompts) -> None:
    expected = recomputed(model, prompts)
    assert generated(folder, prompts) == expected
    assert len({token for answer in expected for token in answer}) > 15  # the answers are no constant


@pytest.mark.parametrize("budget", [5, 16])
def test_prompts_in_pieces_decode_as_in_one_pass(folder: Path, prompts, budget: int) -> None:
    chunked = LLM(folder, device="cpu", config=EngineConfig(max_num_batched_tokens=budget, page_size=4))
    whole = LLM(folder, device="cpu")
    assert [o.token_ids for o in chunked.generate(prompts, GREEDY)] == [
        o.token_ids for o in whole.generate(prompts, GREEDY)
    ]
    assert whole.engine.stats.steps == TOKENS  # one prefill gives the first token
    assert chunked.engine.stats.steps - TOKENS >= sum(map(len, prompts)) // budget


def test_prompts_in_pieces_among_preemptions_decode_alike(folder: Path, prompts) -> None:
    tight = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8, max_model_len=88, page_size=4, num_pages=24)
    llm = LLM(folder, device="cpu", config=tight)
    assert [output.token_ids for output in llm.generate(prompts, GREEDY)] == generated(folder, prompts)
    assert llm.engine.stats.preemptions > 0


@torch.no_grad()
@pytest.mark.parametrize("model", KNOWN.values(), ids=[*KNOWN], indirect=True)
def test_transformers_generates_the_same(folder: Path, prompts) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        ids = reference.generate(
            row, attention_mask=row >= 0, max_new_tokens=TOKENS, do_sample=False, eos_token_id=[], pad_token_id=0
        )
        expected.append(ids[0, len(prompt) :].tolist())
    assert generated(folder, prompts) == expected


def test_the_comparison_notices_a_lost_bias_and_a_lost_scaling(tmp_path: Path, config: ModelConfig, prompts) -> None:
    for name in ("R1-Distill-Qwen: biases, tied", "R1-Distill-Llama"):
        model = build(dataclasses.replace(config, **MEMBERS[name]))
        write_model(tmp_path / model.config.model_type, model, None)
        other = build(dataclasses.replace(model.config, rope_scaling=None))
        if model.config.model_type == "qwen2":
            other.state_dict()["layers.1.self_attn.k_proj.bias"].zero_()
        assert generated(tmp_path / model.config.model_type, prompts) != recomputed(other, prompts)
