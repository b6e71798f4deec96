"""Routed experts compared, joined and left out: which are alike, which to keep, and the smaller mixture.

A plan is a list of clusters, one per expert of the smaller mixture: the old experts that become it. A cluster of one
keeps that expert; an expert in no cluster is dropped. Groups keep their order and stay equally large.
Letters: E routed experts, d hidden, I expert width, P probes.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.base.errors import InputError
from benthic.model.config import ModelConfig
from benthic.model.moe import MoE
from benthic.model.transformer import Transformer

PROBES = 64  # random inputs on which experts are compared
NAMES = {
    "gate": "gate.weight",
    "bias": "gate.e_score_correction_bias",
    "gate_up": "routed_experts.gate_up_proj",
    "down": "routed_experts.down_proj",
}

Plan = list[list[int]]


@dataclass
class Mixture:
    """What one layer holds per expert: gate [E, d], gate_up [E, 2I, d], down [E, d, I], bias [E] or None."""

    gate: Tensor
    gate_up: Tensor
    down: Tensor
    bias: Tensor | None = None


def mixtures(model: Transformer) -> dict[str, Mixture]:
    """Module name -> the layer's experts, sharing the model's memory; in the order in which `hidden` and then the MTP
    modules report their choices."""
    state, found = model.state_dict(), {}
    for name in (name for name, module in model.named_modules() if isinstance(module, MoE)):
        tensors = {field: state.get(f"{name}.{tail}") for field, tail in NAMES.items()}
        found[name] = Mixture(**{field: tensor for field, tensor in tensors.items() if tensor is not None})
    return found


def smaller_config(config: ModelConfig, keep: int) -> ModelConfig:
    """The configuration with `keep` experts per layer. InputError names keep where it cannot be."""
    if not 0 < keep < config.n_routed_experts:
        raise InputError(
            f"keep={keep} -> use 1 to {config.n_routed_experts - 1}: the model has {config.n_routed_experts} experts"
        )
    try:
        return dataclasses.replace(config, n_routed_experts=keep)
    except InputError as error:
        raise InputError(f"keep={keep} cannot be routed: {error}") from error


def rebuild(model: Transformer, smaller: dict[str, Mixture]) -> Transformer:
    """The model with these mixtures in place of its own; everything else is shared with it, not copied."""
    keep = len(next(iter(smaller.values())).gate)
    with torch.device("meta"):
        built = Transformer(smaller_config(model.config, keep), dtype=model.dtype)
    state = model.state_dict()
    for name, mixture in smaller.items():
        tensors = {tail: getattr(mixture, field) for field, tail in NAMES.items()}
        state |= {f"{name}.{tail}": tensor for tail, tensor in tensors.items() if tensor is not None}
    built.load_state_dict(state, assign=True)
    return built.eval()


def centroid_similarity(gate: Tensor) -> Tensor:
    """Cosines between the centroids e_i, the rows of the gate [E, d], less their mean -> [E, E].

    The mean is taken off because it tells no expert from another: what all rows share moves all logits alike.
    """
    gate = gate.float()
    return _cosines(gate - gate.mean(0))


def output_similarity(mixture: Mixture) -> Tensor:
    """Cosines between the experts' answers to the same P random inputs -> [E, E]: whether they do the same, in
    whatever order their inner units are."""
    _, width, d = mixture.gate_up.shape
    x = torch.randn(PROBES, d, generator=torch.Generator().manual_seed(0)).to(mixture.gate_up.device)
    outputs = []
    for gate_up, down in zip(mixture.gate_up, mixture.down):
        gate, up = (x @ gate_up.float().T).split(width // 2, -1)  # [P, I] each
        outputs.append(((F.silu(gate) * up) @ down.float().T).flatten())  # [P * d]
    return _cosines(torch.stack(outputs))


def weight_similarity(mixture: Mixture, a: int, b: int) -> float:
    """Cosine between all weights of two experts, after the units of `b` were matched to those of `a`."""
    first = units(mixture, a)
    return F.cosine_similarity(first.flatten(), aligned(first, units(mixture, b)).flatten(), 0).item()


def _cosines(rows: Tensor) -> Tensor:
    rows = F.normalize(rows, dim=-1)
    return (rows @ rows.T).clamp(-1, 1)


def units(mixture: Mixture, expert: int) -> Tensor:
    """The inner units of an expert [I, 3d] in float32: each its rows of gate_proj and up_proj and its column of
    down_proj."""
    gate, up = mixture.gate_up[expert].float().chunk(2, 0)  # [I, d] each
    return torch.cat((gate, up, mixture.down[expert].float().T), 1)


def aligned(to: Tensor, moved: Tensor) -> Tensor:
    """The units of `moved` [I, 3d], each in the place of the unit of `to` that it was matched with.

    Order of units changes nothing about what an expert computes, but a mean of unmatched units computes nothing.
    """
    return moved[match(to @ moved.T)]


def match(scores: Tensor) -> Tensor:
    """Greedy matching: again and again the highest of scores [I, I] whose row and column are free; -> column of each
    row [I].

    All entries that are the highest of both their row and column are taken at once: greedy would take them too.
    """
    rows = torch.arange(len(scores), device=scores.device)
    taken, left = torch.full_like(rows, -1), scores.clone()
    while (taken < 0).any():
        column = left.argmax(1)  # [I], of each row
        mutual = (taken < 0) & (left.argmax(0)[column] == rows)
        taken[mutual] = column[mutual]
        left[mutual] = -torch.inf
        left[:, column[mutual]] = -torch.inf
    return taken


def most_used(load: Tensor, groups: int, keep: int) -> Plan:
    """The keep / groups experts of each group with the highest load [E]; the lower number where two are equal.

    Experts without load may still have mattered: under node-limited routing their scores can win a choice of groups
    for their neighbours, and a softmax without normalisation gives their mass to the rest.
    """
    grouped = load.unflatten(0, (groups, -1))
    best = grouped.argsort(dim=1, descending=True, stable=True)[:, : keep // groups].sort(1).values
    first = torch.arange(groups, device=load.device).unsqueeze(1) * grouped.shape[1]
    return [[expert] for expert in (best + first).flatten().tolist()]


def most_alike(similarity: Tensor, groups: int, keep: int) -> Plan:
    """In each group, the two most alike clusters are joined until keep / groups are left. Clusters are as alike as
    their members are on average; similarity [E, E].

    A token that had chosen two of a cluster visits it once, and its next best expert besides.
    """
    size, plan = len(similarity) // groups, []
    for first in range(0, len(similarity), size):
        inside = similarity[first : first + size, first : first + size]
        members = torch.eye(size, device=similarity.device)  # [clusters, size], ones and zeros
        while len(members) > keep // groups:
            mean = members / members.sum(1, keepdim=True)
            alike = (mean @ inside @ mean.T).fill_diagonal_(-torch.inf)
            a, b = sorted(divmod(int(alike.argmax()), len(members)))
            members[a] += members[b]
            members = torch.cat((members[:b], members[b + 1 :]))
        plan += [(row.nonzero().flatten() + first).tolist() for row in members]
    return plan


def applied(mixture: Mixture, plan: Plan, load: Tensor | None) -> Mixture:
    """The smaller mixture. Each cluster becomes the mean of its experts, gate row and bias, weighted by load [E], or
    plain where there is none or all of it is zero."""
    joined = [_joined(mixture, cluster, load) for cluster in plan]
    bias = None if mixture.bias is None else torch.stack([m.bias for m in joined if m.bias is not None])
    return Mixture(
        gate=torch.stack([m.gate for m in joined]),
        bias=bias,
        gate_up=torch.stack([m.gate_up for m in joined]),
        down=torch.stack([m.down for m in joined]),
    )


def _joined(mixture: Mixture, cluster: list[int], load: Tensor | None) -> Mixture:
    """One expert, without the dimension E. Members are matched to the most used; lerp keeps what is equal exactly."""
    share = [1.0 if load is None else load[expert].item() for expert in cluster]
    share = share if sum(share) else [1.0] * len(cluster)
    order = sorted(range(len(cluster)), key=lambda i: -share[i])
    lead, *others = (cluster[i] for i in order)
    gate, bias = mixture.gate[lead].float(), None if mixture.bias is None else mixture.bias[lead]
    first = mean = units(mixture, lead)
    total = share[order[0]]
    for i, expert in zip(order[1:], others):
        total += share[i]
        part = share[i] / total
        mean = mean.lerp(aligned(first, units(mixture, expert)), part)
        gate = gate.lerp(mixture.gate[expert].float(), part)
        if bias is not None and mixture.bias is not None:
            bias = bias.lerp(mixture.bias[expert], part)
    d = mixture.gate.shape[1]
    gate_up = torch.cat(mean[:, : 2 * d].split(d, 1), 0).to(mixture.gate_up.dtype)  # [2I, d]
    return Mixture(gate.to(mixture.gate.dtype), gate_up, mean[:, 2 * d :].T.to(mixture.down.dtype), bias)
