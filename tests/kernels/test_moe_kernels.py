"""The expert kernels against plain torch and against the model's mixture of experts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from benthic.kernels.moe import (
    ExpertWeights,
    Fp8Sorted,
    Fp8Tiles,
    Rows,
    Sorted,
    Tiles,
    choose_tiles,
    moe,
    moe_norm,
    moe_ref,
)
from benthic.kernels.moe_fp8 import quantise
from benthic.kernels.quant import quantise_blocks, quantise_rows
from benthic.model.config import ModelConfig
from benthic.model.linear import RMSNorm
from benthic.model.moe import MoE
from benthic.parallel.dispatch import LocalDispatcher

pytestmark = pytest.mark.usefixtures("exact_fp8")
ROWS = Rows(up_tile=8192, down_tile=8192)
TILES = Tiles(block_m=16, up_n=32, up_k=64, down_n=64, down_k=64)
TALL = replace(TILES, shared_m=64, shared_up_n=16, shared_down_n=32)  # two heights of the shared experts in one launch
FP8 = Fp8Tiles(block_m=16)
WAYS = pytest.mark.parametrize("tiles", [ROWS, TILES], ids=["rows", "tiles"])
ALL = pytest.mark.parametrize("tiles", [ROWS, TILES, Sorted()], ids=["rows", "tiles", "sorted"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stacked(weight: Tensor) -> tuple[Tensor, Tensor]:
    """quantise_blocks of each matrix of [E, rows, columns]."""
    pairs = [quantise_blocks(matrix) for matrix in weight]
    return torch.stack([q for q, _ in pairs]), torch.stack([s for _, s in pairs])


def experts(e: int, d: int, i: int, s: int, *, fp8: bool = False, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    gate_up, down = random(e, 2 * i, d, seed=1) * d**-0.5, random(e, d, i, seed=2) * i**-0.5
    shared = [random(s * i, d, seed=3) * d**-0.5, random(s * i, d, seed=4) * d**-0.5, random(d, s * i, seed=5) * 0.1]
    names = ["shared_gate", "shared_up", "shared_down"][: 3 * (s > 0)]
    if not fp8:
        own = {f"{name}_proj": w.to(dtype) for name, w in zip(names, shared)}
        return ExpertWeights(gate_up_proj=gate_up.to(dtype), down_proj=down.to(dtype), **own)
    spread = torch.logspace(-1, 1, e)[:, None, None]  # experts of unlike sizes: factors that are mixed up show
    gate, up, (down8, down_scale) = *(stacked(g * spread) for g in gate_up.split(i, 1)), stacked(down / spread)
    own = {}
    for name, weight in zip(names, shared):
        own[f"{name}_proj"], own[f"{name}_scale"] = quantise_blocks(weight)
    return ExpertWeights(
        gate_up_proj=torch.cat([gate[0].float(), up[0].float()], 1).to(torch.float8_e4m3fn), down_proj=down8,
        gate_up_scale=torch.stack([gate[1], up[1]], 1), down_scale=down_scale, **own,
    )  # fmt: skip


def unlike(weights: ExpertWeights) -> ExpertWeights:
    """Every factor of the routed experts differs much from its neighbours."""
    names = ("gate_up_scale", "down_scale")
    scales = {name: scale for name, scale in vars(weights).items() if name in names}
    return replace(weights, **{name: scale * (random(*scale.shape).abs() + 0.1) for name, scale in scales.items()})


def on(device: str, weights: ExpertWeights) -> ExpertWeights:
    return replace(weights, **{name: t.to(device) for name, t in vars(weights).items() if t is not None})


def choice(n: int, k: int, e: int, device: str, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Distinct experts per token, some experts never chosen, and positive weights."""
    score = random(n, e, seed=seed)
    score[:, 0] += 2.0  # one expert with many tokens
    score[:, -1] = -torch.inf  # and one with none
    ids = score.topk(k, -1).indices.to(torch.int32)
    return ids.to(device), random(n, k, seed=seed + 1).abs().to(device)


