"""OpenAI's chat protocol: a strict reader of requests, and builders of answers, chunks and errors.

A field that would change the answer and is not supported is refused by name, never ignored.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from benthic.base.errors import did_you_mean
from benthic.server.errors import ApiError
from benthic.server.limits import LIMITS

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
READ = frozenset(
    "model messages stream stream_options max_tokens max_completion_tokens temperature top_p seed stop n "
    "chat_template_kwargs".split()
)
# They do not change the answer: who asks, where it is kept, how it is billed.
HARMLESS = frozenset("user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls".split())
# Not supported, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# In a message: what clients send back from an earlier answer, again with the values that say nothing.
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A checked request. None means that the client left the choice to the server."""

    model: str
    messages: tuple[dict[str, str], ...]  # role and content each
    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    thinking: bool | None


def parse_chat(body: bytes) -> ChatRequest:
    """Read a request body. Raises ApiError 400 naming the first field that cannot be used."""
    fields = _decode(body)
    _refuse_unknown(fields, READ, HARMLESS, NEUTRAL, "")
    if _integer(fields, "n") not in (None, 1):
        raise _bad("n", "only one answer per request is supported; use 1 and ask again for more")
    stream = _boolean(fields, "stream")
    temperature, top_p = _number(fields, "temperature"), _number(fields, "top_p")
    return ChatRequest(
        model=_name(fields),
        messages=_messages(fields),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        max_tokens=_max_tokens(fields),
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        seed=_integer(fields, "seed"),
        stop=_stop(fields),
        thinking=_thinking(fields),
    )


