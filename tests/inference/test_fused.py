"""The list of kernels computes what the model computes: prompts, chunks with a context, decode rows, drafts."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from benthic.base.errors import InputError
from benthic.kernels import linear_fp8, moe
from benthic.kernels.quant import dequantise_rows, quantise_rows
from benthic.model.cache import LatentCache
from benthic.model.config import ModelConfig, RopeScaling
from benthic.model.fp8 import eligible, make_room, to_fp8
from benthic.model.init import initialise
from benthic.model.linear import FP8, Linear
from benthic.model.mla import MLA
from benthic.model.transformer import Transformer

fused = pytest.importorskip("benthic.inference.fused", reason="needs triton")
chain = pytest.importorskip("benthic.kernels.chain", reason="needs triton")

PAGE = 16
V3 = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=64,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, intermediate_size=40, moe_intermediate_size=16,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    max_position_embeddings=256,
    rope_scaling=RopeScaling(type="yarn", factor=4, original_max_position_embeddings=32, mscale_all_dim=0.7),
)  # fmt: skip
V2 = dataclasses.replace(
    V3, model_type="deepseek_v2", q_lora_rank=None, scoring_func="softmax", topk_method="group_limited_greedy",
    norm_topk_prob=False, n_shared_experts=2, num_nextn_predict_layers=0,
)  # fmt: skip


def build(config: ModelConfig, device: str) -> Transformer:
    """float32 in the interpreter, bfloat16 on a GPU; norms away from one, gate biases of both signs."""
    model = initialise(Transformer(config), std=0.2, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        for gate in model.gates():
            if gate.e_score_correction_bias is not None:
                gate.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=generator) * 0.3)
    model.dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return model.to(device, model.dtype).eval()


def close(found: Tensor, expected: Tensor) -> None:
    """Rounding to bfloat16 may send a token to other experts, so there the norm of the error is bounded."""
    if found.dtype == torch.bfloat16:
        assert (found - expected).norm() / expected.norm() < 0.05
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def tensor(values: list, device: str, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


class Rows:
    """Sequences in pages of their own, computed step by step through `fused`."""

    def __init__(self, model: Transformer, lengths: list[int], device: str):
        generator = torch.Generator().manual_seed(1)
        self.ids = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]
        self.pages = [[1 + 4 * i + j for j in (2, 0, 3, 1)] for i in range(len(lengths))]
        self.cache = LatentCache(model.config, PAGE * (1 + 4 * len(lengths)), device, model.dtype)
        for layer in self.cache.layers:
            layer.c_kv.fill_(torch.nan), layer.k_rope.fill_(torch.nan)
        self.forward, self.device = fused.Fused(model, self.cache, PAGE), device
        self.done = [0] * len(lengths)

    def slots(self, row: int, start: int, end: int) -> list[int]:
        return [self.pages[row][t // PAGE] * PAGE + t % PAGE for t in range(start, end)]

    def tokens(self, decode: dict[int, int], prompts: dict[int, int]):
        """decode: row -> its new tokens (the same number each); prompts: row -> length of its chunk."""
        plan = [*decode.items(), *prompts.items()]
        ids, positions, slots = [], [], []
        for row, count in plan:
            ids += self.ids[row][self.done[row] : self.done[row] + count]
            positions += range(self.done[row], self.done[row] + count)
            slots += self.slots(row, self.done[row], self.done[row] + count)
        some, chunks = None, None
        if decode:
            table = tensor([self.pages[row] for row in decode], self.device, torch.int32)
            context = tensor([self.done[row] + count for row, count in decode.items()], self.device, torch.int32)
            some = fused.Decode(len(decode), max(decode.values()), table, context)
        if prompts:
            first = tensor([0, *prompts.values()], self.device, torch.int32).cumsum(0, dtype=torch.int32)
            pieces = []
            if old := [i for i, row in enumerate(prompts) if self.done[row]]:
                some_rows, starts = (
                    list(prompts)[old[0] : old[-1] + 1],
                    [0, *np.cumsum(list(prompts.values())).tolist()],
                )
                begin, end = starts[old[0]], starts[old[-1] + 1]
                first_q = tensor(starts[old[0] : old[-1] + 2], self.device, torch.int32) - begin
                for part in range(2):  # the context in two pieces
                    ranges = [(part * self.done[r] // 2, (part + 1) * self.done[r] // 2) for r in some_rows]
                    held = [s for row, (a, b) in zip(some_rows, ranges) for s in self.slots(row, a, b)]
                    first_k = tensor([0, *np.cumsum([b - a for a, b in ranges])], self.device, torch.int32)
                    pieces.append(fused.Piece(tensor(held, self.device), first_q, first_k, begin, end))
            chunks = fused.Prefill(first, max(prompts.values()), pieces)
        for row, count in plan:
            self.done[row] += count
        device = self.device
        return fused.Tokens(tensor(ids, device), tensor(positions, device), tensor(slots, device), some, chunks)


@torch.no_grad()
@pytest.mark.parametrize("config", [V3, V2], ids=["V3", "V2"])
def test_prompts_chunks_and_decode_rows_equal_the_model(config, device) -> None:
    model = build(config, device)
    rows = Rows(model, [21, 9, 30], device)
    expected = [model.hidden(tensor([ids], device))[0][0] for ids in rows.ids]
    found: list[list[Tensor]] = [[], [], []]
    for decode, prompts in [({}, {0: 19, 1: 5}), ({1: 1}, {2: 7}), ({0: 1, 1: 1}, {2: 9}), ({0: 1, 1: 1}, {2: 14})]:
        hidden = rows.forward.hidden(rows.tokens(decode, prompts))
        parts = hidden.split([*decode.values(), *prompts.values()])
        for row, part in zip([*decode, *prompts], parts):
            found[row].append(part)
    for row in range(3):
        close(torch.cat(found[row]), expected[row][: rows.done[row]])


@torch.no_grad()
def test_several_queries_of_a_row_see_each_other_causally(device) -> None:
    model = build(V3, device)
    rows = Rows(model, [20, 12], device)
    rows.forward.hidden(rows.tokens({}, {0: 17, 1: 9}))
    hidden = rows.forward.hidden(rows.tokens({0: 3, 1: 3}, {}))
    expected = [model.hidden(tensor([ids], device))[0][0, -3:] for ids in rows.ids]
    close(hidden, torch.cat(expected))


@torch.no_grad()
def test_the_prediction_module_equals_the_models(device) -> None:
    model = build(V3, device)
    rows = Rows(model, [14], device)
    ids = tensor(rows.ids[0], device)
    tokens = rows.tokens({}, {0: 13})
    hidden = rows.forward.hidden(tokens)
    ahead = rows.forward.mtp_hidden(hidden, ids[1:14], tokens, 0)
    true = model.hidden(ids[None, :13])[0]
    close(ahead, model.mtp_hidden(true, ids[None, 1:14])[0][0])


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are chained on a GPU alone")
@pytest.mark.parametrize("batch", [1, 4, 8, 32])
def test_chained_kernels_leave_the_bits_of_kernels_one_after_the_other(batch, device, monkeypatch) -> None:
    """A read ahead of its time, or a write, would show in one of many replays of graphs with changing inputs."""
    model, found = build(V3, device), []
    for most in (0, chain.MOST):
        monkeypatch.setattr(chain, "MOST", most)
        rows = Rows(model, [40] * batch, device)
        rows.forward.hidden(rows.tokens({}, dict.fromkeys(range(batch), 30)))
        tokens = rows.tokens(dict.fromkeys(range(batch), 1), {})
        rows.forward.hidden(tokens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = rows.forward.hidden(tokens)
        outputs, generator = [], torch.Generator(device).manual_seed(7)
        for _ in range(200):
            tokens.ids.copy_(torch.randint(0, 61, (batch,), generator=generator, device=device))
            graph.replay()
            outputs.append(out.clone())
        found.append(torch.stack(outputs))
    assert torch.equal(*found)


@torch.no_grad()
def test_weights_written_in_place_are_the_next_steps_weights(device) -> None:
    model = build(V3, device)
    rows, other = Rows(model, [9], device), build(dataclasses.replace(V3, routed_scaling_factor=2.5), device)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters()):
            mine.copy_(theirs.flip(0))
    hidden = rows.forward.hidden(rows.tokens({}, {0: 9}))
    close(hidden, model.hidden(tensor([rows.ids[0]], device))[0][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kv_lora_rank": None, "q_lora_rank": None}, "kv_lora_rank=None"), ({"v_head_dim": 12}, "v_head_dim=12")],
)
def test_models_that_the_kernels_cannot_compute_are_refused(change, message) -> None:
    model = Transformer(dataclasses.replace(V3, num_key_value_heads=2, **change))
    cache = LatentCache(model.config, 16, "cpu", torch.float32)
    with pytest.raises(InputError, match=message):
        fused.Fused(model, cache, PAGE)


def in_blocks(x: Tensor) -> Tensor:
    """x [..., K] rounded to E4M3 per row and block of 128, as products of more than four tokens round it."""
    rows = dequantise_rows(*quantise_rows(x.flatten(0, -2)))
    return rows.view_as(x).to(x.dtype)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain pass, with what enters a product in FP8 rounded to E4M3."""
    linear, grouped = Linear.forward, torch.nn.functional.grouped_mm

    def forward(self: Linear, x: Tensor) -> Tensor:
        return linear(self, x if self.weight_scale_inv is None else in_blocks(x))

    monkeypatch.setattr(Linear, "forward", forward)
    monkeypatch.setattr("torch.nn.functional.grouped_mm", lambda x, w, offs: grouped(in_blocks(x), w, offs=offs))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks: the interpreter's time goes by programs."""
    few, many = linear_fp8.Rows(block=128), linear_fp8.Tiles(block_m=128, block_n=32)
    rows, tiles, own = moe.Rows(tile=1 << 17), moe.Fp8Tiles(), moe.choose_tiles
    monkeypatch.setattr(linear_fp8, "choose", lambda x, weight: few if len(x) <= 4 else many)
    monkeypatch.setattr(
        moe, "choose_tiles", lambda n, k, e, dtype: own(n, k, e, dtype) if dtype != FP8 else rows if n <= 4 else tiles
    )


