"""Contexts of chunks, cut into pieces that belong to the rows which have them."""

import pytest

packed = pytest.importorskip("benthic.inference.packed", reason="needs triton")


@pytest.mark.parametrize(
    ("contexts", "expected"),
    [
        ([], []),
        ([0, 0], []),
        ([0, 9, 0], [{1: (0, 8)}, {1: (8, 9)}]),
        ([3, 0, 6, 0], [{0: (0, 3), 1: (0, 0), 2: (0, 4)}, {2: (4, 6)}]),
    ],
)
def test_a_piece_belongs_to_the_rows_from_the_first_to_the_last_that_has_a_part_of_it(
    contexts: list[int], expected: list[dict[int, tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "PIECE", 8)
    assert packed._pieces(contexts) == expected
