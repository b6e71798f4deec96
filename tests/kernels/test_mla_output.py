"""Stretches of attention to heads' outputs, against combining and multiplying in plain torch."""

import pytest
import torch
from torch import Tensor

mla_output = pytest.importorskip("benthic.kernels.mla_output", reason="needs triton")

H, R, V = 3, 64, 24


def problem(n: int, splits: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """parts, lse, w_uv. Some stretches are without a token: an LSE of -inf, and nothing written."""
    generator = torch.Generator().manual_seed(n + splits)
    parts, lse = torch.randn(splits, n, H, R, generator=generator), torch.randn(splits, n, H, generator=generator) * 3
    empty = torch.rand(splits, n, H, generator=generator) < 0.3
    empty[:, 0, 0] = True  # a row of padding has no token anywhere
    lse[empty], parts[empty] = -torch.inf, torch.nan
    weight = torch.randn(H, V + 8, R, generator=generator)[:, 8:]
    return parts.to(device), lse.to(device), weight.to(device)


def expected(parts: Tensor, lse: Tensor, w_uv: Tensor) -> Tensor:
    weights = (lse * 0.6931471805599453).softmax(0).nan_to_num(0.0)
    latent = (parts.nan_to_num(0.0) * weights.unsqueeze(-1)).sum(0)  # [N, H, R]
    return torch.einsum("nhr,hvr->nhv", latent, w_uv)


@pytest.mark.parametrize(("n", "splits"), [(1, 3), (4, 8), (2, 40), (6, 3)])  # few; too many stretches; too many tokens
def test_the_outputs_are_those_of_plain_torch(n: int, splits: int, device: str) -> None:
    given = problem(n, splits, device)
    out = torch.full((n, H, V), torch.nan, device=device)
    mla_output.output(*given, out, block=16, chunk=32)
    torch.testing.assert_close(out, expected(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [2, 5])
def test_one_stretch_is_multiplied_as_it_is(n: int, device: str) -> None:
    latent, (_, _, w_uv) = torch.randn(H, n, R).to(device), problem(n, 1, device)
    out = torch.empty(n, H, V, device=device)
    mla_output.output(latent, None, w_uv, out)
    torch.testing.assert_close(out, torch.einsum("hnr,hvr->nhv", latent, w_uv), rtol=1e-4, atol=1e-4)


def test_a_token_does_not_see_its_neighbours(device: str) -> None:
    parts, lse, w_uv = problem(3, 4, device)
    both, alone = torch.empty(3, H, V, device=device), torch.empty(1, H, V, device=device)
    mla_output.output(parts, lse, w_uv, both)
    mla_output.output(parts[:, 1:2].contiguous(), lse[:, 1:2].contiguous(), w_uv, alone)
    assert torch.equal(both[1:2], alone)


def test_shapes_that_do_not_fit_are_refused(device: str) -> None:
    parts, lse, w_uv = problem(2, 2, device)
    with pytest.raises(ValueError, match="do not fit"):
        mla_output.output(parts, lse, w_uv, torch.empty(2, H, V + 1, device=device))
