"""What pretraining and fine-tuning minimise: next-token loss, multi-token prediction, and balance of experts.

Log-probabilities are computed in chunks of tokens: no [N, V] float32 tensor ever exists.
Letters: B rows, T tokens, N = B*T, d hidden, V vocabulary, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.base.batch import IGNORE, Batch
from benthic.model.balance import Balance, chosen_experts, expert_load, importance_loss, sequence_balance_loss
from benthic.model.capacity import Capacity
from benthic.model.gate import Choice
from benthic.model.transformer import Transformer
from benthic.train.config import TrainConfig

CHUNK = 2048  # tokens whose logits are in memory at once


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden W^T)[target] per token; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        cast = weight.to(hidden.dtype)
        logprobs, normaliser = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        for a in range(0, len(hidden), CHUNK):
            rows = slice(a, a + CHUNK)
            logits = F.linear(hidden[rows], cast).float()  # [chunk, V]
            logprobs[rows] = -F.cross_entropy(logits, targets[rows], reduction="none")
            normaliser[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - logprobs[rows]  # log sum exp
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (hidden, weight, targets, normaliser) = upstream, ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for a in range(0, len(hidden), CHUNK):
            rows, g = slice(a, a + CHUNK), grad[a : a + CHUNK, None]
            logits = F.linear(hidden[rows], cast).float()
            slope = logits.sub_(normaliser[rows, None]).exp_().mul_(-g)  # -g softmax
            slope.scatter_add_(1, targets[rows, None], g)  # + g onehot
            slope = slope.to(hidden.dtype)
            grad_hidden[rows] = slope @ cast
            grad_weight += slope.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden [N, d], head weight [V, d], targets [N] -> log-probabilities [N] float32, with gradients."""
    return _TokenLogProbs.apply(hidden, weight, targets)  # type: ignore[no-any-return]


def label_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [B, T, d], labels [B, T] -> (log-probabilities [M] of the labels that carry loss, their flat indices)."""
    flat = labels.reshape(-1)
    at = (flat != IGNORE).nonzero().squeeze(1)  # [M]
    return token_logprobs(hidden.flatten(0, 1)[at], weight, flat[at]), at


@dataclass
class Outcome:
    """What an objective hands back: a loss to differentiate, sums to report, and the load of each expert.

    `loss` and every metric are contributions: over micro-batches and processes they add up to the batch's value.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    expert_load: Tensor  # [gates, E] int64


def next_ids(batch: Batch, depth: int) -> Tensor:
    """Token t_{i+1+depth} of each position i [B, T]; 0 where the row does not know it (no loss falls there)."""
    last = batch.labels[:, -1:].clamp(min=0)
    stream = torch.cat((batch.ids, last), 1)  # [B, T + 1]
    return F.pad(stream[:, 1 + depth :], (0, depth))


def shifted_labels(batch: Batch, depth: int) -> Tensor:
    """Labels `depth` positions later in the same document [B, T], IGNORE where there are none."""
    labels = F.pad(batch.labels[:, depth:], (0, depth), value=IGNORE)
    if batch.segments is not None:
        later = F.pad(batch.segments[:, depth:], (0, depth))
        labels = labels.masked_fill(later != batch.segments, IGNORE)
    return labels


