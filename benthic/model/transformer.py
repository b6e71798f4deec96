"""The whole model: embedding, blocks, final norm, head, and the multi-token prediction modules beside them.

Letters: B rows, T tokens, d hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.model.block import Block, Context
from benthic.model.cache import CacheView
from benthic.model.capacity import Capacity
from benthic.model.config import ModelConfig
from benthic.model.gate import Choice, Gate
from benthic.model.linear import Linear, RMSNorm
from benthic.model.mtp import MODULES
from benthic.parallel.dispatch import Dispatcher, LocalDispatcher


@dataclass
class Trunk:
    """A pass that has come to the last layer: x [B, T, d] before it, the choices so far, and what layers share."""

    x: Tensor
    choices: list[Choice]
    context: Context


class Transformer(nn.Module):
    """A model of the DeepSeek family. Master weights may be float32 while arithmetic runs in `dtype`. Holds no counters
    and no cache."""

    def __init__(
        self, config: ModelConfig, *, dispatcher: Dispatcher | None = None, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.config, self.dtype = config, dtype
        dispatcher = dispatcher or LocalDispatcher()
        table = torch.empty(config.vocab_size, config.hidden_size)  # given, since drawing one on meta takes a second
        self.embed_tokens = nn.Embedding(*table.shape, _weight=table)
        self.layers = nn.ModuleList(Block(config, i, dispatcher) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        module = MODULES[config.mtp_type]
        self.mtp = nn.ModuleList(module(config, k, dispatcher) for k in range(config.num_nextn_predict_layers))

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, d] in the compute dtype."""
        return F.embedding(ids, self.embed_tokens.weight).to(self.dtype)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: CacheView | None = None,
    ) -> tuple[Tensor, list[Choice]]:
        """ids [B, T] -> hidden states after the final norm [B, T, d], and each mixture layer's choice of experts.

        With a cache view the pass is absorbed and cached (positions [B, T] required); otherwise expanded and causal.
        """
        return self.top(self.trunk(ids, positions, segments, cache))

    def trunk(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: CacheView | None = None,
        capacity: Capacity | None = None,
    ) -> Trunk:
        """All layers but the last, as `hidden` would run them. `capacity` bounds the experts' work, in training."""
        context = Context.of(self.config, ids, positions, segments, cache, capacity)
        x, choices = self.embed(ids), []
        for layer in self.layers[:-1]:
            x, choice = layer(x, context)
            choices += [] if choice is None else [choice]
        return Trunk(x, choices, context)

    def top(self, trunk: Trunk) -> tuple[Tensor, list[Choice]]:
        """The last layer and the final norm: what `hidden` returns."""
        x, choice = self.layers[-1](trunk.x, trunk.context)
        return self.norm(x), trunk.choices + ([] if choice is None else [choice])

    def mtp_input(self, trunk: Trunk, hidden: Tensor) -> Tensor:
        """What the first prediction module reads [B, T, d]."""
        return hidden if self.config.mtp_type == "sequential" else trunk.x

    def mtp_hidden(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: CacheView | None = None,
        depth: int = 0,
        capacity: Capacity | None = None,
    ) -> tuple[Tensor, Choice | None]:
        """hidden [B, T, d] of the depth before (parallel heads: of the trunk), next_ids [B, T] = t_{i+1+depth} ->
        hidden states whose logits predict t_{i+2+depth}."""
        context = Context.of(self.config, next_ids, positions, segments, cache, capacity)
        return self.mtp[depth](hidden, self.embed(next_ids), context)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> float32 logits [..., V]."""
        return F.linear(hidden, self.head.to(hidden.dtype)).float()

    @property
    def head(self) -> Tensor:
        """The output matrix [V, d]: its own, or the embedding."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> logits [B, T, V] in float32."""
        return self.logits(self.hidden(ids)[0])

    def gates(self) -> list[Gate]:
        """The gates in the order in which `hidden` and then the MTP modules report their choices."""
        return [module for module in self.modules() if isinstance(module, Gate)]
