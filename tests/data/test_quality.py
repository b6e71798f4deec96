import pytest

from benthic.data import quality
from benthic.data.documents import Document, Skips
from benthic.data.quality import RULES, rejected_by
from benthic.data.sources import standard_library

PROSE = (
    "The tokenizer cuts the text into pieces, and each piece into tokens.\n"
    "A model then reads the tokens one after the other and guesses the next.\n"
)
CHINESE = "深度求索的模型把文本切成片段，再把片段切成词元。模型依次读取词元，并预测下一个词元是什么。训练后可以写程序。"
PERSIAN = "می\u200cخواهم بروم به خانه "
CODE = "def add(a, b):\n    if a:\n        return a + b\n    else:\n        return b\n\n\nprint(add(1, 2))\n"


@pytest.mark.parametrize("text", [PROSE, CHINESE * 100, CODE, PROSE.replace("\n", " ") * 50, PERSIAN * 5])
def test_ordinary_text_is_kept(text):
    assert rejected_by(Document("x", text, "test")) is None


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("too_short", "Hello there." + " " * 100),
        ("unprintable", PROSE + "\x01\x02\ufffd\ue000" * 5),
        ("unbroken", PROSE + "QUJD" * 200),
        ("long_lines", ("some words here " * 200 + "\n") * 10),
        ("few_letters", "\n".join(f"{i}, {i * 37 % 101}, {i * i}" for i in range(100))),
        ("repeated_lines", PROSE + "Subscribe to our newsletter today.\n" * 20),
    ],
)
def test_each_rule_rejects_its_kind_and_is_named(rule, text):
    assert rejected_by(Document("x", text, "test")) == rule


def test_every_rule_is_tested_above():
    marks = test_each_rule_rejects_its_kind_and_is_named.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(RULES)


def test_the_standard_library_is_kept_almost_whole():
    documents = list(standard_library(Skips()))[::5]
    rejected = [d.id for d in documents if quality.rejected_by(d)]
    assert len(rejected) < 0.05 * len(documents), rejected
