"""Losses as pure functions: tensors in, (loss, metrics) out.

Letters: M answer tokens of all sequences of an update, in any order.
"""

from torch import Tensor


def grpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    epsilon: float,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO objective with its sign turned (DeepSeekMath Eq 3): all [M], returns a 0-d loss.

    `weights` is 1 / (|o_i| x number of sequences), so that the sum is a mean over sequences of means over tokens.
    The KL estimate pi_ref/pi - log(pi_ref/pi) - 1 (DeepSeekMath Eq 4) is unbiased as a value; its gradient is that of
    KL(pi_ref || pi).
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    surrogate = (ratio * advantages).minimum(clipped * advantages)
    gap = ref_logprobs - logprobs
    kl = gap.exp() - gap - 1
    loss = -(weights * (surrogate - beta * kl)).sum()
    cut = (ratio * advantages > clipped * advantages).to(weights.dtype)
    metrics = {"kl": (weights * kl).sum(), "clip_fraction": (weights * cut).sum()}
    return loss, {name: value.detach() for name, value in metrics.items()}
