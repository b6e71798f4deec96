"""A process's share of a model: `Transformer` with narrower layers, whose sums over all processes are the model's.

Heads are split: rows of the projections to them, columns of `o_proj`; what all heads share, MLA's latent above all, is
whole everywhere, and so is its cache. Feed-forward networks are split along their inner width. Routed experts are split
the same way, or each process holds some of them whole. Every process computes every token, so each layer needs two
sums: after attention and after its feed-forward. The output head is split by tokens of the vocabulary where they
divide, and its logits are gathered. Embedding, norms and gates are whole.

A share takes of each released tensor what its own narrower one leaves out nothing of: along an axis that is 1/n as
long, the part of its rank. Which expert lies where, copies included, is a `Placement`.

Letters: n processes, E routed experts, P slots for their copies on all processes, X most copies of one, N tokens,
K experts per token, L mixtures, prediction modules included.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.base.errors import InputError
from benthic.model import hf
from benthic.model.attention import GQA
from benthic.model.block import Block
from benthic.model.capacity import Capacity
from benthic.model.config import ModelConfig
from benthic.model.ffn import FFN
from benthic.model.linear import Linear
from benthic.model.mla import MLA
from benthic.model.moe import MoE, Sent
from benthic.model.transformer import Transformer
from benthic.parallel import eplb
from benthic.parallel.config import ParallelConfig
from benthic.parallel.dispatch import LocalDispatcher
from benthic.parallel.eplb import Placement
from benthic.parallel.ranks import Alone, Ranks, shared_by

TO_HEADS = ("q_proj", "q_b_proj", "kv_b_proj", "k_proj", "v_proj")
ALONE = Alone()


class SummedLinear(Linear):
    """Some columns of a matrix; the outputs of all processes are added up."""

    def __init__(self, in_features: int, out_features: int, ranks: Ranks):
        super().__init__(in_features, out_features)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        return self.ranks.sum(super().forward(x))


class SlicedMoE(MoE):
    """A slice of every expert, the shared ones included. Routed and shared outputs are added up together."""

    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__(config, LocalDispatcher())
        self.ranks = ranks
        _cut_ffn(self.shared_experts, ranks.size)
        e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size // ranks.size
        self.routed_experts.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, d))
        self.routed_experts.down_proj = nn.Parameter(torch.empty(e, d, i))

    def combine(self, sent: Sent, y: Tensor):
        out, choice = super().combine(sent, y)
        return self.ranks.sum(out), choice


class PlacedMoE(SlicedMoE):
    """Some experts whole, and a slice of the shared ones.

    copies [E, X] int32: the slot here of each copy of each expert, -1 for copies elsewhere and for none
    count  [E] int32: copies of each expert. A token visits one of them, chosen by its place in the batch or its id and
    position, so that each copy gets about as many
    load   [E] int64: tokens of each expert since the last placement
    """

    copies: Tensor
    count: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig, ranks: Ranks, slots: int, most: int):
        super().__init__(config, ranks)
        e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.slots, self.all_slots = slots, slots * ranks.size
        self.routed_experts.gate_up_proj = nn.Parameter(torch.empty(slots, 2 * i, d))
        self.routed_experts.down_proj = nn.Parameter(torch.empty(slots, d, i))
        self.register_buffer("copies", torch.empty(e, most, dtype=torch.int32), persistent=False)
        self.register_buffer("count", torch.empty(e, dtype=torch.int32), persistent=False)
        self.register_buffer("load", torch.empty(e, dtype=torch.int64), persistent=False)

    def dispatch(self, x: Tensor, capacity: Capacity | None = None) -> Sent:
        flat = x.reshape(-1, x.shape[-1])  # [N, d]
        choice = self.gate(flat)
        ids = choice.topk_ids  # [N, K]
        which = torch.arange(len(ids), device=ids.device).unsqueeze(1) % self.count[ids]
        here = self.copies[ids, which].long()
        self.load += ids.flatten().bincount(minlength=len(self.load))
        return Sent(x, choice, self.dispatcher.dispatch(flat, here, self.slots, here >= 0))


class Share(Transformer):
    """What rank `ranks.rank` holds of a model. Build it through `ShareOf`."""

    def __init__(self, config: ModelConfig, *, parallel: ParallelConfig, ranks: Ranks, dtype: torch.dtype):
        check(config, parallel, ranks.size)
        super().__init__(config, dtype=dtype)
        self.ranks, self.parallel, self.whole_config, n = ranks, parallel, config, ranks.size
        self.slots = config.n_routed_experts + parallel.num_redundant_experts  # P
        self.mixtures: list[PlacedMoE] = []
        self.numbers: list[int] = []  # of their layers
        for block in [module for module in self.modules() if isinstance(module, Block)]:
            _cut_attention(block.self_attn, ranks)
            if isinstance(block.mlp, FFN):
                _cut_ffn(block.mlp, n)
                block.mlp.down_proj = SummedLinear(config.intermediate_size // n, config.hidden_size, ranks)
            elif not parallel.enable_expert_parallel:
                block.mlp = SlicedMoE(config, ranks)
            else:
                block.mlp = PlacedMoE(config, ranks, self.slots // n, 1 + parallel.num_redundant_experts)
                self.mixtures.append(block.mlp)
                self.numbers.append(block.self_attn.layer)
        self.placement = None
        if self.mixtures:
            self.placement = self.placed(np.zeros((len(self.mixtures), config.n_routed_experts)))
        self.rows = config.vocab_size // n if config.vocab_size % n == 0 else 0  # of the head, 0 for all
        if self.rows and not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, self.rows)
        if config.kv_lora_rank is None:  # plain attention caches the heads that are here
            self.config = replace(config, num_key_value_heads=config.num_key_value_heads // n)

    @property
    def head(self) -> Tensor:
        """Its rows of the output matrix."""
        if self.rows and self.config.tie_word_embeddings:
            return self.embed_tokens.weight[self.rows * self.ranks.rank :][: self.rows]
        return super().head

    def logits(self, hidden: Tensor) -> Tensor:
        return self.whole_logits(F.linear(hidden, self.head.to(hidden.dtype))).float()

    def whole_logits(self, part: Tensor) -> Tensor:
        """Logits of this process's rows of the head -> those of all [..., V]."""
        return self.ranks.gather(part) if self.rows else part

    def placed(self, expert_load: np.ndarray) -> Placement:
        """Where copies should lie for this load [L, E]."""
        return eplb.rebalance(
            expert_load, replicas=self.slots, groups=self.config.n_group, nodes=self.ranks.nodes,
            devices=self.ranks.size,
        )  # fmt: skip

    def place(self, placement: Placement) -> None:
        """Tokens go where `placement` says from the next step on; the weights must lie there already."""
        self.placement, rank = placement, self.ranks.rank
        for row, mixture in enumerate(self.mixtures):
            copies = placement.logical_to_physical[row]  # [E, X] of all processes
            here = np.where(copies // mixture.slots == rank, copies % mixture.slots, -1)
            mixture.copies.fill_(-1)
            mixture.copies[:, : here.shape[1]] = torch.from_numpy(here)
            mixture.count.copy_(torch.from_numpy(placement.replica_counts[row]))
            mixture.load.zero_()

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """(released name, tensor that shares this one's memory): what to fill. Copies come once each."""
        slots, rank = self.slots // self.ranks.size, self.ranks.rank
        for name, view in hf.checkpoint_views(self):
            if self.placement is not None and (found := re.match(r"(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)", name)):
                row = self.numbers.index(int(found[2]))
                expert = self.placement.physical_to_logical[row, rank * slots + int(found[3])]
                name = f"{found[1]}{expert}{name[found.end() :]}"
            yield name, view


@dataclass(frozen=True)
class ShareOf(hf.Whole):
    """Loads the share of one rank (`hf.load(..., part=ShareOf(...))`)."""

    parallel: ParallelConfig
    ranks: Ranks
    whole = False

    @property
    def checks(self) -> bool:
        """Rank 0 reads for all what is read only to be checked."""
        return self.ranks.rank == 0

    def empty(self, config: ModelConfig, device: str, dtype: torch.dtype, *, fp8: bool = False) -> Share:
        if fp8:
            raise ValueError("blocks of FP8 weights do not fall on the borders of shares")
        with torch.device("meta"):
            model = Share(config, parallel=self.parallel, ranks=self.ranks, dtype=dtype)
        hf.made(model, device, dtype)
        if model.placement is not None:
            model.place(model.placement)
        return model

    def places(self, model: Transformer) -> Iterator[tuple[str, Tensor]]:
        return model.places() if isinstance(model, Share) else super().places(model)

    def index(self, part: tuple[int, ...], whole: tuple[int, ...]) -> tuple[slice, ...]:
        """Along each axis all of it, or the part of this rank."""
        first = [0 if mine == all else mine * self.ranks.rank for mine, all in zip(part, whole)]
        return tuple(slice(begin, begin + mine) for begin, mine in zip(first, part))


def join(config: ParallelConfig, device: str) -> hf.Whole:
    """What this process loads: the model, or its share of it once it has met the others."""
    if shared_by(config) == 1:
        return hf.Whole()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = Ranks.join(device)
    return ShareOf(ranks.same(config), ranks)


def ranks_of(model: Transformer) -> Ranks | Alone:
    """The processes that share the model."""
    return model.ranks if isinstance(model, Share) else ALONE


def check(config: ModelConfig, parallel: ParallelConfig, n: int) -> None:
    """InputError where the model does not divide among n processes."""
    slots = config.n_routed_experts + parallel.num_redundant_experts
    sizes = {"num_attention_heads": config.num_attention_heads}
    if config.kv_lora_rank is None:
        sizes["num_key_value_heads"] = config.num_key_value_heads
    if config.first_k_dense_replace:
        sizes["intermediate_size"] = config.intermediate_size
    if config.n_routed_experts:
        sizes["n_shared_experts * moe_intermediate_size"] = config.n_shared_experts * config.moe_intermediate_size
    for name, size in sizes.items():
        if size % n:
            raise InputError(f"{name}={size} does not divide among {n} processes -> use a number that divides it")
    if parallel.enable_expert_parallel and not config.n_routed_experts:
        raise InputError("enable_expert_parallel=True for a model without experts -> leave it out")
    if parallel.enable_expert_parallel and slots % n:
        raise InputError(
            f"{config.n_routed_experts} experts and num_redundant_experts={parallel.num_redundant_experts} do not "
            f"divide among {n} processes -> use num_redundant_experts={-config.n_routed_experts % n}"
        )
    if config.n_routed_experts and not parallel.enable_expert_parallel and config.moe_intermediate_size % (8 * n):
        raise InputError(
            f"moe_intermediate_size={config.moe_intermediate_size} does not divide into {n} multiples of 8 "
            "-> use enable_expert_parallel=True"
        )


def _cut_attention(attention: nn.Module, ranks: Ranks) -> None:
    """Some of its heads."""
    if not isinstance(attention, MLA | GQA):
        raise TypeError(f"{type(attention).__name__} has no heads that are known")
    n = ranks.size
    attention.heads //= n
    if isinstance(attention, GQA):
        attention.groups //= n
    for name in TO_HEADS:
        if hasattr(attention, name):
            setattr(attention, name, _rows(getattr(attention, name), n))
    columns, rows = attention.o_proj.weight.shape[::-1]
    attention.o_proj = SummedLinear(columns // n, rows, ranks)


def _cut_ffn(network: FFN, n: int) -> None:
    """Some of its inner units."""
    network.gate_proj, network.up_proj = _rows(network.gate_proj, n), _rows(network.up_proj, n)
    rows, columns = network.down_proj.weight.shape
    network.down_proj = Linear(columns // n, rows)


def _rows(layer: Linear, n: int) -> Linear:
    """A layer with 1/n of the outputs."""
    rows, columns = layer.weight.shape
    return Linear(columns, rows // n, layer.bias is not None)
