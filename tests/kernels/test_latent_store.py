"""The store kernel against plain torch, in every format, with strides, padding and poisoned surroundings."""

import pytest
import torch
from torch import Tensor

from benthic.kernels.latent import Latents, empty_latents, unpack

latent_store = pytest.importorskip("benthic.kernels.latent_store", reason="needs triton")

EPS = 1e-6
CASES = [("auto", torch.float32), ("auto", torch.bfloat16), ("fp8", torch.bfloat16), ("int6", torch.bfloat16)]


def problem(n: int, h: int, r: int, p: int, d: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + h + r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    turn = torch.randn(n, p // 2, generator=generator).to(device)
    slots = (torch.randperm(3 * n, generator=generator)[:n] + 1).to(device)
    return {
        "kv_a": normal(n, 24 + r + p)[:, 24:],  # a view, as the second part of a joined projection
        "weight": normal(r), "q": normal(n, h, d + p), "cos": turn.cos(), "sin": turn.sin(), "slots": slots,
        "w_uk": normal(h, d + 8, r)[:, :d],
    }  # fmt: skip


def poisoned(format: str, slots: int, r: int, p: int, dtype: torch.dtype, device: str) -> Latents:
    latents = empty_latents(format, slots, r, p, dtype, device)
    latents.k_rope.fill_(float("nan"))
    if latents.scales is None:
        latents.c_kv.fill_(float("nan"))
    else:
        latents.scales.fill_(float("nan"))
    return latents


@pytest.mark.parametrize(("format", "dtype"), CASES)
@pytest.mark.parametrize(
    ("n", "decoding", "h", "r", "p", "d"),
    [(3, 3, 2, 64, 16, 8), (2, 0, 20, 256, 8, 16), (6, 6, 2, 64, 16, 8), (3, 1, 2, 64, 16, 8)],
)
def test_cache_queries_and_dense_rows_equal_those_of_plain_torch(
    format, dtype, n, decoding, h, r, p, d, device
) -> None:
    given = problem(n, h, r, p, d, dtype, device)
    got, expected = (poisoned(format, 3 * n + 1, r, p, dtype, device) for _ in range(2))
    stored = latent_store.store(**given, eps=EPS, latents=got, decoding=decoding, block_r=32)
    plain = latent_store.store_ref(**given, eps=EPS, latents=expected, decoding=decoding)
    close = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(stored.q_rope, plain.q_rope, **close)
    torch.testing.assert_close(stored.q_latent, plain.q_latent, **close | {"atol": 5 * close["atol"]})
    assert (stored.dense is None) == (decoding == n)
    if stored.dense is not None:
        torch.testing.assert_close(stored.dense, plain.dense, **close)
    torch.testing.assert_close(got.k_rope, expected.k_rope, equal_nan=True, **close)  # NaN where nobody wrote
    step = {"auto": 1e-2, "fp8": 2**-3, "int6": 1 / 31}[format]  # a code may fall to the other side of a tie
    for left, right in zip(got.read(given["slots"], torch.float32), expected.read(given["slots"], torch.float32)):
        torch.testing.assert_close(left, right, rtol=step, atol=step * right.abs().max().item())


@pytest.mark.parametrize("format", ["fp8", "int6"])
def test_codes_and_scales_are_those_of_the_plain_format_bit_for_bit(format, device) -> None:
    """The dense output is what was quantised, so both sides start from the same numbers."""
    given = problem(4, 1, 128, 8, 8, torch.bfloat16, device)
    latents = poisoned(format, 13, 128, 8, torch.bfloat16, device)
    c_kv, k_rope = latent_store.store(**given, eps=EPS, latents=latents, decoding=0).dense
    plain = poisoned(format, 13, 128, 8, torch.bfloat16, device)
    plain.write(given["slots"], c_kv, k_rope)
    at = given["slots"]
    got, expected = (layer.c_kv[at].view(torch.uint8) for layer in (latents, plain))
    if format == "fp8" and device == "cpu":  # Triton's interpreter rounds ties up and loses the carry to the exponent
        assert (((got.int() - expected.int()).abs() <= 1) | ((expected & 7) == 0)).all()
    elif format == "fp8":  # torch on a GPU divides by 448 as a product with 1/448, one rounding more
        assert (got != expected).float().mean() < 0.01
    else:
        assert torch.equal(got, expected)
    rtol = 1e-6 if format == "fp8" and device == "cuda" else 0
    torch.testing.assert_close(latents.scales, plain.scales, rtol=rtol, atol=0, equal_nan=True)
    assert format == "fp8" or unpack(latents.c_kv[at]).unique().numel() > 16


def test_only_the_slots_given_are_written(device) -> None:
    given = problem(3, 2, 64, 8, 8, torch.float32, device)
    latents = poisoned("auto", 10, 64, 8, torch.float32, device)
    stored = latent_store.store(**given, eps=EPS, latents=latents, decoding=3)
    assert stored.dense is None
    assert stored.q_rope.isfinite().all()
    written = latents.c_kv.isfinite().all(-1) & latents.k_rope.isfinite().all(-1)
    assert written.nonzero().flatten().tolist() == sorted(given["slots"].tolist())


def test_padding_goes_to_slot_zero_and_no_token_is_no_launch(device) -> None:
    given = problem(3, 2, 64, 8, 8, torch.float32, device)
    given["slots"] = torch.tensor([0, 5, 0], device=device)
    latents = poisoned("auto", 10, 64, 8, torch.float32, device)
    latent_store.store(**given, eps=EPS, latents=latents, decoding=3)
    assert latents.c_kv.isfinite().all(-1).nonzero().flatten().tolist() == [0, 5]
    none = {name: value if name in ("weight", "w_uk") else value[:0] for name, value in given.items()}
    assert latent_store.store(**none, eps=EPS, latents=latents, decoding=0).q_rope.shape == (0, 2, 8)


def test_wrong_shapes_and_dtypes_are_refused(device) -> None:
    given = problem(3, 2, 64, 8, 8, torch.float32, device)
    latents = empty_latents("auto", 10, 64, 8, torch.float32, device)
    with pytest.raises(ValueError, match=r"slots has shape \(2,\), 3 tokens need \(3,\)"):
        latent_store.store(**given | {"slots": given["slots"][:2]}, eps=EPS, latents=latents, decoding=3)
    with pytest.raises(ValueError, match="use one dtype"):
        latent_store.store(**given | {"q": given["q"].bfloat16()}, eps=EPS, latents=latents, decoding=3)
    with pytest.raises(ValueError, match="each head contiguous"):
        latent_store.store(**given | {"w_uk": given["w_uk"][:, :4]}, eps=EPS, latents=latents, decoding=3)
    with pytest.raises(ValueError, match="use float32, float32, int64"):
        latent_store.store(**given | {"slots": given["slots"].int()}, eps=EPS, latents=latents, decoding=3)
