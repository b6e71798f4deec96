"""Colours for code, in time proportional to its length whatever it holds.

Most of Pygments' lexers are quadratic for some text, and here the text is a model's. The few that are not are used;
other languages share small lexers below, in which no rule gives back what it has matched and every string or comment
may end where the text does.
"""

import re
from collections.abc import Iterator

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer, RegexLexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Generic, Keyword, Name, Number, Operator, String, Text

_STOCK = {"python": "python py python3", "json": "json", "sql": "sql", "toml": "toml"}
_CURLY_WORDS = frozenset(
    "abstract as async auto await base bool boolean break byte case catch chan char class companion const constexpr "
    "continue data default defer delete do double dyn else enum explicit export extends extension extern final finally "
    "float fn for foreach from fun func function get go goto guard if impl implements import in inline instanceof int "
    "interface internal is let lock long loop map match mod module move mut mutable namespace native new noexcept "
    "object of open operator out override package private protected protocol pub public range readonly ref register "
    "return sealed select self set short signed sizeof static string struct super switch synchronized template this "
    "throw throws trait transient try type typedef typename typeof union unsafe unsigned use using val var virtual "
    "void volatile when where while with yield".split()
)
_WORDS = frozenset(
    "and alias begin break by case class const continue data def deriving do done elif else elseif elsif end ensure "
    "esac export fi FROM for from function global goto if import in include infix instance lambda let local macro "
    "match module mutable newtype next not of or quote repeat rescue return self struct super then type unless until "
    "using when where while yield echo cd source sudo RUN CMD COPY ADD ENV EXPOSE ENTRYPOINT WORKDIR USER ARG "
    "LABEL VOLUME".split()
)
_CONSTANTS = frozenset(
    "true false null nil None True False undefined NaN TRUE FALSE NULL NA Inf nullptr this self yes no".split()
)


def _named(words: frozenset[str]):
    """A rule's action: a word is a keyword, a constant, what is called, or just a name."""

    def action(lexer: Lexer, found: re.Match[str]) -> Iterator[tuple[int, object, str]]:
        word = found[0]
        kind = Keyword.Constant if word in _CONSTANTS else Keyword if word in words else Name
        if kind is Name and found.string.startswith("(", found.end()):
            kind = Name.Function
        yield found.start(), kind, word

    return action


_SPACE = (r"\s++", Text)
_STRING = r'"(?:[^"\\\n]|\\.)*+"?'
_NUMBER = (r"\d[\w.]*+", Number)
_OTHER = (r"[^\w\s]", Operator)
_REST = (r".", Text)


class _Linear(RegexLexer):
    flags = re.MULTILINE | re.DOTALL


class _Curly(_Linear):
    """C and its kin."""

    tokens = {  # noqa: RUF012  (the parent class declares it so)
        "root": [
            _SPACE,
            (r"//[^\n]*+", Comment),
            (r"/\*(?:[^*]|\*(?!/))*+(?:\*/)?", Comment),
            (r"^#[a-z]++", Comment.Preproc),
            (_STRING, String),
            (r"`(?:[^`\\]|\\.)*+`?", String),
            (r"'(?:\\.[^'\n]{0,8}|[^'\\\n]{0,80})'", String),
            _NUMBER,
            (r"@[^\W\d]\w*+", Name.Decorator),
            (r"[^\W\d]\w*+", _named(_CURLY_WORDS)),
            _OTHER,
            _REST,
        ]
    }


class _Hash(_Linear):
    """Languages whose comments begin with `#`."""

    comment = r"#[^\n]*+"
    tokens = {  # noqa: RUF012
        "root": [
            _SPACE,
            (comment, Comment),
            (_STRING, String),
            (r"'(?:[^'\\\n]|\\.){0,80}'", String),
            (r"^[\w.-]++(?=:)", Name.Tag),
            (r"(?<= )[\w.-]++(?=:(?:\s|$))", Name.Tag),
            _NUMBER,
            (r"[^\W\d]\w*+", _named(_WORDS)),
            _OTHER,
            _REST,
        ]
    }


