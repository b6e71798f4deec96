"""The pieces of a self-contained page. Every text that comes from data enters through `esc`."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benthic.base.log import number
from benthic.eval.plots import COLORS

# No script, no fetch: the browser enforces what the page promises.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LONGEST = 4000  # characters of one text that are shown
LONGEST_CELL = 300  # the same in a table
MOST_ROWS = 200  # of a table
BARE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # what HTML or UTF-8 cannot hold

STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 var(--sans)}
main{max-width:1080px;margin:0 auto;padding:56px 28px 96px}
h1{font:600 40px/1.15 var(--serif);letter-spacing:-.01em;margin:0 0 12px;overflow-wrap:anywhere}
h2{font:600 26px/1.25 var(--serif);margin:0 0 8px}
h3{font:600 15px/1.4 var(--sans);margin:0 0 6px}
p{margin:0 0 14px;max-width:70ch}
.lead{font-size:19px;line-height:1.55;color:var(--ink);max-width:66ch}
.eyebrow{font-size:13px;letter-spacing:.08em;text-transform:uppercase;color:var(--muted);margin:0 0 10px}
section{margin-top:64px;border-top:1px solid var(--rule);padding-top:28px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:14px;margin:36px 0 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:18px 20px 16px}
.tile .name{font-size:14px;color:var(--muted);margin:0}
.tile .value{font:600 32px/1.2 var(--sans);font-variant-numeric:tabular-nums;letter-spacing:-.01em;margin:4px 0 8px}
.tile .note{font-size:14px;line-height:1.45;color:var(--muted);margin:0}
.badge{display:inline-block;font-size:13px;font-weight:600;border-radius:99px;padding:1px 10px;margin-bottom:8px}
.met{color:var(--green);box-shadow:inset 0 0 0 1px var(--green)}
.missed{color:var(--orange);box-shadow:inset 0 0 0 1px var(--orange)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr));gap:28px 36px;margin-top:18px}
figure{margin:18px 0 0;min-width:0}
.figures figure{margin:0}
figcaption{font-size:14px;line-height:1.5;color:var(--muted);margin-top:6px;max-width:75ch}
svg{display:block;width:100%;height:auto;overflow:visible;stroke-linejoin:round;stroke-linecap:butt}
.bars{display:grid;grid-template-columns:max-content 1fr;gap:8px 16px;align-items:center;margin:14px 0 22px}
.bars>div{font-size:15px}
.bars .track{display:flex;flex-wrap:wrap;align-items:center;gap:2px 10px;min-width:0}
.bars .bar{flex:none;height:18px;border-radius:0 4px 4px 0;background:var(--grey);min-width:2px}
.bars .bar.strong{background:var(--blue)}
.bars .amount{white-space:nowrap;font-variant-numeric:tabular-nums;color:var(--muted);font-size:14px}
table{border-collapse:collapse;font-size:14px;width:100%}
th{font-weight:400;text-align:left;color:var(--muted);padding:5px 18px 5px 0;vertical-align:top;width:30%;
overflow-wrap:anywhere}
td{padding:5px 0;vertical-align:top;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
tr+tr>*{border-top:1px solid var(--rule)}
details{border:1px solid var(--rule);border-radius:10px;padding:10px 18px;margin-top:12px;background:var(--card)}
summary{cursor:pointer;font-weight:600;font-size:15px}
details[open] summary{margin-bottom:10px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:14px}
.samples>div{margin-top:22px}
.sample{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 18px}
.question{font:600 16px/1.5 var(--mono)}
.text{font:14px/1.55 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.thought{color:var(--muted);font-style:italic;border-left:3px solid var(--violet);padding:2px 0 2px 12px;margin:8px 0}
.answer{font-weight:600}
.missing,.when{color:var(--muted)}
.when{font-size:14px}
.key{display:inline-block;width:150px;height:10px;border-radius:3px;vertical-align:middle;margin:0 6px;
border:1px solid var(--rule);background:linear-gradient(90deg,rgb(31,99,199),transparent 50%,rgb(219,102,36))}
@media (max-width:640px){main{padding:32px 18px 64px}h1{font-size:31px}.pair{grid-template-columns:1fr}
.figures{grid-template-columns:1fr}
section>figure,details{overflow-x:auto}section>figure svg,details svg{min-width:680px}}
@media print{section{break-inside:avoid-page}}
"""