RAGGED = dataclasses.replace(V3, hidden_size=144, q_lora_rank=136, intermediate_size=200, moe_intermediate_size=80)
LONG = pytest.mark.skipif(False, reason="") if torch.cuda.is_available() else pytest.mark.long  # in the interpreter
FP8_CONFIGS = pytest.mark.parametrize(
    "config", [pytest.param(V3, marks=LONG, id="V3"), pytest.param(V2, id="V2"), pytest.param(RAGGED, id="ragged")]
)


def build_fp8(config: ModelConfig, device: str) -> Transformer:
    """Matrices of unlike sizes, so that factors in the wrong place show."""
    model = build(config, device)
    for number, (module, name) in enumerate(eligible(model)):
        getattr(module, name).data.mul_(0.5 + number % 4 / 2)
    to_fp8(model)
    return model


@torch.no_grad()
@FP8_CONFIGS
@pytest.mark.usefixtures("exact_fp8", "coarse")
def test_up_to_four_tokens_fp8_weights_give_the_plain_pass(config, device) -> None:
    model = build_fp8(config, device)
    rows = Rows(model, [9, 4], device)
    found = [rows.forward.hidden(rows.tokens({}, {0: 4}))]
    found += [rows.forward.hidden(rows.tokens({0: 2}, {})), rows.forward.hidden(rows.tokens({0: 1}, {1: 2}))[:1]]
    close(torch.cat(found), model.hidden(tensor([rows.ids[0]], device))[0][0][:7])


