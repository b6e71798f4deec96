import math

import pytest

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams, StructuredOutputsParams, sample_seed


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
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("min_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", "1"),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 2}),
        ("logit_bias", {-1: 2}),
        ("logit_bias", dict.fromkeys(range(2000), 1)),
        ("stop", 5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a" * 1025]),
        ("stop", ["a", 1]),
        ("ignore_eos", 1),
        ("include_stop_str_in_output", "yes"),
        ("logprobs", 21),
        ("logprobs", True),
        ("prompt_logprobs", -2),
        ("prompt_logprobs", 21),
        ("structured_outputs", {"json": "{}"}),
    ],
)
def test_sampling_params_refuse_by_name_and_value(field, value):
    with pytest.raises(InputError, match=f"^{field}=.* -> "):
        SamplingParams(**{field: value})


def test_a_bias_out_of_bounds_names_its_token():
    with pytest.raises(InputError, match=r"^logit_bias\[7\]=101 .* -> "):
        SamplingParams(logit_bias={7: 101})


def test_too_many_stops_are_counted():
    for field in ("stop", "stop_token_ids"):
        with pytest.raises(InputError, match=f"^{field} has 65 entries -> "):
            SamplingParams(**{field: [1] * 65 if field == "stop_token_ids" else ["a"] * 65})


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": 5}, "json=5 is no text"),
        ({"json": {"a": {1, 2}}}, "is no JSON"),
        ({"regex": b"a"}, "regex=b'a'"),
        ({"structural_tag": 5}, "structural_tag=5 is no text"),
        ({"structural_tag": {"a": {1, 2}}}, "structural_tag=.* is no JSON"),
        ({"json_object": 1}, "json_object=1"),
        ({"regex": "a", "json_object": True}, "regex and json_object at once"),
        ({"after_thinking": True}, "after_thinking=True without a form"),
    ],
)
def test_forms_refuse_by_name_and_value(form, message):
    with pytest.raises(InputError, match=message):
        StructuredOutputsParams(**form)


def test_a_form_must_be_able_to_end():
    form = StructuredOutputsParams(json={"type": "null"})
    assert form.form == ("json", '{"type":"null"}')
    assert SamplingParams(structured_outputs=form).guided
    assert not SamplingParams().guided
    for more in ({"min_tokens": 2}, {"ignore_eos": True}):
        with pytest.raises(InputError, match=f"{next(iter(more))}=.* with structured_outputs"):
            SamplingParams(structured_outputs=form, **more)


def test_one_stop_string_is_a_list_of_one_and_params_can_be_keys():
    params = SamplingParams(stop="END", logit_bias={1: 2})
    assert params.stop == ("END",)
    assert hash(params) == hash(SamplingParams(stop=["END"]))
    assert params != SamplingParams(stop=["END"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("page_size", 0),
        ("page_size", 1.5),
        ("max_model_len", -1),
        ("num_pages", -1),
        ("num_speculative_tokens", 9),
        ("num_speculative_tokens", -1),
        ("adaptive_speculation", 1),
    ],
)
def test_engine_config_refuses_by_name_and_value(field, value):
    with pytest.raises(InputError, match=f"^{field}={value} .* -> "):
        EngineConfig(**{field: value})


def test_zeros_are_filled_in_from_the_model():
    config = EngineConfig(max_num_seqs=3, page_size=16).resolve(100, 1)
    assert (config.max_model_len, config.num_pages) == (100, 24)
    assert config.resolve(100, 1) == config


def test_what_the_model_cannot_do_is_refused():
    with pytest.raises(InputError, match=r"max_model_len=101 .* 2 to 100"):
        EngineConfig(max_model_len=101).resolve(100, 1)
    with pytest.raises(InputError, match=r"num_speculative_tokens=1 .* 0 to 0"):
        EngineConfig(num_speculative_tokens=1).resolve(100, 0)
    with pytest.raises(InputError, match=r"num_pages=6 .* -> use 7 or more"):
        EngineConfig(num_pages=6, page_size=16).resolve(100, 1)


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


@pytest.mark.parametrize(
    ("field", "value"),
    [("kv_cache_dtype", "int8"), ("quantization", "int4"), ("backend", "cuda"), ("gpu_memory_utilization", 1.5)],
)
def test_cache_backend_and_memory_refuse_by_name_and_value(field, value):
    with pytest.raises(InputError, match=f"{field}={value!r}" if isinstance(value, str) else f"{field}={value} "):
        EngineConfig(**{field: value})
