"""JSON and server-sent events as bytes, in and out."""

import json
from typing import Any

from benthic.server.errors import ApiError

DONE = b"data: [DONE]\n\n"


def dump(value: Any) -> bytes:
    """Compact UTF-8 JSON. Half a surrogate pair, which an echoed value may hold, becomes its escape again."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(value) + b"\n\n"


def decode(body: bytes) -> dict[str, Any]:
    """The JSON object in a request body. ApiError 400 for anything else, without quoting it."""
    whole = True
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON's \\ud800 alone is not Unicode that UTF-8 can carry
            whole = False
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply -> send a flat JSON object", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON ({_reason(error)})", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object -> send {...}", code="invalid_json")
    if not whole:
        param = _half(fields)
        raise ApiError(400, f"{param}: holds half a surrogate pair, which is not a character", param=param)
    return fields


def _half(fields: dict[str, Any]) -> str:
    """Which field holds half a surrogate pair."""
    stack: list[tuple[Any, str]] = [(fields, "")]
    while stack:
        value, where = stack.pop()
        if isinstance(value, str) and not _whole(value):
            return where
        if isinstance(value, list):
            stack += [(part, f"{where}[{i}]") for i, part in enumerate(value)]
        elif isinstance(value, dict):
            if halves := [name for name in value if not _whole(name)]:
                return f"{where}.{halves[0][:64]}".removeprefix(".")
            stack += [(part, f"{where}.{name[:64]}".removeprefix(".")) for name, part in value.items()]
    return "body"


def _whole(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _reason(error: ValueError) -> str:
    """Why the body is unreadable, without quoting it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).split(":")[0]
