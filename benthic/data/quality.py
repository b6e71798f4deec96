"""Heuristics that reject what teaches nothing: after Gopher and C4, adapted to code, prose and Chinese.

Each rule is one function: text -> whether it is bad. The order of the table decides which rule is named.
"""

import re
import unicodedata

from benthic.data.documents import Document

MIN_CHARACTERS = 50
MAX_UNBROKEN = 500  # characters without a space or CJK punctuation: base64, minified code, one-line tables
MAX_MEAN_LINE = 2000  # characters; a paragraph per line is fine, a table per line is not
MIN_LETTERS = 0.4  # of the characters that are not blank
MAX_REPEATED = 0.3  # of the characters in long lines, that stand in a line seen before
LONG_LINE = 20  # characters; shorter lines (braces, `else:`) repeat in good code too
MAX_UNPRINTABLE = 0.005  # of all characters

_BREAK = re.compile(r"[\s\u3000-\u303f\uff01-\uff65]+")


def rejected_by(document: Document) -> str | None:
    """The name of the first rule that rejects the document, or None for one to keep."""
    return next((name for name, is_bad in RULES.items() if is_bad(document.text)), None)


def too_short(text: str) -> bool:
    """Fewer than 50 characters that are not blank."""
    return len("".join(text.split())) < MIN_CHARACTERS


def unprintable(text: str) -> bool:
    """Control, private and unassigned characters and U+FFFD: broken encodings, binary data that decodes."""
    return sum(map(_is_strange, text)) > MAX_UNPRINTABLE * len(text)


def _is_strange(char: str) -> bool:
    """Format characters (joiners, direction marks) are part of ordinary text."""
    visible = char.isprintable() or char.isspace() or unicodedata.category(char) == "Cf"
    return not visible or char == "\ufffd"


def unbroken(text: str) -> bool:
    """A word of 500 characters."""
    return max(map(len, _BREAK.split(text))) >= MAX_UNBROKEN


def long_lines(text: str) -> bool:
    """Lines of 2,000 characters on average, over more than a few lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) > 5 and len(text) > MAX_MEAN_LINE * len(lines)


def few_letters(text: str) -> bool:
    """Mostly digits and marks: number tables, rulers, drawings."""
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) < MIN_LETTERS * len(visible)


def repeated_lines(text: str) -> bool:
    """A third of the text is lines that it already contained."""
    seen: set[str] = set()
    total = repeated = 0
    for line in map(str.strip, text.splitlines()):
        if len(line) >= LONG_LINE:
            total += len(line)
            repeated += len(line) if line in seen else 0
            seen.add(line)
    return repeated > MAX_REPEATED * total


RULES = {rule.__name__: rule for rule in (too_short, unprintable, unbroken, long_lines, few_letters, repeated_lines)}
