"""The house stands: rooms import only from floors beneath them, and files and functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"base"},
    {"kernels", "tokenizer"},
    {"parallel", "data", "tasks"},
    {"model"},
    {"train", "inference"},
    {"posttrain", "eval", "server"},
    {"recipes"},
    {"jobs"},
    {"cli"},
    {"", "__main__"},  # the package itself: lazy names and `python -m benthic`
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every module of the package."""
    for path in sorted((ROOT / "benthic").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text(encoding="utf-8")


def room_of(module: str) -> str:
    """`benthic.model.mla` -> `model`; `benthic` -> the empty name."""
    return module.split(".")[1] if "." in module else ""


def imported(module: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of the package, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["benthic.<relative import>"]
        elif isinstance(node, ast.ImportFrom) and node.module == "benthic":
            names = [f"benthic.{alias.name}" if alias.name in FLOOR else "benthic" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "benthic")


def floor_faults(module: str, source: str) -> list[str]:
    """Imports that go up, sideways, or to a room that the plan does not know."""
    room = room_of(module)
    if room not in FLOOR:
        return [f"{module}: room {room!r} has no floor"]
    faults = []
    for line, name in imported(module, source):
        other = room_of(name)
        version = room == "cli" and other == ""  # `benthic --version`
        if other not in FLOOR:
            faults.append(f"{module}:{line}: imports {name}, whose room has no floor")
        elif other != room and FLOOR[other] >= FLOOR[room] and not version:
            faults.append(f"{module}:{line}: {room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})")
    return faults


def size_faults(module: str, source: str) -> list[str]:
    """Files and functions over budget."""
    faults = []
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        faults.append(f"{module}: {lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{module}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return faults


def test_every_room_imports_only_from_floors_beneath_it():
    assert [fault for module, source in modules() for fault in floor_faults(module, source)] == []


def test_no_file_and_no_function_is_over_its_budget():
    assert [fault for module, source in modules() for fault in size_faults(module, source)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("benthic.model.mla", "from benthic.train.trainer import Trainer"),
        ("benthic.model.mla", "import benthic.inference.engine"),
        ("benthic.eval.run", "from benthic.server.app import serve"),
        ("benthic.eval.run", "from benthic import server"),
        ("benthic.base.log", "def f():\n    if True:\n        from benthic.model import hf"),
        ("benthic.base.log", "from ..model import hf"),
        ("benthic.train.step", "from benthic import load"),
        ("benthic.jobs.demo", "from benthic.cli import main"),
        ("benthic.utils.text", ""),
        ("benthic.cli", "from benthic.helpers import x"),
    ],
)
def test_a_module_that_breaks_the_order_is_caught(module, source):
    assert len(floor_faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("benthic.train.step", "from benthic.model.moe import MoE\nfrom benthic.train.loss import x\nimport torch"),
        ("benthic", "from benthic.inference.llm import LLM"),
        ("benthic.cli", "from benthic import __version__"),
        ("benthic.__main__", "from benthic.cli import main"),
    ],
)
def test_what_the_order_allows_is_not_refused(module, source):
    assert floor_faults(module, source) == []


def test_a_long_file_and_a_long_function_are_caught():
    assert len(size_faults("m", "x = 1\n" * 401)) == 1
    assert len(size_faults("m", "def f():\n" + "    x = 1\n" * 60)) == 1
    assert size_faults("m", "def f():\n" + "    x = 1\n" * 59) == []


def test_the_gate_looks_at_the_whole_package():
    seen = {room_of(module) for module, _ in modules()}
    assert {"base", "model", "train", "inference", "cli", ""} <= seen
