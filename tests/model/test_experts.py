"""Experts compared, joined and left out: against formulas, loops, planted twins, and transformers."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benthic.base.errors import InputError
from benthic.model import experts, hf
from benthic.model.balance import expert_load
from benthic.model.config import ModelConfig
from benthic.model.experts import Mixture, Plan
from benthic.model.transformer import Transformer

FREE = {"n_group": 2, "topk_group": 2, "num_nextn_predict_layers": 0}  # every group may be reached
ONE_GROUP = FREE | {"n_group": 1, "topk_group": 1}
V2: dict[str, Any] = {
    "model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0,
    "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(2, 61, (rows, tokens), generator=torch.Generator().manual_seed(0))


def mixture(n: int = 6, d: int = 32, width: int = 16, dtype: torch.dtype = torch.float32) -> Mixture:
    return Mixture(
        gate=random(n, d).to(dtype),
        gate_up=random(n, 2 * width, d, seed=1).to(dtype),
        down=random(n, d, width, seed=2).to(dtype),
        bias=random(n, seed=3),
    )


def plant_twin(m: Mixture, of: int, at: int) -> None:
    """Expert `at` becomes expert `of` with its inner units in another order, and gets its gate row."""
    width = m.down.shape[-1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(7))
    m.gate[at] = m.gate[of]
    m.gate_up[at] = torch.cat((m.gate_up[of][:width][order], m.gate_up[of][width:][order]))
    m.down[at] = m.down[of][:, order]


def loads(model: Transformer, ids: Tensor) -> list[Tensor]:
    return [expert_load(choice, model.config.n_routed_experts, None) for choice in model.hidden(ids)[1]]


def reduced(model: Transformer, plans: list[Plan], load: list[Tensor] | None = None) -> Transformer:
    found = experts.mixtures(model)
    loads = load or [None] * len(plans)
    return experts.rebuild(
        model, {n: experts.applied(m, plan, used) for (n, m), plan, used in zip(found.items(), plans, loads)}
    )


# Similarity


def test_what_all_centroids_share_makes_none_alike() -> None:
    gate = random(6, 32)
    shifted = gate + 5 * random(32, seed=9)
    assert (experts.centroid_similarity(gate) - experts.centroid_similarity(shifted)).abs().max() < 1e-5
    plain = torch.nn.functional.normalize(shifted, dim=-1)
    assert (plain @ plain.T).min() > 0.8  # without the mean taken off, all would look alike


def test_a_softmax_gate_cannot_see_what_all_centroids_share(tiny: ModelConfig, build) -> None:
    model = build(dataclasses.replace(tiny, **V2))
    ids, before = ids_of(2, 30), model(ids_of(2, 30))
    for m in experts.mixtures(model).values():
        m.gate += 0.5 * random(m.gate.shape[1])
    assert (model(ids) - before).abs().max() < 1e-4


def test_a_permuted_copy_answers_alike_and_matches_though_its_weights_lie_elsewhere() -> None:
    m = mixture()
    plant_twin(m, of=1, at=4)
    alike = experts.output_similarity(m)
    assert alike[1, 4] > 0.99999
    alike[1, 4] = alike[4, 1] = 0
    assert (alike - torch.eye(6)).abs().max() < 0.3
    assert experts.weight_similarity(m, 1, 4) > 0.99999
    assert experts.weight_similarity(m, 1, 3) < 0.4
    unmatched = torch.nn.functional.cosine_similarity(m.down[1].flatten(), m.down[4].flatten(), 0)
    assert unmatched < 0.3


def test_a_row_of_zeros_is_like_nothing_and_no_nan() -> None:
    m = mixture()
    m.down[2] = 0
    alike = experts.output_similarity(m)
    assert alike.isfinite().all()
    assert (alike[2] == 0).all()


# Matching


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_greedy_by_definition(seed: int) -> None:
    scores = random(20, 20, seed=seed)
    left, expected = scores.clone(), [0] * 20
    for _ in range(20):
        row, column = divmod(int(left.argmax()), 20)
        expected[row] = column
        left[row], left[:, column] = -torch.inf, -torch.inf
    assert experts.match(scores).tolist() == expected


def test_matching_ends_where_all_scores_are_equal() -> None:
    assert sorted(experts.match(torch.zeros(9, 9)).tolist()) == list(range(9))


@pytest.mark.parametrize("load", [None, torch.tensor([3.0, 7.0, 1.0, 2.0, 5.0, 1.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_permuted_copy_merges_back_to_exactly_the_expert(dtype: torch.dtype, load: Tensor | None) -> None:
    m = mixture(dtype=dtype)
    plant_twin(m, of=1, at=4)
    m.bias[4] = m.bias[1]
    merged = experts.applied(m, [[0], [1, 4]], load)
    lead = 1 if load is None else int(load[[1, 4]].argmax()) * 3 + 1
    for field in ("gate", "gate_up", "down", "bias"):
        assert torch.equal(getattr(merged, field)[1], getattr(m, field)[lead]), field
        assert torch.equal(getattr(merged, field)[0], getattr(m, field)[0]), field
        assert getattr(merged, field).dtype == getattr(m, field).dtype


def test_without_matching_the_permuted_copy_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    m = mixture()
    plant_twin(m, of=1, at=4)
    monkeypatch.setattr(experts, "aligned", lambda to, moved: moved)
    merged = experts.applied(m, [[1, 4]], None)
    both = Mixture(
        gate=m.gate[:2],
        gate_up=torch.stack((m.gate_up[1], merged.gate_up[0])),
        down=torch.stack((m.down[1], merged.down[0])),
    )
    assert experts.output_similarity(both)[0, 1] < 0.7


# Means


def near_copies() -> Mixture:
    """Three experts so close to one another that matching moves no unit."""
    m = mixture(3)
    for tensor in (m.gate_up, m.down):
        tensor[1:] = tensor[:1] + 0.01 * tensor[1:]
    return m


def test_a_cluster_becomes_the_mean_by_load() -> None:
    m, load = near_copies(), torch.tensor([2, 5, 3])
    merged = experts.applied(m, [[0, 1, 2]], load)
    for field in ("gate", "gate_up", "down", "bias"):
        old = getattr(m, field)
        torch.testing.assert_close(getattr(merged, field)[0], torch.einsum("e,e...->...", load / 10, old))


@pytest.mark.parametrize("load", [None, torch.zeros(3, dtype=torch.int64)])
def test_without_load_it_is_the_plain_mean(load: Tensor | None) -> None:
    m = near_copies()
    merged = experts.applied(m, [[0, 1, 2]], load)
    for field in ("gate", "gate_up", "down", "bias"):
        torch.testing.assert_close(getattr(merged, field)[0], getattr(m, field).mean(0))


def test_an_idle_expert_leaves_no_trace_in_the_one_it_joins() -> None:
    m = mixture()
    merged = experts.applied(m, [[2, 5]], torch.tensor([1, 1, 0, 1, 1, 9]))
    for field in ("gate", "gate_up", "down", "bias"):
        assert torch.equal(getattr(merged, field)[0], getattr(m, field)[5])


# Plans


def test_the_most_used_of_every_group_are_kept_and_ties_go_to_the_lower_number() -> None:
    load = torch.tensor([5, 9, 1, 7, 100, 90, 80, 80])
    assert experts.most_used(load, 2, 4) == [[1], [3], [4], [5]]
    assert experts.most_used(load, 2, 6) == [[0], [1], [3], [4], [5], [6]]
    assert experts.most_used(load, 1, 4) == [[4], [5], [6], [7]]


def by_loops(similarity: Tensor, groups: int, keep: int) -> Plan:
    size, plan = len(similarity) // groups, []
    for first in range(0, len(similarity), size):
        clusters = [[expert] for expert in range(first, first + size)]
        while len(clusters) > keep // groups:

            def alike(pair: tuple[list[int], list[int]]) -> float:
                values = [similarity[i, j].item() for i in pair[0] for j in pair[1]]
                return sum(values) / len(values)

            a, b = max(itertools.combinations(clusters, 2), key=alike)
            a += b
            clusters.remove(b)
        plan += [sorted(cluster) for cluster in clusters]
    return plan


@pytest.mark.parametrize(("groups", "keep"), [(1, 5), (2, 4), (4, 8), (4, 4)])
def test_the_most_alike_are_joined_as_loops_over_the_definition_would(groups: int, keep: int) -> None:
    similarity = experts.centroid_similarity(random(16, 8))
    plan = experts.most_alike(similarity, groups, keep)
    assert plan == by_loops(similarity, groups, keep)
    assert sorted(itertools.chain.from_iterable(plan)) == list(range(16))
    homes = [{expert // (16 // groups) for expert in cluster} for cluster in plan]
    assert homes == [{i // (keep // groups)} for i in range(keep)]


def test_planted_twins_are_joined_first() -> None:
    m = mixture(8)
    plant_twin(m, of=1, at=3)
    plant_twin(m, of=6, at=4)
    assert experts.most_alike(experts.centroid_similarity(m.gate), 2, 6) == [[0], [1, 3], [2], [4, 6], [5], [7]]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "use 1 to 7"),
        (8, "use 1 to 7"),
        (6, "keep=6 cannot be routed.*n_group=4"),
        (4, "keep=4.*num_experts_per_tok=3"),
    ],
)
def test_what_cannot_be_routed_is_refused_by_name(tiny: ModelConfig, keep: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        experts.smaller_config(tiny, keep)


# Whole models


@torch.no_grad()
def test_dropping_experts_that_no_token_reached_changes_no_logit(tiny: ModelConfig, build) -> None:
    model, ids = build(dataclasses.replace(tiny, **FREE)), ids_of(3, 40)
    for gate in model.gates():
        gate.e_score_correction_bias[[2, 7]] = -9.0
    load = loads(model, ids)
    assert all(used[2] == used[7] == 0 for used in load)
    smaller = reduced(model, [experts.most_used(used, 2, 6) for used in load])
    assert smaller.config.n_routed_experts == 6
    assert (smaller(ids) - model(ids)).abs().max() < 1e-5
    assert [used.tolist() for used in loads(smaller, ids)] == [used[[0, 1, 3, 4, 5, 6]].tolist() for used in load]


@torch.no_grad()
def test_dropping_an_expert_that_tokens_reached_does(tiny: ModelConfig, build) -> None:
    model, ids = build(dataclasses.replace(tiny, **FREE)), ids_of(3, 40)
    smaller = reduced(model, [experts.most_used(used, 2, 6) for used in loads(model, ids)])
    assert (smaller(ids) - model(ids)).abs().max() > 1e-2


@torch.no_grad()
def test_where_groups_are_limited_an_expert_without_tokens_may_have_won_them_for_its_group(
    tiny: ModelConfig, build
) -> None:
    config = dataclasses.replace(tiny, n_group=2, topk_group=1, num_experts_per_tok=1, num_nextn_predict_layers=0)
    model, ids = build(config), ids_of(2, 30)
    for gate in model.gates():  # group 0 is worth at least 3.0 + 1.9, group 1 at most 4.5
        gate.e_score_correction_bias.copy_(torch.tensor([3.0, -9.0, -9.0, 1.9, 2.5, 0.0, -9.0, -9.0]))
    load = loads(model, ids)
    assert all(used[0] == ids.numel() for used in load)
    plans = [experts.most_used(used, 2, 4) for used in load]
    assert plans[0] == [[0], [1], [4], [5]]
    assert all(used[0] == 0 for used in loads(reduced(model, plans), ids))


@torch.no_grad()
def test_a_softmax_gate_without_normalisation_weighs_the_rest_by_what_is_left_of_its_mass(
    tiny: ModelConfig, build
) -> None:
    model = build(dataclasses.replace(tiny, **V2 | {"topk_method": "greedy", "n_group": 1}))
    smaller = reduced(model, [[[e] for e in range(6)]] * 2)
    x = random(50, 32)
    before, after = model.gates()[0](x), smaller.gates()[0](x)
    same = (before.topk_ids < 6).all(1)
    assert same.any()
    left = 1 - before.scores[:, 6:].sum(1, keepdim=True)
    assert torch.equal(before.topk_ids[same], after.topk_ids[same])
    torch.testing.assert_close(after.weights[same], (before.weights / left)[same])


def with_twins(config: ModelConfig, build: Callable[..., Transformer]) -> Transformer:
    model = build(config)
    for m in experts.mixtures(model).values():
        plant_twin(m, of=1, at=2)
        assert m.bias is not None
        m.bias[2] = m.bias[1]
    return model


@torch.no_grad()
def test_twins_of_which_no_token_chose_both_merge_without_a_trace(tiny: ModelConfig, build) -> None:
    model, ids = with_twins(dataclasses.replace(tiny, **ONE_GROUP | {"num_experts_per_tok": 1}), build), ids_of(3, 40)
    load = loads(model, ids)
    assert any(used[1] + used[2] > 0 for used in load)
    plan = [[0], [1, 2], [3], [4], [5], [6], [7]]
    for used in (None, load):
        merged = reduced(model, [plan] * 2, used)
        assert (merged(ids) - model(ids)).abs().max() < 1e-5


@torch.no_grad()
def test_twins_that_tokens_chose_together_count_once_after_merging(tiny: ModelConfig, build) -> None:
    """Each token that had both gets its next best expert beside the one: no mean of weights can give two votes."""
    model, ids = with_twins(dataclasses.replace(tiny, **ONE_GROUP), build), ids_of(3, 40)
    choices = model.hidden(ids)[1]
    assert any(((c.topk_ids == 1).any(1) & (c.topk_ids == 2).any(1)).any() for c in choices)
    merged = reduced(model, [[[0], [1, 2], [3], [4], [5], [6], [7]]] * 2)
    assert (merged(ids) - model(ids)).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("change", [{"n_group": 2, "topk_group": 1}, V2], ids=["V3", "V2"])
@pytest.mark.parametrize("action", ["prune", "merge"])
def test_the_smaller_folder_loads_here_and_in_transformers_with_equal_logits(
    tmp_path: Path, tiny: ModelConfig, build, change: dict[str, Any], action: str
) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, ids = build(dataclasses.replace(tiny, **change)), ids_of(3, 40)
    load = [torch.arange(8).roll(i) for i in range(len(model.gates()))]
    found = experts.mixtures(model).values()
    if action == "prune":
        plans = [experts.most_used(used, 2, 6) for used in load]
    else:
        plans = [experts.most_alike(experts.centroid_similarity(m.gate), 2, 6) for m in found]
    smaller = reduced(model, plans, load)
    hf.write_model(tmp_path / "m", smaller, None)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert reference.config.n_routed_experts == 6
    expected = reference(ids).logits
    assert expected.std() > 0.3
    loaded, _ = hf.load(tmp_path / "m", device="cpu")
    assert loaded.config == dataclasses.replace(model.config, n_routed_experts=6)
    assert (loaded(ids) - expected).abs().max() < 2e-5
    assert (model(ids) - expected).abs().max() > 1e-2


def test_all_but_the_experts_is_shared_and_their_dtype_stays(tiny: ModelConfig, build) -> None:
    model = build(dataclasses.replace(tiny, n_group=2, topk_group=1), dtype=torch.bfloat16).to(torch.bfloat16)
    smaller = reduced(model, [[[e] for e in (0, 1, 2, 4, 5, 6)]] * 3)
    assert smaller.embed_tokens.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    dtypes = {name: t.dtype for name, t in smaller.state_dict().items()}
    assert dtypes == {name: t.dtype for name, t in model.state_dict().items()}
    assert torch.equal(smaller.gates()[2].weight, model.gates()[2].weight[[0, 1, 2, 4, 5, 6]])
