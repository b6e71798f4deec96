"""Rows of a decode step and their angles, against plain torch."""

import pytest
import torch

decode_inputs = pytest.importorskip("benthic.kernels.decode_inputs", reason="needs triton")

PAGE = 16


@pytest.mark.parametrize(("queries", "width"), [(1, 5), (3, 40)])
def test_rows_are_those_of_plain_torch(queries: int, width: int, device: str) -> None:
    """New rows and continued ones, rows with fewer real queries than others, padding, the end of the last page."""
    data = torch.zeros(6, queries + 3 + width, dtype=torch.int64)
    data[:, :queries] = torch.arange(6 * queries).view(6, queries)
    data[:, queries] = torch.tensor([-1, 2, 0, -1, 1, -1])
    data[:, queries + 1] = torch.tensor([0, 15, 7, width * PAGE - queries, 3, 0])
    data[:, queries + 2] = torch.tensor([1, queries, 1, queries, queries, 0])
    data[:, queries + 3 :] = torch.randperm(6 * width).view(6, width) + 1
    feed, gain = 100 + torch.arange(4 * queries).view(4, queries), torch.tensor([1, 0, 2, 5])
    given = (data.to(device), queries, feed.to(device), gain.to(device), PAGE)
    for mine, plain in zip(decode_inputs.rows(*given), decode_inputs.rows_ref(*given), strict=True):
        assert torch.equal(mine, plain)
        assert mine.dtype == plain.dtype


def test_angles_are_those_of_plain_torch(device: str) -> None:
    positions = torch.tensor([0, 1, 17, 4095, 163_839], device=device)
    frequencies = 10_000.0 ** -(torch.arange(12, device=device) / 12)
    for mine, plain in zip(
        decode_inputs.angles(positions, frequencies, 1.25), decode_inputs.angles_ref(positions, frequencies, 1.25)
    ):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(device: str) -> None:
    data, feed = (
        torch.zeros(2, 6, dtype=torch.int64, device=device),
        torch.zeros(2, 1, dtype=torch.int64, device=device),
    )
    with pytest.raises(ValueError, match="do not fit"):
        decode_inputs.rows(data, 2, feed, feed[:, 0], PAGE)
    with pytest.raises(ValueError, match="use int64"):
        decode_inputs.rows(data, 1, feed, feed[:, 0].int(), PAGE)
