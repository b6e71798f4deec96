import pytest
import torch
from torch import Tensor

from benthic.model.balance import (
    Balance,
    chosen_experts,
    device_load,
    expert_load,
    importance_loss,
    max_violation,
    sequence_balance_loss,
    update_bias,
)
from benthic.model.config import ModelConfig
from benthic.model.gate import Choice, Gate

B, T, E, K = 3, 6, 8, 2


def choice_of(scores: Tensor) -> Choice:
    """A choice whose topk_ids are deliberately not the top-K of the scores: the loss must not look at them."""
    flat = scores.reshape(-1, scores.shape[-1])
    ids = flat.topk(K, -1, largest=False).indices
    return Choice(flat, ids, flat.gather(1, ids))


@pytest.fixture
def scores() -> Tensor:
    return torch.rand(B, T, E, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.98 + 0.01


def loop(scores: Tensor, lengths: list[int]) -> float:
    """V3 Eq 17-20 without alpha, each sequence over its own first tokens, averaged over sequences."""
    losses = []
    for row, length in zip(scores.tolist(), lengths):
        loss = 0.0
        for i in range(E):
            hits, share = 0, 0.0
            for t in range(length):
                top = sorted(range(E), key=lambda j: -row[t][j])[:K]
                hits += i in top
                share += row[t][i] / sum(row[t])  # Eq 19
            f_i = E / (K * length) * hits  # Eq 18
            p_i = share / length  # Eq 20
            loss += f_i * p_i  # Eq 17
        losses.append(loss)
    return sum(losses) / len(losses)


def test_the_loss_equals_the_printed_equations(scores: Tensor) -> None:
    loss = sequence_balance_loss(choice_of(scores), (B, T), None).mean()
    assert loss.item() == pytest.approx(loop(scores, [T] * B), rel=1e-12)


@pytest.mark.parametrize("lengths", [[6, 4, 1], [1, 1, 6], [6, 6, 6]])
def test_padding_is_left_out(scores: Tensor, lengths: list[int]) -> None:
    valid = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)  # [B, T]
    loss = sequence_balance_loss(choice_of(scores), (B, T), valid.reshape(-1)).mean()
    assert loss.item() == pytest.approx(loop(scores, lengths), rel=1e-12)
    other = scores.clone()
    other[~valid] = other[~valid].flip(-1) * 0.1
    assert sequence_balance_loss(choice_of(other), (B, T), valid.reshape(-1)).mean().item() == pytest.approx(
        loss.item()
    )


def test_without_a_mask_padding_would_change_the_loss(scores: Tensor) -> None:
    loss = sequence_balance_loss(choice_of(scores), (B, T), None).mean().item()
    assert loss != pytest.approx(loop(scores, [6, 4, 1]), rel=1e-3)


def test_the_loss_is_taken_per_sequence_not_over_the_batch(scores: Tensor) -> None:
    per_sequence = sequence_balance_loss(choice_of(scores), (B, T), None).mean().item()
    as_one = sequence_balance_loss(choice_of(scores), (1, B * T), None).mean().item()
    assert per_sequence > as_one  # one long sequence is better balanced


def test_a_row_of_padding_only_is_finite_and_adds_nothing(scores: Tensor) -> None:
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[2] = False
    loss = sequence_balance_loss(choice_of(scores), (B, T), valid.reshape(-1)).mean()
    two = loop(scores[:2], [T, T]) * 2 / 3
    assert loss.item() == pytest.approx(two, rel=1e-12)


def test_perfect_balance_is_one_and_collapse_is_far_above() -> None:
    even = torch.full((1, E, E), 0.1)
    for t in range(E):
        even[0, t, [t, (t + 1) % E]] = 0.9  # every expert is among the best two equally often
    assert sequence_balance_loss(choice_of(even), (1, E), None).mean().item() == pytest.approx(1.0)
    collapsed = torch.full((1, E, E), 0.01)
    collapsed[0, :, :K] = 0.99
    assert sequence_balance_loss(choice_of(collapsed), (1, E), None).mean().item() > 3.5


def test_its_gradient_flows_through_the_shares_only(scores: Tensor) -> None:
    leaf = scores.clone().requires_grad_()
    sequence_balance_loss(choice_of(leaf), (B, T), None).mean().backward()
    with torch.no_grad():
        hits = torch.zeros_like(scores).scatter_(-1, scores.topk(K, -1).indices, 1.0)
        f = E / (K * T) * hits.sum(1, keepdim=True)  # constants
    other = scores.clone().requires_grad_()
    (f * other / other.sum(-1, keepdim=True)).sum(-1).mean().backward()  # f is constant over t, so means commute
    torch.testing.assert_close(leaf.grad, other.grad)


