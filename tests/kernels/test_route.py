"""The router kernels against the model's gate, tie by tie and group by group."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need Triton")

from benthic.kernels.norm import add_rms_norm_ref
from benthic.kernels.route import Tiles, add_norm_logits, add_norm_logits_ref, choose, choose_ref
from benthic.model.config import ModelConfig
from benthic.model.gate import Gate

pytestmark = pytest.mark.usefixtures("one_order")

EPS = 0.0
ROWS, TILES = Tiles(rows_block=32), Tiles(rows_max=0, tile_experts=16, tile_block=32)
PUBLISHED = {  # scaled down: family member -> experts, groups, kept groups, K, method, scoring, normalised
    "V2-Lite": (16, 1, 1, 6, "greedy", "softmax", False),
    "V2": (20, 4, 2, 3, "group_limited_greedy", "softmax", False),
    "V3": (32, 8, 4, 4, "noaux_tc", "sigmoid", True),
    "one group": (12, 1, 1, 3, "noaux_tc", "sigmoid", True),
    "softmax with bias": (12, 3, 2, 3, "noaux_tc", "softmax", False),
}


def options(config: ModelConfig) -> dict:
    names = ["num_experts_per_tok", "scoring_func", "topk_method", "n_group", "topk_group", "norm_topk_prob"]
    return {name: getattr(config, name) for name in [*names, "routed_scaling_factor"]}


def gate_of(member: str, d: int, device: str, seed: int = 0) -> Gate:
    e, groups, kept, k, method, scoring, normalised = PUBLISHED[member]
    config = ModelConfig(
        hidden_size=d, n_routed_experts=e, n_group=groups, topk_group=kept, num_experts_per_tok=k, topk_method=method,
        scoring_func=scoring, norm_topk_prob=normalised, routed_scaling_factor=2.5,
    )  # fmt: skip
    gate, generator = Gate(config).to(device), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(e, d, generator=generator) * 0.3)
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.copy_(torch.randn(e, generator=generator) * 0.2)
    return gate


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, tiles: Tiles | None = None, **config
) -> tuple[Tensor, Tensor]:
    """The two launches behind each other, for rows whose norm is the row itself."""
    ones = torch.ones(x.shape[1], device=x.device, dtype=x.dtype)
    return choose(add_norm_logits(x, torch.zeros_like(x), ones, EPS, weight, tiles=tiles)[2], bias, **config)


def route_ref(x: Tensor, weight: Tensor, bias: Tensor | None, **config) -> tuple[Tensor, Tensor]:
    return choose_ref(x.float() @ weight.float().T, bias, **config)


HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter cannot multiply bfloat16


def tokens(n: int, d: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 9) -> Tensor:
    """Signs: rows whose norm is the row itself, so that nothing is rounded before the logits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(n, d, generator=generator) < 0.5, -1.0, 1.0).to(device, dtype)


def margin(gate: Gate, x: Tensor) -> Tensor:
    """The smallest gap that decides [N]: between neighbours among the K + 1 best live experts, and between groups."""
    c = gate.config
    with torch.no_grad():
        scores = gate(x).scores
    score = scores if gate.e_score_correction_bias is None else scores + gate.e_score_correction_bias
    gaps = []
    if c.topk_method != "greedy" and c.topk_group < c.n_group:
        members = score.unflatten(-1, (c.n_group, -1))
        worth = members.topk(2 if c.topk_method == "noaux_tc" else 1, -1).values.sum(-1)
        order = worth.sort(-1, descending=True)
        gaps.append(order.values[:, c.topk_group - 1] - order.values[:, c.topk_group])
        live = torch.zeros_like(worth).scatter_(1, order.indices[:, : c.topk_group], 1.0).bool()
        score = members.masked_fill(~live.unsqueeze(-1), -torch.inf).flatten(-2)
    best = score.sort(-1, descending=True).values[:, : c.num_experts_per_tok + 1]
    gaps.append((best[:, :-1] - best[:, 1:]).amin(-1))
    return torch.stack(gaps).amin(0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("member", "tiles"), [(m, TILES if i % 2 else ROWS) for i, m in enumerate(PUBLISHED)])
