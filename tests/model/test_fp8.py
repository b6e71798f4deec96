"""FP8 in the model: which matrices, what they compute, and how they come out of files."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benthic.base.errors import InputError
from benthic.base.files import MANIFEST
from benthic.kernels.quant import dequantise_blocks
from benthic.model import hf
from benthic.model.fp8 import eligible, is_fp8, make_room, to_fp8
from benthic.model.init import initialise
from benthic.model.linear import FP8, SCALE
from benthic.model.transformer import Transformer

IDS = torch.arange(22).view(2, 11)


@pytest.fixture
def wide(tiny) -> Transformer:
    """Every matrix has ragged blocks beside whole ones, and blocks of unlike sizes."""
    config = dataclasses.replace(
        tiny, hidden_size=136, intermediate_size=200, moe_intermediate_size=144, q_lora_rank=130, v_head_dim=70
    )
    model = initialise(Transformer(config), std=0.1, seed=0).eval()
    with torch.no_grad():
        for module, name in eligible(model):
            matrix = getattr(module, name)
            matrix[..., :100] *= 3
            matrix[..., :128, :] *= 0.2
    return model


def dequantised(model: Transformer) -> Transformer:
    """The same values in float32, without blocks."""
    plain = hf.empty(model.config, "cpu", torch.float32)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(SCALE)}
    names = {module: path for path, module in model.named_modules()}
    for module, name in eligible(model):
        state[f"{names[module]}.{name}"] = module.matrix(name, torch.float32)
    plain.load_state_dict(state)
    return plain.eval()


def test_projections_and_experts_are_fp8_and_nothing_else(wide: Transformer) -> None:
    to_fp8(wide)
    found = {name.rsplit(".", 2 if name.endswith("weight") else 1)[-2 if name.endswith("weight") else -1]
             for name, p in wide.named_parameters() if p.dtype == FP8}  # fmt: skip
    assert found == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    }  # fmt: skip
    rest = [name for name, p in wide.named_parameters() if p.dtype != FP8]
    for kept in ("embed_tokens", "lm_head", "norm", "gate.weight", "eh_proj", "kv_b_proj"):
        assert any(kept in name for name in rest)


@torch.no_grad()
def test_the_plain_pass_computes_with_what_the_blocks_stand_for(wide: Transformer) -> None:
    before = [getattr(module, name).clone() for module, name in eligible(wide)]
    to_fp8(wide)
    assert torch.equal(wide(IDS), dequantised(wide)(IDS))
    for (module, name), weight in zip(eligible(wide), before):
        error = (module.matrix(name, torch.float32) - weight).norm() / weight.norm()
        assert 1e-3 < error < 0.04
        module.factors(name).mul_(torch.linspace(1, 2, module.factors(name).numel()).view_as(module.factors(name)))
    assert torch.equal(wide(IDS), dequantised(wide)(IDS))


@torch.no_grad()
def test_a_cast_of_the_model_leaves_blocks_as_they_are(wide: Transformer) -> None:
    to_fp8(wide)
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    wide.to(torch.bfloat16)
    after = wide.state_dict()
    assert after["embed_tokens.weight"].dtype == torch.bfloat16
    blocks = [name for name in after if after[name].dtype == FP8]
    assert len(blocks) == len(list(eligible(wide)))
    for name in blocks:
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
        assert torch.equal(after[name + SCALE], before[name + SCALE])
        assert after[name + SCALE].dtype == torch.float32


def test_a_model_in_fp8_is_not_written(wide: Transformer, tmp_path: Path) -> None:
    to_fp8(wide)
    with pytest.raises(InputError, match="is FP8 already -> load it with quantization='none'"):
        hf.write_model(tmp_path / "m", wide, None)
    assert not (tmp_path / "m").exists()


@torch.no_grad()
def test_blocks_of_a_file_are_kept_bit_for_bit(wide: Transformer, tmp_path: Path) -> None:
    hf.write_model(tmp_path / "m", wide, None, fp8=True)
    stored = load_file(tmp_path / "m" / hf.WEIGHTS)
    model, _ = hf.load(tmp_path / "m", device="cpu", quantization="fp8")
    views = dict(hf.checkpoint_views(model))
    kept = [name for name, tensor in views.items() if tensor.dtype == FP8]
    assert len(kept) > 40
    for name in kept:
        assert torch.equal(views[name].view(torch.uint8), stored[name].view(torch.uint8))
        assert torch.equal(views[name + SCALE], stored[name + SCALE])
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(views[name], dequantise_blocks(stored[name], stored[name + SCALE]))
    assert torch.equal(model(IDS), hf.load(tmp_path / "m", device="cpu")[0](IDS))


@torch.no_grad()
def test_wider_weights_are_quantised_while_they_are_loaded(wide: Transformer, tmp_path: Path) -> None:
    hf.write_model(tmp_path / "m", wide, None)
    model, _ = hf.load(tmp_path / "m", device="cpu", quantization="fp8")
    to_fp8(wide)
    assert torch.equal(model(IDS), wide(IDS))


def test_auto_keeps_blocks_where_the_device_computes_with_them(
    wide: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "benthic")
    hf.write_model(tmp_path / "blocks", wide, None, fp8=True)
    hf.write_model(tmp_path / "wide", wide, None)
    assert not is_fp8(hf.load(tmp_path / "blocks", device="cpu", quantization="auto")[0])
    assert "FP8 weights are dequantised to float32, because cpu has no FP8 arithmetic" in caplog.text
    monkeypatch.setattr(hf, "has_fp8", lambda device: True)
    assert is_fp8(hf.load(tmp_path / "blocks", device="cpu", quantization="auto")[0])
    assert not is_fp8(hf.load(tmp_path / "wide", device="cpu", quantization="auto")[0])
    assert not is_fp8(hf.load(tmp_path / "blocks", device="cpu")[0])


def test_auto_does_not_quantise_what_a_checkpoint_left_wide(
    wide: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "benthic")
    monkeypatch.setattr(hf, "has_fp8", lambda device: True)
    hf.write_model(tmp_path / "m", wide, None, fp8=True)
    stored = load_file(tmp_path / "m" / hf.WEIGHTS)
    name = "model.layers.1.self_attn.o_proj.weight"
    stored[name] = dequantise_blocks(stored[name], stored.pop(name + SCALE)).contiguous()
    save_file(stored, tmp_path / "m" / hf.WEIGHTS)
    (tmp_path / "m" / MANIFEST).unlink()
    assert not is_fp8(hf.load(tmp_path / "m", device="cpu", quantization="auto")[0])
    assert "because some projections are not FP8" in caplog.text


def test_an_old_gpu_is_refused_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    from benthic.model.fp8 import check_device, has_fp8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not has_fp8("cuda")
    with pytest.raises(InputError, match=r"needs compute capability 8.9, cuda has 8.0 -> use none or auto"):
        check_device("cuda")
    check_device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert has_fp8("cuda")


def test_room_is_made_without_weights(v3) -> None:
    """671B parameters, of which not one exists."""
    model = hf.empty(dataclasses.replace(v3, num_hidden_layers=4), "meta", torch.bfloat16, fp8=True)
    experts = model.layers[3].mlp.routed_experts
    assert experts.gate_up_proj.dtype == FP8
    assert experts.gate_up_proj_scale_inv.shape == (256, 2, 16, 56)
    assert model.layers[0].self_attn.kv_a_proj_with_mqa.weight_scale_inv.shape == (5, 56)
    make_room(model.lm_head, "weight")
    assert model.lm_head.weight_scale_inv.shape == (1010, 56)
