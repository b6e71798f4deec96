"""The norm kernels against the model's RMSNorm."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from benthic.kernels.norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from benthic.model.linear import RMSNorm

EPS = 1e-6


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    norm = RMSNorm(len(weight), EPS).to(x.device)
    with torch.no_grad():
        norm.weight.copy_(weight)
        return norm(x)


def close(out: Tensor, expected: Tensor) -> None:
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-5 if out.dtype == torch.float32 else 2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(1, 16), (5, 64), (3, 100), (2, 513)])
def test_the_kernel_is_the_models_norm(n: int, d: int, dtype: torch.dtype, device: str) -> None:
    x, weight = random(n, d, dtype=dtype, device=device), random(d, dtype=dtype, device=device, seed=1)
    expected = plain(x, weight)
    close(rms_norm(x, weight, EPS), expected)
    close(rms_norm_ref(x, weight, EPS), expected)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_rounded_as_the_model_rounds_it_before_it_is_normed(
    dtype: torch.dtype, in_place: bool, device: str
) -> None:
    x, residual, weight = (random(4, 96, dtype=dtype, device=device, seed=i) * 3 for i in range(3))
    weight, before = weight[0], residual.clone()
    normed, total = add_rms_norm(x, residual, weight, EPS, in_place=in_place)
    if device == "cuda" or dtype == torch.float32:
        assert torch.equal(total, x + before)
    else:  # the interpreter cuts bfloat16 off instead of rounding it
        close(total, x + before)
    assert (total is residual) == in_place
    assert torch.equal(residual, total if in_place else before)
    close(normed, plain(total, weight))
    close(add_rms_norm_ref(x, before, weight, EPS)[0], plain(x + before, weight))


def test_rows_that_are_a_part_of_wider_rows_are_read_and_nothing_beside_them(device: str) -> None:
    wide = torch.full((3, 80), torch.nan, device=device)
    wide[:, 16:64] = random(3, 48, dtype=torch.float32, device=device)
    weight = random(48, dtype=torch.float32, device=device, seed=1)
    close(rms_norm(wide[:, 16:64], weight, EPS), plain(wide[:, 16:64], weight))
    sums = torch.full((3, 80), torch.nan, device=device)
    sums[:, 16:64] = 1.0
    _, total = add_rms_norm(wide[:, 16:64], sums[:, 16:64], weight, EPS, in_place=True)
    assert torch.equal(total, wide[:, 16:64] + 1.0)
    assert sums[:, :16].isnan().all()
    assert sums[:, 64:].isnan().all()


def test_a_row_does_not_depend_on_its_neighbours(device: str) -> None:
    x, weight = (random(4, 64, dtype=torch.bfloat16, device=device, seed=i) for i in range(2))
    weight = weight[0]
    assert torch.equal(rms_norm(x, weight, EPS)[2:3], rms_norm(x[2:3], weight, EPS))


def test_no_rows_give_no_rows(device: str) -> None:
    assert rms_norm(torch.empty(0, 16, device=device), torch.ones(16, device=device), EPS).shape == (0, 16)


def test_shapes_that_do_not_belong_together_are_refused(device: str) -> None:
    x, weight = torch.ones(2, 16, device=device), torch.ones(16, device=device)
    with pytest.raises(ValueError, match="shapes must agree"):
        rms_norm(x, weight[:8], EPS)
    with pytest.raises(ValueError, match="does not fit"):
        add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(ValueError, match="does not fit"):
        add_rms_norm(x, x.bfloat16(), weight, EPS)
