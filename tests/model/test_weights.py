"""Shards and FP8 blocks: what is written is what is read, by us and by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benthic.base.errors import CheckpointError
from benthic.base.files import MANIFEST, verify_folder
from benthic.kernels.quant import dequantise_blocks, quantise_blocks
from benthic.model import hf
from benthic.model.transformer import Transformer
from benthic.model.weights import INDEX, SCALE, Weights


@pytest.fixture
def sharded(tmp_path: Path, model: Transformer) -> Path:
    hf.write_model(tmp_path / "m", model, None, shard_bytes=40_000)
    return tmp_path / "m"


def equal(a: Transformer, b: Transformer) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    (folder / MANIFEST).unlink(missing_ok=True)


def test_shards_load_bit_for_bit_and_transformers_reads_them(sharded: Path, model: Transformer) -> None:
    verify_folder(sharded)
    files = sorted(sharded.glob("model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (sharded / "model.safetensors").exists()
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 40_000
    assert equal(hf.load(sharded, device="cpu")[0], model)
    reference = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32).eval()
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert (reference(ids).logits - model(ids)).abs().max() < 2e-5


def test_the_index_holds_the_total_size_and_every_tensor(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    held = {name: file.name for file in sharded.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    sizes = [t.nbytes for file in sharded.glob("*.safetensors") for t in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path, model: Transformer) -> None:
    hf.write_model(tmp_path / "m", model, None, shard_bytes=1)
    assert equal(hf.load(tmp_path / "m", device="cpu")[0], model)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / MANIFEST).unlink()
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"{gone.name} is missing"):
        hf.load(sharded, device="cpu")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_points_outside_the_folder_is_refused(sharded: Path, name: str) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match="shards must lie in the folder itself"):
        hf.load(sharded, device="cpu")


@pytest.mark.parametrize("listed", [True, False])
def test_an_index_that_disagrees_with_its_shards_is_refused_by_tensor(sharded: Path, listed: bool) -> None:
    def change(index: dict[str, Any]) -> None:
        if listed:
            index["weight_map"]["model.extra.weight"] = index["weight_map"]["lm_head.weight"]
        else:
            del index["weight_map"]["lm_head.weight"]

    edit_index(sharded, change)
    with pytest.raises(
        CheckpointError, match="has model.extra.weight in" if listed else "has lm_head.weight in no shard"
    ):
        hf.load(sharded, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": {}}}'])
def test_an_index_that_is_none_is_named(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    (sharded / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"index\.json"):
        hf.load(sharded, device="cpu")


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_fp8_folders_hold_what_the_released_ones_hold_and_load_dequantised(
    tmp_path: Path, model: Transformer, shard_bytes: int
) -> None:
    hf.write_model(tmp_path / "m", model, None, fp8=True, shard_bytes=shard_bytes)
    held = {k: v for file in (tmp_path / "m").glob("*.safetensors") for k, v in load_file(file).items()}
    for name, tensor in hf.checkpoint_views(model):
        kept = any(part in name for part in ("embed", "lm_head", "norm", "gate.weight", "eh_proj", "correction_bias"))
        assert (held[name].dtype == torch.float8_e4m3fn) == (not kept), name
        assert (name + SCALE in held) == (not kept)
        if kept:
            assert torch.equal(held[name], tensor)
        else:
            assert torch.equal(
                dequantise_blocks(held[name], held[name + SCALE]), dequantise_blocks(*quantise_blocks(tensor))
            )
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    loaded, _ = hf.load(tmp_path / "m", device="cpu")
    with torch.no_grad():
        for (name, ours), (_, theirs) in zip(hf.checkpoint_views(loaded), hf.checkpoint_views(model)):
            assert (ours - theirs).abs().max() <= 2**-4 * theirs.abs().max(), name


def test_writing_a_loaded_fp8_folder_as_fp8_again_changes_no_block(tmp_path: Path, model: Transformer) -> None:
    hf.write_model(tmp_path / "a", model, None, fp8=True)
    hf.write_model(tmp_path / "b", hf.load(tmp_path / "a", device="cpu")[0], None, fp8=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
        else:
            torch.testing.assert_close(tensor, second[name], rtol=2e-7, atol=0)


def test_power_of_two_factors_in_their_own_dtype_are_read(tmp_path: Path, model: Transformer) -> None:
    hf.write_model(tmp_path / "m", model, None, fp8=True)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name + SCALE] = torch.full_like(tensors[name + SCALE], 0.25).to(torch.float8_e8m0fnu)
    save_file(tensors, path)
    assert torch.equal(Weights(tmp_path / "m")[name], tensors[name].float() * 0.25)


def test_blocks_without_their_factors_are_refused_by_name(tmp_path: Path, model: Transformer) -> None:
    hf.write_model(tmp_path / "m", model, None, fp8=True)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight" + SCALE]
    save_file(tensors, path)
    (tmp_path / "m" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"but no model\.layers\.0\.mlp\.down_proj\.weight_scale_inv"):
        hf.load(tmp_path / "m", device="cpu")
