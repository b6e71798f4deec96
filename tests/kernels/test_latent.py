"""Cache formats: bounds on what rounding loses, and the bit layout against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benthic.kernels.latent import (
    Latents,
    bytes_per_token,
    dequantise,
    empty_latents,
    group_of,
    pack,
    quantise,
    unpack,
)

WIDTHS = [64, 128, 256, 512]


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 300.0]))
def test_int6_errs_by_at_most_half_a_step_of_its_group(width: int, seed: int, size: float) -> None:
    c_kv = random(5, width, seed=seed, size=size)
    codes, scales = quantise("int6", c_kv)
    assert scales is not None
    step = scales.float().repeat_interleave(64, -1)
    error = (dequantise("int6", codes, scales, torch.float32) - c_kv).abs()
    assert (error <= step * (0.5 + 31 * 2**-11) + 1e-12).all()  # the second term: the scale is rounded to float16


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(0, 1000), st.sampled_from([1e-6, 1.0, 1e4]))
def test_fp8_errs_by_at_most_half_a_step_of_e4m3(width: int, seed: int, size: float) -> None:
    c_kv = random(5, width, seed=seed, size=size)
    codes, scales = quantise("fp8", c_kv)
    assert scales is not None
    scale = scales.repeat_interleave(group_of("fp8", width), -1)
    error = (dequantise("fp8", codes, scales, torch.float32) - c_kv).abs()
    assert (error <= c_kv.abs() * 2**-4 + scale * 2**-10 + 1e-12).all()


@pytest.mark.parametrize("format", ["fp8", "int6"])
def test_each_group_has_its_own_scale(format: str) -> None:
    c_kv = torch.ones(2, 512)
    c_kv[:, : group_of(format, 512)] = 1000.0
    restored = dequantise(format, *quantise(format, c_kv), torch.float32)
    torch.testing.assert_close(restored, c_kv, rtol=2**-4, atol=0)


def test_the_scale_is_rounded_before_the_division() -> None:
    """With amax/31 between two float16 numbers, codes follow the stored scale, not the exact one."""
    c_kv = random(4000, 64, seed=3)
    codes, scales = quantise("int6", c_kv)
    assert scales is not None
    expected = (c_kv / scales.float() + 0.5).floor().clamp(-31, 31) + 32
    assert torch.equal(unpack(codes).float(), expected)
    exact = (c_kv / (c_kv.abs().amax(-1, keepdim=True) / 31) + 0.5).floor().clamp(-31, 31) + 32
    assert not torch.equal(expected, exact)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_bits_of_int6_lie_as_described(width: int) -> None:
    codes = torch.randint(0, 64, (width,), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    packed = pack(codes)
    assert len(packed) * 8 == width * 6
    for e in range(width):
        low = packed[e % (width // 2)].item() >> (4 * (e // (width // 2))) & 15
        upper = packed[width // 2 + e % (width // 4)].item() >> (2 * (e // (width // 4))) & 3
        assert low | upper << 4 == codes[e]
    assert torch.equal(unpack(packed), codes)


@pytest.mark.parametrize("format", ["auto", "fp8", "int6"])
def test_zeros_stay_zeros_with_finite_scales(format: str) -> None:
    codes, scales = quantise(format, torch.zeros(3, 128))
    assert scales is None or (scales.isfinite().all() and (scales > 0).all())
    assert not dequantise(format, codes, scales, torch.float32).any()


def test_int6_of_huge_and_tiny_numbers_is_finite() -> None:
    restored = dequantise("int6", *quantise("int6", torch.tensor([[3e38, 1e-30]]).repeat(2, 32)), torch.float32)
    assert restored.isfinite().all()


def test_bytes_of_a_token_of_v2_and_v3() -> None:
    assert [bytes_per_token(f, 512, 64) for f in ("auto", "fp8", "int6")] == [1152, 656, 528]


@pytest.mark.parametrize("format", ["auto", "fp8", "int6"])
def test_bytes_of_a_token_are_those_of_the_tensors(format: str) -> None:
    layer = empty_latents(format, 3, 256, 16, torch.bfloat16, "cpu")
    size = sum(t.nbytes for t in (layer.c_kv, layer.scales, layer.k_rope) if t is not None)
    assert size == 3 * bytes_per_token(format, 256, 16)


@pytest.mark.parametrize("format", ["auto", "fp8", "int6"])
def test_what_is_written_is_read_and_the_rotary_key_is_exact(format: str) -> None:
    layer = empty_latents(format, 10, 128, 16, torch.float32, "cpu")
    c_kv, k_rope, slots = random(3, 128), random(3, 16, seed=1), torch.tensor([7, 2, 9])
    layer.write(slots, c_kv, k_rope)
    read, rope = layer.read(slots, torch.float32)
    assert torch.equal(rope, k_rope)
    assert torch.equal(read, dequantise(format, *quantise(format, c_kv), torch.float32))
    assert not layer.read(torch.tensor([1, 3]), torch.float32)[0].any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="format 'int4' -> use one of auto, fp8, int6"):
        quantise("int4", torch.zeros(1, 64))
    with pytest.raises(ValueError, match="latent width 96 -> use a power of two from 64"):
        quantise("int6", torch.zeros(1, 96))
    rope = torch.zeros(4, 16)
    with pytest.raises(ValueError, match="scales are None with format 'fp8'"):
        Latents(format="fp8", c_kv=torch.zeros(4, 64).to(torch.float8_e4m3fn), scales=None, k_rope=rope)
    with pytest.raises(ValueError, match="give both the same slots"):
        Latents(format="auto", c_kv=torch.zeros(5, 64), scales=None, k_rope=rope)
    with pytest.raises(ValueError, match="contiguous"):
        Latents(format="auto", c_kv=torch.zeros(4, 128)[:, ::2], scales=None, k_rope=rope)
