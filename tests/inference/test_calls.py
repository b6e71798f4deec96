"""An answer that must call a tool does, in the words of the chat format, with arguments that follow the schema."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benthic.base.errors import BenthicError, InputError
from benthic.inference.calls import form
from benthic.inference.config import EngineConfig, SamplingParams, StructuredOutputsParams
from benthic.inference.engine import Engine
from benthic.inference.grammar import Grammars, bitmask
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.tokenizer import bpe, tokens
from benthic.tokenizer.chat import render
from benthic.tokenizer.stream import TextStream
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.tokenizer.tool_calls import ToolCallReader, marks

pytest.importorskip("xgrammar", reason="structured output needs the extra `grammar`")

BITS = {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}
SET = {"type": "object", "properties": {"bits": BITS, "kind": {"enum": ["a", "b"]}}, "required": ["bits", "kind"]}
TOOLS = [
    {"type": "function", "function": {"name": "set", "parameters": SET, "strict": True}},
    {"type": "function", "function": {"name": "zero"}},
]
FORMATS = ("v3", "r1", "v3.1")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bpe.train(['{"bits": [true, false], "kind": "a"} zero function json\n' * 20], 300, tools=True)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Iterator[Grammars]:
    made = Grammars(tokenizer, tokenizer.vocab_size)
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(config, tokenizer) -> Iterator[Engine]:
    c = replace(config, vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    made = Engine(initialise(Transformer(c), std=0.15, seed=0), tokenizer, EngineConfig(max_num_seqs=16))
    yield made
    made.close()


def answers(engine: Engine, tokenizer: Tokenizer, asked: StructuredOutputsParams, bias: str = "") -> list[list[int]]:
    """Those of eight that end, where the model likes to end what it has begun."""
    liked = [*tokenizer.special.values(), *tokenizer.encode('"]}`')]
    biases = dict.fromkeys(liked, 6.0) | {tokenizer.special[t]: 40.0 for t in [bias] if t}
    params = SamplingParams(max_tokens=200, seed=1, n=8, structured_outputs=asked, logit_bias=biases)
    return [output.token_ids for output in engine.generate([[5, 6, 7]], params) if output.finish_reason == "stop"]


def read(tokenizer: Tokenizer, template: str, ids: list[int]) -> tuple[str, list[tuple[str, str]]]:
    reader = ToolCallReader(template)
    pieces = reader.feed(TextStream(tokenizer, True, marks(tokenizer)).feed(ids)) + reader.finish()
    calls = [(p.name, "".join(q.arguments for q in pieces if q.index == p.index)) for p in pieces if p.name]
    return "".join(piece.content for piece in pieces), calls


def follows(name: str, arguments: str) -> bool:
    value = json.loads(arguments)
    if name == "zero":
        return value == {}
    return (
        list(value) == ["bits", "kind"]
        and value["kind"] in ("a", "b")
        and len(value["bits"]) <= 3
        and all(type(bit) is bool for bit in value["bits"])
    )


@pytest.mark.parametrize("template", FORMATS)
def test_every_answer_is_calls_and_nothing_else(engine, tokenizer, template) -> None:
    ended = answers(engine, tokenizer, form(tokenizer.with_template(template), TOOLS))
    found = [read(tokenizer, template, ids) for ids in ended]
    assert len(found) > 3
    assert all(not content and calls for content, calls in found)
    assert all(follows(*call) for _, calls in found for call in calls)
    assert {name for _, calls in found for name, _ in calls} == {"set", "zero"}
    texts = [tokenizer.decode(ids, skip_special=True) for ids in ended]
    assert all(text.startswith(tokens.CALLS) and text.endswith(tokens.END_CALLS) for text in texts)


@pytest.mark.parametrize("template", FORMATS)
def test_calls_as_the_template_writes_them_are_allowed_and_one_is_not_two(grammars, tokenizer, template) -> None:
    tokenizer = tokenizer.with_template(template)
    asked = [("set", '{"bits": [true], "kind": "b"}'), ("zero", "{}"), ("set", '{"bits": [], "kind": "a"}')]
    calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in asked]
    question = {"role": "user", "content": ""}
    rendered = render([question, {"role": "assistant", "content": None, "tool_calls": calls}], tokenizer)
    ids = [id for id, trained in zip(rendered.ids, rendered.mask) if trained]
    grammars.matcher(form(tokenizer, TOOLS)).accept(ids)
    for narrow in (form(tokenizer, TOOLS, parallel=False), form(tokenizer, TOOLS, "set")):
        with pytest.raises(BenthicError, match="does not fit the form"):
            grammars.matcher(narrow).accept(ids)


def test_without_a_form_the_same_model_calls_nothing(engine, tokenizer) -> None:
    """The negative control."""
    found = [read(tokenizer, "v3.1", ids) for ids in answers(engine, tokenizer, StructuredOutputsParams())]
    assert found
    assert not any(calls and not content for content, calls in found)


@pytest.mark.parametrize("asked", [{"name": "set"}, {"parallel": False}])
def test_one_call_where_one_is_asked_for(engine, tokenizer, asked: dict[str, Any]) -> None:
    found = [read(tokenizer, "v3.1", ids) for ids in answers(engine, tokenizer, form(of(tokenizer), TOOLS, **asked))]
    assert len(found) > 3
    assert all(len(calls) == 1 for _, calls in found)
    if "name" in asked:
        assert {name for _, calls in found for name, _ in calls} == {"set"}


def of(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer.with_template("v3.1")


def test_a_call_is_forced_once_the_thinking_has_ended(engine, tokenizer) -> None:
    asked = form(tokenizer.with_template("r1"), TOOLS, after_thinking=True)
    ended = answers(engine, tokenizer, asked, tokens.END_THINK)
    assert ended
    for ids in ended:
        thought = ids.index(tokenizer.special[tokens.END_THINK])
        content, calls = read(tokenizer, "r1", ids[thought + 1 :])
        assert content in ("", "\n\n")
        assert all(follows(*call) for call in calls)
        assert calls


def test_tokens_around_calls_are_allowed_only_where_a_form_names_them(grammars, tokenizer) -> None:
    around = {tokenizer.special[name] for name in tokens.TOOLS}
    for asked in ({"regex": "[^a]*"}, {"grammar": "root ::= [^b]*"}, {"json": {"type": "string"}}):
        assert not around & allowed(grammars, grammars.matcher(StructuredOutputsParams(**asked)))
    matcher = grammars.matcher(form(of(tokenizer), TOOLS))
    assert allowed(grammars, matcher) == {tokenizer.special[tokens.CALLS]}
    matcher.accept([tokenizer.special[tokens.CALLS]])
    assert allowed(grammars, matcher) == {tokenizer.special[tokens.CALL]}


def allowed(grammars: Grammars, matcher: Any) -> set[int]:
    row = bitmask([matcher], grammars.vocab_size)[0]
    return {id for id in range(grammars.vocab_size) if row[id // 32] >> (id % 32) & 1}


def test_a_schema_that_cannot_be_enforced_is_any_object_or_with_strict_an_error(grammars, tokenizer) -> None:
    loose: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "string", "contentEncoding": "base64"}}}
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": loose}}
    matcher = grammars.matcher(form(of(tokenizer), [tool]))
    ids = {name: tokenizer.special[name] for name in tokens.TOOLS}
    matcher.accept([ids[tokens.CALLS], ids[tokens.CALL], *tokenizer.encode("f"), ids[tokens.SEP]])
    matcher.accept([*tokenizer.encode('{"y": [1]}'), ids[tokens.END_CALL], ids[tokens.END_CALLS], tokenizer.eos_id])
    with pytest.raises(InputError, match=r"'contentEncoding' at .* cannot be enforced"):
        form(of(tokenizer), [{"type": "function", "function": tool["function"] | {"strict": True}}])


def test_what_cannot_be_called_is_refused(tokenizer) -> None:
    with pytest.raises(InputError, match=r"tool 'sit' must be called and is not among tools -> .*set"):
        form(of(tokenizer), TOOLS, "sit")
    with pytest.raises(InputError, match="tools is empty -> "):
        form(of(tokenizer), [])
    with pytest.raises(InputError, match="no words for calls -> "):
        form(tokenizer.with_template("v1"), TOOLS)


@pytest.mark.parametrize("tag", ["{", '{"type": "structural_tag"}', '{"format": {"json_schema": {"not": {}}}}'])
def test_a_tag_that_is_wrong_is_refused(grammars, tag) -> None:
    with pytest.raises(InputError, match=" -> "):
        grammars.compile(StructuredOutputsParams(structural_tag=tag))
