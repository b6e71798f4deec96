"""The kernels of the sampler choose what plain torch chooses, whatever the rows ask for."""

import random

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from test_sampler import seq, some_params

from benthic.inference import controls
from benthic.inference.config import SamplingParams
from benthic.inference.quick import QUICK
from benthic.inference.sampler import PLAIN, choose, propose


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_choices_and_drafts_are_those_of_plain_torch(dtype: torch.dtype, device: str) -> None:
    rng = random.Random(0)
    params = [some_params(rng) for _ in range(24)]
    logits = (torch.randn(24, 2, 200, generator=torch.Generator().manual_seed(1)) * 3).to(device, dtype)
    history = torch.randint(190, (24, 30), generator=torch.Generator().manual_seed(2)).to(device)
    places = torch.arange(5, 29, device=device)
    for rows in (range(24), [row for row in range(24) if not params[row].greedy], [3]):
        chosen = [params[row] for row in rows]
        built = controls.build([seq(p, prompt_len=3) for p in chosen], device)
        at = torch.tensor(rows, device=device)
        found, expected = (choose(logits[at], built, places[at], 190, history[at], None, w) for w in (QUICK, PLAIN))
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)
        assert (found.top_ids is None) == (expected.top_ids is None)
        if found.top_logprobs is not None:
            torch.testing.assert_close(found.top_logprobs, expected.top_logprobs, rtol=0, atol=1e-5)
        drafts = [propose(logits[at, 0], built, places[at], 190, ways) for ways in (QUICK, PLAIN)]
        assert torch.equal(*drafts)


def test_rows_that_take_the_likeliest_need_no_controls(device: str) -> None:
    logits = torch.randn(5, 1, 200, generator=torch.Generator().manual_seed(3)).to(device)
    found, expected = (choose(logits, None, torch.zeros(5, device=device), 150, ways=w) for w in (QUICK, PLAIN))
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_a_mask_leaves_out_what_it_does_not_allow(device: str) -> None:
    logits = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(4)).to(device)
    some = SamplingParams(seed=5, temperature=3.0, logit_bias={7: 2.0})
    built = controls.build([seq(some)] * 2, device)
    assert built is not None
    built = controls.Controls(**{**vars(built), "guided": torch.tensor([1], device=device)})
    mask = torch.tensor([[1 << 7, 0]], dtype=torch.int32, device=device)
    for ways in (QUICK, PLAIN):
        assert choose(logits, built, torch.zeros(2, dtype=torch.int64, device=device), 64, None, mask, ways).tokens[
            1
        ].tolist() == [7]
