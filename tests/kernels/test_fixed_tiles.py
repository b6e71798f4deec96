"""With tiles that do not follow the number of tokens, attention, router and experts give a token the same bits in any
company. The tiles that kernels choose for speed do follow it."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")
from benthic.kernels import mla_decode, moe, route
from benthic.kernels.latent import empty_latents
from benthic.kernels.moe import ExpertWeights

pytestmark = pytest.mark.usefixtures("one_order")

CUTS = [(0, 1), (4, 5), (1, 6), (2, 19)]


def dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def random(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype(device))


@pytest.mark.parametrize("format", ["auto", "int6"])
def test_attention_of_a_row_sees_neither_other_rows_nor_the_tables_width(format, device, monkeypatch) -> None:
    page, heads, width = 16, 2, 64
    latents = empty_latents(format, 16 * page, width, 16, dtype(device), device)
    latents.write(
        torch.arange(16 * page, device=device), random(device, 16 * page, width), random(device, 16 * page, 16)
    )
    fixed = mla_decode.fixed_tiles(latents, heads, page)
    tiles = mla_decode.Tiles(**{**vars(fixed), "splits": 4, "shortest": 32})  # several stretches, of several lengths
    table = torch.randint(1, 16, (6, 12), generator=torch.Generator().manual_seed(0)).to(device, torch.int32)
    context = torch.tensor([1, 33, 180, 64, 0, 129], device=device, dtype=torch.int32)
    q, q_rope = random(device, heads, 6, width), random(device, 6, heads, 16)

    def attend(rows: list[int], wider: int = 0) -> Tensor:
        own = torch.nn.functional.pad(table[rows], (0, wider)).contiguous()
        return mla_decode.mla_decode(
            q[:, rows], q_rope[rows].contiguous(), latents, own, context[rows].contiguous(), page_size=page,
            scale=0.2, tiles=tiles,
        )  # fmt: skip

    whole = attend(list(range(6)))
    ref = mla_decode.mla_decode_ref(q, q_rope, latents, table, context, page_size=page, scale=0.2)
    assert (whole.float() - ref.float()).norm() / ref.float().norm() < 1e-2
    for rows in ([2], [5, 2], [3, 1, 0], [4, 5]):
        assert torch.equal(attend(rows, wider=3), whole[:, rows])


def test_the_stretches_of_fixed_tiles_follow_the_context_alone(device) -> None:
    latents = empty_latents("auto", 64, 64, 16, dtype(device), device)
    chosen = [mla_decode.choose_tiles(latents, rows, 2, 64, 4096) for rows in (1, 32, 256)]
    assert len({tiles.splits for tiles in chosen}) > 1  # the negative control
    fixed = mla_decode.fixed_tiles(latents, 2, 64)
    assert (fixed.splits, fixed.shortest % fixed.block_n) == (16, 0)


def test_the_router_gives_a_token_the_same_bits_in_any_company(device) -> None:
    x, residual, weight = random(device, 19, 200), random(device, 19, 200), random(device, 8, 200)
    scale = random(device, 200) + 1

    def choose(rows: slice, tiles: route.Tiles) -> tuple[Tensor, Tensor]:
        _, _, logits = route.add_norm_logits(x[rows], residual[rows], scale, 1e-6, weight, tiles=tiles)
        return route.choose(
            logits, None, num_experts_per_tok=3, scoring_func="softmax", topk_method="greedy", n_group=1,
            topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0,
        )  # fmt: skip

    whole = choose(slice(None), route.FIXED)
    for begin, end in CUTS:
        for found, expected in zip(choose(slice(begin, end), route.FIXED), whole):
            assert torch.equal(found, expected[begin:end])
    few, many = choose(slice(0, 1), route.Tiles())[1], choose(slice(None), route.Tiles())[1]
    assert not torch.equal(few, many[:1])  # the negative control


def test_experts_give_a_token_the_same_bits_in_any_company(device) -> None:
    n, d, i, e, k = 19, 80, 48, 4, 2
    weights = ExpertWeights(
        gate_up_proj=random(device, e, 2 * i, d), down_proj=random(device, e, d, i),
        shared_gate_proj=random(device, 2 * i, d), shared_up_proj=random(device, 2 * i, d) + 1,
        shared_down_proj=random(device, d, 2 * i),
    )  # fmt: skip
    x, share = random(device, n, d), random(device, n, k).float().abs()
    ids = torch.rand(n, e, generator=torch.Generator().manual_seed(1)).topk(k).indices.int().to(device)
    tiles = moe.fixed_tiles(x.dtype)

    def visit(rows) -> Tensor:
        return moe.moe(x[rows].contiguous(), weights, ids[rows].contiguous(), share[rows].contiguous(), tiles=tiles)

    whole = visit(slice(None))
    for begin, end in CUTS:
        assert torch.equal(visit(slice(begin, end)), whole[begin:end])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2)).to(device)
    assert torch.equal(visit(order), whole[order])
    ways = {moe.choose_tiles(rows, 6, 64, torch.bfloat16) for rows in (1, 32, 256, 512, 8192)}
    assert len(ways) > 3  # the negative control


def test_the_sum_over_experts_is_cut_alike_for_any_number_of_tokens(device, monkeypatch) -> None:
    """The interpreter has no warps whose sums could differ, so what is asked for is looked at."""
    d, warps = 2048, []

    class Spy:
        def __getitem__(self, grid):
            return lambda *_, num_warps, **__: warps.append(num_warps)

    monkeypatch.setattr(moe, "_combine", Spy())
    for way in (moe.Rows, moe.Tiles):
        monkeypatch.setattr(way, "outputs", lambda self, x, weights, ids: x.new_empty(len(x), ids.shape[1], d))
    weights = ExpertWeights(gate_up_proj=random(device, 4, 32, d), down_proj=random(device, 4, d, 16))
    for tiles in (moe.fixed_tiles(dtype(device)), None):
        for n in (1, 40):
            ids, share = torch.zeros(n, 2, dtype=torch.int32, device=device), torch.ones(n, 2, device=device)
            moe.moe(random(device, n, d), weights, ids, share, tiles=tiles)
    assert warps[0] == warps[1]
    assert warps[2] != warps[3]  # the negative control
