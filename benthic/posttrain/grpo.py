"""Group relative policy optimisation: the whole algorithm in one loop, around the trainer that pretraining uses."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benthic.base.batch import Batch
from benthic.base.errors import InputError
from benthic.inference.config import SamplingParams
from benthic.inference.engine import Engine
from benthic.model.transformer import Transformer
from benthic.posttrain import losses
from benthic.posttrain.advantage import group_relative, without_spread
from benthic.posttrain.config import GRPOConfig
from benthic.posttrain.reward import rule_reward
from benthic.posttrain.rollout import Rollouts, explore, largest_gap, score, to_batch
from benthic.tasks.task import Problem, Task
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.train.config import TrainConfig
from benthic.train.loss import Outcome, balance_losses, label_logprobs, loads
from benthic.train.trainer import Trainer


@dataclass
class Questions:
    """Where exploration stands in the task's RL problems; they come round again when all were asked."""

    problems: list[Problem]
    asked: int = 0

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        taken = [self.problems[i % len(self.problems)] for i in range(self.asked, self.asked + count)]
        self.asked += count
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


class PolicyGradient:
    """The objective of an update: `losses.grpo` on the labels of a packed batch, plus the balance of experts."""

    def __init__(self, config: GRPOConfig, settings: TrainConfig):
        self.config, self.settings = config, settings

    def targets(self, model: Transformer, batch: Batch) -> Tensor:
        """Labels in these rows; the loss itself is weighted by `batch.extra["weights"]`."""
        return batch.targets()

    def __call__(self, model: Transformer, batch: Batch, targets: Tensor) -> Outcome:
        hidden, choices = model.hidden(batch.ids, batch.positions, batch.segments)
        logprobs, at = label_logprobs(hidden, model.head, batch.labels)
        old, ref, advantages, weights = (
            batch.extra[name].reshape(-1)[at] for name in ("old_logprobs", "ref_logprobs", "advantages", "weights")
        )
        loss, metrics = losses.grpo(logprobs, old, ref, advantages, weights, self.config.epsilon, self.config.beta)
        balance, balances = balance_losses(self.settings, model, choices, batch, targets)
        metrics |= {"loss": loss.detach(), **balances}
        return Outcome(loss + balance, metrics, loads(model, choices, batch))


def grpo(
    trainer: Trainer, engine: Engine, reference: Transformer, task: Task, questions: Questions,
    tokenizer: Tokenizer, config: GRPOConfig,
) -> None:  # fmt: skip
    """Explore, reward, improve, until the trainer's `max_steps`. The engine samples from the trainer's own weights."""
    settings, policy, updates = trainer.config, trainer.model, config.steps_per_generation
    if settings.max_steps % updates or settings.save_steps % updates:
        raise InputError(
            f"max_steps={settings.max_steps} and save_steps={settings.save_steps} must divide by "
            f"steps_per_generation={updates}, so that a checkpoint falls between explorations"
        )
    if settings.gradient_accumulation_steps != 1:
        raise InputError(
            f"gradient_accumulation_steps={settings.gradient_accumulation_steps} with GRPO, whose batches vary in rows "
            "-> use 1, and a greater steps_per_generation for smaller batches"
        )
    sampling = SamplingParams(max_tokens=config.max_completion_length, temperature=config.temperature)
    share = config.prompts_per_generation // updates
    with trainer.run.progress(trainer.stage, settings.max_steps) as progress:
        while trainer.steps < settings.max_steps:
            key = f"{settings.seed}/{questions.asked}"
            problems = questions.take(config.prompts_per_generation)
            rollouts = explore(engine, tokenizer, task, problems, config.num_generations, sampling, key, rule_reward)
            advantages = group_relative(rollouts.rewards)  # [Q, G]
            batches = [
                to_batch(
                    rollouts.outputs[a : a + share], advantages[a : a + share], settings.max_length, tokenizer.pad_id
                )
                for a in range(0, len(problems), share)
            ]
            gap = 0.0
            for i, batch in enumerate(batches):
                batch = batches[i] = batch.to(trainer.device)
                old, ref = score(policy, batch), score(reference, batch)
                batch.extra |= {"old_logprobs": old, "ref_logprobs": ref}
                gap = max(gap, largest_gap(batch, old))
            metrics = [trainer.step(batch) for batch in batches]
            engine.update_weights()
            values = trainer.read(metrics[-1]) | summary(rollouts) | {"sampler_gap": gap}
            trainer.run.log(trainer.stage, trainer.steps, values)
            progress.update(
                trainer.steps, reward=values["reward"], accuracy=values["accuracy"], length=values["length"]
            )
            trainer.save_if_due()


def summary(rollouts: Rollouts) -> dict[str, float]:
    """What people watch: mean reward and its parts, length, entropy estimate, share of groups that taught nothing."""
    grades = [grade for group in rollouts.grades for grade in group]
    outputs = [output for group in rollouts.outputs for output in group]
    tokens = sum(len(o.token_ids) for o in outputs)
    return {
        "reward": rollouts.rewards.mean().item(),
        "accuracy": sum(g.correct for g in grades) / len(grades),
        "format": sum(g.well_formed for g in grades) / len(grades),
        "length": tokens / len(outputs),
        "entropy": -sum(sum(o.logprobs) for o in outputs) / tokens,
        "truncated": sum(o.finish_reason == "length" for o in outputs) / len(outputs),
        "zero_std_groups": without_spread(rollouts.rewards).item(),
    }
