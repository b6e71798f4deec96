import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
from benthic.kernels import likeliest, norm, speculate


@pytest.mark.parametrize(("rows", "width", "vocab_size", "block"), [(1, 61, 61, 16), (3, 100, 64, 32), (2, 40, 1, 64)])
def test_the_likeliest_token_and_its_logprob_are_those_of_the_whole_row(rows, width, vocab_size, block, device):
    logits = 5 * torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(device)
    ids, logprobs = likeliest.likeliest(logits, vocab_size, block=block)
    expected, numbers = likeliest.likeliest_ref(logits, vocab_size)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(logprobs, numbers, rtol=1e-5, atol=1e-5)


def test_the_lowest_id_wins_a_tie_and_ids_go_where_they_are_wanted(device):
    logits = torch.zeros(2, 90, device=device)
    logits[0, [41, 70]] = 2.0
    logits[1, 3] = -1.0
    out = torch.full((2, 3), -1, device=device)
    likeliest.likeliest(logits, 80, out[:, 1], block=32)
    assert out.tolist() == [[-1, 41, -1], [-1, 0, -1]]


def test_logits_that_are_no_numbers_give_an_id_that_exists_and_a_logprob_that_is_none(device):
    logits = torch.full((1, 50), torch.nan, device=device)
    ids, logprobs = likeliest.likeliest(logits, 50, block=16)
    assert 0 <= int(ids) < 50
    assert not logprobs.isfinite().any()


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


def test_angles_are_cosines_and_sines_at_any_distance(device):
    positions = torch.tensor([0, 1, 163_839, 77], device=device)
    frequencies = 10000.0 ** -(torch.arange(6, device=device) / 6)
    cos, sin = speculate.angles(positions, frequencies, 1.25)
    angle = positions.float().unsqueeze(1) * frequencies
    torch.testing.assert_close(cos, angle.cos() * 1.25, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sin, angle.sin() * 1.25, rtol=1e-4, atol=1e-5)