def error(out: Tensor, expected: Tensor) -> float:
    assert out.isfinite().all()
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel leaves unwritten is NaN, or an index far outside."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        return torch.full(shape, torch.nan if dtype.is_floating_point else 1 << 30, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize(
    ("n", "e", "k", "d", "i", "s", "tiles"),
    [
        (1, 4, 2, 64, 32, 2, ROWS), (3, 5, 3, 72, 40, 0, ROWS), (2, 4, 2, 136, 48, 1, ROWS),
        (1, 4, 2, 64, 32, 2, TILES), (3, 5, 3, 72, 40, 0, TILES), (21, 4, 2, 64, 48, 1, TILES),
        (5, 4, 2, 72, 40, 2, TALL), (70, 5, 3, 64, 48, 1, TALL), (3, 5, 3, 64, 32, 0, TALL),
        (1, 4, 2, 64, 32, 2, Sorted()), (3, 5, 3, 72, 40, 0, Sorted()), (21, 4, 2, 64, 48, 1, Sorted()),
    ],
)  # fmt: skip
def test_every_way_is_the_reference(
    n: int, e: int, k: int, d: int, i: int, s: int, tiles: Rows | Tiles | Sorted, device: str
) -> None:
    weights, x = on(device, experts(e, d, i, s)), random(n, d).to(device)
    ids, gates = choice(n, k, e, device)
    assert error(moe(x, weights, ids, gates, tiles=tiles), moe_ref(x, weights, ids, gates)) < 1e-5
    residual = random(n, d, seed=11).to(device)
    out = moe(x, weights, ids, gates, residual, tiles=tiles)
    assert error(out, moe_ref(x, weights, ids, gates) + residual) < 1e-5


