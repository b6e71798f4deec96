"""The tokenizer from outside: vLLM's routes, in its shapes."""

import pytest

from benthic.tokenizer import chat

MESSAGES = [{"role": "user", "content": "hello"}]


def post(server, path, **fields):
    return server.http.post(path, json=fields)


def test_a_text_becomes_ids_and_ids_become_the_text(shared, tokenizer):
    for text in ("hello é你", "", "a" * 10_000):
        answer = post(shared, "/tokenize", prompt=text, model="tiny").json()
        assert answer["tokens"] == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 4096)
        assert answer["token_strs"] is None
        bare = post(shared, "/tokenize", prompt=text, add_special_tokens=False).json()["tokens"]
        assert bare == answer["tokens"][1:]
        assert post(shared, "/detokenize", tokens=bare).json() == {"prompt": text}


def test_the_text_of_each_token_can_be_had(shared, tokenizer):
    answer = post(shared, "/tokenize", prompt="hello", return_token_strs=True).json()
    assert answer["token_strs"] == [tokenizer.decode([id]) for id in answer["tokens"]]


def test_a_text_that_is_the_name_of_a_token_is_that_token(shared, tokenizer):
    eos = tokenizer.decode([tokenizer.eos_id])
    assert post(shared, "/tokenize", prompt=eos).json()["tokens"] == [tokenizer.eos_id]
    assert tokenizer.eos_id not in post(shared, "/tokenize", prompt=f"{eos}x").json()["tokens"]


def test_a_conversation_becomes_the_ids_that_an_answer_would_follow(launch, engine, tokenizer):
    chosen = tokenizer.with_template("v3.1")
    server = launch(tokenizer=chosen)
    for thinking in (None, True, False):
        extra = {} if thinking is None else {"chat_template_kwargs": {"thinking": thinking}}
        ids = post(server, "/tokenize", messages=MESSAGES, **extra).json()["tokens"]
        assert ids == chat.render(MESSAGES, chosen, True, thinking).ids
        server.client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=extra)
        assert engine.requests[-1].prompt_token_ids == ids
    whole = post(server, "/tokenize", messages=MESSAGES, add_generation_prompt=False).json()["tokens"]
    assert whole == chat.render(MESSAGES, chosen).ids


def test_the_tokenizer_says_what_it_is(shared, tokenizer):
    info = shared.http.get("/tokenizer_info").json()
    for name in ("bos", "eos", "pad"):
        assert tokenizer.special[info[f"{name}_token"]] == info[f"{name}_token_id"] == getattr(tokenizer, f"{name}_id")
    assert info["vocab_size"] == tokenizer.vocab_size
    assert "message" in info["chat_template"]


@pytest.mark.parametrize(
    ("path", "param", "fields"),
    [("/tokenize", "prompt", {}), ("/tokenize", "prompt", {"prompt": 3}), ("/tokenize", "promt", {"promt": "a"}),
     ("/tokenize", "messages", {"messages": []}), ("/detokenize", "tokens", {}),
     ("/detokenize", "tokens", {"tokens": [10**6]}), ("/detokenize", "tokens[0]", {"tokens": ["a"]}),
     ("/tokenize", "add_special_tokens", {"messages": MESSAGES, "add_special_tokens": True})],
)  # fmt: skip
def test_what_cannot_be_read_is_400_and_named(shared, path, param, fields):
    answer = post(shared, path, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_another_model_is_404(shared):
    assert post(shared, "/tokenize", prompt="a", model="other").status_code == 404
    assert post(shared, "/detokenize", tokens=[1], model="other").status_code == 404
