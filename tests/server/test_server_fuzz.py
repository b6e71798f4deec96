"""Odd bodies on every route that reads one: refused in OpenAI's shape, never an error of the server."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benthic.server.types.chat import ChatRequest
from benthic.server.types.completions import CompletionRequest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KNOWN = {
    "n": st.integers(0, 3), "stream": st.booleans(), "echo": st.booleans(),
    "logprobs": st.integers(0, 3) | st.booleans(), "top_logprobs": st.just(1), "max_tokens": st.integers(0, 5),
    "prompt": st.sampled_from(["a", ["a", "b"], [3, 4], [[3], [4]], "", [], [[]], [10**6]]),
    "messages": st.just([{"role": "user", "content": "x"}]) | st.lists(JSON, max_size=2),
    "stop": st.sampled_from(["a", ["b"], "ABC", ["C", "BC"]]),
    "prompt_logprobs": st.integers(0, 2), "tokens": st.lists(st.integers(0, 300), max_size=3),
}  # fmt: skip
OTHERS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields} - KNOWN.keys() - {"model"})
BODIES = st.fixed_dictionaries({}, optional={**KNOWN, **dict.fromkeys(OTHERS, JSON)}) | st.dictionaries(
    st.sampled_from([*KNOWN, *OTHERS]), JSON, max_size=3
)
ROUTES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/embeddings"]


@pytest.mark.parametrize("path", ROUTES)
def test_no_body_makes_a_5xx(shared, path):
    seen = set()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(BODIES, st.sets(st.sampled_from(sorted(KNOWN)), min_size=2), st.data())
    def post(body, kept, data):
        if data.draw(st.booleans()):  # mostly such fields as the route reads
            body = {name: value for name, value in body.items() if name in kept}
        body = {"messages": [{"role": "user", "content": "x"}], **body} if "chat" in path else {"prompt": "a", **body}
        answer = shared.http.post(path, content=json.dumps({"model": "tiny", **body}).encode())
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    post()
    assert seen - {200}
