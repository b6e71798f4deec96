"""Controls of one form are interchangeable in place; the form sees everything but the numbers."""

import torch

from benthic.inference import controls
from benthic.inference.config import SamplingParams
from benthic.inference.request import Seq


def of(*params: SamplingParams) -> controls.Controls:
    seqs = [Seq(request_id=i, ids=[1, 2], prompt_len=2, max_len=9, params=p) for i, p in enumerate(params)]
    found = controls.build(seqs, "cpu")
    assert found is not None
    return found


WARM = SamplingParams(temperature=0.7, seed=1, top_p=0.9, frequency_penalty=0.5, logit_bias={3: 1.0})
HOT = SamplingParams(temperature=1.7, seed=5, top_p=0.5, frequency_penalty=0.1, logit_bias={4: -2.0})


def test_the_form_is_the_same_for_other_numbers_and_differs_for_other_kinds_or_counts() -> None:
    assert controls.form(of(WARM)) == controls.form(of(HOT))
    others = [
        of(WARM, HOT),
        of(SamplingParams(temperature=0.7, seed=1)),
        of(SamplingParams(temperature=0, frequency_penalty=0.5)),
        of(SamplingParams(temperature=0.7, logprobs=2)),
        of(SamplingParams(temperature=0.7, logprobs=3)),
    ]
    forms = [controls.form(found) for found in [of(WARM), *others]]
    assert len(set(forms)) == len(forms)


def test_refilled_controls_hold_the_others_numbers_in_their_own_tensors() -> None:
    source, other = of(WARM), of(HOT)
    own = controls.copied(source)
    controls.refill(own, other)
    assert own.penalties.frequency.tolist() == other.penalties.frequency.tolist()
    assert [own.seed.item(), own.top_p.values.item(), own.additions.ids.item()] == [5, 0.5, 4]
    assert torch.equal(own.temperature, other.temperature)
    assert source.seed.item() == 1
    assert own.seed.data_ptr() not in (source.seed.data_ptr(), other.seed.data_ptr())
