r"""How DeepSeek-V3 cuts text before byte-pair merging: as the released sequence, and as one regex for the fast engine.

The sequence isolates runs of up to three digits, then runs of Han and kana, then applies a GPT-like regex inside each
remaining *and each isolated* piece. One regex equals it when each alternative says so: Han and kana never mix with
other letters, the katakana middle dot (punctuation inside the kana block) still stands alone, the end of a piece counts
as the end of the text for `\s+(?!\S)`, and characters that no alternative of the sequence matches (zero-width, control,
unassigned) form pieces of their own instead of disappearing.
"""

from typing import Any

_HAN_KANA = r"\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"
_LETTERS = r"\p{L}\p{M}"
_MARKS = r"\p{P}\p{S}"
_NEWLINES = "\r\n"
_ASCII_MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""

DIGITS_REGEX = r"\p{N}{1,3}"
HAN_KANA_REGEX = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS_REGEX = (  # the released file holds the two newline characters themselves, not their escapes
    rf"{_ASCII_MARKS}[A-Za-z]+|[^{_NEWLINES}\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[{_NEWLINES}]*"
    rf"|\s*[{_NEWLINES}]+|\s+(?!\S)|\s+"
)

SINGLE_REGEX = "|".join(
    [
        DIGITS_REGEX,
        rf"[[{_HAN_KANA}]--[{_LETTERS}{_MARKS}]]?[[{_HAN_KANA}]&&[{_LETTERS}]]+",
        rf"[[{_HAN_KANA}]&&[{_MARKS}]]+",
        rf"[[{_HAN_KANA}]--[{_LETTERS}{_MARKS}]]+(?![[{_HAN_KANA}]&&[{_LETTERS}]])",
        rf"{_ASCII_MARKS}[A-Za-z]+",
        rf"[^{_NEWLINES}\p{{L}}{_MARKS}]?[[{_LETTERS}]--[{_HAN_KANA}]]+",
        rf" ?[[{_MARKS}]--[{_HAN_KANA}]]+[{_NEWLINES}]*",
        rf"\s*[{_NEWLINES}]+",
        rf"\s+(?![^\s\p{{N}}{_HAN_KANA}])",
        r"\s+",
        rf"[^\s{_LETTERS}{_MARKS}\p{{N}}{_HAN_KANA}]+(?![[{_LETTERS}]--[{_HAN_KANA}]])",
    ]
)


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# The `pre_tokenizer` entry of the released tokenizer.json.
V3: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        _split(DIGITS_REGEX),
        _split(HAN_KANA_REGEX),
        _split(WORDS_REGEX),
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
