"""DeepSeek-V2 and V2-Lite, as published."""

from benthic.model.config import ModelConfig, RopeScaling


def _yarn() -> RopeScaling:
    """4K to 160K; 0.0707 ln s + 1 in the paper is 0.1 x 0.707 ln s + 1 here (V2 Sec 3.1.4)."""
    return RopeScaling(
        type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
    )


def v2() -> ModelConfig:
    """236B parameters, 21B active: groups of experts limited by their best one, weights times 16."""
    return ModelConfig(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=5120, intermediate_size=12288,
        moe_intermediate_size=1536, num_hidden_layers=60, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, n_shared_experts=2,
        n_routed_experts=160, num_experts_per_tok=6, n_group=8, topk_group=3, routed_scaling_factor=16.0,
        scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False, num_nextn_predict_layers=0,
        rope_scaling=_yarn(), max_position_embeddings=163840, bos_token_id=100000, eos_token_id=100001,
    )  # fmt: skip


def v2_lite() -> ModelConfig:
    """15.7B parameters, 2.4B active: no query compression, plain greedy routing (V2 Appendix B)."""
    return ModelConfig(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944,
        moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, n_shared_experts=2,
        n_routed_experts=64, num_experts_per_tok=6, n_group=1, topk_group=1, routed_scaling_factor=1.0,
        scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, num_nextn_predict_layers=0,
        rope_scaling=_yarn(), max_position_embeddings=163840, bos_token_id=100000, eos_token_id=100001,
    )  # fmt: skip
