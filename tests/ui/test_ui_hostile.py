"""Bar 20 in a real browser: hostile text runs nothing and loads nothing, whatever way it comes in.

`visit` looks after the scripts, the requests and the policy.
"""

import json
from urllib.parse import urlsplit

from browse import WATCH, done, ready, until
from hostile import PAYLOADS

SAY = """() => {
    document.getElementById("prompt").value = "x";
    document.getElementById("composer").requestSubmit();
}"""
OPEN = "(n) => document.querySelectorAll('#list .title')[n].click()"

# Events that payloads wait for, on everything a model or a file has put on the page.
TOUCH = """() => {
    const barred = /^(SCRIPT|IFRAME|IMG|IMAGE|OBJECT|EMBED|FORM|STYLE|LINK|META|BASE|VIDEO|AUDIO|SVG)$/i;
    const nodes = [...document.querySelectorAll("#messages *")].filter((node) => !node.closest("button, summary"));
    for (const node of nodes) {
        for (const name of ["mouseover", "pointerenter", "focus", "toggle", "load", "error", "close"])
            node.dispatchEvent(new Event(name));
        const leads = node.nodeName === "A" && !/^(https?|mailto):/.test(node.href);
        const handles = [...node.attributes].some(({name}) => name.startsWith("on"));
        if (leads || handles || barred.test(node.nodeName)) throw new Error(node.outerHTML);
    }
    return nodes.length;
}"""


def test_no_payload_runs_as_a_models_answer(server, visit):
    page = visit(server)
    page.evaluate("localStorage.setItem('thoughts', 'open')")
    for n, payload in enumerate(PAYLOADS):
        if n % 16 == 0:
            page.press("#prompt", "Alt+KeyN")
        server.say(payload, thoughts=payload)
        page.evaluate(SAY)
        done(page)
        if n % 16 == 15 or n == len(PAYLOADS) - 1:
            assert page.evaluate(TOUCH) > 8 * (n % 16)
            assert page.locator(".assistant").count() == n % 16 + 1
    page.reload()
    ready(page)
    for n in range(page.locator("#list .title").count()):
        page.evaluate(OPEN, n)
        until(page, "document.querySelectorAll('.assistant details[open] .body > *').length")
        assert page.evaluate(TOUCH) > 8


def test_no_payload_runs_as_title_prompt_or_imported_chat(server, visit, tmp_path):
    chats = [
        {
            "id": payload,
            "title": payload,
            "created": 1,
            "updated": n,
            "settings": {"system": payload, "seed": payload, "temperature": payload, "thinking": payload},
            "messages": [
                {"role": "user", "content": payload},
                {"role": "assistant", "content": payload, "reasoning": payload, "error": payload, "finish": payload,
                 "stats": {"tokens": payload, "took": payload, "__proto__": {"polluted": payload}}},
            ],
        }
        for n, payload in enumerate(PAYLOADS, 1)
    ]  # fmt: skip
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps({"format": "benthic-conversations", "version": 1, "conversations": chats}), "utf-8")
    page = visit(server)
    page.evaluate("localStorage.setItem('thoughts', 'open')")
    page.set_input_files("#file", file)
    until(page, f"document.querySelectorAll('#list .title').length === {len(PAYLOADS)}")
    for n, payload in enumerate(reversed(PAYLOADS)):
        page.evaluate(OPEN, n)
        until(page, f"document.querySelectorAll('#list .title')[{n}].ariaCurrent")
        assert page.locator(".bubble").text_content() == payload
        assert page.evaluate(TOUCH) > 2
    page.press("#prompt", "Alt+KeyS")
    assert page.locator("#system").input_value() == PAYLOADS[0]
    assert page.evaluate("({}).polluted") is None
    page.keyboard.press("Escape")
    page.reload()
    ready(page)
    assert page.locator("#list .title").count() == len(PAYLOADS)


def unguarded(browser, pages):
    """A context that is watched and not looked after, its page, and the addresses that it asked elsewhere.

    Elsewhere is wherever no page of `pages` is. What the policy blocks is not asked.
    """
    context, asked = browser.new_context(), []
    context.add_init_script(WATCH)

    def elsewhere(route):
        asked.append(route.request.url)
        route.abort()

    context.route(lambda url: not url.startswith(pages), elsewhere)
    return context, context.new_page(), asked


def test_the_watch_sees_scripts_and_requests_where_nothing_holds_them_back(browser):
    """Negative control: the same payloads in a page without policy and sanitiser."""
    context, page, asked = unguarded(browser, "http://page.example/")
    context.route(
        "http://page.example/*", lambda route: route.fulfill(body="<!doctype html>", content_type="text/html")
    )
    page.goto("http://page.example/")
    for payload in PAYLOADS:
        if "http-equiv" not in payload:  # it would lead away
            page.evaluate("(html) => { document.body.innerHTML = html; }", payload)
    page.wait_for_timeout(500)
    scripts = page.evaluate("window.seen.scripts")
    context.close()
    assert scripts > 5
    assert len({url for url in asked if urlsplit(url).hostname == "evil.example"}) > 5


def test_the_policy_holds_even_where_the_sanitiser_does_not(server, browser):
    """HTML from strings and handlers from strings are refused, and nothing of another host is loaded."""
    context, page, asked = unguarded(browser, server.url)
    page.goto(server.url)
    ready(page)
    refused = page.evaluate(
        """(payloads) => payloads.filter((html) => {
            try { document.body.innerHTML = html; } catch (error) { return error instanceof TypeError; }
        }).length""",
        list(PAYLOADS),
    )
    assert refused == len(PAYLOADS)
    page.evaluate("""() => {
        for (const [tag, name] of [["img", "src"], ["link", "href"], ["script", "src"], ["iframe", "src"]]) {
            const node = document.createElement(tag);
            if (tag === "link") node.rel = "stylesheet";
            try { node[name] = "https://evil.example/x"; } catch { continue; }
            document.body.append(node);
        }
        const node = document.createElement("div");
        try { node.setAttribute("onclick", "alert(1)"); } catch {}
        document.body.append(node);
        node.click();
    }""")
    page.wait_for_timeout(300)
    seen = page.evaluate("window.seen")
    context.close()
    assert seen["scripts"] == 0
    assert len(seen["violations"]) >= len(PAYLOADS)
    assert asked == []
