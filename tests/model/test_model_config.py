import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from benthic.base.config import from_dict, to_dict
from benthic.base.errors import InputError
from benthic.model.config import ModelConfig
from benthic.model.hf_config import from_hf, to_hf

INTEGERS = [field.name for field in dataclasses.fields(ModelConfig) if field.type is int]


def test_config_and_counting_import_no_torch() -> None:
    code = "import sys, benthic.model.config, benthic.model.count; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", INTEGERS)
def test_negative_numbers_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=rf"^{name}=-3 is negative -> use 0 or more$"):
        ModelConfig(**{name: -3})


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "experts divide into groups": (
        {"n_routed_experts": 10, "n_group": 4},
        "n_routed_experts=10 must divide by n_group=4",
    ),
    "at least one group": ({"n_group": 0}, "n_routed_experts=16 must divide by n_group=0"),
    "a group may be reached": ({"topk_group": 0}, "topk_group=0 -> use 1 to n_group=4"),
    "no more groups than there are": ({"topk_group": 5}, "topk_group=5 -> use 1 to n_group=4"),
    "aligned rows": ({"hidden_size": 36}, "hidden_size=36 -> use a multiple of 8"),
    "aligned experts": ({"moe_intermediate_size": 20}, "moe_intermediate_size=20 -> use a multiple of 8"),
    "some experts per token": ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 -> use 1 to 8"),
    "no more experts than reachable": ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 -> use 1 to 8"),
    "groups of two": (
        {"n_routed_experts": 4, "n_group": 4, "num_experts_per_tok": 2},
        "n_group=4 leaves groups of one expert -> use at least two per group",
    ),
    "prediction modules are mixtures": (
        {"first_k_dense_replace": 5},
        "first_k_dense_replace=5 makes prediction modules dense -> use 0 to num_hidden_layers=4",
    ),
    "rotary pairs": ({"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 is odd -> rotary pairs need an even width"),
}


@pytest.mark.parametrize(("change", "message"), RULES.values(), ids=RULES.keys())
def test_an_impossible_shape_is_refused_with_its_value_and_the_way_out(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig(**change)
    assert str(caught.value) == message


def test_one_step_inside_every_rule_is_accepted() -> None:
    ModelConfig(n_routed_experts=8, n_group=4, topk_group=4, num_experts_per_tok=8, qk_rope_head_dim=2)
    ModelConfig(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1)
    ModelConfig(num_nextn_predict_layers=0, first_k_dense_replace=9)
    ModelConfig(first_k_dense_replace=4)


def test_config_is_frozen_and_takes_keywords_only(tiny: ModelConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.hidden_size = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig(4096)  # type: ignore[misc]


def test_it_survives_plain_dicts_and_the_hugging_face_file(tiny: ModelConfig) -> None:
    assert from_dict(ModelConfig, to_dict(tiny)) == tiny
    assert from_hf(to_hf(tiny, "float32"), "config.json") == tiny


def test_the_released_v3_file_is_understood_once_its_extension_and_quantisation_are_gone(v3: ModelConfig) -> None:
    released = to_hf(v3, "bfloat16") | {
        "attention_dropout": 0.0,
        "ep_size": 1,
        "initializer_range": 0.02,
        "rope_theta": 10000,
        "rope_scaling": None,
        "transformers_version": "4.46.3",
        "use_cache": True,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "pretraining_tp": 1,
    }
    assert from_hf(released, "config.json") == v3


def test_what_changes_the_computation_is_never_ignored(tiny: ModelConfig) -> None:
    plain = to_hf(tiny, "float32")
    for key, value in {
        "rope_type": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 40}},
        "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 40}},
        "attn_factor": {"rope_scaling": {"type": "yarn", "factor": 40.0, "attn_factor": 2.0}},
        "quantization_config": {"quant_method": "fp8"},
        "attention_bias": True,
        "hidden_act": "gelu",
        "moe_layer_freq": 2,
        "scoring_func": "relu",
        "topk_method": "random",
        "model_type": "mamba",
        "sliding_window": 128,
        "layer_types": ["full_attention", "sliding_attention"],
    }.items():
        change = (
            value if isinstance(value, dict) and key not in plain and key != "quantization_config" else {key: value}
        )
        with pytest.raises(InputError, match=key):
            from_hf(plain | change, "config.json")


def test_what_changes_the_computation_is_read(tiny: ModelConfig) -> None:
    plain = to_hf(tiny, "float32")
    for key, value in {
        "tie_word_embeddings": True,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "q_lora_rank": None,
    }.items():
        assert getattr(from_hf(plain | {key: value}, "config.json"), key) == value


def test_the_rotary_base_is_found_where_newer_files_keep_it(tiny: ModelConfig) -> None:
    data = to_hf(tiny, "float32")
    del data["rope_theta"], data["rope_scaling"]
    newer = data | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    assert from_hf(newer, "config.json") == dataclasses.replace(tiny, rope_theta=500.0)
    for other in ({"rope_type": "linear"}, {"rope_theta": 500.0, "partial_rotary_factor": 0.5}, "default"):
        with pytest.raises(InputError, match=r"rope_type=|rope settings"):
            from_hf(data | {"rope_parameters": other}, "config.json")


def test_a_misspelt_key_names_its_neighbour(tiny: ModelConfig) -> None:
    with pytest.raises(InputError, match=r"unknown key 'num_expert_per_tok' in a/config\.json .*'num_experts_per_tok'"):
        from_hf(to_hf(tiny, "float32") | {"num_expert_per_tok": 2}, "a/config.json")


@pytest.mark.parametrize("model_type", ["mamba", None])
def test_another_model_type_is_told_what_is_supported(tiny: ModelConfig, model_type: str | None) -> None:
    data = to_hf(tiny, "float32") | {"model_type": model_type}
    with pytest.raises(InputError, match=rf"model_type={model_type!r} in here -> supported: deepseek_v3, "):
        from_hf(data, "here")


def test_a_value_of_the_wrong_type_is_refused(tiny: ModelConfig) -> None:
    with pytest.raises(InputError, match=r"hidden_size is '32' -> use a value of type int"):
        from_hf(to_hf(tiny, "float32") | {"hidden_size": "32"}, "config.json")


def test_derived_sizes(tiny: ModelConfig) -> None:
    assert tiny.qk_head_dim == 12
    assert tiny.moe_layers == 2
    assert dataclasses.replace(tiny, first_k_dense_replace=3).moe_layers == 0
