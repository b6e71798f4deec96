"""Linear layers with FP8 weights: every way against plain torch."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from benthic.kernels import linear_fp8
from benthic.kernels.linear_fp8 import Library, Rows, Tiles, choose, linear, linear_ref
from benthic.kernels.quant import quantise_blocks

pytestmark = pytest.mark.usefixtures("exact_fp8")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks(m: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """A weight whose blocks have factors much unlike each other."""
    codes, factors = quantise_blocks(random(m, d, seed=1))
    return codes.to(device), (factors * (random(*factors.shape, seed=2).abs() + 0.1)).to(device)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel leaves unwritten is NaN."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize(
    ("way", "n", "m", "d"),
    [
        (Rows(block=32), 1, 144, 256), (Rows(), 3, 130, 72), (Rows(block=128), 4, 33, 1160),
        (Tiles(), 5, 130, 136), (Tiles(), 16, 64, 128), (Tiles(block_m=128, block_n=32), 35, 272, 264),
        (Tiles(block_m=16, block_n=64, tall=True), 7, 130, 264), (Tiles(block_n=64, tall=True), 70, 136, 136),
    ],
)  # fmt: skip
def test_every_block_is_multiplied_by_its_own_factor(way: Rows | Tiles, n: int, m: int, d: int, device: str) -> None:
    weight, factors = blocks(m, d, device)
    wide = random(n, d + 8).to(device)  # rows further apart than they are long
    wide[:, d // 2 :] *= 5
    x = wide[:, :d]
    quantised = isinstance(way, Tiles)
    found, expected = linear(x, weight, factors, way=way), linear_ref(x, weight, factors, quantised=quantised)
    # Hopper's tensor cores keep fewer bits of sums of FP8 products than float32 has.
    assert error(found, expected) < (3e-4 if quantised and device == "cuda" else 1e-5)
    assert error(found, linear_ref(x, weight, factors, quantised=False)) < (5e-2 if quantised else 1e-5)
    if factors.numel() > 1:
        assert error(linear(x, weight, factors.flip(0).flip(1).contiguous(), way=way), expected) > 5e-2


@pytest.mark.parametrize("way", [Rows(block=64), Tiles()])
def test_a_token_does_not_see_its_neighbours(way: Rows | Tiles, device: str) -> None:
    weight, factors = blocks(64, 128, device)
    x = random(3, 128).to(device)
    alone = linear(x[1:2], weight, factors, way=way)
    x[0], x[2] = torch.nan, 1e9
    assert torch.equal(linear(x, weight, factors, way=way)[1:2], alone)


def test_few_tokens_go_row_by_row_and_only_hopper_has_the_librarys_product(device: str) -> None:
    weight, _ = blocks(64, 512, device)
    x = torch.zeros(32768, 512, dtype=torch.bfloat16, device=device)
    assert [type(choose(x[:n], weight)) for n in (1, 4, 5, 300)] == [Rows, Rows, Tiles, Tiles]
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    assert isinstance(choose(x, weight), Library if hopper else Tiles)
    assert isinstance(choose(x[:, :136], weight[:, :136]), Tiles)


def test_no_tokens_give_no_rows_and_misfits_are_refused(device: str) -> None:
    weight, factors = blocks(64, 136, device)
    assert linear(torch.zeros(0, 136, device=device), weight, factors).shape == (0, 64)
    with pytest.raises(ValueError, match="do not fit"):
        linear(torch.zeros(2, 128, device=device), weight, factors)
    with pytest.raises(ValueError, match=r"a weight of 64 x 136 needs \(1, 2\)"):
        linear(torch.zeros(2, 136, device=device), weight, factors[:, :1].contiguous())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the library's product needs a Hopper GPU")
def test_the_librarys_product_is_the_tiles() -> None:
    weight, factors = blocks(576, 1024, "cuda")
    x = random(1030, 1024).to("cuda", torch.bfloat16)
    expected = linear_ref(x, weight, factors, quantised=True)
    for way in (linear_fp8.Library(), Tiles(block_n=64)):
        assert error(linear(x, weight, factors, way=way), expected) < 1e-2
