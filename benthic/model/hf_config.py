"""`config.json` in and out: the keys of each released layout, in both spellings of the rotary settings. No torch."""

from collections.abc import Mapping
from typing import Any

from benthic.base.config import from_dict, to_dict
from benthic.base.errors import InputError
from benthic.model.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
OURS: Mapping[str, Any] = {"gate_affinity": "dot", "mtp_type": "sequential"}  # written only where they differ
MLA = frozenset(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
PLAIN = frozenset(("num_key_value_heads", "head_dim"))
EXPERTS = frozenset(
    "moe_intermediate_size first_k_dense_replace n_shared_experts n_routed_experts num_experts_per_tok n_group "
    "topk_group routed_scaling_factor norm_topk_prob scoring_func topk_method num_nextn_predict_layers".split()
)
# Keys that say nothing about the computation, or whose only supported value is checked below.
IGNORED = frozenset(
    "architectures attention_bias attention_dropout auto_map aux_loss_alpha dtype ep_size hidden_act initializer_range "
    "max_window_layers mlp_bias moe_layer_freq output_router_logits pad_token_id pretraining_tp qk_head_dim "
    "quantization_config rope_interleave rope_parameters rope_scaling seq_aux sliding_window torch_dtype "
    "layer_types transformers_version use_cache use_mrope use_sliding_window".split()
)
FIXED: Mapping[str, Any] = {
    "attention_bias": False, "hidden_act": "silu", "mlp_bias": False, "moe_layer_freq": 1, "use_sliding_window": False,
}  # fmt: skip
FP8_SETTINGS: Mapping[str, Any] = {  # of the released V3 files; a `scale_fmt` beside them may name powers of two
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip
YARN = frozenset(
    "type rope_type factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim".split()
)
LLAMA3 = frozenset("type rope_type factor original_max_position_embeddings low_freq_factor high_freq_factor".split())


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that transformers and vLLM read."""
    data = to_dict(config)
    plain, dense = config.kv_lora_rank is None, config.model_type in ("llama", "qwen2")
    hidden = (MLA if plain else PLAIN) | (EXPERTS if dense else frozenset())
    hidden |= {key for key, released in OURS.items() if data[key] == released}
    data = {key: value for key, value in data.items() if key not in hidden}
    if config.rope_scaling is not None:
        used = YARN if config.rope_scaling.type == "yarn" else LLAMA3
        data["rope_scaling"] = {k: v for k, v in data["rope_scaling"].items() if k in used}
        data["rope_scaling"]["rope_type"] = config.rope_scaling.type
    return data | {
        "architectures": [ARCHITECTURES[config.model_type]],
        "hidden_act": "silu",
        "torch_dtype": dtype,
        **({} if config.model_type == "qwen2" else {"attention_bias": False}),
        **({} if dense else {"moe_layer_freq": 1}),
        **({} if plain else {"num_key_value_heads": config.num_attention_heads}),
    }


def from_hf(data: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a `config.json`. Unknown keys and unsupported choices are refused by name."""
    kind = data.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(f"model_type={kind!r} in {where} -> supported: {', '.join(ARCHITECTURES)}")
    for key, value in FIXED.items():
        if data.get(key, value) != value:
            raise InputError(f"{key}={data[key]!r} in {where} -> only {value!r} is supported")
    if kind != "qwen2" and data.get("sliding_window"):  # Qwen2 files name a window and switch it off
        raise InputError(f"sliding_window={data['sliding_window']!r} in {where} -> only full attention is supported")
    if set(data.get("layer_types") or ()) - {"full_attention"}:
        raise InputError(f"layer_types={data['layer_types']!r} in {where} -> only 'full_attention' is supported")
    quantised = data.get("quantization_config") or FP8_SETTINGS
    if not isinstance(quantised, Mapping) or {**quantised, "scale_fmt": ""} != {**FP8_SETTINGS, "scale_fmt": ""}:
        raise InputError(f"quantization_config={quantised!r} in {where} -> supported: {FP8_SETTINGS}")
    known = {key: value for key, value in data.items() if key not in IGNORED}
    known |= _rope(data, where)
    if isinstance(known.get("eos_token_id"), list):  # several tokens may end a turn; the first ends the text
        known["eos_token_id"] = known["eos_token_id"][0]
    for key in ("bos_token_id", "eos_token_id"):
        if key in known and known[key] is None:
            del known[key]
    if kind in ("deepseek_v3", "deepseek_v2"):
        known = {key: value for key, value in known.items() if key not in PLAIN}
    else:
        known |= _plain_attention(known, where)
    return from_dict(ModelConfig, known | _routing(kind, known), where)


def _plain_attention(known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Heads of MHA and GQA models, which older files leave to be derived."""
    heads, width = known.get("num_attention_heads"), known.get("hidden_size")
    if type(heads) is not int or type(width) is not int or heads < 1:
        raise InputError(f"num_attention_heads={heads!r}, hidden_size={width!r} in {where} -> give whole numbers")
    return {
        "num_key_value_heads": known.get("num_key_value_heads") or heads,
        "head_dim": known.get("head_dim") or width // heads,
        "kv_lora_rank": None,
        "q_lora_rank": None,
    }


def _routing(kind: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """What a layout leaves unsaid about its experts, or says in an older way."""
    if kind in ("llama", "qwen2"):
        layers = known.get("num_hidden_layers", 0)
        return {"n_routed_experts": 0, "first_k_dense_replace": layers, "num_nextn_predict_layers": 0}
    if kind == "deepseek_v3":
        return {}
    unsaid = {"scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}
    method = known.get("topk_method") or "greedy"
    groups = {key: known.get(key) or 1 for key in ("n_group", "topk_group")}
    return unsaid | {k: known[k] for k in unsaid if k in known} | groups | {
        "topk_method": "greedy" if method == "gready" else method  # sic, in early released code
    }  # fmt: skip


def _rope(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, or both in the newer `rope_parameters`."""
    newer = data.get("rope_parameters")
    table = newer if newer is not None else data.get("rope_scaling")
    if table is None:
        return {}
    if not isinstance(table, Mapping):
        raise InputError(f"rope settings {table!r} in {where} -> give a table of keys and values")
    theta = {"rope_theta": table["rope_theta"]} if "rope_theta" in table else {}
    kind = table.get("rope_type", table.get("type", "default"))
    rest = {key: value for key, value in table.items() if key not in ("rope_theta", "rope_type", "type")}
    if kind == "default":
        if rest:
            raise InputError(f"rope settings {dict(table)!r} in {where} -> rope_type 'default' takes only rope_theta")
        return theta
    if kind not in ("yarn", "llama3"):
        raise InputError(f"rope_type={kind!r} in {where} -> supported: default, yarn, llama3")
    unknown = rest.keys() - (YARN if kind == "yarn" else LLAMA3)
    if unknown:
        raise InputError(f"unknown rope setting {sorted(unknown)[0]!r} for {kind} in {where} -> remove it")
    if "original_max_position_embeddings" not in rest and "max_position_embeddings" in data:
        rest["original_max_position_embeddings"] = data["max_position_embeddings"]
    scaling = from_dict(RopeScaling, {"type": kind} | rest, f"{where}.rope_scaling")
    return theta | {"rope_scaling": to_dict(scaling)}
