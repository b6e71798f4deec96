"""The reader of requests: what is accepted, and that everything else is refused by name."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.server.errors import ApiError
from benthic.server.limits import LIMITS
from benthic.server.protocol import HARMLESS, NEUTRAL, parse_chat
from benthic.server.wire import dump

GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parse(**fields):
    return parse_chat(dump({**GOOD, **fields}))


def refused(body) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


def test_a_minimal_request_leaves_the_rest_to_the_server():
    ask = parse()
    assert (ask.messages, ask.stream, ask.max_tokens, ask.seed) == (tuple(GOOD["messages"]), False, None, None)
    assert (ask.temperature, ask.top_p, ask.stop) == (1.0, 1.0, ())


def test_fields_arrive():
    ask = parse(
        max_completion_tokens=7, temperature=0, top_p=0.5, seed=3, stop="x", stream=True,
        stream_options={"include_usage": True}, n=1,
    )  # fmt: skip
    assert (ask.max_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop) == (7, 0.0, 0.5, 3, ("x",))
    assert ask.stream
    assert ask.include_usage


@pytest.mark.parametrize(
    ("sent", "thinking"), [(None, None), ({}, None), ({"thinking": None}, None), ({"thinking": True}, True),
                           ({"thinking": False}, False)],
)  # fmt: skip
def test_thinking_arrives_as_clients_of_other_servers_send_it(sent, thinking):
    assert parse(chat_template_kwargs=sent).thinking is thinking


def test_content_parts_are_joined_and_the_developer_speaks_as_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask = parse(messages=[{"role": "developer", "content": parts}, {"role": "user", "content": "c"}])
    assert ask.messages == ({"role": "system", "content": "ab"}, {"role": "user", "content": "c"})


def test_an_answer_can_be_sent_back_as_the_openai_client_holds_it():
    earlier = {
        "role": "assistant", "content": "4", "reasoning_content": "2+2", "refusal": None, "annotations": [],
        "tool_calls": None, "audio": None, "function_call": None,
    }  # fmt: skip
    assert parse(messages=[*GOOD["messages"], earlier]).messages[1] == {"role": "assistant", "content": "4"}


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_a_field_that_does_not_change_the_answer_is_accepted(name):
    assert parse(**{name: "anything"}) == parse()


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_a_field_that_would_change_the_answer_is_refused_by_name(name):
    assert refused({**GOOD, name: ["something"]}).param == name
    for nothing in (None, *NEUTRAL[name]):
        assert parse(**{name: nothing}) == parse()


BAD = [
    ("model", 3), ("model", None), ("model", ""), ("model", "x" * 257), ("model", "\ud800"),
    ("messages", None), ("messages", []), ("messages", "hi"), ("messages", [GOOD["messages"][0]] * 1025),
    ("messages[0]", ["hi"]), ("messages[0].role", [{"role": "tool", "content": ""}]),
    ("messages[0].role", [{"role": ["user"], "content": ""}]),
    ("messages[0].content", [{"role": "user"}]), ("messages[0].content", [{"role": "user", "content": []}]),
    ("messages[0].content", [{"role": "user", "content": "\udfff"}]),
    ("messages[0].content[0]", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("messages[0].name", [{"role": "user", "content": "", "name": "Ann"}]),
    ("messages[0].tool_calls", [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]),
    ("messages[0].reasoning_content", [{"role": "user", "content": "", "reasoning_content": "x"}]),
    ("stream", 1), ("stream", "true"), ("stream_options", {"include_usage": True}),
    ("n", 2), ("n", 0), ("n", 10**6), ("n", 1.0), ("n", True),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "7"), ("max_tokens", 2**70),
    ("max_completion_tokens", 0), ("max_completion_tokens", True),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", False), ("temperature", 10**400),
    ("top_p", 0), ("top_p", 1.01), ("top_p", []), ("seed", -1), ("seed", 2**63), ("seed", 0.5),
    ("stop", ""), ("stop", [""]), ("stop", 3), ("stop", [3]), ("stop", ["x"] * 17), ("stop", "x" * 129),
    ("logprobs", True), ("logprobs", 0), ("frequency_penalty", 0.1), ("response_format", {"type": "json_object"}),
    ("chat_template_kwargs", True), ("chat_template_kwargs.thinking", {"thinking": "yes"}),
    ("chat_template_kwargs.thinking", {"thinking": 1}),
    ("chat_template_kwargs.enable_thinking", {"enable_thinking": True}),
    ("temprature", 1), ("top_k", 5), ("x" * 64, 1),
]  # fmt: skip


@pytest.mark.parametrize(("param", "value"), BAD, ids=lambda v: str(v)[:30])
def test_a_bad_value_is_refused_naming_its_field(param, value):
    field = param.split("[")[0].split(".")[0]
    error = refused({**GOOD, field: value})
    assert error.param == param
    assert error.message.startswith(param)
    assert len(error.message) < 300
    assert json.loads(dump(error.body()))["error"]["type"] == "invalid_request_error"


def test_a_misspelt_field_names_its_neighbour():
    assert "did you mean 'temperature'" in refused({**GOOD, "temprature": 1}).message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "seed", "max_tokens"])
def test_numbers_that_are_not_finite_are_refused(name, number):
    refused(json.dumps(GOOD)[:-1].encode() + f', "{name}": {number}}}'.encode())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000,
     b'{"model": ' + b"9" * 5000 + b"}", json.dumps(GOOD).encode("utf-16"), b'{"model": "a\nb"}'],
    ids=lambda b: repr(b[:12]),
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(body):
    error = refused(body)
    assert error.code == "invalid_json" or error.param == "model"


@pytest.mark.parametrize("name", ["temperature", "stop", "messages"])
def test_a_large_value_costs_no_more_than_reading_it_and_is_not_quoted(name):
    body = json.dumps({**GOOD, name: {str(i): i for i in range(50_000)}}).encode()
    start = time.perf_counter()
    json.loads(body)
    loaded = time.perf_counter()
    error = refused(body)
    assert time.perf_counter() - loaded < 3 * (loaded - start) + 0.1
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
    [*GOOD, "stream", "stop", "seed", "n", "top_p", "stream_options", "tools", "user", "chat_template_kwargs"]
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(NAMES | st.text(max_size=6), VALUES, max_size=4))
def test_any_object_is_read_or_refused_with_400(fields):
    try:
        parse_chat(json.dumps({**GOOD, **fields}).encode())
    except ApiError as error:
        assert (error.status, bool(dump(error.body()))) == (400, True)  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused_with_400(body):
    refused(body)
