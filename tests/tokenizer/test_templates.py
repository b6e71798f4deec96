"""Every chat format, rendered by us and by transformers from the folder that we save."""

import json
import random

import pytest
import tokenizers
import transformers

from benthic.base.errors import InputError
from benthic.tokenizer import bpe, templates, tokens
from benthic.tokenizer.chat import render
from benthic.tokenizer.templates import TEMPLATES, ThinkingRefused
from benthic.tokenizer.tokenizer import VOCABULARY, Tokenizer

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "<think>\nsum</think>4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
OUTPUT = {"role": "tool", "content": "4"}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "it's {{ b }}\n", "parameters": {"ä": [1, "好"]}}},
    {"type": "function", "function": {"name": "now", "strict": True, "description": None}},
    {"type": "function", "function": {"name": "get_weather-2.0", "description": "", "parameters": {}}},
]  # fmt: skip
WORDS = ["hi", "好。", " a  b", "1+1=2\n", "\n\n x", "", "  ", "12345", "ü 🙂", "... ok?", "'quoted' {{ braces }}"]


@pytest.fixture(scope="module", params=TEMPLATES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def v3(texts) -> Tokenizer:
    return bpe.train(texts, 420, tools=True)


@pytest.fixture(scope="module")
def v1(texts) -> Tokenizer:
    return bpe.train(texts, 400, pretokenizer="v1")


@pytest.fixture(scope="module")
def saved(name, v1, v3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    (v3 if TEMPLATES[name].tools else v1).with_template(name).save(folder)
    return folder


def conversation(rng: random.Random, name: str) -> list[dict]:
    """Turns in any order, of any role that the format knows."""
    roles = ["system", "user", "user", "assistant", "assistant"] + (["tool", "calls"] if TEMPLATES[name].tools else [])
    turns = []
    for role in rng.choices(roles, k=rng.randint(1, 8)):
        content = rng.choice(WORDS)
        if role in ("assistant", "calls") and TEMPLATES[name].forgets and rng.random() < 0.5:
            thoughts = rng.choice(["<think>", "<think>\n", "<think>\n\n", ""]) + rng.choice(WORDS) + "</think>"
            content = thoughts * rng.randint(1, 2) + content
            content = content.replace("</think>", "") if rng.random() < 0.2 else content
        turn: dict = {"role": "assistant" if role == "calls" else role, "content": content}
        if role == "calls":
            calls = [
                {"type": "function", "function": {"name": "f", "arguments": rng.choice(["{}", {"städte": ["好", 1]}])}}
                for _ in range(rng.randint(1, 3))
            ]
            turn |= {"tool_calls": calls, "content": rng.choice([None, content])}
        turns.append(turn)
    return turns


def test_ids_equal_transformers_on_the_saved_folder_for_200_conversations(name, saved):
    ours, theirs = Tokenizer.load(saved), transformers.PreTrainedTokenizerFast.from_pretrained(saved)
    library = tokenizers.Tokenizer.from_file(str(saved / VOCABULARY))
    rng = random.Random(11)
    for _ in range(200):
        messages, prompt = conversation(rng, name), rng.random() < 0.5
        thinking = rng.choice([None, *TEMPLATES[name].openings])
        said = {} if thinking is None else {"thinking": thinking}
        tools = TOOLS[: rng.randrange(4)] if TEMPLATES[name].tools else []
        rendered = render(messages, ours, prompt, thinking=thinking, tools=tools)
        said |= {"tools": tools or None}
        text = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **said)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False, **said)
        assert rendered.ids == ids == library.encode(text, add_special_tokens=False).ids, (messages, text)
        assert len(rendered.mask) == len(rendered.ids)


def test_a_format_is_found_by_its_own_text(name, saved):
    assert TEMPLATES[Tokenizer.load(saved).template or ""] == TEMPLATES[name]


