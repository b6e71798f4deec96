"""Frozen config dataclasses to and from plain dicts. Strict: an unknown or missing key is an error at the door."""

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from benthic.base.errors import InputError, did_you_mean

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config; paths become strings and tuples lists, so that it survives JSON unchanged."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """Build `cls` from `data`. Raises InputError naming the key, the place and the nearest known name."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            raise InputError(f"unknown key {key!r} in {where} -> remove it{did_you_mean(key, fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"missing key {missing[0]!r} in {where} -> add it")
    return cls(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    """Check `value` against the annotation `kind` and convert what JSON cannot carry (tuples, paths, dataclasses)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = [a for a in args if a is not type(None)]
        return _value(kind, value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where} is {value!r} -> give a table of keys and values")
        return from_dict(typing.cast(type, kind), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {value!r} -> give a list")
        return tuple(_value(args[0], v, where) for v in value)
    if origin is typing.Literal:
        if value not in args:
            raise InputError(f"{where} is {value!r} -> use one of {', '.join(map(repr, args))}")
        return value
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise InputError(f"{where} is {value!r} -> use a finite number")
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where} is {value!r} -> use a value of type {getattr(kind, '__name__', kind)}")
    return value