class Bar(NamedTuple):
    """One row of a bar list. `shown` is the text beside the bar."""

    label: str
    value: float
    shown: str
    strong: bool = False


def esc(text: Any, longest: int = LONGEST) -> str:
    """Text from data as HTML: escaped, cut at `longest` characters, without what a page cannot hold."""
    text = str(text)
    if len(text) > longest:
        text = f"{text[:longest]} … ({len(text) - longest:,} more characters)"
    return html.escape(BARE.sub("\N{REPLACEMENT CHARACTER}", text))


def document(title: str, body: str) -> str:
    """The whole page. Colours come from `plots.COLORS`, so that charts and page share one theme."""
    light = ";".join(f"--{name}:{pair[0]}" for name, pair in COLORS.items())
    dark = ";".join(f"--{name}:{pair[1]}" for name, pair in COLORS.items())
    fonts = (
        "--sans:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'Noto Sans',sans-serif;"
        "--serif:'Iowan Old Style','Palatino Linotype',Palatino,Charter,Georgia,'Noto Serif',serif;"
        "--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,'Liberation Mono',monospace"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{esc(title)}</title>\n"
        f"<style>:root{{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;{light};{fonts}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{--paper:#10171e;--card:#161f28;{dark}}}}}{STYLE}</style>\n"
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, lead: str, *parts: str) -> str:
    """A chapter. `lead` and `parts` are HTML."""
    return f"<section>\n<h2>{esc(title)}</h2>\n<p>{lead}</p>\n{''.join(parts)}\n</section>"


def missing(sentence: str) -> str:
    """Stands where something would be that the run does not have."""
    return f'<p class="missing">{esc(sentence)}</p>'


def figure(drawing: str, title: str, caption: str) -> str:
    """A chart with its title above and what to see in it below. `drawing` and `caption` are HTML."""
    return (
        f'<figure role="group" aria-label="{esc(title)}"><h3>{esc(title)}</h3>{drawing}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def figures(*drawn: str) -> str:
    """Figures side by side where the page is wide enough."""
    return f'<div class="figures">{"".join(drawn)}</div>'


def tile(name: str, value: str, note: str, met: bool | None = None, limit: str = "") -> str:
    """One headline figure; with a limit, whether it was met, in words and not by colour alone."""
    badge = ""
    if met is not None:
        kind, mark = ("met", "✓ met") if met else ("missed", "✗ missed")
        badge = f'<span class="badge {kind}">{mark}: {esc(limit)}</span>'
    return (
        f'<div class="tile"><p class="name">{esc(name)}</p><p class="value">{esc(value)}</p>'
        f'{badge}<p class="note">{esc(note)}</p></div>'
    )


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal bars on one scale from 0, each with its number."""
    most = max((bar.value for bar in rows), default=0) or 1
    cells = (
        f'<div>{esc(bar.label)}</div><div class="track"><div class="bar{" strong" if bar.strong else ""}" '
        f'style="width:{70 * max(bar.value, 0) / most:.2f}%"></div><div class="amount">{esc(bar.shown)}</div></div>'
        for bar in rows
    )
    return f'<div class="bars">{"".join(cells)}</div>'


def details(summary: str, body: str) -> str:
    """Folded away until asked for. `body` is HTML."""
    return f"<details><summary>{esc(summary)}</summary>{body}</details>"


def table(rows: Iterable[tuple[Any, Any]]) -> str:
    """Two columns: name and value. At most MOST_ROWS rows; the rest is counted."""
    rows = list(rows)
    cells = "".join(
        f'<tr><th scope="row">{esc(name, LONGEST_CELL)}</th><td>{esc(value, LONGEST_CELL)}</td></tr>'
        for name, value in rows[:MOST_ROWS]
    )
    more = missing(f"and {len(rows) - MOST_ROWS:,} more") if len(rows) > MOST_ROWS else ""
    return f"<table>{cells}</table>{more}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested tables as dotted names, in their own order."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else plain(value)))
    return rows


def plain(value: Any) -> str:
    """A config value as people write it."""
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def amount(value: float) -> str:
    """A count for people: 1.49 million, 8.3 million, 12,345."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(value) >= size:
            return f"{value / size:.3g} {word}"
    return number(value)


def size(value: float) -> str:
    """Bytes for people."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.4g} B"
