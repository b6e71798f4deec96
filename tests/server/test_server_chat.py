"""Chat with the official OpenAI client: every parameter reaches the engine, every part of an answer reaches the
client."""

import asyncio

import openai
import pytest

from benthic.server.prepare import for_chat
from benthic.server.types.chat import ChatRequest
from benthic.server.wire import dump
from benthic.tokenizer import chat

MESSAGES = [{"role": "user", "content": "hello"}]


def ask(server, **fields):
    return server.client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **fields})


def said(engine, tokenizer, text):
    engine.script = [*tokenizer.encode(text), tokenizer.eos_id]
    return len(engine.script)


def test_every_sampling_parameter_reaches_the_engine(launch, engine):
    extra = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [7, 8],
        "include_stop_str_in_output": True, "ignore_eos": True, "priority": 3, "cache_salt": "mine",
        "prompt_logprobs": 0,
    }  # fmt: skip
    ask(
        launch(), temperature=0.5, top_p=0.9, seed=7, max_tokens=9, presence_penalty=0.5, frequency_penalty=-0.5,
        logit_bias={"5": -100, "6": 1.5}, stop=["xx", "yy"], logprobs=True, top_logprobs=3, extra_body=extra,
    )  # fmt: skip
    (request,) = engine.requests
    params = request.params
    assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.5, 0.9, 7, 9)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.2)
    assert params.logit_bias == {5: -100, 6: 1.5}
    assert (params.top_k, params.min_p, params.min_tokens, params.stop_token_ids) == (5, 0.1, 2, (7, 8))
    assert (params.stop, params.include_stop_str_in_output, params.ignore_eos) == (("xx", "yy"), True, True)
    assert (params.logprobs, params.prompt_logprobs) == (3, 0)
    assert request.cache_salt == "mine"


def test_the_priority_goes_with_every_answer(shared):
    ask = ChatRequest.read(dump({"model": "tiny", "messages": MESSAGES, "n": 2, "priority": -3}))
    job = asyncio.run(for_chat(shared.service, ask))
    assert [request.priority for request in job.requests] == [-3, -3]


def test_top_k_of_minus_one_keeps_all(launch, engine):
    ask(launch(), extra_body={"top_k": -1})
    assert engine.requests[0].params.top_k == 0


def test_n_answers_have_their_own_seeds_and_the_prompt_counts_once(launch, engine, tokenizer):
    count = said(engine, tokenizer, "hello world")
    answer = ask(launch(), n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"hello world"}
    assert len({request.params.seed for request in engine.requests}) == 3
    assert engine.requests[0].params.seed == 5
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert answer.usage.completion_tokens == 3 * count


def test_several_answers_are_streamed_side_by_side(launch, engine, tokenizer):
    said(engine, tokenizer, "hello world")
    engine.pause = 0.005
    chunks = [c.choices[0] for c in ask(launch(), n=2, stream=True)]
    for index in (0, 1):
        own = [choice for choice in chunks if choice.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == "hello world"
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]
    order = [choice.index for choice in chunks]
    assert order != sorted(order)


def test_a_stop_string_in_one_of_several_answers_leaves_the_others(launch, engine, tokenizer, eventually):
    engine.script, engine.pause = tokenizer.encode("one two three ") * 300, 0.001
    answer = ask(launch(), n=2, stop=[" th"], max_tokens=50)
    assert [choice.message.content for choice in answer.choices] == ["one two", "one two"]
    assert eventually(lambda: not engine.running)


