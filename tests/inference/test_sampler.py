import pytest
import torch

from benthic.inference.batch import Sampling
from benthic.inference.sampler import choose, sample, uniforms


def sampling(rows: int, uniform, temperature=1.0, top_k=0, top_p=1.0, greedy=False) -> Sampling:
    """Each argument is one number for all rows or a list with one per row."""

    def column(value, dtype) -> torch.Tensor:
        return torch.tensor(value, dtype=dtype).expand(rows).clone()

    return Sampling(
        greedy=column(greedy, torch.bool),
        temperature=column(temperature, torch.float64),
        top_p=column(top_p, torch.float64),
        top_k=column(top_k, torch.int64),
        uniform=column(uniform, torch.float64),
        truncated=top_k != 0 or top_p != 1.0,
    )


def expected(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> list[float]:
    """The plain definition, token by token."""
    p = (logits.double() / temperature).softmax(0)
    ranked = sorted(range(len(p)), key=lambda i: (-float(p[i]), i))[: top_k or len(p)]
    total, mass, kept = sum(float(p[i]) for i in ranked), 0.0, []
    for i in ranked:
        if top_p < 1 and mass >= top_p * total:
            break
        kept.append(i)
        mass += float(p[i])
    return [float(p[i]) / mass if i in kept else 0.0 for i in range(len(p))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7), (1.3, 6, 0.6), (1.0, 1, 1.0), (1.0, 0, 1e-9)],
)
def test_samples_follow_the_truncated_softmax(temperature, top_k, top_p):
    """Pearson's chi-square on 20,000 draws stays below its 99.9 % bound for 15 degrees of freedom."""
    logits = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 1.5
    want = expected(logits, temperature, top_k, top_p)
    n = 20_000
    s = sampling(n, uniforms(1, n), temperature, top_k, top_p)
    counts = sample(logits.expand(n, -1), s).bincount(minlength=16).tolist()
    assert all(count == 0 for count, p in zip(counts, want) if p == 0)
    assert sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, want) if p > 0) < 37.7


def test_the_chi_square_notices_a_slightly_wrong_temperature():
    """Negative control."""
    logits = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 1.5
    n = 20_000
    counts = sample(logits.expand(n, -1), sampling(n, uniforms(1, n), 1.05)).bincount(minlength=16).tolist()
    want = expected(logits, 1.0, 0, 1.0)
    assert sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, want)) > 37.7


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(50, 40, generator=generator)
    temperature = [0.3 + 0.1 * (i % 9) for i in range(50)]
    top_k, top_p = [i % 7 for i in range(50)], [1.0 if i % 3 else 0.8 for i in range(50)]
    uniform = uniforms(0, 50)
    together = sample(logits, sampling(50, uniform, temperature, top_k, top_p))
    for i in range(50):
        alone = sample(logits[i : i + 1], sampling(1, uniform[i], temperature[i], top_k[i], top_p[i]))
        assert int(alone) == int(together[i])


def test_greedy_rows_take_the_likeliest_beside_sampling_rows():
    logits = torch.randn(6, 2, 30, generator=torch.Generator().manual_seed(3))
    greedy = [True, False, True, False, True, False]
    tokens, logprobs = choose(logits, sampling(6, uniforms(4, 6), 1.0, greedy=greedy), 30)
    likeliest = logits.argmax(-1)
    assert torch.equal(tokens[::2], likeliest[::2])
    assert torch.equal(tokens[:, 1], likeliest[:, 1])
    assert not torch.equal(tokens[1::2, 0], likeliest[1::2, 0])
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2), atol=1e-6)


def test_a_row_that_keeps_everything_keeps_the_unlikeliest_beside_one_that_cuts():
    logits = torch.tensor([[-60.0, 0.0], [-60.0, 0.0]])
    assert sample(logits, sampling(2, 0.0, top_p=[1.0, 0.5])).tolist() == [0, 1]


def test_equal_weights_rank_by_token_id():
    logits = torch.zeros(3, 5000)
    assert sample(logits, sampling(3, [0.0, 0.5, 0.999], top_k=10)).tolist() == [0, 5, 9]


def test_ids_beyond_the_vocabulary_count_in_the_softmax_but_are_not_chosen():
    logits = torch.arange(30.0).expand(2, 1, 30)
    for s in (None, sampling(2, 0.9999)):
        tokens, logprobs = choose(logits, s, 20)
        assert tokens.tolist() == [[19], [19]]
        assert torch.allclose(logprobs, logits.log_softmax(-1)[:, :, 19])


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("temperature", [5e-324, 1e-12, 1.0, 1e300])
def test_extreme_numbers_choose_a_token_of_nonzero_weight(uniform, temperature):
    logits = torch.tensor([[-torch.inf, 3e38, -3e38, 3e38, -torch.inf]])
    token = int(sample(logits, sampling(1, uniform, temperature)))
    assert token in ((1, 2, 3) if temperature > 1 else (1, 3))
    assert int(sample(logits, sampling(1, uniform, temperature, top_k=1))) == 1


def test_a_request_owns_one_stream_of_random_numbers():
    assert uniforms(9, 10) == uniforms(9, 100)[:10]
    assert uniforms(9, 10) != uniforms(10, 10)
    assert all(0 <= u < 1 for u in uniforms(2**63 - 1, 1000))
