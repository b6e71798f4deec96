"""`benthic convert`: kept bytes are the same bytes, casts are those that loading makes, errors write nothing."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benthic.base.errors import BenthicError, CheckpointError, InputError
from benthic.base.files import MANIFEST, verify_folder
from benthic.cli import main
from benthic.jobs.config import ConvertConfig
from benthic.jobs.convert import run, size
from benthic.model import hf
from benthic.model.config import ModelConfig
from benthic.model.init import initialise
from benthic.model.transformer import Transformer
from benthic.model.weights import INDEX, SCALE
from benthic.tokenizer import bpe

CONFIG = ModelConfig(
    vocab_size=288, hidden_size=160, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=128, kv_lora_rank=128,
    qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, intermediate_size=256, moe_intermediate_size=136,
    n_routed_experts=8, num_experts_per_tok=3, routed_scaling_factor=2.5, max_position_embeddings=128,
)  # fmt: skip
IDS = torch.randint(2, 280, (2, 40), generator=torch.Generator().manual_seed(0))
COPIES = ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"]
FLOATS = ["float32", "bfloat16", "float16"]


def example(dtype: torch.dtype = torch.bfloat16, **change: Any) -> Transformer:
    """A random model with gate biases of both signs."""
    model = initialise(Transformer(dataclasses.replace(CONFIG, **change)), std=0.1, seed=0)
    for gate in model.gates():
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, 8).roll(3))
    return model.to(dtype)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    hf.write_model(tmp_path / "source", example(), None)
    return tmp_path / "source"


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    hf.write_model(tmp_path / "fp8", example(), None, fp8=True)
    return tmp_path / "fp8"


def convert(source: Path, name: str = "out", **options: Any) -> Path:
    output = source.parent / name
    run(ConvertConfig(model=source, output=output, **options))
    return output


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same_files(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same_bytes(a[name], b[name]), name


def edit(folder: Path, change: Any) -> None:
    """Rewrite the weights as another tool would: no manifest."""
    held = tensors(folder)
    change(held)
    save_file(held, folder / hf.WEIGHTS)
    (folder / MANIFEST).unlink(missing_ok=True)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / hf.CONFIG).read_text())


@pytest.mark.parametrize("shard", ["5GB", "0.1MB"])
def test_auto_keeps_every_byte_of_every_tensor_in_any_shards(source: Path, fp8: Path, shard: str) -> None:
    for folder in (source, fp8):
        out = convert(folder, f"out-{folder.name}", max_shard_size=shard)
        verify_folder(out)
        assert_same_files(tensors(out), tensors(folder))
        assert (out / INDEX).exists() == (shard != "5GB")
        assert settings(out) == settings(folder)


def test_auto_keeps_each_tensors_own_dtype(source: Path) -> None:
    def mix(held: dict[str, Tensor]) -> None:
        for number, name in enumerate(sorted(held)):
            if name not in (*COPIES, "model.embed_tokens.weight", "lm_head.weight"):
                held[name] = held[name].to((torch.float32, torch.bfloat16, torch.float16)[number % 3])

    edit(source, mix)
    assert_same_files(tensors(convert(source)), tensors(source))


def test_shards_stay_within_the_limit_and_the_index_lists_them(source: Path) -> None:
    out = convert(source, max_shard_size="0.2MB")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 5
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 200_000
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(source).values())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_an_export_in_a_float_dtype_loads_back_bit_for_bit(tmp_path: Path, stored: str, dtype: str) -> None:
    model = example(hf.DTYPES[stored])
    hf.write_model(tmp_path / "source", model, None)
    out = convert(tmp_path / "source", dtype=dtype)
    loaded, _ = hf.load(out, device="cpu")
    expected = model.to(hf.DTYPES[dtype]).state_dict()
    assert loaded.dtype == hf.DTYPES[dtype]
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert same_bytes(tensor, expected[name]), name
    held = tensors(out)
    assert all((t.dtype == torch.float32) == (dtype == "float32" or "bias" in n) for n, t in held.items())


@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_blocks_come_out_as_they_load(fp8: Path, dtype: str) -> None:
    out = convert(fp8, dtype=dtype)
    assert not [name for name in tensors(out) if name.endswith(SCALE)]
    assert "quantization_config" not in settings(out)
    expected = hf.load(fp8, device="cpu", dtype=dtype)[0].state_dict()  # type: ignore[arg-type]
    loaded = hf.load(out, device="cpu")[0].state_dict()
    assert all(same_bytes(loaded[name], expected[name]) for name in expected)


def test_fp8_holds_what_writing_a_model_as_fp8_does(source: Path, fp8: Path) -> None:
    out = convert(source, dtype="fp8", max_shard_size="0.1MB")
    assert_same_files(tensors(out), tensors(fp8))
    assert settings(out) == settings(fp8)


def test_what_is_fp8_already_is_not_quantised_again(fp8: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit(fp8, lambda held: held[name + SCALE].mul_(0.7))  # factors that quantising would not choose
    assert_same_files(tensors(convert(fp8, dtype="fp8")), tensors(fp8))


def power_of_two(folder: Path, stored: torch.dtype) -> None:
    """Factors as V3.1 has them."""

    def change(held: dict[str, Tensor]) -> None:
        for name in [name for name in held if name.endswith(SCALE)]:
            held[name] = torch.exp2(held[name].log2().ceil()).to(stored)

    edit(folder, change)
    data = settings(folder)
    data["quantization_config"]["scale_fmt"] = "ue8m0"
    (folder / hf.CONFIG).write_text(json.dumps(data))


@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_power_of_two_factors_pass_through_and_stay_noted(fp8: Path, stored: torch.dtype, dtype: str) -> None:
    power_of_two(fp8, stored)
    out = convert(fp8, dtype=dtype)
    assert_same_files(tensors(out), tensors(fp8))
    assert settings(out)["quantization_config"]["scale_fmt"] == "ue8m0"


def test_factors_of_our_own_are_not_called_powers_of_two(fp8: Path) -> None:
    power_of_two(fp8, torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    shape = tensors(fp8)[name].shape

    def change(held: dict[str, Tensor]) -> None:
        del held[name + SCALE]
        held[name] = torch.randn(shape).bfloat16()

    edit(fp8, change)
    assert "scale_fmt" in settings(convert(fp8, "kept"))["quantization_config"]
    assert "scale_fmt" not in settings(convert(fp8, "mixed", dtype="fp8"))["quantization_config"]


@pytest.mark.parametrize("dtype", ["auto", "float32", "fp8"])
def test_mtp_copies_that_the_source_lacks_are_written_from_the_originals(source: Path, dtype: str) -> None:
    complete = tensors(convert(source, "complete", dtype=dtype))
    edit(source, lambda held: [held.pop(name) for name in COPIES])
    assert_same_files(tensors(convert(source, dtype=dtype)), complete)


@pytest.mark.parametrize("name", COPIES)
def test_an_mtp_copy_that_differs_is_named_by_load_and_convert(source: Path, name: str) -> None:
    edit(source, lambda held: held[name][3].add_(1))
    for refuse in (lambda: hf.load(source, device="cpu"), lambda: convert(source)):
        with pytest.raises(CheckpointError, match=rf"{name} differs from (model\.embed_tokens|lm_head)\.weight"):
            refuse()
    assert not (source.parent / "out").exists()


def ranks_of(source: Path, data: dict[str, Any]) -> Path:
    """The one-rank inference layout of `source`, without its MTP layer."""
    words = {
        "model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head", "model.layers": "layers",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn": "attn", "mlp": "ffn",
        "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b", "kv_a_proj_with_mqa": "wkv_a",
        "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2",
        "up_proj": "w3", "e_score_correction_bias": "bias", "weight_scale_inv": "scale",
    }  # fmt: skip
    folder = source.parent / "ranks"
    folder.mkdir()
    held = {}
    for name, tensor in tensors(source).items():
        if not name.startswith("model.layers.2."):
            for word, short in words.items():
                name = name.replace(word, short)
            held[name] = tensor
    save_file(held, folder / "model0-mp1.safetensors")
    (folder / hf.CONFIG).write_text(json.dumps(data))
    return folder


ARGUMENTS = {
    "vocab_size": 288, "dim": 160, "inter_dim": 256, "moe_inter_dim": 136, "n_layers": 2, "n_heads": 2,
    "n_routed_experts": 8, "n_shared_experts": 1, "n_activated_experts": 3, "n_expert_groups": 4,
    "n_limited_groups": 2, "score_func": "sigmoid", "route_scale": 2.5, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "max_seq_len": 128, "dtype": "fp8",
    "scale_fmt": "ue8m0",
}  # fmt: skip


@torch.no_grad()
def test_ranks_become_the_released_layout_with_the_same_bytes_and_logits(fp8: Path) -> None:
    out = convert(ranks_of(fp8, ARGUMENTS))
    expected = {name: t for name, t in tensors(fp8).items() if not name.startswith("model.layers.2.")}
    assert_same_files(tensors(out), expected)
    assert settings(out)["quantization_config"]["scale_fmt"] == "ue8m0"
    assert settings(out)["model_type"] == "deepseek_v3"
    loaded, _ = hf.load(out, device="cpu")
    assert torch.equal(loaded(IDS), hf.load(fp8, device="cpu")[0](IDS))
    assert loaded.config == dataclasses.replace(CONFIG, num_nextn_predict_layers=0)


@pytest.mark.parametrize("naming", ["arguments", "hugging face"])
def test_the_config_of_a_folder_that_has_none_is_named_on_the_command_line(fp8: Path, naming: str) -> None:
    ranks = ranks_of(fp8, ARGUMENTS)
    (ranks / hf.CONFIG).rename(ranks.parent / "arguments.json")
    with pytest.raises(InputError, match=r"config\.json is missing -> name the model's config\.json with --config"):
        convert(ranks)
    path = ranks.parent / "arguments.json" if naming == "arguments" else fp8 / hf.CONFIG
    out = convert(ranks, config=path)
    assert hf.read_config(out) == dataclasses.replace(CONFIG, num_nextn_predict_layers=0)


def test_the_tokenizer_and_the_settings_nobody_here_reads_travel_along(source: Path) -> None:
    bpe.train(["to be or not to be, that is the question"] * 3, vocab_size=280).save(source)
    (source / "generation_config.json").write_text("{}")
    (source / "modeling_deepseek.py").write_text("raise SystemExit")
    data = settings(source) | {"aux_loss_alpha": 0.001, "auto_map": {"AutoModel": "modeling_deepseek.Model"}}
    (source / hf.CONFIG).write_text(json.dumps(data))
    (source / MANIFEST).unlink()
    out = convert(source, dtype="float16")
    verify_folder(out)
    assert not (out / "modeling_deepseek.py").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
        assert name in json.loads((out / MANIFEST).read_text())["files"]
    del data["auto_map"]
    assert settings(out) == data | {"torch_dtype": "float16"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", FLOATS)
def test_transformers_reads_each_float_export_with_the_logits_that_we_have(fp8: Path, dtype: str) -> None:
    transformers_logging.set_verbosity_error()
    out = convert(fp8, dtype=dtype, max_shard_size="1MB")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    reference, info = loaded
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    expected = reference.eval()(IDS).logits
    assert expected.std() > 0.5
    assert (hf.load(out, device="cpu", dtype="float32")[0](IDS) - expected).abs().max() < 5e-5


@torch.no_grad()
def test_transformers_reads_the_fp8_export_with_the_logits_that_we_have(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import FineGrainedFP8Config

    transformers_logging.set_verbosity_error()
    # transformers divides rows evenly among factors, which is right only where blocks are whole
    whole_blocks = example(hidden_size=128, moe_intermediate_size=128, kv_lora_rank=64)
    hf.write_model(tmp_path / "source", whole_blocks, None)
    out = convert(tmp_path / "source", dtype="fp8")
    unpacked = FineGrainedFP8Config(dequantize=True)  # FP8 products need a GPU
    reference = AutoModelForCausalLM.from_pretrained(out, quantization_config=unpacked, dtype=torch.float32)
    reference = reference.float().eval()
    ours = hf.load(out, device="cpu", dtype="float32")[0]
    assert (ours(IDS) - reference(IDS).logits).abs().max() < 5e-5


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5_000_000_000), ("500 MB", 500_000_000), ("1.5GiB", 1_610_612_736), ("2mib", 2_097_152)],
)
def test_sizes_have_a_number_and_a_unit(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "5", "GB", "5TB", "0GB", "0.0MB", "-1GB", "five GB", "5GBs", "1e3MB", "nanGB"])
def test_other_sizes_are_refused_before_anything_is_read(source: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"--max-shard-size .* -> give a number above 0 with MB, GB, MiB or GiB"):
        convert(source / "nowhere", max_shard_size=text)


def test_nothing_is_written_where_the_source_does_not_fit_its_config(source: Path) -> None:
    def change(held: dict[str, Tensor]) -> None:
        del held["model.norm.weight"]
        held["model.layers.9.extra.weight"] = torch.zeros(3, 5)
        held["lm_head.weight"] = torch.zeros(7, 160)

    edit(source, change)
    with pytest.raises(CheckpointError) as caught:
        convert(source)
    for problem in ("missing model.norm.weight (160,)", "unexpected model.layers.9.extra.weight (3, 5)"):
        assert problem in str(caught.value)
    assert "lm_head.weight has shape (7, 160), expected (288, 160)" in str(caught.value)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_a_folder_that_exists_is_never_written_into(source: Path) -> None:
    (source.parent / "out").mkdir()
    with pytest.raises(InputError, match="out already exists"):
        convert(source)
    assert not list((source.parent / "out").iterdir())


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere")


def test_a_sealed_source_that_was_altered_is_refused(source: Path) -> None:
    data = bytearray((source / hf.WEIGHTS).read_bytes())
    data[-10] ^= 1
    (source / hf.WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match its checksum"):
        convert(source)


def test_a_number_beyond_float16_is_an_error_that_names_the_tensor_and_leaves_nothing(source: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit(source, lambda held: held[name][0].fill_(70000.0))
    with pytest.raises(CheckpointError, match=rf"{name} holds 70144, float16 ends at 65504"):
        convert(source, dtype="float16")
    with pytest.raises(CheckpointError, match=rf"{name} holds 70144, float16 ends at 65504"):
        hf.load(source, device="cpu", dtype="float16")
    assert [path.name for path in source.parent.iterdir()] == ["source"]
    convert(source, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["auto", "float32", "fp8"])
def test_a_tensor_that_is_not_finite_is_not_written(source: Path, dtype: str) -> None:
    edit(source, lambda held: held["model.layers.0.mlp.down_proj.weight"][0].fill_(torch.nan))
    with pytest.raises(BenthicError, match=r"layers\.0\.mlp\.down_proj\.weight.* is not finite"):
        convert(source, dtype=dtype)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_blocks_and_factors_that_do_not_belong_together_are_refused_before_writing(fp8: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit(fp8, lambda held: held.update({name + SCALE: torch.ones(1, 1)}))
    with pytest.raises(
        CheckpointError, match=rf"{name}{SCALE} is torch\.float32 \(1, 1\), FP8 blocks .* need \(2, 2\)"
    ):
        convert(fp8)
    edit(fp8, lambda held: held.update({name: held[name].bfloat16()}))
    with pytest.raises(CheckpointError, match=rf"has {name}{SCALE} but no FP8 blocks of"):
        convert(fp8)
    assert [path.name for path in fp8.parent.iterdir()] == ["fp8"]


def test_mtp_modules_that_the_source_promises_and_lacks_are_not_promised_on(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(source, lambda held: [held.pop(name) for name in list(held) if name.startswith("model.layers.2.")])
    out = convert(source)
    assert "no weights for its 1 MTP modules" in caplog.text
    assert settings(out)["num_nextn_predict_layers"] == 0
    assert_same_files(tensors(out), tensors(source))


def test_one_line_says_what_was_written(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.parent / "out"
    assert main(["convert", str(source), str(out), "--max-shard-size", "0.5MB", "--dtype", "bfloat16"]) == 0
    held = tensors(out)
    amount = sum(t.nbytes for t in held.values()) / 1e6
    shards = len(list(out.glob("*.safetensors")))
    assert capsys.readouterr().out == (
        f"{out}: {len(held):,} tensors, {amount:,.1f} MB, {shards} shards, bfloat16 + float32\n"
    )
    assert main(["convert", str(source), str(out)]) == InputError.exit_code
