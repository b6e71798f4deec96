"""Tools in prompts: said in the words of the format, refused where it has none."""

import pytest

from benthic.base.errors import InputError
from benthic.tokenizer import bpe, templates, tokens
from benthic.tokenizer.chat import render
from benthic.tokenizer.tokenizer import Tokenizer

USER = {"role": "user", "content": "Warm?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def v3(texts) -> Tokenizer:
    return bpe.train(texts, 420, tools=True)


def said(tokenizer: Tokenizer, name: str, **more) -> str:
    return tokenizer.decode(render([USER], tokenizer.with_template(name), True, **more).ids)


def test_v3_1_declares_them_in_the_words_of_its_model_card(v3) -> None:
    assert said(v3, "v3.1", tools=[WEATHER, CLOCK]) == (
        "<｜begin▁of▁sentence｜>\n\n## Tools\nYou have access to the following tools:\n\n"
        "### weather\nDescription: Says it.\n\n"
        'Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}\n\n'
        "### clock\nDescription: \n\nParameters: {}\n\n"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
        "{additional_tool_calls}<｜tool▁calls▁end｜>\n\n"
        "Where:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces"
        "<｜User｜>Warm?<｜Assistant｜></think>"
    )


@pytest.mark.parametrize("name", ["v3", "r1"])
def test_v3_and_r1_are_told_to_call_as_their_own_calls_are_written(v3, name) -> None:
    text = said(v3, name, tools=[WEATHER])
    assert "### weather\nDescription: Says it.\n\nParameters: {" in text
    assert (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_call_name\n```json\n"
        "tool_call_arguments\n```<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>" in text
    )
    assert "chain them with a line break between them<｜User｜>" in text


@pytest.mark.parametrize("name", ["v3", "r1", "v3.1"])
def test_they_stand_between_system_prompt_and_conversation_and_carry_no_loss(v3, name) -> None:
    tokenizer = v3.with_template(name)
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Yes."}]
    plain, told = render(messages, tokenizer), render(messages, tokenizer, tools=[WEATHER])
    text = tokenizer.decode(told.ids)
    assert text.startswith(f"{tokens.BOS}Be brief.\n\n## Tools\n")
    assert text.endswith(tokenizer.decode(plain.ids).removeprefix(f"{tokens.BOS}Be brief."))
    assert sum(told.mask) == sum(plain.mask)


def test_the_names_of_tokens_inside_a_declared_tool_are_text(v3) -> None:
    bad = {"type": "function", "function": {"name": "f", "description": tokens.USER, "parameters": {"x": tokens.EOS}}}
    good = {"type": "function", "function": {"name": "f", "description": "u", "parameters": {"x": "e"}}}
    marks = [[i for i in said_ids if i in v3.special.values()] for said_ids in (ids(v3, bad), ids(v3, good))]
    assert marks[0] == marks[1]
    assert tokens.USER in v3.decode(ids(v3, bad)).split("## Tools")[1].split("Parameters")[0]


def ids(tokenizer: Tokenizer, tool: dict) -> list[int]:
    return render([USER], tokenizer.with_template("v3.1"), True, tools=[tool]).ids


def test_a_format_or_a_tokenizer_without_words_for_tools_refuses_them(v3, texts) -> None:
    v1 = bpe.train(texts, 400, pretokenizer="v1")
    for tokenizer, name in ((v1, "v1"), (v1, "v2"), (bpe.train(texts, 400), "v3.1")):
        with pytest.raises(
            InputError, match=f"tools, but template '{name}' or the tokenizer has no words for them -> "
        ):
            render([USER], tokenizer.with_template(name), True, tools=[WEATHER])


def test_a_strangers_template_gets_them_and_one_that_never_asks_refuses(v3, tmp_path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{% for t in tools %}[{{ t.function.name }} {{ t | tojson }}]{% endfor %}{{ messages[0].content }}")
    tool = {"type": "function", "function": {"name": "f", "description": tokens.USER}}
    rendered = render([USER], v3.with_template(path), tools=[tool])
    assert v3.decode(rendered.ids).startswith(
        '[f {"type": "function", "function": {"name": "f", "description": "<｜User｜>'
    )
    assert v3.special[tokens.USER] not in rendered.ids
    path.write_text("{{ messages[0].content }}")
    with pytest.raises(InputError, match="tools, but this chat_template has no words for them -> "):
        render([USER], v3.with_template(path), tools=[tool])


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("weather", r"tools\[0\] is 'weather' -> "),
        ({"type": "function"}, r"tools\[0\] is .* -> "),
        ({"type": "code", "function": {"name": "f"}}, r"tools\[0\] is .* -> "),
        ({"type": "function", "function": {"name": "a b"}}, r"name is 'a b' in tools\[0\] -> "),
        ({"type": "function", "function": {"name": "f" * 65}}, "name is 'ff"),
        ({"type": "function", "function": {"name": "f\n"}}, "name is "),
        ({"type": "function", "function": {"description": "x"}}, r"name is None in tools\[0\] -> "),
        (
            {"type": "function", "function": {"name": "f", "parameter": {}}},
            r"unknown key 'parameter' in tools\[0\].function -> remove it.*parameters",
        ),
        ({"type": "function", "function": {"name": "f", "parameters": "{}"}}, r"parameters is '{}' in tools\[0\] -> "),
        (
            {"type": "function", "function": {"name": "f", "parameters": {"a": {1}}}},
            r"parameters are no JSON in tools\[0\]",
        ),
        ({"type": "function", "function": {"name": "f", "description": 1}}, r"description is 1 in tools\[0\] -> "),
        ({"type": "function", "function": {"name": "f", "strict": "no"}}, r"strict is 'no' in tools\[0\] -> "),
    ],
)
def test_a_tool_that_is_wrong_is_named(v3, tool, message) -> None:
    with pytest.raises(InputError, match=message):
        render([USER], v3.with_template("v3.1"), tools=[tool])


def test_two_tools_of_one_name_are_refused(v3) -> None:
    with pytest.raises(InputError, match=r"name is 'clock' in tools\[1\], as in an earlier tool -> "):
        render([USER], v3.with_template("v3.1"), tools=[CLOCK, CLOCK])


def test_no_tools_change_nothing(v3) -> None:
    for name in templates.TEMPLATES:
        assert said(v3, name, tools=[]) == said(v3, name)
