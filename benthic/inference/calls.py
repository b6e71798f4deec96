"""The form of an answer that must call a tool: the tokens around calls, a name, arguments that follow its schema."""

import json
from collections.abc import Sequence
from typing import Any

from benthic.base.errors import InputError, did_you_mean
from benthic.inference import schema
from benthic.inference.config import JSON_OBJECT, StructuredOutputsParams
from benthic.inference.grammar import LIMITS
from benthic.tokenizer.templates import TEMPLATES, Tools
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.tokenizer.tokens import CALLS, END_CALLS, MARKUP
from benthic.tokenizer.tool_calls import format_of

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def form(
    tokenizer: Tokenizer,
    tools: Sequence[dict[str, Any]],
    name: str = "",
    *,
    parallel: bool = True,
    after_thinking: bool = False,
) -> StructuredOutputsParams:
    """One call or, with `parallel`, several, of any of the `tools` (as `tools.check` takes them) or of the one called
    `name`, which is called once; then the answer ends. `after_thinking` where the prompt has begun a thought.

    Arguments follow the schema of a tool. Where that cannot be enforced, they are any object; for a tool with `strict`
    that is an InputError, as is a format without calls.
    """
    words = TEMPLATES[format_of(tokenizer)].tools if format_of(tokenizer) else None
    if words is None:
        raise InputError("a tool must be called, but the chat template has no words for calls -> use one that has")
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if name and name not in functions:
        raise InputError(
            f"tool {name!r} must be called and is not among tools -> give it{did_you_mean(name, functions)}"
        )
    if not functions:
        raise InputError("a tool must be called, but tools is empty -> give at least one")
    chosen = [functions[name]] if name else list(functions.values())
    calls = {
        "type": "tags_with_separator",
        "tags": [_tag(words, function, tokenizer) for function in chosen],
        "separator": words.between_calls,
        "at_least_one": True,
        "stop_after_first": bool(name) or not parallel,
    }
    break_ = [{"type": "optional", "content": {"type": "const_string", "value": "\n\n"}}] if after_thinking else []
    elements = [*break_, *_words(CALLS, tokenizer), calls, *_words(END_CALLS, tokenizer)]
    tag = {"type": "structural_tag", "format": {"type": "sequence", "elements": elements}}
    return StructuredOutputsParams(structural_tag=tag, after_thinking=after_thinking)


def _tag(words: Tools, function: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """One call, between its first and its last token."""
    before, middle, after = words.call
    begin, *first = _words(before, tokenizer)
    *last, end = _words(after, tokenizer)
    called = {"type": "const_string", "value": function["name"]}
    arguments = {"type": "json_schema", "json_schema": _schema(function)}
    content = [*first, called, *_words(middle, tokenizer), arguments, *last]
    return {"type": "tag", "begin": begin, "content": {"type": "sequence", "elements": content}, "end": end}


def _words(text: str, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [
        {"type": "token", "token": tokenizer.id_of(part)}
        if MARKUP.fullmatch(part)
        else {"type": "const_string", "value": part}
        for part in MARKUP.split(text)
        if part
    ]


def _schema(function: dict[str, Any]) -> dict[str, Any]:
    wanted = function.get("parameters") or NOTHING
    try:
        schema.check(json.dumps(wanted), LIMITS.schema_depth, LIMITS.schema_parts)
    except InputError:
        if function.get("strict"):
            raise
        return json.loads(JSON_OBJECT)
    return wanted
