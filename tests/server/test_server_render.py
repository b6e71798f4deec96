"""What /render lets through, read by an allow-list that knows nothing of the sanitiser's."""

import json
import re
import threading
import time
from html.parser import HTMLParser

import httpx
import pytest
from hostile import PAYLOADS
from markdown_it import MarkdownIt

from benthic.server import highlight, markup
from benthic.server.limits import LIMITS

TAGS = set(
    "p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong s a span div table thead tbody tr th td".split()
    + "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover".split()
    + "mtable mtr mtd mstyle mpadded mphantom menclose".split()
)
CLASSES = re.compile(r"(hl-\w+|code|language|latex|formula|wide|target)( hl-\w+)*")
SAFE = re.compile(r"[\w#.% +-]*", re.ASCII)
LINK = {"target": "_blank", "rel": "noopener noreferrer"}


class Checker(HTMLParser):
    """Faults of a piece of HTML: everything that is not known to be harmless."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.faults, self.text, self.depth = [], "", 0
        self.feed(html)
        self.close()
        if self.depth:
            self.faults.append("elements stay open")

    def handle_starttag(self, tag, attributes):
        self.depth += tag not in ("br", "hr")
        if tag not in TAGS:
            self.faults.append(f"<{tag}>")
        given = dict(attributes)
        if tag == "a":
            href = given.pop("href", "")
            if given != {**LINK, "title": href} or not re.match(r"(https?://[^/]|mailto:.)", href):
                self.faults.append(f"link {attributes}")
        elif "class" in given and tag in ("span", "div", "code"):
            if not CLASSES.fullmatch(given.pop("class")):
                self.faults.append(f"class {attributes}")
        elif set(given) & {"href", "src", "style", "class", "id", "name"}:
            self.faults.append(f"attributes {attributes}")
        if tag != "a":
            self.faults += [f"{name}={value}" for name, value in given.items() if not self.harmless(tag, name, value)]

    def harmless(self, tag, name, value):
        known = {"ol": ("start",), "th": ("align",), "td": ("align",)}.get(tag, ())
        mathematics = tag.startswith("m") and not name.startswith("on") and name.isalpha()
        return (name in known or mathematics) and SAFE.fullmatch(value)

    def handle_endtag(self, tag):
        self.depth -= 1

    def handle_data(self, data):
        self.text += data

    def unknown_decl(self, data):
        self.faults.append(f"<![{data}")

    handle_decl = handle_comment = handle_pi = unknown_decl


def rendered(text):
    return "".join(block.html for block in markup.render(text))


def test_there_are_120_payloads_and_more():
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 120


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_hostile_text_becomes_harmless_html(payload):
    for text in (payload, f"x {payload} y", f"- {payload}", f"> {payload}\n\n{payload}", f"# {payload}"):
        assert Checker(rendered(text)).faults == []


def test_the_checker_finds_what_markdown_alone_lets_through():
    careless = MarkdownIt("commonmark", {"html": True})
    found = [payload for payload in PAYLOADS if Checker(careless.render(payload)).faults]
    assert len(found) > 70


def test_the_sanitiser_alone_lets_no_payload_through():
    """The second line of defence holds where the first lets everything pass."""
    careless = MarkdownIt("commonmark", {"html": True})
    for payload in PAYLOADS:
        faults = Checker(markup._CLEANER.clean(careless.render(payload))).faults
        assert [fault for fault in faults if not fault.startswith("link")] == []


def test_what_is_written_is_kept_as_text():
    assert Checker(rendered("<script>alert(1)</script> & <b>x</b>")).text == "<script>alert(1)</script> & <b>x</b>\n"
    assert "<img src=x>" in Checker(rendered("```\n<img src=x>\n```")).text
    assert "a<b" in Checker(rendered("$\\text{a<b}$")).text


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**a** *b* ~~c~~ `d`", "<p><strong>a</strong> <em>b</em> <s>c</s> <code>d</code></p>\n"),
        ("a\nb", "<p>a<br>\nb</p>\n"),
        ("3. x", '<ol start="3">\n<li>x</li>\n</ol>\n'),
        ("[r](/render) [j](javascript:x)", "<p>r [j](javascript:x)</p>\n"),
        ("$x$ and \\(x\\) cost $5 and $6", '<p>{m} and {m} cost $5 and $6</p>\n'),
        ("\\$x\\$ `$x$`", "<p>$x$ <code>$x$</code></p>\n"),
        ("\\[\nx\n\\]", '<div class="formula">{d}</div>\n'),
        ("$$ x $$", '<div class="formula">{d}</div>\n'),
        ("- $$x$$ y", '<ul>\n<li><span class="formula">{d}</span> y</li>\n</ul>\n'),
        ("a\n$$\nx\n$$\nb", '<p>a</p>\n<div class="formula">{d}</div>\n<p>b</p>\n'),
        ("\\[ x", "<p>[ x</p>\n"),
        ("$$x", "<p>$$x</p>\n"),
    ],
)  # fmt: skip
def test_markdown_and_mathematics(text, html):
    inline = '<math display="inline"><mrow><mi>x</mi></mrow></math>'
    assert rendered(text) == html.replace("{m}", inline).replace("{d}", inline.replace("inline", "block"))


def test_a_link_shows_where_it_leads():
    place = '<span class="target">'
    assert f"{place}evil.example</span>" in rendered("[bank.example](https://evil.example/x)")
    assert place not in rendered("https://a.example/x") + rendered("<https://a.example/x>")
    assert f"{place}xn--pple-43d.com</span>" in rendered("[apple](https://аpple.com)")  # a Cyrillic letter
    assert "<img" not in rendered("![a](https://a.example/x.png)")
    assert f"{place}a.example</span>" in rendered("![a](https://a.example/x.png)")


def test_formulas_that_cannot_be_read_are_shown_as_written():
    assert rendered("$\\left(x$") == '<p><code class="latex">\\left(x</code></p>\n'
    longest = int(LIMITS["formula_characters"].high)
    assert "<math" in rendered(f"${'x' * longest}$")
    assert "<math" not in rendered(f"${'x' * (longest + 1)}$")


def test_aligned_equations_have_columns_and_no_numbers():
    html = rendered("\\[\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}\\]")
    assert html.count('<mtd columnalign="right">') == 2
    assert "(1)" not in html


def test_operators_are_operators_and_limits_stand_below():
    assert "<mo>±</mo>" in rendered("$b \\pm c$")
    assert '<munder><mo movablelimits="true">max</mo><mi>x</mi></munder>' in rendered("$$\\max_x f$$")


def test_code_is_coloured_by_classes():
    assert '<span class="hl-k">def</span>' in rendered("```python\ndef f(): pass\n```")
    assert '<div class="language">rust</div>' in rendered("```rust\nfn f() {}\n```")
    assert rendered("```unheard\n<x>\n```") == (
        '<div class="code"><div class="language">unheard</div><pre><code>&lt;x&gt;\n</code></pre></div>\n'
    )


@pytest.mark.parametrize("language", highlight.LANGUAGES)
def test_colours_change_no_character(language):
    code = "\n\n a = 'b' // \"c\\\" # <d>&amp; --e\n\t%f \\g ```h``` /* i\n"
    assert Checker(highlight.coloured(code, language)).text == code


def test_blocks_know_the_line_that_they_begin_in():
    text = "a\nb\n\n# c\n\n```\nd\n\ne\n```\n- f\n\n  g\n"
    assert [(block.line, block.html[:4]) for block in markup.render(text)] == [
        (0, "<p>a"), (3, "<h1>"), (5, "<div"), (10, "<ul>"),
    ]  # fmt: skip


SEEDS = [
    "[", "![", "![[]()", "[a](", "[[", "<", "<a ", "*", "**a", "_a*", "`", "``` ", "$", "$$", "$a", "\\(", "\\[",
    "\\[\n", "$$\n", "- \\[\n", "> ", "- ", "  - a\n", "1. ", "|\n", "|a|\n", "a|b\n-|-\n", "&", "&amp;",
    "http://a", "<http://a>", "[a]: b\n", "[a][a]", "<!--", "\n", "a\n\n", "\t", "中", "\\frac", "{", "\\$",
    "```js\n", "```python\n'\"\"\"\n",
]  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_time_grows_with_length_only(seed):
    assert growth(lambda text: markup.render(text), seed, 2000) < 12  # 4 if linear, 16 if quadratic


CODE = [
    '"\\',
    "'",
    '"""',
    "/*",
    "a.",
    "a<",
    "<a ",
    "<!--",
    "#{",
    "a-",
    "a: ",
    "=",
    "(",
    "1.",
    " ",
    "--",
    "`",
    "@a",
    "\\x",
]


