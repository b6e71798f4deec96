"""THE loop. Pretraining and fine-tuning call `fit`; reinforcement learning drives `step` from outside.

The trainer knows nothing of the algorithm: an objective maps (model, batch) to a loss, a cursor remembers where
the data stands, and `forward_backward` hides how the work is spread.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benthic.base import dist
from benthic.base.batch import Batch
from benthic.base.config import to_dict
from benthic.base.errors import CheckpointError, Diverged, Interrupted
from benthic.base.log import Run
from benthic.base.signals import Stop
from benthic.model import hf
from benthic.model.balance import device_load, max_violation, update_bias
from benthic.model.transformer import Transformer
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.train import checkpoint
from benthic.train.config import TrainConfig
from benthic.train.optim import adamw
from benthic.train.schedule import learning_rate
from benthic.train.step import Accumulate, Objective

log = logging.getLogger("benthic")


class Cursor(Protocol):
    """Where the data stands; its state is a few plain values and goes into the checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """One stage of training of `model`, logged to `run` as `stage`, with checkpoints in `folder`."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        config: TrainConfig,
        *,
        cursor: Cursor,
        stage: str,
        folder: Path,
        run: Run,
        stop: Stop,
        tokenizer: Tokenizer | None = None,
        validate: Callable[[Transformer], dict[str, float]] | None = None,
    ):
        self.model, self.config, self.cursor = model, config, cursor
        self.stage, self.folder, self.run, self.stop, self.tokenizer = stage, folder, run, stop, tokenizer
        self.validate = validate
        self.optimizer = adamw(model, config)
        self.parallel = Accumulate(model, objective, config.gradient_accumulation_steps)
        self.device = next(model.parameters()).device
        self.steps = self.tokens = 0  # updates tried (skipped ones count: the data moved on), tokens seen
        self.skipped = self.skipped_in_a_row = 0
        self.norm_mean = 0.0  # running mean of accepted gradient norms

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train until `max_steps`, from wherever `resume` put us; ends with a checkpoint of the last step."""
        self.model.train()
        with self.run.progress(self.stage, self.config.max_steps) as progress:
            seconds, tokens = 0.0, self.tokens  # spent in steps since the last row, tokens at that row
            while self.steps < self.config.max_steps:
                start = time.perf_counter()
                metrics = self.step(next(batches))
                seconds += time.perf_counter() - start
                if self.due(self.config.logging_steps):
                    values = self.read(metrics)
                    rate = (self.tokens - tokens) / seconds
                    seconds, tokens = 0.0, self.tokens
                    self.run.log(self.stage, self.steps, values | {"tokens_per_s": rate})
                    progress.update(self.steps, loss=values["loss"], tok_per_s=rate)
                if self.validate is not None and self.config.eval_steps and self.due(self.config.eval_steps):
                    self.run.log(self.stage, self.steps, self.validate(self.model))
                self.save_if_due()

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser update on the rows of `batch`, or none if its gradient is not sane. Metrics stay on device."""
        rate = learning_rate(self.config, self.tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics, load = self.parallel.forward_backward(batch.to(self.device))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm, foreach=True)
        self.steps += 1
        self.tokens += batch.ids.numel() * dist.world_size()
        if self.sane(norm.item()):
            self.optimizer.step()
            for gate, counts in zip(self.model.gates(), load):
                if gate.e_score_correction_bias is not None and self.balancing:
                    c = self.config
                    update_bias(gate.e_score_correction_bias, counts, c.bias_update_speed, c.bias_update_rule)
        self.optimizer.zero_grad()
        return metrics | {"grad_norm": norm, "expert_load": load, "lr": torch.tensor(rate)}

    @property
    def balancing(self) -> bool:
        """Whether the gate biases still move in this step."""
        return self.steps <= self.config.max_steps * self.config.bias_update_until

    def sane(self, norm: float) -> bool:
        """Whether to apply an update with this gradient norm. All processes see the same norm, so all agree.

        A spike is measured against the running mean, but never against less than the clip: smaller norms do no harm.
        """
        usual = max(self.norm_mean, self.config.max_grad_norm)
        ceiling = self.config.spike_factor * usual if self.norm_mean else math.inf
        if math.isfinite(norm) and norm <= ceiling:
            self.norm_mean = 0.95 * self.norm_mean + 0.05 * norm if self.norm_mean else norm
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        log.warning("%s step %d skipped: gradient norm %g, ceiling %g", self.stage, self.steps, norm, ceiling)
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise Diverged(
                f"{self.stage} stopped at step {self.steps}: {self.skipped_in_a_row} updates in a row had a gradient "
                f"norm that is not finite or above {ceiling:g} (last {norm:g}) -> lower learning_rate="
                f"{self.config.learning_rate:g}, or look at the data around this step"
            )
        return False

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the last one, happens now."""
        return self.steps % every == 0 or self.steps == self.config.max_steps

    def read(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        """Bring a step's metrics to the host: the only other device synchronisation."""
        load = metrics["expert_load"].cpu()
        values: dict[str, Any] = {k: v.item() for k, v in metrics.items() if k != "expert_load"}
        main = load[: self.model.config.moe_layers]
        values |= {"tokens": self.tokens, "skipped": self.skipped, "expert_load": main.tolist()}
        if len(main) and main.sum():
            devices = device_load(main, self.model.config.n_group)
            values["max_violation"] = max_violation(main).mean().item()
            values |= {"device_load": devices.tolist(), "device_max_violation": max_violation(devices).mean().item()}
        return values

    def save_if_due(self) -> None:
        """Checkpoint when it is time, or when a signal asked to stop; then leave."""
        signum = self.requested()
        if self.due(self.config.save_steps) or signum is not None:
            self.save()
        if signum is not None:
            raise Interrupted(signum, f"{self.stage} saved at step {self.steps} of {self.config.max_steps}")

    def requested(self) -> int | None:
        """The signal that asked this process or any other to stop: all of them leave after the same step."""
        mine = self.stop.requested
        if dist.world_size() == 1:
            return mine
        asked = torch.tensor(int(mine is not None), device=self.device)
        dist.sum_([asked])
        return (mine or signal.SIGTERM) if asked else None

    def save(self) -> None:
        """Write everything that the next step depends on."""
        names: dict[Tensor, str] = {p: n for n, p in self.model.named_parameters()}
        tensors = {f"optimizer.{names[p]}.{k}": v for p, s in self.optimizer.state.items() for k, v in s.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "stage": self.stage,
            "step": self.steps,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "norm_mean": self.norm_mean,
            "cursor": self.cursor.state_dict(),
            "config": to_dict(self.config),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        if dist.rank() == 0:
            keep = self.config.save_total_limit
            checkpoint.save(self.folder, self.steps, self.model, self.tokenizer, tensors, state, keep)
        dist.barrier()

    def resume(self) -> bool:
        """Continue from the newest whole checkpoint in `folder`, if there is one. Then runs on as if never stopped."""
        saved = checkpoint.newest(self.folder)
        if saved is None:
            torch.manual_seed(self.config.seed)  # whatever this process drew before, the stage begins the same way
            self.run.rewind(self.stage, 0)
            return False
        self._same_settings(saved)
        hf.read_weights(saved.folder / "model", self.model)
        for name, parameter in self.model.named_parameters():
            prefix = f"optimizer.{name}."
            fields = {k.removeprefix(prefix): saved.tensors[k] for k in saved.tensors.names if k.startswith(prefix)}
            if fields:
                step = fields.pop("step")  # AdamW keeps its counter on the parameter's device when fused
                moments = {k: v.to(parameter.device) for k, v in fields.items()}
                self.optimizer.state[parameter] = moments | {"step": step.to(parameter.device)}
        torch.set_rng_state(saved.tensors["rng.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(saved.tensors["rng.cuda"], self.device)
        state = saved.state
        self.steps, self.tokens, self.norm_mean = state["step"], state["tokens"], state["norm_mean"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.cursor.load_state_dict(state["cursor"])
        self.run.rewind(self.stage, self.steps)
        log.info("%s: resumed step %d of %d, 0 tokens repeated", self.stage, self.steps, self.config.max_steps)
        return True

    def _same_settings(self, saved: checkpoint.Saved) -> None:
        """A stage that was begun with other numbers is not continued silently."""
        now, then = to_dict(self.config), saved.state["config"]
        for key in now.keys() | then.keys():
            if now.get(key) != then.get(key):
                raise CheckpointError(
                    f"{saved.folder} was trained with {key}={then.get(key)!r}, now it is {now.get(key)!r} -> restore "
                    "the setting, or choose another output folder"
                )
        if saved.state["threads"] != torch.get_num_threads() or saved.state["torch"] != torch.__version__:
            log.warning(
                "%s was written with torch %s and %d threads: results will be close, not bit-identical",
                saved.folder, saved.state["torch"], saved.state["threads"],
            )  # fmt: skip
