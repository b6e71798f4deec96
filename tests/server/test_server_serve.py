"""A real model folder behind `serve`, in a process of its own: the same tokens as without a server, and a clean end."""

import os
import signal
import socket
import subprocess
import sys
import threading

import openai
import pytest

from benthic.base.errors import InputError
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.llm import LLM
from benthic.model.config import ModelConfig
from benthic.model.hf import write_model
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.server.app import serve
from benthic.server.config import ServeConfig
from benthic.server.listener import bind

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello, is this a test?"}]
PROGRAM = """
import sys
from benthic.base.errors import Interrupted
from benthic.server.app import serve
from benthic.server.config import ServeConfig
try:
    serve(ServeConfig(model=sys.argv[1], port=0, device="cpu", max_num_seqs=4, shutdown_timeout=10))
except Interrupted as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        max_position_embeddings=128,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "pebble"
    write_model(path, initialise(Transformer(config), std=0.15, seed=1), tokenizer)
    return path


@pytest.fixture(scope="module")
def process(folder):
    """(process, client) of a server with a key, found by the URL it prints."""
    env = {**os.environ, "BENTHIC_API_KEY": "sk-test", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    timer = threading.Timer(120, started.kill)
    timer.start()
    line = started.stderr.readline()
    assert line.startswith("pebble is served at http://127.0.0.1:"), line + started.stderr.read()
    with openai.OpenAI(base_url=f"{line.split()[-1]}/v1", api_key="sk-test", max_retries=0, timeout=60) as client:
        yield started, client
    timer.cancel()
    started.kill()
    started.communicate()


def test_the_server_gives_the_tokens_that_the_library_gives(process, folder, tokenizer):
    client = process[1]
    llm = LLM(folder, device="cpu", config=EngineConfig(max_num_seqs=1))
    for params in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_p": 0.8, "seed": 9}):
        (expected,) = llm.chat(TALK, SamplingParams(max_tokens=24, **params))
        answer = client.chat.completions.create(model="pebble", messages=TALK, max_tokens=24, **params)
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].finish_reason == expected.finish_reason
        assert answer.usage.completion_tokens == len(expected.token_ids)
        stream = client.chat.completions.create(model="pebble", messages=TALK, max_tokens=24, stream=True, **params)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected.text


def test_the_answer_is_the_same_in_company(process):
    client = process[1]
    ask = {"model": "pebble", "messages": TALK, "max_tokens": 24, "seed": 3}
    alone = client.chat.completions.create(**ask).choices[0].message.content
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(client.chat.completions.create(**ask).choices[0].message.content)
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [alone] * 6


def test_sigterm_ends_the_process_with_143_and_nothing_on_its_error_stream_but_url_and_reason(process):
    started = process[0]
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=20)
    assert started.returncode == 143
    assert err.splitlines() == ["SIGTERM: the server has closed"]
    assert out == ""


def test_a_port_in_use_is_an_error_before_the_model_is_loaded(tmp_path):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}"):
            serve(ServeConfig(model=str(tmp_path / "missing"), port=port))


def test_a_host_that_is_not_ours_is_an_error():
    with pytest.raises(InputError, match="cannot listen"):
        bind("192.0.2.1", 0)
    with pytest.raises(InputError, match="cannot listen"):
        bind("no such host", 0)


def test_a_folder_without_tokenizer_is_refused_and_the_port_is_free_again(tmp_path, tokenizer):
    config = ModelConfig(hidden_size=32, num_hidden_layers=1, first_k_dense_replace=1, vocab_size=300)
    write_model(tmp_path / "bare", initialise(Transformer(config), std=0.1, seed=1), None)
    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        serve(ServeConfig(model=str(tmp_path / "bare"), port=port, device="cpu"))
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


def test_the_name_of_the_model_is_its_folders_unless_given(tmp_path):
    assert ServeConfig(model=str(tmp_path / "pebble")).name == "pebble"
    assert ServeConfig(model=str(tmp_path), served_model_name="deep").name == "deep"
