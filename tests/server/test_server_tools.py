"""Tools and forms of answers with the OpenAI client: declared in the prompt, called in pieces, demanded by grammar."""

import asyncio
import json
import sys

import openai
import pytest

from benthic.inference.config import EngineConfig
from benthic.inference.llm import LLM
from benthic.model.config import ModelConfig
from benthic.model.hf import write_model
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.server.app import _compiler
from benthic.server.prepare import for_chat
from benthic.server.service import Forms
from benthic.server.types.chat import ChatRequest
from benthic.server.wire import dump
from benthic.tokenizer import bpe, chat

MESSAGES = [{"role": "user", "content": "hello"}]
WHERE = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 4}}, "required": ["city"],
         "additionalProperties": False}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": WHERE}}
TIME = {"type": "function", "function": {"name": "time"}}
FORMATS = ["v3", "r1", "v3.1"]


def ask(server, **fields):
    return server.client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **fields})


@pytest.fixture(scope="module")
def able():
    """A tokenizer with the tokens around calls."""
    return bpe.train(["hello world, this is a test of the server. 你好世界"] * 3, 300, pretokenizer="v3", tools=True)


def script(tokenizer, content, *calls):
    """The ids of an answer with calls."""
    made = [{"id": "x", "type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    said = {"role": "assistant", "content": content, "tool_calls": made}
    before = chat.render(MESSAGES, tokenizer, add_generation_prompt=True).ids
    return chat.render([*MESSAGES, said], tokenizer).ids[len(before) :]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_read_from_the_formats_own_tokens(launch, engine, able, name, stream):
    tokenizer = able.with_template(name)
    arguments = ['{"city": "é你"}', "{}"]
    content = "so</think>now" if name == "r1" else "now"
    engine.script = script(tokenizer, content, ("weather", arguments[0]), ("time", arguments[1]))
    server = launch(tokenizer=tokenizer)
    if stream:
        calls, text, reasons = {}, "", []
        for chunk in ask(server, tools=[WEATHER, TIME], stream=True):
            (choice,) = chunk.choices
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for part in choice.delta.tool_calls or []:
                one = calls.setdefault(part.index, {"id": part.id, "name": part.function.name, "arguments": ""})
                one["arguments"] += part.function.arguments
        found = [(one["name"], one["arguments"]) for one in calls.values()]
        ids = [one["id"] for one in calls.values()]
    else:
        choice = ask(server, tools=[WEATHER, TIME]).choices[0]
        found = [(one.function.name, one.function.arguments) for one in choice.message.tool_calls]
        ids = [one.id for one in choice.message.tool_calls]
        text, reasons = choice.message.content, [choice.finish_reason]
    assert found == [("weather", arguments[0]), ("time", arguments[1])]
    assert len(set(ids)) == 2
    assert text == "now"
    assert reasons == ["tool_calls"]


def test_the_prompt_declares_the_tools_unless_none_may_be_called(launch, engine, able):
    server = launch(tokenizer=able)
    ask(server, tools=[WEATHER])
    assert engine.requests[-1].prompt_token_ids == chat.render(MESSAGES, able, True, tools=[WEATHER]).ids
    ask(server, tools=[WEATHER], tool_choice="none")
    assert engine.requests[-1].prompt_token_ids == chat.render(MESSAGES, able, True).ids
    tokens = server.http.post("/tokenize", json={"messages": MESSAGES, "tools": [WEATHER]}).json()["tokens"]
    assert tokens == engine.requests[-2].prompt_token_ids


def test_calls_and_outputs_go_back_into_the_prompt_as_they_were_generated(launch, engine, able):
    engine.script = script(able, "now", ("weather", '{"city":"x"}'))
    server = launch(tokenizer=able)
    message = ask(server, tools=[WEATHER]).choices[0].message
    first = [*engine.requests[-1].prompt_token_ids, *engine.script]
    output = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    ask(server, tools=[WEATHER], messages=[*MESSAGES, message, output])
    assert engine.requests[-1].prompt_token_ids[: len(first)] == first


def test_without_parallel_calls_nothing_after_the_first_one_counts(launch, engine, able, eventually):
    engine.script = script(able, "now", ("time", "{}"), ("time", "{}")) * 2
    answer = ask(launch(tokenizer=able), tools=[TIME], parallel_tool_calls=False)
    assert [one.function.name for one in answer.choices[0].message.tool_calls] == ["time"]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert eventually(lambda: not engine.running)


def test_a_call_that_was_cut_by_the_length_says_so(launch, engine, able):
    engine.script = script(able, "", ("weather", '{"city": "abcdef"}'))
    choice = ask(launch(tokenizer=able), tools=[WEATHER], max_tokens=len(engine.script) - 6).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.name == "weather"


def test_every_token_of_a_call_has_its_log_probability(launch, engine, able):
    engine.script = script(able, "now", ("weather", '{"city":"x"}'))
    server = launch(tokenizer=able)
    whole = ask(server, tools=[WEATHER], logprobs=True).choices[0].logprobs.content
    assert len(whole) == len(engine.script)
    chunks = [c.choices[0].logprobs for c in ask(server, tools=[WEATHER], logprobs=True, stream=True)]
    assert [entry for part in chunks if part for entry in part.content] == whole


def test_the_names_of_tokens_in_text_call_nothing(launch, engine, able):
    text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
    engine.script = [*able.encode(text), able.eos_id]
    choice = ask(launch(tokenizer=able), tools=[TIME]).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


def test_a_format_without_tools_refuses_them(launch, engine, tokenizer):
    with pytest.raises(openai.BadRequestError, match="no words") as caught:
        ask(launch(), tools=[TIME])
    assert caught.value.param == "tools"
    ask(launch(), tools=[TIME], tool_choice="none")


# With grammars, on a real model with random weights


@pytest.fixture(scope="module")
def llm(tmp_path_factory, able):
    pytest.importorskip("xgrammar")
    config = ModelConfig(
        vocab_size=able.vocab_size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64,
        first_k_dense_replace=1, max_position_embeddings=1024,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "pebble"
    write_model(path, initialise(Transformer(config), std=0.15, seed=1), able)
    return LLM(path, device="cpu", chat_template="v3.1", config=EngineConfig(max_num_seqs=2))


@pytest.fixture
def formed(launch, llm):
    """A server of that model; its engine outlives the server."""
    llm.engine.close = lambda: None
    return launch(engine=llm.engine, tokenizer=llm.tokenizer, max_model_len=1024, forms=Forms(_compiler(llm)))


def test_answers_have_the_form_that_was_asked_for(formed):
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": WHERE, "strict": True}}
    for seed in range(3):
        text = ask(formed, response_format=schema, seed=seed, max_tokens=200).choices[0].message.content
        assert set(json.loads(text)) == {"city"}
        for extra, allowed in (({"guided_choice": ["yes", 'n"o']}, ("yes", 'n"o')),
                               ({"structured_outputs": {"regex": "a{2}b"}}, ("aab",)),
                               ({"guided_grammar": 'root ::= "x" | "yy"'}, ("x", "yy"))):  # fmt: skip
            assert ask(formed, extra_body=extra, seed=seed, max_tokens=20).choices[0].message.content in allowed
    text = (
        formed.client.completions.create(model="tiny", prompt="a", max_tokens=200, extra_body={"guided_json": WHERE})
        .choices[0]
        .text
    )
    assert set(json.loads(text)) == {"city"}
    assert "".join(
        c.choices[0].delta.content or "" for c in ask(formed, stream=True, extra_body={"guided_choice": ["yes"]})
    ) == "yes"  # fmt: skip


def test_a_call_can_be_demanded_of_any_tool_or_of_one(formed):
    for seed in range(3):
        choice = ask(formed, tools=[WEATHER, TIME], tool_choice="required", seed=seed, max_tokens=300).choices[0]
        assert choice.finish_reason == "tool_calls"
        for one in choice.message.tool_calls:
            assert set(json.loads(one.function.arguments)) == ({"city"} if one.function.name == "weather" else set())
        named = {"type": "function", "function": {"name": "weather"}}
        choice = ask(formed, tools=[WEATHER, TIME], tool_choice=named, seed=seed, max_tokens=300).choices[0]
        (one,) = choice.message.tool_calls
        assert (one.function.name, choice.finish_reason) == ("weather", "tool_calls")
        assert set(json.loads(one.function.arguments)) == {"city"}


@pytest.mark.parametrize(
    ("param", "fields"),
    [("response_format", {"response_format": {"type": "json_schema",
                                              "json_schema": {"name": "s", "schema": {"not": {}}}}}),
     ("guided_regex", {"extra_body": {"guided_regex": "("}}),
     ("structured_outputs", {"extra_body": {"structured_outputs": {"grammar": "root = x"}}}),
     ("tool_choice", {"tools": [{"type": "function", "function": {"name": "f", "strict": True,
                                                                  "parameters": {"not": {}}}}],
                      "tool_choice": "required"})],
)  # fmt: skip
def test_a_form_that_cannot_be_enforced_is_400_and_named(formed, param, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(formed, **fields)
    assert caught.value.param == param


def test_a_thought_that_the_prompt_begins_is_left_free(formed):
    def form(**fields):
        body = dump({"model": "tiny", "messages": MESSAGES, **fields})
        return asyncio.run(for_chat(formed.service, ChatRequest.read(body))).requests[0].params.structured_outputs

    asked = {"response_format": {"type": "json_object"}}
    assert not form(**asked).after_thinking
    assert form(**asked, chat_template_kwargs={"thinking": True}).after_thinking
    called = {"tools": [TIME], "tool_choice": "required", "chat_template_kwargs": {"thinking": True}}
    assert form(**called).after_thinking


def test_without_xgrammar_the_error_says_how_to_install_it(formed, llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "_grammars", None)
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(openai.BadRequestError, match=r"pip install 'benthic\[grammar\]'") as caught:
        ask(formed, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"
