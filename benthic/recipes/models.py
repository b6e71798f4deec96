"""The published and our own architectures by name."""

from collections.abc import Callable

from benthic.model.config import ModelConfig
from benthic.recipes import small, tiny, v1, v2, v3

MODELS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny.model,
    "small": small.model,
    "v1-7b": v1.llm_7b,
    "v1-67b": v1.llm_67b,
    "moe-2b": v1.moe_2b,
    "moe-16b": v1.moe_16b,
    "v2-lite": v2.v2_lite,
    "v2": v2.v2,
    "v3": v3.v3,
    "r1-distill-qwen-1.5b": v3.r1_distill_qwen_1_5b,
    "r1-distill-qwen-7b": v3.r1_distill_qwen_7b,
    "r1-distill-llama-8b": v3.r1_distill_llama_8b,
}
