"""Impossible settings are refused before anything runs, by name."""

import subprocess
import sys

import pytest
import torch
from training_example import fresh_model, settings

from benthic.base.errors import InputError
from benthic.train.optim import adamw


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("per_device_train_batch_size", 0),
        ("max_length", 0),
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", 3),
        ("logging_steps", 0),
        ("save_steps", 0),
        ("max_skipped_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("max_grad_norm", -1.0),
        ("spike_factor", 0.0),
        ("save_total_limit", 1),
    ],
)
def test_an_impossible_value_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        settings(**{name: value})


def test_settings_import_no_torch():
    program = "import sys, benthic.train.config, benthic.posttrain.config; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.stdout == "False\n", found.stderr


def test_matrices_decay_norms_do_not_and_gate_biases_are_no_parameters():
    model = fresh_model()
    optimizer = adamw(model, settings(weight_decay=0.1))
    names = {p: n for n, p in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name else 0.1), name
    assert any("norm" in name for name in decay)
    assert not any("bias" in name for name in decay)
    assert len(model.gates()) == 2


def test_a_step_without_gradient_shrinks_matrices_and_leaves_norms():
    model = fresh_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adamw(model, settings(weight_decay=0.1, learning_rate=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = before[name] * (1.0 if p.dim() == 1 else 1 - 0.5 * 0.1)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
