"""`benthic experts`: which experts are alike or idle, and a smaller model without them.

Letters: L layers with experts (MTP modules last), E routed experts.
"""

import itertools
import json
import logging
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benthic.base.errors import CheckpointError, InputError
from benthic.base.log import progress
from benthic.data import sources
from benthic.data.documents import Skips
from benthic.jobs.config import ExpertsConfig
from benthic.model import experts, hf
from benthic.model.balance import chosen_experts, expert_load, max_violation
from benthic.model.config import ModelConfig
from benthic.model.count import parameters
from benthic.model.experts import Mixture, Plan
from benthic.model.gate import Choice
from benthic.model.transformer import Transformer, Trunk
from benthic.tokenizer.tokenizer import Tokenizer
from benthic.train.loss import label_logprobs

log = logging.getLogger("benthic")
WINDOW = 2048  # tokens that see each other when load is measured; shorter where the model's context is
IDLE = 0.01  # an expert with less than this part of an even share is idle
LOAD_TITLES = f"{'idle':>5}{'MaxVio':>8}{'load':>15}{'by group':>15}"
PAIRS = 3  # most alike pairs listed per layer


@dataclass
class Usage:
    """How often experts were chosen on a corpus, and how well the model foresaw it.

    load [L, E] tokens per expert, weight [L, E] their gate values summed, together [L, E, E] tokens that chose both,
    loss in mean nats per predicted token.
    """

    tokens: int
    loss: float
    load: Tensor
    weight: Tensor
    together: Tensor

    @property
    def bits(self) -> float:
        """Bits per token."""
        return self.loss / math.log(2)

    @property
    def share(self) -> Tensor:
        """Load [L, E] in units of the even share."""
        return self.load / self.load.double().mean(1, keepdim=True).clamp(min=1e-9)

    def joint(self, layer: int, a: int, b: int) -> float:
        """Of the tokens that chose `a` or `b`, the part that chose both: where they are one, it loses a choice."""
        both = self.together[layer, a, b].item()
        return both / max(1.0, self.load[layer, a].item() + self.load[layer, b].item() - both)


def run(config: ExpertsConfig) -> None:
    """Print the report, or write the smaller model and print what it cost."""
    shape = hf.read_config(config.model)
    _check(config, shape)
    ids = read(config, shape) if config.corpus else None
    model, tokenizer = hf.load(config.model, device=config.device)
    usage = None if ids is None else measure(model, ids)
    if config.action == "report":
        layers = describe(model, usage)
        print(as_json(config, usage, layers) if config.json else as_text(config, model.config, usage, layers))
    elif config.output is not None:
        smaller, plans = shrink(config, model, usage)
        hf.write_model(config.output, smaller, tokenizer)
        after = None if ids is None else measure(smaller, ids)
        print(outcome(config, [model, smaller], plans, usage, after))


def _check(config: ExpertsConfig, shape: ModelConfig) -> None:
    """Refuse what cannot work before any weight is read."""
    if not shape.n_routed_experts:
        raise InputError(f"{config.model} is a dense model -> give one with routed experts")
    if config.corpus and not (config.model / "tokenizer.json").is_file():
        raise InputError(f"{config.model} has no tokenizer.json, which --corpus needs -> add the model's tokenizer")
    if config.action == "report":
        if config.output is not None or config.keep:
            raise InputError("report writes no model -> leave out the output folder and --keep, or use merge or prune")
        return
    if config.output is None:
        raise InputError(f"{config.action} needs a folder to write -> benthic experts {config.action} MODEL OUTPUT")
    if config.output.exists():
        raise InputError(f"output folder {config.output} already exists -> choose another, or remove it first")
    if config.json:
        raise InputError(f"--json belongs to report -> leave it out with {config.action}")
    if config.action == "prune" and not config.corpus:
        raise InputError("prune drops the experts that a corpus uses least -> name text with --corpus, or use merge")
    experts.smaller_config(shape, config.keep)


