"""Neither the number of micro-batches nor that of processes changes a step."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_example import Factored, Stream, copy, fresh_model, same, settings, start, tensors, trainer

from benthic.base.batch import IGNORE, Batch
from benthic.train.loss import LanguageModelling
from benthic.train.step import Accumulate


def _gradients(batch: Batch, micro_batches: int, **changes):
    model = fresh_model()
    parallel = Accumulate(model, LanguageModelling(settings(**changes)), micro_batches)
    metrics, load = parallel.forward_backward(batch)
    return metrics, load, {n: p.grad for n, p in model.named_parameters()}


def _close(one, other) -> None:
    for name, value in one[0].items():
        torch.testing.assert_close(value, other[0][name], rtol=1e-6, atol=1e-6)
    assert torch.equal(one[1], other[1])
    for name, grad in one[2].items():
        torch.testing.assert_close(grad, other[2][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("many", [2, 4])
def test_micro_batches_change_neither_loss_nor_gradients_nor_load(many):
    batch = Stream().batch(0)
    _close(_gradients(batch, 1), _gradients(batch, many))


def test_micro_batches_with_unequal_numbers_of_labels_change_nothing_either():
    batch = Stream().batch(0)
    for row, labels in enumerate((1, 16, 0, 7)):
        batch.labels[row, labels:] = IGNORE
    one, four = (_gradients(batch, many, balance_loss_weight=0.0) for many in (1, 4))
    del one[0]["balance_loss"]
    _close(one, four)


def test_the_mean_of_micro_batch_means_would_fail_this_test():
    """Negative control: dividing by each micro-batch's own labels gives another gradient."""

    class OwnDivisor(LanguageModelling):
        def __call__(self, model, batch, targets):
            return super().__call__(model, batch, self.targets(model, batch) * 4)

    batch = Stream().batch(0)
    batch.labels[0, 1:] = IGNORE
    model = fresh_model()
    Accumulate(model, OwnDivisor(settings()), 4).forward_backward(batch)
    wrong = model.lm_head.weight.grad
    assert (wrong - _gradients(batch, 4)[2]["lm_head.weight"]).abs().max() > 1e-3


# ---- two processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Both ranks' findings: `two_ranks.py` runs three steps, then one with an infinite loss on rank 1 only."""
    folder = tmp_path_factory.mktemp("two")
    ranks = [start("two_ranks.py", rank, folder) for rank in (0, 1)]
    try:
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    return folder


def _facts(two: Path, rank: int) -> dict:
    return json.loads((two / f"facts-{rank}.json").read_text())


def test_two_processes_equal_one_in_loss_gradients_load_parameters_and_expert_bias(two, tmp_path):
    alone = trainer(tmp_path, settings(adam_epsilon=1e-3))  # a large epsilon: else rounding decides a gradient's sign
    metrics, load = alone.parallel.forward_backward(alone.cursor.batch(0))  # type: ignore[attr-defined]
    gradients = {f"grad.{n}": p.grad.clone() for n, p in alone.model.named_parameters()}
    alone.optimizer.zero_grad()
    facts = [_facts(two, rank) for rank in (0, 1)]
    for name, value in metrics.items():
        assert [fact["first"][name] for fact in facts] == pytest.approx([value.item()] * 2, rel=1e-6, abs=1e-7)
    assert [fact["load"] for fact in facts] == [load.tolist()] * 2
    for _ in range(3):
        alone.step(next(alone.cursor))  # type: ignore[call-overload]
    assert [fact["tokens"] for fact in facts] == [alone.tokens] * 2 == [3 * 4 * 16] * 2
    expected = gradients | tensors(alone)
    for rank in (0, 1):
        found = load_file(two / f"after-3-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    biases = [t for n, t in expected.items() if n.startswith("bias")]
    assert all(bias.any() for bias in biases)


def test_both_processes_hold_the_same_bits(two):
    assert same(*(load_file(two / f"after-3-{rank}.safetensors") for rank in (0, 1)))


def test_the_process_test_would_see_a_process_that_keeps_its_gradients_to_itself(two, tmp_path):
    """Negative control: one rank's share of the rows alone gives other parameters."""
    lonely = trainer(tmp_path, settings(adam_epsilon=1e-3), cursor=Stream(rank=0, ranks=2))
    for _ in range(3):
        lonely.step(next(lonely.cursor))  # type: ignore[call-overload]
    found = load_file(two / "after-3-0.safetensors")
    assert (found["parameter.lm_head.weight"] - lonely.model.lm_head.weight).abs().max() > 1e-4


def test_an_infinite_loss_on_one_of_two_processes_is_skipped_on_both(two):
    for rank in (0, 1):
        facts = _facts(two, rank)
        assert facts["skipped"] == 1
        assert facts["steps"] == facts["taken"] == 5  # three, the bad one, and one more that was applied
        before, after = (load_file(two / f"{name}-{rank}.safetensors") for name in ("before-bad", "after-bad"))
        assert same(before, after)
        assert not same(before, load_file(two / f"after-5-{rank}.safetensors"))


def test_a_signal_that_reaches_one_of_two_processes_ends_both_after_the_same_step(two):
    assert [_facts(two, rank)["interrupted"] for rank in (0, 1)] == [
        {"step": 8, "code": 143},  # asked by the other
        {"step": 8, "code": 130},
    ]
    assert [path.name for path in (two / "checkpoints").iterdir()] == ["step-00000008"]


def test_both_processes_resume_from_the_one_checkpoint(two):
    assert [_facts(two, rank)["resumed"] for rank in (0, 1)] == [True, True]
    assert same(*(load_file(two / f"interrupted-{rank}.safetensors") for rank in (0, 1)))


def test_a_step_on_one_process_needs_no_group():
    model = fresh_model()
    before = copy(dict(model.named_parameters()))
    Accumulate(model, Factored(settings()), 1).forward_backward(Stream().batch(0))
    assert same(before, dict(model.named_parameters()))
