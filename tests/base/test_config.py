"""Configs survive JSON unchanged, and every wrong key or value is an error that names the place."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from benthic.base.config import from_dict, to_dict
from benthic.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    name: str = "x"
    flag: bool = False
    limit: int | None = None
    folder: Path = Path("runs")
    betas: tuple[float, ...] = (0.9, 0.95)
    inner: Inner = field(default_factory=Inner)


def test_a_config_survives_json_unchanged():
    config = Outer(steps=3, limit=4, folder=Path("a/b"), betas=(0.5,), inner=Inner(rate=1.0, kind="b"))
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"step": 1}, r"unknown key 'step' in config -> .*did you mean 'steps'"),
        ({}, r"missing key 'steps' in config"),
        ({"steps": "3"}, r"config\.steps is '3' -> .* int"),
        ({"steps": True}, r"config\.steps is True"),
        ({"steps": 1.0}, r"config\.steps is 1\.0"),
        ({"steps": 1, "flag": 1}, r"config\.flag is 1"),
        ({"steps": 1, "betas": 0.9}, r"config\.betas is 0\.9 -> give a list"),
        ({"steps": 1, "inner": {"kind": "c"}}, r"config\.inner\.kind is 'c' -> use one of 'a', 'b'"),
        ({"steps": 1, "inner": {"rate": float("nan")}}, r"config\.inner\.rate is nan -> use a finite number"),
        ({"steps": 1, "inner": 3}, r"config\.inner is 3 -> give a table"),
        ({"steps": 1, "inner": {"rte": 3}}, r"unknown key 'rte' in config\.inner"),
        ({"steps": None}, r"config\.steps is None"),
    ],
)
def test_every_wrong_key_or_value_is_named(data, message):
    with pytest.raises(InputError, match=message) as caught:
        from_dict(Outer, data)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_an_integer_is_taken_where_a_number_is_asked():
    value = from_dict(Inner, {"rate": 2}).rate
    assert value == 2.0
    assert type(value) is float
