"""Tools that a prompt declares: `{"type": "function", "function": {"name", "description", "parameters"}}` each."""

import json
import re
from collections.abc import Sequence
from typing import Any

from benthic.base.errors import InputError, did_you_mean

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
FIELDS = ("name", "description", "parameters", "strict")


def check(tools: Sequence[Any]) -> None:
    """InputError names the tool and the field at fault."""
    names = set()
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function" or len(tool) > 2:
            raise InputError(f'{where} is {tool!r:.60} -> give {{"type": "function", "function": {{"name": ...}}}}')
        for key in function:
            if key not in FIELDS:
                raise InputError(f"unknown key {key!r} in {where}.function -> remove it{did_you_mean(key, FIELDS)}")
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(f"name is {name!r:.80} in {where} -> use 1 to 64 of A-Z a-z 0-9 _ . -")
        if name in names:
            raise InputError(f"name is {name!r} in {where}, as in an earlier tool -> give each its own")
        names.add(name)
        if not isinstance(function.get("description"), str | None):
            raise InputError(f"description is {function['description']!r:.60} in {where} -> give a string")
        if not isinstance(function.get("parameters"), dict | None):
            raise InputError(f"parameters is {function['parameters']!r:.60} in {where} -> give a JSON schema")
        if not isinstance(function.get("strict"), bool | None):
            raise InputError(f"strict is {function['strict']!r:.60} in {where} -> give true or false")
        parameters(function, where)


def parameters(function: dict[str, Any], where: str = "tools") -> str:
    """The JSON schema of its arguments as text; one without parameters has {}."""
    try:
        return json.dumps(function.get("parameters") or {}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"parameters are no JSON in {where} ({error}) -> give a JSON schema") from error
