"""Exploration: questions to the engine, graded answers back, and their packing into a batch."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benthic.base.batch import IGNORE, Batch
from benthic.data.packing import Sample, pack
from benthic.inference.config import SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Output
from benthic.model.transformer import Transformer
from benthic.posttrain.sft import prompt_ids
from benthic.tasks.task import Grade, Problem, Task
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.train.loss import label_logprobs


@dataclass
class Rollouts:
    """Q questions with G answers each: outputs[q][g], grades[q][g], rewards [Q, G] float32."""

    problems: list[Problem]
    outputs: list[list[Output]]
    grades: list[list[Grade]]
    rewards: Tensor


def ask(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    samples: int,
    params: SamplingParams,
    key: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Output]]:
    """`samples` answers to each prompt. Prompt number i draws from a stream of its own, named by (key, i)."""
    seeds = [int.from_bytes(hashlib.sha256(f"{key}/{i}".encode()).digest()[:7], "big") for i in range(len(prompts))]
    seeded = [replace(params, n=samples, seed=seed) for seed in seeds]
    flat = engine.generate([prompt_ids(prompt, tokenizer) for prompt in prompts], seeded, on_progress)
    return [flat[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def explore(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    problems: list[Problem],
    samples: int,
    params: SamplingParams,
    key: str,
    reward: Callable[[Grade], float],
) -> Rollouts:
    """Ask, grade, reward. A grader or reward that raises stops the run: a crash is no zero."""
    outputs = ask(engine, tokenizer, [p.prompt for p in problems], samples, params, key)
    grades = [[task.grade(problem, o.text) for o in group] for problem, group in zip(problems, outputs)]
    rewards = torch.tensor([[reward(grade) for grade in group] for group in grades])
    return Rollouts(problems, outputs, grades, rewards)


def to_batch(outputs: list[list[Output]], advantages: Tensor, length: int, pad_id: int) -> Batch:
    """Pack answers with what their tokens need in `extra`: advantages, weights (DeepSeekMath Eq 3) and the sampler's
    log-probabilities. advantages [Q, G]."""
    flat = [
        (output, advantage) for group, row in zip(outputs, advantages.tolist()) for output, advantage in zip(group, row)
    ]
    samples = []
    for output, advantage in flat:
        before, answer = len(output.prompt_token_ids), len(output.token_ids)
        spread = {
            "advantages": [advantage] * answer,
            "weights": [1 / (answer * len(flat))] * answer,
            "sampler_logprobs": output.logprobs,
        }
        samples.append(
            Sample(
                ids=output.prompt_token_ids + output.token_ids,
                mask=[False] * before + [True] * answer,
                extra={name: [0.0] * before + values for name, values in spread.items()},
            )
        )
    return pack(samples, length, pad_id)


@torch.no_grad()
def score(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability of every label under `model` [B, T]; 0 where there is no label."""
    hidden, _ = model.hidden(batch.ids, batch.positions, batch.segments)
    logprobs, at = label_logprobs(hidden, model.head, batch.labels)
    return torch.zeros(batch.ids.numel(), device=logprobs.device).index_copy(0, at, logprobs).view_as(batch.ids)


def largest_gap(batch: Batch, logprobs: Tensor) -> float:
    """Largest difference between the sampler's and the trainer's log-probability of a token."""
    return (batch.extra["sampler_logprobs"] - logprobs).masked_fill(batch.labels == IGNORE, 0).abs().max().item()
