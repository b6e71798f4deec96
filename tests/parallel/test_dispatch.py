import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benthic.parallel.dispatch import LocalDispatcher


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """topk_ids [N, K] with distinct experts per token, and the number of experts E."""
    experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, experts))
    rows = draw(st.lists(st.permutations(range(experts)), max_size=7))
    return torch.tensor([row[:k] for row in rows], dtype=torch.int64).reshape(-1, k), experts


@settings(max_examples=80, deadline=None)
@given(routings())
def test_rows_arrive_sorted_by_expert_and_each_choice_exactly_once(routing: tuple[Tensor, int]) -> None:
    topk_ids, experts = routing
    n, k = topk_ids.shape
    x = torch.arange(n, dtype=torch.float32).unsqueeze(1)  # each row carries its own number
    routed = LocalDispatcher().dispatch(x, topk_ids, experts)
    start = 0
    for expert, end in enumerate(routed.offs.tolist()):
        arrived = routed.x[start:end, 0].long().tolist()
        assert arrived == [token for token in range(n) if expert in topk_ids[token].tolist()]
        start = end
    assert start == n * k
    assert routed.offs.dtype == torch.int32
    assert sorted(routed.order.tolist()) == list(range(n * k))
    assert torch.equal(routed.order[routed.back], torch.arange(n * k))


@settings(max_examples=80, deadline=None)
@given(routings())
def test_combine_equals_the_plain_weighted_sum(routing: tuple[Tensor, int]) -> None:
    topk_ids, experts = routing
    n, k = topk_ids.shape
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, k, generator=generator, dtype=torch.float64)
    scale = torch.arange(1, experts + 1, dtype=torch.float64)  # expert e multiplies by e + 1
    dispatcher = LocalDispatcher()
    routed = dispatcher.dispatch(x, topk_ids, experts)
    expert_of_row = topk_ids.reshape(-1)[routed.order]
    out = dispatcher.combine(routed.x * scale[expert_of_row, None], routed, weights)
    plain = torch.zeros_like(x)
    for token in range(n):
        for slot in range(k):
            plain[token] += weights[token, slot] * scale[topk_ids[token, slot]] * x[token]
    torch.testing.assert_close(out, plain)


def through(x: Tensor, weights: Tensor, topk_ids: Tensor, matrices: Tensor) -> Tensor:
    """Dispatch, one matrix per expert, combine."""
    dispatcher = LocalDispatcher()
    routed = dispatcher.dispatch(x, topk_ids, len(matrices))
    expert_of_row = topk_ids.reshape(-1)[routed.order]
    y = torch.einsum("nd,nde->ne", routed.x, matrices[expert_of_row]).tanh()
    return dispatcher.combine(y, routed, weights)


def plain_through(x: Tensor, weights: Tensor, topk_ids: Tensor, matrices: Tensor) -> Tensor:
    """The same by ordinary indexing."""
    y = torch.einsum("nd,nkde->nke", x, matrices[topk_ids]).tanh()
    return torch.einsum("nke,nk->ne", y, weights)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(6, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    topk_ids = torch.tensor([[0, 1], [5, 0], [1, 3], [0, 5], [3, 1]])  # experts 2 and 4 receive nothing
    return x, weights, topk_ids, matrices


def test_gradients_agree_with_finite_differences(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weights, topk_ids, matrices = problem
    assert torch.autograd.gradcheck(lambda a, b, c: through(a, b, topk_ids, c), (x, weights, matrices))


def test_forward_and_gradients_equal_plain_indexing(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weights, topk_ids, matrices = problem
    upstream = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = (x, weights, matrices)
    ours, plain = through(x, weights, topk_ids, matrices), plain_through(x, weights, topk_ids, matrices)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(plain, inputs, upstream)):
        torch.testing.assert_close(a, b)


def test_experts_without_tokens_get_a_zero_gradient(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weights, topk_ids, matrices = problem
    (grad,) = torch.autograd.grad(through(x, weights, topk_ids, matrices).sum(), matrices)
    assert [bool(g.any()) for g in grad] == [True, True, False, True, False, True]


def test_two_runs_are_equal_bit_for_bit(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weights, topk_ids, matrices = (t.float() if t.is_floating_point() else t for t in problem)
    runs = []
    for _ in range(2):
        out = through(x, weights, topk_ids, matrices)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (x, weights, matrices))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_no_tokens_at_all_is_a_valid_input() -> None:
    dispatcher = LocalDispatcher()
    routed = dispatcher.dispatch(torch.empty(0, 4), torch.empty(0, 2, dtype=torch.int64), 3)
    assert routed.x.shape == (0, 4)
    assert routed.offs.tolist() == [0, 0, 0]
    assert dispatcher.combine(routed.x, routed, torch.empty(0, 2)).shape == (0, 4)
