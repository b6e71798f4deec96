"""A whole training run in small: model, data, an objective that draws random numbers, and a log in memory."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benthic.base.batch import Batch
from benthic.base.signals import Stop
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.train.config import TrainConfig
from benthic.train.loss import LanguageModelling, Outcome
from benthic.train.trainer import Trainer

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64, moe_intermediate_size=16,
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, max_position_embeddings=64,
)  # fmt: skip


def settings(**changes: Any) -> TrainConfig:
    """Settings under which every saved item matters: the rate changes over the run and gate biases move fast."""
    plain = {
        "max_steps": 40, "per_device_train_batch_size": 4, "max_length": 16, "learning_rate": 3e-3, "warmup_steps": 5,
        "bias_update_speed": 0.02, "balance_loss_weight": 1e-2, "logging_steps": 1, "save_steps": 1000, "seed": 3,
    }  # fmt: skip
    return TrainConfig(**plain | changes)


def fresh_model(config: ModelConfig = MODEL) -> Transformer:
    return initialise(Transformer(config), std=0.1, seed=0)


class Stream:
    """Random tokens: batch number i is a pure function of i. `factors[i]` multiplies the loss of batch i, from 0.

    Each process takes its own share of the rows.
    """

    def __init__(self, rows: int = 4, length: int = 16, factors: dict[int, float] | None = None, rank=0, ranks=1):
        self.rows, self.length, self.factors, self.rank, self.ranks = rows, length, factors or {}, rank, ranks
        self.taken = 0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        self.taken += 1
        return self.batch(self.taken - 1)

    def batch(self, i: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 + i)
        tokens = torch.randint(0, MODEL.vocab_size, (self.rows, self.length + 1), generator=generator)
        share = self.rows // self.ranks
        tokens = tokens[self.rank * share : (self.rank + 1) * share]
        factor = torch.full_like(tokens[:, 1:], 1, dtype=torch.float32) * self.factors.get(i, 1.0)
        return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone(), extra={"factor": factor})

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


class Factored:
    """The language-modelling loss times the batch's factor, times torch's own noise where `noise` > 0."""

    def __init__(self, config: TrainConfig, noise: float = 0.0):
        self.plain, self.noise = LanguageModelling(config), noise

    def targets(self, model: Transformer, batch: Batch) -> Tensor:
        return self.plain.targets(model, batch)

    def __call__(self, model: Transformer, batch: Batch, targets: Tensor) -> Outcome:
        outcome = self.plain(model, batch, targets)
        scale = batch.extra["factor"][0, 0]
        if self.noise:
            scale = scale * (1 + self.noise * torch.rand(()))
        outcome.metrics["loss"] = outcome.metrics["loss"] * scale
        return Outcome(outcome.loss * scale, outcome.metrics, outcome.expert_load)


class Memory:
    """A run log in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, stage: str, step: int, values: dict[str, Any]) -> None:
        self.rows.append({"stage": stage, "step": step, **values})

    def rewind(self, stage: str, step: int) -> None:
        self.rows = [row for row in self.rows if row["step"] <= step]

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator["Memory"]:
        yield self

    def update(self, done: int, **shown: float) -> None:
        pass


def trainer(
    folder: Path,
    config: TrainConfig | None = None,
    *,
    objective: Callable | None = None,
    cursor: Stream | None = None,
    model: Transformer | None = None,
    run: Any = None,
    stop: Stop | None = None,
    noise: float = 0.0,
    **more: Any,
) -> Trainer:
    """A trainer made as in a new process: fresh weights, fresh data, an empty log."""
    config = config or settings()
    return Trainer(
        model or fresh_model(), objective or Factored(config, noise), config, cursor=cursor or Stream(),
        stage="tiny", folder=folder, run=run or Memory(), stop=stop or Stop(), **more,
    )  # fmt: skip


def tensors(subject: Trainer) -> dict[str, Tensor]:
    """Everything that an update changes on the device, by name."""
    names = {p: n for n, p in subject.model.named_parameters()}
    found = {f"parameter.{n}": p.detach() for p, n in names.items()}
    found |= {f"{names[p]}.{k}": v for p, s in subject.optimizer.state.items() for k, v in s.items()}
    return found | {f"bias.{i}": gate.e_score_correction_bias for i, gate in enumerate(subject.model.gates())}


def copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both hold the same names and bits."""
    return one.keys() == other.keys() and all(_bytes(one[n]) == _bytes(other[n]) for n in one)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else str(tensor).encode()


def weights_digest(subject: Trainer) -> str:
    """sha256 of the parameters alone."""
    digest = hashlib.sha256()
    for _, p in sorted(subject.model.named_parameters()):
        digest.update(_bytes(p))
    return digest.hexdigest()


def digest(subject: Trainer) -> str:
    """sha256 over parameters, moments, gate biases, random-number state, cursor and counters."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors(subject).items()):
        found.update(name.encode())
        found.update(_bytes(tensor))
    found.update(_bytes(torch.get_rng_state()))
    plain = (subject.steps, subject.tokens, subject.skipped, subject.skipped_in_a_row, subject.norm_mean)
    found.update(json.dumps([*plain, subject.cursor.state_dict()]).encode())
    return found.hexdigest()


def logged(subject: Trainer, after: int = 0) -> list[dict[str, Any]]:
    """Rows of the in-memory log after a step, without wall-clock numbers."""
    return [
        {k: v for k, v in row.items() if k != "tokens_per_s"}
        for row in subject.run.rows  # type: ignore[attr-defined]
        if row["step"] > after
    ]


def start(program: str, *arguments: Any) -> subprocess.Popen[str]:
    """A program of this folder in a process of its own, with its output in pipes."""
    here = Path(__file__).parent
    path = os.pathsep.join((str(here.parents[1]), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, str(here / program), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