def test_minimising_the_loss_balances_the_scores() -> None:
    raw = torch.randn(1, 32, E, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, E)
    raw.requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=0.05)
    losses = []
    for _ in range(60):
        loss = sequence_balance_loss(choice_of(raw.sigmoid()), (1, 32), None).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1.15
    assert min(losses) < 1.05


def test_load_counts_every_choice_of_valid_tokens() -> None:
    ids = torch.tensor([[0, 1], [0, 3], [3, 0], [5, 4]])
    choice = Choice(torch.rand(4, E), ids, torch.rand(4, 2))
    assert expert_load(choice, E, None).tolist() == [3, 1, 0, 2, 1, 1, 0, 0]
    valid = torch.tensor([True, True, False, False])
    assert expert_load(choice, E, valid).tolist() == [2, 1, 0, 1, 0, 0, 0, 0]
    assert expert_load(choice, E, torch.zeros(4, dtype=torch.bool)).tolist() == [0] * E
    assert expert_load(choice, E, None).dtype == torch.int64


def test_the_bias_of_busy_experts_falls_and_of_idle_ones_rises_by_exactly_the_speed() -> None:
    bias = torch.tensor([0.5, 0.5, -0.25, 0.0])
    update_bias(bias, torch.tensor([9, 4, 0, 3]), speed=0.25)  # mean 4
    assert bias.tolist() == [0.25, 0.5, 0.0, 0.25]


def test_an_exactly_balanced_load_leaves_the_bias_alone_bit_for_bit() -> None:
    bias = torch.randn(E, generator=torch.Generator().manual_seed(0))
    before = bias.clone()
    update_bias(bias, torch.full((E,), 12345), speed=0.001)
    assert torch.equal(bias, before)


def test_speed_zero_freezes_the_bias() -> None:
    bias = torch.ones(4)
    update_bias(bias, torch.tensor([9, 4, 0, 3]), speed=0.0)
    assert bias.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("load", "expected"), [([4, 4, 4, 4], 0.0), ([16, 0, 0, 0], 3.0), ([6, 2, 4, 4], 0.5)], ids=str
)
def test_violation_is_the_excess_of_the_busiest_over_the_mean(load: list[int], expected: float) -> None:
    assert max_violation(torch.tensor(load)).item() == pytest.approx(expected)
    assert max_violation(torch.tensor([load, [1, 1, 1, 1]])).tolist() == pytest.approx([expected, 0.0])


def violation_after(steps: int, speed: float) -> tuple[float, float]:
    """MaxVio of the first and the last batch of a skewed gate whose bias is updated after every batch."""
    config = ModelConfig(hidden_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2)
    gate, generator = Gate(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(8, 16, generator=generator) * 0.3)
        gate.weight[:2] += 0.15  # two experts that everybody likes, since tokens have a positive mean
    violations = []
    for _ in range(steps):
        x = torch.randn(256, 16, generator=generator) + 0.5
        load = expert_load(gate(x), 8, None)
        violations.append(max_violation(load).item())
        update_bias(gate.e_score_correction_bias, load, speed)
    return violations[0], sum(violations[-10:]) / 10


def test_updating_the_bias_drives_violation_down() -> None:
    first, last = violation_after(steps=120, speed=0.01)
    assert first > 1.0
    assert last < 0.3


def test_without_the_update_violation_stays() -> None:
    first, last = violation_after(steps=120, speed=0.0)
    assert last > 0.8 * first


GROUPS, REACH = 4, 2  # devices of two experts