def test_log_probabilities_stand_beside_every_token(launch, engine, tokenizer):
    count = said(engine, tokenizer, "é你 x")
    server = launch()
    entries = ask(server, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(entries) == count
    assert b"".join(bytes(e.bytes) for e in entries[:-1]).decode() == "é你 x"
    assert [e.logprob for e in entries] == [-1.0 - i for i in range(count)]
    assert [len(e.top_logprobs) for e in entries] == [2] * count
    assert entries[0].top_logprobs[1].token == tokenizer.decode([1])
    streamed = [c.choices[0].logprobs for c in ask(server, logprobs=True, top_logprobs=2, stream=True)]
    assert [e for part in streamed if part for e in part.content] == entries
    assert ask(server, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(server).choices[0].logprobs is None
    as_ids = ask(server, logprobs=True, extra_body={"return_tokens_as_token_ids": True})
    assert as_ids.choices[0].logprobs.content[0].token == f"token_id:{engine.script[0]}"


def test_streamed_log_probabilities_come_with_the_text_of_their_tokens(launch, engine, tokenizer):
    said(engine, tokenizer, "é你 x")
    for chunk in ask(launch(), logprobs=True, stream=True):
        choice = chunk.choices[0]
        if choice.logprobs:
            data = b"".join(bytes(e.bytes) for e in choice.logprobs.content if e.token != "<｜end▁of▁sentence｜>")
            assert data.decode() == (choice.delta.content or "")


def test_log_probabilities_that_are_not_finite_are_written_as_the_least_number(launch, engine):
    delta = engine.delta
    engine.delta = lambda *args: delta(*args)._replace(logprobs=[float("nan")], tops=[[(1, float("-inf"))]])
    entries = ask(launch(), logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert {(e.logprob, e.top_logprobs[0].logprob) for e in entries} == {(-9999.0, -9999.0)}


def test_log_probabilities_of_the_prompt_have_vllms_shape(launch, engine, tokenizer):
    answer = ask(launch(), extra_body={"prompt_logprobs": 1})
    ids = engine.requests[0].prompt_token_ids
    first, *places = answer.prompt_logprobs
    assert first is None
    assert len(places) == len(ids) - 1
    assert places[0][str(ids[1])] == {"logprob": -0.25, "rank": 1, "decoded_token": tokenizer.decode([ids[1]])}
    assert places[0]["0"] == {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.decode([0])}


def test_usage_tells_cached_and_reasoning_tokens(launch, engine, tokenizer):
    think, end = tokenizer.special["<think>"], tokenizer.special["</think>"]
    engine.script = [think, *tokenizer.encode("so so"), end, *tokenizer.encode("yes"), tokenizer.eos_id]
    engine.cached = 3
    server = launch()
    usage = ask(server, n=2).usage
    assert usage.prompt_tokens_details.cached_tokens == 3
    assert usage.completion_tokens_details.reasoning_tokens == 2 * (len(tokenizer.encode("so so")) + 2)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    last = list(ask(server, n=2, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.usage == usage
    assert last.choices == []


def test_control_tokens_are_shown_if_asked_for(launch, engine, tokenizer):
    said(engine, tokenizer, "hi")
    answer = ask(launch(), extra_body={"skip_special_tokens": False})
    assert answer.choices[0].message.content == "hi<｜end▁of▁sentence｜>"


def test_the_prompt_of_a_conversation_without_an_answer_to_come_is_its_rendering(launch, engine, tokenizer):
    talk = [*MESSAGES, {"role": "assistant", "content": "so"}]
    ask(launch(), messages=talk, extra_body={"add_generation_prompt": False})
    assert engine.requests[0].prompt_token_ids == chat.render(talk, tokenizer).ids


def test_an_answer_can_go_on_with_the_message_that_the_client_began(launch, engine, tokenizer):
    said(engine, tokenizer, " world")
    talk = [*MESSAGES, {"role": "assistant", "content": "hello"}]
    going = {"add_generation_prompt": False, "continue_final_message": True}
    server = launch()
    assert ask(server, messages=talk, extra_body=going).choices[0].message.content == " world"
    ids = engine.requests[0].prompt_token_ids
    assert [*ids, tokenizer.eos_id] == chat.render(talk, tokenizer).ids
    echoed = ask(server, messages=talk, extra_body={**going, "echo": True})
    assert echoed.choices[0].message.content == "hello world"
    chunks = ask(server, messages=talk, extra_body={**going, "echo": True}, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "hello world"


def test_an_answer_whose_form_takes_too_long_is_an_error(launch, engine):
    delta = engine.delta
    engine.delta = lambda *args: delta(*args)._replace(finish_reason="abort")
    with pytest.raises(openai.BadRequestError, match="form"):
        ask(launch())


def test_the_async_client_streams_too(launch, engine, tokenizer):
    said(engine, tokenizer, "hello world")
    server = launch()

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(main()) == "hello world"


def test_a_timeout_of_the_request_ends_it(launch, engine):
    engine.script, engine.pause = [65] * 10**5, 0.01
    with pytest.raises(openai.InternalServerError) as caught:
        ask(launch(max_model_len=200_000), extra_body={"timeout": 0.2})
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


def test_models_are_found_by_name(shared):
    assert shared.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        shared.client.models.retrieve("gpt-4/other")
    assert caught.value.code == "model_not_found"


def test_embeddings_are_refused_with_the_reason(shared):
    with pytest.raises(openai.NotFoundError, match="makes no embeddings"):
        shared.client.embeddings.create(model="tiny", input="hi")
