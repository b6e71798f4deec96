"""Model configuration with exactly the names of the released `config.json` files. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from benthic.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretching of the rotary positions beyond the length of pretraining."""

    type: Literal["yarn", "llama3"]
    """yarn: as in V2 and V3; llama3: as in Llama 3.1 and the students distilled from it."""
    factor: float
    """Target length over original length, s."""
    original_max_position_embeddings: int
    """Length of pretraining, L."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this within L stay as they are."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are stretched by the whole factor."""
    mscale: float = 1.0
    """yarn: attention factor, numerator."""
    mscale_all_dim: float = 0.0
    """yarn: attention factor, denominator; squared, it also scales the logits."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above L over this are stretched by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below L over this stay as they are."""

    def __post_init__(self) -> None:
        """Refuse what no formula takes."""
        if self.factor < 1:
            raise InputError(f"rope_scaling.factor={self.factor} -> use 1 or more")
        if (length := self.original_max_position_embeddings) < 1:
            raise InputError(f"rope_scaling.original_max_position_embeddings={length} -> use 1 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of the DeepSeek family. Symbols of the V3 paper in the comments."""

    model_type: Literal["deepseek_v3", "deepseek_v2", "deepseek", "llama", "qwen2"] = "deepseek_v3"
    """Layout of the checkpoint: V3 and R1; V2; DeepSeekMoE-16B; V1 and Llama students; Qwen2 students."""
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
    num_key_value_heads: int = 4
    """Key-value heads of plain attention, n_g: equal to the heads for MHA, 1 for MQA. MLA does not read it."""
    head_dim: int = 64
    """Per-head width of plain attention, d_h. MLA does not read it."""
    q_lora_rank: int | None = 96
    """Width of the compressed query, d_c'; null for a plain query projection."""
    kv_lora_rank: int | None = 64
    """Width of the cached key-value latent, d_c; null for plain attention instead of MLA."""
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
    """Experts that the gate chooses from, N_r; 0 for a dense model."""
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
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Gate affinity: sigmoid in V3, softmax over the routed experts before."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """Expert choice: by biased scores (V3), by the best groups (V2), or simply the best (DeepSeekMoE, V2-Lite)."""
    gate_affinity: Literal["dot", "cosine"] = "dot"
    """Likeness of token and expert: their dot product (the papers), or the cosine, which large norms cannot win."""
    mtp_type: Literal["sequential", "parallel"] = "sequential"
    """Prediction modules one after another with the next token's embedding (V3), or independent heads side by side on
    the layer before the last (Gloeckle et al. 2024)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Context extension; null for none."""
    max_position_embeddings: int = 4096
    """Longest context."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = False
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
        if not self.num_hidden_layers:
            raise InputError("num_hidden_layers=0 -> use 1 or more")
        if self.n_routed_experts:
            self._check_experts()
        elif self.first_k_dense_replace < self.num_hidden_layers or self.num_nextn_predict_layers:
            raise InputError(
                f"n_routed_experts=0 with first_k_dense_replace={self.first_k_dense_replace} -> a dense model needs "
                f"first_k_dense_replace={self.num_hidden_layers} and num_nextn_predict_layers=0"
            )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.kv_lora_rank is None and (not groups or heads % groups):
            raise InputError(f"num_key_value_heads={groups} must divide num_attention_heads={heads}")
        for name in ("hidden_size", "moe_intermediate_size"):  # grouped products need rows aligned to 16 bytes
            if getattr(self, name) % 8:
                raise InputError(f"{name}={getattr(self, name)} -> use a multiple of 8")
        if self.rope_dim % 2:
            name = "head_dim" if self.kv_lora_rank is None else "qk_rope_head_dim"
            raise InputError(f"{name}={self.rope_dim} is odd -> rotary pairs need an even width")
        if self.num_nextn_predict_layers and self.first_k_dense_replace > self.num_hidden_layers:
            raise InputError(
                f"first_k_dense_replace={self.first_k_dense_replace} makes prediction modules dense"
                f" -> use 0 to num_hidden_layers={self.num_hidden_layers}"
            )

    def _check_experts(self) -> None:
        if self.n_group == 0 or self.n_routed_experts % self.n_group:
            raise InputError(f"n_routed_experts={self.n_routed_experts} must divide by n_group={self.n_group}")
        if not 0 < self.topk_group <= self.n_group:
            raise InputError(f"topk_group={self.topk_group} -> use 1 to n_group={self.n_group}")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if not 0 < self.num_experts_per_tok <= reachable:
            raise InputError(f"num_experts_per_tok={self.num_experts_per_tok} -> use 1 to {reachable}")
        if self.topk_method == "noaux_tc" and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise InputError(f"n_group={self.n_group} leaves groups of one expert -> use at least two per group")

    @property
    def qk_head_dim(self) -> int:
        """Full per-head query/key width, d_h + d_h^R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope_dim(self) -> int:
        """Width that rotates: d_h^R in MLA, the whole head otherwise."""
        return self.head_dim if self.kv_lora_rank is None else self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Elements that one token keeps in one layer's cache (V2 Table 1)."""
        if self.kv_lora_rank is None:
            return 2 * self.num_key_value_heads * self.head_dim
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> int:
        """Mixture-of-experts layers of the main model."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)
