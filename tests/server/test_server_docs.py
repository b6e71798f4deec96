"""docs/api.md is true: its limits are those of the table, its fields those of the types, its snippet runs."""

import re
from pathlib import Path

from benthic.server.app import routes
from benthic.server.limits import LIMITS
from benthic.server.types.chat import ChatRequest
from benthic.server.types.completions import CompletionRequest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_every_limit_stands_there_as_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert rows == [(name, f"{low:,}", f"{high:,}", meaning) for name, (low, high, meaning) in LIMITS.items()]


def test_every_field_that_is_accepted_is_named():
    for model in (ChatRequest, CompletionRequest):
        for name in (*model.model_fields, *model.HARMLESS):
            assert re.search(rf"`{name}\b", PAGE), name


def test_every_route_is_named(shared):
    for route in routes(shared.service):
        if route.path_format.startswith("/web/"):
            continue  # the page's files
        assert re.search(rf"`(GET |POST )?{re.escape(route.path_format)}`", PAGE), route.path_format


def test_its_snippet_runs(shared, capsys):
    (code,) = re.findall(r"^```python3\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", shared.url).replace('model="model"', 'model="tiny"')
    exec(compile(code, "docs/api.md", "exec"), {})
    assert "cached_tokens" in capsys.readouterr().out
