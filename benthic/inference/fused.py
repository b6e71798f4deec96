"""The forward pass as a list of kernels: what `Transformer.hidden` computes, for packed tokens on a GPU.

It reads the parameters of the model's own modules. Projections of the same input are laid into one storage, of which
the parameters become views; the absorbed matrices are views of `kv_b_proj`. Nothing is copied, so whoever writes the
weights in place is obeyed by the next step. Reads like `Block`, `MLA` and `MoE`, whose equations it shares.

Letters: N tokens (decode rows first), B decode rows of Q queries, H heads, D, P, V, R widths as in mla.py, d hidden.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.base.errors import InputError
from benthic.kernels import latent_store, mla_decode, moe, norm, route, speculate
from benthic.kernels.gemv import linear
from benthic.kernels.latent import Latents
from benthic.kernels.mla_prefill import merge, mla_prefill
from benthic.kernels.moe import ExpertWeights
from benthic.kernels.moe_sorted import silu_times_up
from benthic.model.block import Block
from benthic.model.cache import LatentCache
from benthic.model.ffn import FFN
from benthic.model.linear import Linear, RMSNorm
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
    """A part of the prefill rows' cached contexts: slots [S] of its tokens, first [rows + 1] int32 starts."""

    slots: Tensor
    first: Tensor


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
    """`hidden(tokens)` and `mtp_hidden(...)` of `model` over `cache`, whose pages hold `page_size` tokens."""

    def __init__(self, model: Transformer, cache: LatentCache, page_size: int):
        if reason := unfit(model):
            raise InputError(f"{reason} -> use the plain forward pass")
        self.model, self.cache, self.page_size = model, cache, page_size
        device = model.embed_tokens.weight.device
        self.frequencies, self.turn = frequencies(model.config, device), turn_factor(model.config)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, MLA):
                    lay_together(module.q_a_proj if module.compressed else module.q_proj, module.kv_a_proj_with_mqa)
                elif isinstance(module, FFN):
                    lay_together(module.gate_proj, module.up_proj)
        self.experts = {module: of_module(module) for module in model.modules() if isinstance(module, MoE)}

    def hidden(self, tokens: Tokens) -> Tensor:
        """-> hidden states after the final norm [N, d]. The latents of the tokens are in the cache afterwards."""
        angles = self.angles(tokens.positions)
        blocks: list[Block] = list(self.model.layers)  # type: ignore[arg-type]
        norms = [block.input_layernorm for block in blocks]
        x = F.embedding(tokens.ids, self.model.embed_tokens.weight)
        normed = rms_norm(norms[0], x)
        for layer, (block, after) in enumerate(zip(blocks, [*norms[1:], self.model.norm])):
            normed, x = self.block(layer, block, normed, x, after, tokens, angles)
        return normed

    def mtp_hidden(
        self, hidden: Tensor, next_ids: Tensor, tokens: Tokens, depth: int, at: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """hidden [N, d] of the depth before, or rows `at` [N] of it, next_ids [N] -> hidden states of module `depth`
        [N, d]."""
        module: MTP = self.model.mtp[depth]  # type: ignore[assignment]
        normed, x = self._mtp_input(module, hidden, next_ids, at)
        layer, angles = self.model.config.num_hidden_layers + depth, angles or self.angles(tokens.positions)
        return self.block(layer, module.block, normed, x, module.shared_head.norm, tokens, angles)[0]

    def mtp_fill(self, hidden: Tensor, next_ids: Tensor, tokens: Tokens, depth: int) -> None:
        """Write the latents that `mtp_hidden` would write, and compute nothing else."""
        module: MTP = self.model.mtp[depth]  # type: ignore[assignment]
        attn: MLA = module.block.self_attn  # type: ignore[assignment]
        normed, _ = self._mtp_input(module, hidden, next_ids, None)
        kv_a, kv_norm = linear(normed, attn.kv_a_proj_with_mqa.weight), attn.kv_a_layernorm
        latents = self.cache.layers[self.model.config.num_hidden_layers + depth]
        unused = kv_a[:, latents.width :].unsqueeze(1)  # in place of queries
        angles = self.angles(tokens.positions)
        latent_store.store(kv_a, kv_norm.weight, kv_norm.eps, unused, *angles, tokens.slots, latents, dense=False)

    def _mtp_input(self, module: MTP, hidden: Tensor, next_ids: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor]:
        """The module's residual stream [N, d] and its norm, in the other order."""
        enorm, hnorm = module.enorm, module.hnorm
        both = speculate.module_input(
            self.model.embed_tokens.weight, next_ids, hidden, enorm.weight, hnorm.weight, (enorm.eps, hnorm.eps), at
        )
        x = linear(both, module.eh_proj.weight)  # V3 Eq 21
        return rms_norm(module.block.input_layernorm, x), x

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [N] -> cos, sin [N, P/2] float32."""
        return speculate.angles(positions, self.frequencies, self.turn)

    def block(
        self, layer: int, block: Block, normed: Tensor, x: Tensor, after: RMSNorm, tokens: Tokens,
        angles: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One layer: the residual stream x [N, d] and its norm for this layer -> the same for what comes `after`."""
        delta = self.attention(layer, block.self_attn, normed, tokens, angles)  # type: ignore[arg-type]
        middle = block.post_attention_layernorm
        normed, x = norm.add_rms_norm(delta, x, middle.weight, middle.eps)
        return self.feed_forward(block.mlp, normed, x, after)  # type: ignore[arg-type]

    def attention(self, layer: int, attn: MLA, x: Tensor, tokens: Tokens, angles: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, d] -> [N, d]: absorbed for the decode rows, decompressed for the prompts."""
        latents = self.cache.layers[layer]
        query = attn.q_a_proj if attn.compressed else attn.q_proj
        width = query.weight.shape[0]
        q, kv_a = linear(x, together(query, attn.kv_a_proj_with_mqa)).tensor_split([width], -1)
        if attn.compressed:
            q = linear(rms_norm(attn.q_a_layernorm, q), attn.q_b_proj.weight)
        q = q.unflatten(-1, (attn.heads, -1))  # [N, H, D + P]
        kv_norm = attn.kv_a_layernorm
        q_rope, dense = latent_store.store(
            kv_a, kv_norm.weight, kv_norm.eps, q, *angles, tokens.slots, latents, dense=tokens.prefill is not None
        )
        d, v = attn.query_sizes[0], attn.value_size
        out = x.new_empty(len(x), attn.heads, v)
        n = 0
        if tokens.decode is not None:
            n = tokens.decode.rows * tokens.decode.queries
            w_uk, w_uv = attn.kv_b_proj.weight.unflatten(0, (attn.heads, -1)).split([d, v], 1)  # [H, D or V, R]
            q_latent = torch.bmm(q[:n, :, :d].transpose(0, 1), w_uk)  # [H, n, R], W^UK absorbed into the query
            o_latent = mla_decode.mla_decode(
                q_latent, q_rope[:n], latents, tokens.decode.table, tokens.decode.context,
                page_size=self.page_size, scale=attn.scale,
            )  # fmt: skip
            torch.bmm(o_latent, w_uv.transpose(1, 2), out=out[:n].transpose(0, 1))  # W^UV absorbed into the output
        if tokens.prefill is not None and dense is not None:
            out[n:] = self.prompts(attn, q[n:, :, :d], q_rope[n:], dense[0][n:], dense[1][n:], latents, tokens.prefill)
        return linear(out.flatten(1), attn.o_proj.weight)

    def prompts(
        self, attn: MLA, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, latents: Latents, chunks: Prefill
    ) -> Tensor:
        """Each chunk over itself, then over the cached tokens before it, piece by piece -> [N, H, V]."""

        def expand(latent: Tensor) -> Tensor:
            return F.linear(latent, attn.kv_b_proj.weight).unflatten(-1, (attn.heads, -1))  # [S, H, D + V]

        first, longest = chunks.first, chunks.longest
        result = mla_prefill(q_nope, q_rope, expand(c_kv), k_rope, first, first, longest, attn.scale, causal=True)
        for piece in chunks.pieces:
            c_kv, k_rope = latents.read(piece.slots, q_nope.dtype)
            part = mla_prefill(
                q_nope, q_rope, expand(c_kv), k_rope, first, piece.first, longest, attn.scale, causal=False
            )
            result = merge(result, part)
        return result[0]

    def feed_forward(self, mlp: FFN | MoE, normed: Tensor, x: Tensor, after: RMSNorm) -> tuple[Tensor, Tensor]:
        """normed [N, d] through the network, added to x [N, d] -> (its norm for what comes `after`, the sum)."""
        if isinstance(mlp, FFN):
            return norm.add_rms_norm(dense(mlp, normed), x, after.weight, after.eps)
        c, gate = self.model.config, mlp.gate
        ids, weights = route.route(
            normed, gate.weight, gate.e_score_correction_bias, num_experts_per_tok=c.num_experts_per_tok,
            scoring_func=c.scoring_func, topk_method=c.topk_method, n_group=c.n_group, topk_group=c.topk_group,
            norm_topk_prob=c.norm_topk_prob, routed_scaling_factor=c.routed_scaling_factor,
        )  # fmt: skip
        return moe.moe_norm(normed, self.experts[mlp], ids, weights, x, after.weight, after.eps)


def dense(network: FFN, x: Tensor) -> Tensor:
    """SwiGLU of x [N, d]."""
    middle = silu_times_up(linear(x, together(network.gate_proj, network.up_proj)))
    return linear(middle, network.down_proj.weight)


def rms_norm(module: RMSNorm, x: Tensor) -> Tensor:
    """x [N, d] -> its norm."""
    return norm.rms_norm(x, module.weight, module.eps)


def of_module(mlp: MoE) -> ExpertWeights:
    """The weights of a mixture under the names of its kernels, in place."""
    shared = mlp.shared_experts
    return ExpertWeights(
        gate_up_proj=mlp.routed_experts.gate_up_proj, down_proj=mlp.routed_experts.down_proj,
        shared_gate_proj=shared.gate_proj.weight, shared_up_proj=shared.up_proj.weight,
        shared_down_proj=shared.down_proj.weight,
    )  # fmt: skip


def unfit(model: Transformer) -> str:
    """Why these kernels cannot compute the model; "" if they can."""
    c = model.config
    if c.kv_lora_rank is None or c.gate_affinity != "dot":
        return f"kv_lora_rank={c.kv_lora_rank}, gate_affinity={c.gate_affinity!r}"
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if (width := getattr(c, name)) & (width - 1) or width < 16:
            return f"{name}={width} is no power of two from 16"
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes != {model.dtype}:
        return f"weights in {', '.join(sorted(map(str, dtypes)))}, computing in {model.dtype}, not all in one dtype"
    return ""


def lay_together(*layers: Linear) -> None:
    """Put the weights of layers that read the same input into one storage, of which they become views.

    Weights that are neighbours stay where they are: graphs that another engine has captured go on reading them.
    """
    weights = [layer.weight for layer in layers]
    shared = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if shared and all(b.data_ptr() == a.data_ptr() + a.nbytes for a, b in pairwise(weights)):
        return
    whole = torch.cat([layer.weight for layer in layers])
    for layer, part in zip(layers, whole.split([len(layer.weight) for layer in layers])):
        layer.weight.data = part


def together(first: Linear, second: Linear) -> Tensor:
    """The two weights [out, in] that `lay_together` made neighbours, as one matrix."""
    (n, width), m = first.weight.shape, len(second.weight)
    return first.weight.as_strided((n + m, width), (width, 1))
