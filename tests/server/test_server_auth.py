"""The gate: who may ask, from where, and how much. With raw bytes where a client library would tidy them up."""

import time

import openai
import pytest

from benthic.base.errors import InputError
from benthic.server import auth, static
from benthic.server.app import routes
from benthic.server.config import ServeConfig
from benthic.server.limits import LIMITS

KEY = "sk-right"


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


def test_keys_are_compared_by_digest_in_constant_time(locked, monkeypatch):
    seen = []
    compare = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or compare(a, b))
    assert locked.http.get("/version", headers={"authorization": "Bearer x"}).status_code == 401
    assert seen == [(32, 32)]


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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "model.example"])
def test_without_a_key_a_host_that_others_reach_is_refused(host, monkeypatch):
    monkeypatch.delenv("BENTHIC_API_KEY", raising=False)
    with pytest.raises(InputError, match="BENTHIC_API_KEY"):
        auth.read_key(ServeConfig(model="m", host=host))
    monkeypatch.setenv("BENTHIC_API_KEY", "k")
    assert auth.read_key(ServeConfig(model="m", host=host)) == "k"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_on_loopback_no_key_is_needed(host, monkeypatch):
    monkeypatch.delenv("BENTHIC_API_KEY", raising=False)
    assert auth.read_key(ServeConfig(model="m", host=host)) == ""


def test_the_key_comes_from_flag_then_file_then_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BENTHIC_API_KEY", "from-env")
    file = tmp_path / "key"
    file.write_text("from-file\nnot this\n")
    assert auth.read_key(ServeConfig(model="m")) == "from-env"
    assert auth.read_key(ServeConfig(model="m", api_key_file=str(file))) == "from-file"
    assert auth.read_key(ServeConfig(model="m", api_key_file=str(file), api_key="from-flag")) == "from-flag"


def test_a_key_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "empty").write_text("\n")
    for config in (
        ServeConfig(model="m", api_key="schlüssel"),
        ServeConfig(model="m", api_key="a\nb"),
        ServeConfig(model="m", api_key_file=str(tmp_path / "empty")),
        ServeConfig(model="m", api_key_file=str(tmp_path / "missing")),
    ):
        with pytest.raises(InputError):
            auth.read_key(config)


def test_the_key_is_not_in_the_configs_text():
    assert "sk-secret" not in repr(ServeConfig(model="m", api_key="sk-secret"))


@pytest.mark.parametrize(
    "fields",
    [{"port": 65536}, {"port": -1}, {"max_num_seqs": 0}, {"max_queued_requests": -1}, {"shutdown_timeout": -1.0},
     {"shutdown_timeout": float("nan")}, {"shutdown_timeout": float("inf")}, {"max_model_len": -1}, {"host": ""},
     {"request_timeout": 0.0}, {"request_timeout": float("inf")}],
)  # fmt: skip
def test_options_out_of_range_are_named(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        ServeConfig(model="m", **fields)


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


def test_headers_without_end_are_refused_and_cost_nothing(shared, raw):
    connection = raw(shared.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 200_000)
    assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_a_body_that_never_comes_times_out(shared, raw, monkeypatch):
    monkeypatch.setattr(auth, "LIMITS", {**LIMITS, "body_seconds": LIMITS["body_seconds"]._replace(high=0.2)})
    start = time.monotonic()
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Length: 10")
    assert exchange(raw, shared.port, *lines, body=b"{")[0] == 408
    assert time.monotonic() - start < 9  # far below the limit that was not lowered
