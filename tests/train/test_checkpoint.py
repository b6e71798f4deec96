"""A checkpoint is whole or absent, whatever call fails; damage is found; the predecessor is offered."""

import errno
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
from disk import Os, content, save, small_model
from training_example import digest, settings, trainer

from benthic.base import files
from benthic.base.errors import BenthicError, CheckpointError
from benthic.model import hf
from benthic.tokenizer import bpe
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.train import checkpoint


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bpe.train(["some text to learn nothing from"], 266)


def _steps(parent: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in parent.iterdir())


def _newest(parent: Path) -> checkpoint.Saved:
    saved = checkpoint.newest(parent)
    assert saved is not None
    return saved


def test_what_is_read_is_what_was_written(tmp_path, tokenizer):
    save(tmp_path, 7, small_model(), tokenizer=tokenizer)
    saved = _newest(tmp_path)
    assert (saved.folder.name, content(saved)) == ("step-00000007", {7.0})
    model, loaded = hf.load(saved.folder / "model")
    assert {p.min().item() for p in model.parameters()} == {7.0}
    assert loaded is not None
    assert loaded.encode("text") == tokenizer.encode("text")


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None
    assert checkpoint.newest(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    model = small_model()
    for step in (1, 2, 9, 10, 100):
        save(tmp_path, step, model, keep=3)
    assert _steps(tmp_path) == [9, 10, 100]
    assert content(_newest(tmp_path)) == {100.0}


def test_a_trainer_keeps_save_total_limit_checkpoints(tmp_path):
    subject = trainer(tmp_path, settings(max_steps=5, save_steps=1, save_total_limit=3))
    subject.fit(subject.cursor)  # type: ignore[arg-type]
    assert _steps(tmp_path) == [3, 4, 5]


def test_saving_the_same_step_twice_is_harmless(tmp_path):
    model = small_model()
    save(tmp_path, 1, model)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    save(tmp_path, 1, model)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_leftovers_of_an_interrupted_write_and_of_an_interrupted_removal_are_cleared_away(tmp_path):
    model = small_model()
    for step in (1, 2):
        save(tmp_path, step, model)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / f"{files.PARTIAL}step-00000003")
    (tmp_path / "step-00000001" / files.MANIFEST).unlink()
    assert content(_newest(tmp_path)) == {2.0}
    assert _steps(tmp_path) == [2]


# ---- a call that fails ------------------------------------------------------------------------------------------


def _failure(parent: Path, model) -> str | None:
    """What a save of step 3 says that fails."""
    try:
        save(parent, 3, model)
    except (BenthicError, OSError) as error:
        return str(error)
    return None


LONG_CODES = [pytest.param(code, marks=pytest.mark.long) for code in (errno.EIO, errno.EFBIG, errno.EROFS)]


@pytest.mark.parametrize("code", [errno.ENOSPC, *LONG_CODES])
def test_every_failing_call_of_a_save_leaves_a_whole_checkpoint_and_names_the_path(tmp_path, monkeypatch, code):
    """Two checkpoints are there and the third save also removes the first: every call of both is made to fail."""
    model, at, failed = small_model(), 0, []
    save(tmp_path / "two", 1, model)
    save(tmp_path / "two", 2, model)
    while True:
        at += 1
        parent = tmp_path / str(at)
        shutil.copytree(tmp_path / "two", parent)
        failing = Os(at, code)
        monkeypatch.setattr(files, "os", failing)
        message = _failure(parent, model)
        assert message is None or str(parent) in message, f"{failing.names[at - 1]}: {message}"
        monkeypatch.setattr(files, "os", os)
        saved = _newest(parent)
        assert saved.state["step"] in (2, 3)
        assert content(saved) == {float(saved.state["step"])}
        assert not list(parent.glob(f"{files.PARTIAL}*"))
        save(parent, 4, model)  # and the next save works
        assert content(_newest(parent)) == {4.0}
        if len(failing.names) < at:
            break
        failed.append(failing.names[at - 1])
        shutil.rmtree(parent)
    assert set(failed) == set(Os.COUNTED)


def test_a_save_after_a_failed_one_of_the_same_step_works(tmp_path, monkeypatch):
    """The disk was full for a moment: the next attempt finds what the first one left."""
    model = small_model()
    monkeypatch.setattr(files, "os", Os(5))
    with pytest.raises(BenthicError, match="cannot write"):
        save(tmp_path, 1, model)
    monkeypatch.setattr(files, "os", os)
    save(tmp_path, 1, model)
    assert content(_newest(tmp_path)) == {1.0}


