"""Checkpoints small enough to write thousands of, and an `os` that fails or kills at a chosen call."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import torch

from benthic.base.tensors import TensorFile
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.train import checkpoint

SMALL = ModelConfig(
    vocab_size=266, hidden_size=8, num_hidden_layers=1, num_nextn_predict_layers=0, num_attention_heads=1,
    q_lora_rank=2, kv_lora_rank=2, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2, moe_intermediate_size=8,
    first_k_dense_replace=0, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
)  # fmt: skip


def small_model() -> Transformer:
    return initialise(Transformer(SMALL), std=0.1, seed=0)


def save(parent: Path, step: int, model: Transformer, keep: int = 2, tokenizer: Tokenizer | None = None) -> Path:
    """A checkpoint whose every number says which step it belongs to."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    moments = {f"optimizer.{n}.exp_avg": torch.full_like(p, step) for n, p in model.named_parameters()}
    state = {"step": step, "cursor": {"taken": step}}
    return checkpoint.save(parent, step, model, tokenizer, moments, state, keep)


def content(saved: checkpoint.Saved) -> set[float]:
    """Every number that stands in a checkpoint; one, if it is what `save` wrote."""
    found = {float(saved.state["step"]), float(saved.state["cursor"]["taken"])}
    weights = TensorFile(saved.folder / "model" / "model.safetensors")
    for file in (saved.tensors, weights):
        for name in file.names:
            if not name.endswith("e_score_correction_bias"):
                found |= set(file[name].flatten().tolist())
    return found


class Os:
    """`os`, except that call number `at` to a function that touches the disk fails with `code`, or kills the process.

    `names` lists the calls so far.
    """

    COUNTED = ("open", "write", "fsync", "close", "replace", "unlink", "rmdir")

    def __init__(self, at: int = 0, code: int = errno.ENOSPC, kill: bool = False):
        self.at, self.code, self.kill = at, code, kill
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.COUNTED:
            return real

        def call(*arguments: Any) -> Any:
            self.names.append(name)
            if len(self.names) != self.at:
                return real(*arguments)
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "close":
                real(*arguments)
            path = [str(arguments[0])] if isinstance(arguments[0], str | Path) else []
            raise OSError(self.code, os.strerror(self.code), *path)

        return call
