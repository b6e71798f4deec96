"""The gate: who may ask, from where, and how much. With raw bytes where a client library would tidy them up."""

import contextlib
import time

import openai
import pytest

from benthic.server import gate, listener, static
from benthic.server.app import routes
from benthic.server.limits import LIMITS

KEY = "sk-right"
HELLO = [{"role": "user", "content": "hello"}]


def exchange(raw, port, *lines, body=b""):
    """(status, whole answer) of a request written by hand."""
    connection = raw(port, "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body)
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    return int(answer.split()[1]), answer


def test_every_route_but_health_and_the_page_needs_the_key(locked):
    server = locked
    paths = {route.path for route in routes(server.service)} | {"/", "/nothing", "/v1", "/metrics", "/docs"}
    for path in paths:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"):
            status = server.http.request(method, path).status_code
            assert (status != 401) == (path == "/health" or path.encode() in static.paths()), (method, path, status)
    assert len(paths) >= 8


@pytest.mark.parametrize(
    "target",
    ["/v1/models", "//v1/models", "/v1/models?x=/health", "/v1//models", "/V1/models", "/%76%31/models", "/health/",
     "/health/../v1/models", "/./health", "/%68ealth", "//health", "/health%3f", "/health;x", "/HEALTH", "/health%00",
     "http://127.0.0.1/health", "/v1/models#/health", "*"],
)  # fmt: skip
def test_no_spelling_of_a_path_gets_around_the_key(locked, raw, target):
    assert exchange(raw, locked.port, f"GET {target} HTTP/1.1", "Host: 127.0.0.1")[0] in (400, 401)


WRONG = [
    "X-Api-Key: sk-right", "Authorization: sk-right", "Authorization: Basic sk-right", "Authorization: Bearer",
    "Authorization: Bearer sk-wrong", "Authorization: Bearer sk-righ", "Authorization: Bearer sk-rightx",
    "Cookie: key=sk-right", "Authorization: Bearer \xff\xfe", "Proxy-Authorization: Bearer sk-right",
    "X-Forwarded-For: 127.0.0.1", "Authorization: Bearer sk-wrong\r\nAuthorization: Bearer sk-right",
]  # fmt: skip


@pytest.mark.parametrize("header", WRONG)
def test_only_the_right_key_in_the_right_header_opens(locked, raw, header):
    status, answer = exchange(raw, locked.port, "GET /v1/models HTTP/1.1", "Host: localhost", header)
    assert status == 401
    assert b'"error"' in answer
    assert b"sk-right" not in answer


def test_the_right_key_opens(locked, raw):
    server = locked
    assert [m.id for m in server.client.models.list()] == ["tiny"]
    lines = ("GET /v1/models HTTP/1.1", "Host: localhost", "authorization: bearer sk-right")
    assert exchange(raw, server.port, *lines)[0] == 200


def test_the_openai_client_sees_a_wrong_key_as_401(locked):
    server = locked
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client.with_options(api_key="sk-wrong").models.list()
    assert caught.value.code == "invalid_api_key"


FOREIGN = [
    "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "", "127.0.0.1@evil.example",
    "0x7f000001", "192.168.0.1", "[fe80::1]", "user@",
]  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN)
def test_a_foreign_host_is_403_on_a_loopback_server(shared, raw, host):
    assert exchange(raw, shared.port, "GET /health HTTP/1.1", f"Host: {host}")[0] in (400, 403)


def test_an_odd_spelling_of_this_machine_does_no_harm(shared, raw):
    assert exchange(raw, shared.port, "GET /nothing HTTP/1.1", "Host: [::1")[0] == 404


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "127.0.0.2"])
def test_this_machine_by_any_name_may_ask(shared, raw, host):
    assert exchange(raw, shared.port, "GET /health HTTP/1.1", f"Host: {host}")[0] == 200


def test_two_hosts_or_none_are_refused(shared, raw):
    port = shared.port
    assert exchange(raw, port, "GET /health HTTP/1.1", "Host: localhost", "Host: localhost")[0] in (400, 403)
    assert exchange(raw, port, "GET /health HTTP/1.0")[0] == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1", "file://"]
)
def test_a_page_of_another_origin_is_403_before_the_engine_hears_of_it(shared, origin):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    answer = shared.http.post("/v1/chat/completions", json=body, headers={"origin": origin})
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"
    assert not shared.engine.requests


def test_the_servers_own_page_may_ask(shared):
    server = shared
    assert server.http.get("/v1/models", headers={"origin": server.url}).status_code == 200


def test_a_public_server_answers_to_any_name_that_has_the_key(launch, raw):
    port = launch(key=KEY, host="0.0.0.0").port
    lines = ("GET /v1/models HTTP/1.1", "Host: model.example", "Origin: https://app.example")
    assert exchange(raw, port, *lines, f"Authorization: Bearer {KEY}")[0] == 200
    assert exchange(raw, port, *lines)[0] == 401


ORIGIN = {"origin": "https://app.example"}
ASKS = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}


