"""The likeliest token: the kernel against plain torch, ties, forbidden ids, rows that are not numbers."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from benthic.kernels.likeliest import likeliest, likeliest_ref


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel leaves unwritten is NaN, or an id far outside."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = shape[0] if isinstance(shape[0], tuple) else shape
        return torch.full(size, torch.nan if dtype.is_floating_point else 1 << 30, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "allowed"), [((3, 300), 300), ((2, 2, 130), 97), ((1, 64), 1), ((5, 1, 17), 17)])
def test_it_is_the_reference(shape: tuple[int, ...], allowed: int, dtype: torch.dtype, device: str) -> None:
    logits = random(*shape).to(device, dtype)
    found = likeliest(logits, allowed, stretch=64)
    expected = likeliest_ref(logits, allowed)
    assert torch.equal(found[0], expected[0])
    for mine, plain in zip(found[1:], expected[1:], strict=True):
        assert mine.shape == shape[:-1]
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5)


def test_of_equal_logits_the_lowest_id_wins_within_a_stretch_and_across(device: str) -> None:
    logits = torch.zeros(4, 200, device=device)
    logits[0, [70, 71, 199]] = 1
    logits[1, [3, 150]] = 1
    logits[2, [128, 190]] = 1
    assert likeliest(logits, 200, stretch=64)[0].tolist() == [70, 3, 128, 0]
    assert likeliest(logits, 64, stretch=64)[0].tolist() == [0, 3, 0, 0]


def test_a_row_has_the_same_bits_alone_and_in_company(device: str) -> None:
    logits = random(9, 333).to(device)
    together = likeliest(logits, 300, stretch=64)
    for row in range(9):
        for one, every in zip(likeliest(logits[row : row + 1], 300, stretch=64), together, strict=True):
            assert torch.equal(one[0], every[row])


def test_minus_infinity_is_never_chosen_and_nan_gives_nan_and_an_id_that_exists(device: str) -> None:
    logits = torch.full((4, 200), -torch.inf, device=device)
    logits[0, 130] = -3.0
    logits[1, :] = torch.nan
    logits[2, :] = 1.0
    logits[2, 150] = torch.nan
    tokens, logprobs, peak, log_sum = likeliest(logits, 100 + 50, stretch=64)
    assert tokens[0] == 130
    assert logprobs[0] == 0
    assert (peak[0], log_sum[0]) == (-3, 0)
    assert 0 <= tokens.min() <= tokens.max() < 150
    assert not logprobs[1:].isfinite().any()


def test_misfits_are_refused_and_no_rows_give_no_rows(device: str) -> None:
    logits = random(2, 8).to(device)
    assert [t.shape for t in likeliest(logits[:0], 8)] == [(0,)] * 4
    with pytest.raises(ValueError, match="allowed=9 of 8 logits"):
        likeliest(logits, 9)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        likeliest(logits.T, 2)
