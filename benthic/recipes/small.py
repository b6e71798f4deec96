"""Every stage on one GPU, in minutes, at 80 million parameters. The job is that of `tiny`; only numbers differ."""

from benthic.model.config import ModelConfig
from benthic.posttrain.config import GRPOConfig
from benthic.recipes.demo import CorpusConfig, DemoConfig, EvaluationConfig
from benthic.recipes.tiny import shortened
from benthic.train.config import TrainConfig


def model() -> ModelConfig:
    """V3's parts with head widths 64 + 64 and 128, which every attention backend takes."""
    return ModelConfig(
        vocab_size=8192, hidden_size=512, num_hidden_layers=8, num_nextn_predict_layers=1,
        num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128,
        qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128,
        intermediate_size=1408, moe_intermediate_size=192, first_k_dense_replace=1,
        n_shared_experts=1, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2,
        max_position_embeddings=2048,
    )  # fmt: skip


def demo(smoke: bool = False) -> DemoConfig:
    """`benthic demo --recipe small --device cuda`."""
    config = DemoConfig(
        recipe="small",
        device="cuda",
        dtype="bfloat16",
        model=model(),
        corpus=CorpusConfig(max_bytes=200_000_000),
        initializer_range=0.02,
        pretrain=TrainConfig(
            per_device_train_batch_size=32, max_length=1024,
            max_steps=500, learning_rate=1.5e-3, warmup_steps=50, bias_update_speed=0.01,
            logging_steps=5, eval_steps=100, save_steps=200,
        ),
        balance_off_steps=100,
        sft=TrainConfig(
            per_device_train_batch_size=32, max_length=1024,
            max_steps=150, learning_rate=5e-4, lr_scheduler_type="cosine", warmup_steps=10,
            mtp_loss_weight=0.1, bias_update_speed=0.001, logging_steps=5, save_steps=100,
        ),
        shortcut=TrainConfig(
            per_device_train_batch_size=32, max_length=1024,
            max_steps=10, learning_rate=1e-4, lr_scheduler_type="constant",
            mtp_loss_weight=0.1, bias_update_speed=0.0, logging_steps=1, save_steps=10,
        ),
        direct_share=0.6,
        rl=TrainConfig(
            per_device_train_batch_size=32, max_length=1024,
            max_steps=60, learning_rate=3e-5, lr_scheduler_type="constant", weight_decay=0.0,
            bias_update_speed=0.0, logging_steps=1, save_steps=20,
        ),
        grpo=GRPOConfig(
            prompts_per_generation=32, num_generations=16, max_completion_length=48, steps_per_generation=2,
            epsilon=0.2, beta=0.001,
        ),
        evaluation=EvaluationConfig(problems=400, samples=8),
    )  # fmt: skip
    return shortened(config) if smoke else config
