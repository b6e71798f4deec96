import math

import pytest

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams, sample_seed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2.0),
        ("max_tokens", 2**31),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", True),
        ("seed", -1),
        ("seed", 2**63),
        ("stop_token_ids", 5),
        ("stop_token_ids", "abc"),
        ("stop_token_ids", [-1]),
        ("n", 0),
        ("n", 10**6),
    ],
)
def test_sampling_params_refuse_by_name_and_value(field, value):
    with pytest.raises(InputError, match=f"^{field}=.* -> "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("page_size", 0),
        ("page_size", 1.5),
        ("max_model_len", -1),
        ("num_pages", -1),
        ("num_speculative_tokens", 2),
    ],
)
def test_engine_config_refuses_by_name_and_value(field, value):
    with pytest.raises(InputError, match=f"^{field}={value} .* -> "):
        EngineConfig(**{field: value})


def test_zeros_are_filled_in_from_the_model():
    config = EngineConfig(max_num_seqs=3, page_size=16).resolve(100, 1)
    assert (config.max_model_len, config.num_pages) == (100, 21)
    assert config.resolve(100, 1) == config


def test_what_the_model_cannot_do_is_refused():
    with pytest.raises(InputError, match=r"max_model_len=101 .* 2 to 100"):
        EngineConfig(max_model_len=101).resolve(100, 1)
    with pytest.raises(InputError, match=r"num_speculative_tokens=1 .* 0 to 0"):
        EngineConfig(num_speculative_tokens=1).resolve(100, 0)
    with pytest.raises(InputError, match=r"num_pages=6 .* -> use 7 or more"):
        EngineConfig(num_pages=6).resolve(100, 1)


def test_sample_seeds_are_fixed_for_ever():
    """Runs that were published must be repeatable: these numbers may not change."""
    assert sample_seed(7, 0) == 7
    assert sample_seed(7, 1) == 2776804601523485429
    seeds = {sample_seed(seed, k) for seed in range(50) for k in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_samples_keep_everything_but_seed_and_n():
    params = SamplingParams(n=3, seed=4, top_k=5, stop_token_ids=[1, 2])
    assert params.stop_token_ids == (1, 2)
    assert [p.seed for p in params.samples()] == [4, sample_seed(4, 1), sample_seed(4, 2)]
    assert {(p.n, p.top_k) for p in params.samples()} == {(1, 5)}
