"""Counting from the configuration alone: parameters, FLOPs per token, cache bytes. Imports no torch."""

from dataclasses import dataclass

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
    module = layer + moe_parameters(c, c.n_routed_experts) + 2 * c.hidden_size**2 + 3 * c.hidden_size
    return Parameters(
        total=fixed + c.moe_layers * moe_parameters(c, c.n_routed_experts),
        active=fixed + c.moe_layers * moe_parameters(c, c.num_experts_per_tok),
        mtp=c.num_nextn_predict_layers * module,
    )


def training_flops_per_token(c: ModelConfig, sequence_length: int) -> int:
    """Forward and backward of the main model and its MTP modules: 6 per active parameter outside the embedding
    (head included, once per prediction depth), plus causal attention."""
    p = parameters(c)
    layer_active = attention_parameters(c) + moe_parameters(c, c.num_experts_per_tok) + 2 * c.hidden_size**2
    head = c.vocab_size * c.hidden_size
    embedding = 0 if c.tie_word_embeddings else head  # looked up, not multiplied
    weights = p.active - embedding + c.num_nextn_predict_layers * (layer_active + head)
    per_head = 2 * c.head_dim if c.kv_lora_rank is None else c.qk_head_dim + c.v_head_dim
    widths = c.num_attention_heads * per_head
    attention = (c.num_hidden_layers + c.num_nextn_predict_layers) * sequence_length * widths // 2
    return 6 * (weights + attention)


def cache_bytes_per_token(c: ModelConfig, bytes_per_element: int) -> dict[str, int]:
    """Cache of one token over all main layers: MLA beside MHA, GQA and MQA of the same shape.

    GQA with eight heads per group as in V1 67B, but at least two groups.

    MLA keeps (d_c + d_h^R) elements per layer, the others 2 n d_h (V2 Table 1).
    """
    head = 2 * c.head_dim if c.kv_lora_rank is None else c.v_head_dim + c.qk_head_dim  # one key and one value vector
    elements = {
        "mha": c.num_attention_heads * head,
        "gqa": max(2, c.num_attention_heads // 8) * head,
        "mqa": head,
    }
    if c.kv_lora_rank is not None:
        elements["mla"] = c.cache_width
    return {kind: n * c.num_hidden_layers * bytes_per_element for kind, n in elements.items()}
