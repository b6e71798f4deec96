"""`config.json` of DeepSeek's own inference script: its argument names and defaults, as our ModelConfig. No torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benthic.base.config import from_dict
from benthic.model.config import ModelConfig, RopeScaling


@dataclass(frozen=True, kw_only=True)
class InferenceArgs:
    """Arguments of the script, with its defaults (those of a 16B V2-Lite)."""

    max_batch_size: int = 8
    """Rows of its cache; says nothing about the model."""
    max_seq_len: int = 16384
    """Length of its cache. Rotary positions are stretched exactly when it exceeds `original_seq_len`."""
    dtype: Literal["bf16", "fp8"] = "bf16"
    """How its linear weights are stored."""
    scale_fmt: str | None = None
    """ue8m0: factors of FP8 blocks are powers of two."""
    vocab_size: int = 102400
    """Rows of the embedding and of the output head."""
    dim: int = 2048
    """hidden_size."""
    inter_dim: int = 10944
    """intermediate_size."""
    moe_inter_dim: int = 1408
    """moe_intermediate_size."""
    n_layers: int = 27
    """num_hidden_layers."""
    n_dense_layers: int = 1
    """first_k_dense_replace."""
    n_heads: int = 16
    """num_attention_heads."""
    n_routed_experts: int = 64
    """Experts that the gate chooses from."""
    n_shared_experts: int = 2
    """Experts that see every token."""
    n_activated_experts: int = 6
    """num_experts_per_tok."""
    n_expert_groups: int = 1
    """n_group."""
    n_limited_groups: int = 1
    """topk_group."""
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    """scoring_func; sigmoid scores are normalised over the chosen experts, softmax scores are not."""
    route_scale: float = 1.0
    """routed_scaling_factor."""
    q_lora_rank: int = 0
    """Width of the compressed query; 0 for a plain query projection."""
    kv_lora_rank: int = 512
    """Width of the cached key-value latent."""
    qk_nope_head_dim: int = 128
    """Per-head query/key width without position."""
    qk_rope_head_dim: int = 64
    """Per-head rotary width."""
    v_head_dim: int = 128
    """Per-head value width."""
    original_seq_len: int = 4096
    """Length of pretraining."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_factor: float = 40.0
    """YaRN: target length over original length."""
    beta_fast: float = 32.0
    """YaRN: dimensions that turn more often than this stay as they are."""
    beta_slow: float = 1.0
    """YaRN: dimensions that turn less often than this are stretched by the whole factor."""
    mscale: float = 1.0
    """YaRN: weight of the factor on the logits; cos and sin have none."""


OF_MODEL = {  # their name -> ours; names that are the same stand for themselves
    "dim": "hidden_size", "inter_dim": "intermediate_size", "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers", "n_dense_layers": "first_k_dense_replace", "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok", "n_expert_groups": "n_group", "n_limited_groups": "topk_group",
    "score_func": "scoring_func", "route_scale": "routed_scaling_factor",
}  # fmt: skip
SAME = tuple(
    "vocab_size n_routed_experts n_shared_experts kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "rope_theta".split()
)


def is_native(data: Mapping[str, Any]) -> bool:
    """Whether a `config.json` has the script's names."""
    return "model_type" not in data and any(name in data for name in OF_MODEL)


def from_native(data: Mapping[str, Any], biased: bool, where: str) -> ModelConfig:
    """Read the script's arguments. `biased` says whether the weights hold gate biases, which the arguments do not."""
    args = from_dict(InferenceArgs, dict(data), where)
    stretched = args.max_seq_len > args.original_seq_len
    method = "noaux_tc" if biased else "group_limited_greedy" if args.n_expert_groups > 1 else "greedy"
    reach = max(args.max_seq_len, int(args.original_seq_len * args.rope_factor))
    values = dataclasses.asdict(args)
    return ModelConfig(
        model_type="deepseek_v3" if biased else "deepseek_v2",
        num_nextn_predict_layers=0,
        q_lora_rank=args.q_lora_rank or None,
        norm_topk_prob=args.score_func == "sigmoid",
        topk_method=method,
        rope_scaling=_yarn(args) if stretched else None,
        max_position_embeddings=reach if stretched else args.max_seq_len,
        **{ours: values[name] for name, ours in OF_MODEL.items()},
        **{name: values[name] for name in SAME},
    )


def _yarn(args: InferenceArgs) -> RopeScaling:
    """The script scales the logits by mscale squared and leaves cos and sin alone: both of our settings are equal."""
    return RopeScaling(
        type="yarn",
        factor=args.rope_factor,
        original_max_position_embeddings=args.original_seq_len,
        beta_fast=args.beta_fast,
        beta_slow=args.beta_slow,
        mscale=args.mscale,
        mscale_all_dim=args.mscale,
    )
