"""The forward pass as a list of kernels: what `Transformer.hidden` computes, for packed tokens on a GPU.

It reads the parameters of the model's own modules, 16 bits wide or FP8. Projections of the same input are laid into one
storage, of which the parameters become views; the absorbed matrices are views of `kv_b_proj`. Nothing is copied, so
whoever writes the weights in place is obeyed by the next step. Reads like `Block`, `MLA` and `MoE`, whose equations it
shares. Of a `Share` it computes that share and adds up over the processes.

Letters: N tokens (decode rows first), B decode rows of Q queries, H heads, D, P, V, R widths as in mla.py, d hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.base.errors import InputError
from benthic.inference.matrices import lay_together, width
from benthic.inference.share import PlacedMoE, Share, ranks_of
from benthic.inference.ways import Fastest, Fixed, Ways
from benthic.kernels import decode_inputs, latent_store, moe, norm, route, speculate
from benthic.kernels.latent import Latents
from benthic.kernels.mla_prefill import merge, mla_prefill
from benthic.kernels.moe import ExpertWeights
from benthic.kernels.moe_place import place
from benthic.kernels.moe_sorted import silu_times_up
from benthic.model.block import Block
from benthic.model.cache import LatentCache
from benthic.model.ffn import FFN
from benthic.model.linear import FP8, Quantisable, RMSNorm
from benthic.model.mla import MLA
from benthic.model.moe import MoE
from benthic.model.mtp import MTP
from benthic.model.rope import frequencies, turn_factor
from benthic.model.transformer import Transformer


@dataclass(frozen=True)
class Decode:
    """Rows of the same number of queries: table [B, W] int32 pages, context [B] int32 tokens, new ones included."""

    rows: int
    queries: int
    table: Tensor
    context: Tensor


@dataclass(frozen=True)
class Piece:
    """A part of the cached contexts: slots [S] of its tokens. It belongs to neighbouring rows only, those that have a
    context: the prefill tokens from `begin` to `end`. first_q and first_k [rows + 1] int32 are where these rows start
    among those tokens and among the slots."""

    slots: Tensor
    first_q: Tensor
    first_k: Tensor
    begin: int
    end: int


@dataclass(frozen=True)
class Prefill:
    """Chunks of prompts: first [rows + 1] int32 start of each among the prefill tokens, the longest, their contexts."""

    first: Tensor
    longest: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Tokens:
    """What one pass computes. ids, positions, slots [N]; padding writes to slot 0."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    decode: Decode | None
    prefill: Prefill | None