def test_a_disk_that_stores_other_bytes_is_found_before_older_checkpoints_are_removed(tmp_path, monkeypatch):
    model = small_model()
    for step in (1, 2):
        save(tmp_path, step, model)
    lying = Os()

    def write(fd: int, data) -> int:
        return os.write(fd, bytes(data)[:-1] + b"?")

    lying.write = write  # type: ignore[attr-defined]
    monkeypatch.setattr(files, "os", lying)
    with pytest.raises(CheckpointError, match="step-00000003"):
        save(tmp_path, 3, model)
    monkeypatch.setattr(files, "os", os)
    assert content(_newest(tmp_path)) == {2.0}
    assert _steps(tmp_path) == [1, 2, 3]


# ---- damage -----------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two(tmp_path_factory, tokenizer) -> Path:
    parent = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save(parent, step, small_model(), tokenizer=tokenizer)
    return parent


def test_a_checkpoint_holds_the_files_that_the_damage_tests_damage(two):
    folder = two / "step-00000002"
    assert {str(path.relative_to(folder)) for path in _files(folder)} == {
        "manifest.json", "trainer.json", "trainer.safetensors", "model/config.json", "model/manifest.json",
        "model/model.safetensors", "model/tokenizer.json", "model/tokenizer_config.json",
        "model/tokenizer_checksums.json",
    }  # fmt: skip


def _offers_predecessor(parent: Path, path: Path, damaged: bytes, caplog) -> None:
    """Put `damaged` in the place of a file of the newest checkpoint: it must be reported and the older one offered."""
    good = path.read_bytes()
    path.write_bytes(damaged)
    caplog.clear()
    try:
        saved = _newest(parent)
        assert content(saved) == {1.0}
        assert str(parent / "step-00000002") in caplog.text
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("seed", [0, *[pytest.param(s, marks=pytest.mark.long) for s in range(1, 6)]])
def test_every_flipped_bit_in_every_kind_of_file_is_found_and_the_predecessor_offered(two, caplog, seed):
    rng = random.Random(seed)
    for path in _files(two / "step-00000002"):
        good = path.read_bytes()
        for bit in rng.sample(range(8 * len(good)), 25):
            flipped = bytearray(good)
            flipped[bit // 8] ^= 1 << bit % 8
            _offers_predecessor(two, path, bytes(flipped), caplog)


@pytest.mark.parametrize("seed", [0, *[pytest.param(s, marks=pytest.mark.long) for s in range(1, 6)]])
def test_every_truncation_of_every_kind_of_file_is_found_and_the_predecessor_offered(two, caplog, seed):
    rng = random.Random(seed)
    for path in _files(two / "step-00000002"):
        good = path.read_bytes()
        lengths = {0, 1, len(good) // 2, len(good) - 2, *(rng.randrange(len(good) - 1) for _ in range(4))}
        for length in lengths:  # one byte less of the manifest is only its last newline
            _offers_predecessor(two, path, good[:length], caplog)


def test_every_missing_file_is_found_and_the_predecessor_offered(two, caplog, tmp_path):
    for path in _files(two / "step-00000002"):
        if path == two / "step-00000002" / files.MANIFEST:
            continue  # then it is the leftover of a removal
        caplog.clear()
        path.rename(tmp_path / "away")
        assert content(_newest(two)) == {1.0}
        (tmp_path / "away").rename(path)
        assert f"{path} is missing" in caplog.text


def test_a_damaged_checkpoint_ahead_is_not_counted_among_those_to_keep(tmp_path):
    model = small_model()
    save(tmp_path, 1, model)
    damaged = save(tmp_path, 4, model) / "trainer.json"
    damaged.write_bytes(b"{}")
    for step in (2, 3):
        save(tmp_path, step, model)
    assert _steps(tmp_path) == [2, 3, 4]
    save(tmp_path, 4, model)
    assert _steps(tmp_path) == [3, 4]
    assert content(_newest(tmp_path)) == {4.0}


def test_the_damage_tests_start_from_whole_checkpoints(two, caplog):
    with caplog.at_level(logging.WARNING):
        assert content(_newest(two)) == {2.0}
    assert not caplog.text


def test_if_all_are_damaged_nothing_is_resumed_and_the_error_names_the_newest(tmp_path):
    model = small_model()
    for step in (1, 2):
        folder = save(tmp_path, step, model)
        path = folder / "trainer.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*; the newest: .*step-00000002"):
        checkpoint.newest(tmp_path)
    assert _steps(tmp_path) == [1, 2]


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_its_predecessor_and_past_it(tmp_path):
    """The step that was damaged is reached again: it must be written again, not tripped over."""
    config = settings(max_steps=6, save_steps=2)
    first = trainer(tmp_path, config)
    first.fit(first.cursor)  # type: ignore[arg-type]
    ended = digest(first)
    path = tmp_path / "step-00000006" / "trainer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    again = trainer(tmp_path, config)
    assert again.resume()
    assert again.steps == 4
    again.fit(again.cursor)  # type: ignore[arg-type]
    assert _newest(tmp_path).state["step"] == 6
    assert digest(again) == ended