@pytest.mark.parametrize(
    "language", ["python", "json", "sql", "toml", "bash", "c", "lua", "tex", "ini", "html", "css", "diff"]
)
def test_time_of_colours_grows_with_length_only(language):
    for seed in CODE:
        assert growth(lambda text: highlight.coloured(text, language), seed, 2000) < 12, seed


def test_the_measure_of_growth_finds_what_is_quadratic():
    """Other work on the machine can hide it from one measurement."""
    assert any(growth(lambda text: re.findall("(?=a*b)", text), "a", 12000) > 12 for _ in range(8))


def growth(work, seed, size):
    """How many times longer `work` takes for a text four times as long; the least of three measurements."""
    ratios = []
    for _ in range(3):
        times = []
        for length in (size, 4 * size):
            text = (seed * length)[:length]
            start = time.process_time()
            work(text)
            times.append(time.process_time() - start)
        if times[1] < 0.05:
            return 1.0  # too short to tell, and harmless
        ratios.append(times[1] / times[0])
        if ratios[-1] < 12:
            break
    return min(ratios)


def post(server, body, **options):
    return server.http.post("/render", content=body if isinstance(body, bytes) else json.dumps(body), **options)


def test_texts_are_rendered_in_order(shared):
    answer = post(shared, {"texts": ["# a", "", "b\n\nc"]})
    assert answer.json() == {
        "rendered": [
            [{"line": 0, "html": "<h1>a</h1>\n"}],
            [],
            [{"line": 0, "html": "<p>b</p>\n"}, {"line": 2, "html": "<p>c</p>\n"}],
        ]
    }
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[", b"[]", b"{}", b'{"texts": []}', b'{"texts": "a"}', b'{"texts": [1]}', b'{"texts": ["a"], "x": 1}',
        b'{"texts": ["\\ud800"]}', b'{"texts": ["\xff"]}', b"[" * 100_000, {"texts": ["a"] * 257},
        {"texts": ["a" * 32769]}, {"texts": ["a" * 20000, "b" * 20000]}, {"texts": [None]},
    ],
)  # fmt: skip
def test_a_bad_request_is_400_in_openai_shape(shared, body):
    answer = post(shared, body)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_render_needs_the_key_and_get_is_refused(locked, shared):
    assert post(locked, {"texts": ["a"]}).status_code == 401
    assert post(locked, {"texts": ["a"]}, headers={"authorization": "Bearer sk-right"}).status_code == 200
    assert httpx.get(f"{shared.url}/render").status_code == 405


def test_the_server_answers_while_it_renders(shared):
    """The loop is free: a health check does not wait for a long text."""
    slow = "a|b\n-|-\n" * 4000
    thread = threading.Thread(target=lambda: post(shared, {"texts": [slow]}, timeout=60))
    thread.start()
    times = []
    with httpx.Client(base_url=shared.url) as client:
        while thread.is_alive():
            start = time.monotonic()
            assert client.get("/health").status_code == 200
            times.append(time.monotonic() - start)
    thread.join()
    assert len(times) >= 3
    assert sorted(times)[len(times) // 2] < 0.1
