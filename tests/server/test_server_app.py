"""The routes, with the official OpenAI client against a real server on a loopback port."""

import json
import logging
import subprocess
import sys
import threading

import openai
import pytest

from benthic.base.errors import InputError

MESSAGES = [{"role": "user", "content": "hello"}]


def ask(server, **fields):
    return server.client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **fields})


def test_an_answer_has_text_usage_and_finish_reason(launch, engine, tokenizer):
    engine.script = [*tokenizer.encode("hello world"), tokenizer.eos_id]
    answer = ask(launch(), seed=7, temperature=0.5, top_p=0.9)
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert answer.usage.completion_tokens == len(engine.script)
    params = engine.requests[0].params
    assert (params.seed, params.temperature, params.top_p) == (7, 0.5, 0.9)
    assert engine.threads == {"benthic-engine"}


def test_the_prompt_is_the_chat_rendering(launch, engine, tokenizer):
    from benthic.tokenizer import chat

    ask(launch())
    assert engine.requests[0].prompt_token_ids == chat.render(MESSAGES, tokenizer, add_generation_prompt=True).ids


def test_without_a_seed_two_requests_differ(launch, engine):
    server = launch()
    ask(server)
    ask(server)
    assert engine.requests[0].params.seed != engine.requests[1].params.seed


def test_without_max_tokens_the_answer_may_fill_the_context(launch, engine):
    ask(launch(max_model_len=100))
    request = engine.requests[0]
    assert len(request.prompt_token_ids) + request.params.max_tokens == 100


def test_a_stream_joins_to_the_whole_answer_and_ends_with_usage(launch, engine, tokenizer):
    engine.script = [*tokenizer.encode("你好 world é"), tokenizer.eos_id]
    server = launch()
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "你好 world é"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert not any(c.usage for c in chunks[:-1])
    assert chunks[-1].usage == ask(server).usage
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in ask(server, stream=True))


def test_reasoning_is_split_from_content_whole_and_streamed(launch, engine, tokenizer):
    think, end = tokenizer.special["<think>"], tokenizer.special["</think>"]
    engine.script = [think, *tokenizer.encode("so"), end, *tokenizer.encode("yes"), tokenizer.eos_id]
    server = launch()
    message = ask(server).choices[0].message
    assert (message.reasoning_content, message.content) == ("so", "yes")
    deltas = [c.choices[0].delta for c in ask(server, stream=True)]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "so"
    assert "".join(d.content or "" for d in deltas) == "yes"


def test_a_stop_string_ends_the_answer_and_frees_the_request(launch, engine, tokenizer, eventually):
    engine.script, engine.pause = tokenizer.encode("one two three ") * 200, 0.001
    server = launch()
    upto = len(tokenizer.encode("one two th"))
    answer = ask(server, stop=[" th"])
    assert answer.choices[0].message.content == "one two"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens <= upto
    assert "".join(c.choices[0].delta.content or "" for c in ask(server, stop=" th", stream=True)) == "one two"
    assert eventually(lambda: engine.counts["aborted"] == 2)
    assert not engine.running


def test_max_tokens_ends_the_answer_with_length(launch, engine):
    engine.script = [65] * 100
    answer = ask(launch(), max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


def test_models_version_and_health(shared):
    server = shared
    assert [m.id for m in server.client.models.list()] == ["tiny"]
    assert server.http.get("/health").json() == {"status": "ok"}
    assert set(server.http.get("/version").json()) == {"version"}


def test_an_unknown_model_is_404(shared):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(shared, model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 3), ("n", 129), ("top_logprobs", 2), ("tools", ["f"] * 129), ("max_tokens", 0),
     ("max_tokens", 10**6), ("messages", []), ("stop", ["x"] * 17), ("seed", -1), ("logit_bias", {"100000": 1})],
)  # fmt: skip
def test_a_bad_field_is_400_and_named(shared, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(shared, **{field: value})
    assert caught.value.param == field


def test_a_prompt_over_the_context_is_400_with_both_numbers(launch):
    with pytest.raises(openai.BadRequestError, match=r"the prompt has \d+ tokens.*may have 64") as caught:
        ask(launch(max_model_len=64), messages=[{"role": "user", "content": "abc " * 100}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405), ("PUT", "/version", 405),
     ("GET", "/v1/models/", 404), ("GET", "//health", 404), ("GET", "/docs", 404), ("BREW", "/health", 405)],
)  # fmt: skip
def test_wrong_routes_and_methods_answer_in_openai_shape(shared, method, path, status):
    answer = shared.http.request(method, shared.url + path)  # joined by httpx, `//health` is a host
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 50_000])
def test_a_malformed_body_is_400_in_openai_shape(shared, body):
    answer = shared.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_a_full_queue_is_429_with_retry_after_and_recovers(launch, engine, eventually):
    engine.gate.clear()
    server = launch(capacity=2)
    waiting = [threading.Thread(target=ask, args=(server,)) for _ in range(2)]
    for thread in waiting:
        thread.start()
    assert eventually(lambda: len(server.worker._open) == 2)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(server)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    engine.gate.set()
    for thread in waiting:
        thread.join(10)
    assert ask(server).choices[0].finish_reason == "stop"


