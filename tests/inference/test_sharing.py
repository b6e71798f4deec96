"""Processes that share a model answer as one process that holds all of it (gloo on CPU, float32).

What runs in the processes is in sharing.py; they start once for many cases.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sharing import BROAD, PLACED, QWEN, SLICED, SPARE, V1, V3, whole

from benthic import cli
from benthic.base.errors import InputError
from benthic.inference.share import check
from benthic.model import hf

HERE = Path(__file__).resolve().parent
BY_TWO = [
    "v3", "v3 placed", "v3 chunks", "v2", "v1", "qwen", "drawn", "prefix", "preempted", "rebalanced",
    "every third step", "loading", "primitives",
]  # fmt: skip
BY_FOUR = ["v2 placed", "v1", "rebalanced"]


def start(command: list[str], size: int, **env: str) -> list[subprocess.Popen]:
    base = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
    base |= {"OMP_NUM_THREADS": "1"} | env
    ranks = []
    for rank in range(size):
        mine = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = [word.format(rank=rank) for word in command]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen([sys.executable, *words], env=mine, stdout=pipe, stderr=pipe, text=True))
    return ranks


def ends(ranks: list[subprocess.Popen], timeout: float) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each; none may hang."""
    try:
        return [(process.wait(timeout), *process.communicate()) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def share(size: int, folder: Path, *cases: str) -> list[tuple[int, str, str]]:
    return ends(start([str(HERE / "sharing.py"), "{rank}", str(size), str(folder), *cases], size), 240)


Found = Callable[[str], dict[str, Any]]


def shared_by(size: int, folder: Path, cases: list[str]) -> Found:
    """Run all cases; -> what rank 0, or another, found in one."""
    done = share(size, folder, *cases)
    assert [code for code, *_ in done] == [0] * size, done[0][2] + done[-1][2]
    return lambda case, rank=0: json.loads((folder / f"{case}-{rank}.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("two")
    for name, fp8 in (("checkpoint", False), ("checkpoint-fp8", True)):
        hf.write_model(folder / name, whole(BROAD), None, fp8=fp8)
    return shared_by(2, folder, BY_TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return shared_by(4, tmp_path_factory.mktemp("four"), BY_FOUR)


def answers_as_the_whole(facts: dict[str, Any]) -> None:
    assert facts["apart"] < 1e-5
    assert facts["found"] == facts["expected"]
    assert [facts["preemptions"], facts["accepted"]] == facts["plain"]


@pytest.mark.parametrize("case", [case for case in BY_TWO if case not in ("rebalanced", "loading", "primitives")])
def test_two_processes_answer_as_one(case: str, two: Found) -> None:
    answers_as_the_whole(two(case))


@pytest.mark.parametrize("case", BY_FOUR)
def test_four_processes_answer_as_one(case: str, four: Found) -> None:
    answers_as_the_whole(four(case))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_processes_exchange_arrives_whole_and_in_order(rank: int, two: Found) -> None:
    assert two("primitives", rank) == {  # type: ignore[call-arg]
        "sum": [[11, 22], [33, 44]],
        "gather": [[1, 2, 10, 20], [3, 4, 30, 40]],
        "agree": [[1, 3], [2, 4]],
        "least": 6,
        "same": True,
        "heard": [True] * 3,
        "got": [[[10, 20], [30, 40]], [[1, 2], [3, 4]]][rank],
    }


def test_the_cases_do_what_they_are_there_for(two: Found) -> None:
    assert two("preempted")["preemptions"] > 0
    assert two("drawn")["accepted"] > 0


@pytest.mark.parametrize("size", [2, 4])
def test_experts_that_move_while_a_request_runs_change_no_answer(size: int, two: Found, four: Found) -> None:
    facts = (two if size == 2 else four)("rebalanced")
    answers_as_the_whole(facts)
    assert facts["again"] == facts["expected"]
    more = facts["more"]
    assert more["moved"] > 0
    assert more["load"] > 0
    before, after = more["imbalance"]
    assert after < before
    (answer,) = more["answer"]
    assert answer[2] == "length"


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_reads_its_part_of_a_checkpoint_and_little_else(rank: int, two: Found) -> None:
    facts = two("loading", rank)  # type: ignore[call-arg]
    assert all(kind["same"] for kind in facts.values())
    whole = facts["sliced"]["file"]
    for kind in ("sliced", "placed"):
        read, held = facts[kind]["read"], facts[kind]["held"]
        assert held < 0.75 * whole  # embedding and copies are whole
        copies = facts[kind]["checks"] if rank == 0 else 0  # the prediction module's embedding and head, compared
        assert read <= 1.01 * held + copies
    assert facts["fp8"]["read"] < 0.75 * facts["fp8"]["file"]


@pytest.mark.parametrize("case", ["raises", pytest.param("killed", marks=pytest.mark.long)])
def test_a_process_that_fails_ends_all_with_a_message(case: str, tmp_path: Path) -> None:
    (first, *_), (code, _, text) = share(2, tmp_path, case)
    facts = json.loads((tmp_path / f"{case}-0.json").read_text())
    assert code != 0
    if case == "raises":
        assert facts["type"] == "BenthicError"
        assert "rank 1 of 2 failed (RuntimeError: the third pass is one too many)" in facts["message"]
        assert "the third pass is one too many" in text
    else:
        assert "Connection" in facts["message"]  # closed, or reset
    assert first == 0  # it has caught its error, and has left


def test_a_process_ends_too_where_rank_0_fails_and_tells_it_nothing_more(tmp_path: Path) -> None:
    """It waits for a message that will never come, from a process that lives on."""
    (first, *_), (code, _, text) = share(2, tmp_path, "leader fails")
    assert (first, code) == (0, 1)
    assert "rank 0 of 2 failed (RuntimeError: before anything was told)" in text


def test_the_command_line_under_torchrun_prints_what_one_process_prints(model_folder: Path, capsys) -> None:
    words = ["generate", str(model_folder), "The sea", "2 and 3", "--device", "cpu", "--max-tokens", "5"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    more = ["--enable-expert-parallel", "--num-redundant-experts", "2"]
    together = start(["-m", "benthic", *words, *more], 2, **env)
    assert cli.main(words) == 0
    first, second = ends(together, 120)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1] == capsys.readouterr().out
    assert second[1] == ""


@pytest.mark.long
def test_torchrun_itself_starts_the_command_line(model_folder: Path) -> None:
    words = ["generate", str(model_folder), "The sea", "--device", "cpu", "--max-tokens", "5"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benthic", *words]
    (together,) = ends(start(torchrun, 1), 240)
    (alone,) = ends(start(["-m", "benthic", *words], 1), 120)
    assert together[:2] == alone[:2], together[2]


@pytest.mark.long
def test_kernels_answer_as_the_whole_model(tmp_path: Path) -> None:
    found = shared_by(2, tmp_path, ["kernels", "kernels placed"])
    answers_as_the_whole(found("kernels"))
    answers_as_the_whole(found("kernels placed"))


@pytest.mark.parametrize(
    ("config", "parallel", "size", "message"),
    [
        (V3, SLICED, 3, "num_attention_heads=4 does not divide among 3"),
        (V1, SLICED, 8, "num_key_value_heads=4 does not divide among 8"),
        (dataclasses.replace(V3, intermediate_size=63), SLICED, 2, "intermediate_size=63"),
        (dataclasses.replace(V3, moe_intermediate_size=40), SLICED, 2, "moe_intermediate_size=40 .* multiples of 8"),
        (V3, dataclasses.replace(SPARE, num_redundant_experts=3), 4, "num_redundant_experts=3 .* use .*=0"),
        (dataclasses.replace(V3, n_routed_experts=12), SPARE, 4, ""),
        (dataclasses.replace(V3, n_routed_experts=20), PLACED, 8, ""),
        (QWEN, PLACED, 2, "without experts"),
    ],
)
def test_what_does_not_divide_is_refused_with_its_numbers(config, parallel, size, message) -> None:
    if not message:
        config = dataclasses.replace(config, num_attention_heads=size)
        if (config.n_routed_experts + parallel.num_redundant_experts) % size == 0:
            return check(config, parallel, size)
        message = "num_redundant_experts=4"
    with pytest.raises(InputError, match=message):
        check(config, parallel, size)
