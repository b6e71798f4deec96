"""Weights made anew from the logits: the kernels against sorting, ties, rows without a limit."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from benthic.kernels.drawing import Weights, weights_ref

SIZE = 16


def problem(rows: int, vocab: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * 2).to(dtype)
    logits[:, 5] = logits[:, vocab // 2]  # ties
    heats = torch.rand(rows, generator=generator) + 0.5
    return logits.to(device), logits.float().amax(1).to(device), heats.to(device)


def whole(weights: Weights, vocab: int) -> Tensor:
    """All weights [R, V], block by block; their sums are checked on the way."""
    sums = weights.sums(SIZE)
    parts = [weights.of_block(torch.full((len(sums),), b, device=sums.device), SIZE) for b in range(sums.shape[1])]
    assert torch.equal(torch.stack([part.sum(1) for part in parts], 1), sums)
    return torch.cat(parts, 1)[:, :vocab]


def same(found: Tensor, expected: Tensor) -> None:
    """Which tokens are left, exactly; how much they weigh, but for the last bits of an exponential."""
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=2.0)


@pytest.mark.parametrize(("rows", "vocab", "dtype"), [(3, 100, torch.float32), (2, 64, torch.float16)])
def test_weights_and_both_cuts_are_those_of_sorting(rows: int, vocab: int, dtype: torch.dtype, device: str) -> None:
    given = problem(rows, vocab, device, dtype)
    same(whole(Weights(*given, block=32), vocab), weights_ref(*given))
    same(whole(Weights(*given[:2], None, block=32), vocab), weights_ref(*given[:2], None))
    for count, part in ((7, 1.0), (0, 0.8), (20, 0.5), (1, 1.0), (0, 1e-9), (1000, 0.999)):
        k = torch.full((rows,), count, device=device)
        share = torch.full((rows,), part, dtype=torch.float64, device=device)
        weights = Weights(*given, block=32)
        weights.cut_to(k)
        weights.cut_to(share)
        same(whole(weights, vocab), weights_ref(*given, k, share))


def test_of_equal_tokens_the_lower_ids_are_kept(device: str) -> None:
    logits = torch.zeros(1, 50, device=device)
    logits[0, [9, 30]] = 1.0
    weights = Weights(logits, torch.ones(1, device=device), torch.ones(1, device=device), block=16)
    weights.cut_to(torch.tensor([20], device=device))
    assert (whole(weights, 50)[0] > 0).nonzero().flatten().tolist() == [*range(19), 30]
    weights.cut_to(torch.tensor([7], device=device))
    assert (whole(weights, 50)[0] > 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 9, 30]


def test_ranks_that_differ_in_their_last_bit_alone_are_told_apart(device: str) -> None:
    """All tokens but the likeliest share the first 29 bits of their rank."""
    near = torch.full((64,), -1.0).view(torch.int32) + torch.arange(64, dtype=torch.int32) % 4
    logits = torch.cat((torch.zeros(1), near.view(torch.float32)))[None].to(device)
    peaks = torch.zeros(1, device=device)
    for count in (1, 2, 17, 18, 40, 64, 65, 66):
        k = torch.tensor([count], device=device)
        weights = Weights(logits, peaks, None, block=32)
        weights.cut_to(k)
        same(whole(weights, 65), weights_ref(logits, peaks, None, k))


def test_every_row_has_its_own_limit_and_the_least_weight_counts(device: str) -> None:
    given = problem(3, 80, device)
    k = torch.tensor([0, 4, 11], device=device)
    share = torch.tensor([0.6, 1.0, 0.9], dtype=torch.float64, device=device)
    weights = Weights(*given, block=32)
    weights.cut_to(k)
    weights.cut_to(share)
    expected = weights_ref(*given, k, share)
    same(whole(weights, 80), expected)
    weights.leasts += 2**40
    same(whole(weights, 80), torch.where(expected >= 2**40, expected, 0))


def test_misfits_are_refused(device: str) -> None:
    logits, peaks, heats = problem(2, 64, device)
    with pytest.raises(ValueError, match="float32, one per row"):
        Weights(logits, peaks.double(), heats)
    with pytest.raises(ValueError, match=r"peaks \(1,\)"):
        Weights(logits, peaks[:1], heats)
    with pytest.raises(ValueError, match="limits"):
        Weights(logits, peaks, heats).cut_to(heats)
