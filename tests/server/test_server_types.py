"""The reader of requests: what is accepted, and that everything else is refused by name."""

import gc
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.server.errors import ApiError
from benthic.server.limits import LIMITS
from benthic.server.types.base import Strict
from benthic.server.types.chat import ChatRequest
from benthic.server.types.completions import CompletionRequest
from benthic.server.types.tokens import DetokenizeRequest, read_tokenize
from benthic.server.wire import dump

GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parse(**fields):
    return ChatRequest.read(dump({**GOOD, **fields}))


def refused(body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ChatRequest.read(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


def test_a_minimal_request_leaves_the_rest_to_the_server():
    ask = parse()
    assert [(m.role, m.content) for m in ask.messages] == [("user", "hi")]
    assert (ask.stream, ask.most_tokens, ask.seed, ask.n, ask.calls) == (False, None, None, 1, "none")
    assert (ask.temperature, ask.top_p, ask.stop) == (1.0, 1.0, [])


def test_fields_arrive():
    ask = parse(
        max_completion_tokens=7, temperature=0, top_p=0.5, seed=3, stop="x", stream=True,
        stream_options={"include_usage": True}, n=2, logit_bias={"5": -1}, top_k=-1,
    )  # fmt: skip
    assert (ask.most_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop) == (7, 0.0, 0.5, 3, ["x"])
    assert (ask.n, ask.logit_bias, ask.top_k) == (2, {"5": -1.0}, -1)
    assert ask.stream
    assert ask.stream_options.include_usage


def test_null_is_as_good_as_absent_for_every_field_that_has_a_default():
    optional = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]
    assert parse(**dict.fromkeys(optional)) == parse()
    assert refused({**GOOD, "model": None}).param == "model"


@pytest.mark.parametrize(
    ("sent", "thinking"), [(None, None), ({}, None), ({"thinking": None}, None), ({"thinking": True}, True),
                           ({"thinking": False}, False)],
)  # fmt: skip
def test_thinking_arrives_as_clients_of_other_servers_send_it(sent, thinking):
    assert parse(chat_template_kwargs=sent).thinking is thinking


def test_an_answer_can_be_sent_back_as_the_openai_client_holds_it():
    earlier = {
        "role": "assistant", "content": "4", "reasoning_content": "2+2", "refusal": None, "annotations": [],
        "tool_calls": None, "audio": None, "function_call": None,
    }  # fmt: skip
    assert parse(messages=[*GOOD["messages"], earlier]).messages[1].content == "4"
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [*GOOD["messages"], {**earlier, "content": None, "tool_calls": [call]}]
    ask = parse(messages=[*talk, {"role": "tool", "tool_call_id": "c1", "content": "5"}])
    assert ask.messages[1].tool_calls[0].function.name == "f"


def models(kind=Strict):
    """Every model of a request."""
    yield from (model for sub in kind.__subclasses__() for model in (sub, *models(sub)))


@pytest.mark.parametrize("name", sorted(ChatRequest.HARMLESS))
def test_a_field_that_does_not_change_the_answer_is_accepted(name):
    assert parse(**{name: "anything"}) == parse()


@pytest.mark.parametrize("name", sorted(ChatRequest.NEUTRAL))
def test_a_field_that_would_change_the_answer_is_refused_by_name(name):
    assert refused({**GOOD, name: ["something"]}).param == name
    for nothing in (None, *ChatRequest.NEUTRAL[name]):
        assert parse(**{name: nothing}) == parse()


def test_no_field_is_both_read_and_left_out():
    assert len(list(models())) > 15
    for model in models():
        names = [*model.model_fields, *model.HARMLESS, *model.NEUTRAL]
        assert len(names) == len(set(names)), model


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "g"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
DEEP = {}
for _ in range(100):
    DEEP = {"a": DEEP}

BAD = [
    ("model", 3), ("model", None), ("model", ""), ("model", "x" * 257), ("model", "\ud800"),
    ("messages", None), ("messages", []), ("messages", "hi"), ("messages", [GOOD["messages"][0]] * 1025),
    ("messages[0]", ["hi"]), ("messages[0].role", [{"role": "robot", "content": ""}]), ("messages[0].role", [{}]),
    ("messages[0].role", [{"role": ["user"], "content": ""}]),
    ("messages[0].content", [{"role": "user"}]), ("messages[0].content", [{"role": "user", "content": []}]),
    ("messages[0].content", [{"role": "user", "content": "\udfff"}]),
    ("messages[0].content", [{"role": "assistant", "content": None}]),
    ("messages[0].content[0]", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages[0].content[0].text", [{"role": "user", "content": [{"type": "text", "text": 3}]}]),
    ("messages[0].name", [{"role": "user", "content": "", "name": "Ann"}]),
    ("messages[0].tool_calls[0].function", [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]),
    ("messages[0].reasoning_content", [{"role": "user", "content": "", "reasoning_content": "x"}]),
    ("stream", 1), ("stream", "true"), ("stream_options", {"include_usage": True}),
    ("n", 129), ("n", 0), ("n", 10**6), ("n", 1.0), ("n", True),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "7"), ("max_tokens", 2**70),
    ("max_completion_tokens", 0), ("max_completion_tokens", True),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", False), ("temperature", 10**400),
    ("top_p", 0), ("top_p", 1.01), ("top_p", []), ("seed", -1), ("seed", 2**63), ("seed", 0.5),
    ("stop[0]", ""), ("stop[1]", ["a", ""]), ("stop", 3), ("stop[0]", [3]), ("stop", ["x"] * 17),
    ("stop[0]", "x" * 129),
    ("logprobs", 3), ("top_logprobs", 3), ("top_logprobs", 21), ("frequency_penalty", 2.1), ("presence_penalty", -3),
    ("repetition_penalty", 0), ("min_p", 2), ("top_k", -2), ("top_k", 1.5), ("min_tokens", -1),
    ("logit_bias", {"x": 1}), ("logit_bias", {"-5": 1}), ("logit_bias.5", {"5": 101}), ("logit_bias.5", {"5": True}),
    ("logit_bias", {str(i): 1 for i in range(1025)}), ("logit_bias", [5]),
    ("stop_token_ids[0]", [-1]), ("stop_token_ids[1]", [1, "2"]), ("stop_token_ids", [1] * 65),
    ("prompt_logprobs", 21), ("priority", 0.5), ("cache_salt", ""), ("ignore_eos", 1), ("skip_special_tokens", "no"),
    ("timeout", 0), ("echo", True), ("continue_final_message", True), ("add_generation_prompt", 0),
    ("response_format", "json"), ("response_format.type", {"type": "xml"}), ("response_format.type", {}),
    ("response_format.json_schema", {"type": "json_schema"}),
    ("response_format.json_schema.schema", {"type": "json_schema", "json_schema": {"name": "s"}}),
    ("response_format.json_schema.schema", {"type": "json_schema", "json_schema": {"name": "s", "schema": DEEP}}),
    ("response_format.json_schema.schema",
     {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["x" * 70_000]}}}),
    ("structured_outputs", {}), ("structured_outputs", {"regex": "a", "choice": ["b"]}),
    ("structured_outputs.regx", {"regx": "a"}), ("guided_regex", "x" * 5000), ("guided_choice", []),
    ("tools", [TOOL, TOOL]), ("tools", [TOOL] * 129), ("tools[0].type", [{"type": "custom"}]),
    ("tools[0].function.name", [{"type": "function", "function": {"name": "a b"}}]),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]),
    ("tools[0].function.strict", [{"type": "function", "function": {"name": "f", "strict": True}}]),
    ("tool_choice", "auto"), ("tool_choice", "any"), ("tool_choice", {"type": "function", "function": {"name": "g"}}),
    ("parallel_tool_calls", "no"),
    ("chat_template_kwargs", True), ("chat_template_kwargs.thinking", {"thinking": "yes"}),
    ("chat_template_kwargs.thinking", {"thinking": 1}),
    ("chat_template_kwargs.enable_thinking", {"enable_thinking": True}),
    ("temprature", 1), ("x" * 64, 1),
]  # fmt: skip


