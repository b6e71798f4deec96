"""Log-likelihoods through the server, asked for as lm-evaluation-harness does, are those of the model."""

import random

import pytest
import torch

from benthic.inference.config import EngineConfig
from benthic.inference.llm import LLM
from benthic.model.config import ModelConfig
from benthic.model.hf import load, write_model
from benthic.model.init import initialise
from benthic.model.transformer import Transformer

BOUND = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        max_position_embeddings=256,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "pebble"
    write_model(path, initialise(Transformer(config), std=0.3, seed=1), tokenizer)
    return path


@pytest.fixture
def server(folder, launch):
    llm = LLM(folder, device="cpu", dtype="float32", config=EngineConfig(max_num_seqs=8, max_num_batched_tokens=64))
    return launch(engine=llm.engine, tokenizer=llm.tokenizer, max_model_len=256, capacity=64)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """(context, continuation) as token ids: some short, some longer than a step."""
    rng = random.Random(5)
    sizes = [(1, 1), (3, 2), (20, 5), (70, 30), (140, 60), (9, 1), (2, 90), (33, 33)]
    size = tokenizer.vocab_size
    return [([rng.randrange(3, size) for _ in range(a)], [rng.randrange(size) for _ in range(b)]) for a, b in sizes]


def by_model(folder, pairs):
    """[(log-likelihood of the continuation, whether it is the greedy one)]."""
    model, _ = load(folder, device="cpu", dtype="float32")
    found = []
    for context, continuation in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation]))[0]
        rows = torch.log_softmax(logits.float(), -1)[len(context) - 1 : -1]
        wanted = torch.tensor(continuation)
        found.append((rows.gather(1, wanted[:, None]).sum().item(), bool((rows.argmax(-1) == wanted).all())))
    return found


def by_server(server, pairs):
    """The harness's payload, and what it reads of the answer."""
    payload = {
        "model": "tiny", "prompt": [context + continuation for context, continuation in pairs], "temperature": 0,
        "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True,
    }  # fmt: skip
    answer = server.http.post("/v1/completions", json=payload)
    assert answer.status_code == 200, answer.text
    found = []
    for choice, (context, _) in zip(sorted(answer.json()["choices"], key=lambda c: c["index"]), pairs):
        own = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        found.append((sum(own), all(value == max(top.values()) for value, top in zip(own, tops))))
    return found


def test_log_likelihoods_are_those_of_the_model(server, folder, pairs):
    greedy = list(pairs)
    for context, _ in pairs[:2]:  # and continuations that the model would choose
        answer = server.http.post("/v1/completions", json={"model": "tiny", "prompt": context, "temperature": 0,
                                                           "max_tokens": 4, "logprobs": 0,
                                                           "return_tokens_as_token_ids": True})  # fmt: skip
        tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
        greedy.append((context, [int(token.removeprefix("token_id:")) for token in tokens]))
    expected, found = by_model(folder, greedy), by_server(server, greedy)
    assert [choice for _, choice in found] == [choice for _, choice in expected]
    assert [choice for _, choice in expected][-2:] == [True, True]
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected)) < BOUND


def test_a_prompt_that_was_cached_has_the_same_log_likelihood(server, pairs):
    assert by_server(server, pairs[4:5] * 3) == by_server(server, pairs[4:5]) * 3


def test_a_log_likelihood_one_place_off_would_be_noticed(server, folder, pairs):
    shifted = [([*context, continuation[0]], continuation[1:]) for context, continuation in pairs if continuation[1:]]
    kept = [pair for pair in pairs if pair[1][1:]]
    assert max(abs(a - b) for (a, _), (b, _) in zip(by_server(server, shifted), by_model(folder, kept))) > BOUND