def _decode(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply -> send a flat JSON object", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON ({_reason(error)})", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object -> send {...}", code="invalid_json")
    return fields


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _reason(error: ValueError) -> str:
    """Why the body is unreadable, without quoting it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).split(":")[0]


def _refuse_unknown(
    fields: dict[str, Any],
    read: frozenset[str],
    harmless: frozenset[str],
    neutral: dict[str, tuple[Any, ...]],
    where: str,
) -> None:
    for name, value in fields.items():
        if name in read or name in harmless or value is None:
            continue
        if name not in neutral:
            raise _bad(f"{where}{name[:64]}", f"unknown field{did_you_mean(name[:64], read)}")
        if not any(type(value) is type(nothing) and value == nothing for nothing in neutral[name]):
            raise _bad(where + name, "not supported by this server; leave it out")


def _name(fields: dict[str, Any]) -> str:
    model = fields.get("model")
    if not isinstance(model, str) or not LIMITS["model"].low <= len(model) <= LIMITS["model"].high:
        raise _bad("model", "required: the name of the served model (see /v1/models)")
    return _text(model, "model")


def _messages(fields: dict[str, Any]) -> tuple[dict[str, str], ...]:
    messages = fields.get("messages")
    if not isinstance(messages, list):
        raise _bad("messages", "required: a list of {role, content}")
    _check_range("messages", len(messages), "holds {} messages")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _bad(where, f"{_short(message)} is not an object of role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _bad(f"{where}.role", f"{_short(role)} is not one of {', '.join(ROLES)}")
    # The chat template drops the reasoning of earlier turns, so reading it would change nothing.
    read = frozenset(("role", "content", "reasoning_content") if role == "assistant" else ("role", "content"))
    _refuse_unknown(message, read, frozenset(), MESSAGE_NEUTRAL, f"{where}.")
    return {"role": ROLES[role], "content": _content(message.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return _text(content, where)
    if not isinstance(content, list):
        raise _bad(where, "not a string or a list of text parts")
    if not LIMITS["content"].low <= len(content) <= LIMITS["content"].high:
        raise _bad(where, f"holds {len(content)} parts; use 1 to {LIMITS['content'].high}")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _bad(f"{where}[{i}]", "not a text part; this server reads text only")
        _refuse_unknown(part, frozenset(("type", "text")), frozenset(), {}, f"{where}[{i}].")
    return _text("".join(part["text"] for part in content), where)


def _include_usage(fields: dict[str, Any], stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _bad("stream_options", f"{_short(options)} is not an object")
    if not stream:
        raise _bad("stream_options", "only allowed when stream is true")
    read = frozenset(("include_usage", "include_obfuscation"))
    _refuse_unknown(options, read, frozenset(), {}, "stream_options.")
    return _boolean(options, "include_usage", "stream_options.")


def _max_tokens(fields: dict[str, Any]) -> int | None:
    old = _integer(fields, "max_tokens")
    new = _integer(fields, "max_completion_tokens", limit="max_tokens")
    if old is not None and new is not None and old != new:
        raise _bad("max_tokens", f"is {old}, but max_completion_tokens is {new}; give one of them")
    return old if new is None else new


def _stop(fields: dict[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop")
    strings = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise _bad("stop", "not a string or a list of strings")
    _check_range("stop", len(strings), "holds {} strings")
    for string in strings:
        if not LIMITS["stop_characters"].low <= len(string) <= LIMITS["stop_characters"].high:
            low, high = LIMITS["stop_characters"][:2]
            raise _bad("stop", f"holds a string of {len(string)} characters; use {low} to {high}")
    return tuple(_text(string, "stop") for string in strings)


def _thinking(fields: dict[str, Any]) -> bool | None:
    """`chat_template_kwargs`, as clients of other servers send it: of a template's variables this one is offered."""
    choices = fields.get("chat_template_kwargs")
    if choices is None:
        return None
    if not isinstance(choices, dict):
        raise _bad("chat_template_kwargs", f"{_short(choices)} is not an object")
    where = "chat_template_kwargs."
    _refuse_unknown(choices, frozenset(("thinking",)), frozenset(), {}, where)
    return None if choices.get("thinking") is None else _boolean(choices, "thinking", where)


def _boolean(fields: dict[str, Any], name: str, where: str = "") -> bool:
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise _bad(where + name, f"{_short(value)} is not true or false")
    return bool(value)


def _integer(fields: dict[str, Any], name: str, limit: str = "") -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int:
        raise _bad(name, f"{_short(value)} is not a whole number")
    _check_range(limit or name, value, "is {}", name)
    return value


def _number(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or (type(value) is float and not math.isfinite(value)):
        raise _bad(name, f"{_short(value)} is not a finite number")
    _check_range(name, value, "is {}")
    return value


def _check_range(limit: str, value: float, what: str, name: str = "") -> None:
    low, high, meaning = LIMITS[limit]
    if not low <= value <= high:
        raise _bad(name or limit, f"{what.format(_short(value))}; use {low:,} to {high:,} {meaning}")


def _text(text: str, where: str) -> str:
    """`text` itself, where it is Unicode that UTF-8 can carry (JSON's \\ud800 alone is not)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad(where, "holds half a surrogate pair, which is not a character") from None
    return text


def _short(value: Any) -> str:
    """A value in a few characters, whatever its size or depth."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 64 else f"{text[:60]}..."


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts of one request."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What every answer and chunk of one request carries, and their shapes."""

    id: str
    created: int  # seconds since 1970
    model: str

    def completion(self, reasoning: str, content: str, finish_reason: str, counts: dict[str, int]) -> dict[str, Any]:
        """A whole answer. `reasoning_content` is present only where the model reasoned."""
        message = {"role": "assistant", **_delta(reasoning, content), "content": content}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": counts}

    def chunk(self, reasoning: str, content: str, finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of an answer."""
        return self._chunk(_delta(reasoning, content), finish_reason)

    def first(self) -> dict[str, Any]:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def last(self, counts: dict[str, int]) -> dict[str, Any]:
        """The chunk that carries the token counts and no choice."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": counts}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice], "usage": None}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _delta(reasoning: str, content: str) -> dict[str, str]:
    parts = {"reasoning_content": reasoning, "content": content}
    return {name: text for name, text in parts.items() if text}
