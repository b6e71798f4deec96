"""Plain completions with the official OpenAI client."""

import openai
import pytest

PROMPT = "hello é你"


def ask(server, **fields):
    return server.client.completions.create(**{"model": "tiny", "prompt": PROMPT, **fields})


@pytest.fixture
def server(launch, engine, tokenizer):
    engine.script = [*tokenizer.encode(" wörld"), tokenizer.eos_id]
    return launch()


def test_a_text_is_gone_on_with_after_the_begin_token(server, engine, tokenizer):
    answer = ask(server)
    assert answer.choices[0].text == " wörld"
    assert answer.choices[0].finish_reason == "stop"
    ids = engine.requests[0].prompt_token_ids
    assert ids == [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(engine.script))
    ask(server, extra_body={"add_special_tokens": False})
    assert engine.requests[1].prompt_token_ids == ids[1:]


def test_sixteen_tokens_are_the_default(server, engine):
    ask(server)
    assert engine.requests[0].params.max_tokens == 16


def test_the_four_shapes_of_a_prompt_make_as_many_prompts(server, engine, tokenizer):
    ids = tokenizer.encode("abc")
    for prompt, prompts in (("abc", [[0, *ids]]), (["abc", "b"], [[0, *ids], [0, *tokenizer.encode("b")]]),
                            (ids, [ids]), ([ids, ids[:1]], [ids, ids[:1]])):  # fmt: skip
        engine.requests.clear()
        answer = ask(server, prompt=prompt)
        assert [request.prompt_token_ids for request in engine.requests] == prompts
        assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
        assert answer.usage.prompt_tokens == sum(map(len, prompts))


def test_answers_to_one_prompt_stand_together(server, engine):
    answer = ask(server, prompt=["a", "b"], n=2, echo=True)
    assert [choice.text for choice in answer.choices] == ["a wörld", "a wörld", "b wörld", "b wörld"]
    assert len(engine.requests) == 4
    assert answer.usage.completion_tokens == 4 * len(engine.script)


def test_a_stream_of_several_prompts_and_answers_joins_to_the_whole_answer(server, engine):
    engine.pause = 0.003
    fields = {"prompt": ["a", "bc"], "n": 2, "echo": True}
    whole = ask(server, **fields)
    chunks = list(ask(server, **fields, stream=True, stream_options={"include_usage": True}))
    texts, reasons, order = [""] * 4, [None] * 4, []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        order.append(choice.index)
        texts[choice.index] += choice.text
        reasons[choice.index] = reasons[choice.index] or choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["stop"] * 4
    assert order != sorted(order)
    assert chunks[-1].usage == whole.usage


def test_log_probabilities_have_the_old_format_with_offsets_into_the_text(server, engine, tokenizer):
    choice = ask(server, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert logprobs.token_logprobs == [-1.0 - i for i in range(len(engine.script))]
    assert [len(top) for top in logprobs.top_logprobs] == [2 + (id > 1) for id in engine.script]
    for token, top, own in zip(logprobs.tokens, logprobs.top_logprobs, logprobs.token_logprobs):
        assert top[token] == own
    data = [tokenizer.bytes_of_all([id], True) for id in engine.script]
    for i, offset in enumerate(logprobs.text_offset):
        assert offset == len(b"".join(data[:i]).decode("utf-8", "ignore"))
    assert "bytes:\\xc3" in logprobs.tokens


def test_with_echo_the_prompts_tokens_come_first(server, engine, tokenizer):
    choice = ask(server, echo=True, logprobs=1).choices[0]
    prompt = engine.requests[0].prompt_token_ids
    assert engine.requests[0].params.prompt_logprobs == 1
    assert choice.text == PROMPT + " wörld"
    logprobs, count = choice.logprobs, len(prompt)
    assert logprobs.token_logprobs[:count] == [None, *(-0.25 * i for i in range(1, count))]
    assert logprobs.token_logprobs[count:] == [-1.0 - i for i in range(len(engine.script))]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.text_offset[:3] == [0, 0, len(tokenizer.decode(prompt[1:2]))]
    assert logprobs.text_offset[count] == len(PROMPT)
    streamed = [c.choices[0].logprobs for c in ask(server, echo=True, logprobs=1, stream=True)]
    assert [lp for part in streamed if part for lp in part.token_logprobs] == logprobs.token_logprobs
    assert [at for part in streamed if part for at in part.text_offset] == logprobs.text_offset


def test_echo_alone_asks_the_engine_for_nothing_more(server, engine):
    assert ask(server, echo=True).choices[0].text == PROMPT + " wörld"
    assert engine.requests[0].params.prompt_logprobs == -1


def test_no_tokens_with_echo_tell_the_prompt_alone(server, engine):
    answer = ask(server, echo=True, logprobs=0, max_tokens=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (PROMPT, "length", 0)
    assert len(choice.logprobs.token_logprobs) == len(engine.requests[0].prompt_token_ids)
    assert [len(top) for top in choice.logprobs.top_logprobs[1:]] == [1] * (len(choice.logprobs.tokens) - 1)


def test_log_probabilities_of_the_prompt_come_per_choice(server, engine):
    answer = ask(server, prompt=[[1, 2, 3], [4, 5]], extra_body={"prompt_logprobs": 0})
    assert [len(choice.prompt_logprobs) for choice in answer.choices] == [3, 2]
    assert list(answer.choices[1].prompt_logprobs[1]) == ["5"]


def test_control_tokens_of_an_echoed_prompt_are_shown_if_asked_for(server):
    text = ask(server, prompt="a", echo=True, extra_body={"skip_special_tokens": False}).choices[0].text
    assert text == "<｜begin▁of▁sentence｜>a wörld<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("param", "fields"),
    [("prompt", {"prompt": [100_000]}), ("prompt", {"prompt": "", "extra_body": {"add_special_tokens": False}}),
     ("suffix", {"suffix": "x"}), ("best_of", {"best_of": 3}), ("max_tokens", {"max_tokens": 5000}),
     ("min_tokens", {"extra_body": {"min_tokens": 17}}), ("prompt", {"prompt": [1] * 5000})],
)  # fmt: skip
def test_what_cannot_be_done_is_400_and_named(server, engine, param, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, **fields)
    assert caught.value.param == param
    assert not engine.requests


def test_an_unknown_model_is_404(server):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(server, model="other")
    assert caught.value.code == "model_not_found"


def test_more_answers_than_the_server_can_ever_make_at_once_are_400(launch, engine):
    with pytest.raises(openai.BadRequestError, match="3 answers"):
        ask(launch(capacity=2), n=3)
