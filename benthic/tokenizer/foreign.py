"""Chat templates that are none of ours: rendered by Jinja in a guarded process, with a loss mask from prefixes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from benthic.base.errors import InputError
from benthic.tokenizer.runs import Rendered, Runs
from benthic.tokenizer.templates import ThinkingRefused
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.tokenizer.tokens import END_THINK, THINK

SECONDS = 5.0  # for all renderings of one conversation
_OPENING = re.compile(rf"(?:{THINK}|{END_THINK})\s*\Z")
_LIKE_A_TOKEN = re.compile(r"<[|｜][^<>|｜]{1,64}[|｜]>")
_STANDS_FOR = range(0x100000, 0x10FFFE)  # private use: inside the process, a character stands for a token's name


class Sandbox:
    """The process that renders, started at first use and again after it was killed. Safe to share among threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0  # process that started the child: after a fork, the other one starts its own

    def render(self, template: str, contexts: list[dict[str, Any]]) -> list[str]:
        """One text for each context, all of the same variables.

        ThinkingRefused if they say `thinking` and the template never asks, InputError if so of `tools`, and if the
        template fails, takes too long, or needs or writes too much.
        """
        with self._lock:
            child = self._started()
            timer = Timer(SECONDS, child.kill)
            timer.start()
            try:
                answer = _ask(child, {"template": template, "contexts": contexts})
            finally:
                timer.cancel()
            if answer is None:
                self._child = None
                child.kill()
                child.wait()
                raise InputError(f"chat_template did not end within {SECONDS:g} s or broke its process -> use another")
        if "error" in answer:
            raise InputError(f"chat_template fails: {answer['error']} -> mend it, or name a known template")
        if any("thinking" in context for context in contexts) and "thinking" not in answer["variables"]:
            raise ThinkingRefused("thinking is not a choice in this chat_template -> leave it out")
        if any("tools" in context for context in contexts) and "tools" not in answer["variables"]:
            raise InputError("tools, but this chat_template has no words for them -> use one that has")
        return answer["texts"]

    def _started(self) -> "subprocess.Popen[str]":
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        if importlib.util.find_spec("jinja2") is None:
            raise InputError("chat_template is none of the known ones and jinja2 is absent -> pip install jinja2")
        script = Path(__file__).with_name("jinja_child.py")
        child = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent, which may still have conversations to render
        )
        if _ask(child, None) is None:
            child.wait()
            raise InputError("the process for chat_template does not start -> pip install jinja2 again")
        self._child, self._owner = child, os.getpid()
        return child


def _ask(child: "subprocess.Popen[str]", request: dict[str, Any] | None) -> dict[str, Any] | None:
    """Send a request, if any, and read the next answer; None if the child is gone."""
    if child.stdin is None or child.stdout is None:
        return None
    try:
        if request is not None:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
        line = child.stdout.readline()
    except BrokenPipeError:
        return None
    return json.loads(line) if line.endswith("\n") else None


_sandbox = Sandbox()  # one per process: it holds no state but the compiled templates


def render(
    messages: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    add_generation_prompt: bool,
    thinking: bool | None,
    tools: Sequence[dict[str, Any]] = (),
) -> Rendered:
    """Ids of the tokenizer's `chat_template`: transformers' ids, but tokens' names inside messages stay text.

    The mask is True from where an answer is asked for to where the next turn begins, found by rendering the
    conversation up to each answer; with a generation prompt, which nobody trains on, it is False throughout. InputError
    where the beginnings of a conversation are not rendered as beginnings of its text.
    """
    shielded, declared, names = _shielded(messages, tools, tokenizer)
    asked = [i for i, m in enumerate(messages) if m["role"] == "assistant"] if not add_generation_prompt else []
    base = _base(tokenizer, thinking) | ({"tools": declared} if tools else {})
    parts = [(shielded, add_generation_prompt)]
    for i in asked:
        parts += [(shielded[:i], False), (shielded[:i], True), (shielded[: i + 1], False)]
    contexts = [base | {"messages": part, "add_generation_prompt": prompt} for part, prompt in parts]
    text, *prefixes = _sandbox.render(tokenizer.chat_template, contexts)
    spans = [_span(i, text, prefixes[3 * n : 3 * n + 3], tokenizer) for n, i in enumerate(asked)]
    opening = _OPENING.search(text) if add_generation_prompt else None
    return _encode(text, spans, names, tokenizer).rendered(opening[0] if opening else "")


