"""Random numbers without a state, and drawing with them.

A number is a function of a request's seed, of a place in its sequence and of a lane: SplitMix64 (Steele, Lea, Flood
2014), seeded twice over. Nothing is kept, so neither company nor preemption nor a wrong draft shifts anything.
"""

import torch
from torch import Tensor

from benthic.inference.select import in_blocks

GOLDEN, MIX_1, MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # as int64, which wraps around


def uniform(seed: Tensor, place: Tensor, lane: Tensor) -> Tensor:
    """float64 in (0, 1), both ends left out."""
    bits = _mix(_mix(_mix(seed + GOLDEN) + (place + 1) * GOLDEN) + (lane + 1) * GOLDEN)
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def draw(amounts: Tensor, seed: Tensor, place: Tensor) -> Tensor:
    """int64 amounts [..., V'], seed and place [...] -> ids [...], each with its share of the whole, those of amount 0
    never.

    A race between blocks of tokens, then between the tokens of the block that won. Each runs for an exponentially
    distributed time divided by its amount. So a change of some amounts changes the winner no more often than it must,
    up to a factor of 2 (the coupling of Gumbel maxima): like distributions draw alike with the same seed and place.
    """
    blocks = in_blocks(amounts)  # [..., blocks, size]
    count, size = blocks.shape[-2:]
    seed, place = seed.unsqueeze(-1), place.unsqueeze(-1)
    lanes = torch.arange(count + size, device=amounts.device)
    block = _race(blocks.sum(-1), uniform(seed, place, lanes[:count]))  # [..., 1]
    tokens = blocks.gather(-2, block.unsqueeze(-1).expand(*block.shape, size)).squeeze(-2)  # [..., size]
    return (block * size + _race(tokens, uniform(seed, place, lanes[count:]))).squeeze(-1)


def _race(amounts: Tensor, u: Tensor) -> Tensor:
    """The first to arrive [..., 1]. A runner of amount 0 needs infinitely long."""
    return (-u.log() / amounts).argmin(-1, keepdim=True)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """x >> by, filled with zeros."""
    return (x >> by) & (2 ** (64 - by) - 1)