def read(config: ExpertsConfig, shape: ModelConfig) -> Tensor:
    """The first `max_tokens` of the corpus [T]: begin-of-sentence, text, end-of-sentence for each document."""
    tokenizer, skips, ids = Tokenizer.load(config.model), Skips(), []
    for document in sources.read(config.corpus, skips):
        ids += [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
        if len(ids) >= config.max_tokens:
            break
    if skips.counts:
        log.warning("corpus: %s", skips.summary())
    ids, least = ids[: config.max_tokens], 2 + shape.num_nextn_predict_layers
    if len(ids) < least:
        raise InputError(f"{len(ids)} tokens (--max-tokens {config.max_tokens}) -> give {least} or more, best 100,000")
    return torch.tensor(ids)


@torch.no_grad()
def measure(model: Transformer, ids: Tensor) -> Usage:
    """Load and loss over the stream of ids [T], in windows that do not overlap. Every id but the first is predicted
    once, from those before it in its window."""
    layers, n, device = len(model.gates()), model.config.n_routed_experts, model.head.device
    load = torch.zeros(layers, n, dtype=torch.int64, device=device)
    weight, together = torch.zeros_like(load, dtype=torch.float64), load.new_zeros(layers, n, n)
    window, predicted, total = min(WINDOW, model.config.max_position_embeddings), len(ids) - 1, 0.0
    with progress("measure, tokens", predicted) as line:
        for first in range(0, predicted, window):
            part = ids[first : first + window + 1].to(device).unsqueeze(0)  # [1, window + 1]
            trunk = model.trunk(part[:, :-1])
            hidden, choices = model.top(trunk)
            total -= label_logprobs(hidden, model.head, part[:, 1:])[0].double().sum().item()
            for layer, choice in enumerate(choices + mtp_choices(model, trunk, hidden, part)):
                load[layer] += expert_load(choice, n, None)
                weight[layer].scatter_add_(0, choice.topk_ids.flatten(), choice.weights.flatten().double())
                hits = chosen_experts(choice)  # [N, E]
                together[layer] += (hits.T @ hits).long()
            line.update(min(first + window, predicted))
    if not math.isfinite(total):
        raise CheckpointError("the model's loss on the corpus is not a finite number -> its weights are damaged")
    return Usage(predicted, total / predicted, load.cpu(), weight.cpu(), together.cpu())


def mtp_choices(model: Transformer, trunk: Trunk, hidden: Tensor, part: Tensor) -> list[Choice]:
    """What the prediction modules choose where they know the token that they start from. part [1, T + 1]."""
    found, state = [], model.mtp_input(trunk, hidden)
    for depth in range(min(len(model.mtp), part.shape[1] - 1)):
        known = part[:, 1 + depth :]
        ahead, choice = model.mtp_hidden(state[:, : known.shape[1]], known, depth=depth)
        state = model.mtp_input(trunk, ahead)
        found += [] if choice is None else [choice]
    return found


def _shown(title: str, mixtures: dict[str, Mixture]) -> Iterator[tuple[str, Mixture]]:
    """The layers one by one, with progress."""
    with progress(title, len(mixtures)) as line:
        for done, layer in enumerate(mixtures.items()):
            yield layer
            line.update(done + 1)


def describe(model: Transformer, usage: Usage | None) -> list[dict[str, Any]]:
    """Every number about every layer."""
    groups, mixtures = model.config.n_group, experts.mixtures(model)
    found: list[dict[str, Any]] = []
    for layer, (name, mixture) in enumerate(_shown("compare, layers", mixtures)):
        centroids, outputs = experts.centroid_similarity(mixture.gate), experts.output_similarity(mixture)
        facts: dict[str, Any] = {
            "layer": name.removesuffix(".mlp").removesuffix(".block"),
            "most_alike": top_pairs(mixture, centroids, outputs, groups),
            "centroid_similarity": centroids.tolist(),
            "output_similarity": outputs.tolist(),
        }
        if usage is not None:
            share, weight = usage.share[layer], usage.weight[layer]
            facts |= {
                "load": share.tolist(),
                "gate_weight": (weight / weight.mean().clamp(min=1e-9)).tolist(),
                "idle": (share < IDLE).nonzero().flatten().tolist(),
                "max_violation": max_violation(usage.load[layer]).item(),
                "group_load": share.unflatten(0, (groups, -1)).mean(1).tolist(),
            }
            for pair in facts["most_alike"]:
                pair["chosen_together"] = usage.joint(layer, *pair["experts"])
        found.append(facts)
    return found


def top_pairs(mixture: Mixture, centroids: Tensor, outputs: Tensor, groups: int) -> list[dict[str, Any]]:
    """The pairs with the most alike centroids, and how alike they are otherwise."""
    n = len(centroids)
    rows, columns = torch.triu_indices(n, n, 1, device=centroids.device)
    best = centroids[rows, columns].argsort(descending=True, stable=True)[:PAIRS]
    return [
        {
            "experts": [a, b],
            "same_group": a // (n // groups) == b // (n // groups),
            "centroids": centroids[a, b].item(),
            "outputs": outputs[a, b].item(),
            "weights": experts.weight_similarity(mixture, a, b),
        }
        for a, b in zip(rows[best].tolist(), columns[best].tolist())
    ]


def as_json(config: ExpertsConfig, usage: Usage | None, layers: list[dict[str, Any]]) -> str:
    """The whole report for programs."""
    measured = {} if usage is None else {"tokens": usage.tokens, "bits_per_token": usage.bits, "idle_below": IDLE}
    return json.dumps({"model": str(config.model)} | measured | {"layers": layers}, allow_nan=False)


def as_text(config: ExpertsConfig, shape: ModelConfig, usage: Usage | None, layers: list[dict[str, Any]]) -> str:
    """The report for people: a line per layer, totals, and what to do next."""
    lines = [
        f"{config.model}: {len(layers)} layers of {shape.n_routed_experts} routed experts in {shape.n_group} groups, "
        f"{shape.num_experts_per_tok} per token"
    ]
    if usage is not None:
        lines += [
            f"load on {usage.tokens:,} tokens ({usage.bits:.3f} bits each): 1 is an even share, idle below {IDLE}"
        ]
    lines += [
        "alike: cosines of centroids, of outputs, of weights after matching units; a+b share a group, a|b do not",
        "",
        f"{'layer':12}"
        + (f"{'idle':>5}{'MaxVio':>8}{'load':>15}{'by group':>15}" if usage is not None else "")
        + "   most alike",
    ]
    for facts in layers:
        used = ""
        if usage is not None:
            used = f"{len(facts['idle']):5}{facts['max_violation']:8.2f}"
            used += "".join(f"{min(facts[k]):9.2f}-{max(facts[k]):.2f}".rjust(15) for k in ("load", "group_load"))
        lines.append(f"{facts['layer']:12}{used}   " + "   ".join(map(_pair, facts["most_alike"][:2])))
    return "\n".join([*lines, "", *_totals(config, shape, usage, layers)])


def _pair(pair: dict[str, Any]) -> str:
    a, b = pair["experts"]
    joint = f" together {pair['chosen_together']:.0%}" if "chosen_together" in pair else ""
    cosines = " ".join(f"{pair[key]:.2f}" for key in ("centroids", "outputs", "weights"))
    return f"{a}{'+' if pair['same_group'] else '|'}{b} {cosines}{joint}"


def _totals(config: ExpertsConfig, shape: ModelConfig, usage: Usage | None, layers: list[dict[str, Any]]) -> list[str]:
    if usage is None:
        return ["load was not measured -> name text with --corpus to find idle experts"]
    groups, size = shape.n_group, shape.n_routed_experts // shape.n_group
    idle = [[sum(e // size == g for e in facts["idle"]) for g in range(groups)] for facts in layers]
    spare = min(map(min, idle))  # experts that every group of every layer can lose without losing one in use
    total, worst = sum(map(sum, idle)), max(layers, key=lambda facts: facts["max_violation"])
    lines = [
        f"{total} of {len(layers) * shape.n_routed_experts} experts idle; "
        f"largest MaxVio {worst['max_violation']:.2f} in {worst['layer']}"
    ]
    keep = max(shape.n_routed_experts - groups * max(1, spare), _fewest(shape))
    if keep == shape.n_routed_experts:
        return [*lines, "the routing needs every expert: none can be dropped"]
    words = [str(config.model), "NEW", "--keep", str(keep), "--corpus", *map(str, config.corpus)]
    words += ["--max-tokens", str(config.max_tokens)] if config.max_tokens != ExpertsConfig.max_tokens else []
    commands = {action: f"  benthic experts {action} {shlex.join(words)}" for action in ("prune", "merge")}
    if spare:
        return [*lines, f"every group of every layer can lose {spare}:", commands["prune"]]
    return [
        *lines,
        "some group has no idle expert: to shrink costs something; compare the bits per token that these print:",
        *commands.values(),
    ]


def _fewest(shape: ModelConfig) -> int:
    """The smallest `keep` that can be routed."""
    for keep in range(shape.n_group, shape.n_routed_experts, shape.n_group):
        try:
            return experts.smaller_config(shape, keep).n_routed_experts
        except InputError:
            continue
    return shape.n_routed_experts


def shrink(config: ExpertsConfig, model: Transformer, usage: Usage | None) -> tuple[Transformer, list[Plan]]:
    """The smaller model, and for each layer which experts became one."""
    groups, smaller, plans = model.config.n_group, {}, []
    for layer, (name, mixture) in enumerate(_shown(f"{config.action}, layers", experts.mixtures(model))):
        load = None if usage is None else usage.load[layer].to(mixture.gate.device)
        if load is None or config.action == "merge":
            plan = experts.most_alike(experts.centroid_similarity(mixture.gate), groups, config.keep)
        else:
            plan = experts.most_used(load, groups, config.keep)
        smaller[name] = experts.applied(mixture, plan, load)
        plans.append(plan)
    return experts.rebuild(model, smaller), plans


def outcome(
    config: ExpertsConfig, models: list[Transformer], plans: list[Plan], usage: Usage | None, after: Usage | None
) -> str:
    """What was done and what it cost; models: before and after."""
    old, new = (model.config for model in models)
    sizes = [parameters(shape).total + parameters(shape).mtp for shape in (new, old)]
    lines = [
        f"{config.output}: {new.n_routed_experts} of {old.n_routed_experts} experts in each of {len(plans)} layers, "
        f"{sizes[0]:,} of {sizes[1]:,} parameters"
    ]
    if usage is None or after is None:
        return "\n".join([*lines, "joined by plain means and not measured -> with --corpus, by load, and measured"])
    lines.append(dropped(plans, usage) if config.action == "prune" else fallen(plans, usage))
    change = f"{usage.bits:.4f} before, {after.bits:.4f} after ({after.bits - usage.bits:+.4f})"
    return "\n".join([*lines, f"bits per token on {usage.tokens:,} tokens: {change}"])


def dropped(plans: list[Plan], usage: Usage) -> str:
    """The part of the routing that went to experts that are gone."""
    kept = [[expert for cluster in plan for expert in cluster] for plan in plans]
    lost = [1 - (load[there].sum() / load.sum()).item() for load, there in zip(usage.load, kept)]
    return f"the dropped experts had {min(lost):.2%} to {max(lost):.2%} of a layer's load"


def fallen(plans: list[Plan], usage: Usage) -> str:
    """Tokens that had chosen two experts that are now one: they get another expert beside it, their next best."""
    pairs = [[pair for cluster in plan for pair in itertools.combinations(cluster, 2)] for plan in plans]
    twice = [sum(usage.together[i][pair].item() for pair in joined) / usage.tokens for i, joined in enumerate(pairs)]
    return f"joined pairs that a token had both chosen: {min(twice):.2f} to {max(twice):.2f} per token and layer"
