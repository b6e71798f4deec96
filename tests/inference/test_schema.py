import json

import pytest

from benthic.base.errors import InputError
from benthic.inference import schema


def check(value: object, depth: int = 8, parts: int = 50) -> None:
    schema.check(value if isinstance(value, str) else json.dumps(value), depth, parts)


@pytest.mark.parametrize(
    "good",
    [
        True,
        {},
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"], "title": "T"},
        {"$defs": {"x": {"type": "null"}}, "$ref": "#/$defs/x", "description": "d"},
        {"anyOf": [{"type": "string", "maxLength": 3}, {"enum": [1, 2]}]},
        {"type": "array", "prefixItems": [{"const": 1}], "items": False},
        {"type": "string", "format": "date"},
        {"properties": {"multipleOf": {"type": "null"}}},
        {"enum": [{"not": 1}]},
    ],
)
def test_schemas_that_can_be_enforced_pass(good):
    check(good)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"type": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ([], "no schema"),
        ({"type": "integer", "multipleOf": 3}, "'multipleOf' at #, which cannot be enforced"),
        ({"items": {"uniqueItems": True}}, "'uniqueItems' at #/items"),
        ({"properties": {"a": {"not": {}}}}, "'not' at #/properties/a"),
        ({"type": "string", "minlength": 3}, "did you mean 'minLength'"),
        ({"anyOf": [{}], "minLength": 3}, "'minLength' beside 'anyOf'"),
        ({"$ref": "#/$defs/a", "type": "string"}, "'type' beside '\\$ref'"),
        ({"allOf": [{}, {}]}, "several parts in 'allOf'"),
        ({"allOf": 5}, "is no list"),
        ({"pattern": "a", "minLength": 3}, "'minLength' beside 'pattern'"),
        ({"format": "regex"}, "format='regex' at # cannot be enforced"),
        ({"format": []}, "format=\\[\\]"),
        ({"properties": []}, "is no object"),
        ({"items": {"items": {"items": {"items": {"items": {"items": {"items": {"items": {}}}}}}}}}, "9 levels deep"),
        ({"anyOf": [{}] * 60}, "more than 50 parts"),
    ],
)
def test_what_would_be_ignored_or_explode_is_refused_by_name(bad, message):
    with pytest.raises(InputError, match=message):
        check(bad)
