"""Which JSON schemas can be enforced. What would be ignored silently is refused by name. Imports no torch."""

import json
from typing import Any

from benthic.base.errors import InputError, did_you_mean

ANNOTATIONS = frozenset(
    "$schema $id $comment $anchor title description default examples deprecated readOnly writeOnly".split()
)
ONE = frozenset("items additionalProperties unevaluatedProperties unevaluatedItems propertyNames".split())
LIST = frozenset("anyOf oneOf allOf prefixItems".split())
MAPPING = frozenset("properties patternProperties $defs definitions".split())
VALUES = frozenset(
    "type required minItems maxItems minLength maxLength pattern format enum const $ref minimum maximum "
    "exclusiveMinimum exclusiveMaximum minProperties maxProperties".split()
)
ENFORCED = ONE | LIST | MAPPING | VALUES
ALONE = frozenset("$ref anyOf oneOf allOf".split())  # beside them, other constraints would be ignored
DEFINITIONS = frozenset("$defs definitions".split())
FORMATS = frozenset(
    "email date time date-time duration ipv4 ipv6 hostname uuid uri uri-reference uri-template json-pointer "
    "relative-json-pointer".split()
)


def check(text: str, max_depth: int, max_nodes: int) -> None:
    """InputError where `text` is no JSON schema all of whose constraints can be enforced, or is deeper or larger."""
    try:
        root = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"json={text!r:.40} is not valid JSON ({error}) -> give a JSON schema") from error
    stack: list[tuple[Any, str, int]] = [(root, "#", 1)]
    nodes = 0
    while stack:
        schema, where, depth = stack.pop()
        nodes += 1
        if depth > max_depth or nodes > max_nodes:
            what = f"{depth} levels deep" if depth > max_depth else f"of more than {max_nodes} parts"
            raise InputError(f"the JSON schema is {what} at {where} -> give a simpler one")
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, dict):
            raise InputError(f"json={schema!r:.40} at {where} is no schema -> give an object")
        _check_keywords(schema, where)
        stack += [(part, place, depth + 1) for part, place in _parts(schema, where)]


def check_tag(text: str, max_depth: int, max_nodes: int) -> None:
    """The same for every JSON schema in a structural tag, whose own shape is up to who compiles it."""
    try:
        stack = [json.loads(text)]
    except (ValueError, RecursionError) as error:
        raise InputError(f"structural_tag={text!r:.40} is not valid JSON ({error}) -> give one") from error
    while stack:
        part = stack.pop()
        if isinstance(part, dict) and "json_schema" in part:
            check(json.dumps(part["json_schema"]), max_depth, max_nodes)
        elif isinstance(part, dict | list):
            stack += part.values() if isinstance(part, dict) else part


def _check_keywords(schema: dict[str, Any], where: str) -> None:
    constraints = schema.keys() - ANNOTATIONS - DEFINITIONS
    if unknown := sorted(constraints - ENFORCED):
        raise InputError(
            f"the JSON schema has {unknown[0]!r} at {where}, which cannot be enforced -> leave it out"
            + did_you_mean(unknown[0], ENFORCED)
        )
    if (alone := sorted(constraints & ALONE)) and len(constraints) > 1:
        other = sorted(constraints - {alone[0]})[0]
        raise InputError(f"the JSON schema has {other!r} beside {alone[0]!r} at {where} -> put it inside {alone[0]!r}")
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        raise InputError(f"the JSON schema has several parts in 'allOf' at {where} -> write them as one")
    shapes = sorted(constraints & {"pattern", "format"})
    if shapes and (lengths := sorted(constraints & {"minLength", "maxLength"})):
        raise InputError(f"the JSON schema has {lengths[0]!r} beside {shapes[0]!r} at {where} -> give one of them")
    if "format" in schema and str(schema["format"]) not in FORMATS:
        raise InputError(
            f"format={schema['format']!r:.40} at {where} cannot be enforced -> use {', '.join(sorted(FORMATS))}"
        )


def _parts(schema: dict[str, Any], where: str) -> list[tuple[Any, str]]:
    """The schemas inside, with their places."""
    parts: list[tuple[Any, str]] = []
    for key, value in schema.items():
        if key in ONE:
            parts.append((value, f"{where}/{key}"))
        elif key in LIST and isinstance(value, list):
            parts += [(part, f"{where}/{key}/{i}") for i, part in enumerate(value)]
        elif key in MAPPING and isinstance(value, dict):
            parts += [(part, f"{where}/{key}/{name}") for name, part in value.items()]
        elif key in LIST | MAPPING:
            raise InputError(f"{key}={value!r:.40} at {where} is no {'list' if key in LIST else 'object'} -> give one")
    return parts
