"""Prefill attention: the kernel against plain torch, rows of any length, and a context taken in pieces."""

import pytest
import torch
from torch import Tensor

mla_prefill = pytest.importorskip("benthic.kernels.mla_prefill", reason="needs triton")

H, D, P, V = 3, 32, 16, 32
SCALE = 0.2


def problem(q_lens: list[int], k_lens: list[int], device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(q_lens))
    n, s = sum(q_lens), sum(k_lens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    q = normal(n, H, D + P)  # queries as a projection leaves them: the plain part is a view with longer strides
    starts = [
        torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device) for lens in (q_lens, k_lens)
    ]
    return {
        "q_nope": q[..., :D], "q_rope": normal(n, H, P), "kv": normal(s, H, D + V), "k_rope": normal(s, P),
        "first_q": starts[0], "first_k": starts[1],
    }  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("q_lens", "k_lens"),
    [([1], [1]), ([40], [40]), ([17, 3, 33], [17, 3, 33]), ([5, 20], [37, 20]), ([0, 9], [4, 9]), ([16], [64])],
)
def test_the_kernel_equals_plain_attention(q_lens, k_lens, causal, device) -> None:
    given = problem(q_lens, k_lens, device)
    out, lse = mla_prefill.mla_prefill(
        **given, longest_q=max(q_lens), scale=SCALE, causal=causal, block_m=16, block_n=16, num_warps=4
    )
    expected, norm = mla_prefill.mla_prefill_ref(**given, scale=SCALE, causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, norm, rtol=1e-4, atol=1e-5)


def test_a_context_in_pieces_joined_by_log_sum_exp_equals_the_whole(device) -> None:
    """A chunk looks at itself causally, at two pieces of its context freely; a row may have no context in a piece."""
    q_lens, context = [6, 9], [21, 0]
    whole = problem(q_lens, [c + q for c, q in zip(context, q_lens)], device)
    expected, norm = mla_prefill.mla_prefill_ref(**whole, scale=SCALE, causal=True)
    starts = whole["first_k"].tolist()

    def over(pieces: list[tuple[int, int]], causal: bool):
        kv = torch.cat([whole["kv"][a:b] for a, b in pieces])
        k_rope = torch.cat([whole["k_rope"][a:b] for a, b in pieces])
        lens = torch.tensor([0, *(b - a for a, b in pieces)], dtype=torch.int32)
        part = whole | {"kv": kv, "k_rope": k_rope, "first_k": lens.cumsum(0, dtype=torch.int32).to(device)}
        return mla_prefill.mla_prefill(
            **part, longest_q=9, scale=SCALE, causal=causal, block_m=16, block_n=16, num_warps=4
        )

    own = over([(s + c, e) for s, e, c in zip(starts, starts[1:], context)], True)
    first = over([(s, s + min(c, 10)) for s, c in zip(starts, context)], False)
    rest = over([(s + min(c, 10), s + c) for s, c in zip(starts, context)], False)
    plain = mla_prefill.merge_ref(mla_prefill.merge_ref(own, first), rest)
    for part in (first, rest):
        mla_prefill.merge(*own, *part)
    for out, lse in (own, plain):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, norm, rtol=1e-4, atol=1e-5)


def test_a_part_joins_the_tokens_that_it_belongs_to_and_leaves_the_others(device) -> None:
    """Some see no key in one of the two, or in both, and one sees far likelier ones."""
    generator = torch.Generator().manual_seed(0)
    out, part = (torch.randn(40, H, V, generator=generator).to(device) for _ in range(2))
    lse, part_lse = (10 * torch.randn(H, 40, generator=generator).to(device) for _ in range(2))
    lse[:, 3:6], part_lse[:, 5:8] = -torch.inf, -torch.inf
    expected, joint = mla_prefill.merge_ref((out.clone(), lse.clone()), (part, part_lse))
    joined, norm, rows = out.clone(), lse.clone(), slice(2, 21)
    mla_prefill.merge(joined[rows], norm[:, rows], part[rows], part_lse[:, rows])
    seen = torch.ones(40, dtype=torch.bool, device=device)
    seen[5] = False  # nowhere a key: its output is of no meaning
    inside = torch.zeros_like(seen)
    inside[rows] = True
    torch.testing.assert_close(joined[inside & seen], expected[inside & seen], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm[:, inside], joint[:, inside], rtol=1e-4, atol=1e-5)
    assert torch.equal(joined[~inside], out[~inside])
    assert torch.equal(norm[:, ~inside], lse[:, ~inside])
    with pytest.raises(ValueError, match="cannot be joined"):
        mla_prefill.merge(joined, norm, part[rows], part_lse[:, rows])


def test_what_does_not_belong_to_a_row_is_not_read(device) -> None:
    given = problem([7, 8], [7, 8], device)
    expected, _ = mla_prefill.mla_prefill_ref(**given, scale=SCALE, causal=True)
    given["kv"][7:], given["k_rope"][7:], given["q_rope"][7:] = torch.nan, torch.nan, torch.nan
    out, _ = mla_prefill.mla_prefill(
        **given, longest_q=8, scale=SCALE, causal=True, block_m=16, block_n=16, num_warps=4
    )
    torch.testing.assert_close(out[:7], expected[:7], rtol=1e-4, atol=1e-5)


def test_tensors_that_do_not_fit_are_refused(device) -> None:
    given = problem([4], [4], device)
    with pytest.raises(ValueError, match="do not belong together"):
        mla_prefill.mla_prefill(**given | {"k_rope": given["k_rope"][1:]}, longest_q=4, scale=1.0, causal=True)
    with pytest.raises(ValueError, match="contiguous"):
        mla_prefill.mla_prefill(**given | {"q_rope": given["q_nope"][..., :P]}, longest_q=4, scale=1.0, causal=True)
