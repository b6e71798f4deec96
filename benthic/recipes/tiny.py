"""Every stage on two CPU cores, in minutes."""

from dataclasses import replace

from benthic.model.config import ModelConfig
from benthic.posttrain.config import GRPOConfig
from benthic.recipes.demo import CorpusConfig, DemoConfig, EvaluationConfig
from benthic.train.config import TrainConfig


def model() -> ModelConfig:
    """The full V3 architecture at 2.7M parameters. Head widths are small but keep V3's parts: compressed query, latent,
    decoupled rotary key, a dense first layer, shared and routed experts in groups, one MTP module."""
    return ModelConfig(
        vocab_size=2048, hidden_size=160, num_hidden_layers=3, num_nextn_predict_layers=1,
        num_attention_heads=4, q_lora_rank=80, kv_lora_rank=48,
        qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=40,
        intermediate_size=448, moe_intermediate_size=96, first_k_dense_replace=1,
        n_shared_experts=1, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        max_position_embeddings=512,
    )  # fmt: skip


def demo(smoke: bool = False) -> DemoConfig:
    """`benthic demo`: about seven minutes on two cores; with `smoke` a few steps of every stage."""
    config = DemoConfig(
        recipe="tiny",
        device="cpu",
        model=model(),
        corpus=CorpusConfig(max_bytes=12_000_000),
        initializer_range=0.02,
        pretrain=TrainConfig(
            per_device_train_batch_size=8, max_length=256,
            max_steps=550, learning_rate=3e-3, warmup_steps=30, bias_update_speed=0.01,
            logging_steps=1, eval_steps=50, save_steps=50,
        ),
        balance_off_steps=100,
        sft=TrainConfig(
            per_device_train_batch_size=8, max_length=256,
            max_steps=600, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=10,
            mtp_loss_weight=0.1, bias_update_speed=0.001, logging_steps=5, save_steps=50,
        ),
        shortcut=TrainConfig(
            per_device_train_batch_size=8, max_length=256,
            max_steps=16, learning_rate=3e-4, lr_scheduler_type="constant",
            mtp_loss_weight=0.1, bias_update_speed=0.0, logging_steps=1, save_steps=16,
        ),
        direct_share=0.6,
        rl=TrainConfig(
            per_device_train_batch_size=8, max_length=256,
            max_steps=48, learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.0,
            bias_update_speed=0.0, logging_steps=1, save_steps=4,
        ),
        grpo=GRPOConfig(
            prompts_per_generation=24, num_generations=16, max_completion_length=32, steps_per_generation=2,
            epsilon=0.2, beta=0.001,
        ),
        evaluation=EvaluationConfig(problems=400, samples=8),
    )  # fmt: skip
    return shortened(config) if smoke else config


def shortened(config: DemoConfig) -> DemoConfig:
    """The same stages with a few steps each: shows that they run, teaches nothing."""
    updates = config.grpo.steps_per_generation
    return replace(
        config,
        corpus=replace(config.corpus, max_bytes=2_000_000),
        pretrain=replace(config.pretrain, max_steps=12, eval_steps=6, save_steps=6),
        balance_off_steps=5,
        sft=replace(config.sft, max_steps=6),
        shortcut=replace(config.shortcut, max_steps=2),
        rl=replace(config.rl, max_steps=2 * updates, save_steps=updates),
        grpo=replace(config.grpo, prompts_per_generation=2 * updates, num_generations=4, max_completion_length=16),
        evaluation=replace(config.evaluation, problems=8, speculative_prompts=8),
    )
