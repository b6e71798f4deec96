import dataclasses
import subprocess
import sys

import pytest
import torch

from benthic.model import hf
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer

STD = 0.006


def state(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_do_not_depend_on_the_global_generator_and_leave_it_alone(tiny: ModelConfig) -> None:
    model, other = Transformer(tiny), Transformer(tiny)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    initialise(model, STD, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    torch.randn(100)
    assert equal(state(model), state(initialise(other, STD, seed=7)))


def test_another_process_gets_the_same_weights(tiny: ModelConfig) -> None:
    model = initialise(Transformer(tiny), STD, seed=7)
    expected = [float(p.detach().double().abs().sum()) for p in model.parameters()]
    code = f"""
import torch
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
torch.manual_seed(99)
model = initialise(Transformer({tiny!r}), {STD}, seed=7)
print([float(p.detach().double().abs().sum()) for p in model.parameters()])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(expected)


def test_a_tensor_does_not_depend_on_how_many_others_there_are(tiny: ModelConfig) -> None:
    """Each tensor is seeded by its own name: a deeper model begins with the same layers."""
    small = state(initialise(Transformer(tiny), STD, seed=7))
    deep = state(initialise(Transformer(dataclasses.replace(tiny, num_hidden_layers=5)), STD, seed=7))
    layers = [name for name in small if name.startswith(("layers.", "embed_tokens"))]
    assert all(torch.equal(small[name], deep[name]) for name in layers)


def test_another_seed_gives_other_matrices(tiny: ModelConfig) -> None:
    a, b = (state(initialise(Transformer(tiny), STD, seed=seed)) for seed in (0, 1))
    assert not [name for name in a if a[name].dim() > 1 and torch.equal(a[name], b[name])]


def test_matrices_are_normal_with_the_given_deviation(tiny: ModelConfig) -> None:
    wide = dataclasses.replace(tiny, hidden_size=128, vocab_size=500)
    model = initialise(Transformer(wide), STD, seed=3)
    everything = []
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            n = parameter.numel()
            assert parameter.std().item() == pytest.approx(STD, rel=5 / n**0.5), name
            assert abs(parameter.mean().item()) < 5 * STD / n**0.5, name
            everything.append(parameter.detach().reshape(-1))
    values = torch.cat(everything).abs() / STD
    for bound, share in {1: 0.6827, 2: 0.9545, 3: 0.9973}.items():
        assert (values < bound).double().mean().item() == pytest.approx(share, abs=0.003)


def test_norms_are_one_and_gate_biases_zero(tiny: ModelConfig) -> None:
    model = Transformer(tiny)
    for gate in model.gates():
        gate.e_score_correction_bias.fill_(0.5)
    initialise(model, STD, seed=0)
    assert all((p == 1).all() for p in model.parameters() if p.dim() == 1)
    assert all((gate.e_score_correction_bias == 0).all() for gate in model.gates())


def test_no_two_matrices_or_experts_are_equal(tiny: ModelConfig) -> None:
    model = initialise(Transformer(tiny), STD, seed=0)
    matrices = [m for p in model.parameters() if p.dim() > 1 for m in (p if p.dim() == 3 else [p])]
    firsts = {tuple(m.reshape(-1)[:8].tolist()) for m in matrices}
    assert len(firsts) == len(matrices)


def test_expert_0_does_not_depend_on_how_many_experts_there_are(tiny: ModelConfig) -> None:
    few = initialise(Transformer(tiny), STD, seed=0)
    many = initialise(Transformer(dataclasses.replace(tiny, n_routed_experts=16)), STD, seed=0)
    for name in ("gate_up_proj", "down_proj"):
        a, b = (getattr(model.layers[1].mlp.routed_experts, name) for model in (few, many))
        assert torch.equal(a, b[:8])


def test_a_model_from_the_meta_device_gets_the_same_weights(tiny: ModelConfig) -> None:
    usual = initialise(Transformer(tiny), STD, seed=5)
    empty = hf.empty(tiny, "cpu", torch.float32)
    assert equal(state(initialise(empty, STD, seed=5)), state(usual))
    ids = torch.arange(12).unsqueeze(0)
    assert torch.equal(empty(ids), usual(ids))


def test_empty_keeps_the_bias_in_float32_and_computes_in_the_dtype_asked_for(tiny: ModelConfig) -> None:
    model = hf.empty(tiny, "cpu", torch.float32, torch.bfloat16)
    assert (model.dtype, model.lm_head.weight.dtype) == (torch.bfloat16, torch.float32)
    half = hf.empty(tiny, "cpu", torch.bfloat16)
    assert (half.dtype, half.lm_head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {gate.e_score_correction_bias.dtype for gate in half.gates()} == {torch.float32}
    assert {t.device.type for t in half.state_dict().values()} == {"cpu"}


def test_bfloat16_weights_are_the_float32_ones_rounded(tiny: ModelConfig) -> None:
    exact = initialise(hf.empty(tiny, "cpu", torch.float32), STD, seed=5)
    half = initialise(hf.empty(tiny, "cpu", torch.bfloat16), STD, seed=5)
    for (name, a), b in zip(exact.named_parameters(), half.parameters()):
        assert torch.equal(a.bfloat16(), b), name
