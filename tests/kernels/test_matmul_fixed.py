"""Products in one order: right, and the same bits for a token in any company."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")
from benthic.kernels.gemv import linear as fastest
from benthic.kernels.matmul_fixed import Tiles, linear, products, products_ref

pytestmark = pytest.mark.usefixtures("one_order")

SMALL = Tiles(tokens=64, outputs=32, depth=16, stretch=64)


def random(device: str, *shape: int) -> Tensor:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def close(found: Tensor, expected: Tensor) -> None:
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < (1e-2 if found.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 70, 300), (2, 37, 40, 64), (3, 20, 33, 130), (1, 5, 16, 20)], ids=str)
def test_products_equal_the_reference_whoever_adds_the_stretches(shape, device) -> None:
    g, n, m, d = shape
    x, weight = random(device, g, n, d), random(device, g, m, d)
    inside = products(x, weight, tiles=SMALL, apart=False)
    close(inside, products_ref(x, weight))
    assert torch.equal(products(x, weight, tiles=SMALL, apart=True), inside)


def test_a_tokens_products_are_the_same_bits_in_any_company(device) -> None:
    x, weight = random(device, 1, 50, 200), random(device, 1, 70, 200)
    whole = products(x, weight, tiles=SMALL)
    for begin, end in [(0, 1), (49, 50), (3, 20), (15, 48)]:
        assert torch.equal(products(x[:, begin:end], weight, tiles=SMALL), whole[:, begin:end])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(products(x[:, order], weight, tiles=SMALL), whole[:, order])


def test_the_fastest_way_does_not_promise_that(device) -> None:
    """The negative control: one token alone is summed by another kernel than among eight. Rounding to bfloat16 hides
    the difference in all but one of some thousand numbers."""
    x, weight = random(device, 8, 1000), random(device, 100_000 if device == "cuda" else 600, 1000)
    assert not torch.equal(fastest(x[:1], weight), fastest(x, weight)[:1])
    assert torch.equal(linear(x[:1], weight), linear(x, weight)[:1])


def test_a_token_that_is_no_number_stays_alone(device) -> None:
    x, weight = random(device, 1, 20, 64), random(device, 1, 40, 64)
    expected = products(x, weight, tiles=SMALL)
    x[0, 7] = torch.nan
    found = products(x, weight, tiles=SMALL)
    others = [i for i in range(20) if i != 7]
    assert torch.equal(found[:, others], expected[:, others])
    assert found[0, 7].isnan().all()


def test_weights_and_outputs_may_lie_in_any_order(device) -> None:
    """As W^UK, whose transpose is asked for, and as the output of W^UV, whose heads are neighbours."""
    x, weight = random(device, 9, 2, 48).transpose(0, 1), random(device, 2, 32, 40).transpose(1, 2)[:, :, :32]
    x = x[:, :, :32]
    out = torch.full((9, 2, 40), torch.nan, device=device, dtype=x.dtype)
    products(x, weight, out=out.transpose(0, 1), tiles=SMALL)
    assert torch.equal(out.transpose(0, 1), products(x.contiguous(), weight.contiguous(), tiles=SMALL))
    assert products(x[:, :0], weight).shape == (2, 0, 40)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [((1, 3, 16), (1, 4, 8), "must be"), ((1, 3, 16), (2, 4, 16), "must be")],
)
def test_shapes_that_do_not_fit_are_refused(x, weight, message, device) -> None:
    with pytest.raises(ValueError, match=message):
        products(random(device, *x), random(device, *weight))
    with pytest.raises(ValueError, match="the last must be 1"):
        products(random(device, 1, 16, 16).transpose(1, 2), random(device, 1, 4, 16))
