"""One forward and backward pass over a step's rows: the only seam for parallelism."""

from typing import Protocol

import torch
from torch import Tensor

from benthic.base import dist
from benthic.base.batch import Batch
from benthic.model.transformer import Transformer
from benthic.train.loss import Outcome


class Objective(Protocol):
    """What a stage of training minimises."""

    def targets(self, model: Transformer, batch: Batch) -> Tensor:
        """The numbers that the loss divides by, for these rows alone; they add up over rows."""
        ...

    def __call__(self, model: Transformer, batch: Batch, targets: Tensor) -> Outcome:
        """The contribution of these rows to the loss of a step whose divisors are `targets`."""
        ...


class Accumulate:
    """Micro-batches one after another on this process, then sums over processes.

    Losses are divided by the global number of labels before they are differentiated, so that neither the number of
    micro-batches nor of processes changes the gradient.
    """

    def __init__(self, model: Transformer, objective: Objective, micro_batches: int):
        self.model, self.objective, self.micro_batches = model, objective, micro_batches

    def forward_backward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Leaves gradients in the parameters; returns (metrics of the whole step, expert load [gates, E])."""
        targets = self.objective.targets(self.model, batch)
        dist.sum_([targets])
        metrics: dict[str, Tensor] = {}
        load = torch.zeros(())
        for chunk in batch.chunks(self.micro_batches):
            outcome = self.objective(self.model, chunk, targets)
            outcome.loss.backward()
            metrics = {name: metrics.get(name, 0) + value for name, value in outcome.metrics.items()}
            load = load.to(outcome.expert_load.device) + outcome.expert_load
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        dist.sum_([*grads, *metrics.values(), load])
        return metrics, load
