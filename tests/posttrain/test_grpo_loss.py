"""The GRPO loss equals the paper's equations computed in loops, and its gradient is the one that the paper derives."""

import random

import pytest
import torch

from benthic.posttrain.advantage import group_relative, without_spread
from benthic.posttrain.losses import grpo
from benthic.posttrain.reward import rule_reward
from benthic.tasks.task import Grade

EPSILON, BETA = 0.2, 0.04


class Group:
    """Sequences of uneven length with log-probabilities of three models, flat [M] and nested."""

    def __init__(self, seed: int, spread: float = 0.4):
        rng = random.Random(seed)
        self.lengths = [rng.randrange(1, 9) for _ in range(6)]
        self.advantages = [rng.gauss(0, 1) for _ in self.lengths]
        g = torch.Generator().manual_seed(seed)
        m = sum(self.lengths)
        self.logprobs = -3 * torch.rand(m, generator=g)
        self.old = self.logprobs + spread * torch.randn(m, generator=g)
        self.ref = self.logprobs + spread * torch.randn(m, generator=g)
        self.flat_advantages = torch.tensor([a for a, n in zip(self.advantages, self.lengths) for _ in range(n)])
        self.weights = torch.tensor([1 / (n * len(self.lengths)) for n in self.lengths for _ in range(n)])

    def loss(self, logprobs: torch.Tensor):
        return grpo(logprobs, self.old, self.ref, self.flat_advantages, self.weights, EPSILON, BETA)

    def in_loops(self, logprobs: torch.Tensor) -> torch.Tensor:
        """DeepSeekMath Eq 3 and 4, token by token, in float64."""
        total, t = torch.zeros((), dtype=torch.float64), 0
        for length, advantage in zip(self.lengths, self.advantages):
            sequence = torch.zeros((), dtype=torch.float64)
            for _ in range(length):
                now, old, ref = (x[t].double() for x in (logprobs, self.old, self.ref))
                ratio, gap = torch.exp(now) / torch.exp(old), torch.exp(ref) / torch.exp(now)
                clipped = torch.clamp(ratio, 1 - EPSILON, 1 + EPSILON)
                sequence = sequence + torch.min(ratio * advantage, clipped * advantage)
                sequence = sequence - BETA * (gap - torch.log(gap) - 1)
                t += 1
            total = total + sequence / length
        return total / len(self.lengths)


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_the_printed_objective_in_loops_with_its_sign_turned(seed):
    group = Group(seed)
    one, two = group.logprobs.clone().requires_grad_(), group.logprobs.clone().requires_grad_()
    loss, _ = group.loss(one)
    objective = group.in_loops(two)
    assert loss.item() == pytest.approx(-objective.item(), rel=1e-5, abs=1e-6)
    (got,), (expected,) = torch.autograd.grad(loss, one), torch.autograd.grad(-objective, two)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_on_policy_the_gradient_coefficient_is_advantage_plus_beta_times_ratio_minus_one():
    """DeepSeekMath Eq 21: with pi_old = pi, d objective / d log pi_t = (A + beta (pi_ref / pi - 1)) / (G |o|)."""
    group = Group(3)
    group.old = group.logprobs.clone()
    logprobs = group.logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(group.loss(logprobs)[0], logprobs)
    coefficient = group.flat_advantages + BETA * ((group.ref - group.logprobs).exp() - 1)
    torch.testing.assert_close(-gradient, group.weights * coefficient, rtol=1e-5, atol=1e-7)


