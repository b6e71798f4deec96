"""Fixtures for every room. torch is imported only where a test asks for a model.

Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before triton loads.
"""

import importlib.util
import os
from pathlib import Path

import pytest

HAS_GPU = Path("/dev/nvidiactl").exists()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

TEXTS = ["How many are 2 and 3? There are 5. Write a poem about the sea: the sea is deep.\n" * 3]


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run; tests that ask for it are skipped without triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def exact_fp8(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The interpreter loses the carry where rounding to E4M3 reaches the next power of two; the GPU does not."""
    if device == "cuda":
        return
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def corrected(value: np.ndarray, dtype: tl.dtype, to: tl.dtype, rounding_mode: object) -> np.ndarray:
        if (dtype, to) != (tl.float32, tl.float8e4nv):
            return convert(value, dtype, to, rounding_mode)
        wide = torch.from_numpy(np.ascontiguousarray(value).view(np.float32))
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", corrected)


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The interpreter multiplies with numpy's BLAS, which on some processors (AVX2 without AVX-512) sums a row of a
    tile in another order than the row beside it; a multiplying unit of a GPU does not."""
    if device == "cuda":
        return
    from triton.runtime import interpreter

    def matmul(a, b, dtype=None):
        out = 0
        for k in range(a.shape[-1]):
            out = out + a[..., k, None].astype(dtype or a.dtype) * b[..., None, k, :].astype(dtype or b.dtype)
        return out

    monkeypatch.setattr(interpreter.np, "matmul", matmul)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A whole model folder (config.json, random weights, tokenizer), small enough to be made in every run."""
    from benthic.model.config import ModelConfig
    from benthic.model.hf import write_model
    from benthic.model.init import initialise
    from benthic.model.transformer import Transformer
    from benthic.tokenizer import bpe

    tokenizer = bpe.train(TEXTS, 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, initialise(Transformer(config), std=0.1, seed=0), tokenizer)
    return folder
