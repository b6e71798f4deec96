"""Model folders: what is written is what is read, and anything else is an error that names the tensor or the file."""

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benthic.base import files
from benthic.base.errors import BenthicError, CheckpointError, InputError
from benthic.base.files import MANIFEST, PARTIAL, sha256_file, verify_folder
from benthic.model import hf
from benthic.model.config import ModelConfig
from benthic.model.transformer import Transformer
from benthic.tokenizer import bpe

SEALED = {hf.WEIGHTS, hf.CONFIG, MANIFEST}


@pytest.fixture
def folder(tmp_path: Path, model: Transformer) -> Path:
    hf.write_model(tmp_path / "model", model, None)
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the weights as another tool would: no manifest."""
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hf.WEIGHTS)
    (folder / MANIFEST).unlink(missing_ok=True)


def without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


def edit_config(folder: Path, **change: object) -> None:
    data = json.loads((folder / hf.CONFIG).read_text()) | change
    (folder / hf.CONFIG).write_text(json.dumps({k: v for k, v in data.items() if v != "absent"}))
    (folder / MANIFEST).unlink(missing_ok=True)


def assert_equal(a: Transformer, b: Transformer) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_write_then_load_gives_every_bit_back(tmp_path: Path, model: Transformer, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    hf.write_model(tmp_path / "m", model, None)
    loaded, tokenizer = hf.load(tmp_path / "m", device="cpu")
    assert_equal(loaded, model)
    assert loaded.config == model.config
    assert loaded.dtype == dtype  # "auto": the dtype that config.json names
    assert tokenizer is None
    assert not loaded.training


def test_writing_a_loaded_model_again_gives_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    again = hf.write_model(tmp_path / "again", hf.load(folder, device="cpu")[0], None)
    assert {name: sha256_file(folder / name) for name in again} == again


def test_gate_biases_stay_float32_in_a_bfloat16_file(tmp_path: Path, model: Transformer) -> None:
    hf.write_model(tmp_path / "m", model.bfloat16(), None)
    dtypes = {name: t.dtype for name, t in load_file(tmp_path / "m" / hf.WEIGHTS).items()}
    assert {t for name, t in dtypes.items() if "bias" in name} == {torch.float32}
    assert {t for name, t in dtypes.items() if "bias" not in name} == {torch.bfloat16}
    assert json.loads((tmp_path / "m" / hf.CONFIG).read_text())["torch_dtype"] == "bfloat16"


def test_float32_weights_load_as_bfloat16_rounded_and_the_biases_exact(folder: Path, model: Transformer) -> None:
    loaded, _ = hf.load(folder, device="cpu", dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        expected = tensor if "bias" in name else tensor.bfloat16()
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_names_are_those_of_the_released_checkpoint(folder: Path, tiny: ModelConfig) -> None:
    names = set(load_file(folder / hf.WEIGHTS))
    attention = {
        f"self_attn.{part}.weight"
        for part in "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj".split()
    }
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    projections = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    dense = {f"mlp.{p}" for p in projections}
    mixture = {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    mixture |= {f"mlp.shared_experts.{p}" for p in projections}
    mixture |= {f"mlp.experts.{e}.{p}" for e in range(tiny.n_routed_experts) for p in projections}
    module = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight"}
    module |= {"shared_head.norm.weight", "shared_head.head.weight"}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, parts in enumerate([dense, mixture, mixture, mixture | module]):  # the last one is the MTP module
        expected |= {f"model.layers.{layer}.{part}" for part in attention | norms | parts}
    assert names == expected


def test_stacked_experts_are_cut_apart_in_order(folder: Path, model: Transformer) -> None:
    tensors, stacked = load_file(folder / hf.WEIGHTS), model.layers[1].mlp.routed_experts
    for e in range(8):
        gate, up = stacked.gate_up_proj[e].chunk(2, 0)
        for part, expected in {"gate": gate, "up": up, "down": stacked.down_proj[e]}.items():
            assert torch.equal(tensors[f"model.layers.1.mlp.experts.{e}.{part}_proj.weight"], expected)


def test_mtp_layers_repeat_embedding_and_head_and_may_lack_them(folder: Path, model: Transformer) -> None:
    tensors = load_file(folder / hf.WEIGHTS)
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], model.embed_tokens.weight)
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], model.lm_head.weight)
    edit(folder, without("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"))
    assert_equal(hf.load(folder, device="cpu")[0], model)


def test_views_share_the_models_memory(model: Transformer) -> None:
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    views = dict(hf.checkpoint_views(model)) | dict(hf.shared_copies(model))
    assert {t.untyped_storage().data_ptr() for t in views.values()} == storages
    assert sum(t.numel() for _, t in hf.checkpoint_views(model)) == sum(t.numel() for t in model.state_dict().values())


def test_missing_tensors_are_listed_with_the_shape_they_should_have(folder: Path) -> None:
    edit(folder, without("model.norm.weight", "model.layers.1.mlp.experts.7.up_proj.weight"))
    with pytest.raises(CheckpointError) as caught:
        hf.load(folder, device="cpu")
    assert str(caught.value) == (
        f"{folder} does not fit config.json: "
        "missing model.layers.1.mlp.experts.7.up_proj.weight (16, 32); missing model.norm.weight (32,)"
    )


def test_tensors_that_nobody_reads_are_listed_with_their_shape(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.9.extra.weight": torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.9\.extra\.weight \(3, 5\)$"):
        hf.load(folder, device="cpu")


def test_misshapen_tensors_are_listed_with_both_shapes(folder: Path) -> None:
    edit(folder, lambda t: t.update({"lm_head.weight": torch.zeros(60, 32)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(60, 32\), expected \(61, 32\)$"):
        hf.load(folder, device="cpu")


def test_a_long_list_of_problems_is_cut_after_five_and_counted(folder: Path) -> None:
    edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.3\.eh_proj.* \(and \d+ more\)$") as caught:
        hf.load(folder, device="cpu")
    assert str(caught.value).count("unexpected") == 5


def test_nothing_is_copied_into_the_model_when_the_file_does_not_fit(
    folder: Path, build: Callable[..., Transformer], tiny: ModelConfig
) -> None:
    edit(folder, without("model.norm.weight"))
    model, untouched = build(tiny, seed=9), build(tiny, seed=9)
    with pytest.raises(CheckpointError):
        hf.read_weights(folder, model)
    assert_equal(model, untouched)


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
@pytest.mark.parametrize("keep", [0, 100, -1], ids=["empty", "header cut", "last byte gone"])
def test_a_truncated_file_is_named(folder: Path, sealed: bool, keep: int) -> None:
    path = folder / hf.WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    if not sealed:
        (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"model/model\.safetensors (has|is not a whole)"):
        hf.load(folder, device="cpu")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [hf.WEIGHTS, hf.CONFIG])
def test_one_flipped_bit_in_a_sealed_folder_is_detected(folder: Path, name: str) -> None:
    flip(folder / name, (folder / name).stat().st_size - (10 if name == hf.WEIGHTS else 3))
    with pytest.raises(BenthicError, match=rf"{name}"):
        hf.load(folder, device="cpu")


def test_without_the_seal_the_same_flip_would_pass_unseen(folder: Path, model: Transformer) -> None:
    flip(folder / hf.WEIGHTS, -10)
    (folder / MANIFEST).unlink()
    loaded, _ = hf.load(folder, device="cpu")
    with pytest.raises(AssertionError):
        assert_equal(loaded, model)


def test_a_missing_weight_file_is_named(folder: Path) -> None:
    (folder / hf.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        hf.load(folder, device="cpu")


def test_a_missing_folder_and_a_missing_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model folder .*nowhere does not exist -> give a folder with config\.json"):
        hf.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty/config\.json is missing -> give a folder in the Hugging Face layout"):
        hf.load(tmp_path / "empty")


@pytest.mark.parametrize(("text", "what"), [("{", "is not JSON"), ("[1]", "holds no table"), ("", "is not JSON")])
def test_a_config_that_cannot_be_read_is_named(folder: Path, text: str, what: str) -> None:
    (folder / hf.CONFIG).write_text(text)
    with pytest.raises(InputError, match=rf"config\.json {what}"):
        hf.load(folder, device="cpu")


def test_an_unknown_config_key_names_the_file_and_its_neighbour(folder: Path) -> None:
    edit_config(folder, num_hidden_layer=3)
    with pytest.raises(InputError, match=r"'num_hidden_layer' in .*/config\.json .*did you mean 'num_hidden_layers'"):
        hf.load(folder, device="cpu")


def test_another_model_type_is_told_what_is_supported(folder: Path) -> None:
    edit_config(folder, model_type="mamba")
    with pytest.raises(
        InputError, match=r"model_type='mamba' in .*config\.json -> supported: deepseek_v3, deepseek_v2"
    ):
        hf.load(folder, device="cpu")


def test_an_unknown_dtype_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(InputError, match="dtype='float8' -> use one of float32, bfloat16, float16"):
        hf.load(folder, device="cpu", dtype="float8")  # type: ignore[arg-type]


def test_the_newer_name_of_the_dtype_key_is_read_too(folder: Path) -> None:
    edit_config(folder, torch_dtype="absent", dtype="bfloat16")
    assert hf.load(folder, device="cpu")[0].dtype == torch.bfloat16
    edit_config(folder, dtype="absent")
    assert hf.load(folder, device="cpu")[0].dtype == torch.float32


def test_the_folder_is_sealed_and_the_returned_digests_are_those_of_its_files(
    tmp_path: Path, model: Transformer
) -> None:
    digests = hf.write_model(tmp_path / "m", model, None)
    verify_folder(tmp_path / "m")
    assert digests.keys() == {path.name for path in (tmp_path / "m").iterdir()} == SEALED
    assert all(sha256_file(tmp_path / "m" / name) == digest for name, digest in digests.items())


def test_a_tokenizer_travels_in_the_same_sealed_folder(
    tmp_path: Path, tiny: ModelConfig, build: Callable[..., Transformer]
) -> None:
    model = build(dataclasses.replace(tiny, vocab_size=288))
    tokenizer = bpe.train(["to be or not to be, that is the question"] * 3, vocab_size=280)
    digests = hf.write_model(tmp_path / "m", model, tokenizer)
    verify_folder(tmp_path / "m")
    assert digests.keys() == {path.name for path in (tmp_path / "m").iterdir()} > SEALED
    loaded = hf.load(tmp_path / "m", device="cpu")[1]
    assert loaded is not None
    assert loaded.encode("not to be") == tokenizer.encode("not to be")
    flip(tmp_path / "m" / "tokenizer.json", 50)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not match its checksum"):
        hf.load(tmp_path / "m", device="cpu")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_nothing_appears_when_the_disk_refuses_and_the_next_attempt_succeeds(
    tmp_path: Path, model: Transformer, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, refuse)
        with pytest.raises(BenthicError, match="No space left on device"):
            hf.write_model(tmp_path / "m", model, None)
    assert not (tmp_path / "m").exists()
    assert [p.name for p in tmp_path.iterdir()] in ([f"{PARTIAL}m"], [])
    hf.write_model(tmp_path / "m", model, None)  # what the first attempt left does not stand in the way
    assert_equal(hf.load(tmp_path / "m", device="cpu")[0], model)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_model_that_is_not_finite_is_not_written(tmp_path: Path, model: Transformer) -> None:
    with torch.no_grad():
        model.layers[2].mlp.routed_experts.down_proj[5, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.5\.down_proj\.weight is not finite"):
        hf.write_model(tmp_path / "m", model, None)
    assert not (tmp_path / "m").exists()


def test_a_folder_that_exists_is_never_overwritten(folder: Path, build: Callable[..., Transformer]) -> None:
    before = sha256_file(folder / hf.WEIGHTS)
    with pytest.raises(InputError, match="model already exists"):
        hf.write_model(folder, build(ModelConfig(), seed=3), None)
    assert sha256_file(folder / hf.WEIGHTS) == before


@pytest.mark.parametrize(
    "change",
    [
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 2},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
        {"n_shared_experts": 0},
        {"n_routed_experts": 16, "num_hidden_layers": 12},
    ],
    ids=str,
)
def test_other_shapes_survive_the_round_trip(
    tmp_path: Path, tiny: ModelConfig, build: Callable[..., Transformer], change: dict[str, int]
) -> None:
    model = build(dataclasses.replace(tiny, **change))
    hf.write_model(tmp_path / "m", model, None)
    assert_equal(hf.load(tmp_path / "m", device="cpu")[0], model)


def test_promised_mtp_modules_that_the_file_lacks_are_left_out_with_a_warning(
    folder: Path, model: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    layer = f"model.layers.{model.config.num_hidden_layers}."
    edit(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith(layer)] and None)
    loaded, _ = hf.load(folder, device="cpu")
    assert len(loaded.mtp) == 0
    assert "no weights for its 1 MTP modules" in caplog.text
    ids = torch.arange(6).view(1, 6)
    assert torch.equal(loaded(ids), model(ids))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder: Path) -> None:
    tokenizer = bpe.train(["to be or not to be, that is the question"] * 3, vocab_size=280)
    (folder / MANIFEST).unlink()
    tokenizer.save(folder)
    with pytest.raises(InputError, match=r"the tokenizer has 280 ids, the model vocab_size=61"):
        hf.load(folder, device="cpu")


def test_a_dense_model_in_a_layout_of_mixtures_survives_a_round_trip(tiny, build, tmp_path) -> None:
    """All layers dense is a choice of `first_k_dense_replace`, not of the layout."""
    dense = dataclasses.replace(
        tiny, n_routed_experts=0, first_k_dense_replace=tiny.num_hidden_layers, num_nextn_predict_layers=0
    )
    for kind in ("deepseek_v3", "deepseek_v2"):
        config = dataclasses.replace(dense, model_type=kind, topk_method="noaux_tc")
        model = build(config)
        hf.write_model(tmp_path / kind, model, None)
        again, _ = hf.load(tmp_path / kind, device="cpu")
        assert again.config == config
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
