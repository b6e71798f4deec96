"""Block quantisation against loops over the blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benthic.kernels.quant import BLOCK, E4M3_MAX, dequantise_blocks, dequantise_rows, quantise_blocks, quantise_rows

SHAPES = [(128, 128), (256, 384), (576, 200), (1, 1), (130, 64), (10944 // 16, 129)]


def random(n: int, k: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_each_block_is_scaled_by_its_own_largest_magnitude(n: int, k: int) -> None:
    weight = random(n, k)
    quantised, scale = quantise_blocks(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    assert scale.shape == (-(-n // BLOCK), -(-k // BLOCK))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            assert scale[i, j] == block.abs().max() / E4M3_MAX
            expected = (block / scale[i, j]).to(torch.float8_e4m3fn)
            got = quantised[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            assert torch.equal(got.float(), expected.float())


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dequantising_multiplies_every_element_by_the_factor_of_its_block(n: int, k: int) -> None:
    quantised = random(n, k).to(torch.float8_e4m3fn)
    scale = random(-(-n // BLOCK), -(-k // BLOCK), seed=1).abs()
    out = dequantise_blocks(quantised, scale)
    rows, columns = torch.arange(n) // BLOCK, torch.arange(k) // BLOCK
    assert torch.equal(out, quantised.float() * scale[rows][:, columns])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1e-6, 1.0, 1e4]))
def test_the_error_stays_within_half_a_step_of_e4m3(n: int, k: int, size: float) -> None:
    weight = random(n, k, scale=size)
    quantised, scale = quantise_blocks(weight)
    error = (dequantise_blocks(quantised, scale) - weight).abs()
    largest = scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    assert (error <= weight.abs() * 2**-4 + largest * 2**-10 + 1e-12).all()


def test_a_block_of_zeros_has_a_finite_factor_and_stays_zero() -> None:
    quantised, scale = quantise_blocks(torch.zeros(200, 100))
    assert scale.isfinite().all()
    assert not dequantise_blocks(quantised, scale).any()


def test_a_grid_of_factors_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"factors have shape \(1, 1\), a weight of 129 x 128 needs \(2, 1\)"):
        dequantise_blocks(torch.zeros(129, 128).to(torch.float8_e4m3fn), torch.ones(1, 1))


@pytest.mark.parametrize(("n", "k"), [(3, 128), (2, 200), (1, 1), (2, 64), (3, 384)])
def test_each_row_has_a_factor_per_block_of_128_columns(n: int, k: int) -> None:
    x = random(n, k) * torch.logspace(-8, 4, n)[:, None]
    x[0] = 0.0
    codes, scale = quantise_rows(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (n, -(-k // BLOCK))
    for i in range(n):
        for j in range(scale.shape[1]):
            block, columns = x[i, j * BLOCK : (j + 1) * BLOCK], slice(j * BLOCK, (j + 1) * BLOCK)
            assert scale[i, j] == block.abs().max().clamp(min=1e-4) / E4M3_MAX
            assert torch.equal(codes[i, columns].float(), (block / scale[i, j]).to(torch.float8_e4m3fn).float())
            assert torch.equal(dequantise_rows(codes, scale)[i, columns], codes[i, columns].float() * scale[i, j])
