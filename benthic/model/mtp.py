"""Multi-token prediction: one more block per depth that predicts one token further (V3 Eq 21-23), and for comparison
the independent heads of Gloeckle et al. (2024).

Two choices that the paper leaves open or prints otherwise follow the released weights and the engines that serve them:
`eh_proj` takes the embedding first and the hidden state second, and the hidden state comes after the final norm.
`paper_order` turns one order into the other.
"""

import torch
from torch import Tensor, nn

from benthic.model.block import Block, Context
from benthic.model.config import ModelConfig
from benthic.model.gate import Choice
from benthic.model.linear import Linear, RMSNorm
from benthic.parallel.dispatch import Dispatcher


class SharedHead(nn.Module):
    """The norm before the output head that is shared with the main model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTP(nn.Module):
    """Module of depth k (from 0): hidden states of the depth before and embeddings one token on -> hidden states."""

    def __init__(self, config: ModelConfig, depth: int, dispatcher: Dispatcher):
        super().__init__()
        d = config.hidden_size
        self.enorm = RMSNorm(d, config.rms_norm_eps)
        self.hnorm = RMSNorm(d, config.rms_norm_eps)
        self.eh_proj = Linear(2 * d, d)
        self.block = Block(config, config.num_hidden_layers + depth, dispatcher)
        self.shared_head = SharedHead(config)

    def forward(self, hidden: Tensor, next_embeds: Tensor, context: Context) -> tuple[Tensor, Choice | None]:
        """hidden h^{k-1} [B, T, d], next_embeds Emb(t_{i+k}) [B, T, d] -> h^k after its norm [B, T, d]."""
        x = self.eh_proj(torch.cat((self.enorm(next_embeds), self.hnorm(hidden)), -1))  # h', V3 Eq 21
        x, choice = self.block(x, context)  # TRM_k, V3 Eq 22
        return self.shared_head.norm(x), choice


class ParallelMTP(nn.Module):
    """Head of depth k (from 0) beside the main model's last layer: the trunk's state -> hidden states.

    All heads read the same trunk and know nothing of the tokens in between. The main model's last layer and final norm
    are the head of the next token.
    """

    def __init__(self, config: ModelConfig, depth: int, dispatcher: Dispatcher):
        super().__init__()
        self.block = Block(config, config.num_hidden_layers + depth, dispatcher)
        self.shared_head = SharedHead(config)

    def forward(self, trunk: Tensor, next_embeds: Tensor, context: Context) -> tuple[Tensor, Choice | None]:
        """trunk [B, T, d] before the main model's last layer -> hidden states [B, T, d]; next_embeds is not read."""
        x, choice = self.block(trunk, context)
        return self.shared_head.norm(x), choice


MODULES = {"sequential": MTP, "parallel": ParallelMTP}


def paper_order(eh_proj: Tensor) -> Tensor:
    """The weight [d, 2d] of `eh_proj`, embedding first, as the paper's M_k, hidden state first (V3 Eq 21). Its own
    inverse."""
    return eh_proj.roll(eh_proj.shape[0], 1)
