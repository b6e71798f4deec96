"""What operators see: counts for Prometheus, and a line of JSON per request."""

import json
import logging
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.inference.request import Request
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.server.access import writer
from benthic.server.metrics import Histogram, Metrics
from benthic.server.queue import Queue

ROOT = Path(__file__).resolve().parents[2]
HELLO = [{"role": "user", "content": "hello secret"}]


def scrape(server) -> dict:
    """{(name, labels that differ): value}"""
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for name, labels, value, *_ in family.samples:
            more = {key: label for key, label in labels.items() if key not in ("model_name", "engine")}
            found[(name, *(more[key] for key in sorted(more)))] = value
    return found


def ask(server, **fields):
    return server.client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **fields})


def test_requests_tokens_and_times_are_counted_by_vllms_names(launch, engine, eventually):
    engine.script, engine.cached = [65] * 100, 2
    server = launch()
    answers = [ask(server, max_tokens=count) for count in (1, 3, 8)]
    seen = scrape(server)
    prompts = sum(answer.usage.prompt_tokens for answer in answers)
    assert seen[("vllm:prompt_tokens_total",)] == seen[("vllm:prefix_cache_queries_total",)] == prompts
    assert seen[("vllm:generation_tokens_total",)] == 12
    assert seen[("vllm:request_success_total", "length")] == 3
    assert seen[("vllm:request_success_total", "stop")] == 0
    assert seen[("vllm:time_to_first_token_seconds_count",)] == 3
    assert seen[("vllm:inter_token_latency_seconds_count",)] == 9
    assert seen[("vllm:e2e_request_latency_seconds_count",)] == 3
    assert seen[("vllm:request_generation_tokens_bucket", "2.0")] == 1
    assert seen[("vllm:request_generation_tokens_bucket", "+Inf")] == 3
    key = ("benthic:http_requests_total", "/v1/chat/completions", "200")
    assert eventually(lambda: scrape(server)[key] == 3)
    assert seen[("vllm:num_requests_running",)] == seen[("vllm:num_requests_waiting",)] == 0


def test_running_and_waiting_requests_and_those_that_left_are_counted(launch, engine, eventually, raw):
    engine.gate.clear()
    server = launch(capacity=1, max_queued=2)
    threads = [threading.Thread(target=ask, args=(server,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: scrape(server)[("vllm:num_requests_waiting",)] == 2)
    seen = scrape(server)
    assert seen[("vllm:num_requests_running",)] == 1
    assert seen[("benthic:queued_prompt_tokens",)] > 2
    engine.gate.set()
    for thread in threads:
        thread.join(10)
    engine.script, engine.pause = [65] * 10**5, 0.001
    with ask(server, stream=True) as stream:
        next(stream)
    assert eventually(lambda: scrape(server)[("vllm:request_success_total", "abort")] == 1)


def test_no_client_can_make_a_new_value_of_a_label(locked):
    for path in ("/x", "/metrics/../y", "/v1/models?z", "/%00", "/\u4f60"):
        for method in ("GET", "BREW"):
            locked.http.request(method, path, headers={"authorization": "Bearer sk-right"})
    locked.http.headers["authorization"] = "Bearer sk-right"
    seen = scrape(locked)
    paths = {key[1] for key in seen if key[0] == "benthic:http_requests_total"}
    del locked.http.headers["authorization"]
    assert paths <= {"other", "/v1/models", "/metrics", "/health", "/version"}
    assert seen[("benthic:http_requests_total", "other", "404")] > 3


def test_metrics_need_the_key(locked):
    assert locked.http.get("/metrics").status_code == 401


def test_two_servers_in_one_process_count_each_for_itself(launch, engine):
    one, two = launch(), launch()
    ask(one)
    assert scrape(one)[("vllm:request_success_total", "stop")] == 1
    assert scrape(two)[("vllm:request_success_total", "stop")] == 0


def test_a_histogram_counts_every_value_once_and_bounds_are_inclusive():
    histogram = Histogram((1, 5))
    for value in (0, 1, 1.5, 5, 6, 100):
        histogram.add(value)
    assert histogram.buckets() == [("1.0", 2.0), ("5.0", 4.0), ("+Inf", 6.0)]
    assert histogram.sum == 113.5


def test_pages_drafts_and_preemptions_are_read_from_the_engine(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, q_lora_rank=None,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, intermediate_size=16,
        first_k_dense_replace=1, max_position_embeddings=64,
    )  # fmt: skip
    model = initialise(Transformer(config), std=0.1, seed=1)
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=2))
    counts = Metrics("tiny", Queue(1, 0, 0), engine)

    def value(name: str) -> float:
        text = counts.text().decode()
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))

    assert value("vllm:kv_cache_usage_perc") == 0
    engine.add(Request(prompt_token_ids=[1] * 20, params=SamplingParams(max_tokens=30, ignore_eos=True)))
    engine.step()
    assert 0 < value("vllm:kv_cache_usage_perc") <= 1
    assert value("benthic:engine_steps_total") == 1
    assert value("vllm:num_preemptions_total") == 0
    assert value("vllm:spec_decode_num_draft_tokens_total") == 0
    engine.close()


