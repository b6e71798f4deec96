"""Drawing from logits without laying out their weights: integers, 2^44 for the likeliest token, made anew from the
logits wherever they are needed.

Every cut (the k best, the best with a share p) keeps a beginning of one ranking: by the distance below the likeliest
logit, whose bits as an integer are the rank, then by id. So all cuts of a row together are two numbers, the last rank
that is kept and the last id at that rank. `cut` finds them, a program per row, by walking down the rank's bits two at a
time; each of the 17 walks over the row reads it from L2. Sums are of integers and exact in any order.

Bytes: the logits once or twice from memory; `cut` is bound by exponentials and L2.

Letters: R rows, V vocabulary, M blocks of tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EVERY = 2**31 - 1  # rank of a row that keeps all


@triton.jit
def _amounts(row, i, V, top, heat, COUNT: tl.constexpr):
    """(rank, weight) of tokens i: the weight is 1 if COUNT."""
    inside = i < V
    below = tl.load(row + i, mask=inside, other=-float("inf")).to(tl.float32) - top
    rank = below.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if COUNT:
        weight = inside.to(tl.int64)
    else:
        weight = (tl.exp(tl.div_rn(below, heat)) * 17592186044416.0).to(tl.int64)
    return rank, weight


@triton.jit
def _cut(
    logits, peaks, heats, limits, edges, lasts, stride, V, COUNT: tl.constexpr, BLOCK: tl.constexpr,
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
                rank, weight = _amounts(row, i, V, top, heat, COUNT)
                sums += tl.where((rank < edge) | ((rank == edge) & (i <= last)), weight, 0)
            target = tl.ceil(limit * tl.sum(sums, 0).to(tl.float64)).to(tl.int64)
            target = tl.maximum(target, 1)
        low, under = edge * 0, target * 0  # the last rank kept so far, and the weight of all ranks before it
        for step in range(16):
            shift = 30 - 2 * step
            first, second, third = low + (1 << shift), low + (2 << shift), low + (3 << shift)
            sums_1, sums_2 = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
            sums_3 = tl.zeros([BLOCK], tl.int64)
            for start in range(0, V, BLOCK):
                i = start + tl.arange(0, BLOCK)
                rank, weight = _amounts(row, i, V, top, heat, COUNT)
                weight = tl.where((rank < edge) | ((rank == edge) & (i <= last)), weight, 0)
                sums_1 += tl.where(rank < first, weight, 0)
                sums_2 += tl.where(rank < second, weight, 0)
                sums_3 += tl.where(rank < third, weight, 0)
            one, two, three = tl.sum(sums_1, 0), tl.sum(sums_2, 0), tl.sum(sums_3, 0)
            if step > 0:  # a rank has 31 bits: of the first two only the lower counts
                if three < target:
                    low, under = third, three
                elif two < target:
                    low, under = second, two
                elif one < target:
                    low, under = first, one
            elif one < target:
                low, under = first, one
        found, so_far = last * 0 + V, under
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            rank, weight = _amounts(row, i, V, top, heat, COUNT)
            upto = so_far + tl.cumsum(tl.where(rank == low, weight, 0), 0)
            found = tl.minimum(found, tl.min(tl.where((upto >= target) & (rank == low), i, V), 0))
            so_far = tl.max(upto, 0)
        tl.store(edges + n, low)
        tl.store(lasts + n, tl.minimum(found, tl.where(low == edge, last, V - 1)))


@triton.jit
def _weigh(
    logits, peaks, heats, edges, lasts, leasts, chosen, out, stride, V, M,
    SIZE: tl.constexpr, GROUP: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """SUM: the weight of each of GROUP blocks of SIZE tokens; else the weights of the row's chosen block."""
    n = tl.program_id(0).to(tl.int64)
    row, top, heat = logits + n * stride, tl.load(peaks + n), tl.load(heats + n)
    edge, last, least = tl.load(edges + n), tl.load(lasts + n), tl.load(leasts + n)
    block = (
        tl.program_id(1) * GROUP + tl.arange(0, GROUP) if SUM else tl.load(chosen + n).to(tl.int32) + tl.arange(0, 1)
    )
    i = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    rank, weight = _amounts(row, i, V, top, heat, False)  # pyright: ignore[reportArgumentType]
    weight = tl.where(((rank < edge) | ((rank == edge) & (i <= last))) & (weight >= least), weight, 0)
    if SUM:
        tl.store(out + n * M + block, tl.sum(weight, 1), mask=block < M)
    else:
        tl.store(out + n * SIZE + tl.arange(0, SIZE)[None, :], weight)


class Weights:
    """logits [R, V] of any dtype, rows contiguous, and their peaks [R] and temperatures [R] float32 -> weights, cut.

    `cut_to` shortens what is kept, in the order of the calls; `sums` and `of_block` give int64 weights.
    """

    def __init__(self, logits: Tensor, peaks: Tensor, heats: Tensor, *, block: int = 4096, num_warps: int = 16):
        (r, self.v), device = logits.shape, logits.device
        if logits.stride(1) != 1 or peaks.shape != (r,) or heats.shape != (r,):
            raise ValueError(f"logits {tuple(logits.shape)}, peaks {tuple(peaks.shape)}, heats {tuple(heats.shape)}")
        if peaks.dtype != torch.float32 or heats.dtype != torch.float32:
            raise ValueError(f"peaks are {peaks.dtype}, heats {heats.dtype} -> use float32")
        self.logits, self.peaks, self.heats = logits, peaks.contiguous(), heats.contiguous()
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
            self.v, COUNT=limits.dtype == torch.int64, BLOCK=self.block,
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
            SIZE=size, GROUP=group, SUM=total,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip


def weights_ref(
    logits: Tensor, peaks: Tensor, heats: Tensor, k: Tensor | None = None, share: Tensor | None = None
) -> Tensor:
    """[R, V] int64: after the cut to the k [R] best, then to those with `share` [R] of what is left, by sorting."""
    below = logits.float() - peaks[:, None]
    weights = ((below / heats[:, None]).exp() * 2.0**44).long()
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
