import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
from benthic.kernels import norm, speculate


@pytest.mark.parametrize(("queries", "drafts"), [(1, 0), (1, 1), (3, 2), (4, 5)])
def test_rows_are_verified_and_find_their_next_places(queries, drafts, device):
    generator = torch.Generator().manual_seed(queries)
    rows, page_size = 40, 4
    ids = torch.randint(0, 2, (rows, queries + 2), generator=generator).to(device)[:, :queries]
    tokens = torch.randint(0, 2, (rows, queries), generator=generator).to(device)
    counts = torch.randint(0, queries + 1, (rows, 3), generator=generator).to(device)[:, 1]
    first = torch.randint(0, 16, (rows,), generator=generator).to(device)
    table = torch.randint(0, 9, (rows, 5), generator=generator).to(device, torch.int32)
    table[:, 4] = 0  # no page
    found = speculate.verify(ids, counts, tokens, first, table, drafts, page_size)
    expected = speculate.verify_ref(ids, counts, tokens, first, table, drafts, page_size)
    for name, one, two in zip(found._fields, found, expected):
        assert one.dtype == two.dtype, name
        assert torch.equal(one, two), name
    if queries > 1:
        assert len(set(found.accepted.tolist())) == queries


@pytest.mark.parametrize("picked", [False, True])
def test_the_modules_input_is_two_norms_side_by_side(picked, device):
    generator = torch.Generator().manual_seed(0)
    embedding, hidden = torch.randn(11, 24, generator=generator).to(device), torch.randn(6, 24).to(device)
    enorm, hnorm = (torch.rand(24, generator=generator).to(device) + 0.5 for _ in range(2))
    ids = torch.tensor([[3, 0], [9, 0], [3, 0], [0, 0], [1, 0], [2, 0]], device=device)[:, 0]  # strided
    at = torch.tensor([5, 0, 2], device=device)
    ids = ids[:3] if picked else ids
    got = speculate.module_input(embedding, ids, hidden, enorm, hnorm, (1e-6, 1e-5), at if picked else None)
    states = hidden[at] if picked else hidden
    parts = norm.rms_norm_ref(embedding[ids], enorm, 1e-6), norm.rms_norm_ref(states, hnorm, 1e-5)
    torch.testing.assert_close(got, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)