class Fused:
    """`hidden(tokens)` and `mtp_hidden(...)` of `model` over `cache`, whose pages hold `page_size` tokens.

    `deterministic`: a token's result is the same in any company; every token must be a decode row of one query.
    """

    def __init__(self, model: Transformer, cache: LatentCache, page_size: int, deterministic: bool = False):
        if reason := unfit(model) or unready(model):
            raise InputError(f"{reason} -> use the plain forward pass")
        self.model, self.cache, self.page_size, self.ranks = model, cache, page_size, ranks_of(model)
        self.ways: Ways = Fixed(model) if deterministic else Fastest()
        device = model.embed_tokens.weight.device
        self.frequencies, self.turn = frequencies(model.config, device), turn_factor(model.config)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, MLA):
                    lay_together(module.q_a_proj if module.compressed else module.q_proj, module.kv_a_proj_with_mqa)
                elif isinstance(module, FFN):
                    lay_together(module.gate_proj, module.up_proj)
        self.experts = {module: of_module(module) for module in model.modules() if isinstance(module, MoE)}

    def hidden(self, tokens: Tokens, choices: list[Tensor] | None = None) -> Tensor:
        """-> hidden states after the final norm [N, d]. The latents of the tokens are in the cache afterwards, and
        every mixture layer's experts [N, K] int32 in `choices`."""
        angles = self.angles(tokens)
        blocks: list[Block] = list(self.model.layers)  # type: ignore[arg-type]
        norms = [block.input_layernorm for block in blocks]
        x = F.embedding(tokens.ids, self.model.embed_tokens.weight)
        normed = rms_norm(norms[0], x)
        for layer, (block, after) in enumerate(zip(blocks, [*norms[1:], self.model.norm])):
            normed, x = self.block(layer, block, normed, x, after, tokens, angles, choices)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, d] -> logits [N, V] in the compute dtype, which the sampler widens; of the deterministic kernels
        perhaps a few more, all -inf."""
        part = self.ways.logits(self.model, hidden)
        return self.model.whole_logits(part) if isinstance(self.model, Share) else part

    def mtp_hidden(
        self, hidden: Tensor, next_ids: Tensor, tokens: Tokens, depth: int, at: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """hidden [N, d] of the depth before, or rows `at` [N] of it, next_ids [N] -> hidden states of module `depth`
        [N, d]."""
        module: MTP = self.model.mtp[depth]  # type: ignore[assignment]
        normed, x = self._mtp_input(module, hidden, next_ids, at)
        layer, angles = self.model.config.num_hidden_layers + depth, angles or self.angles(tokens)
        return self.block(layer, module.block, normed, x, module.shared_head.norm, tokens, angles)[0]

    def mtp_fill(self, hidden: Tensor, next_ids: Tensor, tokens: Tokens, depth: int) -> None:
        """Write the latents that `mtp_hidden` would write, and compute nothing else."""
        module: MTP = self.model.mtp[depth]  # type: ignore[assignment]
        attn: MLA = module.block.self_attn  # type: ignore[assignment]
        normed, _ = self._mtp_input(module, hidden, next_ids, None)
        kv_a, kv_norm = self.ways.product(normed, attn.kv_a_proj_with_mqa), attn.kv_a_layernorm
        latents = self.cache.layers[self.model.config.num_hidden_layers + depth]
        latent_store.fill(kv_a, kv_norm.weight, kv_norm.eps, *self.angles(tokens), tokens.slots, latents)

    def _mtp_input(self, module: MTP, hidden: Tensor, next_ids: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor]:
        """The module's residual stream [N, d] and its norm, in the other order."""
        enorm, hnorm = module.enorm, module.hnorm
        both = speculate.module_input(
            self.model.embed_tokens.weight, next_ids, hidden, enorm.weight, hnorm.weight, (enorm.eps, hnorm.eps), at
        )
        x = self.ways.product(both, module.eh_proj)  # V3 Eq 21
        return rms_norm(module.block.input_layernorm, x), x

    def angles(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """cos, sin [N, P/2] float32 of the tokens' positions."""
        return decode_inputs.angles(tokens.positions, self.frequencies, self.turn)

    def block(
        self, layer: int, block: Block, normed: Tensor, x: Tensor, after: RMSNorm, tokens: Tokens,
        angles: tuple[Tensor, Tensor], choices: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One layer: the residual stream x [N, d] and its norm for this layer -> the same for what comes `after`."""
        delta = self.attention(layer, block.self_attn, normed, tokens, angles)  # type: ignore[arg-type]
        middle = block.post_attention_layernorm
        if isinstance(block.mlp, MoE):
            return self.mixture(block.mlp, delta, x, middle, after, tokens, choices)
        normed, x = norm.add_rms_norm(delta, x, middle.weight, middle.eps)
        delta = self.ranks.sum(self.dense(block.mlp, normed))  # type: ignore[arg-type]
        return norm.add_rms_norm(delta, x, after.weight, after.eps)

    def attention(self, layer: int, attn: MLA, x: Tensor, tokens: Tokens, angles: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, d] -> [N, d]: absorbed for the decode rows, decompressed for the prompts."""
        latents, ways = self.cache.layers[layer], self.ways
        query = attn.q_a_proj if attn.compressed else attn.q_proj
        both, kv = ways.products(x, query, attn.kv_a_proj_with_mqa), attn.kv_a_proj_with_mqa
        q, kv_a = both[:, : len(query.weight)], both[:, width(query) :][:, : len(kv.weight)]
        if attn.compressed:
            q = ways.product(rms_norm(attn.q_a_layernorm, q), attn.q_b_proj)
        q = q.unflatten(-1, (attn.heads, -1))  # [N, H, D + P]
        d, v, kv_norm = attn.query_sizes[0], attn.value_size, attn.kv_a_layernorm
        w_uk, w_uv = attn.kv_b_proj.weight.unflatten(0, (attn.heads, -1)).split([d, v], 1)  # [H, D or V, R]
        n = 0 if tokens.decode is None else tokens.decode.rows * tokens.decode.queries
        stored = ways.store(kv_a, kv_norm.weight, kv_norm.eps, q, *angles, tokens.slots, latents, w_uk, n)
        q_rope, dense = stored.q_rope, stored.dense
        out = x.new_empty(len(x), attn.heads, v)
        if tokens.decode is not None:
            ways.attend(
                stored.q_latent, q_rope[:n], latents, tokens.decode.table, tokens.decode.context, w_uv, out[:n],
                page_size=self.page_size, scale=attn.scale,
            )  # fmt: skip
        if tokens.prefill is not None and dense is not None:
            new = q[n:, :, :d], q_rope[n:], dense[0][n:], dense[1][n:]
            self.prompts(attn, *new, latents, tokens.prefill, out[n:])
        return self.ranks.sum(ways.product(out.flatten(1), attn.o_proj))

    def prompts(
        self, attn: MLA, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, latents: Latents,
        chunks: Prefill, out: Tensor,
    ) -> None:  # fmt: skip
        """Each chunk over itself, then over the cached tokens before it, piece by piece, into out [N, H, V]."""

        def expand(latent: Tensor) -> Tensor:
            return F.linear(latent, attn.kv_b_proj.weight).unflatten(-1, (attn.heads, -1))  # [S, H, D + V]

        first, longest = chunks.first, chunks.longest
        own = expand(c_kv)
        _, lse = mla_prefill(q_nope, q_rope, own, k_rope, first, first, longest, attn.scale, causal=True, out=out)
        for piece in chunks.pieces:
            rows = slice(piece.begin, piece.end)
            c_kv, k_rope = latents.read(piece.slots, q_nope.dtype)
            part = mla_prefill(
                q_nope[rows], q_rope[rows], expand(c_kv), k_rope, piece.first_q, piece.first_k, longest, attn.scale,
                causal=False,
            )  # fmt: skip
            merge(out[rows], lse[:, rows], *part)

    def mixture(
        self, mlp: MoE, delta: Tensor, x: Tensor, middle: RMSNorm, after: RMSNorm, tokens: Tokens,
        choices: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """delta and, of its norm, the experts added to x [N, d] -> (its norm for what comes `after`, the sum)."""
        c, gate = self.model.config, mlp.gate
        normed, x, logits = route.add_norm_logits(
            delta, x, middle.weight, middle.eps, gate.weight, tiles=self.ways.router
        )
        ids, weights = route.choose(
            logits, gate.e_score_correction_bias, num_experts_per_tok=c.num_experts_per_tok,
            scoring_func=c.scoring_func, topk_method=c.topk_method, n_group=c.n_group, topk_group=c.topk_group,
            norm_topk_prob=c.norm_topk_prob, routed_scaling_factor=c.routed_scaling_factor,
        )  # fmt: skip
        if choices is not None:
            choices.append(ids)
        if self.ranks.size > 1:
            return norm.add_rms_norm(self.part(mlp, normed, ids, weights, tokens), x, after.weight, after.eps)
        experts = self.experts[mlp]
        tiles = self.ways.experts(experts)
        return moe.moe_norm(normed, experts, ids, weights, x, after.weight, after.eps, tiles=tiles)

    def part(self, mlp: MoE, normed: Tensor, ids: Tensor, weights: Tensor, tokens: Tokens) -> Tensor:
        """A mixture of which the processes hold a part each, normed [N, d] -> [N, d]."""
        experts, apart, of = self.experts[mlp], None, 0
        if experts.n_shared == 0:
            apart = self.dense(mlp.shared_experts, normed)
        if isinstance(mlp, PlacedMoE):
            ids = place(ids, tokens.ids, tokens.positions, tokens.slots, mlp.copies, mlp.count, mlp.load)
            of = mlp.all_slots
        return self.ranks.sum(moe.moe(normed, experts, ids, weights, apart, tiles=self.ways.experts(experts), of=of))

    def dense(self, network: FFN, x: Tensor) -> Tensor:
        """SwiGLU of x [N, d]."""
        middle = silu_times_up(self.ways.products(x, network.gate_proj, network.up_proj))
        return self.ways.product(middle[:, : len(network.gate_proj.weight)], network.down_proj)


def rms_norm(module: RMSNorm, x: Tensor) -> Tensor:
    """x [N, d] -> its norm."""
    return norm.rms_norm(x, module.weight, module.eps)


def of_module(mlp: MoE) -> ExpertWeights:
    """The weights of a mixture under the names of its kernels, in place. Shared experts that are narrower than a routed
    one, as shares of them may be, cannot ride along and are left out."""
    routed, shared = mlp.routed_experts, mlp.shared_experts
    if shared.down_proj.weight.shape[1] % routed.down_proj.shape[2]:
        return ExpertWeights(gate_up_proj=routed.gate_up_proj, down_proj=routed.down_proj)
    return ExpertWeights(
        gate_up_proj=routed.gate_up_proj, down_proj=routed.down_proj,
        gate_up_scale=routed.gate_up_proj_scale_inv, down_scale=routed.down_proj_scale_inv,
        shared_gate_proj=shared.gate_proj.weight, shared_up_proj=shared.up_proj.weight,
        shared_down_proj=shared.down_proj.weight, shared_gate_scale=shared.gate_proj.weight_scale_inv,
        shared_up_scale=shared.up_proj.weight_scale_inv, shared_down_scale=shared.down_proj.weight_scale_inv,
    )  # fmt: skip


def unfit(model: Transformer) -> str:
    """Why these kernels cannot compute the model; "" if they can."""
    c = model.config
    if c.kv_lora_rank is None or c.gate_affinity != "dot":
        return f"kv_lora_rank={c.kv_lora_rank}, gate_affinity={c.gate_affinity!r}"
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if (width := getattr(c, name)) & (width - 1) or width < 16:
            return f"{name}={width} is no power of two from 16"
    return ""


def unready(model: Transformer) -> str:
    """Why these kernels cannot read the weights as they are, which a replica can change; "" if they can."""
    held = {
        parameter.dtype
        for module in model.modules()
        if isinstance(module, Quantisable | nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    if wrong := held - {model.dtype, FP8}:
        return f"weights in {', '.join(sorted(map(str, wrong)))}, computing in {model.dtype}"
    return ""
