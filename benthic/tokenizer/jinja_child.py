"""Renders Jinja templates of strangers in a process of its own, whose memory is limited and which may be killed.

Run as a script: each line on standard input is {"template", "contexts"}, each line on standard output {"texts"} or
{"error"}, with the {"variables"} that the template asks for. The environment is transformers' `apply_chat_template`'s.
"""

import json
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 * 2**20  # bytes of address space; an interpreter with Jinja takes a tenth
ORPHAN_SECONDS = 60  # the parent kills much sooner, unless it was killed itself
CHARACTERS = 4_000_000  # of one rendering


def main() -> None:
    """Answer until standard input ends."""
    _limit_memory()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        _limit_time(ORPHAN_SECONDS)
        print(json.dumps(_answer(json.loads(line))), flush=True)
        _limit_time(0)


def _limit_time(seconds: int) -> None:
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(seconds)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows: there the time limit stands alone
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        template, variables = _compiled(request["template"])
        return {"texts": [_render(template, context) for context in request["contexts"]], "variables": variables}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY // 2**20} MiB of memory"}
    except Exception as error:  # whatever a stranger's template raises is the answer, and the parent raises it
        reason = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {reason}"[:500]}


def _render(template: jinja2.Template, context: dict[str, Any]) -> str:
    chunks, size = [], 0
    for chunk in template.generate(context):
        chunks.append(chunk)
        size += len(chunk)
        if size > CHARACTERS:
            raise ValueError(f"it writes more than {CHARACTERS:,} characters")
    return "".join(chunks)


@lru_cache(maxsize=8)
def _compiled(text: str) -> tuple[jinja2.Template, list[str]]:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text), sorted(meta.find_undeclared_variables(environment.parse(text)))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


if __name__ == "__main__":
    main()
