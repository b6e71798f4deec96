"""The same folder, read by transformers: equal logits and equal continuations.

transformers has no multi-token prediction, so it reports the tensors of those layers as unexpected and drops them (it
is silent about layer 61 only, V3's own). It masks losing expert groups with -inf, as we do; versions that masked
with 0 would differ here wherever biased scores are negative. The two norms of latents ignore its `rms_norm_eps`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging as transformers_logging

from benthic.model import hf
from benthic.model.config import ModelConfig
from benthic.model.transformer import Transformer

TOLERANCE = 2e-5  # logits have a deviation of about one


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def theirs(folder: Path) -> tuple[DeepseekV3ForCausalLM, dict[str, Any]]:
    model, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    return model.eval(), info


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(2, 61, (rows, tokens), generator=torch.Generator().manual_seed(0))


SHAPES: dict[str, dict[str, Any]] = {
    "node-limited": {},
    "no top-k normalisation": {"norm_topk_prob": False},
    "one group": {"n_group": 1, "topk_group": 1},
    "every group allowed": {"topk_group": 4},
    "no dense layer": {"first_k_dense_replace": 0},
    "only dense layers": {"first_k_dense_replace": 3},
    "two shared experts": {"n_shared_experts": 2, "num_experts_per_tok": 4},
    "another rotary base and odd sizes": {"rope_theta": 500.0, "v_head_dim": 20, "num_attention_heads": 3},
    "two MTP modules": {"num_nextn_predict_layers": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_those_of_transformers(
    tmp_path: Path, tiny: ModelConfig, build: Callable[..., Transformer], change: dict[str, Any]
) -> None:
    model = build(dataclasses.replace(tiny, **change))
    biases = torch.cat([gate.e_score_correction_bias for gate in model.gates()])
    assert (biases > 0.1).any()
    assert (biases < -0.1).any()
    hf.write_model(tmp_path / "m", model, None)
    reference, _ = theirs(tmp_path / "m")
    ids = ids_of(3, 40)
    expected = reference(ids).logits
    assert expected.std() > 0.5
    assert (model(ids) - expected).abs().max() < TOLERANCE
    assert (hf.load(tmp_path / "m", device="cpu")[0](ids) - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_the_comparison_notices_a_lost_gate_bias(tmp_path: Path, model: Transformer) -> None:
    hf.write_model(tmp_path / "m", model, None)
    reference, _ = theirs(tmp_path / "m")
    for gate in model.gates():
        gate.e_score_correction_bias.zero_()
    assert (model(ids_of(3, 40)) - reference(ids_of(3, 40)).logits).abs().max() > 1e-2


@torch.no_grad()
def test_both_mask_losing_groups_with_minus_infinity(tmp_path: Path, model: Transformer) -> None:
    for gate in model.gates():
        gate.e_score_correction_bias -= 3.0  # every biased score is negative: a mask of 0 would win
    hf.write_model(tmp_path / "m", model, None)
    reference, _ = theirs(tmp_path / "m")
    x = torch.randn(50, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for ours, layer in zip(model.gates(), reference.model.layers[1:]):
        _, weights, ids = layer.mlp.gate(x)
        choice = ours(x)
        assert torch.equal(ids.sort(1).values, choice.topk_ids.sort(1).values)
        torch.testing.assert_close(weights.sort(1).values, choice.weights.sort(1).values)
        assert max(len(set(row)) for row in (ids // 2).tolist()) == model.config.topk_group
    assert (model(ids_of(3, 40)) - reference(ids_of(3, 40)).logits).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_greedy_continuation_of_20_tokens_is_identical(tmp_path: Path, model: Transformer) -> None:
    hf.write_model(tmp_path / "m", model, None)
    reference, _ = theirs(tmp_path / "m")
    reference.generation_config.eos_token_id = None
    ids = ids_of(2, 7)
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    for _ in range(20):
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    assert ids.tolist() == expected.tolist()
    assert len(set(ids[0, 7:].tolist())) > 3  # not one token for ever


def test_transformers_reads_every_tensor_but_those_of_the_mtp_layers(tmp_path: Path, model: Transformer) -> None:
    hf.write_model(tmp_path / "m", model, None)
    _, info = theirs(tmp_path / "m")
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert info["unexpected_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])


def test_without_mtp_transformers_reads_everything(
    tmp_path: Path, tiny: ModelConfig, build: Callable[..., Transformer]
) -> None:
    hf.write_model(tmp_path / "m", build(dataclasses.replace(tiny, num_nextn_predict_layers=0)), None)
    _, info = theirs(tmp_path / "m")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def saved_by_transformers(folder: Path, config: ModelConfig) -> DeepseekV3ForCausalLM:
    shape = dataclasses.asdict(config)
    for name in ("rope_scaling", "scoring_func", "topk_method", "model_type", "head_dim"):
        del shape[name]
    torch.manual_seed(0)
    reference = DeepseekV3ForCausalLM(DeepseekV3Config(**shape | {"num_key_value_heads": config.num_attention_heads}))
    with torch.no_grad():
        for layer in reference.model.layers[config.first_k_dense_replace :]:
            layer.mlp.gate.weight.normal_()
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.3)
    reference.save_pretrained(folder)
    return reference.eval()


@torch.no_grad()
def test_a_folder_that_transformers_saved_loads_with_equal_logits(tmp_path: Path, tiny: ModelConfig) -> None:
    config = dataclasses.replace(tiny, num_nextn_predict_layers=0, rope_theta=500.0)
    reference = saved_by_transformers(tmp_path / "m", config)
    model, _ = hf.load(tmp_path / "m", device="cpu")
    assert model.config == config
    assert (model(ids_of(2, 30)) - reference(ids_of(2, 30)).logits).abs().max() < TOLERANCE


def test_a_folder_whose_config_promises_mtp_layers_that_transformers_dropped_loads_without_them(
    tmp_path: Path, tiny: ModelConfig
) -> None:
    saved_by_transformers(tmp_path / "m", tiny)
    assert tiny.num_nextn_predict_layers == 1
    assert len(hf.load(tmp_path / "m", device="cpu")[0].mtp) == 0
