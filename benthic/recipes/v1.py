"""DeepSeek LLM (V1) and DeepSeekMoE, as published."""

from benthic.model.config import ModelConfig


def llm_7b() -> ModelConfig:
    """DeepSeek LLM 7B: 30 layers, multi-head attention (V1 Table 2)."""
    return ModelConfig(
        model_type="llama", vocab_size=102400, hidden_size=4096, intermediate_size=11008, num_hidden_layers=30,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, q_lora_rank=None, kv_lora_rank=None,
        n_routed_experts=0, first_k_dense_replace=30, num_nextn_predict_layers=0, max_position_embeddings=4096,
        bos_token_id=100000, eos_token_id=100001,
    )  # fmt: skip


def llm_67b() -> ModelConfig:
    """DeepSeek LLM 67B: deep rather than wide, eight key-value heads (V1 Table 2)."""
    return ModelConfig(
        model_type="llama", vocab_size=102400, hidden_size=8192, intermediate_size=22016, num_hidden_layers=95,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, q_lora_rank=None, kv_lora_rank=None,
        n_routed_experts=0, first_k_dense_replace=95, num_nextn_predict_layers=0, max_position_embeddings=4096,
        bos_token_id=100000, eos_token_id=100001,
    )  # fmt: skip


def moe_2b() -> ModelConfig:
    """DeepSeekMoE 2B, the validation model: nine layers, all mixtures, 1 shared and 63 routed experts (MoE Table 7)."""
    return ModelConfig(
        model_type="deepseek", vocab_size=8192, hidden_size=1280, intermediate_size=3416, moe_intermediate_size=856,
        num_hidden_layers=9, num_attention_heads=10, num_key_value_heads=10, head_dim=128,
        q_lora_rank=None, kv_lora_rank=None, first_k_dense_replace=0, n_shared_experts=1, n_routed_experts=63,
        num_experts_per_tok=7, n_group=1, topk_group=1, scoring_func="softmax", topk_method="greedy",
        norm_topk_prob=False, num_nextn_predict_layers=0, max_position_embeddings=2048,
    )  # fmt: skip


def moe_16b() -> ModelConfig:
    """DeepSeekMoE 16B: first layer dense, two shared and 64 routed experts (MoE Table 7)."""
    return ModelConfig(
        model_type="deepseek", vocab_size=102400, hidden_size=2048, intermediate_size=10944,
        moe_intermediate_size=1408, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16, head_dim=128,
        q_lora_rank=None, kv_lora_rank=None, first_k_dense_replace=1, n_shared_experts=2, n_routed_experts=64,
        num_experts_per_tok=6, n_group=1, topk_group=1, scoring_func="softmax", topk_method="greedy",
        norm_topk_prob=False, num_nextn_predict_layers=0, max_position_embeddings=4096,
        bos_token_id=100000, eos_token_id=100001,
    )  # fmt: skip
