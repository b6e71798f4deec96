"""/openapi.json: complete, true, and loading nothing from elsewhere."""

import json
import re

import jsonschema
import pytest

from benthic.server import static
from benthic.server.app import routes
from benthic.server.limits import LIMITS
from benthic.server.types.chat import ChatRequest
from benthic.server.types.completions import CompletionRequest

GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def schema(shared):
    return shared.http.get("/openapi.json").json()


def validator(schema, part):
    """Of `part` of the document."""
    return jsonschema.Draft202012Validator({**part, "components": schema["components"]})


def body_of(schema, path):
    return schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def answer_of(schema, path, status="200", kind="application/json", method="post"):
    return schema["paths"][path][method]["responses"][status]["content"][kind]["schema"]


def test_every_route_is_in_it_with_replies_and_errors(shared, schema):
    assert {route.path_format for route in routes(shared.service)} <= set(schema["paths"])
    pages = {path.decode() for path in static.paths()}
    assert pages <= set(schema["paths"])
    for path, operations in schema["paths"].items():
        if path in pages:
            continue  # files, which have no types
        for method, operation in operations.items():
            assert operation["summary"]
            errors = set(operation["responses"]) - {"200"}
            assert {"405", "431", "500"} <= errors, path
            assert ("400" in errors) == (method == "post" and path != "/v1/embeddings")
            assert "422" not in errors
            for status in errors:
                answer = operation["responses"][status]["content"]["application/json"]
                assert answer["schema"] == {"$ref": "#/components/schemas/ErrorReply"}
            if "200" in operation["responses"]:
                assert all("schema" in kind for kind in operation["responses"]["200"]["content"].values())


def test_every_reference_leads_somewhere_and_no_address_is_outside(schema):
    text = json.dumps(schema)
    for reference in set(re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', text)):
        assert reference in schema["components"]["schemas"]
    assert "http://" not in text
    assert "https://" not in text


def test_no_page_is_served_that_would_load_scripts_from_elsewhere(shared):
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert shared.http.get(path).status_code == 404


def test_it_needs_the_key(locked):
    assert locked.http.get("/openapi.json").status_code == 401


@pytest.mark.parametrize(("model", "name"), [(ChatRequest, "ChatRequest"), (CompletionRequest, "CompletionRequest")])
def test_every_field_of_a_request_is_in_it(schema, model, name):
    properties = schema["components"]["schemas"][name]["properties"]
    assert set(properties) == {*model.model_fields, *model.HARMLESS, *model.NEUTRAL}


def test_its_bounds_are_those_of_the_one_table(schema):
    properties = schema["components"]["schemas"]["ChatRequest"]["properties"]
    for name in ("temperature", "top_p", "n", "seed", "min_p", "top_k", "presence_penalty", "priority"):
        number = next(part for part in properties[name]["anyOf"] if part["type"] != "null")
        assert (number["minimum"], number["maximum"]) == LIMITS[name][:2], name
    assert properties["messages"]["maxItems"] == LIMITS["messages"].high


BODIES = [
    {}, {"temperature": 0.5}, {"temperature": 3}, {"temperature": None}, {"stop": "x"}, {"stop": ["x"]}, {"stop": 3},
    {"n": 0}, {"n": 2}, {"unknown": 1}, {"user": "ann"}, {"functions": ["f"]}, {"functions": []},
    {"response_format": {"type": "xml"}}, {"logit_bias": {"5": 1}}, {"logit_bias": {"5": 101}},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}, {"tool_choice": "any"},
    {"messages": []}, {"messages": [{"role": "robot", "content": "x"}]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
]  # fmt: skip


@pytest.mark.parametrize("fields", BODIES, ids=lambda f: json.dumps(f)[:40])
def test_it_accepts_and_refuses_what_the_server_does(shared, schema, fields):
    body = {**GOOD, "max_tokens": 1, **fields}
    status = shared.http.post("/v1/chat/completions", json=body).status_code
    assert validator(schema, body_of(schema, "/v1/chat/completions")).is_valid(body) == (status == 200)


def test_replies_and_errors_are_as_it_says(shared, schema):
    def check(path, status=200, method="post", **fields):
        answer = shared.http.request(method, path, json=fields or None)
        assert answer.status_code == status, answer.text
        validator(schema, answer_of(schema, path, str(status), method=method)).validate(answer.json())

    check("/v1/chat/completions", **GOOD, logprobs=True, top_logprobs=1, prompt_logprobs=1, n=2)
    check("/v1/chat/completions", 400, **GOOD, temperature=3)
    check("/v1/chat/completions", 404, **{**GOOD, "model": "x"})
    check("/v1/completions", model="tiny", prompt="a", echo=True, logprobs=1, prompt_logprobs=0)
    check("/v1/embeddings", 404, model="tiny", input="a")
    check("/tokenize", prompt="a", return_token_strs=True)
    check("/tokenize", **GOOD)
    check("/detokenize", tokens=[3])
    for path in ("/health", "/version", "/v1/models", "/tokenizer_info", "/openapi.json"):
        check(path, method="get")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_events_of_a_stream_are_as_it_says(shared, schema, path):
    check = validator(schema, answer_of(schema, path, kind="text/event-stream"))
    body = {**(GOOD if "chat" in path else {"model": "tiny", "prompt": "a"}), "stream": True, "n": 2}
    answer = shared.http.post(path, json={**body, "stream_options": {"include_usage": True}})
    *events, done = [line[6:] for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    assert len(events) >= 3
    for event in events:
        check.validate(json.loads(event))


def test_a_head_request_is_answered_as_get_is_without_a_body(shared):
    answer = shared.http.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")
