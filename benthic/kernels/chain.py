"""Kernels that are on the chip before the one before them has ended (programmatic dependent launch, from sm_90 on).

A step of few tokens is hundreds of short kernels, and between two of them the memory would stand still: the last
programs of one drain, the next is launched, and only then asks for its weights. In a chain a kernel may be put on the
chip as soon as every program of the one before has begun; it loads its weights there and waits with them.

The rule: a chained kernel calls `begin` first, and every one of its programs calls `wait` before it reads what a kernel
of this step has written, before it writes anything, and before it leaves. Ahead of `wait` it reads only what was there
when the last ordinary kernel was launched: weights, positions, page tables. Every step has ordinary kernels at its
head, so weights that were written in place, and results of other steps, are there. One exception: behind a kernel whose
programs call `begin` only after `wait`, a kernel also reads ahead of its own what the one before that kernel wrote,
because that one had ended. So the experts' second product knows whose weights to fetch while the first one runs.

Why that is enough, also for memory that is written again: when kernel n + 2 is on the chip, n may still run. But `wait`
lets n + 2 pass only when n + 1 has ended, and n + 1 could not end before its own programs had passed theirs, which was
after n had ended. So what stands behind `wait` comes after all kernels before, as in any stream, and what stands ahead
of it reads memory that nobody in the chain writes.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 64  # tokens; of more, kernels are long, and programs that wait take the place of programs that work


@triton.jit
def begin(CHAINED: tl.constexpr):
    """The next kernel may come onto the chip as soon as all programs have been here."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def wait(CHAINED: tl.constexpr):
    """Until the kernel before has ended and what it wrote can be seen. Costs nothing the second time."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]


def options(x: Tensor) -> dict[str, bool]:
    """What the launch of a chained kernel for tokens x [N, ...] needs beside its own arguments."""
    chained = len(x) <= MOST and _able(x.device)
    return {"CHAINED": chained, "launch_pdl": chained}


@functools.cache
def _able(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
