"""A real Chromium before a real server whose engine says what a test tells it to."""

import contextlib
import importlib.util
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from browse import WATCH, done, leads_away, ready

_spec = importlib.util.spec_from_file_location("server_conftest", Path(__file__).parents[1] / "server" / "conftest.py")
server_conftest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(server_conftest)
tokenizer = server_conftest.tokenizer


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ui)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, filter(None, names))), None)
    if path is None:
        pytest.fail("no chromium on the PATH -> apt-get install chromium, or set CHROMIUM to one")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server(tokenizer):
    """A server whose engine says what `say` was given last."""
    with server_conftest.running(server_conftest.FakeEngine(), tokenizer, max_model_len=2**16) as running:
        yield speaking(running, tokenizer)


@pytest.fixture(scope="module")
def launch(tokenizer):
    """launch(...) -> one more server of this kind."""
    with contextlib.ExitStack() as stack:

        def start(tokenizer=tokenizer, **options):
            engine = server_conftest.FakeEngine()
            return speaking(stack.enter_context(server_conftest.running(engine, tokenizer, **options)), tokenizer)

        yield start


def speaking(running, tokenizer):
    """A server with `say(text, thoughts)`, and `heard()`: the last prompt as text."""
    engine = running.engine

    def say(text, thoughts="", pause=0.0):
        opened = [tokenizer.special["<think>"], *tokenizer.encode(thoughts), tokenizer.special["</think>"]]
        engine.script = [*(opened if thoughts else []), *tokenizer.encode(text), tokenizer.eos_id]
        engine.pause = pause

    def heard():
        return tokenizer.decode(engine.requests[-1].prompt_token_ids)

    return SimpleNamespace(**vars(running), say=say, heard=heard)


@pytest.fixture
def visit(browser):
    """visit(server, **context options) -> a page of its own, watched until the end of the test.

    No script of another's may run, no policy may be violated, no other host may be asked, no error may be thrown.
    """
    watched = []

    def open_page(server, path="/", **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}, "locale": "en-GB", **options})
        context.set_default_timeout(10_000)
        context.add_init_script(WATCH)
        page, foreign, errors = context.new_page(), [], []
        context.on("request", lambda request: foreign.append(request.url) if leads_away(request.url, server) else None)
        context.route(lambda url: leads_away(url, server), lambda route: route.abort())
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}") or dialog.dismiss())
        context.on("page", lambda page: errors.append(f"window {page.url}"))
        page.goto(server.url + path)
        ready(page)
        watched.append((context, page, foreign, errors))
        return page

    yield open_page
    for context, page, foreign, errors in watched:
        seen = page.evaluate("window.seen")
        context.close()
        assert foreign == []
        assert errors == []
        assert seen == {"violations": [], "scripts": 0}


@pytest.fixture(scope="session")
def ask():
    """ask(page, text): say it, and wait for the end of the answer; returns the answer's element."""

    def send(page, text="hello"):
        page.fill("#prompt", text)
        page.press("#prompt", "Enter")
        done(page)
        return page.locator("#messages > li").last

    return send