@pytest.mark.parametrize(("param", "value"), BAD, ids=lambda v: str(v)[:30])
def test_a_bad_value_is_refused_naming_its_field(param, value):
    field = param.split("[")[0].split(".")[0]
    error = refused({**GOOD, field: value})
    assert error.param == param
    assert error.message.startswith(param)
    assert len(error.message) < 300
    assert json.loads(dump(error.body()))["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("top_logprobs", {"logprobs": False, "top_logprobs": 2}),
        ("min_tokens", {"max_tokens": 3, "min_tokens": 4}),
        ("prompt_logprobs", {"stream": True, "prompt_logprobs": 1}),
        ("guided_regex", {"response_format": SCHEMA, "guided_regex": "a"}),
        ("min_tokens", {"response_format": SCHEMA, "min_tokens": 1}),
        ("ignore_eos", {"guided_choice": ["a"], "ignore_eos": True}),
        ("response_format", {"response_format": SCHEMA, "tools": [TOOL]}),
        (
            "tool_choice.function.name",
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        ),
        ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": False}),
    ],
)
def test_fields_that_do_not_go_together_are_refused_naming_one(param, fields):
    assert refused({**GOOD, **fields}).param == param


@pytest.mark.parametrize(
    ("param", "value"),
    [("prompt", None), ("prompt", 3), ("prompt", {}), ("prompt", []), ("prompt[0]", [[]]), ("prompt[0]", [True]),
     ("prompt[1]", ["a", 3]), ("prompt[1]", [3, "a"]), ("prompt[0]", [-1]), ("prompt[1][0]", [[3], [4.5]]),
     ("prompt", ["a"] * 257), ("prompt[0]", [{}]), ("suffix", "x"), ("best_of", 2), ("logprobs", 21),
     ("logprobs", True), ("max_tokens", 0), ("n", 129), ("messages", []), ("echo", 1)],
    ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_a_bad_completion_is_refused_naming_its_field(param, value):
    body = {"model": "m", "prompt": "hi", param.split("[")[0]: value}
    with pytest.raises(ApiError) as caught:
        CompletionRequest.read(json.dumps(body).encode())
    assert caught.value.param == param
    assert len(caught.value.message) < 300


def test_prompts_come_in_four_shapes():
    for prompt, prompts in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
        assert CompletionRequest.read(dump({"model": "m", "prompt": prompt})).prompts == prompts


def test_prompts_times_n_are_bounded():
    body = {"model": "m", "prompt": ["a"] * 3, "n": 100}
    with pytest.raises(ApiError, match="300") as caught:
        CompletionRequest.read(dump(body))
    assert caught.value.param == "n"


def test_tokenize_reads_a_text_or_a_conversation():
    assert read_tokenize(b'{"prompt": "a"}').prompt == "a"
    assert read_tokenize(dump({"messages": GOOD["messages"]})).messages[0].content == "hi"
    for body, param in ((b"{}", "prompt"), (b'{"prompt": 3}', "prompt"), (b'{"messages": []}', "messages")):
        with pytest.raises(ApiError) as caught:
            read_tokenize(body)
        assert caught.value.param == param
    with pytest.raises(ApiError) as caught:
        DetokenizeRequest.read(b'{"tokens": [1, -1]}')
    assert caught.value.param == "tokens[1]"


def test_a_misspelt_field_names_its_neighbour():
    assert "did you mean 'temperature'" in refused({**GOOD, "temprature": 1}).message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "seed", "max_tokens"])
