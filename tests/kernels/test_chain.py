"""The rule of chained kernels, read off their source, and on a GPU their results against unchained ones."""

import ast
from pathlib import Path

import pytest
import torch

chain = pytest.importorskip("benthic.kernels.chain", reason="needs triton")


def chained_kernels() -> dict[str, list[str]]:
    """Kernel -> the calls in its source, in order."""
    found = {}
    for path in sorted(Path(chain.__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, ast.FunctionDef)
                and "CHAINED" in [a.arg for a in node.args.args]
                and path.stem != "chain"
            ):
                calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
                calls.sort(key=lambda call: (call.lineno, call.col_offset))
                found[f"{path.stem}.{node.name}"] = [ast.unparse(call.func) for call in calls]
    return found


def broken(calls: list[str]) -> bool:
    """Whether something is written, or the kernel left, with no `wait` before it."""
    return "chain.wait" not in calls or any(
        c.startswith(("tl.store", "tl.atomic")) for c in calls[: calls.index("chain.wait")]
    )


def test_every_chained_kernel_waits_before_it_writes() -> None:
    kernels = chained_kernels()
    assert len(kernels) >= 10
    assert not [name for name, calls in kernels.items() if broken(calls)]


def test_a_kernel_that_writes_first_is_found() -> None:
    assert broken(["chain.begin", "tl.load", "tl.store", "chain.wait"])
    assert broken(["chain.begin", "tl.load", "tl.store"])


def test_nothing_is_chained_where_it_cannot_be_nor_for_many_tokens(device: str) -> None:
    assert chain.options(torch.zeros(1)) == {"CHAINED": False, "launch_pdl": False}
    many = torch.zeros(chain.MOST + 1, 1, device=device)
    assert not chain.options(many)["CHAINED"]
