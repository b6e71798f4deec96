"""Every layout of the family against `reference.py`, which shares no code with the package: equal logits in float32.

The controls make one mistake in the script at a time, of those that papers and public code invite: each must show.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from reference import Array, Reference, paper_module, released_module

from benthic.model import hf
from benthic.model.config import ModelConfig, RopeScaling
from benthic.model.transformer import Transformer

TOLERANCE = 3e-5  # logits deviate by about one; the largest difference over all cases is 1.1e-5
SHOWS = 0.3  # the smallest difference that a mistake makes is 0.5
LENGTH = 90  # beyond the 64 positions that YaRN and Llama 3 stretch below
WIDE: dict[str, Any] = {"qk_rope_head_dim": 16}  # enough rotary pairs for some to be kept, blended and stretched
YARN = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = RopeScaling(type="llama3", factor=8.0, original_max_position_embeddings=64)
PLAIN: dict[str, Any] = {
    "q_lora_rank": None, "kv_lora_rank": None, "num_nextn_predict_layers": 0, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
DENSE = PLAIN | {"model_type": "llama", "n_routed_experts": 0, "first_k_dense_replace": 3}
GREEDY: dict[str, Any] = {
    "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "n_shared_experts": 2, "num_nextn_predict_layers": 0,
}  # fmt: skip
MOE = PLAIN | GREEDY | {"model_type": "deepseek"}
GROUPED = GREEDY | {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
FAMILY: dict[str, dict[str, Any]] = {
    "MoE 16B": MOE,
    "MoE 16B, normalised": MOE | {"norm_topk_prob": True},
    "V2: best groups, scaled": GROUPED | {"routed_scaling_factor": 16.0},
    "V2-Lite: no query compression, YaRN": GREEDY | WIDE | {
        "model_type": "deepseek_v2", "q_lora_rank": None,
        "rope_scaling": dataclasses.replace(YARN, mscale=0.707, mscale_all_dim=0.707),
    },
    "V3": {},
    "V3, three modules": {"num_nextn_predict_layers": 3},
    "V3 without query compression": {"q_lora_rank": None},
    "V3 with YaRN": WIDE | {"rope_scaling": YARN},
    "V3 with YaRN and longer rotations": WIDE | {"rope_scaling": dataclasses.replace(YARN, mscale_all_dim=0.5)},
    "V1 7B: MHA": DENSE,
    "V1 67B: GQA": DENSE | {"num_key_value_heads": 2},
    "R1-Distill-Llama": DENSE | {"num_key_value_heads": 2, "rope_scaling": LLAMA3},
    "R1-Distill-Qwen: biases, tied": DENSE | {
        "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
RAGGED: dict[str, dict[str, Any]] = {  # FP8 weights of several blocks, the last row and column of blocks incomplete
    "V3": {
        "hidden_size": 136, "q_lora_rank": 144, "kv_lora_rank": 152, "num_attention_heads": 9, "v_head_dim": 20,
        "intermediate_size": 200, "moe_intermediate_size": 176,
    },
    "Llama": DENSE | {
        "hidden_size": 200, "num_attention_heads": 10, "num_key_value_heads": 10, "intermediate_size": 264,
    },
}  # fmt: skip
STORED = {"float32": b'"F32"', "bfloat16": b'"BF16"', "fp8": b'"F8_E4M3"'}

Build = Callable[..., Transformer]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, tiny: ModelConfig, build: Build) -> Save:
    """Write a model whose every norm and bias is random; `below` shifts the gate biases under zero.

    Matrices shrink with the width, which keeps the deviation of what they give.
    """

    @torch.no_grad()
    def write(change: dict[str, Any], storage: str = "float32", below: float = 0.0) -> Path:
        model = build(dataclasses.replace(tiny, **change))
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter *= (tiny.hidden_size / model.config.hidden_size) ** 0.5
            if name.endswith("proj.bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
        for gate in model.gates():
            if gate.e_score_correction_bias is not None:
                gate.e_score_correction_bias -= below
        model = model.to(torch.bfloat16) if storage == "bfloat16" else model
        hf.write_model(tmp_path / "m", model, None, fp8=storage == "fp8")
        return tmp_path / "m"

    return write


def ids_of(tokens: int = LENGTH) -> list[int]:
    return np.random.default_rng(0).integers(2, 61, tokens).tolist()


@torch.no_grad()
def ours(folder: Path, ids: list[int]) -> list[Array]:
    """The logits of the main model, then those of each prediction module."""
    model, _ = hf.load(folder, device="cpu", dtype="float32")
    rows = torch.tensor([ids])
    hidden, _ = model.hidden(rows)
    logits = [model.logits(hidden)]
    for depth in range(model.config.num_nextn_predict_layers):
        hidden, _ = model.mtp_hidden(hidden[:, :-1], rows[:, depth + 1 :], depth=depth)
        logits.append(model.logits(hidden))
    return [one[0].double().numpy() for one in logits]


def theirs(script: Reference, ids: list[int]) -> list[Array]:
    return [script.logits(ids), *script.mtp_logits(ids, released_module)]


def errors(left: list[Array], right: list[Array]) -> list[float]:
    assert [one.shape for one in left] == [one.shape for one in right]
    return [float(np.abs(a - b).max()) for a, b in zip(left, right)]


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("member", FAMILY.values(), ids=FAMILY.keys())
def test_logits_of_main_model_and_modules_equal_those_of_the_script(save: Save, member, storage: str) -> None:
    folder, ids = save(member, storage), ids_of()
    assert STORED[storage] in (folder / "model.safetensors").read_bytes()
    expected = theirs(Reference(folder), ids)
    assert len(expected) == 1 + member.get("num_nextn_predict_layers", 1)
    assert min(one.std() for one in expected) > 0.3
    assert max(errors(ours(folder, ids), expected)) < TOLERANCE


@pytest.mark.parametrize("member", RAGGED.values(), ids=RAGGED.keys())
def test_fp8_blocks_that_end_inside_a_weight_are_read_alike(save: Save, member) -> None:
    folder, ids = save(member, "fp8"), ids_of(20)
    assert max(errors(ours(folder, ids), theirs(Reference(folder), ids))) < TOLERANCE


def test_gate_biases_below_every_score_choose_alike(save: Save) -> None:
    folder, ids = save({}, below=2.0), ids_of()
    script = Reference(folder)
    biases = [t for name, t in script.weights.items() if name.endswith("bias")]
    assert len(biases) == 3
    assert max(t.max() for t in biases) < -1  # a sigmoid never reaches one: every biased score is negative
    assert max(errors(ours(folder, ids), theirs(script, ids))) < TOLERANCE


def test_the_papers_m_k_is_the_released_matrix_with_its_halves_exchanged(save: Save) -> None:
    folder, ids = save({"num_nextn_predict_layers": 3}), ids_of()
    script = Reference(folder)

    def exchanged(eh_proj: Array, hidden: Array, embedding: Array) -> Array:
        embedding_half, hidden_half = np.split(eh_proj, 2, 1)
        return paper_module(np.concatenate((hidden_half, embedding_half), 1), hidden, embedding)

    modules = ours(folder, ids)[1:]
    assert max(errors(modules, script.mtp_logits(ids, exchanged))) < TOLERANCE
    assert min(errors(modules, script.mtp_logits(ids, paper_module))) > SHOWS  # unexchanged, the order matters


def test_the_script_holds_the_published_numbers() -> None:
    released = dataclasses.asdict(dataclasses.replace(YARN, factor=40, original_max_position_embeddings=4096))
    assert reference.softmax_scale({"rope_scaling": released}, 192) * 192**0.5 == pytest.approx(1.873854, abs=1e-6)
    plain, scaled = (reference.frequencies({"rope_theta": 1e4, "rope_scaling": s}, 64) for s in (None, released))
    ratio = plain / scaled
    assert ratio[:11] == pytest.approx(1)
    assert 1 < ratio[11] < ratio[22] < 40
    assert ratio[23:] == pytest.approx(40)
    values = [reference.e4m3_value(byte) for byte in range(256)]
    assert (values[0x7E], values[0x38], values[0x01], values[0xFE]) == (448, 1, 2**-9, -448)
    assert np.isnan(values[0x7F])
    assert reference.e4m3(bytes(range(127))).tolist() == torch.arange(127).byte().view(torch.float8_e4m3fn).tolist()
    assert reference.bfloat16(b"\x80\x3f\x00\xc0").tolist() == [1, -2]


# Controls: one mistake in the script at a time.

Mistake = Callable[[Path, pytest.MonkeyPatch], Reference]


def patched(name: str, value: Any) -> Mistake:
    """The script with another function or constant."""

    def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
        monkeypatch.setattr(reference, name, value)
        return Reference(folder)

    return make


def configured(**change: Any) -> Mistake:
    """The script under another config."""

    def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
        script = Reference(folder)
        script.config |= change
        return script

    return make


def weighted(ending: str, change: Callable[[Array], Array]) -> Mistake:
    """The script with other weights."""

    def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
        script = Reference(folder)
        names = [name for name in script.weights if name.endswith(ending)]
        assert names
        script.weights |= {name: change(script.weights[name]) for name in names}
        return script

    return make


def ramp_over_turns(theta: Array, scaling: dict[str, Any], base: float) -> Array:
    """YaRN as its paper writes it: the blend is linear in how often a pair turns, not in its index."""
    return reference.llama3(theta, scaling | {"low_freq_factor": 1, "high_freq_factor": 32}, base)


def one_best(choice: Array, config: dict[str, Any], best: int, true=reference.within_best_groups) -> Array:
    return true(choice, config, 1)


def two_best(choice: Array, config: dict[str, Any], best: int, true=reference.within_best_groups) -> Array:
    return true(choice, config, 2)


def one_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
    """Every depth with the weights of the first."""
    script = Reference(folder)
    first = reference.under(f"model.layers.{script.layers}", script.weights)
    for depth in range(1, script.config["num_nextn_predict_layers"]):
        script.weights |= {f"model.layers.{script.layers + depth}.{name}": t for name, t in first.items()}
    return script


def inputs_exchanged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reference:
    """The norm of the embedding for the hidden state, and the other way round."""
    script = Reference(folder)
    name = f"model.layers.{script.layers}"
    a, b = f"{name}.enorm.weight", f"{name}.hnorm.weight"
    script.weights |= {a: script.weights[b], b: script.weights[a]}
    return script


def rows_exchanged(weight: Array, scale_inv: Array, true=reference.multiply_blocks) -> Array:
    """FP8 factors from the last row of blocks to the first."""
    return true(weight, scale_inv[::-1])


V3_YARN, DEEP, QWEN = FAMILY["V3 with YaRN"], FAMILY["V3, three modules"], FAMILY["R1-Distill-Qwen: biases, tied"]
MISTAKES: dict[str, tuple[dict[str, Any], str, int, Mistake]] = {  # member, storage, output that must change, mistake
    "rotary halves for pairs": ({}, "float32", 0, patched("interleaved", reference.half_split)),
    "rotary pairs for halves": (DENSE, "float32", 0, patched("half_split", reference.interleaved)),
    "no YaRN": (V3_YARN, "float32", 0, configured(rope_scaling=None)),
    "YaRN without larger logits": (V3_YARN, "float32", 0, patched("softmax_scale", lambda config, width: width**-0.5)),
    "YaRN's ramp over turns": (V3_YARN, "float32", 0, patched("yarn", ramp_over_turns)),
    "no Llama 3 scaling": (FAMILY["R1-Distill-Llama"], "float32", 0, configured(rope_scaling=None)),
    "latent not normalised alike": ({}, "float32", 0, weighted("kv_a_layernorm.weight", np.ones_like)),
    "gate bias ignored": ({}, "float32", 0, weighted("e_score_correction_bias", np.zeros_like)),
    "groups ignored": ({}, "float32", 0, configured(topk_group=4)),
    "V3 groups by their best expert": ({}, "float32", 0, patched("within_best_groups", one_best)),
    "V2 groups by their two best": (GROUPED, "float32", 0, patched("within_best_groups", two_best)),
    "V2 normalised": (GROUPED, "float32", 0, configured(norm_topk_prob=True)),
    "V3 not normalised": ({}, "float32", 0, configured(norm_topk_prob=False)),
    "MoE 16B normalised": (MOE, "float32", 0, configured(norm_topk_prob=True)),
    "gate not scaled": ({}, "float32", 0, configured(routed_scaling_factor=1.0)),
    "softmax for sigmoid": ({}, "float32", 0, configured(scoring_func="softmax")),
    "attention without biases": (QWEN, "float32", 0, weighted("proj.bias", np.zeros_like)),
    "head not tied": (QWEN, "float32", 0, weighted("embed_tokens.weight", lambda t: t[::-1])),
    "h^0 before the final norm": (DEEP, "float32", 1, weighted("model.norm.weight", np.ones_like)),
    "h^1 before its norm": (DEEP, "float32", 2, weighted("layers.3.shared_head.norm.weight", np.ones_like)),
    "one module for all depths": (DEEP, "float32", 2, one_module),
    "norms of the two inputs exchanged": (DEEP, "float32", 1, inputs_exchanged),
    "one factor for all blocks": (RAGGED["Llama"], "fp8", 0, patched("multiply_blocks", lambda w, s: w * s.mean())),
    "block rows exchanged": (RAGGED["Llama"], "fp8", 0, patched("multiply_blocks", rows_exchanged)),
}  # fmt: skip


@pytest.mark.parametrize(("member", "storage", "output", "mistake"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_would_show(save: Save, monkeypatch, member, storage: str, output: int, mistake: Mistake) -> None:
    folder, ids = save(member, storage), ids_of(LENGTH if member.get("rope_scaling") else 30)
    wrong = theirs(mistake(folder, monkeypatch), ids)
    assert errors(ours(folder, ids), wrong)[output] > SHOWS


def test_losing_groups_at_zero_would_win_when_biases_are_negative(save: Save, monkeypatch) -> None:
    folder, ids = save({}, below=2.0), ids_of(30)
    script = patched("LOST", 0.0)(folder, monkeypatch)
    assert errors(ours(folder, ids), theirs(script, ids))[0] > SHOWS
