"""The page's files: what is served, how, and to whom."""

import re
from pathlib import Path

import pytest

from benthic.server import static

WEB = Path(static.__file__).parent / "web"
NAMES = sorted(path.name for path in WEB.iterdir())


@pytest.mark.parametrize("path", [path.decode() for path in static.paths()])
def test_each_file_is_served_without_a_key_under_the_policy(locked, path):
    answer = locked.http.get(path)
    assert answer.status_code == 200
    name = "index.html" if path == "/" else path.removeprefix("/web/")
    assert answer.content == (WEB / name).read_bytes()
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert answer.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
    policy = dict(part.partition(" ")[::2] for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert not any(word in str(policy) for word in ("unsafe", "http", "*", "data:"))
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert locked.http.head(path).headers["etag"] == answer.headers["etag"]


def test_nothing_else_under_the_page_is_open(locked):
    for path in (
        "/web",
        "/web/",
        "/web/../limits.py",
        "/web/index.html",
        "/index.html",
        "/web/app.js/",
        "/render",
    ):
        assert locked.http.get(path).status_code == 401


def test_a_file_that_the_browser_has_is_not_sent_again(shared):
    answer = shared.http.get("/web/app.js")
    assert answer.headers["cache-control"] == "no-cache"
    for known in (answer.headers["etag"], f'"other", W/{answer.headers["etag"]}'):
        again = shared.http.get("/web/app.js", headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == answer.headers["etag"]
    assert shared.http.get("/web/app.js", headers={"if-none-match": '"other"'}).status_code == 200


def test_no_file_is_changed_by_a_request(shared):
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert shared.http.request(method, "/").status_code == 405


def test_the_page_is_small():
    assert sum((WEB / name).stat().st_size for name in NAMES) < 150_000


def test_nothing_is_inline_and_nothing_comes_from_elsewhere():
    page = (WEB / "index.html").read_text("utf-8")
    assert re.findall(r"\sstyle=|\son\w+=|<style", page) == []
    assert re.findall(r"<script(?![^>]*\ssrc=)", page) == []
    for name in NAMES:
        text = (WEB / name).read_text("utf-8").replace("http://www.w3.org/", "")
        assert re.findall(r"https?://\w|@import|url\(", text) == [], name


def test_html_is_made_in_one_place_only():
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|createContextualFragment"
    found = [name for name in NAMES if re.search(sinks, (WEB / name).read_text("utf-8"))]
    assert found == []
    assert [name for name in NAMES if "parseFromString" in (WEB / name).read_text("utf-8")] == ["markdown.js"]


def test_every_word_exists_in_both_languages():
    english, chinese = re.findall(r"^  (?:en|zh): \{(.*?)^  \},", (WEB / "i18n.js").read_text("utf-8"), re.S | re.M)
    words = [dict(re.findall(r'(\w+): "([^"]*)"', text)) for text in (english, chinese)]
    assert words[0].keys() == words[1].keys()
    used = set(re.findall(r'\bt\("(\w+)"', "".join((WEB / name).read_text("utf-8") for name in NAMES)))
    used |= set(re.findall(r'data-(?:t|label|place)="(\w+)"', (WEB / "index.html").read_text("utf-8")))
    assert used <= words[0].keys()
    for key, text in words[0].items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", words[1][key])), key


def test_every_import_of_a_module_exists():
    for name in NAMES:
        for source in re.findall(r'from "(.*?)"', (WEB / name).read_text("utf-8")):
            assert source.encode() in static.paths()
