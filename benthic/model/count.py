"""Counting from the configuration alone: parameters, FLOPs per token, cache bytes. Imports no torch."""

from dataclasses import dataclass

from benthic.base.errors import InputError
from benthic.model.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """total and active count the main model with embedding and head; mtp what the MTP modules add on their own."""

    total: int
    active: int
    mtp: int


def attention_parameters(c: ModelConfig) -> int:
    """One attention layer with its own norms and biases."""
    d, n = c.hidden_size, c.num_attention_heads
    if c.kv_lora_rank is None:
        projections = (n + 2 * c.num_key_value_heads) * c.head_dim
        return d * (projections + n * c.head_dim) + (projections if c.model_type == "qwen2" else 0)
    if c.q_lora_rank is None:
        query = d * n * c.qk_head_dim
    else:
        query = d * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * n * c.qk_head_dim
    latent = d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    values = c.kv_lora_rank * n * (c.qk_nope_head_dim + c.v_head_dim)
    return query + latent + values + n * c.v_head_dim * d


def moe_parameters(c: ModelConfig, experts: int) -> int:
    """One mixture layer with `experts` routed experts counted; gate and gate bias included."""
    return (
        3 * c.hidden_size * c.moe_intermediate_size * (experts + c.n_shared_experts)
        + c.n_routed_experts * c.hidden_size
        + (c.n_routed_experts if c.topk_method == "noaux_tc" else 0)
    )


def parameters(c: ModelConfig) -> Parameters:
    """Totals as in the V3 paper's table: V3 gives 671,026,419,200 and 37,552,297,472."""
    layer = attention_parameters(c) + 2 * c.hidden_size
    dense_layers = min(c.first_k_dense_replace, c.num_hidden_layers)
    fixed = (
        (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
        + c.hidden_size
        + c.num_hidden_layers * layer
        + dense_layers * 3 * c.hidden_size * c.intermediate_size
    )
    module = layer + moe_parameters(c, c.n_routed_experts) + c.hidden_size
    if c.mtp_type == "sequential":
        module += 2 * c.hidden_size**2 + 2 * c.hidden_size  # eh_proj and the norms before it
    return Parameters(
        total=fixed + c.moe_layers * moe_parameters(c, c.n_routed_experts),
        active=fixed + c.moe_layers * moe_parameters(c, c.num_experts_per_tok),
        mtp=c.num_nextn_predict_layers * module,
    )


def parts(c: ModelConfig) -> dict[str, int]:
    """The main model's parameters by part; they add up to the total."""
    d, moe = c.hidden_size, c.moe_layers
    expert = 3 * d * c.moe_intermediate_size
    found = {
        "embedding": c.vocab_size * d,
        "head": 0 if c.tie_word_embeddings else c.vocab_size * d,
        "attention": c.num_hidden_layers * attention_parameters(c),
        "dense feed-forward": (c.num_hidden_layers - moe) * 3 * d * c.intermediate_size,
        "shared experts": moe * c.n_shared_experts * expert,
        "routed experts": moe * c.n_routed_experts * expert,
        "gates": moe * (moe_parameters(c, 0) - c.n_shared_experts * expert),
        "norms": (2 * c.num_hidden_layers + 1) * d,
    }
    return {name: n for name, n in found.items() if n}


def model_scale(c: ModelConfig, sequence_length: int) -> int:
    """The scaling-law papers' M: 72 n d^2 + 12 n d l FLOPs per token (V1 Eq 2). It assumes multi-head attention and a
    feed-forward of 8/3 d; `training_flops_per_token` counts what is there."""
    layers, d = c.num_hidden_layers, c.hidden_size
    return 72 * layers * d * d + 12 * layers * d * sequence_length


def training_flops_per_token(c: ModelConfig, sequence_length: int) -> int:
    """Forward and backward of the main model and its MTP modules: 6 per active parameter outside the embedding
    (head included, once per prediction depth), plus causal attention."""
    p = parameters(c)
    layer_active = attention_parameters(c) + moe_parameters(c, c.num_experts_per_tok)
    layer_active += 2 * c.hidden_size**2 if c.mtp_type == "sequential" else 0
    head = c.vocab_size * c.hidden_size
    embedding = 0 if c.tie_word_embeddings else head  # looked up, not multiplied
    weights = p.active - embedding + c.num_nextn_predict_layers * (layer_active + head)
    per_head = 2 * c.head_dim if c.kv_lora_rank is None else c.qk_head_dim + c.v_head_dim
    widths = c.num_attention_heads * per_head
    attention = (c.num_hidden_layers + c.num_nextn_predict_layers) * sequence_length * widths // 2
    return 6 * (weights + attention)


def cache_elements_per_token(c: ModelConfig) -> dict[str, int]:
    """Cached elements of one token over all main layers: MLA beside MHA, GQA and MQA of the same shape (V2 Table 1).

    GQA with eight heads per group as in V1 67B, but at least two groups.
    """
    head = 2 * c.head_dim if c.kv_lora_rank is None else c.v_head_dim + c.qk_head_dim  # one key and one value vector
    elements = {
        "mha": c.num_attention_heads * head,
        "gqa": max(2, c.num_attention_heads // 8) * head,
        "mqa": head,
    }
    if c.kv_lora_rank is not None:
        elements["mla"] = c.cache_width
    return {kind: n * c.num_hidden_layers for kind, n in elements.items()}


def latent_bytes_per_token(c: ModelConfig) -> dict[str, int]:
    """Bytes of one token's latents over all main layers, by format of the latent; the rotary key stays BF16.

    FP8 with a float32 scale per 128 elements, 6-bit with a float16 scale per 64.
    """
    if c.kv_lora_rank is None:
        raise InputError("kv_lora_rank=None -> only MLA caches latents")
    r, rope = c.kv_lora_rank, 2 * c.qk_rope_head_dim
    per_layer = {
        "BF16": 2 * r + rope,
        "FP8": r + 4 * -(-r // 128) + rope,
        "6-bit": -(-6 * r // 8) + 2 * -(-r // 64) + rope,
    }
    return {name: n * c.num_hidden_layers for name, n in per_layer.items()}
