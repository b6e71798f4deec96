"""Markdown of a model's answer, as HTML that is safe to show.

Two lines of defence that know nothing of each other: markdown-it writes no HTML of its input (`html=False`) and only
links with a known scheme, and nh3 keeps of the result what an allow-list names. Nothing that is left can run, style the
page or load anything.
"""

import html
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

from benthic.server.formulas import formulas, is_display, mathml
from benthic.server.highlight import coloured
from benthic.server.limits import LIMITS

_MATH = (
    "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mmultiscripts "
    "mprescripts none mtable mtr mtd mlabeledtr mstyle mpadded mphantom menclose merror"
).split()
_MATH_ATTRIBUTES = (
    "display displaystyle scriptlevel mathvariant mathcolor stretchy fence form separator symmetric largeop "
    "movablelimits accent accentunder lspace rspace minsize maxsize linethickness width height depth notation "
    "columnalign columnlines columnspacing rowlines rowspacing"
).split()
_TAGS = (
    "p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong s a span div table thead tbody tr th td".split()
)
_PLAIN = re.compile(r"[\w#.%+ -]{0,64}", re.ASCII)
_ALLOWED = {
    "href": re.compile(r".*", re.DOTALL),
    "title": re.compile(r".*", re.DOTALL),
    "class": re.compile(r"code|language|latex|formula|wide|target|(hl-\w+ ?)+"),
}
_CLEANER = nh3.Cleaner(
    tags={*_TAGS, *_MATH},
    clean_content_tags={"script", "style"},
    attributes={
        **{tag: set(_MATH_ATTRIBUTES) for tag in _MATH},
        "a": {"href", "title"},
        "ol": {"start"},
        "th": {"align"},
        "td": {"align"},
        **{tag: {"class"} for tag in ("span", "div", "code")},
    },
    attribute_filter=lambda tag, name, value: value if _ALLOWED.get(name, _PLAIN).fullmatch(value) else None,
    url_schemes={"http", "https", "mailto"},
    link_rel="noopener noreferrer",
    set_tag_attribute_values={"a": {"target": "_blank"}},
)
_WIDE = 36  # characters from which an inline formula may be wider than a phone
_LINK = re.compile(r"https?://[^\s<>\"'`]+", re.IGNORECASE)


class Block(NamedTuple):
    """One paragraph, list, table ... of a text: the line it begins in, and its HTML."""

    line: int
    html: str


def render(text: str) -> list[Block]:
    """The blocks of a text in their order. Takes time in proportion to the text's length."""
    env: dict[str, Any] = {}
    return [
        Block(
            tokens[0].map[0] if tokens[0].map else 0, _CLEANER.clean(_RENDERER.render(tokens, _MARKDOWN.options, env))
        )
        for tokens in _top_level(_MARKDOWN.parse(text, env))
    ]


def _top_level(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """The tokens of each block that is in no other block."""
    depth, start = 0, 0
    for end, token in enumerate(tokens, 1):
        depth += token.nesting
        if depth == 0:
            yield tokens[start:end]
            start = end


def _links(state: StateCore) -> None:
    """Core rule of markdown-it: links show where they lead, images are links, and bare addresses become links."""
    for block in state.tokens:
        if block.children:
            block.children = list(_linked(block.children))


def _linked(tokens: Sequence[Token]) -> Iterator[Token]:
    href: str | None = None  # "" inside a link that must not be one
    said = ""
    for token in tokens:
        if token.type == "link_open":
            href, said = _target(str(token.attrs["href"])), ""
            if href:
                yield Token("link_open", "a", 1, attrs={"href": href, "title": href})
        elif token.type == "link_close":
            if href:
                yield from _close(href, said)
            href = None
        elif token.type == "image":
            said += token.content
            yield from _image(token, inside=bool(href))
        elif token.type == "text" and href is None:
            yield from _bare(token)
        else:
            said += token.content
            yield token


def _target(address: str) -> str:
    """The address of a link, or "" where it may not be one: relative ones would lead into this server."""
    return address if re.match(r"https?://[^/]|mailto:.", address, re.IGNORECASE) else ""


def _close(href: str, said: str) -> Iterator[Token]:
    """The end of a link and, unless its text says so already, the place it leads to."""
    yield Token("link_close", "a", -1)
    if said.strip() in (href, href.removeprefix("mailto:")):
        return
    place = (href if href.lower().startswith("mailto:") else urlsplit(href).netloc).removeprefix("mailto:")
    yield Token("target", "span", 0, content=place if len(place) <= 60 else f"{place[:20]}…{place[-39:]}")


def _image(token: Token, inside: bool) -> Iterator[Token]:
    """An image's words, as a link to it: nothing is loaded from elsewhere."""
    words = Token("text", "", 0, content=token.content or "image")
    href = _target(str(token.attrs["src"]))
    if inside or not href:
        yield words
        return
    yield Token("link_open", "a", 1, attrs={"href": href, "title": href})
    yield words
    yield from _close(href, words.content)


def _bare(token: Token) -> Iterator[Token]:
    """Text, with links of the addresses in it."""
    at = 0
    for found in _LINK.finditer(token.content):
        address = found[0].rstrip(".,;:!?)]}*_。，；：！？）】》")
        href = _MARKDOWN.normalizeLink(address)
        if not _MARKDOWN.validateLink(href) or not _target(href):
            continue
        yield Token("text", "", 0, content=token.content[at : found.start()])
        yield Token("link_open", "a", 1, attrs={"href": href, "title": href})
        yield Token("text", "", 0, content=address)
        yield from _close(href, address)
        at = found.start() + len(address)
    yield Token("text", "", 0, content=token.content[at:])


def _fence(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """Code, with its language above it."""
    token = tokens[index]
    language = (token.info.split() or [""])[0].lower()
    name = html.escape(language if re.fullmatch(r"[\w+#.-]{1,20}", language) else "")
    inside = coloured(token.content, language) or html.escape(token.content)
    return f'<div class="code"><div class="language">{name}</div><pre><code>{inside}</code></pre></div>\n'


def _formula(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """A formula, or its LaTeX where it cannot be converted."""
    token = tokens[index]
    display, latex = is_display(token.markup), token.content
    fits = len(latex) <= LIMITS["formula_characters"].high
    element = (mathml(latex, display) if fits else "") or f'<code class="latex">{html.escape(latex)}</code>'
    if not display:
        return f'<span class="wide">{element}</span>' if len(latex) > _WIDE else element
    return f'<div class="formula">{element}</div>\n' if token.block else f'<span class="formula">{element}</span>'


def _place(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return f' <span class="target">{html.escape(tokens[index].content)}</span>'


def _aligned(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """A table cell. markdown-it aligns by a style, which the page's policy forbids."""
    token = tokens[index]
    side = str(token.attrs.get("style", "")).removeprefix("text-align:")
    return f'<{token.tag} align="{side}">' if side else f"<{token.tag}>"


def _markdown() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).use(formulas)
    md.core.ruler.push("links", _links)
    rules = {"fence": _fence, "code_block": _fence, "formula": _formula, "target": _place}
    for name, rule in {**rules, "th_open": _aligned, "td_open": _aligned}.items():
        md.add_render_rule(name, rule)
    return md


_MARKDOWN = _markdown()
_RENDERER = _MARKDOWN.renderer
