"""A run that is stopped and continued equals, bit for bit, one that never stopped."""

import json
from pathlib import Path

import pytest
import torch
from training_example import (
    MODEL,
    Memory,
    Stream,
    copy,
    digest,
    fresh_model,
    logged,
    same,
    settings,
    start,
    tensors,
    trainer,
    weights_digest,
)

from benthic.base.errors import CheckpointError, Interrupted
from benthic.base.signals import Stop
from benthic.model.config import ModelConfig
from benthic.train import checkpoint
from benthic.train import trainer as room
from benthic.train.trainer import Trainer

SPIKE = 29  # batch number, from 0, that is skipped because its gradient is far above the running mean
NOISE = 0.1


def make(folder: Path, **changes) -> Trainer:
    """The run under test: learning rate, gate biases, noise, a spike and the running mean all matter in it."""
    return trainer(folder, settings(**changes), cursor=Stream(factors={SPIKE: 1e3}), noise=NOISE)


def seeded(subject: Trainer) -> Trainer:
    """A process starts with its own random state; the run's begins here."""
    torch.manual_seed(17)
    return subject


def elsewhere() -> None:
    """What a new process has: another random state."""
    torch.manual_seed(99)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Trainer:
    """The run that is never stopped."""
    subject = seeded(make(tmp_path_factory.mktemp("straight")))
    subject.fit(subject.cursor)  # type: ignore[arg-type]
    subject.final = digest(subject)  # type: ignore[attr-defined]
    assert subject.skipped == 1
    return subject


def stopped_at(k: int, folder: Path) -> None:
    """Train until a signal arrives in step k, and leave as `fit` does."""
    subject = seeded(make(folder))
    subject.stop = Stop()
    take = subject.cursor.batch  # type: ignore[attr-defined]

    def signalled(i: int):
        subject.stop.requested = 15 if i == k - 1 else subject.stop.requested
        return take(i)

    subject.cursor.batch = signalled  # type: ignore[attr-defined]
    with pytest.raises(Interrupted, match=f"tiny saved at step {k} of 40"):
        subject.fit(subject.cursor)  # type: ignore[arg-type]


def continued(folder: Path) -> Trainer:
    """A new trainer that goes on from the disk to the end."""
    elsewhere()
    subject = make(folder)
    assert subject.resume()
    subject.fit(subject.cursor)  # type: ignore[arg-type]
    return subject


@pytest.fixture(scope="module")
def saves(tmp_path_factory, straight) -> Path:
    """The same run with a checkpoint after every step: 40 of them."""
    folder = tmp_path_factory.mktemp("saves")
    subject = seeded(make(folder, save_total_limit=100))
    subject.due = lambda every: True  # type: ignore[method-assign]
    subject.fit(subject.cursor)  # type: ignore[arg-type]
    assert digest(subject) == straight.final, "saving changed the run"
    return folder


@pytest.mark.parametrize("k", range(1, 40))
def test_a_run_continued_from_step_k_ends_with_the_same_bits_and_logs_the_same_numbers(straight, saves, tmp_path, k):
    only = tmp_path / f"step-{k:08d}"
    only.symlink_to(saves / only.name)
    elsewhere()
    subject = make(tmp_path, save_total_limit=100)
    subject.save = lambda: None  # type: ignore[method-assign]
    assert subject.resume()
    assert subject.steps == k
    subject.fit(subject.cursor)  # type: ignore[arg-type]
    assert digest(subject) == straight.final
    assert logged(subject) == logged(straight, after=k)


@pytest.mark.parametrize("k", [1, 7, 29])
def test_a_run_stopped_by_a_signal_in_step_k_and_continued_ends_with_the_same_bits(straight, tmp_path, k):
    stopped_at(k, tmp_path)
    subject = continued(tmp_path)
    assert digest(subject) == straight.final
    assert logged(subject) == logged(straight, after=k)


@pytest.mark.long
@pytest.mark.parametrize("k", range(1, 40))
def test_a_run_stopped_by_a_signal_in_any_step_ends_with_the_same_bits(straight, tmp_path, k):
    stopped_at(k, tmp_path)
    assert digest(continued(tmp_path)) == straight.final


@pytest.mark.long
def test_a_run_stopped_after_every_step_ends_with_the_same_bits(straight, tmp_path):
    seeded(make(tmp_path)).save()
    for k in range(1, 41):
        elsewhere()
        subject = make(tmp_path)
        assert subject.resume()
        subject.step(next(subject.cursor))  # type: ignore[call-overload]
        assert subject.steps == k
        subject.save()
    assert digest(subject) == straight.final


