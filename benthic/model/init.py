"""Initial weights: every matrix ~ N(0, std^2), every norm 1, every bias 0 (V3 Sec 4.2).

Seeded per tensor name, so that the numbers depend neither on the device nor on how tensors are stacked or split.
"""

import hashlib

import torch
from torch import nn

from benthic.model.transformer import Transformer


def initialise(model: Transformer, std: float, seed: int) -> Transformer:
    """Fill all parameters in place and zero the gate biases; returns the model."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif parameter.dim() == 3:  # stacked experts: one stream each
            for expert, slice_ in enumerate(parameter):
                _normal(slice_, std, f"{seed}/{name}/{expert}")
        else:
            _normal(parameter, std, f"{seed}/{name}")
    for gate in model.gates():
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.zero_()
    return model


@torch.no_grad()
def _normal(tensor: torch.Tensor, std: float, key: str) -> None:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * std)
