import random

import pytest
import torch

from benthic.inference import controls, sampler
from benthic.inference.chance import draw, uniform
from benthic.inference.config import SamplingParams, StructuredOutputsParams
from benthic.inference.request import Seq
from benthic.inference.sampler import choose, propose
from benthic.inference.select import leading, locate

CHI_SQUARE_15 = 37.7  # 99.9 % bound for 15 degrees of freedom


def seq(params: SamplingParams, ids=(1,), prompt_len=1, stop=()) -> Seq:
    return Seq(request_id=0, ids=list(ids), prompt_len=prompt_len, max_len=99, params=params, stop=frozenset(stop))


def pick(logits: torch.Tensor, params, places=None, history=None, vocab_size=0, **more) -> torch.Tensor:
    """logits [B, V] or [B, K, V], params for all or one per row -> tokens [B, K]."""
    each = [params] * len(logits) if isinstance(params, SamplingParams) else params
    rows = controls.build([seq(p) for p in each], "cpu")
    places = torch.arange(len(logits)) if places is None else places
    logits = logits if logits.dim() == 3 else logits.unsqueeze(1)
    return choose(logits, rows, places, vocab_size or logits.shape[-1], history, **more).tokens


def expected(logits: torch.Tensor, p: SamplingParams) -> list[float]:
    """The plain definition, token by token."""
    weights = (logits.double() / p.temperature).softmax(0).tolist()
    ranked = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[: p.top_k or len(weights)]
    total, mass, kept = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if p.top_p < 1 and mass >= p.top_p * total:
            break
        mass += weights[i]
        kept.append(i)
    kept = [i for i in kept if weights[i] >= p.min_p * weights[ranked[0]]]
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(weights))]


def surprise(counts: list[int], want: list[float]) -> float:
    """Pearson's chi-square; infinite where something impossible happened."""
    if any(count for count, p in zip(counts, want) if p == 0):
        return float("inf")
    n = sum(counts)
    return sum((count - n * p) ** 2 / (n * p) for count, p in zip(counts, want) if p > 0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=1.3, top_k=6, top_p=0.6),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=1.5, top_k=9, top_p=0.9, min_p=0.1),
    ],
)
def test_samples_follow_the_cut_softmax(params):
    logits = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 1.5
    tokens = pick(logits.expand(8000, -1), params)
    assert surprise(tokens.flatten().bincount(minlength=16).tolist(), expected(logits, params)) < CHI_SQUARE_15


def test_the_chi_square_notices_a_slightly_wrong_temperature():
    """Negative control."""
    logits = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 1.5
    tokens = pick(logits.expand(20_000, -1), SamplingParams(temperature=1.1))
    counts = tokens.flatten().bincount(minlength=16).tolist()
    assert surprise(counts, expected(logits, SamplingParams())) > CHI_SQUARE_15


def some_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0, 0.3, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 7, 40]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        logit_bias=rng.choice([{}, {}, {3: 4.0}]),
        logprobs=rng.choice([0, 3]),
        seed=rng.randrange(2**63),
    )


def test_a_row_has_the_same_bits_alone_and_in_any_company():
    rng = random.Random(0)
    every = [some_params(rng) for _ in range(60)]
    logits = torch.randn(60, 2, 700, generator=torch.Generator().manual_seed(1)) * 3
    history = torch.randint(690, (60, 30), generator=torch.Generator().manual_seed(2))
    places = torch.randint(5, 25, (60,), generator=torch.Generator().manual_seed(3))

    def run(rows: list[int]) -> list[tuple]:
        built = controls.build([seq(every[row], prompt_len=3) for row in rows], "cpu")
        got = choose(logits[rows], built, places[rows], 690, history[rows])
        reports = iter([] if got.top_ids is None else zip(got.top_ids.tolist(), got.top_logprobs.tolist()))
        tops = [[(i[:3], s[:3]) for i, s in zip(*next(reports))] if every[row].logprobs else None for row in rows]
        return list(zip(got.tokens.tolist(), got.logprobs.tolist(), tops))

    together = run(list(range(60)))
    for size in (1, 2, 7):
        for begin in range(0, 60, size):
            rows = list(range(begin, min(60, begin + size)))
            assert run(rows) == together[begin : begin + size]
    shuffled = rng.sample(range(60), 60)
    assert run(shuffled) == [together[row] for row in shuffled]


def test_greedy_rows_take_the_likeliest_beside_sampling_rows():
    logits = torch.randn(6, 2, 30, generator=torch.Generator().manual_seed(3))
    greedy, hot = SamplingParams(temperature=0), SamplingParams(temperature=9.0)
    built = controls.build([seq(p) for p in (greedy, hot) * 3], "cpu")
    tokens, logprobs, top_ids, _ = choose(logits, built, torch.arange(6), 30)
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2])
    assert not torch.equal(tokens[1::2], logits.argmax(-1)[1::2])
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2), atol=1e-6)
    assert top_ids is None