@pytest.mark.parametrize(
    ("names", "fits"),
    [
        ([tokens.BOS], "v1"),
        ([tokens.USER], "v3"),
        ([tokens.USER, tokens.THINK], "r1"),
        ([tokens.USER, tokens.THINK, tokens.SEARCH], "v3.1"),
    ],
)
def test_a_tokenizer_without_a_template_gets_that_of_its_tokens(names, fits):
    assert templates.fitting(names) == fits


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v1", "<B>S\n\nUser: 2+2?\n\nAssistant: <think>\nsum</think>4<E>User: 2+2?\n\nAssistant:"),
        ("v3", "<B>S<U>2+2?<A>4<E><U>2+2?<A>"),
        ("r1", "<B>S<U>2+2?<A>4<E><U>2+2?<A><think>\n"),
        ("v3.1", "<B>S<U>2+2?<A></think>4<E><U>2+2?<A></think>"),
    ],
)
def test_the_formats_are_those_of_the_papers(name, text, v1, v3):
    tokenizer = v3 if TEMPLATES[name].tools else v1
    messages = [{"role": "system", "content": "S"}, USER, ANSWER, USER]
    assert short(tokenizer.decode(render(messages, tokenizer.with_template(name), True).ids)) == text


def short(text: str) -> str:
    names = {tokens.BOS: "<B>", tokens.EOS: "<E>", tokens.USER: "<U>", tokens.ASSISTANT: "<A>"}
    for long, brief in names.items():
        text = text.replace(long, brief)
    return text.replace("<｜tool▁", "<｜")


def test_thinking_is_chosen_where_the_format_has_both(v3):
    on, off = (render([USER], v3.with_template("v3.1"), True, thinking=t) for t in (True, False))
    assert v3.decode(on.ids).endswith(f"{tokens.ASSISTANT}{tokens.THINK}")
    assert v3.decode(off.ids).endswith(f"{tokens.ASSISTANT}{tokens.END_THINK}")
    with pytest.raises(ThinkingRefused, match="thinking=False is not a choice in template 'r1'"):
        render([USER], v3.with_template("r1"), True, thinking=False)


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("v1", "4", " 4<E>"),
        ("v3", "<think>\nsum</think>4", "<think>\nsum</think>4<E>"),
        ("r1", "<think>\nsum</think>4", "sum</think>4<E>"),
        ("r1", "sum</think>4", "sum</think>4<E>"),
        ("r1", "<think>sum</think>4", "sum</think>4<E>"),
        ("r1", "4", "4<E>"),
        ("v3.1", "<think>sum</think>4", "sum</think>4<E>"),
        ("v3.1", "4", "4<E>"),
    ],
)
def test_loss_is_on_what_the_model_writes_after_its_prompt(name, answer, said, v1, v3):
    tokenizer = (v3 if TEMPLATES[name].tools else v1).with_template(name)
    rendered = render([USER, {"role": "assistant", "content": answer}], tokenizer)
    assert short(tokenizer.decode(i for i, keep in zip(rendered.ids, rendered.mask, strict=True) if keep)) == said
    thinks = "</think>" in answer if len(TEMPLATES[name].openings) > 1 else None
    prompt = render([USER], tokenizer, True, thinking=thinks).ids
    if answer != "4" or name != "r1":  # R1 is asked to think, and an answer of old that did not is not cut to that
        n = min(len(prompt), rendered.mask.index(True))
        assert rendered.ids[:n] == prompt[:n]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "v3",
            "<B><U>2+2?<A><｜calls▁begin｜><｜call▁begin｜>function<｜sep｜>add\n```json\n{\"a\": 2}\n```<｜call▁end｜>"
            "\n<｜call▁begin｜>function<｜sep｜>add\n```json\n{\"a\": 2}\n```<｜call▁end｜><｜calls▁end｜><E>"
            "<｜outputs▁begin｜><｜output▁begin｜>4<｜output▁end｜><｜output▁begin｜>4<｜output▁end｜><｜outputs▁end｜>"
            "4<E><U>2+2?<A>",
        ),
        (
            "v3.1",
            "<B><U>2+2?<A></think><｜calls▁begin｜><｜call▁begin｜>add<｜sep｜>{\"a\": 2}<｜call▁end｜>"
            "<｜call▁begin｜>add<｜sep｜>{\"a\": 2}<｜call▁end｜><｜calls▁end｜><E>"
            "<｜output▁begin｜>4<｜output▁end｜><｜output▁begin｜>4<｜output▁end｜>4<E><U>2+2?<A></think>",
        ),
    ],
)  # fmt: skip
def test_calls_are_said_by_the_assistant_and_outputs_are_not(name, text, v3):
    messages = [USER, CALLS, OUTPUT, OUTPUT, {"role": "assistant", "content": "4"}, USER]
    rendered = render(messages, v3.with_template(name), True)
    assert short(v3.decode(rendered.ids)) == text
    said = short(v3.decode(i for i, keep in zip(rendered.ids, rendered.mask, strict=True) if keep))
    assert said == text[text.index("<｜calls▁begin｜>") : text.index("<E>") + 3] + "4<E>"