def test_a_new_process_continues_with_the_same_bits(straight, tmp_path):
    stopped_at(11, tmp_path)
    process = start("continue_run.py", tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found["digest"] == straight.final
    assert found["losses"] == [row["loss"] for row in logged(straight, after=11)]


def test_a_finished_run_is_resumed_without_training(straight, tmp_path):
    subject = seeded(make(tmp_path, max_steps=3))
    subject.fit(subject.cursor)  # type: ignore[arg-type]
    ended = digest(subject)
    again = make(tmp_path, max_steps=3)
    assert again.resume()
    again.fit(again.cursor)  # type: ignore[arg-type]
    assert digest(again) == ended


def test_a_run_without_checkpoints_starts_at_the_beginning_and_clears_its_log(tmp_path):
    subject = make(tmp_path / "none")
    subject.run.log("tiny", 4, {"loss": 1.0})
    assert not subject.resume()
    assert (subject.steps, subject.run.rows) == (0, [])  # type: ignore[attr-defined]


def test_rows_logged_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    stopped_at(5, tmp_path)
    subject = make(tmp_path)
    subject.run = Memory()
    for step in range(1, 9):
        subject.run.log("tiny", step, {})
    subject.resume()
    assert [row["step"] for row in subject.run.rows] == [1, 2, 3, 4, 5]


# ---- negative controls: forget one saved item, and the comparison must fail --------------------------------------


def _forget_moment(name: str):
    def forget(monkeypatch, subject: Trainer) -> None:
        restored = subject.resume

        def resume() -> bool:
            found = restored()
            for state in subject.optimizer.state.values():
                state[name].zero_()
            return found

        subject.resume = resume  # type: ignore[method-assign]

    return forget


def _forget_bias(monkeypatch, subject: Trainer) -> None:
    read = room.hf.read_weights

    def without_bias(folder: Path, model) -> None:
        read(folder, model)
        for gate in model.gates():
            gate.e_score_correction_bias.zero_()

    monkeypatch.setattr(room.hf, "read_weights", without_bias)


def _forget_weights(monkeypatch, subject: Trainer) -> None:
    monkeypatch.setattr(room.hf, "read_weights", lambda folder, model: None)


def _forget_cursor(monkeypatch, subject: Trainer) -> None:
    subject.cursor.load_state_dict = lambda state: None  # type: ignore[method-assign]


def _forget_rng(monkeypatch, subject: Trainer) -> None:
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)


def _forget_number(name: str, value: float):
    def forget(monkeypatch, subject: Trainer) -> None:
        newest = checkpoint.newest

        def without(parent: Path):
            saved = newest(parent)
            assert saved is not None
            saved.state[name] = value
            return saved

        monkeypatch.setattr(checkpoint, "newest", without)

    return forget


FORGET = {
    "weights": _forget_weights,
    "exp_avg": _forget_moment("exp_avg"),
    "exp_avg_sq": _forget_moment("exp_avg_sq"),
    "optimizer step": _forget_moment("step"),
    "gate bias": _forget_bias,
    "cursor": _forget_cursor,
    "rng": _forget_rng,
    "step": _forget_number("step", 0),
    "tokens": _forget_number("tokens", 0),
    "norm_mean": _forget_number("norm_mean", 0.0),
}


def _end(folder: Path, saves: Path, monkeypatch, k: int, forget=None) -> Trainer:
    (folder / f"step-{k:08d}").symlink_to(saves / f"step-{k:08d}")
    elsewhere()
    subject = make(folder, save_total_limit=100)
    subject.save = lambda: None  # type: ignore[method-assign]
    if forget is not None:
        forget(monkeypatch, subject)
    assert subject.resume()
    subject.fit(subject.cursor)  # type: ignore[arg-type]
    return subject


def test_the_negative_controls_start_from_a_run_that_passes(straight, saves, tmp_path, monkeypatch):
    assert weights_digest(_end(tmp_path, saves, monkeypatch, SPIKE)) == weights_digest(straight)


@pytest.mark.parametrize("item", FORGET)
def test_forgetting_one_saved_item_changes_the_final_parameters(straight, saves, tmp_path, monkeypatch, item):
    subject = _end(tmp_path, saves, monkeypatch, SPIKE, FORGET[item])
    assert weights_digest(subject) != weights_digest(straight)


@pytest.mark.parametrize(("item", "k"), [("skipped", 30), ("skipped_in_a_row", 30)])
def test_forgetting_a_count_of_skipped_updates_changes_the_state_or_the_log(saves, tmp_path, monkeypatch, item, k):
    (tmp_path / f"step-{k:08d}").symlink_to(saves / f"step-{k:08d}")
    whole, without = make(tmp_path, save_total_limit=100), make(tmp_path, save_total_limit=100)
    assert whole.resume()
    _forget_number(item, 0)(monkeypatch, without)
    assert without.resume()
    assert digest(whole) != digest(without)


def test_every_value_in_the_checkpoint_is_covered_by_a_negative_control(saves):
    saved = checkpoint.newest(saves)
    assert saved is not None
    described = {"stage", "config", "torch", "threads"}  # say what the run is, not where it stands
    assert saved.state.keys() - described == {"cursor", "skipped", "skipped_in_a_row"} | {
        item for item in FORGET if item in saved.state
    }
    fields = {name.rpartition(".")[2] for name in saved.tensors.names if name.startswith("optimizer.")}
    assert fields == {"exp_avg", "exp_avg_sq", "step"}
    assert {name for name in saved.tensors.names if not name.startswith("optimizer.")} == {"rng.cpu"}


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 1e-3), ("seed", 4), ("max_steps", 50)])
def test_resuming_with_a_changed_setting_is_refused_by_name_and_values(saves, name, value):
    subject = make(saves, **{"save_total_limit": 100, name: value})
    before = copy(tensors(subject))
    was = getattr(settings(), name)
    with pytest.raises(CheckpointError, match=rf"was trained with {name}={was!r}, now it is {value!r} -> restore"):
        subject.resume()
    assert same(before, tensors(subject))


def test_resuming_with_another_thread_count_is_announced(saves, caplog):
    torch.set_num_threads(2)
    try:
        assert make(saves, save_total_limit=100).resume()
    finally:
        torch.set_num_threads(1)
    assert "close, not bit-identical" in caplog.text


def test_resuming_another_architecture_is_refused_by_tensor_name(saves, tmp_path):
    other = fresh_model(ModelConfig(**{**vars(MODEL), "num_nextn_predict_layers": 0}))
    subject = trainer(saves, settings(save_total_limit=100), model=other)
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.2"):
        subject.resume()