def _categorical(seed: int):
    """Logits of a policy over 5 tokens, its log-probabilities, and those of a reference, in float64."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    return logits, logits.log_softmax(0), torch.randn(5, generator=g, dtype=torch.float64).log_softmax(0)


@pytest.mark.parametrize("seed", range(3))
def test_on_policy_the_expected_gradient_is_that_of_the_expected_advantage(seed):
    logits, logprobs, ref = _categorical(seed)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    p = logprobs.exp().detach()  # enumerate every token with its probability as its weight
    loss, _ = grpo(logprobs, logprobs.detach(), ref, advantages, p, EPSILON, 0.0)
    (got,) = torch.autograd.grad(-loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((logprobs.exp() * advantages).sum(), logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_term_has_the_value_of_kl_to_the_reference_and_the_gradient_of_kl_from_it(seed):
    logits, logprobs, ref = _categorical(seed)
    p, zero = logprobs.exp().detach(), torch.zeros(5, dtype=torch.float64)
    loss, metrics = grpo(logprobs, logprobs.detach(), ref, zero, p, EPSILON, 1.0)
    to_ref = (logprobs.exp() * (logprobs - ref)).sum()
    from_ref = (ref.exp() * (ref - logprobs)).sum()
    torch.testing.assert_close(metrics["kl"], to_ref.detach())
    torch.testing.assert_close(loss.detach(), to_ref.detach())
    got, gradient_to, gradient_from = (
        torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, to_ref, from_ref)
    )
    torch.testing.assert_close(got, gradient_from)
    assert (got - gradient_to).abs().max() > 1e-2, "the two directions must differ for this test to say anything"


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.3, 1.0, False), (1.1, 1.0, True), (0.5, 1.0, True), (0.7, -1.0, False), (0.9, -1.0, True), (1.5, -1.0, True)],
)
def test_a_clipped_token_has_no_gradient_and_is_counted(ratio, advantage, moves):
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    zero, one = torch.zeros(1), torch.ones(1)
    loss, metrics = grpo(logprobs, zero, logprobs.detach(), one * advantage, one, EPSILON, 0.0)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.item() == pytest.approx(-ratio * advantage if moves else 0.0)
    assert metrics["clip_fraction"].item() == (0.0 if moves else 1.0)


def test_without_any_change_since_sampling_nothing_is_clipped_and_the_loss_is_the_mean_advantage():
    group = Group(1)
    loss, metrics = grpo(
        group.logprobs, group.logprobs, group.logprobs, group.flat_advantages, group.weights, EPSILON, BETA
    )
    assert metrics["clip_fraction"] == metrics["kl"] == 0
    assert loss.item() == pytest.approx(-sum(group.advantages) / len(group.advantages), rel=1e-5)


def test_metrics_carry_no_gradient():
    group = Group(2)
    _, metrics = group.loss(group.logprobs.clone().requires_grad_())
    assert not any(value.requires_grad for value in metrics.values())


# ---- advantages and rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_advantages_of_a_group_have_mean_zero_and_population_deviation_one(size):
    rewards = torch.randint(0, 3, (20, size), generator=torch.Generator().manual_seed(size)).float()
    rewards[:, 0], rewards[:, 1] = 0.0, 2.0  # no group without spread
    advantages = group_relative(rewards).double()
    torch.testing.assert_close(advantages.mean(1), torch.zeros(20, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(advantages.square().mean(1), torch.ones(20, dtype=torch.float64), atol=1e-5, rtol=0)
    expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(advantages.float(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 1e-9, -2.7e6])
@pytest.mark.parametrize("size", [2, 3, 7, 10, 16])
def test_equal_rewards_give_advantages_of_exactly_zero(reward, size):
    rewards = torch.full((2, size), reward)
    rewards[1, 0] += 1.0 + abs(reward)
    advantages = group_relative(rewards)
    assert not advantages[0].any()
    assert advantages[1].all()


def test_the_share_of_groups_without_spread_is_counted():
    assert without_spread(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.1, 0.1], [2.0, 0.0]])).item() == 0.5


def test_rewards_count_accuracy_and_format_the_same():
    assert rule_reward(Grade(correct=True, well_formed=True)) == 2.0
    assert rule_reward(Grade(correct=False, well_formed=True)) == 1.0
    assert rule_reward(Grade(correct=False, well_formed=False)) == 0.0
