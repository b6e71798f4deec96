"""A matrix times few vectors, against the plain product."""

import pytest
import torch

gemv = pytest.importorskip("benthic.kernels.gemv", reason="needs triton")


@pytest.mark.parametrize(("n", "d", "m"), [(1, 64, 33), (4, 72, 16), (3, 300, 5), (1, 1100, 9), (7, 64, 9), (0, 64, 8)])
def test_it_is_the_plain_product(n: int, d: int, m: int, device: str) -> None:
    generator = torch.Generator().manual_seed(n)
    wide = torch.randn(n, d + 8, generator=generator).to(device)  # rows further apart than they are long
    weight = torch.randn(m, d, generator=generator).to(device)
    out = gemv.linear(wide[:, :d], weight)
    torch.testing.assert_close(out, (wide[:, :d].double() @ weight.double().T).float(), rtol=1e-4, atol=1e-4)


def test_a_token_does_not_see_its_neighbours(device: str) -> None:
    x, weight = torch.randn(3, 64).to(device), torch.randn(12, 64).to(device)
    alone = gemv.linear(x[1:2], weight)
    x[0], x[2] = torch.nan, torch.inf
    assert torch.equal(gemv.linear(x, weight)[1:2], alone)


def test_shapes_that_do_not_fit_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="must share d"):
        gemv.linear(torch.zeros(2, 8).to(device), torch.zeros(4, 9).to(device))
