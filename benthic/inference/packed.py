"""A plan as packed tokens: what `fused.Fused` computes. Decode rows travel in one copy, chunks of prompts in another.

Decode rows come first, each with 1 + drafts queries; rows of padding behind them make their number one that a CUDA
graph exists for. A row may continue one of the step before, whose choice only the device knows (`Plan.sources`): then
its tokens are taken from `Feed`, and its place moves on by the drafts that were accepted.

Letters: B decode rows, Q queries of each, W pages per row, N tokens, R rows in all, C chunks of prompts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benthic.inference.fused import Decode, Piece, Prefill, Tokens
from benthic.inference.scheduler import Plan

PIECE = 16_384  # cached tokens whose keys and values are decompressed at once


@dataclass(frozen=True)
class Feed:
    """What the last step chose, per row: the token to compute next with its drafts [rows, Q], and how many drafts it
    accepted [rows]. Stays on the device; the next step reads it before it writes its own."""

    ids: Tensor
    gain: Tensor


def width_of(plan: Plan) -> int:
    """Columns for the pages of every decode row, and one that is 0: what has no page yet is looked up there."""
    return 1 + max(len(seq.pages) for seq in plan.seqs[: plan.decode])


def decode_array(plan: Plan, rows: int, queries: int, width: int) -> np.ndarray:
    """The decode rows of a plan [rows, Q + 3 + W] int64: ids, source, start, count, pages. Padding counts 0."""
    array = np.zeros((rows, queries + 3 + width), np.int64)
    array[:, queries] = -1
    for row in range(plan.decode):
        seq, count, start = plan.seqs[row], plan.counts[row], plan.starts[row]
        if plan.sources[row] < 0:
            ids = seq.feed(count)
            array[row, : len(ids)] = ids
        array[row, queries : queries + 3] = plan.sources[row], start, count
        array[row, queries + 3 : queries + 3 + len(seq.pages)] = seq.pages
    return array


@dataclass(frozen=True)
class DecodeRows:
    """Views of one int64 tensor [B, Q + 3 + W] and what follows from it. All of it may stand in a CUDA graph."""

    ids: Tensor  # [B, Q]
    counts: Tensor  # [B] queries that are real
    first: Tensor  # [B] position of the first query
    tokens: Tensor  # [3, B Q] ids, positions, slots of the tokens
    decode: Decode


def decode_rows(data: Tensor, queries: int, feed: Feed, page_size: int) -> DecodeRows:
    """Cut the array apart and fill in what the device knows better."""
    ids, source, start, counts, pages = data.split([queries, 1, 1, 1, data.shape[1] - queries - 3], 1)
    known, at = source < 0, source.clamp(min=0).squeeze(1)
    ids = torch.where(known, ids, feed.ids[at, :queries])  # [B, Q]
    first = start + torch.where(known, 0, feed.gain[at].unsqueeze(1))  # [B, 1]
    steps = torch.arange(queries, device=data.device)
    positions = first + steps  # [B, Q]
    page = pages.gather(1, (positions // page_size).clamp(max=pages.shape[1] - 1))
    slots = torch.where(steps < counts, page * page_size + positions % page_size, 0)
    context = torch.where(counts > 0, first + queries, 0).squeeze(1)  # queries that are not real see what is there
    return DecodeRows(
        ids=ids,
        counts=counts.squeeze(1),
        first=first.squeeze(1),
        tokens=torch.stack((ids, positions, slots)).flatten(1),
        decode=Decode(len(data), queries, pages.int(), context.int()),
    )


@dataclass(frozen=True)
class Chunks:
    """The prefill rows of a step: tokens [3, n] as above, next_ids [n], last [C] the place of each chunk's last token
    among them, their pages [C, W] int32, and how they attend."""

    tokens: Tensor
    next_ids: Tensor
    last: Tensor
    table: Tensor
    prefill: Prefill


def chunk_rows(plan: Plan, page_size: int, device: torch.device) -> Chunks:
    """Lay out the chunks of prompts: one array, one copy. Their contexts come in pieces of at most PIECE tokens."""
    rows = range(plan.decode, len(plan.seqs))
    counts = [plan.counts[row] for row in rows]
    columns, firsts = [], [np.cumsum([0, *counts])]
    for row, count in zip(rows, counts):
        seq, start = plan.seqs[row], plan.starts[row]
        positions = np.arange(start, start + count)
        after = seq.ids[start + 1 : start + count + 1]
        columns.append(
            np.stack(
                (
                    np.array(seq.ids[start : start + count]),
                    positions,
                    _slots(seq.pages, start, start + count, page_size),
                    np.array(after + [0] * (count - len(after))),
                )
            )
        )
    pieces = _pieces([plan.starts[row] for row in rows])
    held = [
        np.concatenate([_slots(plan.seqs[row].pages, a, b, page_size) for row, (a, b) in zip(rows, piece)])
        for piece in pieces
    ]
    firsts += [np.cumsum([0, *(b - a for a, b in piece)]) for piece in pieces]
    table = np.zeros((len(rows), 1 + max(len(plan.seqs[row].pages) for row in rows)), np.int64)
    for i, row in enumerate(rows):
        table[i, : len(plan.seqs[row].pages)] = plan.seqs[row].pages
    flat = np.concatenate([np.concatenate(columns, 1).reshape(-1), table.reshape(-1), *held, *firsts]).astype(np.int64)
    data = torch.from_numpy(flat).to(device, non_blocking=True)
    n, c = sum(counts), len(counts)
    sizes = [4 * n, table.size, *map(len, held), *[c + 1] * len(firsts)]
    own, pages, *parts = data.split(sizes)
    tokens, starts = own.view(4, n), [part.int() for part in parts[len(held) :]]
    cached = [Piece(slots, first) for slots, first in zip(parts[: len(held)], starts[1:])]
    return Chunks(
        tokens=tokens[:3],
        next_ids=tokens[3],
        last=parts[len(held)][1:] - 1,
        table=pages.view(table.shape).int(),
        prefill=Prefill(starts[0], max(counts), cached),
    )


def _slots(pages: list[int], start: int, end: int, page_size: int) -> np.ndarray:
    positions = np.arange(start, end)
    return np.array(pages or [0])[positions // page_size] * page_size + positions % page_size


def _pieces(contexts: list[int]) -> list[list[tuple[int, int]]]:
    """Ranges of every row's context, piece by piece; each piece has at most PIECE tokens over all rows."""
    share = max(1, PIECE // max(1, sum(length > 0 for length in contexts)))
    ends = range(0, max(contexts, default=0), share)
    return [[(min(a, length), min(a + share, length)) for length in contexts] for a in ends]


def joined(decode: DecodeRows | None, chunks: Chunks | None) -> Tokens:
    """Decode rows and chunks as one pass."""
    parts = [part.tokens for part in (decode, chunks) if part is not None]
    ids, positions, slots = torch.cat(parts, 1)
    return Tokens(ids, positions, slots, decode and decode.decode, chunks and chunks.prefill)