class LanguageModelling:
    """Mean -log p of the labels, and of each prediction depth's own labels: the objective of pretraining and of SFT.

    V3 Eq 24 divides every depth by the T of the main loss, though depth k has k labels fewer in each document; dividing
    by its own number keeps depths, and documents of different lengths, comparable.
    """

    def __init__(self, config: TrainConfig):
        self.config = config

    def targets(self, model: Transformer, batch: Batch) -> Tensor:
        """Labels of the main loss and of each depth [1 + D]."""
        return torch.stack([(shifted_labels(batch, k) != IGNORE).sum() for k in range(1 + len(model.mtp))])

    def __call__(self, model: Transformer, batch: Batch, targets: Tensor) -> Outcome:
        """`targets` are the numbers of labels in the whole step, over micro-batches and processes: the divisors."""
        capacity = self.capacity(batch)
        trunk = model.trunk(batch.ids, batch.positions, batch.segments, capacity=capacity)
        hidden, choices = model.top(trunk)
        head, state = model.head, model.mtp_input(trunk, hidden)
        loss = -label_logprobs(hidden, head, batch.labels)[0].sum() / targets[0]
        mtp_loss = torch.zeros_like(loss)
        depths = len(model.mtp) if self.config.mtp_loss_weight else 0
        for depth in range(depths):
            ahead, choice = model.mtp_hidden(
                state, next_ids(batch, depth), batch.positions, batch.segments, depth=depth, capacity=capacity
            )
            state = model.mtp_input(trunk, ahead)
            logprobs, _ = label_logprobs(ahead, head, shifted_labels(batch, depth + 1))
            mtp_loss = mtp_loss - logprobs.sum() / (targets[depth + 1].clamp(min=1) * depths)  # V3 Eq 24
            choices += [] if choice is None else [choice]
        balance, balances = balance_losses(self.config, model, choices, batch, targets[0])
        total = loss + self.config.mtp_loss_weight * mtp_loss + balance  # V3 Eq 25
        metrics = {"loss": loss.detach(), "mtp_loss": mtp_loss.detach(), **balances}
        if capacity is not None and choices:
            metrics["dropped_copies"] = torch.stack([dropped(choice, capacity) for choice in choices]).sum()
        return Outcome(total, metrics, loads(model, choices, batch))

    def capacity(self, batch: Batch) -> Capacity | None:
        """What the experts of one device may compute, and which rows never lose a token; None drops nothing."""
        if not self.config.expert_capacity_factor:
            return None
        rows, length = batch.ids.shape
        spared = torch.rand(rows, device=batch.ids.device) < self.config.undropped_sequences
        valid = None if batch.segments is None else batch.segments.reshape(-1) > 0
        factor = self.config.expert_capacity_factor
        return Capacity(factor=factor, protected=spared.repeat_interleave(length), valid=valid)


def balance_losses(
    settings: TrainConfig, model: Transformer, choices: list[Choice], batch: Batch, targets: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(weighted sum, V3's sequence-wise loss and every other that has a weight), summed over layers.

    A sequence counts by its labels out of `targets`, so that micro-batches add up, as they do for the main loss.
    """
    valid = None if batch.segments is None else batch.segments.reshape(-1) > 0
    shape, k = (batch.ids.shape[0], batch.ids.shape[1]), model.config.num_experts_per_tok
    groups, reach = model.config.n_group, model.config.topk_group
    share = (batch.labels != IGNORE).sum(1) / targets  # [B]
    weights = {
        "balance_loss": settings.balance_loss_weight,
        "batch_balance_loss": settings.batch_balance_loss_weight,
        "expert_balance_loss": settings.expert_balance_loss_weight,
        "device_balance_loss": settings.device_balance_loss_weight,
        "communication_balance_loss": settings.communication_balance_loss_weight,
        "importance_loss": settings.importance_loss_weight,
    }
    terms: dict[str, Callable[[Choice], Tensor]] = {
        "balance_loss": lambda c: share * sequence_balance_loss(c, shape, valid),
        "batch_balance_loss": lambda c: share.sum() * sequence_balance_loss(c, (1, shape[0] * shape[1]), valid),
        "expert_balance_loss": lambda c: share * Balance.of(c, chosen_experts(c), shape, valid).experts(k),
        "device_balance_loss": lambda c: share * Balance.of(c, chosen_experts(c), shape, valid).devices(k, groups),
        "communication_balance_loss": lambda c: (
            share * Balance.of(c, chosen_experts(c), shape, valid).communication(groups, reach)
        ),
        "importance_loss": lambda c: share.sum() * importance_loss(c, valid),
    }
    none = torch.zeros((), device=batch.ids.device)
    used = [name for name, weight in weights.items() if weight or name == "balance_loss"]
    found = {name: sum((terms[name](c).sum() for c in choices), none) for name in used}
    total = sum((weights[name] * value for name, value in found.items()), none)
    return total, {name: value.detach() for name, value in found.items()}


def loads(model: Transformer, choices: list[Choice], batch: Batch) -> Tensor:
    """Tokens per expert for each gate [gates, E]; gates that this objective did not run count zero."""
    valid = None if batch.segments is None else batch.segments.reshape(-1) > 0
    load = torch.zeros(len(model.gates()), model.config.n_routed_experts, dtype=torch.int64, device=batch.ids.device)
    for i, choice in enumerate(choices):
        load[i] = expert_load(choice, model.config.n_routed_experts, valid)
    return load


def dropped(choice: Choice, capacity: Capacity) -> Tensor:
    """Copies of tokens, without padding, that no expert computed in one layer."""
    lost = ~choice.kept if choice.kept is not None else torch.zeros_like(choice.topk_ids, dtype=torch.bool)
    return (lost if capacity.valid is None else lost & capacity.valid.unsqueeze(1)).sum()