def test_an_engine_error_is_500_in_openai_shape_and_the_next_request_works(launch, engine, caplog):
    server = launch()
    engine.broken = RuntimeError("cache is full")
    with caplog.at_level(logging.ERROR, "benthic"), pytest.raises(openai.InternalServerError) as caught:
        ask(server)
    assert caught.value.code == "engine_failed"
    assert "cache is full" in caplog.text
    assert not engine.running
    assert ask(server).choices[0].finish_reason == "stop"


def test_an_engine_error_in_the_middle_of_a_stream_is_an_error_event(launch, engine):
    engine.script, engine.pause = [65] * 1000, 0.005
    stream = ask(launch(), stream=True)
    next(stream)
    engine.broken = RuntimeError("x")
    with pytest.raises(openai.APIError, match="engine failed"):
        list(stream)


def test_a_request_that_the_engine_cannot_take_fails_alone(launch, engine, eventually):
    engine.script = [65] * 2000
    engine.pause = 0.002
    server = launch()
    stream = ask(server, stream=True, max_tokens=200)
    next(stream)
    engine.refuse = KeyError("bug")
    with pytest.raises(openai.InternalServerError):
        ask(server)
    engine.refuse = InputError("too odd -> send another")
    with pytest.raises(openai.BadRequestError, match="too odd"):
        ask(server)
    assert list(stream)[-1].choices[0].finish_reason == "length"


def test_an_engine_that_cannot_be_cleaned_refuses_everything(launch, engine, eventually):
    server = launch()
    engine.broken, engine.abort_broken = RuntimeError("x"), True
    with pytest.raises(openai.InternalServerError):
        ask(server)
    assert eventually(lambda: server.http.get("/health").status_code == 503)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(server)
    assert caught.value.status_code == 503


def test_an_unforeseen_error_is_500_and_logs_no_prompt(launch, monkeypatch, caplog):
    def render(messages, *_):
        raise ValueError(f"cannot render {messages}")

    monkeypatch.setattr("benthic.tokenizer.chat.render", render)
    with caplog.at_level(logging.DEBUG), pytest.raises(openai.InternalServerError) as caught:
        ask(launch(), messages=[{"role": "user", "content": "the secret word"}])
    assert caught.value.code == "internal"
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text
    assert "secret" not in str(caught.value.body)


def test_neither_prompts_nor_keys_are_logged(launch, caplog, capfd):
    with caplog.at_level(logging.DEBUG, "benthic"), caplog.at_level(logging.DEBUG, "uvicorn"):
        server = launch(key="sk-hidden")
        ask(server, messages=[{"role": "user", "content": "the secret word"}])
        server.http.get("/v1/models", headers={"authorization": "Bearer sk-hidden2"})
    logged = caplog.text + "".join(capfd.readouterr())
    assert "secret" not in logged
    assert "sk-hidden" not in logged


def test_draining_refuses_new_requests_finishes_old_ones_and_closes(launch, engine, eventually):
    import signal

    engine.script = [65] * 20
    engine.gate.clear()
    server = launch()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(server)))
    thread.start()
    assert engine.at_gate.wait(5)
    server.server.handle_exit(signal.SIGTERM, None)
    health = server.http.get("/health")
    assert health.status_code == 503
    assert server.http.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES}).status_code == 503
    assert server.thread.is_alive()
    engine.gate.set()
    thread.join(10)
    assert answers[0].choices[0].finish_reason == "stop"
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert server.server.signal == signal.SIGTERM
    server.worker.join(10)
    assert engine.counts["closed"] == 1


def test_requests_that_outlive_the_shutdown_timeout_end_with_an_error(launch, engine, eventually):
    import signal

    engine.script, engine.pause = [65] * 100_000, 0.01
    server = launch(shutdown_timeout=0.2, max_model_len=200_000)
    stream = ask(server, stream=True)
    next(stream)
    server.server.handle_exit(signal.SIGTERM, None)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    server.thread.join(10)
    assert not server.thread.is_alive()
    assert eventually(lambda: not engine.running)


def test_without_the_server_extra_the_error_says_how_to_install_it():
    code = "import sys; sys.modules['uvicorn'] = None\nimport benthic.server.app"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "InputError" in done.stderr
    assert "pip install 'benthic[server]'" in done.stderr


def test_the_options_import_no_torch():
    code = "import sys, benthic.server.config, benthic.server.limits as _; print({'torch', 'uvicorn'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_errors_survive_any_text_in_a_path_or_field(shared):
    server = shared
    for path in ("/%ED%A0%80", "/\u4f60", "/" + "x" * 5000):
        assert server.http.get(path).status_code == 404
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "\ud800": 1})
    assert server.http.post("/v1/chat/completions", content=body).status_code == 400