def test_a_page_of_an_allowed_origin_may_ask_and_read(launch):
    server = launch(key=KEY, origins=("https://app.example",))
    answer = server.http.options("/v1/chat/completions", headers=ASKS)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.headers["access-control-allow-headers"] == "authorization"
    for key, status in ((KEY, 200), ("wrong", 401)):
        answer = server.http.get("/v1/models", headers={**ORIGIN, "authorization": f"Bearer {key}"})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert answer.headers["vary"] == "origin"


@pytest.mark.parametrize("origin", ["https://app.example.evil", "http://app.example", "https://APP.example", "null"])
def test_a_page_of_any_other_origin_gets_nothing(launch, origin):
    server = launch(key=KEY, origins=("https://app.example",))
    headers = {**ASKS, "origin": origin, "authorization": f"Bearer {KEY}"}
    for method in ("OPTIONS", "GET"):
        answer = server.http.request(method, "/v1/models", headers=headers)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_without_allowed_origins_there_is_no_cors(locked):
    answer = locked.http.options("/v1/models", headers={**ASKS, "origin": locked.url})
    assert answer.status_code == 401
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_all_bodies_together_are_bounded(launch, raw, monkeypatch, eventually):
    monkeypatch.setattr(gate, "LIMITS", {**LIMITS, "all_body_bytes": LIMITS["all_body_bytes"]._replace(high=1000)})
    server = launch()
    held = server.server.config.app._app
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Length: 900")
    waiting = raw(server.port, "\r\n".join([*lines, "", ""]).encode() + b" " * 800)
    assert eventually(lambda: held._held == 800)
    status, answer = exchange(raw, server.port, *lines, body=b" " * 900)
    assert status == 503
    assert b"retry-after" in answer.lower()
    waiting.close()
    assert eventually(lambda: held._held == 0)
    assert exchange(raw, server.port, *lines, body=b" " * 900)[0] == 400


def test_a_body_over_the_limit_is_413_whether_announced_or_not(shared, raw):
    server, limit = shared, int(LIMITS["body_bytes"].high)
    post = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost")
    assert exchange(raw, server.port, *post, f"Content-Length: {limit + 1}")[0] == 413
    assert exchange(raw, server.port, *post, f"Content-Length: {'9' * 19}")[0] in (400, 413)
    chunk = b"%x\r\n%s\r\n" % (2**20, b" " * 2**20)
    body = chunk * (limit // 2**20) + b"1\r\n \r\n"
    assert exchange(raw, server.port, *post, "Transfer-Encoding: chunked", body=body)[0] == 413


def test_headers_over_the_limit_are_431(shared):
    server = shared
    assert server.http.get("/health", headers={"x": "a" * int(LIMITS["header_bytes"].high)}).status_code == 431
    many = {f"x-{i}": "a" for i in range(int(LIMITS["header_count"].high) + 1)}
    assert server.http.get("/health", headers=many).status_code == 431


def short(name, seconds):
    return {**LIMITS, name: LIMITS[name]._replace(high=seconds)}


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("before", "data"), [(b"", b""), (b"", b"GET"), (b"", HEALTH[:-2]), (HEALTH, b"GET"), (HEALTH, HEALTH[:-2])]
)
def test_a_head_that_never_ends_costs_its_client_the_connection(shared, raw, monkeypatch, before, data):
    monkeypatch.setattr(listener, "LIMITS", short("head_seconds", 0.2))
    connection = raw(shared.port, before)
    answer = b""
    while before and not answer.endswith(b"}"):
        answer += connection.recv(4096)
    connection.sendall(data)
    start = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(4096) == b""
    assert time.monotonic() - start < 9  # far below the limits that were not lowered


def test_an_answer_may_take_longer_than_a_head(launch, engine, raw, monkeypatch):
    monkeypatch.setattr(listener, "LIMITS", short("head_seconds", 0.1))
    engine.script, engine.pause = [65] * 50, 0.01
    assert launch().client.chat.completions.create(model="tiny", messages=HELLO).usage.completion_tokens == 50


def test_connections_beyond_the_limit_are_closed_and_the_others_live(launch, raw, monkeypatch, eventually):
    monkeypatch.setattr(listener, "most_connections", lambda: 5)
    server = launch()
    held = [raw(server.port) for _ in range(5)]
    assert eventually(lambda: len(server.server.server_state.connections) == 5)
    with contextlib.suppress(ConnectionResetError):
        assert raw(server.port, HEALTH).recv(100) == b""
    held[0].sendall(HEALTH)
    assert held[0].recv(100).startswith(b"HTTP/1.1 200")


def test_headers_without_end_are_refused_and_cost_nothing(shared, raw):
    connection = raw(shared.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 200_000)
    assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_a_body_that_never_comes_times_out(shared, raw, monkeypatch):
    monkeypatch.setattr(gate, "LIMITS", {**LIMITS, "body_seconds": LIMITS["body_seconds"]._replace(high=0.2)})
    start = time.monotonic()
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Length: 10")
    assert exchange(raw, shared.port, *lines, body=b"{")[0] == 408
    assert time.monotonic() - start < 9  # far below the limit that was not lowered
