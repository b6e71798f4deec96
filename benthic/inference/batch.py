"""A plan as tensors, with the one host-to-device copy of a step.

Letters: B rows, Q new tokens of the longest row, W pages of the longest row, S = W * page_size context slots.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benthic.inference import controls
from benthic.inference.controls import Controls
from benthic.inference.scheduler import Plan


@dataclass(frozen=True)
class Rows:
    """Input of one forward pass. Padding tokens have position 0 and write to slot 0."""

    prefill: bool
    ids: Tensor  # [B, Q]
    next_ids: Tensor  # [B, Q] the token after each, 0 where it is not known yet
    counts: Tensor  # [B] tokens of each row that are not padding
    whole: Tensor  # [B] bool: the row reaches its last known token, so what it chooses counts
    positions: Tensor  # [B, Q]
    write: Tensor  # [B, Q] slots of the new tokens
    table: Tensor  # [B, S] slot of every context position; past the row's end its first slot, so no other is ever read
    places: Tensor  # [B] where in the sequence the first chosen token will stand
    slots: Tensor  # [B, S] slot of every place of the row's pages
    room: Tensor  # [B] how many places they have
    controls: Controls | None  # None when every row takes the likeliest token

    def one(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token per row at `position` [B] -> positions and write [B, 1] and table [B, S], as above. A row that has
        no room there is padding."""
        at = torch.where(position < self.room, position, 0).unsqueeze(1)
        write = torch.where(position.unsqueeze(1) < self.room.unsqueeze(1), self.slots.gather(1, at), 0)
        places = torch.arange(self.slots.shape[1], device=at.device)
        return at, write, torch.where(places <= at, self.slots, self.slots[:, :1])


def cut(plan: Plan, budget: int) -> list[Plan]:
    """The plan in parts of like rows: the decode rows, then neighbouring prompts that fit `budget` padded tokens."""
    ends = [plan.decode] if plan.decode else []
    longest, begin = 0, plan.decode
    for row in range(plan.decode, len(plan.seqs)):
        longest = max(longest, plan.counts[row])
        if row > begin and (row + 1 - begin) * longest > budget:
            ends.append(row)
            longest, begin = plan.counts[row], row
    ends += [len(plan.seqs)] if begin < len(plan.seqs) else []
    return [_part(plan, begin, end) for begin, end in zip([0, *ends], ends)]


def rows(plan: Plan) -> list[Plan]:
    """The plan row by row."""
    return [_part(plan, row, row + 1) for row in range(len(plan.seqs))]


def _part(plan: Plan, begin: int, end: int) -> Plan:
    rows = slice(begin, end)
    decode = end - begin if end <= plan.decode else 0
    return Plan(
        plan.seqs[rows], plan.counts[rows], plan.starts[rows], plan.sources[rows], decode, plan.queries, plan.drafts,
        plan.scores[rows],
    )  # fmt: skip


def build(plan: Plan, page_size: int, device: torch.device | str) -> Rows:
    """Lay a part of a plan out as one int64 array, copy it, and cut it apart on the device."""
    q, w = max(plan.counts), max(len(seq.pages) for seq in plan.seqs)
    host = np.array([_row(plan, i, q, w, page_size) for i in range(len(plan.seqs))], np.int64)  # [B, .]

    data = torch.from_numpy(host).to(device)
    ids, pages, start, counts, whole, room = data.split([q + 1, w, 1, 1, 1, 1], 1)
    steps = torch.arange(max(q, w * page_size), device=device)
    slots = pages.unsqueeze(2) * page_size + steps[:page_size]  # [B, W, page_size]
    slots = slots.flatten(1)  # [B, S]
    table = torch.where(steps[: w * page_size] < start + counts, slots, slots[:, :1])
    positions = (start + steps[:q]) * (steps[:q] < counts)  # [B, Q]
    write = table.gather(1, positions) * (steps[:q] < counts)  # [B, Q]
    return Rows(
        prefill=plan.decode == 0,
        ids=ids[:, :q],
        next_ids=ids[:, 1:],
        counts=counts.squeeze(1),
        whole=whole.squeeze(1).bool(),
        positions=positions,
        write=write,
        table=table,
        places=(start + (1 if plan.decode else counts)).squeeze(1),
        slots=slots,
        room=room.squeeze(1),
        controls=controls.build(plan.seqs, device),
    )


def _row(plan: Plan, i: int, q: int, w: int, page_size: int) -> list[int]:
    """The integers of row i: Q + 1 ids (the token after the last computed one too, where known), W pages, 4 scalars."""
    seq, count = plan.seqs[i], plan.counts[i]
    ids = seq.feed(count) + seq.ids[seq.computed + count : seq.computed + count + 1]
    whole = seq.computed + count >= len(seq.ids)
    pages = seq.pages
    return [
        *ids,
        *[0] * (q + 1 - len(ids)),
        *pages,
        *[0] * (w - len(pages)),
        seq.computed,
        count,
        whole,
        len(pages) * page_size,
    ]
