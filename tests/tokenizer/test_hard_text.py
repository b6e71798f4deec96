"""Ids of hard text with every released way of cutting: those of the tokenizers library, and never an added token."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from benthic.tokenizer import bpe, pretokenizer, tokens
from benthic.tokenizer.encoder import FastEncoder, PlainEncoder, whole_characters
from benthic.tokenizer.tokenizer import Tokenizer

# DeepSeek-Coder V1: as V1, with all letters and all punctuation instead of two lists of ranges.
CODER: dict = {
    "type": "Sequence",
    "pretokenizers": [
        pretokenizer.V1["pretokenizers"][0],
        *(
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
            for regex in (r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+")
        ),
        *pretokenizer.V1["pretokenizers"][-2:],
    ],
}
NAMES = [*tokens.FIRST, *tokens.LAST, *tokens.TOOLS, "ü", "À"]  # the released V1 file has letters as added tokens
HARD = [
    *("\ud83d", "\ude00", "\udfff", "\ud83d\ude00", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\ue000", "\u0378"),
    *("\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u180e", "\U000e0001", "\x00", "\x1b", "\x7f"),
    *("7" * 3, "7" * 4, "31415926535" * 20, "٣٤٥", "１２３", "Ⅻ", "½²", "1,000.50", "0x7f", "1e-5"),
    *("模型abc", "abc模型", "カタカナab・", "ー゛゜", "가나a", "𠀀好", "〇々", "，。！", "㍿", "Ｆｕｌｌ"),
    *("e\u0301", "\u0301", "\u0301a", "a" + "\u0300" * 30, "क्षि", "กำ", "שָׁ", "\u20dd", "好\u0301", "\u309a"),
    *("\r\n", "\r", "\n\r", " \r\n ", "\x0b", "\x0c", "\x85", "\u2028", "\u00a0", "\u3000", "\t", "  ", "   \n"),
    *("a" * 3000, "Ab" * 800, "ß" * 900, "語" * 900, "-" * 900, "\u200b" * 500, " " * 900, "Ω1" * 300),
    *("👨‍👩‍👧", "🏴\U000e0067\U000e007f", "👍🏽", "🇩🇪", "it's", "'LL", "don’t", "_a_", "::", "/**", "ǅ", "ﬁ", "für"),
]  # fmt: skip
hard = st.one_of(
    st.lists(st.sampled_from([*HARD, *NAMES, "<｜", "｜>", "<｜User", "</thi", "the", " a"]), max_size=12).map("".join),
    st.text(st.characters()),  # surrogates included
    st.binary().map(lambda data: data.decode("utf-8", "replace")),
    st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")),
)


def with_cut(trained: Tokenizer, cut: dict) -> Tokenizer:
    """The same merges with another way of cutting."""
    return Tokenizer(trained._spec | {"pre_tokenizer": cut}, trained._config)


@pytest.fixture(scope="module", params=["v3", "v1", "coder"])
def ours(request, texts) -> Tokenizer:
    if request.param == "coder":
        return with_cut(bpe.train(texts, 400, pretokenizer="v1"), CODER)
    return bpe.train(texts, 420, pretokenizer=request.param, tools=request.param == "v3")


@pytest.fixture(scope="module")
def library(ours) -> tokenizers.Tokenizer:
    """The library's own reading of the file, without the added tokens, which it would find in text."""
    return tokenizers.Tokenizer.from_str(json.dumps(ours._spec | {"added_tokens": []}))


@settings(max_examples=300, deadline=None)
@given(text=hard)
def test_ids_equal_the_tokenizers_library_and_text_survives(ours, library, text):
    whole = whole_characters(text)
    ids = ours.encode(text)
    assert ids == library.encode(whole, add_special_tokens=False).ids
    assert ours.decode(ids) == whole
    assert not {*ours.special.values()} & {*ids}


@settings(max_examples=100, deadline=None)
@given(text=hard)
def test_the_file_read_with_its_added_tokens_agrees_where_the_text_names_none(ours, text):
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours._spec))
    whole = whole_characters(text)
    if not any(name in whole for name in ours.special):
        assert ours.encode(text) == theirs.encode(whole, add_special_tokens=False).ids


def test_the_library_finds_added_tokens_in_text_and_we_only_when_asked(ours):
    """The negative control of both: the names are found by whoever looks for them."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(ours._spec))
    asked = Tokenizer(ours._spec, ours._config, released_compat=True)
    for name, id in ours.special.items():
        text = f"a{name}1"
        assert id in theirs.encode(text, add_special_tokens=False).ids
        assert id in asked.encode(text)
        assert id not in ours.encode(text)


def test_each_way_of_cutting_is_the_one_that_it_is_called(texts):
    """The three differ, so that agreement in the tests above is not that of one with itself."""
    v3, v1 = (bpe.train(texts, 420, pretokenizer=kind) for kind in ("v3", "v1"))
    assert isinstance(v3._encoder, FastEncoder)
    assert isinstance(v1._encoder, PlainEncoder)
    pieces = []
    for tokenizer in (v3, v1, with_cut(v1, CODER)):
        cut = tokenizers.Tokenizer.from_str(json.dumps(tokenizer._spec)).pre_tokenizer
        pieces.append([piece for piece, _ in cut.pre_tokenize_str("12345ªa")])
    assert pieces == [["123", "45", "Âªa"], [*"12345", "Âª", "a"], [*"12345", "Âªa"]]


def test_bytes_that_were_read_with_replacement_keep_their_replacement_characters(ours):
    text = "\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    assert ours.decode(ours.encode(f"a{text}b")) == f"a{text}b" == "a\ufffd\ufffd\ufffdb"