def v2_loops(scores: Tensor, ids: Tensor) -> dict[str, list[float]]:
    """V2 Eq 23-31 without their factors, sequence by sequence; ids [B, T, K] are the experts really chosen."""
    found: dict[str, list[float]] = {"experts": [], "devices": [], "communication": []}
    for row, chosen in zip(scores.tolist(), ids.tolist()):
        f = [E / (K * T) * sum(i in chosen[t] for t in range(T)) for i in range(E)]
        p = [sum(row[t][i] / sum(row[t]) for t in range(T)) / T for i in range(E)]
        members = [range(d * E // GROUPS, (d + 1) * E // GROUPS) for d in range(GROUPS)]
        f_device = [sum(f[j] for j in some) / len(some) for some in members]
        p_device = [sum(p[j] for j in some) for some in members]
        sent = [sum(any(j in chosen[t] for j in some) for t in range(T)) for some in members]
        f_sent = [GROUPS / (REACH * T) * n for n in sent]
        found["experts"].append(sum(a * b for a, b in zip(f, p)))
        found["devices"].append(sum(a * b for a, b in zip(f_device, p_device)))
        found["communication"].append(sum(a * b for a, b in zip(f_sent, p_device)))
    return found


def test_the_losses_of_v2_equal_the_printed_equations(scores: Tensor) -> None:
    choice = choice_of(scores)
    expected = v2_loops(scores, choice.topk_ids.view(B, T, K))
    ours = Balance.of(choice, chosen_experts(choice), (B, T), None)
    assert ours.experts(K).tolist() == pytest.approx(expected["experts"], rel=1e-12)
    assert ours.devices(K, GROUPS).tolist() == pytest.approx(expected["devices"], rel=1e-12)
    assert ours.communication(GROUPS, REACH).tolist() == pytest.approx(expected["communication"], rel=1e-12)


def test_the_losses_of_v2_leave_padding_out(scores: Tensor) -> None:
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[:, 4:] = False
    choice = choice_of(scores)
    ours = Balance.of(choice, chosen_experts(choice), (B, T), valid.reshape(-1))
    short = choice_of(scores[:, :4])
    alone = Balance.of(short, chosen_experts(short), (B, 4), None)
    for loss in (lambda b: b.experts(K), lambda b: b.devices(K, GROUPS), lambda b: b.communication(GROUPS, REACH)):
        torch.testing.assert_close(loss(ours), loss(alone))


def test_by_the_chosen_experts_and_by_unbiased_scores_differ_when_a_bias_chose(scores: Tensor) -> None:
    choice = choice_of(scores)
    chosen = Balance.of(choice, chosen_experts(choice), (B, T), None).experts(K)
    assert (chosen < sequence_balance_loss(choice, (B, T), None)).all()  # the worst were chosen


def test_the_importance_loss_is_the_squared_coefficient_of_variation(scores: Tensor) -> None:
    choice = choice_of(scores)
    importance = [0.0] * E
    for ids, weights in zip(choice.topk_ids.tolist(), choice.weights.tolist()):
        for i, g in zip(ids, weights):
            importance[i] += g
    mean = sum(importance) / E
    expected = sum((x - mean) ** 2 for x in importance) / E / mean**2
    assert importance_loss(choice, None).item() == pytest.approx(expected, rel=1e-12)


def test_the_importance_loss_leaves_padding_out_and_is_zero_when_all_are_equally_important(scores: Tensor) -> None:
    valid = torch.arange(B * T) < 10
    alone = choice_of(scores.reshape(1, -1, E)[:, :10])
    torch.testing.assert_close(importance_loss(choice_of(scores), valid), importance_loss(alone, None))
    even = Choice(torch.full((4, 4), 0.25), torch.arange(4).unsqueeze(1), torch.ones(4, 1))
    assert importance_loss(even, None) == 0


def test_the_importance_loss_pulls_gate_values_of_the_important_down() -> None:
    weights = torch.tensor([[0.9], [0.9], [0.1]], requires_grad=True)
    choice = Choice(torch.full((3, 2), 0.5), torch.tensor([[0], [0], [1]]), weights)
    (slope,) = torch.autograd.grad(importance_loss(choice, None), weights)
    assert (slope[:2] > 0).all()
    assert slope[2] < 0


def test_the_proportional_rule_moves_a_bias_by_how_far_its_load_is_from_the_mean() -> None:
    load = torch.tensor([40, 20, 0, 20])
    signed, proportional = torch.zeros(4), torch.zeros(4)
    update_bias(signed, load, 0.5)
    update_bias(proportional, load, 0.5, "proportional")
    assert signed.tolist() == [-0.5, 0.0, 0.5, 0.0]
    assert proportional.tolist() == [-0.5, 0.0, 0.5, 0.0]  # e / mean = -1, 0, 1, 0
    update_bias(proportional, torch.tensor([30, 20, 10, 20]), 0.5, "proportional")
    assert proportional.tolist() == [-0.75, 0.0, 0.75, 0.0]
    update_bias(proportional, torch.zeros(4, dtype=torch.int64), 0.5, "proportional")  # a gate that did not run
    assert proportional.tolist() == [-0.75, 0.0, 0.75, 0.0]


def test_device_load_sums_neighbouring_experts() -> None:
    load = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 6]])
    assert device_load(load, 3).tolist() == [[3, 7, 11], [0, 0, 6]]
    assert max_violation(device_load(load, 3)).tolist() == pytest.approx([11 / 7 - 1, 2.0])


def test_recomputing_activations_does_not_count_tokens_twice(model) -> None:
    """Loads come from the choices that the forward pass returns, not from a counter in the gate."""
    from torch.utils.checkpoint import checkpoint

    from benthic.model.block import Context

    ids = torch.arange(12).view(2, 6)
    context = Context.of(model.config, ids, None, None, None)
    x = model.embed(ids).detach().requires_grad_()
    runs = 0

    def block(x: Tensor) -> tuple[Tensor, Choice]:
        nonlocal runs
        runs += 1
        return model.layers[-1](x, context)

    out, choice = checkpoint(block, x, use_reentrant=False)  # type: ignore[misc]
    out.sum().backward()
    assert runs == 2
    assert expert_load(choice, model.config.n_routed_experts, None).sum() == 12 * model.config.num_experts_per_tok