@pytest.mark.parametrize(
    ("tiles", "n", "e", "k", "d", "i", "s"),
    [
        (ROWS, 2, 3, 2, 136, 144, 2), (FP8, 2, 3, 2, 144, 144, 2), (FP8, 19, 5, 3, 136, 200, 3),
        (Fp8Tiles(block_m=32, down_n=64), 21, 4, 2, 272, 80, 1),
        (Fp8Tiles(block_m=64, up_warps=8, down_warps=8), 70, 2, 1, 160, 256, 0),
        (Fp8Sorted(block_m=16), 19, 5, 3, 136, 200, 3), (Fp8Sorted(block_m=32, block_n=64), 70, 2, 1, 160, 144, 0),
    ],
)  # fmt: skip
def test_every_fp8_block_is_multiplied_by_its_own_factor_also_at_ragged_edges(
    tiles: Rows | Fp8Tiles, n: int, e: int, k: int, d: int, i: int, s: int, device: str
) -> None:
    weights, x = on(device, unlike(experts(e, d, i, s, fp8=True))), random(n, d).to(device)
    x[:, d // 2 :] *= 5  # blocks of unlike sizes, and tokens too
    x *= torch.logspace(-1, 0, n, device=device)[:, None]
    ids, gates = choice(n, k, e, device)
    quantised = not isinstance(tiles, Rows)
    bound = (1e-2 if device == "cuda" else 1e-3) if quantised else 1e-5  # h that is rounded to the other side
    out, expected = moe(x, weights, ids, gates, tiles=tiles), moe_ref(x, weights, ids, gates, quantised=quantised)
    assert error(out, expected) < bound
    assert error(out, moe_ref(x, weights, ids, gates)) < (8e-2 if quantised else 1e-5)
    assert weights.gate_up_scale is not None
    assert weights.down_scale is not None
    for wrong in (
        replace(weights, gate_up_scale=weights.gate_up_scale.flip(1)),  # gate's and up's factors exchanged
        replace(weights, down_scale=weights.down_scale.flip(1)),
    ):
        assert error(moe(x, wrong, ids, gates, tiles=tiles), expected) > 5e-2


@pytest.mark.parametrize("d", [128, 136, 320])
def test_activations_are_quantised_as_plain_torch_does_it(d: int, device: str) -> None:
    x = random(3, d).to(device) * torch.tensor([1e-7, 1.0, 1e4], device=device)[:, None]
    wide = torch.cat([x, x], 1)[:, :d]  # rows further apart than they are long
    for part in (x, wide, torch.zeros_like(x)):
        codes, factors = quantise(part)
        expected, expected_factors = quantise_rows(part.cpu())  # on a GPU torch divides by 448 otherwise
        assert torch.equal(factors.cpu(), expected_factors)
        assert torch.equal(codes.float().cpu(), expected.float())


def test_fp8_tiles_are_for_fp8_weights_and_for_no_others(device: str) -> None:
    ids, gates = choice(2, 2, 4, device)
    for fp8, tiles in ((True, TILES), (False, FP8)):
        weights = on(device, experts(4, 64, 32, 1, fp8=fp8))
        with pytest.raises(ValueError, match="-> use"):
            moe(random(2, 64).to(device), weights, ids, gates, tiles=tiles)
    weights = on(device, experts(4, 64, 32, 1, fp8=True))
    with pytest.raises(ValueError, match="down_n=256 crosses blocks"):
        moe(random(2, 64).to(device), weights, ids, gates, tiles=Fp8Tiles(down_n=256))


@ALL
def test_it_is_the_models_mixture_of_experts(tiles: Rows | Tiles | Sorted, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter has no product of bfloat16
    config = ModelConfig(hidden_size=64, moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=2)
    layer = MoE(config, LocalDispatcher())
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = random(*parameter.shape, seed=number) * 0.2
    layer = layer.to(device, dtype)
    x, residual = random(4, 64).to(device, dtype), random(4, 64, seed=1).to(device, dtype)
    shared = layer.shared_experts
    with torch.no_grad():
        sent = layer.dispatch(x)
        y, chosen = layer.combine(sent, layer.experts(sent))
        weights = ExpertWeights(
            gate_up_proj=layer.routed_experts.gate_up_proj, down_proj=layer.routed_experts.down_proj,
            shared_gate_proj=shared.gate_proj.weight, shared_up_proj=shared.up_proj.weight,
            shared_down_proj=shared.down_proj.weight,
        )  # fmt: skip
        norm = RMSNorm(64, 1e-6).to(device, dtype)
        norm.weight.copy_(random(64, seed=2))
        ids = chosen.topk_ids.to(torch.int32)
        normed, out = moe_norm(x, weights, ids, chosen.weights, residual, norm.weight, 1e-6, tiles=tiles)
        bound = 1e-5 if dtype == torch.float32 else 5e-3
        assert error(out, residual + y) < bound
        assert error(normed, norm(residual + y)) < bound


@pytest.mark.parametrize("neighbours", [True, False])
def test_gate_and_up_of_the_shared_experts_may_lie_in_one_storage(neighbours: bool, device: str) -> None:
    weights, x, (ids, gates) = on(device, experts(4, 64, 32, 2)), random(9, 64).to(device), choice(9, 2, 4, device)
    assert weights.shared_gate_proj is not None
    assert weights.shared_up_proj is not None
    expected = moe_ref(x, weights, ids, gates)
    order = (0, 1) if neighbours else (1, 0)
    storage = torch.cat([(weights.shared_gate_proj, weights.shared_up_proj)[i] for i in order])
    gate, up = (storage.split(64)[order.index(i)] for i in range(2))
    laid = replace(weights, shared_gate_proj=gate, shared_up_proj=up)
    assert error(moe(x, laid, ids, gates, tiles=Sorted()), expected) < 1e-5


@WAYS
def test_bfloat16_is_within_its_rounding_of_the_reference(tiles: Rows | Tiles, device: str) -> None:
    if device == "cpu" and tiles is TILES:
        pytest.skip("the interpreter has no product of bfloat16")
    bound = 1.5e-2 if device == "cuda" else 4e-2  # which cuts bfloat16 off instead of rounding it
    for fp8 in (False, True):
        way = FP8 if fp8 and tiles is TILES else tiles
        weights = on(device, experts(4, 128, 128, 1, fp8=fp8, dtype=torch.bfloat16))
        x, (ids, gates) = random(1, 128).to(device, torch.bfloat16), choice(1, 2, 4, device)
        expected = moe_ref(x, weights, ids, gates, quantised=way is FP8)
        assert error(moe(x, weights, ids, gates, tiles=way), expected) < bound


@pytest.mark.parametrize("tiles", [ROWS, TILES, TALL, FP8], ids=["rows", "tiles", "tall", "fp8"])
def test_results_repeat_and_a_token_does_not_see_its_neighbours(tiles: Rows | Tiles | Fp8Tiles, device: str) -> None:
    n = 4 if tiles is ROWS else 18  # more than one tile
    weights, x = on(device, experts(4, 64, 32, 1, fp8=tiles is FP8)), random(n, 64).to(device)
    ids, gates = choice(n, 2, 4, device)
    out = moe(x, weights, ids, gates, tiles=tiles)
    assert torch.equal(out, moe(x, weights, ids, gates, tiles=tiles))
    alone = moe(x[2:3], weights, ids[2:3].contiguous(), gates[2:3].contiguous(), tiles=tiles)
    assert torch.equal(out[2:3], alone)
    x[:2], x[3:] = torch.nan, torch.nan
    assert torch.equal(out[2:3], moe(x, weights, ids, gates, tiles=tiles)[2:3])


@pytest.mark.parametrize(("n", "k", "e", "s"), [(1, 2, 8, 1), (40, 3, 5, 2), (50, 1, 20, 0)])
def test_the_order_holds_every_pair_once_by_expert_and_token_and_tiles_cover_it(
    n: int, k: int, e: int, s: int, device: str
) -> None:
    ids, _ = choice(n, k, e, device)
    order, tiles, n_tiles = TILES.align(ids, e, s)
    routed = [(expert, t * (k + s) + j) for t, row in enumerate(ids.tolist()) for j, expert in enumerate(row)]
    shared = [(e + j, t * (k + s) + k + j) for t in range(n) for j in range(s)]
    assert order.tolist() == [pair for _, pair in sorted(routed + shared)]
    whole = [expert for expert, _ in sorted(routed + shared)]
    count = n_tiles.item()
    assert count <= len(tiles)
    seen: list[int] = []
    for expert, first, end in tiles[:count].tolist():
        places = range(first, min(first + TILES.block_m, end))
        assert len(places) > 0
        assert {whole[place] for place in places} == {expert}
        seen += places
    assert sorted(seen) == list(range(len(whole)))


def test_the_grid_has_room_for_the_worst_choice() -> None:
    for n, k, e in [(1, 6, 64), (8, 2, 4), (33, 1, 7), (64, 6, 64)]:
        for share in range(1, n * k + 1):  # `share` pairs of one expert each, the last takes the rest
            touched = min(e, n * k, share)
            counts = [1] * (touched - 1) + [n * k - touched + 1]
            assert sum(-(-c // 16) for c in counts) <= TILES.most_tiles(n, k, e, 0)


def test_more_pairs_per_expert_give_taller_tiles() -> None:
    ways = [choose_tiles(n, 6, 64, torch.bfloat16) for n in (1, 4, 5, 128, 256, 512, 1024, 4096)]
    assert [type(way) for way in ways] == [Rows] * 2 + [Tiles] * 5 + [Sorted]
    assert [way.block_m for way in ways if isinstance(way, Tiles)] == [16, 64, 64, 64, 128]
    ways = [choose_tiles(n, 6, 64, torch.float8_e4m3fn) for n in (1, 4, 5, 64, 256, 512, 4096)]
    assert [type(way) for way in ways] == [Rows] * 2 + [Fp8Tiles] * 4 + [Fp8Sorted]
    assert [way.block_m for way in ways if isinstance(way, Fp8Tiles)] == [16, 16, 32, 64]


def test_no_tokens_give_no_rows_and_misfits_are_refused(device: str) -> None:
    weights, x = on(device, experts(4, 64, 32, 1)), random(2, 64).to(device)
    ids, gates = choice(2, 2, 4, device)
    assert moe(x[:0], weights, ids[:0], gates[:0]).shape == (0, 64)
    with pytest.raises(ValueError, match="does not fit weights of 64"):
        moe(x[:, :32], weights, ids, gates)
    with pytest.raises(ValueError, match="ids must be int32"):
        moe(x, weights, ids.long(), gates)
    with pytest.raises(ValueError, match="for 2 tokens"):
        moe(x, weights, ids[:1], gates)
    with pytest.raises(ValueError, match="residual"):
        moe(x, weights, ids, gates, x[:1])
    with pytest.raises(ValueError, match=r"shared_up_proj is missing, expected \(32, 64\)"):
        replace(weights, shared_up_proj=None)
    with pytest.raises(ValueError, match="gate_up_scale has no place"):
        replace(weights, gate_up_scale=torch.ones(4, 2, 1, 1))
    with pytest.raises(ValueError, match="not contiguous"):
        replace(weights, down_proj=weights.down_proj.transpose(1, 2).contiguous().transpose(1, 2))