def test_rows_that_just_take_the_likeliest_need_no_controls():
    assert controls.build([seq(SamplingParams(temperature=0, top_p=0.5)), seq(SamplingParams(top_k=1))], "cpu") is None
    some = controls.build([seq(SamplingParams(temperature=0)), seq(SamplingParams())], "cpu")
    assert some is not None
    assert some.rows is not None
    assert some.rows.tolist() == [1]
    assert (some.temperature, some.greedy, some.top_k, some.top_p, some.penalties, some.additions) == (None,) * 6


def test_ids_beyond_the_vocabulary_count_in_the_softmax_but_are_not_chosen():
    logits = torch.arange(30.0).expand(2, 1, 30)
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=1e-9), SamplingParams(logprobs=20)):
        built = controls.build([seq(params)] * 2, "cpu")
        tokens, logprobs, top_ids, _ = choose(logits, built, torch.arange(2), 20)
        assert tokens.max() < 20
        assert torch.allclose(logprobs, logits.log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2))
        assert top_ids is None or top_ids.tolist() == [[list(range(19, -1, -1))]] * 2


@pytest.mark.parametrize("temperature", [5e-324, 1e-12, 1.0, 1e300])
def test_extreme_numbers_choose_a_token_of_nonzero_weight(temperature):
    logits = torch.tensor([[-torch.inf, 3e38, -3e38, 3e38, -torch.inf]]).expand(50, -1)
    tokens = set(pick(logits, SamplingParams(temperature=temperature)).flatten().tolist())
    assert {1, 3} <= tokens <= ({1, 2, 3} if temperature > 1 else {1, 3})
    assert set(pick(logits, SamplingParams(temperature=temperature, top_k=1)).flatten().tolist()) == {1}
    assert set(pick(logits, SamplingParams(temperature=temperature, top_p=0.3)).flatten().tolist()) == {1}


def test_logits_that_are_no_numbers_give_an_id_and_a_logprob_that_is_none():
    for params in (SamplingParams(top_k=3, top_p=0.5, min_p=0.1), SamplingParams(temperature=0)):
        built = controls.build([seq(params)], "cpu")
        tokens, logprobs, *_ = choose(torch.full((1, 1, 9), torch.nan), built, torch.zeros(1).long(), 9)
        assert 0 <= int(tokens) < 9
        assert logprobs.isnan().all()


def test_a_weight_of_zero_is_never_drawn_and_the_smallest_is():
    amounts = torch.zeros(2000, 10_000, dtype=torch.int64)
    amounts[:, [5, 512, 9999]] = torch.tensor([1, 2**60, 1])
    amounts[1000:, 512] = 1
    drawn = draw(amounts, torch.arange(2000), torch.zeros(2000).long())
    assert set(drawn[:1000].tolist()) == {512}
    counts = drawn[1000:].bincount(minlength=10_000)[[5, 512, 9999]].tolist()
    assert surprise(counts, [1 / 3] * 3) < 13.8  # 99.9 % bound for 2 degrees of freedom
    assert sum(counts) == 1000


def test_a_sum_is_located_at_the_first_id_that_passes_it():
    amounts = torch.zeros(4, 10_000, dtype=torch.int64)
    amounts[:, [5, 512, 9999]] = torch.tensor([1, 2**60, 1])
    assert locate(amounts, torch.tensor([0, 1, 2**60 + 1, 2**61])).tolist() == [5, 512, 9999, 9999]


@pytest.mark.parametrize("width", [40, 700, 9000])
def test_the_leading_tokens_are_those_of_a_stable_sort(width):
    generator = torch.Generator().manual_seed(width)
    below = -torch.randint(12, (8, width), generator=generator) / 7.0  # many are equal
    below[:4] -= torch.rand(4, width, generator=generator)
    amounts = torch.randint(2**44, (8, width), generator=generator)
    target = (amounts.sum(1) * torch.tensor([0.001, 0.5, 0.9, 2.0] * 2)).long()
    order = below.sort(dim=1, descending=True, stable=True).indices
    before = amounts.gather(1, order).cumsum(1) - amounts.gather(1, order)
    want = torch.zeros(8, width, dtype=torch.bool).scatter_(1, order, before < target.unsqueeze(1))
    assert torch.equal(leading(below, amounts, target), want)


def test_equal_logits_rank_by_token_id():
    tokens = pick(torch.zeros(2000, 5000), SamplingParams(top_k=10))
    assert sorted(set(tokens.flatten().tolist())) == list(range(10))