def check(tokenizer: Tokenizer, thinking: bool | None) -> None:
    """Render a small conversation. InputError where that fails, or writes names of tokens that the tokenizer lacks."""
    talk = [{"role": role, "content": "."} for role in ("user", "assistant", "user")]
    context = _base(tokenizer, thinking) | {"messages": talk, "add_generation_prompt": True}
    (text,) = _sandbox.render(tokenizer.chat_template, [context])
    lacking = [name for name in _LIKE_A_TOKEN.findall(text) if name not in tokenizer.special]
    if lacking:
        raise InputError(f"chat_template writes {lacking[0]!r}, no token of the tokenizer -> use one made for it")


def _base(tokenizer: Tokenizer, thinking: bool | None) -> dict[str, Any]:
    """What every rendering gets beside the messages."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    base: dict[str, Any] = {name: tokenizer.decode([i]) for name, i in ids.items()}
    return base if thinking is None else base | {"thinking": thinking}


def _shielded(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """Messages and tools with each token's name replaced by one character, and {character: name}."""
    whole = json.dumps([*messages, *tools], ensure_ascii=False)
    free = (chr(c) for c in _STANDS_FOR if chr(c) not in whole)
    stands_for = {name: next(free) for name in tokenizer.special if json.dumps(name, ensure_ascii=False)[1:-1] in whole}

    def shield(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, str):
            return _pattern(names).sub(lambda m: stands_for[m[0]], value)
        if isinstance(value, list):
            return [shield(v, names) for v in value]
        return {shield(k, names): shield(v, names) for k, v in value.items()} if isinstance(value, dict) else value

    shielded = []
    for message in messages:
        of_text = [n for n in stands_for if message["role"] != "assistant" or n not in (THINK, END_THINK)]
        content = {"content": shield(message["content"], of_text)} if "content" in message else {}
        shielded.append(shield(message, list(stands_for)) | content)
    names = {char: name for name, char in stands_for.items()}
    return shielded, shield(list(tools), list(stands_for)), names


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Matches any of `names`, the longest first; with no names, nothing."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _span(i: int, text: str, prefixes: list[str], tokenizer: Tokenizer) -> tuple[int, int]:
    """Where in `text` the answer messages[i] is: it begins where the text that asks for it ends.

    A format may ask with words that the answer, as a turn, does not begin with (R1's `<think>`): the answer then begins
    after those tokens of the question that it does share.
    """
    before, asking, until = prefixes
    ends = [m.end() for m in _pattern(list(tokenizer.special)).finditer(asking)]
    ends = [end for end in (len(asking), *reversed(ends), len(before)) if end >= len(before)]
    start = next((end for end in ends if asking.startswith(before) and until.startswith(asking[:end])), None)
    if start is None or not text.startswith(until):
        raise InputError(
            f"chat_template renders messages[: {i + 1}] not as the beginning of the whole conversation, so a loss mask "
            "cannot be found -> name a known template, or train on conversations with one answer"
        )
    return start, len(until)


def _encode(text: str, spans: list[tuple[int, int]], names: dict[str, str], tokenizer: Tokenizer) -> Runs:
    """Tokens' names in `text` become tokens, unless they came out of a message."""
    runs = Runs(tokenizer)
    cuts = sorted({0, len(text), *(cut for span in spans for cut in span)})
    restore = _pattern(list(names))
    tokens = re.compile(f"({_pattern(list(tokenizer.special)).pattern})")
    for start, stop in pairwise(cuts):
        trained = any(a <= start < b for a, b in spans)
        for part in tokens.split(text[start:stop]):
            if part in tokenizer.special:
                runs.token(tokenizer.special[part], trained)
            else:
                runs.text(restore.sub(lambda m: names[m[0]], part), trained)
    return runs
