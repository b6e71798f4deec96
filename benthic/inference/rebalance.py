"""Moving experts to where their measured load wants them, between two steps. All ranks do this together.

Letters as in share.py.
"""

import numpy as np
import torch
from torch import Tensor

from benthic.inference.share import PlacedMoE, Share
from benthic.parallel.eplb import Placement, keep_in_place
from benthic.parallel.ranks import Ranks


def measured(share: Share) -> np.ndarray:
    """Tokens of each expert since the last placement [L, E]. Waits for the device."""
    return torch.stack([mixture.load for mixture in share.mixtures]).cpu().numpy()


def better(share: Share, old: Placement) -> Placement:
    """A placement for the measured load, with as much as possible left where it is."""
    return keep_in_place(old, share.placed(measured(share)))


@torch.no_grad()
def move(share: Share, old: Placement, new: Placement) -> None:
    """Bring every expert to its new slots, layer by layer, and send tokens there from the next step on.

    Steps in flight are not disturbed: the copies queue up behind them. The memory besides the model is that of the
    experts that one layer receives.
    """
    for row, mixture in enumerate(share.mixtures):
        _move_layer(mixture, old.physical_to_logical[row], new.physical_to_logical[row], share.ranks)
    share.place(new)


def _move_layer(mixture: PlacedMoE, before: np.ndarray, after: np.ndarray, ranks: Ranks) -> None:
    """before, after [P]: the expert in each slot. A rank that holds an expert already copies it from itself."""
    stacks = list(mixture.routed_experts.state_dict().values())  # [P/n, ...] each
    sends: list[tuple[Tensor, int]] = []
    receives: list[tuple[Tensor, int]] = []
    arrived: list[tuple[int, list[Tensor]]] = []
    for slot in np.flatnonzero(before != after).tolist():
        to, at = divmod(slot, mixture.slots)
        holders = np.flatnonzero(before == after[slot]).tolist()
        near = [holder for holder in holders if holder // mixture.slots == to]
        source, place = divmod((near or holders)[slot % len(near or holders)], mixture.slots)
        if to == ranks.rank:
            if source == to:
                arrived.append((at, [stack[place].clone() for stack in stacks]))
            else:
                found = [torch.empty_like(stack[0]) for stack in stacks]
                arrived.append((at, found))
                receives += [(tensor, source) for tensor in found]
        elif source == ranks.rank:
            sends += [(stack[place], to) for stack in stacks]
    ranks.exchange(sends, receives)
    for at, tensors in arrived:  # only now: the slots may have been read
        for stack, tensor in zip(stacks, tensors):
            stack[at].copy_(tensor)
