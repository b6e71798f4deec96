"""The end of a step on a GPU: from what rows have chosen to the drafts of the next step.

The prediction module is one block, so its latents at a token follow from the main model's hidden state there and the
token after it: `Fused.mtp_fill` writes those of all tokens of the step without attention and experts. They are needed
for one token of each row only, the last one that is right; from there on the row drafts, a token at a time, as a decode
row of one query (speculative.py). Everything here may stand in a CUDA graph.

Letters: B rows, Q queries, W pages per row, N tokens of the step, d hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benthic.inference import sampler
from benthic.inference.controls import Controls
from benthic.inference.fused import Decode, Fused, Tokens
from benthic.inference.sampler import Choice


@dataclass
class Ends:
    """Rows of one kind that have chosen, and where each of them goes on."""

    choice: Choice
    accepted: Tensor  # [B] drafts that were right
    controls: Controls | None
    at: Tensor  # [B] which of the step's tokens is the row's last right one
    position: Tensor  # [B] its position
    table: Tensor  # [B, W] int32 pages; 0 where the row has none
    next_ids: Tensor  # [B] the token after it


def draft(forward: Fused, rows: Ends, hidden: Tensor, count: int, vocab_size: int) -> Tensor:
    """hidden [N, d] of the main model -> [B, count] guesses for the tokens after `next_ids`. The latents of the step's
    tokens are in the cache. Where a row has no page for the next ones, it is padding and its guess is bad."""
    if not count:
        return rows.choice.tokens[:, :0]
    each = one_by_one(rows.position, rows.table, count, forward.page_size)
    angles = forward.angles(rows.position + torch.arange(count, device=hidden.device).unsqueeze(1))  # [count, B, P/2]
    state, guess, found = hidden[rows.at], rows.next_ids, []
    for i, tokens in enumerate(each):
        state = forward.mtp_hidden(state, guess, tokens, 0, (angles[0][i], angles[1][i]))
        guess = sampler.propose(forward.model.logits(state), rows.controls, rows.position + i + 2, vocab_size)
        found.append(guess)
    return torch.stack(found, 1)


def one_by_one(position: Tensor, table: Tensor, count: int, page_size: int) -> list[Tokens]:
    """The tokens at position [B], position + 1, ... of every row, as `count` decode steps. Their ids are not read."""
    positions = position + torch.arange(count, device=position.device).unsqueeze(1)  # [count, B]
    index = (positions // page_size).clamp(max=table.shape[1] - 1)
    page = table.t().gather(0, index)  # [count, B] int32
    there = page > 0
    slots = torch.where(there, page * page_size + positions % page_size, 0)  # int64
    context = torch.where(there, positions + 1, 0).int()
    rows = len(table)
    return [Tokens(p, p, s, Decode(rows, 1, table, c), None) for p, s, c in zip(positions, slots, context)]
