"""LaTeX between `$ $`, `$$ $$`, `\\( \\)` and `\\[ \\]`, as MathML.

A delimiter looks for its partner no farther than the longest formula, so that text of nothing but delimiters costs
linear time.
"""

import html
import re
import unicodedata
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

from benthic.server.limits import LIMITS

_LONGEST, _LINES = int(LIMITS["formula_characters"].high), int(LIMITS["formula_lines"].high)


def _between(open: str, close: str, inside: str) -> re.Pattern[str]:
    return re.compile(rf"{open}((?:{inside}){{1,{_LONGEST}}}+){close}", re.DOTALL)


# A backslash takes the next character along, so that neither `\$` nor the `)` of `\\)` ends a formula.
_INLINE = {
    "$$": _between(r"\$\$", r"\$\$", r"[^\\$]|\\.|\$(?!\$)"),
    "\\[": _between(r"\\\[", r"\\\]", r"[^\\]|\\[^\]]"),
    "\\(": _between(r"\\\(", r"\\\)", r"[^\\]|\\[^)]"),
    "$": _between(r"\$(?=\S)", r"(?<=\S)\$(?!\d)", r"[^\\$]|\\."),
}
_CLOSE = {"$$": "$$", "\\[": "\\]", "\\(": "\\)", "$": "$"}
_BLOCK = ("$$", "\\[")
_LIMITS = ("lim", "max", "min", "sup", "inf", "argmax", "argmin")  # what stands under them in a formula of its own

# What models write and the converter does not know, as what it does know. Equations get no numbers.
_KNOWN = {
    **{
        f"\\{end}{{{name}}}": f"\\{end}{{{known}}}"
        for end in ("begin", "end")
        for name, known in (("aligned", "align*"), ("align", "align*"), ("gathered", "gather*"), ("dcases", "cases"))
    },
    **{f"\\{name} ": f"\\operatorname{{{name}}} " for name in ("arg", "argmax", "argmin")},
    **{f"\\{name}_": f"\\operatorname{{{name}}}_" for name in ("argmax", "argmin")},
    "\\arg\\": "\\operatorname{arg}\\",
}
_UNKNOWN = re.compile("|".join(map(re.escape, _KNOWN)))


def formulas(md: MarkdownIt) -> None:
    """Make `md` read formulas, as tokens of type `formula` with their LaTeX as content; `markup` is the delimiter."""
    md.inline.ruler.before("escape", "formula", _inline)
    md.block.ruler.before("fence", "formula", _block, {"alt": ["paragraph", "reference", "blockquote", "list"]})


def is_display(markup: str) -> bool:
    """Whether formulas between these delimiters stand on their own."""
    return markup in _BLOCK


def mathml(latex: str, display: bool) -> str:
    """A `<math>` element, or "" where the LaTeX cannot be read. All text in it is escaped."""
    known = _UNKNOWN.sub(lambda found: _KNOWN[found[0]], latex)
    try:
        root = convert_to_element(known, display="block" if display else "inline")
    except Exception:  # the converter raises whatever its parser runs into, from KeyError to RecursionError
        return ""
    return _element(root)


def _element(element: Element) -> str:
    """HTML of an element. The converter's texts hold character references, which become characters first."""
    text, tag = html.unescape(element.text or ""), element.tag
    attributes = {name: html.unescape(value) for name, value in element.items() if name != "xmlns"}
    if tag == "mi" and len(text) == 1 and unicodedata.category(text) == "Sm":
        tag = "mo"  # the converter takes `\pm` for a name
    elif tag == "msub" and len(element) and element[0].text in _LIMITS:
        tag = "munder"
        element[0].set("movablelimits", "true")
    inside = html.escape(text) + "".join(_element(child) for child in element)
    written = "".join(f' {name}="{html.escape(value)}"' for name, value in attributes.items())
    return f"<{tag}{written}>{inside}</{tag}>{html.escape(html.unescape(element.tail or ''))}"


def _inline(state: StateInline, silent: bool) -> bool:
    """Inline rule of markdown-it."""
    for markup, pattern in _INLINE.items():
        if state.src.startswith(markup, state.pos) and _closes(state.src, state.pos, markup):
            found = pattern.match(state.src, state.pos, state.posMax)
            if found is None:
                continue  # what begins `$$` may still be read as `$`
            if not silent:
                _token(state, found[1], markup)
            state.pos = found.end()
            return True
    return False


def _closes(text: str, begin: int, markup: str) -> bool:
    """Whether the closing delimiter comes soon enough: a search that is far cheaper than the reading."""
    start = begin + len(markup)
    return text.find(_CLOSE[markup], start, start + _LONGEST + 2) >= 0


def _block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Block rule of markdown-it: delimiters that begin a line and end one, this or a later."""
    begin = state.bMarks[start] + state.tShift[start]
    markup = state.src[begin : begin + 2]
    if markup not in _BLOCK or state.is_code_block(start) or not _closes(state.src, begin, markup):
        return False
    last = _last_line(state, start, min(end, start + _LINES), _CLOSE[markup])
    if last is None:
        return False
    if not silent:
        latex = state.getLines(start, last + 1, state.blkIndent, False).strip()[2:-2]
        state.line = last + 1
        _token(state, latex, markup).map = [start, last + 1]
    return True


def _last_line(state: StateBlock, start: int, end: int, close: str) -> int | None:
    """The line that ends with `close`, the first of which began with its partner."""
    for line in range(start, end):
        if line > start and state.sCount[line] < state.blkIndent:
            return None  # outside of the list item or quotation
        text = state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].strip()
        if text.endswith(close) and (line > start or len(text) > 4):
            return line
        if line == start and close in text[2:]:
            return None  # goes on after its end: an inline formula
    return None


def _token(state: Any, latex: str, markup: str) -> Any:
    token = state.push("formula", "math", 0)
    token.content, token.markup = latex.strip(), markup
    token.block = isinstance(state, StateBlock)
    return token
