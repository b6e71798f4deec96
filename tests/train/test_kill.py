"""kill -9 at any moment loses at most the checkpoint that was being written."""

import itertools
import json
from pathlib import Path

import pytest
from training_example import start


def _kills(verb: str, folder: Path, count: int = 0, seed: int = 0, timeout: float = 60) -> list[dict]:
    process = start("killing.py", verb, folder, count, seed)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize(
    ("count", "seed", "timeout"), [(20, 1, 60), pytest.param(500, 2, 600, marks=pytest.mark.long)], ids=["20", "500"]
)
def test_after_a_kill_at_a_random_moment_the_newest_sealed_checkpoint_or_its_successor_is_whole(
    tmp_path, count, seed, timeout
):
    kills = _kills("random", tmp_path, count, seed, timeout)
    assert len(kills) == count
    for kill in kills:
        assert kill["newest"] in (kill["sealed"], kill["sealed"] + 1), kill
        assert kill["content"] in ([kill["newest"]], []), kill
        assert all(name.startswith("step-") for name in kill["left"]), kill
    for before, after in itertools.pairwise(kills):  # two to keep, and one more for each kill just before the pruning
        assert len(after["left"]) <= max(3, len(before["left"]) + 1), after
    assert kills[-1]["newest"] > count // 4, "the children hardly saved anything"
    assert sum(kill["partial_before"] for kill in kills) > count // 10, "the kills hardly ever hit a save"


def test_after_a_kill_at_any_call_that_touches_the_disk_a_whole_checkpoint_is_found(tmp_path):
    kills = _kills("calls", tmp_path)
    assert not kills[-1]["killed"]
    assert all(kill["killed"] for kill in kills[:-1])
    assert len(kills) > 50
    newest = [kill["newest"] for kill in kills]
    assert newest == sorted(newest), "a later kill found an older checkpoint"
    assert set(newest) == {2, 3}
    for kill in kills:
        assert kill["content"] == [kill["newest"]], kill
        assert all(name.startswith("step-") for name in kill["left"]), kill
    assert kills[-1]["left"] == ["step-00000002", "step-00000003"]


def test_the_kill_test_finds_a_saver_that_prunes_too_early(tmp_path):
    assert _kills("control", tmp_path)[-1]["newest"] == 0
