"""A signal ends a run with a checkpoint of the step it was in; a second one ends it at once."""

import signal
import time

import pytest
from training_example import digest, settings, start, trainer


def _wait_for(process, line: str) -> None:
    for said in iter(process.stdout.readline, ""):
        if said.strip() == line:
            return
    pytest.fail(f"the run ended before step {line}: {process.stderr.read()}")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_whole_checkpoint_and_the_documented_exit_code_within_ten_seconds(tmp_path, signum, code):
    process = start("endless.py", tmp_path)
    try:
        _wait_for(process, "5")
        sent = time.monotonic()
        process.send_signal(signum)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - sent < 10
    assert process.returncode == code, err
    ended, _, message = out.splitlines()[-1].partition(" ")
    subject = trainer(tmp_path, settings(max_steps=10**6, save_steps=10**6))
    assert subject.resume()
    assert subject.steps >= 5
    assert message == f"tiny saved at step {subject.steps} of 1000000"
    assert digest(subject) == ended
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{subject.steps:08d}"]


def test_a_second_signal_ends_a_run_that_is_stuck_in_a_step_at_once(tmp_path):
    process = start("endless.py", tmp_path, "stuck")
    try:
        _wait_for(process, "3")
        process.send_signal(signal.SIGTERM)
        assert "once more" in process.stderr.readline()
        assert process.poll() is None
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
        assert time.monotonic() - sent < 1.0
    finally:
        process.kill()
        process.wait()
    assert not tmp_path.exists() or not list(tmp_path.iterdir())
