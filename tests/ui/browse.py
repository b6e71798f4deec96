"""What the browser's tests say to a page."""

import time

WATCH = """
window.seen = {violations: [], scripts: 0};
document.addEventListener("securitypolicyviolation", (event) => window.seen.violations.push(
  event.violatedDirective + " " + event.blockedURI + " " + event.sample));
window.alert = window.confirm = window.prompt = () => { window.seen.scripts += 1; };
"""


def until(page, expression, seconds=10.0):
    """Wait until a JavaScript expression holds. Playwright's own wait needs `eval`, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(f"() => Boolean({expression})"):
        if time.monotonic() > deadline:
            raise AssertionError(f"never true: {expression}")
        page.wait_for_timeout(20)


def ready(page):
    """Wait until the page has started."""
    page.wait_for_selector("body[data-ready]")


def done(page):
    """Wait until the answer has ended and is rendered."""
    page.wait_for_selector("#send:not([hidden])")
    page.wait_for_selector(".coming, .plain, [data-kind]", state="detached")


def leads_away(url, server):
    """Whether a request leaves the server of the page."""
    return not url.startswith((f"{server.url}/", "data:", "blob:", "about:"))
