"""Tool calls are read as they arrive, in any pieces; what is no call is content."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.base.errors import InputError
from benthic.tokenizer import bpe, tokens
from benthic.tokenizer.chat import render
from benthic.tokenizer.stream import TextStream
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.tokenizer.tool_calls import MARKS, ToolCallReader, ToolPiece, format_of, marks, plain

NAMES = {"C": tokens.CALLS, "E": tokens.END_CALLS, "c": tokens.CALL, "e": tokens.END_CALL, "|": tokens.SEP}
FORMATS = ("v3", "r1", "v3.1")
Said = tuple[str, list[tuple[str, str]]]  # content, and name and arguments of every call


def marked(text: str) -> str:
    """«x» stands for a token around calls."""
    for letter, name in NAMES.items():
        text = text.replace(f"«{letter}»", MARKS[name])
    return text


def said(pieces: list[ToolPiece]) -> Said:
    content, calls = "", []
    for piece in pieces:
        content += piece.content
        if piece.name:
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        if piece.arguments:
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
        assert sum(map(bool, (piece.content, piece.name, piece.arguments))) == 1
    return content, calls


def read(template: str, text: str) -> Said:
    reader = ToolCallReader(template)
    found = said(reader.feed(marked(text)) + reader.finish())
    assert reader.count == len(found[1])
    return found


V31_ADD = '«c»add«|»{"a": 1}«e»'
V3_ADD = '«c»function«|»add\n```json\n{"a": 1}\n```«e»'
ADD = ("add", '{"a": 1}')


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("v3.1", "Just text.", ("Just text.", [])),
        ("v3.1", f"Look:\n\n«C»{V31_ADD}«E»", ("Look:\n\n", [ADD])),
        ("v3.1", f"«C»{V31_ADD}{V31_ADD}«E»", ("", [ADD, ADD])),
        ("v3.1", "«C»«c»now«|»{}«e»«E»", ("", [("now", "{}")])),
        ("v3.1", "«C»«c»now«|»«e»«E»", ("", [("now", "")])),
        ("v3", f"Look:«C»{V3_ADD}«E»", ("Look:", [ADD])),
        ("r1", f"«C»{V3_ADD}\n{V3_ADD}«E»", ("", [ADD, ADD])),
        ("v3", '«C»«c»function«|»add\n```json\n{\n "a": 1\n}\n\n```\n«e»«E»', ("", [("add", '{\n "a": 1\n}')])),
        ("v3", '«C»«c»function«|»f\n```json\n{"a": "`` ```"}\n```«e»«E»', ("", [("f", '{"a": "`` ```"}')])),
        # the end is missing, in whole or in part
        ("v3.1", '«C»«c»add«|»{"a": 1}', ("", [ADD])),
        ("v3.1", '«C»«c»add«|»{"a": ', ("", [("add", '{"a": ')])),
        ("v3", '«C»«c»function«|»add\n```json\n{"a": 1}\n``', ("", [ADD])),
        ("v3", '«C»«c»function«|»add\n```json\n{"a": 1}«e»«E»', ("", [ADD])),
        ("v3.1", '«C»«c»add«|»{"a": 1}«E»', ("", [ADD])),
        ("v3.1", '«C»«c»add«|»{"a": 1}«c»add«|»{"a": 1}«e»', ("", [ADD, ADD])),
        # what is no call
        ("v3.1", f"«C»{V31_ADD}«E» And?", (" And?", [ADD])),
        ("v3.1", f"«C»{V31_ADD} and", (" and", [ADD])),
        ("v3.1", "«C» nothing «E»", ("<CALLS> nothing <END_CALLS>", [])),
        ("v3.1", "«C»«E»", ("<CALLS><END_CALLS>", [])),
        ("v3.1", "«C»«c»a b«|»{}«e»«E»", ("<CALLS><CALL>a b<SEP>{}<END_CALL><END_CALLS>", [])),
        ("v3.1", "«C»«c»«|»{}", ("<CALLS><CALL><SEP>{}", [])),
        ("v3.1", f"«C»«c»{'n' * 65}«|»", (f"<CALLS><CALL>{'n' * 65}<SEP>", [])),
        ("v3.1", "«C»«c»ad", ("<CALLS><CALL>ad", [])),
        ("v3", "«C»«c»code«|»add\n```json\n", ("<CALLS><CALL>code<SEP>add\n```json\n", [])),
        ("v3", "«C»«c»function«|»add\n{}", ("<CALLS><CALL>function<SEP>add\n{}", [])),
        ("v3.1", f"«C»{' ' * 65}{V31_ADD}", (f"<CALLS>{' ' * 65}", [ADD])),
        ("v3", f"«C»«c»{V3_ADD}«E»", ("<CALLS><CALL>", [ADD])),  # it begins anew
        ("v3.1", f"{V31_ADD}«E»", ("", [ADD])),  # without CALLS
        ("v3.1", f"«C»{V31_ADD}«E»«C»{V31_ADD}«E»", ("", [ADD, ADD])),
        ("v3.1", "«C»«c»f«|»{«|»}«e»", ("", [("f", "{<SEP>}")])),
        ("v3.1", tokens.CALLS + tokens.CALL, ("<CALLS><CALL>", [])),  # the names as text
    ],
)
def test_content_and_calls(template: str, text: str, expected: Said) -> None:
    content, calls = read(template, text)
    for name, token in (
        ("CALLS", tokens.CALLS), ("END_CALLS", tokens.END_CALLS), ("CALL", tokens.CALL),
        ("END_CALL", tokens.END_CALL), ("SEP", tokens.SEP),
    ):  # fmt: skip
        content = content.replace(token, f"<{name}>")
        calls = [(called, arguments.replace(token, f"<{name}>")) for called, arguments in calls]
    assert (content, calls) == expected


PARTS = st.sampled_from(
    [*(f"«{letter}»" for letter in NAMES), "function", "add", "\n```json\n", "\n```", "`", "\n", " ", '{"a": 1}', "x",
     V3_ADD, V31_ADD, f"«C»{V3_ADD}", f"«C»{V31_ADD}«E»", "好"]
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    template=st.sampled_from(FORMATS),
    parts=st.lists(PARTS, max_size=14),
    cuts=st.lists(st.integers(0, 120), max_size=12),
)
def test_pieces_do_not_depend_on_how_much_text_comes_at_once(template, parts, cuts) -> None:
    text = marked("".join(parts))
    whole = ToolCallReader(template)
    at_once = said(whole.feed(text))
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for steps in (itertools.pairwise(bounds), itertools.pairwise(range(len(text) + 1))):
        reader = ToolCallReader(template)
        pieces = [piece for a, b in steps for piece in reader.feed(text[a:b])]
        assert said(pieces) == at_once
        assert reader.finish() == ToolCallReader.finish(_same(template, text))
    shown = "".join(p.content + p.name + p.arguments for p in ToolCallReader(template).feed(text))
    assert not set(shown) & set(MARKS.values())


def _same(template: str, text: str) -> ToolCallReader:
    reader = ToolCallReader(template)
    reader.feed(text)
    return reader


@settings(max_examples=300, deadline=None)
@given(
    template=st.sampled_from(FORMATS),
    calls=st.lists(
        st.tuples(
            st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True),
            st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists)),
            st.sampled_from([None, 2]),
        ),
        max_size=4,
    ),
    content=st.text(),
)
def test_what_a_template_writes_is_what_is_read(tokenizer_with_tools, template, calls, content) -> None:
    """Every call of an assistant turn, through ids, one id at a time."""
    tokenizer = tokenizer_with_tools.with_template(template)
    content = content.replace("<", "(").encode("utf-8", "replace").decode()
    texts = [(name, json.dumps(arguments, indent=indent)) for name, arguments, indent in calls]
    asked = [{"function": {"name": name, "arguments": arguments}} for name, arguments in texts]
    question = {"role": "user", "content": ""}
    answer = {"role": "assistant", "content": content, "tool_calls": asked}
    rendered = render([question, answer], tokenizer)
    ids = [id for id, trained in zip(rendered.ids, rendered.mask) if trained]
    stream, reader = TextStream(tokenizer, True, marks(tokenizer)), ToolCallReader(template)
    pieces = [piece for id in ids for piece in reader.feed(stream.feed([id]))]
    pieces += reader.feed(stream.finish()) + reader.finish()
    assert said(pieces) == (content, texts)


def test_little_is_held_back() -> None:
    """Arguments arrive character by character; of content nothing waits."""
    reader = ToolCallReader("v3.1")
    assert [len(reader.feed(character)) for character in "Hello"] == [1] * 5
    reader.feed(marked("«C»«c»add"))
    assert reader.feed(marked("«|»")) == [ToolPiece(index=0, name="add")]
    for character in '{"a": 1}':
        assert reader.feed(character) == [ToolPiece(index=0, arguments=character)]
    fenced = ToolCallReader("v3")
    fenced.feed(marked("«C»«c»function«|»add\n```json\n"))
    for character in '{"a":1}':
        assert fenced.feed(character) == [ToolPiece(index=0, arguments=character)]
    assert [fenced.feed(character) for character in "\n``"] == [[], [], []]
    assert (fenced.held, reader.held) == (3, 0)
    assert fenced.feed("x") == [ToolPiece(index=0, arguments="\n``x")]


@pytest.fixture(scope="module")
def tokenizer_with_tools(texts) -> Tokenizer:
    return bpe.train(texts, 420, tools=True)


def test_the_names_of_marks_in_text_are_text(tokenizer_with_tools) -> None:
    """A model that quotes the format calls nothing; one that writes the tokens does."""
    tokenizer = tokenizer_with_tools
    call = f"{tokens.CALLS}{tokens.CALL}add{tokens.SEP}{{}}{tokens.END_CALL}{tokens.END_CALLS}"
    quoted = tokenizer.encode(call)
    parts = tokens.MARKUP.split(call)
    written = [i for p in parts for i in ([tokenizer.special[p]] if p in MARKS else tokenizer.encode(p))]
    found = []
    for ids in (quoted, written):
        reader = ToolCallReader("v3.1")
        found.append(said(reader.feed(TextStream(tokenizer, True, marks(tokenizer)).feed(ids)) + reader.finish()))
    assert found == [(call, []), ("", [("add", "{}")])]
    assert plain(TextStream(tokenizer, True, marks(tokenizer)).feed(written)) == tokenizer.decode(written)


def test_a_character_that_a_mark_cuts_short_is_replaced_before_it(tokenizer_with_tools) -> None:
    tokenizer = tokenizer_with_tools
    ids = [*tokenizer.encode("😀")[:1], tokenizer.special[tokens.CALLS]]
    assert TextStream(tokenizer, True, marks(tokenizer)).feed(ids) == "\ufffd" + MARKS[tokens.CALLS]


def test_the_format_of_calls_is_that_of_the_template(tokenizer_with_tools, texts, tmp_path) -> None:
    tokenizer = tokenizer_with_tools
    assert [format_of(tokenizer.with_template(name)) for name in FORMATS] == list(FORMATS)
    assert format_of(tokenizer.with_template("v1")) == ""
    assert format_of(bpe.train(texts, 400).with_template("v3")) == ""
    path = tmp_path / "chat.jinja"
    for text, expected in (
        ("{{ messages }}", ""), ("{{ '<｜tool▁sep｜>' }}", "v3.1"), ("{{ '<｜tool▁sep｜>x\n```json' }}", "v3"),
    ):  # fmt: skip
        path.write_text(text)
        assert format_of(tokenizer.with_template(path)) == expected
    with pytest.raises(InputError, match="template 'v1' has no tool calls -> "):
        ToolCallReader("v1")
