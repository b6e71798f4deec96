"""Every layout of the family, written by us and read by transformers: equal logits, also past the original context."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benthic.model import hf
from benthic.model.cache import CacheView, LatentCache
from benthic.model.config import ModelConfig, RopeScaling
from benthic.model.transformer import Transformer

TOLERANCE = 2e-5  # logits have a deviation of about one
YARN = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707)
LLAMA3 = RopeScaling(type="llama3", factor=8.0, original_max_position_embeddings=32)
V2: dict[str, Any] = {
    "model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0,
}  # fmt: skip
DENSE: dict[str, Any] = {
    "q_lora_rank": None, "kv_lora_rank": None, "n_routed_experts": 0, "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 0, "num_attention_heads": 4, "head_dim": 8,
}  # fmt: skip
FAMILY: dict[str, dict[str, Any]] = {
    "V2: best groups, no normalisation, scaled by 16": V2 | {
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
    },
    "V2-Lite: greedy, no query compression, YaRN": V2 | {
        "topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None, "routed_scaling_factor": 1.0,
        "rope_scaling": YARN,
    },
    "V3 with YaRN": {"rope_scaling": dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=1.0)},
    "V3 with a turn factor": {"rope_scaling": dataclasses.replace(YARN, mscale=1.0)},
    "V3 without query compression": {"q_lora_rank": None},
    "V1 7B: MHA": DENSE | {"model_type": "llama", "num_key_value_heads": 4},
    "V1 67B: GQA": DENSE | {"model_type": "llama", "num_key_value_heads": 2},
    "MQA": DENSE | {"model_type": "llama", "num_key_value_heads": 1},
    "R1-Distill-Llama": DENSE | {"model_type": "llama", "num_key_value_heads": 2, "rope_scaling": LLAMA3},
    "R1-Distill-Qwen": DENSE | {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2, untied": DENSE | {"model_type": "qwen2", "num_key_value_heads": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@pytest.fixture(params=FAMILY.values(), ids=FAMILY.keys())
def member(request: pytest.FixtureRequest, tiny: ModelConfig, build: Callable[..., Transformer]) -> Transformer:
    model = build(dataclasses.replace(tiny, **request.param))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return model


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(2, 61, (rows, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_and_greedy_continuations_equal_those_of_transformers(tmp_path: Path, member: Transformer) -> None:
    hf.write_model(tmp_path / "m", member, None)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    ids = ids_of(3, 60)
    expected = reference(ids).logits
    assert expected.std() > 0.3
    assert (member(ids) - expected).abs().max() < TOLERANCE
    loaded, _ = hf.load(tmp_path / "m", device="cpu")
    assert torch.equal(loaded(ids), member(ids))
    grown = ids[:1, :8]
    for _ in range(12):
        grown = torch.cat((grown, member(grown)[:, -1:].argmax(-1)), 1)
    theirs = reference.generate(ids[:1, :8], max_new_tokens=12, do_sample=False, eos_token_id=[], pad_token_id=0)
    assert grown.tolist() == theirs.tolist()


@torch.no_grad()
def test_folders_of_transformers_load_and_agree(tmp_path: Path, member: Transformer) -> None:
    hf.write_model(tmp_path / "ours", member, None)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    reference.save_pretrained(tmp_path / "theirs")
    loaded, _ = hf.load(tmp_path / "theirs", device="cpu")
    ids = ids_of(2, 30)
    assert (loaded(ids) - reference(ids).logits).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7])
def test_the_cached_form_equals_the_expanded_one(member: Transformer, chunk: int) -> None:
    ids = ids_of(2, 35)
    cache = LatentCache(member.config, 71, "cpu", torch.float32)
    (c_kv, k_rope), c = (cache.layers[0].c_kv, cache.layers[0].k_rope), member.config
    assert c_kv.shape[-1] + k_rope.shape[-1] == c.cache_width
    slots = torch.arange(1, 71).view(2, 35)
    parts = []
    for a in range(0, 35, chunk):
        view = CacheView(cache, write=slots[:, a : a + chunk], table=slots[:, : a + chunk])
        hidden, _ = member.hidden(ids[:, a : a + chunk], torch.arange(a, a + chunk).expand(2, -1), cache=view)
        parts.append(member.logits(hidden))
    assert (torch.cat(parts, 1) - member(ids)).abs().max() < 1e-4


@torch.no_grad()
def test_the_comparison_notices_an_unscaled_softmax(tmp_path: Path, tiny: ModelConfig, build) -> None:
    model = build(dataclasses.replace(tiny, rope_scaling=YARN))
    hf.write_model(tmp_path / "m", model, None)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    for layer in model.layers:
        layer.self_attn.scale = model.config.qk_head_dim**-0.5
    ids = ids_of(1, 40)
    assert (model(ids) - reference(ids).logits).abs().max() > 100 * TOLERANCE