def test_numbers_that_are_not_finite_are_refused(name, number):
    refused(json.dumps(GOOD)[:-1].encode() + f', "{name}": {number}}}'.encode())


@pytest.mark.parametrize("depth", [70, 900, 940, 960, 970, 980, 990])
def test_a_schema_of_any_depth_is_refused(depth):
    inner = b'{"a":' * depth + b"1" + b"}" * depth
    error = refused(json.dumps(GOOD)[:-1].encode() + b', "guided_json":' + inner + b"}")
    assert error.code == "invalid_json" or error.param == "guided_json"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000,
     b'{"a":' * 100_000,
     b'{"model": ' + b"9" * 5000 + b"}", json.dumps(GOOD).encode("utf-16"), b'{"model": "a\nb"}'],
    ids=lambda b: repr(b[:12]),
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(body):
    error = refused(body)
    assert error.code == "invalid_json" or error.param == "model"


@pytest.mark.parametrize("name", ["temperature", "stop", "messages", "tools", "guided_json"])
def test_a_large_value_costs_no_more_than_reading_it_and_is_not_quoted(name):
    body = json.dumps({**GOOD, name: {str(i): i for i in range(50_000)}}).encode()
    reading, refusing = [], []
    gc.freeze()  # as the server does: what the test run holds is not the request's
    for _ in range(3):
        start = time.thread_time()
        json.loads(body)
        loaded = time.thread_time()
        error = refused(body)
        reading.append(loaded - start)
        refusing.append(time.thread_time() - loaded)
    gc.unfreeze()
    assert min(refusing) < 5 * min(reading) + 0.05
    assert len(error.message) < 300


def test_no_text_of_a_message_is_quoted_in_an_error():
    secret = "the secret word"
    for body in ({**GOOD, "messages": [{"role": "user", "content": [secret]}]}, {**GOOD, "stop": [secret * 20]}):
        assert secret not in refused(body).message
    assert secret not in refused(b'{"messages": "the secret word}').message


def test_differing_limits_of_length_are_refused_and_equal_ones_accepted():
    assert parse(max_tokens=5, max_completion_tokens=5).max_tokens == 5
    assert refused({**GOOD, "max_tokens": 5, "max_completion_tokens": 6}).param == "max_tokens"


def test_every_limit_is_a_range_with_a_meaning():
    for name, limit in LIMITS.items():
        assert limit.low <= limit.high, name
        assert limit.meaning


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [*GOOD, "stream", "stop", "seed", "n", "top_p", "stream_options", "tools", "tool_choice", "user", "logit_bias",
     "chat_template_kwargs", "response_format", "structured_outputs", "guided_json", "prompt", "tokens"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(NAMES | st.text(max_size=6), VALUES, max_size=4))
def test_any_object_is_read_or_refused_with_400(fields):
    body = json.dumps({**GOOD, **fields}).encode()
    for read in (ChatRequest.read, CompletionRequest.read, read_tokenize, DetokenizeRequest.read):
        try:
            read(body)
        except ApiError as error:
            assert (error.status, bool(dump(error.body()))) == (400, True)  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused_with_400(body):
    refused(body)
