"""Strict models of requests, and how what is wrong with one becomes an error that names the field."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from benthic.server.errors import ApiError
from benthic.server.limits import LIMITS
from benthic.server.wire import decode, dump

NOT_SUPPORTED = "not supported by this server; leave it out"
TAG = "~"  # the parts of pydantic's locations that name a branch, not a field


def fault(text: str, name: str = "") -> PydanticCustomError:
    """What a validator raises. `name` is the field at fault inside the value that it looks at."""
    return PydanticCustomError("fault", "{text}", {"text": text, "name": name})


class Strict(BaseModel):
    """A JSON object whose fields have exactly their types. null is as good as absent where there is a default."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )  # fmt: skip
    HARMLESS: ClassVar[Mapping[str, str]] = {}
    """Fields that do not change the answer, with the reason. They are accepted and not read."""
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not supported, with the values that ask for nothing. Any other value is refused."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """The declared fields. What is unknown or unsupported is refused before anything is read."""
        if not isinstance(value, dict):
            return value
        known = _names(cls)
        read = {}
        for name, content in value.items():
            required = known.get(name)
            if required is not None:
                if required or content is not None:
                    read[name] = content
            elif name in cls.NEUTRAL:
                neutral = cls.NEUTRAL[name]
                if content is not None and not any(type(content) is type(n) and content == n for n in neutral):
                    raise fault(NOT_SUPPORTED, name)
            elif name not in cls.HARMLESS:
                near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.6)
                hint = f"did you mean {near[0]!r}?" if near else "/openapi.json lists the fields"
                raise fault(f"unknown field; {hint}", name[:64])
        return read

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler.resolve_ref_schema(handler(schema))
        properties = json_schema.setdefault("properties", {})
        for name in properties.keys() - set(json_schema.get("required", ())):
            properties[name] = _or_null(properties[name])
        for name, reason in cls.HARMLESS.items():
            properties[name] = {"description": f"Accepted and not read: {reason}."}
        for name, neutral in cls.NEUTRAL.items():
            properties[name] = {"enum": [*neutral, None], "description": "Not supported: only values that say nothing."}
        return json_schema

    @classmethod
    def read(cls, body: bytes) -> Self:
        """The request in a body. ApiError 400 names the first field that cannot be used."""
        return cls.check(decode(body))

    @classmethod
    def check(cls, fields: dict[str, Any]) -> Self:
        """The request that decoded JSON makes, with the same errors."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _refusal(error) from None


def _names(model: type[BaseModel]) -> dict[str, bool]:
    """{name on the wire: whether it is required}."""
    return {field.alias or name: field.is_required() for name, field in model.model_fields.items()}


def _or_null(schema: JsonSchemaValue) -> JsonSchemaValue:
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    whole = {name: schema.pop(name) for name in ("default", "description", "title") if name in schema}
    return {"anyOf": [schema, {"type": "null"}], **whole}


@dataclass(frozen=True)
class Within:
    """Annotates a number, or a text, list or object whose length counts, as bounded by `LIMITS[name]`. A list is read
    up to its first fault."""

    name: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if schema["type"] == "list":
            schema["fail_fast"] = True
        number = schema["type"] in ("int", "float")
        return core_schema.no_info_wrap_validator_function(self._number if number else self._size, schema)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        json_schema = handler(schema)
        kind = json_schema.get("type")
        if kind is None:  # a choice of shapes, each with bounds of its own
            return json_schema
        low, high, meaning = LIMITS[self.name]
        names = {
            "string": ("minLength", "maxLength"),
            "array": ("minItems", "maxItems"),
            "object": ("minProperties", "maxProperties"),
        }
        for name, bound in zip(names.get(kind, ("minimum", "maximum")), (low, high)):
            json_schema[name] = bound if kind == "number" else int(bound)
        return {"description": f"{meaning[0].upper()}{meaning[1:]}.", **json_schema}

    def _number(self, value: Any, handler: core_schema.ValidatorFunctionWrapHandler) -> Any:
        value = handler(value)
        self._bound(value, f"is {value:.6g}" if isinstance(value, float) else f"is {short(value)}")
        return value

    def _size(self, value: Any, handler: core_schema.ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, str | list | dict):  # before what is inside is looked at
            what = "characters" if isinstance(value, str) else "entries"
            self._bound(len(value), f"has {len(value):,} {what}")
        return handler(value)

    def _bound(self, number: float, what: str) -> None:
        low, high, meaning = LIMITS[self.name]
        if not low <= number <= high:
            raise fault(f"{what}; use {low:,} to {high:,} ({meaning})")


@dataclass(frozen=True)
class JsonWithin:
    """Annotates JSON as bounded in bytes by one limit and in depth by another."""

    size: str
    depth: str = "schema_depth"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))

    def _check(self, value: Any, handler: core_schema.ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, dict | list):
            self._bound(value)
        return handler(value)

    def _bound(self, value: Any) -> None:
        depth, limit = LIMITS[self.depth].high, LIMITS[self.size]
        try:
            size = len(dump(value))
        except RecursionError:
            raise fault(f"is nested more than {depth:,} levels deep") from None
        except ValueError:
            raise fault("holds a number that is not finite") from None
        if size > limit.high:
            raise fault(f"has {size:,} bytes; use at most {limit.high:,} ({limit.meaning})")
        stack: list[tuple[Any, int]] = [(value, 1)]
        while stack:
            part, level = stack.pop()
            if level > depth:
                raise fault(f"is nested more than {depth:,} levels deep")
            if isinstance(part, dict | list):
                stack += [(inner, level + 1) for inner in (part.values() if isinstance(part, dict) else part)]


JsonSchema = Annotated[dict[str, Any], JsonWithin("schema_bytes")]


def short(value: Any) -> str:
    """A value in a few characters, whatever its size or depth."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 64 else f"{text[:60]}..."


TYPES = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of this size",
    "float_type": "a number",
    "finite_number": "a finite number",
}
BOXES = {"string_type": "a string", "list_type": "a list", "dict_type": "an object", "model_type": "an object"}


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    kind, value, context = first["type"], first.get("input"), first.get("ctx", {})
    parts = [part for part in first["loc"] if not str(part).startswith(TAG) and part != "[key]"]
    if context.get("name"):
        parts.append(context["name"])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    if kind == "fault":
        text = context["text"]
    elif kind == "missing":
        text = "required"
    elif kind in TYPES:
        text = f"{short(value)} is not {TYPES[kind]}"
    elif kind in BOXES:  # what stands there may be a text that nobody wants to read again
        text = f"not {BOXES[kind]}"
    elif kind == "literal_error":
        text = f"{short(value)} is not {context['expected']}"
    else:
        text = first["msg"]
    return ApiError(400, f"{param}: {text}" if param else text, param=param or None)
