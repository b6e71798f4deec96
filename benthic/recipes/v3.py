"""DeepSeek-V3 and R1, and the students distilled from R1, as published."""

from benthic.model.config import ModelConfig, RopeScaling


def v3() -> ModelConfig:
    """671B parameters, 37B active, one multi-token prediction module (V3 Sec 4.2). R1 has the same shape."""
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432,
        moe_intermediate_size=2048, num_hidden_layers=61, num_nextn_predict_layers=1, num_attention_heads=128,
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        first_k_dense_replace=3, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, max_position_embeddings=163840,
        rope_scaling=RopeScaling(
            type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
        ),
    )  # fmt: skip


def r1_distill_qwen_7b() -> ModelConfig:
    """R1-Distill-Qwen-7B: the shape of Qwen2.5-Math-7B."""
    return ModelConfig(
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, head_dim=128, q_lora_rank=None, kv_lora_rank=None,
        n_routed_experts=0, first_k_dense_replace=28, num_nextn_predict_layers=0, max_position_embeddings=131072,
        bos_token_id=151646, eos_token_id=151643,
    )  # fmt: skip


def r1_distill_qwen_1_5b() -> ModelConfig:
    """R1-Distill-Qwen-1.5B: the shape of Qwen2.5-Math-1.5B, with a head of its own."""
    return ModelConfig(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, head_dim=128, q_lora_rank=None, kv_lora_rank=None,
        n_routed_experts=0, first_k_dense_replace=28, num_nextn_predict_layers=0, max_position_embeddings=131072,
        bos_token_id=151646, eos_token_id=151643,
    )  # fmt: skip


def r1_distill_llama_8b() -> ModelConfig:
    """R1-Distill-Llama-8B: the shape of Llama-3.1-8B."""
    return ModelConfig(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, q_lora_rank=None, kv_lora_rank=None,
        n_routed_experts=0, first_k_dense_replace=32, num_nextn_predict_layers=0, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_theta=500000.0, bos_token_id=128000, eos_token_id=128001,
        rope_scaling=RopeScaling(type="llama3", factor=8.0, original_max_position_embeddings=8192),
    )  # fmt: skip
