"""A plan as packed tokens: what `fused.Fused` computes. Decode rows travel in one copy, chunks of prompts in another.

Decode rows come first, each with 1 + drafts queries; rows of padding behind them make their number one that a CUDA
graph exists for. A row may continue one of the step before, whose choice only the device knows (`Plan.sources`): then
its tokens are taken from `Feed`, and its place moves on by the drafts that were accepted.

Letters: B decode rows, Q queries of each, W pages per row, N tokens, R rows in all, C chunks of prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.inference.fused import Decode, Piece, Prefill, Tokens
from benthic.inference.scheduler import Plan
from benthic.kernels import decode_inputs

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
    """Cut the array apart and fill in what the device knows better. Queries that are not real see what is there."""
    tokens, first, context, table = decode_inputs.rows(data, queries, feed.ids[:, :queries], feed.gain, page_size)
    return DecodeRows(
        ids=tokens[0].view(-1, queries),
        counts=data[:, queries + 2],
        first=first,
        tokens=tokens,
        decode=Decode(len(data), queries, table, context),
    )


@dataclass(frozen=True)
class Chunks:
    """The prefill rows of a step: tokens [3, n] as above, next_ids [n], last [C] the place of each chunk's last token
    among them, their pages [C, W] int32, how they attend, and their lengths on the host."""

    tokens: Tensor
    next_ids: Tensor
    last: Tensor
    table: Tensor
    prefill: Prefill
    counts: list[int]


def chunk_rows(plan: Plan, page_size: int, send: Callable[[np.ndarray], Tensor]) -> Chunks:
    """Lay out the chunks of prompts: one array, which `send` copies to the device. Their contexts come in pieces of at
    most PIECE tokens."""
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
        np.concatenate([_slots(plan.seqs[rows[i]].pages, a, b, page_size) for i, (a, b) in piece.items()])
        for piece in pieces
    ]
    for piece in pieces:
        firsts += [np.cumsum([0, *(counts[i] for i in piece)]), np.cumsum([0, *(b - a for a, b in piece.values())])]
    table = np.zeros((len(rows), 1 + max(len(plan.seqs[row].pages) for row in rows)), np.int64)
    for i, row in enumerate(rows):
        table[i, : len(plan.seqs[row].pages)] = plan.seqs[row].pages
    flat = np.concatenate([np.concatenate(columns, 1).reshape(-1), table.reshape(-1), *held, *firsts]).astype(np.int64)
    data = send(flat)
    n = sum(counts)
    own, pages, *parts = data.split([4 * n, table.size, *map(len, held), *map(len, firsts)])
    tokens, starts = own.view(4, n), [part.int() for part in parts[len(held) :]]
    cached = []
    for i, piece in enumerate(pieces):
        begin, end = firsts[0][min(piece)], firsts[0][max(piece) + 1]
        cached.append(Piece(parts[i], starts[1 + 2 * i], starts[2 + 2 * i], int(begin), int(end)))
    return Chunks(
        tokens=tokens[:3],
        next_ids=tokens[3],
        last=parts[len(held)][1:] - 1,
        table=pages.view(table.shape).int(),
        prefill=Prefill(starts[0], max(counts), cached),
        counts=counts,
    )


def _slots(pages: list[int], start: int, end: int, page_size: int) -> np.ndarray:
    positions = np.arange(start, end)
    return np.array(pages or [0])[positions // page_size] * page_size + positions % page_size


def _pieces(contexts: list[int]) -> list[dict[int, tuple[int, int]]]:
    """Ranges of the rows' contexts, piece by piece, of neighbouring rows from the first to the last that has a part of
    it; each piece has at most PIECE tokens over all rows."""
    share = max(1, PIECE // max(1, sum(length > 0 for length in contexts)))
    pieces = []
    for a in range(0, max(contexts, default=0), share):
        some = [i for i, length in enumerate(contexts) if length > a]
        between = range(some[0], some[-1] + 1)
        pieces.append({i: (min(a, contexts[i]), min(a + share, contexts[i])) for i in between})
    return pieces


def joined(decode: DecodeRows | None, chunks: Chunks | None) -> Tokens:
    """Decode rows and chunks as one pass."""
    parts = [part.tokens for part in (decode, chunks) if part is not None]
    ids, positions, slots = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return Tokens(ids, positions, slots, decode and decode.decode, chunks and chunks.prefill)


def apart(decode: DecodeRows | None, chunks: Chunks | None) -> Tokens:
    """The same with every token as a decode row of its own, and all before it as its context: what is computed for it
    does not depend on which others are computed beside it."""
    tables = []
    if decode is not None:
        tables.append(decode.decode.table.repeat_interleave(decode.decode.queries, 0))
    if chunks is not None:
        of_token = torch.from_numpy(np.repeat(np.arange(len(chunks.table)), chunks.counts))
        tables.append(chunks.table[of_token.to(chunks.table.device)])
    ids, positions, slots = torch.cat([part.tokens for part in (decode, chunks) if part is not None], 1)
    width = max(table.shape[1] for table in tables)
    table = torch.cat([F.pad(table, (0, width - table.shape[1])) for table in tables])
    context = torch.where(slots > 0, positions + 1, 0).int()  # padding writes to slot 0 and sees nothing
    return Tokens(ids, positions, slots, Decode(len(ids), 1, table, context), None)
