"""What a run writes down: rows that survive a resume, TensorBoard scalars, the facts to repeat it."""

import json
import logging
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benthic.base import log as log_module
from benthic.base.log import Run, clock, number


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 3
    folder: Path = Path("runs")


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _written(folder: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in _rows(folder)]


def test_each_row_is_on_disk_when_log_returns(tmp_path):
    run = Run(tmp_path)
    run.log("pretrain", 1, {"loss": 2.5, "expert_load": [0.25, 0.75]})
    (row,) = _rows(tmp_path)
    assert row["loss"] == 2.5
    assert row["expert_load"] == [0.25, 0.75]
    run.close()


def test_rewind_drops_only_what_the_resumed_stage_will_write_again(tmp_path):
    run = Run(tmp_path)
    for stage in ("pretrain", "sft"):
        for step in range(1, 5):
            run.log(stage, step, {"loss": float(step)})
    run.close()
    again = Run(tmp_path)
    again.rewind("sft", 2)
    again.log("sft", 3, {"loss": 3.0})
    again.close()
    assert _written(tmp_path) == [("pretrain", s) for s in range(1, 5)] + [("sft", 1), ("sft", 2), ("sft", 3)]


def test_a_last_line_cut_by_a_crash_is_dropped_and_the_next_row_is_readable(tmp_path):
    run = Run(tmp_path)
    run.log("sft", 1, {"loss": 1.0})
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sft", "st')
    again = Run(tmp_path)
    again.log("sft", 2, {"loss": 1.0})
    again.close()
    assert _written(tmp_path) == [("sft", 1), ("sft", 2)]


def test_numbers_that_json_has_not_are_kept_as_readable_strings(tmp_path):
    run = Run(tmp_path)
    run.log("sft", 1, {"loss": float("nan"), "norms": [1.0, float("-inf")]})
    run.close()
    (row,) = _rows(tmp_path)
    assert row["loss"] == "nan"
    assert float(row["norms"][1]) == float("-inf")


def test_tensorboard_shows_scalars_once_after_a_rewind(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.log("sft", step, {"loss": 1.0, "load": [1.0, 2.0]})
    run.close()
    again = Run(tmp_path)
    again.rewind("sft", 1)
    for step in (2, 3):
        again.log("sft", step, {"loss": 9.0})
    again.close()
    board = EventAccumulator(str(tmp_path / "tensorboard" / "sft"))
    board.Reload()
    assert board.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1.0), (2, 9.0), (3, 9.0)]


def test_the_header_holds_what_it_takes_to_repeat_the_run(tmp_path):
    run = Run(tmp_path)
    run.header(Config())
    run.close()
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["config"] == {"steps": 3, "folder": "runs"}
    assert facts["versions"]["torch"]
    assert facts["threads"] >= 1
    assert facts["command"]
    assert facts["git"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", facts["git"])


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = Run(tmp_path / "run")
    run.header(Config())
    run.log("sft", 1, {"loss": 1.0})
    run.rewind("sft", 0)
    with run.progress("sft", 3) as progress:
        progress.update(1)
    run.close()
    assert not (tmp_path / "run").exists()


def test_off_a_terminal_progress_is_a_plain_line_per_period_and_one_at_the_end(tmp_path, monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "benthic")
    with Run(tmp_path).progress("pretrain", 105) as progress:
        for done in range(1, 106):
            now[0] += 1.0
            progress.update(done, loss=2.0, tok_per_s=12345.6)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 11
    assert lines[0] == "pretrain 10/105, loss 2, tok_per_s 12,346, 0:01:35 left"
    assert lines[-1] == "pretrain 105/105, loss 2, tok_per_s 12,346"


def test_quiet_means_no_progress(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "benthic")
    with Run(tmp_path).progress("pretrain", 1) as progress:
        progress.update(1)
    assert not caplog.records


def test_on_a_terminal_progress_is_one_live_line(tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO, "benthic")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Run(tmp_path).progress("pretrain", 10) as progress:
        progress.update(10, loss=1.25)
    assert "loss 1.25" in capsys.readouterr().err
    assert not caplog.records


def test_importing_the_log_installs_no_handler_and_no_torch():
    program = (
        "import logging, sys, benthic.base.log; print(logging.getLogger('benthic').handlers, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out == "[] False\n"


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), (0.00123456, "0.001235"), (12345.6, "12,346"), (float("nan"), "nan")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_clock_counts_hours():
    assert clock(3 * 3600 + 62.9) == "3:01:02"
