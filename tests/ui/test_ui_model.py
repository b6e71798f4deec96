"""The page before a real model: a small one with random weights, served by `benthic serve` in a process of its own."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from browse import done, until


@pytest.fixture(scope="module")
def served(model_folder):
    command = [sys.executable, "-m", "benthic", "serve", str(model_folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    timer = threading.Timer(120, process.kill)
    timer.start()
    line = process.stderr.readline()
    timer.cancel()
    yield SimpleNamespace(url=line.split()[-1])
    process.terminate()
    process.communicate(timeout=30)


def test_a_real_model_answers_and_the_same_seed_says_the_same(served, visit, ask):
    page = visit(served)
    until(page, "document.querySelector('#model').innerText === 'tiny'")
    page.press("#prompt", "Alt+KeyS")
    page.fill("#seed", "7")
    page.fill("#max_tokens", "1")
    page.keyboard.press("Escape")
    answer = ask(page, "hello")
    assert "32 tokens" in answer.locator(".numbers").inner_text()
    assert "The longest answer was reached" in answer.locator(".numbers").inner_text()
    first = answer.locator(".body").all_inner_texts()
    assert "".join(first).strip()
    answer.locator("[data-action=again]").click()
    page.wait_for_timeout(100)
    done(page)
    assert page.locator(".assistant .body").all_inner_texts() == first
