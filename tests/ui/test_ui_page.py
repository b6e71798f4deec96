"""How the page looks and is used: languages, sizes, colours, keys."""

import pytest
from browse import done, ready, until

WIDE = "\n\n".join(
    [
        "`" + "code" * 60 + "`",
        "```\n" + "line " * 80 + "\n```",
        "|" + "column|" * 14 + "\n|" + "-|" * 14 + "\n|" + "cell|" * 14,
        "https://a.example/" + "path" * 60,
        "$$ " + "x + " * 60 + "x $$",
        "$" + "x + " * 60 + "x$",
        "W" * 300,
        "[" + "w" * 200 + "](https://a.example/)",
    ]
)


def test_the_language_is_the_browsers_and_can_be_chosen(server, visit, ask):
    page = visit(server, locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("#welcome h2").inner_text() == "想聊点什么？"
    assert page.locator("#send").get_attribute("aria-label") == "发送"
    assert page.locator("#prompt").get_attribute("placeholder") == "输入消息"
    page.click("#open-settings")
    page.select_option("#language", "en")
    assert page.locator("#settings-title").inner_text() == "Settings"
    page.reload()
    ready(page)
    assert page.locator("#welcome h2").inner_text() == "What is on your mind?"
    server.say("你好")
    assert ask(page, "在吗").locator(".body").inner_text() == "你好"


@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
def test_360_pixels_are_enough(server, visit, ask, locale):
    page = visit(server, viewport={"width": 360, "height": 640}, locale=locale, has_touch=True)
    server.say(WIDE, thoughts=WIDE)
    answer = ask(page, WIDE)
    answer.locator("summary").click()
    page.wait_for_selector(".thoughts .code")
    fits(page)
    page.click("#show")
    page.wait_for_selector("#list .title")
    page.wait_for_timeout(250)
    fits(page)
    page.click("#open-settings")
    fits(page)
    page.keyboard.press("Escape")
    page.click("#open-help")
    fits(page)
    page.keyboard.press("Escape")
    page.locator("#list .title").click()
    page.wait_for_selector("#veil", state="hidden")
    page.wait_for_timeout(400)
    page.locator(".user [data-action=edit]").click()
    fits(page)


def fits(page):
    """Nothing is wider than the window, but what scrolls by itself."""
    page.evaluate("""() => {
        const scrolls = (node) => node && (getComputedStyle(node).overflowX === "auto" || scrolls(node.parentElement));
        for (const node of document.querySelectorAll("body *")) {
            const { left, right, width } = node.getBoundingClientRect();
            const shown = width > 1 && getComputedStyle(node).visibility === "visible" && right > 0;
            if (shown && (right > innerWidth + 1 || left < -1) && !scrolls(node.parentElement))
                throw new Error(`${node.nodeName} ${node.className} from ${left} to ${right}`);
        }
    }""")
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    assert page.evaluate(
        "document.querySelector('#scroll').scrollWidth <= document.querySelector('#scroll').clientWidth"
    )


CONTRAST = """() => {
    const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const colour = numbers(getComputedStyle(node).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
    };
    const found = {};
    for (const node of document.querySelectorAll("main *, #side *")) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!own || !node.getClientRects().length || node.closest(".unseen")) continue;
        const pair = [light(numbers(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
        const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
        if (ratio < 4.5) found[`${node.nodeName}.${node.className} ${node.innerText.slice(0, 20)}`] = ratio;
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(server, visit, ask, scheme):
    page = visit(server, color_scheme=scheme)
    server.say(
        "# Title\n\ntext [a](https://b.example) `code`\n\n> quote\n\n```python\n# c\n@d\ndef f(x: int):\n    'doc'\n"
        "    return None, 1, len('s')\n```\n\n```html\n<a b='c'>&amp;</a>\n```\n\n```diff\n+ a\n- b\n@@ c\n```\n",
        thoughts="thought",
    )
    ask(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(background) / 3 > 128) == (scheme == "light")
    assert page.evaluate(CONTRAST) == {}
    page.evaluate("document.querySelector('.body p').style.color = getComputedStyle(document.body).backgroundColor")
    assert page.evaluate(CONTRAST)  # the measure finds what cannot be read


def test_everything_is_done_with_keys(server, visit):
    page = visit(server)
    keys = page.keyboard
    server.say("first answer")
    keys.type("one")  # the field has the focus
    keys.press("Shift+Enter")
    keys.type("line two")
    keys.press("Enter")
    done(page)
    assert page.locator(".bubble").inner_text() == "one\nline two"
    keys.press("ArrowUp")
    assert page.locator(".editor").evaluate("node => node === document.activeElement")
    keys.press("Escape")
    server.say("other answer", pause=0.02)
    keys.press("Alt+KeyR")
    page.wait_for_selector("#stop:not([hidden])")
    keys.press("Escape")
    done(page)
    assert "Stopped" in page.locator(".numbers").inner_text()
    server.say("ok")
    keys.press("Alt+KeyN")
    keys.type("second conversation")
    keys.press("Enter")
    done(page)
    keys.press("Alt+ArrowDown")
    until(page, "document.querySelector('.bubble').innerText.startsWith('one')")
    keys.press("Alt+ArrowUp")
    until(page, "document.querySelector('.bubble').innerText.startsWith('second')")
    keys.press("Alt+KeyS")
    assert page.locator("#settings").is_visible()
    keys.press("Escape")
    assert page.locator("#settings").is_hidden()
    page.locator("#scroll").focus()
    keys.press("?")
    assert page.locator("#keys dt").count() >= 10
    keys.press("Escape")
    page.locator("#scroll").focus()
    keys.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_every_control_is_reached_by_tab_has_a_name_and_shows_the_focus(server, visit, ask):
    page = visit(server)
    server.say("```\ncode\n```", thoughts="why")
    ask(page)
    page.focus(".skip")
    reached, before = [], None
    for _ in range(60):
        page.keyboard.press("Tab")
        one = page.evaluate("""() => {
            const node = document.activeElement;
            const style = getComputedStyle(node);
            const frame = getComputedStyle(node.closest("#composer") ?? node);
            node.dataset.reached ??= String(Math.random());
            return {key: node.dataset.reached, node: node.outerHTML.slice(0, 80), tag: node.nodeName,
              name: node.ariaLabel || node.innerText || node.labels?.[0]?.innerText || "",
              visible: style.outlineStyle !== "none" || frame.borderColor !== window.plain};
        }""")
        if one["tag"] == "BODY" or one["key"] == before:
            break
        if one["key"] in [other["key"] for other in reached]:
            break
        before = one["key"]
        reached.append(one)
    assert [one["node"] for one in reached if not one["name"].strip()] == []
    assert [one["node"] for one in reached if not one["visible"]] == []
    missed = page.evaluate("""() => [...document.querySelectorAll("button, textarea, summary, pre, input")]
        .filter((node) => !node.dataset.reached && !node.disabled && node.checkVisibility({visibilityProperty: true}))
        .map((node) => node.outerHTML.slice(0, 80))""")
    assert missed == []
    assert len(reached) > 10


def test_the_page_works_without_storage(server, browser, visit, ask):
    page = visit(server)
    page.context.add_init_script("Object.defineProperty(window, 'indexedDB', {value: undefined})")
    page.reload()
    page.wait_for_selector("#toast:not([hidden])")
    assert "keeps nothing" in page.locator("#toast").inner_text()
    server.say("ok")
    assert ask(page).locator(".body").inner_text() == "ok"
    assert page.locator("#list .title").count() == 1
