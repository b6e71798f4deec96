"""Which experts each token visited, kept beside its latents, so that training can send it to the same ones.

They are those of the pass whose logits the answer was drawn from. A request that is preempted takes what it has along:
the pass that computes its tokens again may choose otherwise where two experts nearly tie, but chose nothing.

Letters: L mixture layers (prediction modules not among them), K experts per token.
"""

import contextlib

import numpy as np
import torch
from torch import Tensor

from benthic.base.errors import InputError
from benthic.inference.request import Seq
from benthic.model.moe import MoE
from benthic.model.transformer import Transformer


def per_token(model: Transformer) -> tuple[int, int, torch.dtype]:
    """L, K, and the type that every expert's number fits. InputError for a model without mixture layers."""
    c, layers = model.config, sum(isinstance(block.mlp, MoE) for block in model.layers)
    if not layers:
        raise InputError("return_routed_experts=True, but the model has no mixture layers -> leave it out")
    return layers, c.num_experts_per_tok, torch.uint8 if c.n_routed_experts <= 256 else torch.int16


def bytes_per_token(model: Transformer) -> int:
    """Device memory of one slot."""
    layers, k, dtype = per_token(model)
    return layers * k * dtype.itemsize


class RoutedExperts:
    """ids [slots, L, K] on the model's device."""

    def __init__(self, model: Transformer, slots: int):
        layers, k, dtype = per_token(model)
        device = model.embed_tokens.weight.device
        self.ids = torch.zeros(slots, layers, k, dtype=dtype, device=device)
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def write(self, slots: Tensor, choices: list[Tensor]) -> None:
        """choices: [N, K] per mixture layer, for the tokens whose latents stand in `slots` [N]."""
        self.ids[slots] = torch.stack(choices, 1).to(self.ids.dtype)

    def read(self, slots: np.ndarray) -> np.ndarray:
        """What steps that were collected have written to `slots` [N] -> [N, L, K]. Does not wait for steps in flight:
        none of them writes there."""
        with contextlib.nullcontext() if self._aside is None else torch.cuda.stream(self._aside):
            return self.ids[torch.from_numpy(slots).to(self.ids.device)].cpu().numpy()


class Routing:
    """What unfinished requests have taken along: an array [tokens, L, K] each."""

    def __init__(self, store: RoutedExperts, page_size: int):
        self._store, self._page_size = store, page_size
        self._taken: dict[int, np.ndarray] = {}

    def keep(self, leaving: list[tuple[Seq, list[int], int]]) -> None:
        """Before others write to their pages: take what stands there for requests of so many computed tokens each. What
        one of them took before stays as it is."""
        wanted = []
        for seq, pages, computed in leaving:
            place = np.arange(len(self._taken.get(seq.request_id, ())), computed)
            if len(place):
                slots = np.array(pages)[place // self._page_size] * self._page_size + place % self._page_size
                wanted.append((seq.request_id, slots))
        if not wanted:
            return
        found = self._store.read(np.concatenate([slots for _, slots in wanted]))
        ends = np.cumsum([len(slots) for _, slots in wanted])
        for (request_id, _), part in zip(wanted, np.split(found, ends[:-1])):
            known = self._taken.get(request_id)
            self._taken[request_id] = part if known is None else np.concatenate((known, part))

    def take(self, seq: Seq) -> np.ndarray:
        """Of a request that has ended: all tokens that were computed, the last of the answer therefore not."""
        found = self._taken.pop(seq.request_id, None)
        empty = self._store.ids[:0].cpu().numpy()
        return empty if found is None else found[: len(seq.ids) - 1]