class _Dashes(_Linear):
    """Languages whose comments begin with `--`."""

    tokens = {"root": [(r"--[^\n]*+", Comment), *_Hash.tokens["root"][2:], _SPACE]}  # noqa: RUF012


class _Percent(_Linear):
    """TeX and Matlab."""

    tokens = {"root": [(r"%[^\n]*+", Comment), (r"\\[a-zA-Z]++", Keyword), *_Hash.tokens["root"][4:], _SPACE]}  # noqa: RUF012


class _Settings(_Linear):
    """ini: a section, or a key and its value."""

    tokens = {  # noqa: RUF012
        "root": [
            (r"^[ \t]*+[;#][^\n]*+", Comment),
            (r"^\[[^\n]*+", Keyword),
            (r"^[^=:\n]++(?=[=:])", Name.Tag),
            (r"[^\n]++", Text),
            (r"\n++", Text),
        ]
    }


class _Tags(_Linear):
    """HTML and XML."""

    tokens = {  # noqa: RUF012
        "root": [
            (r"<!--(?:[^-]|-(?!->))*+(?:-->)?", Comment),
            (r"</?+[\w:.-]++", Name.Tag, "tag"),
            (r"&#?\w{1,16};", Name.Entity),
            (r"[^<&]++", Text),
            _REST,
        ],
        "tag": [
            (r"/?+>", Name.Tag, "#pop"),
            (r"[\w:.@-]++", Name.Attribute),
            (r"\"[^\"]*+\"?", String),
            (r"'[^']*+'?", String),
            (r"[^\w:.@\"'>/-]++", Text),
            _REST,
        ],
    }


class _Styles(_Linear):
    """CSS."""

    tokens = {  # noqa: RUF012
        "root": [
            _SPACE,
            (r"/\*(?:[^*]|\*(?!/))*+(?:\*/)?", Comment),
            (_STRING, String),
            (r"'(?:[^'\\\n]|\\.)*+'?", String),
            (r"#[\da-fA-F]{3,8}\b|\d[\w.%]*+", Number),
            (r"@[\w-]++", Keyword),
            (r"[\w-]++(?=:[ \t])", Name.Attribute),
            (r"[\w-]++", Name),
            _OTHER,
            _REST,
        ]
    }


class _Changes(_Linear):
    """diff."""

    tokens = {  # noqa: RUF012
        "root": [
            (r"^\+[^\n]*+", Generic.Inserted),
            (r"^-[^\n]*+", Generic.Deleted),
            (r"^@@[^\n]*+", Generic.Subheading),
            (r"[^\n]++|\n", Text),
        ]
    }


_OURS = {
    _Curly: "c cpp c++ cuda java javascript js jsx typescript ts tsx csharp cs go rust rs kotlin kt swift scala php "
    "dart zig",
    _Hash: "bash sh shell zsh ruby rb r julia jl perl elixir yaml yml make makefile docker dockerfile cmake nix "
    "powershell",
    _Dashes: "lua haskell hs",
    _Percent: "tex latex matlab",
    _Settings: "ini conf properties",
    _Tags: "html xml svg vue",
    _Styles: "css scss less",
    _Changes: "diff patch",
}
_FORMATTER = HtmlFormatter(nowrap=True, classprefix="hl-")


def _lexers() -> dict[str, Lexer]:
    found = {alias: get_lexer_by_name(name) for name, aliases in _STOCK.items() for alias in aliases.split()}
    found |= {alias: lexer() for lexer, aliases in _OURS.items() for alias in aliases.split()}
    for lexer in found.values():
        lexer.stripnl = lexer.ensurenl = False
    return found


_LEXERS = _lexers()
LANGUAGES = tuple(sorted(_LEXERS))


def coloured(code: str, language: str) -> str:
    """Escaped HTML of `code`, in spans of the classes `hl-...`; "" for a language that is not known."""
    lexer = _LEXERS.get(language)
    return highlight(code, lexer, _FORMATTER) if lexer else ""
