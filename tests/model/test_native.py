"""DeepSeek's own inference layout: what ranks hold is put together again, and what does not belong together is refused.

The sharder here follows the description of the layout and shares nothing with the reader.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benthic.base.errors import CheckpointError, InputError
from benthic.model import hf
from benthic.model.config import ModelConfig, RopeScaling
from benthic.model.native_config import from_native
from benthic.model.transformer import Transformer
from benthic.model.weights import Weights
from benthic.tokenizer import bpe

SHORT = {
    "model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b", "o_proj": "wo",
    "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
}  # fmt: skip
ROWS, COLUMNS = {"embed", "head", "wq", "wq_b", "wkv_b", "w1", "w3"}, {"wo", "w2"}


def shorten(name: str) -> str:
    name = name.replace("e_score_correction_bias", "bias").replace("weight_scale_inv", "scale")
    stem, end = name.rsplit(".", 1)
    stem = SHORT.get(stem, stem).removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
    head, _, last = stem.rpartition(".")
    return ".".join(part for part in (head, SHORT.get(last, last), end) if part)


def shard(source: Path, target: Path, n: int, config: ModelConfig) -> None:
    """Cut a folder in the Hugging Face layout into `n` ranks."""
    target.mkdir()
    ranks: list[dict[str, Tensor]] = [{} for _ in range(n)]
    for name, tensor in load_file(source / hf.WEIGHTS).items():
        if name.startswith(f"model.layers.{config.num_hidden_layers}."):
            continue  # the prediction module
        short = shorten(name)
        expert = re.search(r"\.experts\.(\d+)\.", short)
        kind = short.split(".")[-2]
        for rank in range(n):
            if expert:
                part = tensor if int(expert[1]) // (config.n_routed_experts // n) == rank else None
            elif kind in ROWS:
                size = len(tensor) // n
                part = tensor[rank * size : (rank + 1) * size]
            elif kind in COLUMNS:
                size = tensor.shape[1] // n
                part = tensor[:, rank * size : (rank + 1) * size]
            else:
                part = tensor
            if part is not None:
                ranks[rank][short] = part.contiguous()
    for rank, tensors in enumerate(ranks):
        save_file(tensors, target / f"model{rank}-mp{n}.safetensors")
    (target / "config.json").write_text(json.dumps(arguments(config)))


def arguments(c: ModelConfig) -> dict[str, Any]:
    """The script's arguments for a model."""
    stretch = c.rope_scaling
    rope = {"max_seq_len": 64, "original_seq_len": 4096}
    if stretch is not None:
        rope = {
            "original_seq_len": stretch.original_max_position_embeddings, "max_seq_len": c.max_position_embeddings,
            "rope_factor": stretch.factor, "mscale": stretch.mscale, "beta_fast": 16, "beta_slow": 2,
        }  # fmt: skip
    return rope | {
        "vocab_size": c.vocab_size, "dim": c.hidden_size, "inter_dim": c.intermediate_size,
        "moe_inter_dim": c.moe_intermediate_size, "n_layers": c.num_hidden_layers,
        "n_dense_layers": c.first_k_dense_replace, "n_heads": c.num_attention_heads,
        "n_routed_experts": c.n_routed_experts, "n_shared_experts": c.n_shared_experts,
        "n_activated_experts": c.num_experts_per_tok, "n_expert_groups": c.n_group, "n_limited_groups": c.topk_group,
        "score_func": c.scoring_func, "route_scale": c.routed_scaling_factor, "q_lora_rank": c.q_lora_rank or 0,
        "kv_lora_rank": c.kv_lora_rank, "qk_nope_head_dim": c.qk_nope_head_dim,
        "qk_rope_head_dim": c.qk_rope_head_dim, "v_head_dim": c.v_head_dim,
    }  # fmt: skip


SIGMOID: dict[str, Any] = {"vocab_size": 64, "num_attention_heads": 4}
SOFTMAX = SIGMOID | {
    "model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "group_limited_greedy",
    "norm_topk_prob": False, "routed_scaling_factor": 16.0, "n_shared_experts": 2, "num_nextn_predict_layers": 0,
}  # fmt: skip
GREEDY = SOFTMAX | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
STRETCHED = SIGMOID | {
    "max_position_embeddings": 64,
    "rope_scaling": RopeScaling(
        type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16, beta_slow=2, mscale=0.7,
        mscale_all_dim=0.7,
    ),
}  # fmt: skip
BLOCKS: dict[str, Any] = {  # what ranks split has a multiple of four blocks of 128
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 512,
    "n_shared_experts": 1,
}  # fmt: skip
IDS = torch.randint(2, 60, (2, 40), generator=torch.Generator().manual_seed(0))
Build = Callable[..., Transformer]


@pytest.fixture
def ranks(tmp_path: Path, tiny: ModelConfig, build: Build) -> Path:
    config = dataclasses.replace(tiny, **SIGMOID)
    hf.write_model(tmp_path / "hf", build(config).bfloat16(), None)
    shard(tmp_path / "hf", tmp_path / "ranks", 2, config)
    return tmp_path / "ranks"