def test_the_choice_is_the_models_wherever_it_is_not_a_near_tie(
    member: str, tiles: Tiles, dtype: torch.dtype, device: str
) -> None:
    gate, x = gate_of(member, 72, device), tokens(18, 72, device, dtype)
    gate = gate.to(dtype)
    with torch.no_grad():
        expected = gate(x)
    ids, weights = route(x, gate.weight.detach(), gate.e_score_correction_bias, tiles=tiles, **options(gate.config))
    clear = margin(gate, x) > 1e-6
    assert clear.sum() > 15
    assert torch.equal(ids[clear].long(), expected.topk_ids[clear])
    torch.testing.assert_close(weights[clear], expected.weights[clear], rtol=1e-5, atol=1e-6)
    ref_ids, ref_weights = route_ref(x, gate.weight.detach(), gate.e_score_correction_bias, **options(gate.config))
    assert torch.equal(ref_ids[clear].long(), expected.topk_ids[clear])
    torch.testing.assert_close(ref_weights[clear], expected.weights[clear], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("tiles", [ROWS, TILES], ids=["rows", "tiles"])
def test_sum_norm_and_logits_are_those_of_plain_torch(tiles: Tiles, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(4, 5, 90, generator=generator).to(device, dtype)
    x, residual, norm_weight, weight = wide[0, :, :72], wide[1, :, 9:81], wide[2, 0, :72], wide[3, :, :72].contiguous()
    found = add_norm_logits(x, residual, norm_weight, 1e-6, weight, tiles=tiles)
    plain = add_norm_logits_ref(x, residual, norm_weight, 1e-6, weight)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for mine, theirs in zip(found, plain):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=10 * tolerance)
    assert torch.equal(found[1], add_rms_norm_ref(x, residual, norm_weight, 1e-6)[1])


@pytest.mark.parametrize("member", ["V2-Lite", "V3"])
def test_the_lowest_index_wins_a_tie(member: str, device: str) -> None:
    gate = gate_of(member, 16, device)
    with torch.no_grad():
        gate.weight.zero_()
    bias = None if gate.e_score_correction_bias is None else torch.zeros(len(gate.weight), device=device)
    ids, _ = route(tokens(2, 16, device), gate.weight.detach(), bias, **options(gate.config))
    k = gate.config.num_experts_per_tok
    assert torch.equal(ids.cpu(), torch.arange(k, dtype=torch.int32).expand(2, k))


def test_a_negative_biased_score_still_beats_a_losing_group(device: str) -> None:
    gate, x = gate_of("V3", 16, device), tokens(5, 16, device)
    bias = gate.e_score_correction_bias
    assert bias is not None
    bias -= 5.0
    with torch.no_grad():
        expected = gate(x)
    ids, weights = route(x, gate.weight.detach(), bias, **options(gate.config))
    assert torch.equal(ids.long(), expected.topk_ids)
    torch.testing.assert_close(weights, expected.weights, rtol=1e-5, atol=1e-6)
    assert (weights > 0).all()


@pytest.mark.parametrize("member", ["V2", "V3"])
def test_scores_that_are_nan_choose_experts_that_exist_and_say_nan(member: str, device: str) -> None:
    gate, x = gate_of(member, 16, device), tokens(3, 16, device)
    x[1, 4] = torch.nan
    ids, weights = route(x, gate.weight.detach(), gate.e_score_correction_bias, **options(gate.config))
    assert ((ids >= 0) & (ids < len(gate.weight))).all()
    assert weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tiles", [ROWS, TILES], ids=["rows", "tiles"])
def test_both_ways_to_the_logits_choose_alike(tiles: Tiles, device: str) -> None:
    gate, x = gate_of("V3", 72, device), tokens(17, 72, device)
    ids, _ = route(x, gate.weight.detach(), gate.e_score_correction_bias, tiles=tiles, **options(gate.config))
    ref_ids, _ = route_ref(x, gate.weight.detach(), gate.e_score_correction_bias, **options(gate.config))
    assert torch.equal(ids, ref_ids)


@pytest.mark.parametrize("tiles", [ROWS, TILES], ids=["rows", "tiles"])
def test_a_token_is_routed_as_if_it_were_alone(tiles: Tiles, device: str) -> None:
    gate, x = gate_of("V3", 40, device), tokens(16, 40, device)
    ids, weights = route(x, gate.weight.detach(), gate.e_score_correction_bias, tiles=tiles, **options(gate.config))
    alone = route(x[7:8], gate.weight.detach(), gate.e_score_correction_bias, tiles=tiles, **options(gate.config))
    assert torch.equal(ids[7:8], alone[0])
    assert torch.equal(weights[7:8], alone[1])


def test_what_cannot_be_chosen_is_refused(device: str) -> None:
    gate, x = gate_of("V3", 16, device), tokens(2, 16, device)
    weight, bias, good = gate.weight.detach(), gate.e_score_correction_bias, options(gate.config)
    with pytest.raises(ValueError, match=r"needs a float32 bias \[32\]"):
        route(x, weight, None, **good)
    with pytest.raises(ValueError, match="must share d"):
        route(x[:, :8], weight, bias, **good)
    with pytest.raises(ValueError, match="17 of 32 experts from 4 of 8 groups cannot be chosen"):
        route(x, weight, bias, **good | {"num_experts_per_tok": 17})
    assert route(x[:0], weight, bias, **good)[0].shape == (0, 4)
