"""Drafting with the first multi-token prediction module, verified greedily (V3 Sec 5.4.3).

A step that computes token t_{i+1} and the draft d of t_{i+2} yields logits at both. If the first choose d, the second
are those of plain decoding, and the step emits two tokens; if not, one. So the answer is exactly the plain greedy one.

The module at position i takes h_i and Emb(t_{i+1}). Its latents live in the slot of position i, on a layer of their
own: prompts fill it too, the last position with the first token of the answer. A rejected draft leaves nothing to
undo: its position is computed again before anything reads it.

Letters: B rows, Q new tokens, K = 1 or 2 chosen tokens, d hidden.
"""

import torch
from torch import Tensor

from benthic.inference.batch import Rows
from benthic.model.cache import CacheView
from benthic.model.transformer import Transformer


def accept(rows: Rows, tokens: Tensor) -> Tensor:
    """tokens [B, K] chosen -> how many drafts each row accepts [B], 0 or 1."""
    if tokens.shape[1] == 1:
        return torch.zeros_like(rows.counts)
    return ((rows.counts == 2) & (tokens[:, 0] == rows.ids[:, 1])).long()


def ahead(model: Transformer, view: CacheView, rows: Rows, hidden: Tensor, tokens: Tensor, accepted: Tensor) -> Tensor:
    """hidden [B, Q, d], tokens [B, K], accepted [B] -> hidden states [B, d] whose logits guess the token after the last
    one emitted. `view` is that of the main pass. Rows that sample are computed too; nobody looks at them.
    """
    every = torch.arange(len(tokens), device=tokens.device)
    if rows.prefill:
        last, next_ids = rows.counts - 1, rows.next_ids.clone()
        next_ids[every, last] = torch.where(rows.whole, tokens[:, 0], next_ids[every, last])
    else:
        last, next_ids = accepted, tokens
    out, _ = model.mtp_hidden(hidden, next_ids, positions=rows.positions, cache=view)  # [B, Q, d]
    return out[every, last]
