"""What a run folder says: metrics.jsonl and results.json, checked once, so that a report can trust them."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benthic.base.errors import InputError

NOT_FINITE = {"nan", "inf", "-inf"}  # how metrics.jsonl spells what JSON cannot

INTERVAL = "[value, low, high]"
MEASURED = "a finite number, or null where it was not measured"
OUTCOME = {"pass@1": INTERVAL, "pass@8": INTERVAL, "length": float, "well_formed": float}
SPECULATION = {"identical": bool, "acceptance": float, "tokens_per_step": float, "requests": float}
# What results.json may hold. A table must have the keys named here and may have more; {str: kind} names none; [kind] is
# a list. Every top-level entry may be absent.
RESULTS: dict[str, Any] = {
    "recipe": str,
    "seed": float,
    "corpus": {
        **dict.fromkeys(("documents", "bytes", "exact_duplicates", "near_duplicates"), float),
        **dict.fromkeys(("train_documents", "train_bytes", "heldout_documents", "heldout_bytes"), float),
        "rejected": {str: float},
        "skipped": [{"path": str, "reason": str}],
    },
    "tokenizer": {"vocab_size": float, "bytes_per_token": float},
    "model": {"parameters": float, "active_parameters": float},
    "bits_per_byte": dict.fromkeys(("model", "untrained", "gzip", "gzip_per_document", "limit"), float),
    "balance": {"with_bias": float, "without_bias": MEASURED, "limit": float},
    "rl": {"problems": float, "samples": float, "how": str, "before": OUTCOME, "after": OUTCOME},
    "speculative": SPECULATION,  # on text
    "speculative_sums": SPECULATION,  # on the questions of the task
    "cache": dict.fromkeys(("mla", "gqa", "mqa", "mha"), float),
    "absorbed_error": float,
    "samples": [{"prompt": str, "text": str, "answer": str, "correct": bool, "when": str}],
    "wall_seconds": {str: float},
    "machine": {},
    "config": {},
}
NAMES = {float: "a finite number", str: "a text", bool: "true or false", INTERVAL: INTERVAL, MEASURED: MEASURED}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps, in order of step. What was not finite is left out."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run so far. `results` is empty while it has not finished."""

    name: str
    rows: list[dict[str, Any]]
    results: dict[str, Any]

    def curve(self, stage: str, key: str) -> Curve:
        """The numbers logged as `key` in `stage`; where a step was logged twice, the later row counts."""
        found = {row["step"]: row[key] for row in self.rows if row["stage"] == stage and key in row}
        finite = sorted((step, value) for step, value in found.items() if isinstance(value, int | float))
        return Curve(steps=[step for step, _ in finite], values=[value for _, value in finite])

    def loads(self, stage: str) -> tuple[list[int], list[list[list[float]]]]:
        """Steps, and `expert_load` as [step][layer][expert] relative to an even share (1.0 = even).

        A model without experts logs empty lists; they are left out.
        """
        found = {r["step"]: r["expert_load"] for r in self.rows if r["stage"] == stage and r.get("expert_load")}
        steps = sorted(found)
        return steps, [[_relative(layer) for layer in found[step]] for step in steps]


def read(folder: Path) -> Record:
    """Raises InputError naming the file and the line or key that cannot be used."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path} does not exist -> give the folder of a run")
    lines = path.read_bytes().splitlines()
    rows = [_row(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]
    shapes = {tuple(map(len, row["expert_load"])) for row in rows if "expert_load" in row}
    if len(shapes) > 1:
        raise InputError(f"{path} has expert_load of shapes {sorted(shapes)} -> keep one model per run folder")
    return Record(name=folder.resolve().name, rows=rows, results=_results(folder / "results.json"))


def _row(line: bytes, where: str) -> dict[str, Any]:
    row = _parse(line, where)
    if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or type(row.get("step")) is not int:
        raise InputError(f"{where} is not a row with a text 'stage' and a whole 'step' -> repair or remove the line")
    for key, value in row.items():
        if key in ("expert_load", "device_load"):
            good = isinstance(value, list) and all(_is_layer(layer) for layer in value)
        else:
            good = key == "stage" or _is_number(value) or _is_layer(value) or _is_gap(value)
        if not good:
            raise InputError(f"{where} has {key} = {str(value)[:60]!r} -> repair or remove the line")
    return row


def _results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    results = _parse(path.read_bytes(), str(path))
    if not isinstance(results, dict):
        raise InputError(f"{path} is not a JSON object -> write it again")
    for name, kind in RESULTS.items():
        if name in results:
            _check(results[name], kind, f"{path}: {name}")
    return results


def _check(value: Any, kind: Any, where: str) -> None:
    """Raise InputError unless `value` is of `kind`, which is written as in RESULTS."""
    shown = f"{where} is {str(value)[:60]!r}"
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise InputError(f"{shown} -> give a table of keys and values")
        for key, inner in (dict.fromkeys(value, kind[str]) if str in kind else kind).items():
            if key not in value:
                raise InputError(f"{where}.{key} is missing -> add it")
            _check(value[key], inner, f"{where}.{key}")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise InputError(f"{shown} -> give a list")
        for number, item in enumerate(value):
            _check(item, kind[0], f"{where}[{number}]")
    elif not _is_scalar(value, kind):
        raise InputError(f"{shown} -> give {NAMES[kind]}")


def _is_scalar(value: Any, kind: Any) -> bool:
    if kind == INTERVAL:
        return _is_layer(value) and len(value) == 3
    if kind == MEASURED:
        return value is None or _is_number(value)
    return _is_number(value) if kind is float else isinstance(value, kind)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_gap(value: Any) -> bool:
    return isinstance(value, str) and value in NOT_FINITE


def _is_layer(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _relative(layer: list[float]) -> list[float]:
    even = sum(layer) / len(layer)
    return [load / even if even else 0.0 for load in layer]


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}) -> repair or remove it") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
