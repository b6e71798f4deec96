"""Drawing from logits without laying out their weights: integers, 2^44 for the likeliest token, made anew from the
logits wherever they are needed.

Every cut (the k best, the best with a share p) keeps a beginning of one ranking: by the distance below the likeliest
logit, whose bits as an integer are the rank, then by id. So all cuts of a row together are two numbers, the last rank
that is kept and the last id at that rank. `_cut` finds them, a program per row, by walking down the rank's bits two at
a time, until one rank is left: at most 18 walks over the row, which lies in L2. Sums are of integers and exact in any
order.

Bytes: the logits once or twice from memory; `_cut` is bound by its arithmetic, some 60 instructions per token and walk.

Letters: R rows, V vocabulary, M blocks of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EVERY = 2**31 - 1  # rank of a row that keeps all


@triton.jit
def _amounts(row, i, V, top, heat, COUNT: tl.constexpr, HOT: tl.constexpr):
    """(rank, weight) of tokens i: the weight is 1 if COUNT; unless HOT, the temperature is 1."""
    inside = i < V
    below = tl.load(row + i, mask=inside, other=-float("inf")).to(tl.float32) - top
    rank = below.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if COUNT:
        weight = inside.to(tl.int64)
    else:
        weight = (tl.exp(tl.div_rn(below, heat) if HOT else below) * 17592186044416.0).to(tl.int64)
    return rank, weight


@triton.jit
def _cut(
    logits, peaks, heats, limits, edges, lasts, stride, V,
    COUNT: tl.constexpr, HOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Shortens what (edge, last) of each row keep. limits: how many (COUNT), or which share of the weight."""
    n = tl.program_id(0).to(tl.int64)
    limit = tl.load(limits + n)
    wanted = limit > 0 if COUNT else limit < 1
    if wanted:
        row, top, heat = logits + n * stride, tl.load(peaks + n), tl.load(heats + n)
        edge, last = tl.load(edges + n), tl.load(lasts + n)
        if COUNT:
            target = limit
        else:
            sums = tl.zeros([BLOCK], tl.int64)
            for start in range(0, V, BLOCK):
                i = start + tl.arange(0, BLOCK)
                rank, weight = _amounts(row, i, V, top, heat, COUNT, HOT)
                sums += tl.where((rank < edge) | ((rank == edge) & (i <= last)), weight, 0)
            target = tl.maximum(tl.ceil(limit * tl.sum(sums, 0).to(tl.float64)).to(tl.int64), 1)
        low, under = edge * 0, target * 0  # all ranks before low are kept, and weigh so much
        shift = edge * 0 + 30
        while shift >= 0:
            step = edge * 0 + 1 << shift
            one, two, three = low + step, low + 2 * step, low + 3 * step
            if shift == 30:  # a rank has 31 bits
                two, three = one, one
            sums_1, sums_2 = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
            sums_3 = tl.zeros([BLOCK], tl.int64)
            least, most = tl.full([BLOCK], 0x7FFFFFFF, tl.int32), tl.zeros([BLOCK], tl.int32)
            for start in range(0, V, BLOCK):
                i = start + tl.arange(0, BLOCK)
                rank, weight = _amounts(row, i, V, top, heat, COUNT, HOT)
                weight = tl.where((rank < edge) | ((rank == edge) & (i <= last)), weight, 0)
                sums_1 += tl.where(rank < one, weight, 0)
                sums_2 += tl.where(rank < two, weight, 0)
                sums_3 += tl.where(rank < three, weight, 0)
                here = (rank >= low) & ((rank - low) >> shift < 4)  # where the last rank must lie
                least = tl.minimum(least, tl.where(here, rank, 0x7FFFFFFF))
                most = tl.maximum(most, tl.where(here, rank, 0))
            under_1, under_2, under_3 = tl.sum(sums_1, 0), tl.sum(sums_2, 0), tl.sum(sums_3, 0)
            lowest, highest = tl.min(least, 0), tl.max(most, 0)
            if lowest == highest:  # one rank is left
                low, shift = lowest, edge * 0
            elif under_3 < target:
                low, under = three, under_3
            elif under_2 < target:
                low, under = two, under_2
            elif under_1 < target:
                low, under = one, under_1
            shift -= 2
        found, so_far = last * 0 + V, under
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            rank, weight = _amounts(row, i, V, top, heat, COUNT, HOT)
            upto = so_far + tl.cumsum(tl.where(rank == low, weight, 0), 0)
            found = tl.minimum(found, tl.min(tl.where((upto >= target) & (rank == low), i, V), 0))
            so_far = tl.max(upto, 0)
        tl.store(edges + n, low)
        tl.store(lasts + n, tl.minimum(found, tl.where(low == edge, last, V - 1)))