def names_in(dashboard: dict) -> set[str]:
    words = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            words |= {word for word in _words(target["expr"]) if word.startswith(("vllm:", "benthic:"))}
    return words


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c in ":_" else " " for c in text).split()


def test_the_dashboard_asks_for_nothing_that_the_server_does_not_have(launch, engine):
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    server = launch()
    ask(server)
    has = {key[0] for key in scrape(server)}
    of_engine = {
        "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total", "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total", "benthic:engine_steps_total",
    }  # fmt: skip
    wanted = names_in(dashboard)
    assert len(wanted) >= 12
    assert wanted <= has | of_engine
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_request_is_a_line_with_who_what_and_how_long(launch, engine, eventually):
    engine.script, lines = [65] * 100, []
    server = launch(key="sk-hidden", write=lines.append)
    ask(server, max_tokens=5)
    list(ask(server, max_tokens=4, stream=True))
    server.http.get("/v1/models", headers={"authorization": "Bearer sk-wrong"})
    assert eventually(lambda: len(lines) == 3)
    server.http.get("/health")
    assert eventually(lambda: len(lines) == 4)
    whole, streamed, refused, health = map(json.loads, lines)
    for line in (whole, streamed):
        assert line["client"].startswith("key-")
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
        assert line["finish"] == ["length"]
        assert 0 < line["first_token_seconds"] < line["seconds"]
        assert line["between_tokens_seconds"] > 0
        assert line["prompt_tokens"] > 3
    assert (whole["completion_tokens"], streamed["completion_tokens"]) == (5, 4)
    assert (refused["status"], refused["client"]) == (401, "127.0.0.1")
    assert health["status"] == 200
    text = "".join(lines)
    assert "secret" not in text
    assert "sk-" not in text
    assert len({json.loads(line)["id"] for line in lines}) == 4


def test_prompts_are_in_the_log_only_where_they_are_asked_for(launch, tokenizer, eventually):
    lines = []
    ask(launch(write=lines.append, decode=tokenizer.decode))
    assert eventually(lambda: lines)
    assert "hello secret" in json.loads(lines[0])["prompts"][0]


def test_an_answer_names_the_line_that_it_has_in_the_log(launch, eventually):
    lines = []
    answer = launch(write=lines.append).client.models.with_raw_response.list()
    assert eventually(lambda: lines)
    assert answer.headers["x-request-id"] == json.loads(lines[0])["id"]


def test_a_log_that_is_moved_away_is_begun_anew(tmp_path):
    write = writer(str(tmp_path / "log"), sys.stderr)
    write("one")
    (tmp_path / "log").rename(tmp_path / "old")
    write("two")
    write("three")
    assert (tmp_path / "old").read_text() == "one\n"
    assert (tmp_path / "log").read_text() == "two\nthree\n"
    assert writer("", sys.stderr) is None
    with pytest.raises(InputError, match="access_log"):
        writer(str(tmp_path / "no" / "log"), sys.stderr)


def test_a_prompt_of_a_failed_request_is_in_no_log(launch, engine, caplog, capfd):
    lines = []
    server = launch(write=lines.append)
    engine.broken = RuntimeError("x")
    with caplog.at_level(logging.DEBUG), pytest.raises(Exception, match="engine failed"):
        ask(server)
    assert "secret" not in caplog.text + "".join(lines) + "".join(capfd.readouterr())