def test_random_numbers_are_a_fixed_function_of_seed_place_and_lane():
    """SplitMix64 in plain integers; answers that were published must be repeatable, so this may not change."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def number(seed: int, place: int, lane: int) -> float:
        golden = 0x9E3779B97F4A7C15
        state = mix((mix((seed + golden) % 2**64) + (place + 1) * golden) % 2**64)
        return ((mix((state + (lane + 1) * golden) % 2**64) >> 12) + 0.5) * 2.0**-52

    triples = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63 - 1, 2**31, 700), (123456789, 77, 3)]
    assert uniform(*torch.tensor(triples).unbind(1)).tolist() == [number(*triple) for triple in triples]


def test_random_numbers_are_even_and_neighbours_are_strangers():
    axes = torch.arange(40).view(-1, 1, 1), torch.arange(50).view(1, -1, 1), torch.arange(50)
    u = uniform(*axes)
    assert ((u > 0) & (u < 1)).all()
    assert surprise((u * 16).long().flatten().bincount(minlength=16).tolist(), [1 / 16] * 16) < CHI_SQUARE_15
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[:, :, 1:], u[:, :, :-1])):
        pairs = (a * 4).long() * 4 + (b * 4).long()
        assert surprise(pairs.flatten().bincount(minlength=16).tolist(), [1 / 16] * 16) < CHI_SQUARE_15


def test_a_bias_is_added_and_a_token_that_ends_waits_for_min_tokens():
    logits = torch.zeros(3, 8)
    assert pick(logits, SamplingParams(temperature=0, logit_bias={5: 1.0, 2: -3})).flatten().tolist() == [5] * 3
    params = SamplingParams(temperature=0, min_tokens=2, logit_bias={7: 100})
    rows = controls.build([seq(params, prompt_len=4, stop=(7, 6))] * 3, "cpu")
    tokens = choose(logits.unsqueeze(1).expand(3, 2, 8).contiguous(), rows, torch.tensor([4, 5, 6]), 8).tokens
    assert tokens.tolist() == [[0, 0], [0, 7], [7, 7]]


def test_penalties_count_prompt_and_answer_with_the_drafts_before_each_position():
    history = torch.tensor([[3, 1, 1, 2, 2, 0, 0]])  # prompt 3 1, answer 1 2, draft 2
    logits = torch.tensor([2.0, 1.0, -1.0, 4.0]).expand(1, 2, 4)
    params = SamplingParams(temperature=0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    rows = controls.build([seq(params, prompt_len=2)], "cpu")
    assert rows is not None
    where = sampler._ahead(torch.tensor([4]), rows, 2)
    got = sampler._change(logits, rows, where, history, None)
    assert got[0, 0].tolist() == [2.0, 0.5 - 0.5 - 0.25, -2.0 - 0.5 - 0.25, 2.0]
    assert got[0, 1].tolist() == [2.0, 0.5 - 0.5 - 0.25, -2.0 - 1.0 - 0.25, 2.0]
    assert logits[0, 0].tolist() == [2.0, 1.0, -1.0, 4.0]


def test_a_bitmask_allows_exactly_its_tokens_and_changes_no_logprob():
    allowed = [0, 31, 32, 63, 69]
    words = [sum(1 << (i - 32 * w) for i in allowed if i // 32 == w) for w in range(3)]
    bitmask = torch.tensor([[w - 2**32 if w >= 2**31 else w for w in words]], dtype=torch.int32)
    logits = torch.randn(2, 1, 70, generator=torch.Generator().manual_seed(0))
    guided = SamplingParams(temperature=5.0, structured_outputs=StructuredOutputsParams(regex="x"))
    rows = controls.build([seq(SamplingParams(temperature=0)), seq(guided)], "cpu")
    seen = set()
    for place in range(400):
        tokens, logprobs, *_ = choose(logits, rows, torch.tensor([place, place]), 70, None, bitmask)
        assert tokens[0] == logits[0].argmax()
        assert logprobs[1] == logits.log_softmax(-1)[1, 0, tokens[1]]
        seen.add(int(tokens[1]))
    assert seen == set(allowed)


def test_a_report_holds_the_likeliest_of_the_model_itself_best_first():
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    every = [SamplingParams(logprobs=2, temperature=3.0, top_k=1), SamplingParams(), SamplingParams(logprobs=5)]
    got = choose(logits, controls.build([seq(p) for p in every], "cpu"), torch.arange(3), 40)
    want = logits.log_softmax(-1)[[0, 2]].topk(5)
    assert torch.equal(got.top_ids, want.indices)
    assert torch.equal(got.top_logprobs, want.values)


def test_a_proposal_from_the_same_logits_is_the_token_that_will_be_chosen():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    every = [SamplingParams(temperature=(0, 0.7, 1.0)[i % 3], seed=i) for i in range(50)]
    rows = controls.build([seq(p) for p in every], "cpu")
    places = torch.arange(50)
    assert torch.equal(propose(logits, rows, places, 990), choose(logits[:, None], rows, places, 990).tokens[:, 0])
    assert not torch.equal(propose(logits, rows, places + 1, 990), propose(logits, rows, places, 990))
