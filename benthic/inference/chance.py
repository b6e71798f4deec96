"""Random numbers without a state, and drawing with them.

A number is a function of a request's seed, of a place in its sequence and of a lane: SplitMix64 (Steele, Lea, Flood
2014), seeded twice over. Nothing is kept, so neither company nor preemption nor a wrong draft shifts anything.
"""

from collections.abc import Callable

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
    never."""
    blocks = in_blocks(amounts)  # [..., blocks, size]
    size = blocks.shape[-1]

    def of_block(block: Tensor) -> Tensor:
        at = block[..., None, None]
        return blocks.gather(-2, at.expand(*at.shape[:-1], size)).squeeze(-2)

    return race(blocks.sum(-1), of_block, size, seed, place)


def race(
    sums: Tensor, of_block: Callable[[Tensor], Tensor], size: int, seed: Tensor, place: Tensor
) -> Tensor:  # fmt: skip
    """sums [..., M] of blocks of `size` tokens, of_block: [...] block numbers -> amounts [..., size] -> ids [...].

    A race between blocks of tokens, then between the tokens of the block that won. Each runs for an exponentially
    distributed time divided by its amount. So a change of some amounts changes the winner no more often than it must,
    up to a factor of 2 (the coupling of Gumbel maxima): like distributions draw alike with the same seed and place.
    """
    count = sums.shape[-1]
    seed, place = seed.unsqueeze(-1), place.unsqueeze(-1)
    lanes = torch.arange(count + size, device=sums.device)
    block = _first(sums, uniform(seed, place, lanes[:count]))
    return block * size + _first(of_block(block), uniform(seed, place, lanes[count:]))


def _first(amounts: Tensor, u: Tensor) -> Tensor:
    """The first to arrive [...]. A runner of amount 0 needs infinitely long."""
    return (-u.log() / amounts).argmin(-1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """x >> by, filled with zeros."""
    return (x >> by) & (2 ** (64 - by) - 1)
