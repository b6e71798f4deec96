"""Finding tokens by sums of integer amounts, without sorting the vocabulary and without a wait for the device.

Sums of integers are exact, so that every result is the same in any company and on any device.

Letters: ... rows of any shape, V' vocabulary padded to whole blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE = 8192  # vocabulary from which on few rounds with large tables cost less than many with small ones
MAX_INT32 = 2**31 - 1


def block_of(vocab_size: int) -> int:
    """Tokens whose amounts are summed first. What is drawn depends on it, so it may not change."""
    return 512 if vocab_size >= WIDE else 32


def in_blocks(amounts: Tensor) -> Tensor:
    """amounts [..., V'] -> [..., blocks, size]; 0 behind the last."""
    size = block_of(amounts.shape[-1])
    if rest := amounts.shape[-1] % size:
        amounts = F.pad(amounts, (0, size - rest))
    return amounts.unflatten(-1, (-1, size))


def padded(logits: Tensor, best: Tensor) -> Tensor:
    """logits [..., V] minus best [..., 1] as [..., V'], with -inf behind the vocabulary."""
    vocab_size = logits.shape[-1]
    block = block_of(vocab_size)
    out = logits.new_empty(*logits.shape[:-1], -(-vocab_size // block) * block)
    torch.sub(logits, best, out=out[..., :vocab_size])
    out[..., vocab_size:] = -torch.inf
    return out


def locate(amounts: Tensor, target: Tensor) -> Tensor:
    """The first id [...] up to which the amounts [..., V'] sum to more than target [...]; the last where none do."""
    blocks = in_blocks(amounts)
    count, size = blocks.shape[-2:]
    sums = blocks.sum(-1)
    upto = sums.cumsum(-1)
    target = target.unsqueeze(-1)  # [..., 1]
    block = (upto <= target).sum(-1, keepdim=True).clamp(max=count - 1)  # [..., 1]
    target = target - upto.gather(-1, block) + sums.gather(-1, block)
    inner = blocks.gather(-2, block.unsqueeze(-1).expand(*block.shape, size)).squeeze(-2)  # [..., size]
    place = (inner.cumsum(-1) <= target).sum(-1, keepdim=True).clamp(max=size - 1)
    return (block * size + place).squeeze(-1).clamp(max=amounts.shape[-1] - 1)


def leading(below: Tensor, amounts: Tensor, target: Tensor) -> Tensor:
    """[..., V'] bool: the tokens, best first, before which the amounts sum to less than target [...] (at least 1).

    `below` [..., V'] ranks: 0 or negative, the largest best; equal ones rank by id. The last rank that is kept is found
    digit by digit from sums over all tokens with the same digit (a radix select), its last id by `locate`.
    """
    rank = below.view(torch.int32) & MAX_INT32  # the magnitude's bits, in the order of the magnitude
    width = 16 if below.shape[-1] >= WIDE else 8
    target = target.expand(below.shape[:-1]).unsqueeze(-1)
    prefix = torch.zeros_like(target, dtype=torch.int32)  # [..., 1] leading digits of the last rank
    left = amounts
    for shift in range(32 - width, -1, -width):
        digit = ((rank >> shift) & (2**width - 1)).long()
        sums = amounts.new_zeros(*amounts.shape[:-1], 2**width).scatter_add_(-1, digit, left)
        upto = sums.cumsum(-1)
        edge = (upto < target).sum(-1, keepdim=True).clamp(max=(MAX_INT32 >> shift) % 2**width)
        target = target - upto.gather(-1, edge) + sums.gather(-1, edge)
        prefix = (prefix << width) | edge.int()
        left = amounts * ((rank >> shift) == prefix)
    last = locate(left, target.squeeze(-1) - 1).unsqueeze(-1)
    ids = torch.arange(below.shape[-1], device=below.device)
    return (rank < prefix) | ((rank == prefix) & (ids <= last))
