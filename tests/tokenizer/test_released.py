"""Files with the layout of the released ones: V1's bytes as added tokens, and the behaviour of other tools."""

import hashlib
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.base.errors import InputError
from benthic.tokenizer import bpe, pretokenizer, tokens
from benthic.tokenizer.chat import render
from benthic.tokenizer.encoder import whole_characters
from benthic.tokenizer.stream import TextStream
from benthic.tokenizer.tokenizer import CONFIG, VOCABULARY, Tokenizer
from benthic.tokenizer.vocabulary import byte_alphabet

NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
LETTERS = [letter for letter, byte in byte_alphabet().items() if byte in NEVER_IN_UTF8]
NASTY = [
    *"aZé1٣½²好ア・゛한ع😀!+€ \t\n\r\u200b\ufeff\u00a0\u3000\x00\x85\u200d\u0301ÿÀ÷üßΩКⅧ，。\ud800",
    "12345",
    "  ",
    "für",
]
nasty = st.one_of(st.lists(st.sampled_from(NASTY)).map("".join), st.text())


def as_released(trained: Tokenizer) -> dict:
    """A trained V1 tokenizer.json in the released layout: BOS, EOS and the 13 letters come after the merges."""
    spec = json.loads(json.dumps(trained._spec))
    vocab = spec["model"]["vocab"]
    names = [name for name in sorted(vocab, key=vocab.__getitem__) if name not in {*trained.special, *LETTERS}]
    added = [tokens.BOS, tokens.EOS, *LETTERS]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    spec["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    spec["added_tokens"] = [
        {"id": len(names) + i, "content": name, "special": i < 2} | flags for i, name in enumerate(added)
    ]
    return spec


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("v1")
    trained = bpe.train(texts, 400, pretokenizer="v1")
    (folder / VOCABULARY).write_text(json.dumps(as_released(trained)), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(trained._config | {"pad_token": tokens.EOS}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def compat(folder) -> Tokenizer:
    return Tokenizer.load(folder, released_compat=True)


@pytest.fixture(scope="module")
def library(folder) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / VOCABULARY))


def test_the_pre_tokenizer_of_v1_is_the_released_one():
    digest = hashlib.sha256(json.dumps(pretokenizer.V1, sort_keys=True).encode()).hexdigest()
    assert digest == "66e2ab199237073e9fc33c966b554629aeb60f658816b19c6cdbf0f2e4dd4e3e"


def test_v1_cuts_digits_and_line_breaks_one_by_one(ours):
    pieces = [ours.bytes_of(i) for i in ours.encode("12345\n\n\r\n٣")]
    assert pieces[:5] == [b"1", b"2", b"3", b"4", b"5"]
    assert pieces[5:9] == [b"\n", b"\n", b"\r", b"\n"]
    for i in range(ours.vocab_size - 15):
        text = ours.bytes_of(i).decode("utf-8", "ignore")
        assert len(text) <= 1 or not any(c.isdigit() or c in "\r\n" for c in text)


def test_umlauts_survive_because_bytes_are_not_names(ours):
    assert not {*LETTERS} & {*ours.special}
    assert ours.decode(ours.encode("für Zürich ÷ À")) == "für Zürich ÷ À"


def test_released_compat_shows_why_that_is_not_the_files_own_behaviour(compat, library):
    """The negative control: other tools match the letter as the byte that its name stands for."""
    assert compat.encode("für") == library.encode("für").ids
    assert compat.decode(compat.encode("für")) == library.decode(library.encode("für").ids) == "f\ufffdr"


@settings(max_examples=250, deadline=None)
@given(text=nasty)
def test_released_compat_gives_the_librarys_ids_for_any_text(compat, library, text):
    assert compat.encode(text) == library.encode(whole_characters(text), add_special_tokens=False).ids


@settings(max_examples=250, deadline=None)
@given(text=nasty)
def test_without_the_letters_both_agree_and_text_survives(ours, compat, text):
    assert ours.decode(ours.encode(text)) == whole_characters(text)
    if not any(name in text for name in [*LETTERS, *compat.special]):
        assert ours.encode(text) == compat.encode(text)


def test_released_compat_matches_control_tokens_and_the_default_does_not(ours, compat, library):
    text = f"a{tokens.EOS}b"
    assert compat.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert compat.eos_id in compat.encode(text)
    assert ours.eos_id not in ours.encode(text)


def test_released_compat_holds_for_a_v3_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / VOCABULARY))
    text = f"a{tokens.USER} 12345 {tokens.THINK}für"
    assert Tokenizer.load(tmp_path, released_compat=True).encode(text) == library.encode(text).ids
    assert Tokenizer.load(tmp_path).encode(text) != library.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 300)), text=nasty)
def test_a_stream_shows_whole_characters_of_any_ids(ours, ids, text):
    for some in (ids, ours.encode(text)):
        stream = TextStream(ours)
        assert "".join([stream.feed([i]) for i in some]) + stream.finish() == ours.decode(some)


def test_a_v1_chat_is_rendered_from_the_released_layout(ours):
    rendered = render([{"role": "user", "content": "für\n1"}, {"role": "assistant", "content": "42"}], ours)
    assert ours.decode(rendered.ids) == f"{tokens.BOS}User: für\n1\n\nAssistant: 42{tokens.EOS}"
    assert ours.decode(i for i, keep in zip(rendered.ids, rendered.mask, strict=True) if keep) == f" 42{tokens.EOS}"


def test_a_v1_tokenizer_is_trained_without_chat_tokens_and_an_unknown_pretokenizer_is_refused(texts):
    trained = bpe.train(texts, 300, pretokenizer="v1")
    assert list(trained.special) == [*tokens.FIRST, *tokens.FIM]
    with pytest.raises(InputError, match="'v2'"):
        bpe.train(texts, 300, pretokenizer="v2")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="use 275 or more"):
        bpe.train(texts, 274, tools=True)