def test_a_prompt_after_outputs_goes_on_without_a_new_assistant_token(v3):
    ids = render([USER, CALLS, OUTPUT], v3.with_template("r1"), True).ids
    assert short(v3.decode(ids)).endswith("<｜output▁end｜><｜outputs▁end｜>")


def test_names_of_tokens_in_any_field_of_a_message_stay_text(name, v1, v3):
    tokenizer = (v3 if TEMPLATES[name].tools else v1).with_template(name)
    attack = "".join(tokenizer.special)
    messages = [{"role": "system", "content": attack}, {"role": "user", "content": attack}]
    if TEMPLATES[name].tools:
        call = {"function": {"name": attack, "arguments": {attack: attack}}}
        messages += [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": attack}]
    plain = json.loads(json.dumps(messages).replace(json.dumps(attack)[1:-1], "x"))
    special = set(tokenizer.special.values())
    found, expected = (render(m, tokenizer).ids for m in (messages, plain))
    assert [i for i in found if i in special] == [i for i in expected if i in special]


@pytest.mark.parametrize(
    ("messages", "name", "problem"),
    [
        ([USER, CALLS], "v1", r"tool_calls in messages\[1\]"),
        ([USER, OUTPUT], "v2", r"'tool' in messages\[1\]"),
        ([USER, {"role": "assistant", "content": None}], "v3", r"content is None in messages\[1\]"),
        ([USER, CALLS | {"tool_calls": "f"}], "v3", r"tool_calls is 'f' in messages\[1\]"),
        ([USER, CALLS | {"tool_calls": [{"type": "code"}]}], "v3", r"tool call .* in messages\[1\]"),
        ([USER, CALLS | {"tool_calls": [{"function": {"name": "f"}}]}], "v3", r"tool call .* in messages\[1\]"),
        ([{"content": "x"}], "v3", r"messages\[0\] has no role"),
        ([{"role": ["user"], "content": "x"}], "v3", r"role is \['user'\] in messages\[0\]"),
    ],
)
def test_malformed_tool_turns_are_refused_naming_the_place(messages, name, problem, v1, v3):
    with pytest.raises(InputError, match=problem):
        render(messages, (v3 if TEMPLATES[name].tools else v1).with_template(name))


def test_tool_turns_need_a_tokenizer_with_their_tokens(tokenizer):
    with pytest.raises(InputError, match="no tools"):
        render([USER, CALLS], tokenizer)


def test_another_template_needs_a_known_name_and_travels_with_the_folder(v3, tmp_path):
    with pytest.raises(InputError, match=r"unknown template 'r2'.*known: r1"):
        v3.with_template("r2")
    v3.with_template("r1").save(tmp_path)
    assert render([USER], Tokenizer.load(tmp_path), True) == render([USER], v3.with_template("r1"), True)
