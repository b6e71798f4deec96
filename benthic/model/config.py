"""Model configuration with exactly the names of the Hugging Face `config.json` of DeepSeek-V3. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from benthic.base.config import from_dict, to_dict
from benthic.base.errors import InputError

# Keys of released config files that say nothing about the computation, or that Benthic derives itself.
IGNORED = frozenset(
    "architectures auto_map attention_bias attention_dropout aux_loss_alpha dtype ep_size head_dim hidden_act "
    "initializer_range model_type moe_layer_freq num_key_value_heads output_router_logits pad_token_id pretraining_tp "
    "qk_head_dim quantization_config rope_interleave rope_parameters seq_aux torch_dtype transformers_version "
    "use_cache".split()
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V3 model. Symbols of the V3 paper in the comments."""

    vocab_size: int = 4096
    """Rows of the embedding and of the output head."""
    hidden_size: int = 192
    """Width of the residual stream, d."""
    num_hidden_layers: int = 4
    """Transformer layers of the main model, L."""
    num_nextn_predict_layers: int = 1
    """Multi-token prediction modules, D."""
    num_attention_heads: int = 4
    """Attention heads, n_h."""
    q_lora_rank: int = 96
    """Width of the compressed query, d_c'."""
    kv_lora_rank: int = 64
    """Width of the cached key-value latent, d_c."""
    qk_nope_head_dim: int = 32
    """Per-head query/key width without position, d_h."""
    qk_rope_head_dim: int = 16
    """Per-head rotary width; the rotary key is shared by all heads, d_h^R."""
    v_head_dim: int = 48
    """Per-head value width."""
    intermediate_size: int = 512
    """Inner width of the dense feed-forward layers."""
    moe_intermediate_size: int = 128
    """Inner width of one expert."""
    first_k_dense_replace: int = 1
    """How many first layers keep a dense feed-forward."""
    n_shared_experts: int = 1
    """Experts that see every token, N_s."""
    n_routed_experts: int = 16
    """Experts that the gate chooses from, N_r."""
    num_experts_per_tok: int = 4
    """Routed experts per token, K_r."""
    n_group: int = 4
    """Expert groups (nodes) for node-limited routing."""
    topk_group: int = 2
    """Groups a token may reach, M."""
    routed_scaling_factor: float = 1.0
    """Multiplies the normalised gate weights."""
    norm_topk_prob: bool = True
    """Normalise the chosen gate scores to sum to one."""
    scoring_func: Literal["sigmoid"] = "sigmoid"
    """Gate affinity."""
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    """Expert choice: biased scores, balanced without an auxiliary loss."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: None = None
    """Context extension; not part of this version."""
    max_position_embeddings: int = 4096
    """Longest context."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_word_embeddings: Literal[False] = False
    """Whether head and embedding share weights."""
    bos_token_id: int = 0
    """Begin-of-sentence id."""
    eos_token_id: int = 1
    """End-of-sentence id."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built, with the value and the fix."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 0:
                raise InputError(f"{field.name}={value} is negative -> use 0 or more")
        if self.n_group == 0 or self.n_routed_experts % self.n_group:
            raise InputError(f"n_routed_experts={self.n_routed_experts} must divide by n_group={self.n_group}")
        if not 0 < self.topk_group <= self.n_group:
            raise InputError(f"topk_group={self.topk_group} -> use 1 to n_group={self.n_group}")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if not 0 < self.num_experts_per_tok <= reachable:
            raise InputError(f"num_experts_per_tok={self.num_experts_per_tok} -> use 1 to {reachable}")
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise InputError(f"n_group={self.n_group} leaves groups of one expert -> use at least two per group")
        for name in ("hidden_size", "moe_intermediate_size"):  # grouped products need rows aligned to 16 bytes
            if getattr(self, name) % 8:
                raise InputError(f"{name}={getattr(self, name)} -> use a multiple of 8")
        if self.qk_rope_head_dim % 2:
            raise InputError(f"qk_rope_head_dim={self.qk_rope_head_dim} is odd -> rotary pairs need an even width")
        if self.num_nextn_predict_layers and self.first_k_dense_replace > self.num_hidden_layers:
            raise InputError(
                f"first_k_dense_replace={self.first_k_dense_replace} makes prediction modules dense"
                f" -> use 0 to num_hidden_layers={self.num_hidden_layers}"
            )

    @property
    def qk_head_dim(self) -> int:
        """Full per-head query/key width, d_h + d_h^R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> int:
        """Mixture-of-experts layers of the main model."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that transformers and vLLM read."""
    return to_dict(config) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "num_key_value_heads": config.num_attention_heads,
        "torch_dtype": dtype,
    }


def from_hf(data: dict[str, Any], where: str) -> ModelConfig:
    """Read a `config.json`. Unknown keys and unsupported choices are refused by name."""
    if data.get("model_type") != "deepseek_v3":
        raise InputError(f"model_type={data.get('model_type')!r} in {where} -> this version loads 'deepseek_v3'")
    for key, plain in {"attention_bias": False, "hidden_act": "silu", "moe_layer_freq": 1}.items():
        if data.get(key, plain) != plain:
            raise InputError(f"{key}={data[key]!r} in {where} -> only {plain!r} is supported")
    if data.get("quantization_config"):
        raise InputError(f"quantization_config in {where} -> this version loads unquantised weights")
    rope = data.get("rope_parameters") or {}  # how transformers 5 writes rope_theta and rope_scaling
    if not isinstance(rope, dict) or not rope.keys() <= {"rope_theta", "rope_type"}:
        raise InputError(f"rope_parameters={rope!r} in {where} -> only rope_theta is supported")
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"rope_parameters={rope!r} in {where} -> only rope_type 'default' is supported")
    data = data | {key: rope[key] for key in rope if key == "rope_theta"}
    return from_dict(ModelConfig, {k: v for k, v in data.items() if k not in IGNORED}, where)
