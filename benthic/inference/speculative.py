"""Drafting with the first multi-token prediction module, verified exactly (V3 Sec 5.4.3).

A step that computes token t_{i+1} and drafts of the next K - 1 yields logits at all of them. The sampler chooses at
every position as if the drafts before it were right, with the random numbers of that place. As long as it chooses the
draft, the next choice is that of plain decoding; the first other choice is the last one emitted. So the answer is the
plain one, token by token, for rows that draw as for those that take the likeliest, and whatever the drafts.

To draw x from p and keep the draft d where x = d is to accept d with probability p(d), and otherwise to draw from p
without d: speculative sampling (Leviathan et al. 2023, Chen et al. 2023) of a draft that is certain. A module that
draws its draft with the numbers of that place (`sampler.propose`) is right nearly as often as min(p, q) allows.

The module at position i takes h_i and Emb(t_{i+1}). Its latents live in the slot of position i, on a layer of their
own: prompts fill it too, the last position with the first token of the answer. Further drafts come from the module
again, at the places after: it takes its own hidden state for h and its draft for t. Those latents are provisional, in
slots that the next step computes first. So a rejected draft leaves nothing to undo: its position is computed again
before anything reads it. Steps that draft nothing fill the module's slots too.

Letters: B rows, Q new tokens, K = 1 + drafts chosen tokens, d hidden.
"""

from typing import Protocol

import torch
from torch import Tensor

from benthic.inference import sampler
from benthic.inference.batch import Rows
from benthic.model.cache import CacheView, LatentCache
from benthic.model.transformer import Transformer


class Queries(Protocol):
    """Rows that verify drafts: ids [B, Q] and how many of them are real [B]."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def counts(self) -> Tensor: ...


def accept(rows: Queries, tokens: Tensor) -> Tensor:
    """tokens [B, K] chosen in the first B rows -> how many drafts each accepts [B], 0 to K - 1."""
    b, drafts = len(tokens), tokens.shape[1] - 1
    right = tokens[:, :drafts] == rows.ids[:b, 1 : 1 + drafts]
    there = torch.arange(drafts, device=tokens.device) < rows.counts[:b].unsqueeze(1) - 1
    return (right & there).long().cumprod(1).sum(1)


def ahead(model: Transformer, view: CacheView, rows: Rows, hidden: Tensor, tokens: Tensor, accepted: Tensor) -> Tensor:
    """The module at the step's own places: hidden [B, Q, d], tokens [B, K], accepted [B] -> hidden states [B, d] whose
    logits guess the token after the last one emitted. `view` is that of the main pass."""
    every = torch.arange(len(tokens), device=tokens.device)
    if rows.prefill:
        last, next_ids = rows.counts - 1, rows.next_ids.clone()
        next_ids[every, last] = torch.where(rows.whole, tokens[:, 0], next_ids[every, last])
    else:
        last, next_ids = accepted, tokens
    out, _ = model.mtp_hidden(hidden, next_ids, positions=rows.positions, cache=view)  # [B, Q, d]
    return out[every, last]


def drafts(
    model: Transformer, cache: LatentCache, rows: Rows, ahead: Tensor, accepted: Tensor, count: int, vocab_size: int
) -> Tensor:
    """`ahead` [B, d] as above -> [B, count] guesses for the tokens after the last one emitted. Where a row has no page
    for the module's latents, the guess is bad."""
    found = accepted.new_zeros(len(accepted), count)
    for i in range(count):
        if i:
            positions, write, table = rows.one(rows.places + accepted + i - 1)
            view, token = CacheView(cache, write, table), found[:, i - 1 : i]
            ahead = model.mtp_hidden(ahead.unsqueeze(1), token, positions=positions, cache=view)[0].squeeze(1)
        places = rows.places + accepted + i + 1
        found[:, i] = sampler.propose(model.logits(ahead), rows.controls, places, vocab_size)
    return found