@torch.no_grad()
@FP8_CONFIGS
@pytest.mark.usefixtures("exact_fp8", "coarse", "rounding")
def test_more_tokens_give_the_plain_pass_over_rounded_activations(config, device) -> None:
    model = build_fp8(config, device)
    rows = Rows(model, [21, 9, 30, 6, 7], device)
    expected = [model.hidden(tensor([ids], device))[0][0] for ids in rows.ids]
    found = rows.forward.hidden(rows.tokens({}, {0: 19, 1: 7, 2: 29, 3: 5, 4: 6}))
    last = rows.forward.hidden(rows.tokens(dict.fromkeys(range(5), 1), {}))
    found = [torch.cat(pair) for pair in zip(found.split([19, 7, 29, 5, 6]), last.split(1))]
    errors = [float((a - b[: len(a)]).norm() / a.norm()) for a, b in zip(found, expected)]
    if device == "cuda":  # bfloat16: a choice between experts that nearly tie may fall otherwise
        assert min(errors) < 0.1
        assert max(errors) < 0.5
    else:
        assert max(errors) < 1e-2


@torch.no_grad()
@pytest.mark.usefixtures("exact_fp8", "coarse")
def test_rounded_activations_stay_near_the_plain_pass(device) -> None:
    """Without experts, whose choice jumps."""
    model = build_fp8(dataclasses.replace(RAGGED, first_k_dense_replace=2, num_nextn_predict_layers=0), device)
    rows = Rows(model, [30], device)
    found = rows.forward.hidden(rows.tokens({}, {0: 30}))
    expected = model.hidden(tensor([rows.ids[0]], device))[0][0]
    assert 1e-3 < (found - expected).norm() / expected.norm() < 0.25


def test_weights_of_one_input_in_two_formats_are_refused(device) -> None:
    model = build(V3, device)
    attention = model.layers[0].self_attn
    assert isinstance(attention, MLA)
    make_room(attention.q_a_proj, "weight")
    with pytest.raises(InputError, match=r"same input in torch\.float8_e4m3fn, torch"):
        Rows(model, [3], device)


def test_a_second_engine_on_the_same_model_leaves_the_weights_where_they_are(device) -> None:
    """Graphs that the first has captured read them there."""
    model = build(V3, device)
    Rows(model, [3], device)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    Rows(model, [3], device)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
