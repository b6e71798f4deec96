r"""How DeepSeek cuts text before byte-pair merging: the released sequences of V1 and V3, and V3's as one fast regex.

V3's sequence isolates runs of up to three digits, then runs of Han and kana, then applies a GPT-like regex inside each
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


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

# The `pre_tokenizer` entry of the released tokenizer.json.
V3: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        _split(DIGITS_REGEX),
        _split(HAN_KANA_REGEX),
        _split(WORDS_REGEX),
        _BYTE_LEVEL,
    ],
}

# Letters that have case, listed range by range, as in the released file.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "Ὗ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗ"
    "Ａ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)

# The same entry of DeepSeek LLM and V2: line breaks and digits stand alone, words and marks may begin with one blank.
V1: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        _split(f"[{_NEWLINES}]"),
        _split(rf"\s?[{_CASED}]+"),
        _split("\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"),
        _split(r"\s+$"),
        _split("[一-龥\u0800-一가-\ud7ff]+"),
        {"type": "Digits", "individual_digits": True},
        _BYTE_LEVEL,
    ],
}