@triton.jit
def _weigh(
    logits, peaks, heats, edges, lasts, leasts, chosen, out, stride, V, M,
    SIZE: tl.constexpr, GROUP: tl.constexpr, SUM: tl.constexpr, HOT: tl.constexpr,
):  # fmt: skip
    """SUM: the weight of each of GROUP blocks of SIZE tokens; else the weights of the row's chosen block."""
    n = tl.program_id(0).to(tl.int64)
    row, top, heat = logits + n * stride, tl.load(peaks + n), tl.load(heats + n)
    edge, last, least = tl.load(edges + n), tl.load(lasts + n), tl.load(leasts + n)
    block = (
        tl.program_id(1) * GROUP + tl.arange(0, GROUP) if SUM else tl.load(chosen + n).to(tl.int32) + tl.arange(0, 1)
    )
    i = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    rank, weight = _amounts(row, i, V, top, heat, False, HOT)  # pyright: ignore[reportArgumentType]
    weight = tl.where(((rank < edge) | ((rank == edge) & (i <= last))) & (weight >= least), weight, 0)
    if SUM:
        tl.store(out + n * M + block, tl.sum(weight, 1), mask=block < M)
    else:
        tl.store(out + n * SIZE + tl.arange(0, SIZE)[None, :], weight)


class Weights:
    """logits [R, V] of any dtype, rows contiguous, their peaks [R] and temperatures [R] float32 (None: 1) -> weights.

    `cut_to` shortens what is kept, in the order of the calls; `sums` and `of_block` give int64 weights.
    """

    def __init__(self, logits: Tensor, peaks: Tensor, heats: Tensor | None, *, block: int = 4096, num_warps: int = 16):
        (r, self.v), device = logits.shape, logits.device
        if logits.stride(1) != 1:
            raise ValueError(f"logits have strides {logits.stride()} -> rows must be contiguous")
        for name, values in (("peaks", peaks), ("temperatures", peaks if heats is None else heats)):
            if values.shape != (r,) or values.dtype != torch.float32:
                raise ValueError(f"{name} {tuple(values.shape)} {values.dtype} for {r} rows -> float32, one per row")
        self.logits, self.peaks, self.hot = logits, peaks.contiguous(), heats is not None
        self.heats = self.peaks if heats is None else heats.contiguous()
        self.edges = torch.full((r,), EVERY, dtype=torch.int32, device=device)
        self.lasts = torch.full((r,), self.v - 1, dtype=torch.int32, device=device)
        self.leasts = torch.zeros(r, dtype=torch.int64, device=device)
        self.block, self.num_warps = min(block, triton.next_power_of_2(self.v)), num_warps

    def cut_to(self, limits: Tensor) -> None:
        """Keep the best of what is kept: int64 [R] how many (0: all), or float64 [R] with which share (1: all)."""
        if limits.shape != self.peaks.shape or limits.dtype not in (torch.int64, torch.float64):
            raise ValueError(f"limits {tuple(limits.shape)} {limits.dtype} for {len(self.peaks)} rows")
        _cut[(len(self.peaks),)](
            self.logits, self.peaks, self.heats, limits.contiguous(), self.edges, self.lasts, self.logits.stride(0),
            self.v, COUNT=limits.dtype == torch.int64, HOT=self.hot, BLOCK=self.block,
            num_warps=self.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip

    def sums(self, size: int) -> Tensor:
        """[R, ceil(V / size)]: of `size` tokens each, a power of two."""
        r, count = len(self.peaks), triton.cdiv(self.v, size)
        out = torch.empty(r, count, dtype=torch.int64, device=self.logits.device)
        group = max(1, 4096 // size)
        self._weigh(out, out, size, group, True, triton.cdiv(count, group))
        return out

    def of_block(self, chosen: Tensor, size: int) -> Tensor:
        """[R, size]: of the tokens of each row's chosen [R] int64 block."""
        out = torch.empty(len(self.peaks), size, dtype=torch.int64, device=self.logits.device)
        self._weigh(chosen.contiguous(), out, size, 1, False, 1)
        return out

    def _weigh(self, chosen: Tensor, out: Tensor, size: int, group: int, total: bool, programs: int) -> None:
        _weigh[len(self.peaks), programs](
            self.logits, self.peaks, self.heats, self.edges, self.lasts, self.leasts, chosen, out,
            self.logits.stride(0), self.v, out.shape[1],
            SIZE=size, GROUP=group, SUM=total, HOT=self.hot,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip


def weights_ref(
    logits: Tensor, peaks: Tensor, heats: Tensor | None, k: Tensor | None = None, share: Tensor | None = None
) -> Tensor:
    """[R, V] int64: after the cut to the k [R] best, then to those with `share` [R] of what is left, by sorting."""
    below = logits.float() - peaks[:, None]
    weights = ((below if heats is None else below / heats[:, None]).exp() * 2.0**44).long()
    order = below.argsort(descending=True, stable=True)
    ranked = weights.gather(1, order)
    if k is not None:
        ranked = torch.where(
            (torch.arange(logits.shape[1], device=k.device) < k[:, None]) | (k[:, None] == 0), ranked, 0
        )
    if share is not None:
        target = (share * ranked.sum(1)).ceil().long().clamp(min=1)[:, None]
        before = ranked.cumsum(1) - ranked
        ranked = torch.where((before < target) | (share[:, None] >= 1), ranked, 0)
    return torch.zeros_like(weights).scatter_(1, order, ranked)
