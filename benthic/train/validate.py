"""Validation: bits per byte of held-out text, and how well the multi-token prediction module foresees it."""

import math

import numpy as np
import torch

from benthic.base.batch import Batch
from benthic.base.errors import InputError
from benthic.data.shards import Shards
from benthic.model.balance import expert_load, max_violation
from benthic.model.transformer import Transformer
from benthic.train.loss import label_logprobs, next_ids, shifted_labels


@torch.no_grad()
def held_out_loss(model: Transformer, shards: Shards, length: int, rows: int, max_windows: int = 0) -> dict[str, float]:
    """Mean nats per token of the stream of held-out tokens, read in windows of `length` that do not overlap.

    Every token but the stream's first is predicted exactly once, from the tokens before it in its window.
    `max_windows` > 0 reads only so many, evenly spread. Returns loss, mtp_loss, the number of predicted tokens, and for
    mixtures MaxVio_global: that of the load over all these tokens, averaged over layers.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    there = (shards.num_tokens - 1) // length
    windows = min(there, max_windows) if max_windows else there
    if windows < 1:
        raise InputError(
            f"{shards.num_tokens} held-out tokens are less than one window of {length} -> hold out more text"
        )
    total, mtp_total, mtp_count = 0.0, 0.0, 0
    load, experts = torch.zeros((), dtype=torch.int64, device=device), model.config.n_routed_experts
    for first in range(0, windows, rows):
        starts = [i * there // windows * length for i in range(first, min(first + rows, windows))]
        tokens = torch.from_numpy(np.stack([shards.read(s, s + length + 1) for s in starts]).astype("int64"))
        batch = Batch(ids=tokens[:, :-1], labels=tokens[:, 1:]).to(device)  # [rows, length]
        trunk = model.trunk(batch.ids)
        hidden, choices = model.top(trunk)
        load = load + torch.stack([expert_load(c, experts, None) for c in choices]) if choices else load
        total -= label_logprobs(hidden, model.head, batch.labels)[0].double().sum().item()
        if len(model.mtp):
            hidden, _ = model.mtp_hidden(model.mtp_input(trunk, hidden), next_ids(batch, 0))
            logprobs, _ = label_logprobs(hidden, model.head, shifted_labels(batch, 1))
            mtp_total -= logprobs.double().sum().item()
            mtp_count += len(logprobs)
    model.train(was_training)
    count = windows * length
    values = {"heldout_loss": total / count, "heldout_tokens": float(count)}
    if load.dim():
        values["heldout_max_violation"] = max_violation(load).mean().item()
    return values | ({"heldout_mtp_loss": mtp_total / mtp_count} if mtp_count else {})


def bits_per_byte(loss: float, tokens: int, utf8_bytes: int) -> float:
    """Nats per token -> bits per UTF-8 byte of the text that the tokens encode."""
    return loss * tokens / math.log(2) / utf8_bytes