def edit(folder: Path, rank: int, change: Callable[[dict[str, Tensor]], object], n: int = 2) -> None:
    tensors = load_file(folder / f"model{rank}-mp{n}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"model{rank}-mp{n}.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("q_lora_rank", [24, None], ids=["compressed query", "plain query"])
@pytest.mark.parametrize("routing", [SIGMOID, SOFTMAX, GREEDY, STRETCHED], ids="sigmoid softmax greedy yarn".split())
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_ranks_load_with_the_logits_of_the_folder_they_were_cut_from(
    tmp_path: Path, tiny: ModelConfig, build: Build, n: int, q_lora_rank: int | None, routing: dict, fp8: bool
) -> None:
    change = routing | {"q_lora_rank": q_lora_rank} | (BLOCKS if fp8 else {})
    config = dataclasses.replace(tiny, **change)
    hf.write_model(tmp_path / "hf", build(config).bfloat16(), None, fp8=fp8)
    shard(tmp_path / "hf", tmp_path / "ranks", n, config)
    expected, _ = hf.load(tmp_path / "hf", device="cpu")
    loaded, _ = hf.load(tmp_path / "ranks", device="cpu")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.topk_method == config.topk_method
    assert loaded.config.rope_scaling == config.rope_scaling
    logits = expected(IDS)
    assert logits.std() > 0.1
    assert torch.equal(loaded(IDS), logits)


@torch.no_grad()
def test_the_comparison_notices_parts_in_the_wrong_order(ranks: Path) -> None:
    parts = [load_file(ranks / f"model{rank}-mp2.safetensors")["layers.1.attn.wo.weight"] for rank in (0, 1)]
    edit(ranks, 0, lambda t: t.update({"layers.1.attn.wo.weight": parts[1]}))
    edit(ranks, 1, lambda t: t.update({"layers.1.attn.wo.weight": parts[0]}))
    logits = hf.load(ranks.parent / "hf", device="cpu")[0](IDS)
    assert not torch.equal(hf.load(ranks, device="cpu")[0](IDS), logits)


def test_names_come_out_as_those_of_the_released_files_and_tensors_bit_for_bit(ranks: Path) -> None:
    expected = load_file(ranks.parent / "hf" / hf.WEIGHTS)
    expected = {name: tensor for name, tensor in expected.items() if "layers.3." not in name}
    weights = Weights(ranks)
    assert set(weights.names) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
        assert weights.shape(name) == tuple(tensor.shape)


def test_the_published_671b_arguments_are_v3(v3: ModelConfig) -> None:
    args = arguments(v3)
    del args["max_seq_len"], args["original_seq_len"]
    config = from_native(args | {"dtype": "fp8", "scale_fmt": "ue8m0"}, biased=True, where="config_671B.json")
    yarn = RopeScaling(
        type="yarn", factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )  # fmt: skip
    assert config == dataclasses.replace(v3, num_nextn_predict_layers=0, rope_scaling=yarn)


def test_arguments_left_out_take_the_scripts_defaults() -> None:
    config = from_native({"dim": 2048}, biased=False, where="config.json")
    assert (config.vocab_size, config.num_hidden_layers, config.num_attention_heads) == (102400, 27, 16)
    assert (config.intermediate_size, config.moe_intermediate_size) == (10944, 1408)
    assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (64, 2, 6)
    assert (config.q_lora_rank, config.kv_lora_rank, config.topk_method) == (None, 512, "greedy")
    assert (config.scoring_func, config.norm_topk_prob, config.routed_scaling_factor) == ("softmax", False, 1.0)
    assert config.rope_scaling is not None  # 16384 > 4096
    assert (config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) == (40, 1.0)


@pytest.mark.parametrize(("length", "stretched"), [(4096, False), (4097, True)])
def test_positions_are_stretched_exactly_beyond_the_original_length(length: int, stretched: bool) -> None:
    config = from_native({"dim": 64, "max_seq_len": length}, biased=False, where="config.json")
    assert (config.rope_scaling is not None) == stretched
    assert config.max_position_embeddings == (163840 if stretched else 4096)


def test_an_unknown_argument_names_its_neighbour(ranks: Path) -> None:
    data = json.loads((ranks / "config.json").read_text()) | {"n_layer": 3}
    (ranks / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"unknown key 'n_layer' in .*config\.json .*did you mean 'n_layers'"):
        hf.load(ranks, device="cpu")


def test_a_config_in_the_other_naming_works_and_its_absent_mtp_modules_are_left_out(
    ranks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (ranks / "config.json").write_bytes((ranks.parent / "hf" / "config.json").read_bytes())
    model, _ = hf.load(ranks, device="cpu")
    assert len(model.mtp) == 0
    assert "no weights for its 1 MTP modules" in caplog.text
    assert torch.equal(model(IDS), hf.load(ranks.parent / "hf", device="cpu")[0](IDS))


def test_a_tokenizer_beside_the_ranks_is_read_and_gives_the_ids_that_the_arguments_lack(
    tmp_path: Path, tiny: ModelConfig, build: Build
) -> None:
    config = dataclasses.replace(tiny, **SIGMOID | {"vocab_size": 288})
    hf.write_model(tmp_path / "hf", build(config), None)
    shard(tmp_path / "hf", tmp_path / "ranks", 1, config)
    tokenizer = bpe.train(["to be or not to be, that is the question"] * 3, vocab_size=280)
    tokenizer.save(tmp_path / "ranks")
    model, loaded = hf.load(tmp_path / "ranks", device="cpu")
    assert loaded is not None
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_a_missing_rank_is_named(ranks: Path) -> None:
    (ranks / "model1-mp2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model1-mp2\.safetensors is missing"):
        hf.load(ranks, device="cpu")


def test_a_rank_beyond_the_last_is_named(ranks: Path) -> None:
    (ranks / "model2-mp2.safetensors").write_bytes((ranks / "model1-mp2.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model2-mp2\.safetensors is rank 2 of 2"):
        hf.load(ranks, device="cpu")


def test_two_sets_of_ranks_in_one_folder_are_refused(ranks: Path) -> None:
    (ranks / "model0-mp1.safetensors").write_bytes((ranks / "model0-mp2.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="files of mp1 and of mp2"):
        hf.load(ranks, device="cpu")


def test_both_layouts_in_one_folder_are_refused(ranks: Path) -> None:
    (ranks / hf.WEIGHTS).write_bytes((ranks.parent / "hf" / hf.WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors and model0-mp2\.safetensors"):
        hf.load(ranks, device="cpu")


def test_what_every_rank_repeats_must_be_equal_on_all(ranks: Path) -> None:
    edit(ranks, 1, lambda t: t["layers.2.ffn.gate.bias"].__setitem__(3, 9.0))
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn\.gate\.bias differs between rank 0 and rank 1"):
        hf.load(ranks, device="cpu")


@pytest.mark.parametrize("name", ["layers.1.attn.wq_a.weight", "layers.2.ffn.shared_experts.w2.weight", "norm.weight"])
def test_a_tensor_that_one_rank_lacks_is_named_with_the_file(ranks: Path, name: str) -> None:
    edit(ranks, 1, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=rf"model1-mp2\.safetensors lacks {re.escape(name)}"):
        hf.load(ranks, device="cpu")


def test_an_expert_on_a_rank_that_does_not_own_it_is_named(ranks: Path) -> None:
    name = "layers.1.ffn.experts.5.w1.weight"
    moved = load_file(ranks / "model1-mp2.safetensors")[name]
    edit(ranks, 0, lambda t: t.update({name: moved}))
    with pytest.raises(CheckpointError, match=r"model0-mp2\.safetensors must not hold layers\.1\.ffn\.experts\.5\.w1"):
        hf.load(ranks, device="cpu")


def test_parts_of_unequal_size_are_refused_with_both_shapes(ranks: Path) -> None:
    edit(ranks, 1, lambda t: t.update({"embed.weight": t["embed.weight"][:-1].contiguous()}))
    with pytest.raises(CheckpointError, match=r"embed\.weight is .* \(32, 32\) on rank 0, .* \(31, 32\) on rank 1"):
        hf.load(ranks, device="cpu")


def test_experts_that_do_not_divide_among_the_ranks_are_refused(tmp_path: Path, ranks: Path) -> None:
    (tmp_path / "four").mkdir()
    for rank in range(4):
        content = (ranks / f"model{rank // 2}-mp2.safetensors").read_bytes()
        (tmp_path / "four" / f"model{rank}-mp4.safetensors").write_bytes(content)
        edit(
            tmp_path / "four",
            rank,
            lambda t: [t.pop(name) for name in list(t) if re.search(r"experts\.[67]\.", name)],
            n=4,
        )
    (tmp_path / "four" / "config.json").write_bytes((ranks / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="6 experts do not divide among 4 ranks"):
        hf.load(tmp_path / "four", device="cpu")


@pytest.mark.parametrize("name", ["layers.0.attn.wx.weight", "layers.1.ffn.gate.scales", "embed.bias", "freqs_cis"])
def test_a_name_that_the_layout_does_not_have_is_refused(ranks: Path, name: str) -> None:
    for rank in (0, 1):
        edit(ranks, rank, lambda t: t.update({name: torch.zeros(2, 2)}))
    with pytest.raises(CheckpointError, match=rf"holds {re.escape(name)} -> no name of"):
        hf.load(ranks, device="cpu")


def test_a_layer_too_few_is_listed_under_its_released_name(ranks: Path) -> None:
    data = json.loads((ranks / "config.json").read_text()) | {"n_layers": 4}
    (ranks / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.3\.input_layernorm\.weight \(32,\)"):
        hf.load(ranks, device="cpu")


def test_ranks_without_a_config_say_what_is_missing(ranks: Path) -> None:
    (ranks / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        hf.load(ranks, device="cpu")
